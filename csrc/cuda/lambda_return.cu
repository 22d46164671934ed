// The varlen lambda-return: one block a sequence, backward in time for the returns, forward for the gradients.
#include "cuda/lambda_return.h"

#include "common/lambda_return.h"
#include "cuda/scan.cuh"

namespace dqo::cuda {
namespace {

DQO_KERNEL(kMostThreads, 1) lambda_return_forward_kernel(LambdaReturnArgs a) {
    const std::int64_t b = block_index(), begin = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    const ScanCoefficients c(a.gamma, a.lam);
    const double bootstrap = a.bootstrap[b];
    scan_sequence(
        end - 1, end - begin, -1, {bootstrap, bootstrap, 0},
        [&](std::int64_t t) { return ScanMap::of_row(c.next_return, c.next_value, a.rewards[t], a.values[t], 0); },
        [&](std::int64_t t, const ScanState& next) {
            a.returns[t] = float(lambda_return_step<double>(a.rewards[t], next.v, next.y, c));
        });
}

DQO_KERNEL(kMostThreads, 1) lambda_return_backward_kernel(LambdaReturnArgs a) {
    const std::int64_t b = block_index(), begin = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    const ScanCoefficients c(a.gamma, a.lam);
    const ScanState last = scan_sequence(
        begin, end - begin, 1, {},
        [&](std::int64_t t) { return ScanMap::of_row(c.next_return, 0, a.grad_returns[t], 0, 0); },
        [&](std::int64_t t, const ScanState& previous) {
            a.grad_values[t] = float(times(c.next_value, previous.y));  // V_t enters through G_{t-1} only
            a.grad_rewards[t] = float(lambda_return_adjoint_step<double>(a.grad_returns[t], previous.y, c));
        });
    if (thread_index() == 0) a.grad_bootstrap[b] = float(times(a.gamma, last.y));
}

Status run(void (*kernel)(LambdaReturnArgs), const LambdaReturnArgs& a, void* stream) {
    return launch(kernel, Grid{a.sequences, scan_threads(a.rows, a.sequences), sizeof(ScanShared)}, stream, a);
}

}  // namespace

Status lambda_return_forward(const LambdaReturnArgs& a, void* stream) { return run(lambda_return_forward_kernel, a, stream); }
Status lambda_return_backward(const LambdaReturnArgs& a, void* stream) { return run(lambda_return_backward_kernel, a, stream); }

}  // namespace dqo::cuda
