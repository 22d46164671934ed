// Statistics of a row of logits by the threads of a block, and the gradient of its entries; for token_stats.cu and the one-pass
// kernel of soft_bellman_loss.cu.
#pragma once

#include "common/online_moments.h"
#include "common/token_stats.h"
#include "cuda/device.cuh"
#include "cuda/token_stats.h"

namespace dqo::cuda {

constexpr int kInFlight = 4;  // chunks of 16 bytes that a thread waits for at once

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

// An entry after softcap, and the derivative of that.
template <bool kCap>
DQO_DEVICE float capped(float z, float softcap) {
    return kCap ? softcap * tanhf(z / softcap) : z;
}
template <bool kCap>
DQO_DEVICE float capped_slope(float z, float softcap) {
    if constexpr (!kCap) return 1.0f;
    const float t = tanhf(z / softcap);
    return 1.0f - t * t;
}

// The moments that this thread sees of entries [begin, end): chunk i of the range is thread i % threads's, whatever the addresses.
// `seen(offset, chunk)` and `seen_ref` get every chunk that was read, with its place from `begin`.
template <class T, bool kCap, bool kRef, class Seen, class SeenRef>
DQO_DEVICE Moments<kRef> thread_moments(const T* row, const T* ref, std::int64_t begin, std::int64_t end, float softcap,
                                        float scale, Seen seen, SeenRef seen_ref) {
    constexpr int kCount = Chunk<T>::kCount;
    Moments<kRef> moments;
    T nothing;
    from_float(-INFINITY, nothing);
    const std::int64_t stride = std::int64_t(block_threads()) * kCount;
    for (std::int64_t first = begin + thread_index() * kCount; first < end; first += kInFlight * stride) {
        Chunk<T> z[kInFlight], zr[kInFlight];
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const std::int64_t at = first + j * stride;
            z[j] = load_chunk(row, at, end, nothing);
            if constexpr (kRef) zr[j] = load_chunk(ref, at, end, nothing);
        }
        float value[kInFlight][kCount], ref_value[kInFlight][kRef ? kCount : 1];
        float top = moments.m, ref_top = moments.mr;
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            const std::int64_t at = first + j * stride;
            if (at < end) {
                seen(at - begin, z[j]);
                if constexpr (kRef) seen_ref(at - begin, zr[j]);
            }
#pragma unroll
            for (int i = 0; i < kCount; ++i) {
                // What lies beyond the row stays -inf, also under a softcap, which would make a number of it.
                value[j][i] = at + i < end ? capped<kCap>(to_float(z[j].element[i]), softcap) : -INFINITY;
                top = fmaxf(top, value[j][i]);
                if constexpr (kRef) {
                    ref_value[j][i] = at + i < end ? capped<kCap>(to_float(zr[j].element[i]), softcap) : -INFINITY;
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

// What the gradient of a row's entries is made of: grad = p * (a + kl*(u - u_ref) - entropy*u) + action*onehot, u = log p.
struct RowGradient {
    float peak, log_total, ref_peak, ref_log_total, inverse_temperature;
    float a, kl, entropy, at_action;
    std::int64_t action;  // -1: none in the row

    // `given` are the gradients that arrive at the row's fields.
    DQO_DEVICE static RowGradient of(const RowStatistics& s, const RowCoefficients& c, std::int64_t action, bool valid,
                                     bool acts, float inverse_temperature) {
        RowGradient g;
        g.peak = s.peak;
        g.log_total = s.log_total;
        g.ref_peak = s.ref_peak;
        g.ref_log_total = s.ref_log_total;
        g.inverse_temperature = inverse_temperature;
        g.a = acts && !valid ? NAN : float(c.a);
        g.kl = float(c.kl);
        g.entropy = float(c.entropy);
        g.at_action = float(c.action);
        g.action = acts && valid ? action : -1;
        return g;
    }

    template <bool kKl, bool kEntropy>
    DQO_DEVICE float at(std::int64_t column, float z, float z_ref) const {
        const float u = (z - peak) * inverse_temperature - log_total;
        const float p = exp2_fast(u * kLog2e);
        float factor = a;
        // Where p is 0 the ratio is no matter, however infinite; where nobody differentiates the row's KL, nowhere in the row.
        if constexpr (kKl) {
            const float u_ref = (z_ref - ref_peak) * inverse_temperature - ref_log_total;
            factor += kl * (p == 0.0f || kl == 0.0f ? 0.0f : u - u_ref);
        }
        if constexpr (kEntropy) factor -= entropy * (p == 0.0f ? 0.0f : u);
        const float grad = p * factor;
        return (column == action ? grad + at_action : grad) * inverse_temperature;
    }
};

// The gradient of a chunk of entries that begins at `column`.
template <class T, class G, bool kCap, bool kKl, bool kEntropy>
DQO_DEVICE void chunk_gradient(const RowGradient& row, std::int64_t column, float softcap, const Chunk<T>& z,
                               const Chunk<T>& z_ref, G* grad) {
#pragma unroll
    for (int i = 0; i < Chunk<T>::kCount; ++i) {
        const float raw = to_float(z.element[i]);
        const float ref = kKl ? capped<kCap>(to_float(z_ref.element[i]), softcap) : 0.0f;
        const float value = row.at<kKl, kEntropy>(column + i, capped<kCap>(raw, softcap), ref);
        from_float(kCap ? value * capped_slope<kCap>(raw, softcap) : value, grad[i]);
    }
}

}  // namespace dqo::cuda
