// Runs the CUDA kernels of csrc/cuda on the CPU, from the same sources: the names of csrc/cuda/hardware.cuh for a compiler without
// CUDA. Every thread of a block is a fiber. Fibers give way only where CUDA threads meet (barriers, exchanges within a warp) or
// wait (flags), and which one goes on is drawn at random from a seed: so a missing barrier, a protocol that deadlocks, or one that
// reads before it was told to show up as wrong results or as an exception. Shared memory begins as NaN.
//
// Memory between blocks is weak on purpose: a relaxed store stays invisible to other threads for a random while, and may be
// overtaken by later ones, until its thread releases.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#include "cuda/api.h"

#define DQO_DEVICE inline
#define DQO_KERNEL(threads, blocks) void

namespace emulation {

constexpr int kWarp = 32;

struct Place {  // of the running thread
    int thread, threads;
    std::int64_t block;
    int rank, cluster;
    unsigned char* shared;
};
const Place& place();

void meet_block();
void meet_cluster();
void give_way();  // while waiting for another thread
// Gives `size` bytes to the warp and takes those of another lane.
void exchange(const void* mine, void* other, std::size_t size, int lane);
unsigned char* shared_of(int rank);

void store_later(void* address, const void* value, std::size_t size);
void release_stores();
void copy_later(void* to, const void* from, std::size_t size);  // at once, or when the thread waits for its copies
void finish_copies();
void progress();  // something happened that others may wait for

// A launch fails in which 16 bytes are read or written that lie across one of these addresses: ends of arrays.
void end_arrays(const std::vector<std::uintptr_t>& addresses);
void look_at_word(const void* address);

// What runs next is drawn from `seed`; at most `resident` clusters run at a time.
void configure(std::uint64_t seed, int resident);
// Throws std::runtime_error on a deadlock, or when threads of a block part ways at a barrier.
void run(std::int64_t blocks, int threads, std::size_t shared_bytes, int cluster, const std::function<void()>& kernel);

}  // namespace emulation

namespace dqo::cuda {

using std::memcpy;

DQO_DEVICE int thread_index() { return emulation::place().thread; }
DQO_DEVICE std::int64_t block_index() { return emulation::place().block; }
DQO_DEVICE int block_threads() { return emulation::place().threads; }
DQO_DEVICE void sync_block() { emulation::meet_block(); }
DQO_DEVICE unsigned char* shared_memory() { return emulation::place().shared; }

template <class T>
DQO_DEVICE T from_lane(const T& value, int lane) {
    T result;
    emulation::exchange(&value, &result, sizeof(T), lane % emulation::kWarp);
    return result;
}
template <class T>
DQO_DEVICE T from_lane_xor(const T& value, int mask) {
    return from_lane(value, (thread_index() % emulation::kWarp) ^ mask);
}
template <class T>
DQO_DEVICE T from_lane_before(const T& value, int distance) {
    const int lane = thread_index() % emulation::kWarp;
    return from_lane(value, lane < distance ? lane : lane - distance);
}

struct Words {
    std::uint32_t word[4];
};
DQO_DEVICE Words read_words(const void* address) {
    emulation::look_at_word(address);
    Words w;
    memcpy(&w, __builtin_assume_aligned(address, 16), sizeof(w));
    return w;
}
DQO_DEVICE Words read_words_again(const void* address) { return read_words(address); }
DQO_DEVICE void write_words(void* address, const Words& w) {
    emulation::look_at_word(address);
    memcpy(__builtin_assume_aligned(address, 16), &w, sizeof(w));
}
DQO_DEVICE void copy_words(void* shared, const void* address) {
    emulation::look_at_word(address);
    emulation::copy_later(shared, address, sizeof(Words));
}
DQO_DEVICE void wait_for_copies() { emulation::finish_copies(); }
DQO_DEVICE std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, int bits) {
    return std::uint32_t(((std::uint64_t(high) << 32) | low) >> bits);
}

DQO_DEVICE float bfloat16_to_float(std::uint16_t x) {
    const std::uint32_t bits = std::uint32_t(x) << 16;
    float y;
    memcpy(&y, &bits, sizeof(y));
    return y;
}
inline std::uint16_t float_to_bfloat16(float x) {
    if (x != x) return 0x7fff;
    std::uint32_t bits;
    memcpy(&bits, &x, sizeof(bits));
    return std::uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
DQO_DEVICE float float16_to_float(std::uint16_t x) {
    _Float16 y;
    memcpy(&y, &x, sizeof(y));
    return float(y);
}
inline std::uint16_t float_to_float16(float x) {
    const _Float16 y = _Float16(x);
    std::uint16_t bits;
    memcpy(&bits, &y, sizeof(bits));
    return bits;
}

DQO_DEVICE std::uint32_t floats_to_bfloat16(float low, float high) {
    return float_to_bfloat16(low) | std::uint32_t(float_to_bfloat16(high)) << 16;
}
DQO_DEVICE std::uint32_t floats_to_float16(float low, float high) {
    return float_to_float16(low) | std::uint32_t(float_to_float16(high)) << 16;
}

DQO_DEVICE std::uint32_t take_ticket(std::uint32_t* counter) {
    emulation::give_way();  // others may come first
    emulation::progress();
    return (*counter)++;
}
DQO_DEVICE void store_relaxed(double* address, double value) { emulation::store_later(address, &value, sizeof(value)); }
DQO_DEVICE double load_relaxed(const double* address) { return *address; }
DQO_DEVICE void store_release(std::uint32_t* flag, std::uint32_t value) {
    emulation::release_stores();
    emulation::give_way();
    *flag = value;
    emulation::progress();
}
DQO_DEVICE std::uint32_t load_acquire(const std::uint32_t* flag) { return *flag; }
DQO_DEVICE void wait_a_little() { emulation::give_way(); }

DQO_DEVICE int cluster_rank() { return emulation::place().rank; }
DQO_DEVICE int cluster_blocks() { return emulation::place().cluster; }
DQO_DEVICE void sync_cluster() { emulation::meet_cluster(); }
template <class T>
DQO_DEVICE T* in_block(T* shared, int rank) {
    return reinterpret_cast<T*>(emulation::shared_of(rank) +
                                (reinterpret_cast<unsigned char*>(shared) - emulation::place().shared));
}

struct Grid {
    std::int64_t blocks;
    int threads;
    std::size_t shared_bytes = 0;
    int cluster = 1;
};

template <class Arguments>
Status launch(void (*kernel)(Arguments), const Grid& grid, void*, const Arguments& arguments) {
    emulation::run(grid.blocks, grid.threads, grid.shared_bytes, grid.cluster, [&] { kernel(arguments); });
    return 0;
}

}  // namespace dqo::cuda
