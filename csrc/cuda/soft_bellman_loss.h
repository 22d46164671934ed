// soft_bellman_loss in one pass on a CUDA device with thread block clusters: loss rows and the gradient of the logits from one
// read of the logits. Equations: dqo_kernels/soft_bellman_loss.py.
#pragma once

#include <cstdint>

#include "cuda/look_back.h"
#include "cuda/soft_bellman.h"
#include "cuda/token_stats.h"

namespace dqo::cuda {

struct OnePassArgs {
    TokenStatsArgs stats;     // all fields are written, and grad; c_* are not used
    SoftBellmanArgs bellman;  // values nullptr: soft values; logprobs is not used, ref_logprobs only without ref_logits
    const float* ref_lse;     // for soft values without ref_logits
    const float* scale;       // the factor of every row in the loss, a number on the device
    double policy_scale, value_coef, kl_coef;
    LookBack look_back;
};

// How a row is divided among a cluster's blocks; no blocks where no cluster can hold one.
struct OnePassShape {
    int cluster = 0;         // blocks
    std::int64_t slice = 0;  // columns of a block
    std::size_t shared_bytes = 0;
};
OnePassShape one_pass_shape(std::int64_t vocab, Dtype, bool two_models);

Status soft_bellman_loss_one_pass(const OnePassArgs&, Dtype, int processors, void* stream);

// grad *= *factor, unless the factor is 1: then nothing is read or written.
Status rescale(void* grad, std::int64_t count, Dtype, const float* factor, int processors, void* stream);

}  // namespace dqo::cuda
