// lambda_return on a CUDA device; one launch each way. Equations: dqo_kernels/lambda_return.py.
#pragma once

#include <cstdint>

#include "cuda/api.h"

namespace dqo::cuda {

// (rows,) and (sequences,) arrays, contiguous; cu_seqlens holds sequences + 1 offsets.
struct LambdaReturnArgs {
    const float *rewards, *values, *bootstrap;
    float* returns;
    const float* grad_returns;
    float *grad_rewards, *grad_values, *grad_bootstrap;
    const std::int64_t* cu_seqlens;
    std::int64_t rows, sequences;
    double gamma, lam;
};

Status lambda_return_forward(const LambdaReturnArgs&, void* stream);
Status lambda_return_backward(const LambdaReturnArgs&, void* stream);

}  // namespace dqo::cuda
