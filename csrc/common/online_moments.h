// Online softmax moments of a row of logits, of one model (policy) or two (policy and reference), in float.
//
// With x = z - m about the running maximum m, e = exp(x/T), and m_r, x_r, e_r the same of the reference:
//   s = sum e,  u = sum e*x,  d = sum e*(x - x_r),  s_r = sum e_r
// A maximum that moves from m to n (a = m - n, a_r likewise) rescales by r = exp(a/T), r_r = exp(a_r/T):
//   s <- r*s,  u <- r*(u + a*s),  d <- r*(d + (a - a_r)*s),  s_r <- r_r*s_r
// Moments merge by the same rule; merged in a fixed order they are a function of the row alone.
// Identical rows give d = 0 exactly: x - x_r is formed before any product, and only what is written as fmaf is contracted.
#pragma once

#include <cfloat>
#include <cmath>

#include "common/host_device.h"

namespace dqo {

constexpr float kLog2e = 1.4426950408889634f;

DQO_HOST_DEVICE inline float exp2_fast(float x) {
#ifdef __CUDA_ARCH__
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#else
    const float y = exp2f(x);
    return y < FLT_MIN ? 0.0f : y;  // as above: nothing below the normal numbers; NaN stays
#endif
}

// 0 for the maximum of nothing but -inf, which must not be subtracted from -inf.
DQO_HOST_DEVICE inline float finite_peak(float peak) { return peak == -INFINITY ? 0.0f : peak; }

// old - new of a running maximum; -inf when there was nothing before, 0 when there still is nothing.
DQO_HOST_DEVICE inline float moved(float old_peak, float new_peak) {
    return new_peak == -INFINITY ? 0.0f : old_peak - new_peak;
}

template <bool kRef>
struct Moments {
    float m = -INFINITY, s = 0, u = 0, mr = -INFINITY, sr = 0, d = 0;

    // The sums about a maximum that is no smaller. What has no weight stays 0, also where it is infinitely far away.
    DQO_HOST_DEVICE void move_to(float top, float ref_top, float scale) {
        const float shift = moved(m, top), r = exp2_fast(shift * scale);
        const bool nothing = r == 0.0f || s == 0.0f;
        if constexpr (kRef) {
            const float ref_shift = moved(mr, ref_top);
            d = nothing ? 0.0f : r * (d + (shift - ref_shift) * s);
            sr = sr * exp2_fast(ref_shift * scale);
            mr = ref_top;
        }
        u = nothing ? 0.0f : r * (u + shift * s);
        s = s * r;
        m = top;
    }

    // An entry of both rows, none larger than the maxima; `peak` and `ref_peak` are finite_peak of those, scale = log2(e)/T.
    DQO_HOST_DEVICE void add(float z, float z_ref, float peak, float ref_peak, float scale) {
        const float x = z - peak, e = exp2_fast(x * scale);
        s += e;
        u = fmaf(e, fmaxf(x, -FLT_MAX), u);  // -inf has no weight, and a NaN is in e as well
        if constexpr (kRef) {
            const float x_ref = z_ref - ref_peak;
            d = fmaf(e, e == 0.0f ? 0.0f : x - x_ref, d);
            sr += exp2_fast(x_ref * scale);
        }
    }

    DQO_HOST_DEVICE void merge(Moments other, float scale) {
        const float top = fmaxf(m, other.m), ref_top = kRef ? fmaxf(mr, other.mr) : mr;
        move_to(top, ref_top, scale);
        other.move_to(top, ref_top, scale);
        s += other.s;
        u += other.u;
        if constexpr (kRef) {
            d += other.d;
            sr += other.sr;
        }
    }
};

// The fields of a row, from its moments; the reference's are 0 without one.
struct RowStatistics {
    float logprob, lse, entropy, peak, log_total, ref_logprob, ref_lse, kl, ref_peak, ref_log_total;

    // z_a and z_ref_a are the entries of the action, read only if there is such an entry.
    template <bool kRef>
    DQO_HOST_DEVICE static RowStatistics of(const Moments<kRef>& row, double inverse_temperature, bool valid, float z_a,
                                            float z_ref_a) {
        const double nan = NAN;
        const auto log_of = [&](float s) { return s > 0.0f ? log(double(s)) : nan; };  // 0: every entry is -inf
        RowStatistics out{};
        const double log_total = log_of(row.s);
        out.peak = row.s == row.s ? row.m : NAN;
        out.log_total = float(log_total);
        out.lse = float(row.m * inverse_temperature + log_total);
        out.logprob = float(valid ? (double(z_a) - row.m) * inverse_temperature - log_total : nan);
        out.entropy = float(log_total - row.u * inverse_temperature / row.s);
        if constexpr (kRef) {
            const double ref_log_total = log_of(row.sr);
            out.ref_peak = row.sr == row.sr ? row.mr : NAN;
            out.ref_log_total = float(ref_log_total);
            out.ref_lse = float(row.mr * inverse_temperature + ref_log_total);
            out.ref_logprob = float(valid ? (double(z_ref_a) - row.mr) * inverse_temperature - ref_log_total : nan);
            out.kl = float(row.d * inverse_temperature / row.s - (log_total - ref_log_total));
        }
        return out;
    }
};

}  // namespace dqo
