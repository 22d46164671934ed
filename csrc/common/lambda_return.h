// One step of the lambda-return's reverse scan and of its adjoint; the mathematics that every native backend shares.
//
//   G_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * G_{t+1}),   V_{T+1} = G_{T+1} = bootstrap
//
// The adjoint runs forward in time: with g_t the gradient that arrives at G_t,
//   a_t = g_t + gamma * lam * a_{t-1},   dr_t = a_t,   dV_{t+1} = gamma * (1 - lam) * a_t,   dbootstrap = gamma * a_T
#pragma once

#include "common/times.h"

namespace dqo {

struct ScanCoefficients {
    double next_value;   // gamma * (1 - lam)
    double next_return;  // gamma * lam

    DQO_HOST_DEVICE ScanCoefficients(double gamma, double lam) : next_value(gamma * (1.0 - lam)), next_return(gamma * lam) {}
};

template <typename Accumulator>
DQO_HOST_DEVICE inline Accumulator lambda_return_step(Accumulator reward, Accumulator next_value, Accumulator next_return,
                                      ScanCoefficients c) {
    return reward + times(static_cast<Accumulator>(c.next_value), next_value) +
           times(static_cast<Accumulator>(c.next_return), next_return);
}

template <typename Accumulator>
DQO_HOST_DEVICE inline Accumulator lambda_return_adjoint_step(Accumulator upstream, Accumulator previous, ScanCoefficients c) {
    return upstream + times(static_cast<Accumulator>(c.next_return), previous);
}

}  // namespace dqo
