#include "cpu/soft_bellman.h"

#include "cpu/threads.h"

namespace dqo::cpu {

namespace {

// Rough work of a row in units of a vocabulary entry, for parallel_for.
constexpr std::int64_t kRowCost = 64;

template <class T>
class Sequence {
  public:
    Sequence(const SoftBellmanArgs<T>& args, const SoftBellmanOptions& options, std::int64_t b)
        : a(args), o(options), first(args.cu_seqlens[b]), last(args.cu_seqlens[b + 1]),
          bootstrap(args.bootstrap ? args.bootstrap[b] : 0.0) {}

    void run() const {
        // Sums of log-ratios run in double: a response may have tens of thousands of tokens.
        double before = 0.0, after = 0.0;  // of the rows before t, and of t and the rows after it
        if (o.is_level == IsLevel::kTrajectory || o.is_level == IsLevel::kPrefix)
            for (std::int64_t t = first; t < last; ++t) {
                if (!counts(t)) continue;
                if (o.is_level == IsLevel::kPrefix) a.weights[t] = importance_weight(before, o);
                before += log_ratio(t);
            }
        const double of_trajectory = o.is_level == IsLevel::kTrajectory ? importance_weight(before, o) : 1.0;

        double next_value = bootstrap, next_return = bootstrap;
        for (std::int64_t t = last - 1; t >= first; --t) {
            if (!counts(t)) {
                put(t, {}, 0.0);
                continue;
            }
            double weight = of_trajectory;
            if (o.is_level == IsLevel::kSuffix) weight = importance_weight(after += log_ratio(t), o);
            if (o.is_level == IsLevel::kToken) weight = importance_weight(log_ratio(t), o);
            if (o.is_level == IsLevel::kPrefix) weight = a.weights[t];
            const double delta = double(a.logprobs[t]) - double(a.ref_logprobs[t]);
            const double baseline = a.target_values ? a.target_values[t] : a.values[t];
            const SoftBellmanRow row =
                soft_bellman_step(delta, a.rewards[t], a.values[t], baseline, weight, next_value, next_return, o);
            put(t, row, weight);
            next_value = baseline;
            next_return = row.returns;
        }
    }

  private:
    bool counts(std::int64_t t) const { return !a.mask || a.mask[t]; }
    double log_ratio(std::int64_t t) const {
        return double(a.logprobs[t]) - double(a.behavior_logprobs ? a.behavior_logprobs[t] : a.ref_logprobs[t]);
    }
    void put(std::int64_t t, const SoftBellmanRow& row, double weight) const {
        a.policy_loss[t] = row.policy_loss;
        a.value_loss[t] = row.value_loss;
        a.returns[t] = row.returns;
        a.advantages[t] = row.advantage;
        a.weights[t] = weight;
        a.policy_grad[t] = row.policy_grad;
        a.value_grad[t] = row.value_grad;
    }

    const SoftBellmanArgs<T>& a;
    const SoftBellmanOptions& o;
    const std::int64_t first, last;
    const double bootstrap;
};

std::int64_t cost_of_sequence(std::int64_t rows, std::int64_t sequences) {
    return sequences ? (rows / sequences + 1) * kRowCost : 0;
}

}  // namespace

template <class T>
void soft_bellman_forward(const SoftBellmanArgs<T>& a, const SoftBellmanOptions& o, int threads) {
    parallel_for(a.sequences, cost_of_sequence(a.rows, a.sequences), threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b) Sequence<T>(a, o, b).run();
    });
}

template <class T>
void soft_bellman_backward_residual(const ResidualArgs<T>& a, const SoftBellmanOptions& o, int threads) {
    parallel_for(a.sequences, cost_of_sequence(a.rows, a.sequences), threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t b = begin; b < end; ++b) {
            ResidualAdjoint adjoint;
            for (std::int64_t t = a.cu_seqlens[b]; t < a.cu_seqlens[b + 1]; ++t) {
                double grad_logprob = 0.0, grad_value = 0.0;
                if (!a.mask || a.mask[t])
                    adjoint.step(double(a.cotangent[t]) * double(a.policy_grad[t]), o, grad_logprob, grad_value);
                a.grad_logprobs[t] = grad_logprob;
                a.grad_values[t] = grad_value;
            }
            a.grad_bootstrap[b] = adjoint.at_bootstrap(o);
        }
    });
}

template void soft_bellman_forward(const SoftBellmanArgs<float>&, const SoftBellmanOptions&, int);
template void soft_bellman_forward(const SoftBellmanArgs<double>&, const SoftBellmanOptions&, int);
template void soft_bellman_backward_residual(const ResidualArgs<float>&, const SoftBellmanOptions&, int);
template void soft_bellman_backward_residual(const ResidualArgs<double>&, const SoftBellmanOptions&, int);

}  // namespace dqo::cpu
