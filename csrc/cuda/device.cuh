// What the kernels share: rows of logits, wide accesses that do not depend on alignment, and sums in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

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

template <class T>
DQO_DEVICE const T* row_of(const Rows& rows, std::int64_t i) {
    const T* const data = static_cast<const T*>(rows.data);
    if (i < rows.inner) return data + i * rows.inner_stride;  // always in two dimensions: no division to wait for
    return data + (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
}

// Neighbouring elements of a row, 16 bytes of them. They stay packed until they are used: what is unpacked where it is loaded is
// waited for there.
template <class T>
struct Chunk {
    static constexpr int kCount = 16 / sizeof(T);
    Words words;

    DQO_DEVICE float get(int i) const {  // i is known at compile time, in unrolled loops
        if constexpr (sizeof(T) == 4) {
            float x;
            memcpy(&x, &words.word[i], 4);
            return x;
        } else {
            T x;
            x.bits = std::uint16_t(words.word[i / 2] >> (i % 2 * 16));
            return to_float(x);
        }
    }
    DQO_DEVICE static Chunk of(const float* values) {
        Chunk chunk;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            std::uint32_t& word = chunk.words.word[i];
            if constexpr (std::is_same_v<T, float>) memcpy(&word, &values[i], 4);
            if constexpr (std::is_same_v<T, Bfloat16>) word = floats_to_bfloat16(values[2 * i], values[2 * i + 1]);
            if constexpr (std::is_same_v<T, Float16>) word = floats_to_float16(values[2 * i], values[2 * i + 1]);
        }
        return chunk;
    }
    DQO_DEVICE static Chunk all(float value) {
        float values[kCount];
#pragma unroll
        for (float& x : values) x = value;
        return of(values);
    }
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

constexpr int kInFlight = 4;  // chunks of 16 bytes that a thread waits for at once

// The chunk that begins at element `at` of a row of `size`, where it lies across an end of it: an element at a time.
template <class T>
DQO_DEVICE void load_partly(const T* row, std::int64_t at, std::int64_t size, Chunk<T>& chunk) {
    T element[Chunk<T>::kCount];
    memcpy(element, &chunk, sizeof(chunk));
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i)
        if (at + i >= 0 && at + i < size) element[i] = row[at + i];
    memcpy(&chunk, element, sizeof(chunk));
}

// Chunks, `stride` elements (a multiple of a chunk) apart, with `filling` outside of the row. Which thread takes which elements of
// a row never depends on the address, only how they are fetched does: a row's bits are the same wherever it lies. A row that does
// not begin at a multiple of 16 bytes is read in aligned words. The first may begin before it, where an allocation has begun too,
// since that begins at such a multiple; none goes on after its end, where an allocation may end. All reads are issued before
// anything is made of what they bring.
template <class T, int kChunks>
DQO_DEVICE void load_chunks(const T* row, std::int64_t at, std::int64_t stride, std::int64_t size, float filling,
                            Chunk<T> (&chunk)[kChunks]) {
    constexpr int kCount = Chunk<T>::kCount;
    const int offset = misalignment(row + at);
    const int read = kCount + (offset == 0 ? 0 : (16 - offset) / int(sizeof(T)));  // elements from `at` to the end of its words
    const auto whole = [=](int j) { return at + j * stride >= 0 && at + j * stride + read <= size; };
    const char* const aligned = reinterpret_cast<const char*>(row + at) - offset;
#pragma unroll
    for (int j = 0; j < kChunks; ++j) chunk[j] = Chunk<T>::all(filling);
    if (offset == 0) {
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
            if (whole(j)) chunk[j].words = read_words(aligned + j * stride * sizeof(T));
    } else {
        Words first[kChunks], second[kChunks];
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
            if (whole(j)) {
                first[j] = read_words_again(aligned + j * stride * sizeof(T));
                second[j] = read_words_again(aligned + j * stride * sizeof(T) + 16);
            }
#pragma unroll
        for (int j = 0; j < kChunks; ++j)
            if (whole(j)) chunk[j].words = joined(first[j], second[j], offset);
    }
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
        const std::int64_t from = at + j * stride;
        if (!whole(j) && from < size && from + kCount > 0) load_partly(row, from, size, chunk[j]);  // one in a row or two
    }
}

// The same, in a quarter of the instructions where all chunks lie inside the row and aligned: for loops over long rows.
template <class T>
DQO_DEVICE void load_chunks_in_loop(const T* row, std::int64_t at, std::int64_t stride, std::int64_t size, float filling,
                                    Chunk<T> (&chunk)[kInFlight]) {
    if (at + (kInFlight - 1) * stride + Chunk<T>::kCount > size || at < 0 || misalignment(row + at) != 0)
        return load_chunks(row, at, stride, size, filling, chunk);
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) chunk[j].words = read_words(row + at + j * stride);
}

// A chunk of a row to its slot in shared memory, which is filled when this thread has waited for its copies; -inf beyond the row.
template <class T>
DQO_DEVICE void park_chunk(Chunk<T>& slot, const T* row, std::int64_t at, std::int64_t size) {
    if (at + Chunk<T>::kCount <= size && misalignment(row + at) == 0) return copy_words(&slot, row + at);
    Chunk<T> chunk[1];
    load_chunks(row, at, 0, size, -INFINITY, chunk);
    slot = chunk[0];
}

template <class T>
DQO_DEVICE void store_chunk(T* row, std::int64_t at, std::int64_t size, const Chunk<T>& chunk) {
    if (at >= 0 && at + Chunk<T>::kCount <= size && misalignment(row + at) == 0) {
        write_words(row + at, chunk.words);
        return;
    }
    T element[Chunk<T>::kCount];
    memcpy(element, &chunk, sizeof(chunk));
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i)
        if (at + i >= 0 && at + i < size) row[at + i] = element[i];
}

// Merges the values of a block's threads in a fixed order; thread 0 has the result. `exchange` holds one T a warp.
template <class T, class Merge>
DQO_DEVICE T merge_block(T value, T* exchange, Merge merge) {
#pragma unroll
    for (int mask = 1; mask < kWarp; mask *= 2) value = merge(value, from_lane_xor(value, mask));  // lane 0: in their order
    const int warps = block_threads() / kWarp;
    if (thread_index() % kWarp == 0) exchange[thread_index() / kWarp] = value;
    sync_block();
    if (thread_index() == 0)
        for (int warp = 1; warp < warps; ++warp) value = merge(value, exchange[warp]);
    return value;
}

}  // namespace dqo::cuda
