// What a row of soft_bellman does to the state of the reverse scan, and what it becomes; for soft_bellman.cu and the one-pass kernel
// of soft_bellman_loss.cu, which must agree bit by bit.
#pragma once

#include "common/scan_map.h"
#include "cuda/soft_bellman.h"

namespace dqo::cuda {

struct BellmanInputs {  // of a row that counts
    double delta, log_ratio, reward, value, baseline;

    DQO_DEVICE static BellmanInputs of(const SoftBellmanArgs& a, std::int64_t t, float logprob, float ref_logprob,
                                       float value) {
        const double behavior = a.behavior_logprobs ? a.behavior_logprobs[t] : ref_logprob;
        const double baseline = a.target_values ? a.target_values[t] : value;
        return {double(logprob) - double(ref_logprob), double(logprob) - behavior, a.rewards[t], value, baseline};
    }

    DQO_DEVICE ScanMap map(const SoftBellmanOptions& o) const {
        return ScanMap::of_row(o.gamma * o.lam, o.gamma * (1.0 - o.lam), reward - o.beta * delta, baseline, log_ratio);
    }

    // `next` is the state before this row in the scan, that is of the row after it in time.
    DQO_DEVICE SoftBellmanRow row(double weight, const ScanState& next, const SoftBellmanOptions& o) const {
        return soft_bellman_step(delta, reward, value, baseline, weight, next.v, next.y, o);
    }
};

DQO_DEVICE void put_row(const SoftBellmanArgs& a, std::int64_t t, const SoftBellmanRow& row, double weight) {
    a.policy_loss[t] = float(row.policy_loss);
    a.value_loss[t] = float(row.value_loss);
    a.returns[t] = float(row.returns);
    a.advantages[t] = float(row.advantage);
    a.weights[t] = float(weight);
    a.policy_grad[t] = float(row.policy_grad);
    a.value_grad[t] = float(row.value_grad);
}

}  // namespace dqo::cuda
