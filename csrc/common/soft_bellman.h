// Row mathematics of soft_bellman that every native backend shares. Equations: dqo_kernels/soft_bellman.py.
#pragma once

#include <cmath>

#include "common/times.h"

namespace dqo {

enum class PolicyTarget : int { kReturn = 0, kTd = 1, kOneStep = 2 };
enum class IsLevel : int { kTrajectory = 0, kSuffix = 1, kPrefix = 2, kToken = 3, kNone = 4 };

struct SoftBellmanOptions {
    double beta, gamma, lam;
    PolicyTarget policy_target;
    bool residual;
    IsLevel is_level;
    double is_cap, is_floor;  // in log space; +inf and -inf when there is none

    // Ghat_{t+1} = ahead_value() * V_{t+1} + ahead_return() * G_{t+1}
    DQO_HOST_DEVICE double ahead_value() const {
        return policy_target == PolicyTarget::kReturn ? 0.0 : policy_target == PolicyTarget::kTd ? 1.0 - lam : 1.0;
    }
    DQO_HOST_DEVICE double ahead_return() const {
        return policy_target == PolicyTarget::kReturn ? 1.0 : policy_target == PolicyTarget::kTd ? lam : 0.0;
    }
};

// exp of a log-weight clamped before the exponential; NaN stays NaN.
DQO_HOST_DEVICE inline double importance_weight(double x, const SoftBellmanOptions& o) {
    if (x > o.is_cap) x = o.is_cap;
    if (x < o.is_floor) x = o.is_floor;
    return std::exp(x);
}

struct SoftBellmanRow {
    double policy_loss, value_loss, returns, advantage, policy_grad, value_grad;
};

// One row of the reverse scan. `delta` is log pi - log ref, `baseline` the value at every stop-gradient place.
DQO_HOST_DEVICE inline SoftBellmanRow soft_bellman_step(double delta, double reward, double value, double baseline,
                                                        double weight, double next_value, double next_return,
                                                        const SoftBellmanOptions& o) {
    SoftBellmanRow row;
    const double ahead = times(o.ahead_value(), next_value) + times(o.ahead_return(), next_return);
    row.returns = reward - o.beta * delta + times(o.gamma * (1.0 - o.lam), next_value) + times(o.gamma * o.lam, next_return);
    row.advantage = reward + o.gamma * ahead - baseline;
    const double policy_error = o.beta * delta - row.advantage, value_error = value - row.returns;
    row.policy_loss = 0.5 * weight * policy_error * policy_error;
    row.value_loss = 0.5 * weight * value_error * value_error;
    row.policy_grad = (o.residual ? 1.0 : o.beta) * weight * policy_error;
    row.value_grad = o.residual ? 0.0 : weight * value_error;
    return row;
}

// The adjoint of the residual form, forward in time: y is the gradient that arrives at the row's error e_t.
struct ResidualAdjoint {
    double previous_y = 0.0, previous_return = 0.0;  // of the row before: y and the gradient at its G

    DQO_HOST_DEVICE void step(double y, const SoftBellmanOptions& o, double& grad_logprob, double& grad_value) {
        const double at_return = times(o.gamma * o.lam, previous_return) - times(o.ahead_return() * o.gamma, previous_y);
        grad_logprob = o.beta * (y - at_return);
        grad_value = y + at_next_value(o);
        previous_y = y;
        previous_return = at_return;
    }
    DQO_HOST_DEVICE double at_next_value(const SoftBellmanOptions& o) const {
        return times(o.gamma * (1.0 - o.lam), previous_return) - times(o.gamma * o.ahead_value(), previous_y);
    }
    DQO_HOST_DEVICE double at_bootstrap(const SoftBellmanOptions& o) const {  // V_{T+1} and G_{T+1} at once
        return at_next_value(o) + times(o.gamma * o.lam, previous_return) - times(o.gamma * o.ahead_return(), previous_y);
    }
};

}  // namespace dqo
