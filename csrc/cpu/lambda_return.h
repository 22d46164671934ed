#pragma once
#include <cstdint>

namespace dqo::cpu {

// All pointers are contiguous. cu_seqlens holds sequences + 1 offsets into the rows; bootstrap holds one value a sequence.
template <typename T>
void lambda_return_fwd(const T* rewards, const T* values, const T* bootstrap, const std::int64_t* cu_seqlens, T* returns,
                       std::int64_t sequences, double gamma, double lam);

template <typename T>
void lambda_return_bwd(const T* grad_returns, const std::int64_t* cu_seqlens, T* grad_rewards, T* grad_values,
                       T* grad_bootstrap, std::int64_t sequences, double gamma, double lam);

}  // namespace dqo::cpu
