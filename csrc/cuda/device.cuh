// What the kernels share: rows of logits, wide accesses that do not depend on alignment, and sums in a fixed order.
#pragma once

#include <cstdint>

#include "cuda/api.h"

#ifdef __CUDACC__
#include "cuda/hardware.cuh"
#else
#include "cuda_emulation.h"
#endif

namespace dqo::cuda {

constexpr int kWarp = 32;

struct Bfloat16 {
    std::uint16_t bits;
};
struct Float16 {
    std::uint16_t bits;
};

DQO_DEVICE float to_float(float x) { return x; }
DQO_DEVICE float to_float(Bfloat16 x) { return bfloat16_to_float(x.bits); }
DQO_DEVICE float to_float(Float16 x) { return float16_to_float(x.bits); }
DQO_DEVICE void from_float(float x, float& to) { to = x; }
DQO_DEVICE void from_float(float x, Bfloat16& to) { to.bits = float_to_bfloat16(x); }
DQO_DEVICE void from_float(float x, Float16& to) { to.bits = float_to_float16(x); }

template <class T>
DQO_DEVICE const T* row_of(const Rows& rows, std::int64_t i) {
    return static_cast<const T*>(rows.data) + (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
}

// Neighbouring elements of a row, 16 bytes of them.
template <class T>
struct Chunk {
    static constexpr int kCount = 16 / sizeof(T);
    T element[kCount];
};

DQO_DEVICE int misalignment(const void* address) { return int(reinterpret_cast<std::uintptr_t>(address) % 16); }

// 16 bytes that begin `offset` bytes after the first of two neighbouring words.
DQO_DEVICE Words joined(const Words& first, const Words& second, int offset) {
    std::uint32_t w[8];
    for (int i = 0; i < 4; ++i) w[i] = first.word[i], w[i + 4] = second.word[i];
    // Steps with fixed indices: an index known at run time would move the array into memory.
    if (offset & 8)
#pragma unroll
        for (int i = 0; i < 6; ++i) w[i] = w[i + 2];
    if (offset & 4)
#pragma unroll
        for (int i = 0; i < 5; ++i) w[i] = w[i + 1];
    Words result;
#pragma unroll
    for (int i = 0; i < 4; ++i) result.word[i] = funnel_right(w[i], w[i + 1], 8 * (offset & 3));
    return result;
}

// Elements [at, at + kCount) of a row of `size`, with `filling` outside of it. Which thread takes which elements of a row never
// depends on the address, only how they are fetched does: a row's bits are the same wherever it lies. A row that does not begin at
// a multiple of 16 bytes is read in aligned words; they reach beyond it only within words that it has a part of.
template <class T>
DQO_DEVICE Chunk<T> load_chunk(const T* row, std::int64_t at, std::int64_t size, T filling) {
    Chunk<T> chunk;
    if (at >= 0 && at + Chunk<T>::kCount <= size) {
        const int offset = misalignment(row + at);
        const char* const aligned = reinterpret_cast<const char*>(row + at) - offset;
        const Words words = offset == 0 ? read_words(aligned)
                                        : joined(read_words_again(aligned), read_words_again(aligned + 16), offset);
        memcpy(&chunk, &words, sizeof(words));
        return chunk;
    }
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i) chunk.element[i] = at + i >= 0 && at + i < size ? row[at + i] : filling;
    return chunk;
}

template <class T>
DQO_DEVICE void store_chunk(T* row, std::int64_t at, std::int64_t size, const Chunk<T>& chunk) {
    if (at >= 0 && at + Chunk<T>::kCount <= size && misalignment(row + at) == 0) {
        Words words;
        memcpy(&words, &chunk, sizeof(words));
        write_words(row + at, words);
        return;
    }
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i)
        if (at + i >= 0 && at + i < size) row[at + i] = chunk.element[i];
}

// Merges the values of a block's threads in a fixed order; thread 0 has the result. `exchange` holds one T a warp.
template <class T, class Merge>
DQO_DEVICE T merge_block(T value, T* exchange, Merge merge) {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) {
        const T other = from_lane_xor(value, mask);
        // Both lanes of a pair merge in the order of lanes, so that they agree.
        value = thread_index() & mask ? merge(other, value) : merge(value, other);
    }
    const int warps = block_threads() / kWarp;
    if (thread_index() % kWarp == 0) exchange[thread_index() / kWarp] = value;
    sync_block();
    if (thread_index() == 0)
        for (int warp = 1; warp < warps; ++warp) value = merge(value, exchange[warp]);
    return value;
}

}  // namespace dqo::cuda
