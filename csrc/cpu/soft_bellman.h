// soft_bellman on the CPU: importance weights, reverse scan, both losses and their gradient rows in one call.
#pragma once

#include <cstdint>

#include "common/soft_bellman.h"

namespace dqo::cpu {

// (rows,) arrays of T, contiguous; cu_seqlens holds sequences + 1 offsets.
template <class T>
struct SoftBellmanArgs {
    const T *logprobs, *ref_logprobs, *rewards, *values;
    const std::int64_t* cu_seqlens;
    std::int64_t rows, sequences;
    const bool* mask;            // nullptr: every row counts; a row that does not is passed over as if it were not there
    const T* behavior_logprobs;  // nullptr: ref_logprobs
    const T* bootstrap;          // (sequences,), nullptr: 0
    const T* target_values;      // nullptr: values
    T *policy_loss, *value_loss, *returns, *advantages, *weights, *policy_grad, *value_grad;
};

template <class T>
void soft_bellman_forward(const SoftBellmanArgs<T>&, const SoftBellmanOptions&, int threads);

template <class T>
struct ResidualArgs {
    const T *cotangent, *policy_grad;
    const std::int64_t* cu_seqlens;
    std::int64_t rows, sequences;
    const bool* mask;
    T *grad_logprobs, *grad_values, *grad_bootstrap;
};

template <class T>
void soft_bellman_backward_residual(const ResidualArgs<T>&, const SoftBellmanOptions&, int threads);

}  // namespace dqo::cpu
