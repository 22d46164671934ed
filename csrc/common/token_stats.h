// Row mathematics of token_stats that every native backend shares.
//
// A row of V logits is cut into fixed segments. Each leaves a partial over z (after softcap, before temperature):
//   max,  s = sum e,  u = sum e*t,  k = sum e*((z - max) - (z_ref - ref_max)),  e = exp(t),  t = (z - max)/T
// Partials merge associatively; merging them in the order of the segments makes the result a function of the row alone.
#pragma once

#include "common/host_device.h"

namespace dqo {

// Gradient coefficients of a row: d logits = p * (a + kl*(u - u_ref) - entropy*u) + action*onehot, where u = log p.
struct RowCoefficients {
    double a, kl, entropy, action;

    DQO_HOST_DEVICE RowCoefficients(double c_logprobs, double c_lse, double c_entropy, double c_kl, double row_entropy,
                                    double row_kl)
        : a(c_lse - c_logprobs), kl(c_kl), entropy(c_entropy), action(c_logprobs) {
        if (c_kl != 0.0) a -= c_kl * row_kl;  // an infinite KL that nobody differentiates is no reason for a NaN
        if (c_entropy != 0.0) a -= c_entropy * row_entropy;
    }
};

}  // namespace dqo
