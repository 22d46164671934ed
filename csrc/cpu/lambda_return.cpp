// The varlen lambda-return on the CPU: one pass over the rows each way, carries kept in double.
#include "cpu/lambda_return.h"

#include "common/lambda_return.h"

namespace dqo::cpu {

template <typename T>
void lambda_return_fwd(const T* rewards, const T* values, const T* bootstrap, const std::int64_t* cu_seqlens, T* returns,
                       std::int64_t sequences, double gamma, double lam) {
    const ScanCoefficients c(gamma, lam);
    for (std::int64_t b = 0; b < sequences; ++b) {
        double next_value = bootstrap[b];
        double carry = bootstrap[b];
        for (std::int64_t t = cu_seqlens[b + 1] - 1; t >= cu_seqlens[b]; --t) {
            carry = lambda_return_step<double>(rewards[t], next_value, carry, c);
            next_value = values[t];
            returns[t] = static_cast<T>(carry);
        }
    }
}

template <typename T>
void lambda_return_bwd(const T* grad_returns, const std::int64_t* cu_seqlens, T* grad_rewards, T* grad_values,
                       T* grad_bootstrap, std::int64_t sequences, double gamma, double lam) {
    const ScanCoefficients c(gamma, lam);
    for (std::int64_t b = 0; b < sequences; ++b) {
        double carry = 0.0;
        for (std::int64_t t = cu_seqlens[b]; t < cu_seqlens[b + 1]; ++t) {
            grad_values[t] = static_cast<T>(times(c.next_value, carry));  // V_t enters through G_{t-1} only
            carry = lambda_return_adjoint_step<double>(grad_returns[t], carry, c);
            grad_rewards[t] = static_cast<T>(carry);
        }
        grad_bootstrap[b] = static_cast<T>(times(gamma, carry));
    }
}

template void lambda_return_fwd<float>(const float*, const float*, const float*, const std::int64_t*, float*, std::int64_t,
                                       double, double);
template void lambda_return_fwd<double>(const double*, const double*, const double*, const std::int64_t*, double*,
                                        std::int64_t, double, double);
template void lambda_return_bwd<float>(const float*, const std::int64_t*, float*, float*, float*, std::int64_t, double,
                                       double);
template void lambda_return_bwd<double>(const double*, const std::int64_t*, double*, double*, double*, std::int64_t, double,
                                        double);

}  // namespace dqo::cpu
