// Statistics of a row of logits by the threads of a block, and the gradient of its entries; for token_stats.cu and the one-pass
// kernel of soft_bellman_loss.cu.
#pragma once

#include "common/online_moments.h"
#include "common/token_stats.h"
#include "cuda/device.cuh"
#include "cuda/token_stats.h"

namespace dqo::cuda {

template <bool kRef>
DQO_DEVICE void put_fields(const StatisticsFields& to, std::int64_t row, const RowStatistics& s) {
    to.logprobs[row] = s.logprob;
    to.lse[row] = s.lse;
    to.entropy[row] = s.entropy;
    to.peak[row] = s.peak;
    to.log_total[row] = s.log_total;
    if constexpr (kRef) {
        to.ref_logprobs[row] = s.ref_logprob;
        to.ref_lse[row] = s.ref_lse;
        to.kl[row] = s.kl;
        to.ref_peak[row] = s.ref_peak;
        to.ref_log_total[row] = s.ref_log_total;
    }
}

// softcap * tanh(z / softcap), and the derivative of that.
template <bool kCap>
DQO_DEVICE float capped(float z, const Softcap& c) {
    return kCap ? c.cap * tanhf(z * c.inverse) : z;
}
template <bool kCap>
DQO_DEVICE float capped_slope(float z, const Softcap& c) {
    if constexpr (!kCap) return 1.0f;
    const float t = tanhf(z * c.inverse);
    return 1.0f - t * t;
}

// The moments that this thread sees of entries [begin, end): chunk i of the range is thread i % threads's, whatever the addresses.
// `load(first, stride, z, zr)` gives the chunks at first, first + stride ..., -inf beyond the end.
template <class T, bool kCap, bool kRef, class Load>
DQO_DEVICE Moments<kRef> thread_moments(std::int64_t begin, std::int64_t end, const Softcap& softcap, float scale, Load load) {
    constexpr int kCount = Chunk<T>::kCount;
    Moments<kRef> moments;
    const std::int64_t stride = std::int64_t(block_threads()) * kCount;
    for (std::int64_t first = begin + thread_index() * kCount; first < end; first += kInFlight * stride) {
        Chunk<T> z[kInFlight], zr[kInFlight];
        load(first, stride, z, zr);
        float value[kInFlight][kCount], ref_value[kInFlight][kRef ? kCount : 1];
        float top = moments.m, ref_top = moments.mr;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const std::int64_t at = first + j * stride;
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                // What lies beyond the row stays -inf; a softcap would make a number of it.
                const bool beyond = kCap && at + i >= end;
                value[j][i] = beyond ? -INFINITY : capped<kCap>(z[j].get(i), softcap);
                top = fmaxf(top, value[j][i]);
                if constexpr (kRef) {
                    ref_value[j][i] = beyond ? -INFINITY : capped<kCap>(zr[j].get(i), softcap);
                    ref_top = fmaxf(ref_top, ref_value[j][i]);
                }
            }
        }
        moments.move_to(top, ref_top, scale);
        const float peak = finite_peak(top), ref_peak = finite_peak(ref_top);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j)
#pragma unroll
            for (int i = 0; i < kCount; ++i) moments.add(value[j][i], kRef ? ref_value[j][i] : 0.0f, peak, ref_peak, scale);
    }
    return moments;
}

// What the gradient of a row's entries is made of, with x = z - peak and e = exp(x/T):
//   grad = e * (a + kl*log(p/p_ref) - entropy*log p) + at_action*onehot
// The factors contain 1/sum(e) and 1/T, so that an entry costs few instructions.
struct RowGradient {
    float peak, ref_peak, inverse_temperature, scale;  // scale = log2(e)/T
    float log_total, gap;                              // log p = x/T - log_total, log(p/p_ref) = (x - x_ref)/T - gap
    float a, kl, entropy, at_action;
    std::int64_t action;  // -1: no entry of the row

    // `acts`: a gradient arrives at the log-probability of the action, which is an entry of the row if it is `valid`.
    DQO_DEVICE static RowGradient of(const RowStatistics& s, const RowCoefficients& c, std::int64_t action, bool valid,
                                     bool acts, float temperature) {
        const float inverse = 1.0f / temperature, factor = expf(-s.log_total) * inverse;
        RowGradient g;
        g.peak = s.peak;
        g.ref_peak = s.ref_peak;
        g.inverse_temperature = inverse;
        g.scale = inverse * kLog2e;
        g.log_total = s.log_total;
        g.gap = s.log_total - s.ref_log_total;
        g.a = acts && !valid ? NAN : float(c.a * factor);
        g.kl = float(c.kl * factor);
        g.entropy = float(c.entropy * factor);
        g.at_action = float(c.action) * inverse;
        g.action = acts && valid ? action : -1;
        return g;
    }

    template <bool kKl, bool kEntropy>
    DQO_DEVICE float at(float z, float z_ref) const {
        const float x = z - peak, e = exp2_fast(x * scale);
        float inner = a;
        // Where p is 0 its logarithms are no matter, however infinite; where nobody differentiates the row's KL, nowhere in the row.
        if constexpr (kKl) {
            const float log_ratio = fmaf(x - (z_ref - ref_peak), inverse_temperature, -gap);
            inner = fmaf(kl, e == 0.0f || kl == 0.0f ? 0.0f : log_ratio, inner);
        }
        if constexpr (kEntropy) inner = fmaf(-entropy, e == 0.0f ? 0.0f : fmaf(x, inverse_temperature, -log_total), inner);
        return e * inner;
    }
};

// The gradient of a chunk of entries that begins at `column`.
template <class T, bool kCap, bool kKl, bool kEntropy>
DQO_DEVICE void chunk_gradient(const RowGradient& row, std::int64_t column, const Softcap& softcap, const Chunk<T>& z,
                               const Chunk<T>& z_ref, float* grad) {
    constexpr int kCount = Chunk<T>::kCount;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
        const float ref = kKl ? capped<kCap>(z_ref.get(i), softcap) : 0.0f;
        grad[i] = row.at<kKl, kEntropy>(capped<kCap>(z.get(i), softcap), ref);
    }
    const std::int64_t place = row.action - column;
    if (row.action >= 0 && place >= 0 && place < kCount)  // one chunk in a row
#pragma unroll
        for (int i = 0; i < kCount; ++i)
            if (i == place) grad[i] += row.at_action;
    if constexpr (kCap)
#pragma unroll
        for (int i = 0; i < kCount; ++i) grad[i] *= capped_slope<kCap>(z.get(i), softcap);
}

}  // namespace dqo::cuda
