// What the CUDA sources and their callers share: plain data, no CUDA headers.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dqo::cuda {

using Status = int;  // a cudaError_t; 0: success
constexpr Status kInvalidConfiguration = 9;

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };

// A (rows / inner, inner, V) tensor seen as rows: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride elements.
struct Rows {
    const void* data;  // nullptr: absent
    std::int64_t inner, outer_stride, inner_stride;
};

}  // namespace dqo::cuda
