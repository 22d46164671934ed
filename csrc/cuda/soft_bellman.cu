// One block a sequence: log-ratios summed forward in time where a weight needs that, then the reverse scan that gives every row its
// returns, losses and gradients. The residual form's adjoint is the same kind of scan forward in time.
#include "cuda/soft_bellman.h"

#include "cuda/scan.cuh"
#include "cuda/soft_bellman_row.cuh"

namespace dqo::cuda {
namespace {

DQO_DEVICE bool counts(const bool* mask, std::int64_t t) { return !mask || mask[t]; }

DQO_DEVICE BellmanInputs inputs(const SoftBellmanArgs& a, std::int64_t t) {
    return BellmanInputs::of(a, t, a.logprobs[t], a.ref_logprobs[t], a.values[t]);
}

DQO_KERNEL(kMostThreads, 1) soft_bellman_forward_kernel(SoftBellmanArgs a) {
    const SoftBellmanOptions& o = a.options;
    const std::int64_t b = block_index(), begin = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    double of_trajectory = 1.0;
    if (o.is_level == IsLevel::kTrajectory || o.is_level == IsLevel::kPrefix) {
        const ScanState all = scan_sequence(
            begin, end - begin, 1, {},
            [&](std::int64_t t) {
                return counts(a.mask, t) ? ScanMap::of_row(1, 0, 0, 0, inputs(a, t).log_ratio) : ScanMap{};
            },
            [&](std::int64_t t, const ScanState& before) {
                if (o.is_level == IsLevel::kPrefix) a.weights[t] = float(importance_weight(before.x, o));
            });
        if (o.is_level == IsLevel::kTrajectory) of_trajectory = importance_weight(all.x, o);
    }
    const double bootstrap = a.bootstrap ? a.bootstrap[b] : 0.0;
    scan_sequence(
        end - 1, end - begin, -1, {bootstrap, bootstrap, 0},
        [&](std::int64_t t) { return counts(a.mask, t) ? inputs(a, t).map(o) : ScanMap{}; },
        [&](std::int64_t t, const ScanState& next) {
            if (!counts(a.mask, t)) return put_row(a, t, {}, 0.0);
            const BellmanInputs in = inputs(a, t);
            double weight = of_trajectory;
            if (o.is_level == IsLevel::kSuffix) weight = importance_weight(next.x + in.log_ratio, o);
            if (o.is_level == IsLevel::kToken) weight = importance_weight(in.log_ratio, o);
            if (o.is_level == IsLevel::kPrefix) weight = a.weights[t];
            put_row(a, t, in.row(weight, next, o), weight);
        });
}

DQO_KERNEL(kMostThreads, 1) soft_bellman_backward_residual_kernel(ResidualArgs a) {
    const SoftBellmanOptions& o = a.options;
    const std::int64_t b = block_index(), begin = a.cu_seqlens[b], end = a.cu_seqlens[b + 1];
    const auto arriving = [&](std::int64_t t) { return double(a.cotangent[t]) * double(a.policy_grad[t]); };
    const auto adjoint = [](const ScanState& s) { return ResidualAdjoint{s.v, s.y}; };
    const ScanState last = scan_sequence(
        begin, end - begin, 1, {},
        [&](std::int64_t t) {
            if (!counts(a.mask, t)) return ScanMap{};
            return ScanMap::of_row(o.gamma * o.lam, -o.ahead_return() * o.gamma, 0, arriving(t), 0);
        },
        [&](std::int64_t t, const ScanState& previous) {
            double grad_logprob = 0.0, grad_value = 0.0;
            if (counts(a.mask, t)) adjoint(previous).step(arriving(t), o, grad_logprob, grad_value);
            a.grad_logprobs[t] = float(grad_logprob);
            a.grad_values[t] = float(grad_value);
        });
    if (thread_index() == 0) a.grad_bootstrap[b] = float(adjoint(last).at_bootstrap(o));
}

template <class Arguments>
Status run(void (*kernel)(Arguments), const Arguments& a, void* stream) {
    return launch(kernel, Grid{a.sequences, scan_threads(a.rows, a.sequences), sizeof(ScanShared)}, stream, a);
}

}  // namespace

Status soft_bellman_forward(const SoftBellmanArgs& a, void* stream) { return run(soft_bellman_forward_kernel, a, stream); }
Status soft_bellman_backward_residual(const ResidualArgs& a, void* stream) {
    return run(soft_bellman_backward_residual_kernel, a, stream);
}

}  // namespace dqo::cuda
