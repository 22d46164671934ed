// soft_bellman on a CUDA device: importance weights, reverse scan, both losses and their gradient rows in one launch.
// Equations: dqo_kernels/soft_bellman.py.
#pragma once

#include <cstdint>

#include "common/soft_bellman.h"
#include "cuda/api.h"

namespace dqo::cuda {

// (rows,) arrays, contiguous; cu_seqlens holds sequences + 1 offsets.
struct SoftBellmanArgs {
    const float *logprobs, *ref_logprobs, *rewards, *values;
    const std::int64_t* cu_seqlens;
    std::int64_t rows, sequences;
    const bool* mask;                // nullptr: every row counts; a row that does not is passed over as if it were not there
    const float* behavior_logprobs;  // nullptr: ref_logprobs
    const float* bootstrap;          // (sequences,), nullptr: 0
    const float* target_values;      // nullptr: values
    float *policy_loss, *value_loss, *returns, *advantages, *weights, *policy_grad, *value_grad;
    SoftBellmanOptions options;
};

struct ResidualArgs {
    const float *cotangent, *policy_grad;
    const std::int64_t* cu_seqlens;
    std::int64_t rows, sequences;
    const bool* mask;
    float *grad_logprobs, *grad_values, *grad_bootstrap;
    SoftBellmanOptions options;
};

Status soft_bellman_forward(const SoftBellmanArgs&, void* stream);
Status soft_bellman_backward_residual(const ResidualArgs&, void* stream);

}  // namespace dqo::cuda
