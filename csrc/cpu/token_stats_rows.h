// The row kernels of token_stats, compiled once for each instruction set (see cpu/simd.h).
#pragma once

#include "common/token_stats.h"
#include "cpu/simd.h"
#include "cpu/token_stats.h"

namespace {

using dqo::cpu::Rows;
using dqo::cpu::TokenStatsArgs;

// A segment of both rows stays in the first-level cache between the search for its maximum and the sums. The segments of a row
// start at its first element whatever its address, so that the result depends on nothing but the row.
constexpr std::int64_t kSegment = 2048;
constexpr std::int64_t kRun = 32;
constexpr std::int64_t kCacheLine = 64;

template <class T>
const T* row_at(const Rows& rows, std::int64_t i) {
    return static_cast<const T*>(rows.data) + (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
}

// Elements of a row after softcap.
template <class T, bool kCap>
struct Reader {
    using L = typename LanesOf<T>::type;
    using V = typename L::V;
    const T* row;
    typename L::real softcap;

    Reader(const Rows& rows, std::int64_t i, double softcap) : row(row_at<T>(rows, i)), softcap(softcap) {}

    DQO_INLINE V at(std::int64_t i, V* slope = nullptr) const { return cap(L::load(row + i), slope); }
    DQO_INLINE V tail(std::int64_t i, std::int64_t count, V* slope = nullptr) const {  // -inf after `count` elements
        V v = cap(load_tail<L>(row + i, count), slope);
        if constexpr (kCap)
            for (int lane = 0; lane < L::count; ++lane)
                if (lane >= count) v[lane] = -__builtin_inf();
        return v;
    }
    double one(std::int64_t i) const { return tail(i, 1)[0]; }  // exactly as the vectors see it

  private:
    DQO_INLINE V cap(V z, V* slope) const {
        if constexpr (kCap) {
            V y{}, derivative{};
            L::tanh(z / softcap, y, derivative);
            if (slope) *slope = derivative;
            return y * softcap;
        } else {
            return z;
        }
    }
};

// The sums of one segment about its own maximum; see common/token_stats.h.
struct Partial {
    double max = -__builtin_inf(), ref_max = -__builtin_inf(), s = 0, u = 0, k = 0, ref_s = 0;
};

template <class L>
double exp_scalar(double x) {
    typename L::V v = typename L::V{} + static_cast<typename L::real>(x);
    return L::exp_nonpositive(v)[0];
}

inline double gap(double from, double to) { return from == to ? 0.0 : from - to; }  // also for two infinities

template <class L>
void merge(Partial& all, const Partial& next, double inverse_temperature) {
    const double max = next.max > all.max ? next.max : all.max;
    const double ref_max = next.ref_max > all.ref_max ? next.ref_max : all.ref_max;
    Partial sum;
    sum.max = max;
    sum.ref_max = ref_max;
    const Partial* const parts[] = {&all, &next};
    for (const Partial* part : parts) {
        if (part->s != 0.0) {
            const double shift = gap(part->max, max);
            const double scale = shift == 0.0 ? 1.0 : exp_scalar<L>(shift * inverse_temperature);
            sum.s += scale * part->s;
            sum.u += scale * (part->u + part->s * shift * inverse_temperature);
            if (scale != 0.0) sum.k += scale * (part->k + part->s * (shift - gap(part->ref_max, ref_max)));
        }
        if (part->ref_s != 0.0) {
            const double shift = gap(part->ref_max, ref_max);
            sum.ref_s += part->ref_s * (shift == 0.0 ? 1.0 : exp_scalar<L>(shift * inverse_temperature));
        }
    }
    all = sum;
}

template <class R>
DQO_INLINE double segment_max(const R& row, std::int64_t begin, std::int64_t end) {
    using V = typename R::V;
    constexpr int n = R::L::count;
    V m[4];
    for (V& v : m) v = V{} - __builtin_inff();
    std::int64_t i = begin;
    for (; i + 4 * n <= end; i += 4 * n)
        for (int j = 0; j < 4; ++j) {
            const V z = row.at(i + j * n);
            m[j] = R::L::max(z, m[j]);  // passes over NaN; the sums meet it
        }
    for (; i < end; i += n) {
        const V z = i + n <= end ? row.at(i) : row.tail(i, end - i);
        m[0] = R::L::max(z, m[0]);
    }
    for (int j = 1; j < 4; ++j) m[0] = R::L::max(m[j], m[0]);
    return horizontal_max<typename R::L>(m[0]);
}

template <bool kRef, class R>
Partial segment(const R& row, const R& ref, std::int64_t begin, std::int64_t end, double inverse_temperature) {
    using L = typename R::L;
    using V = typename R::V;
    using real = typename L::real;
    Partial part;
    part.max = segment_max(row, begin, end);
    if constexpr (kRef) part.ref_max = segment_max(ref, begin, end);
    // A segment of nothing but -inf: any finite origin will do.
    const real max = part.max == -__builtin_inf() ? 0 : part.max;
    const real ref_max = part.ref_max == -__builtin_inf() ? 0 : part.ref_max;
    const real inverse = inverse_temperature;
    V s{}, u{}, k{}, ref_s{};              // of the current run of kRun vectors
    V s_all{}, u_all{}, k_all{}, ref_all{};  // of the runs before: two levels of sums keep float's rounding from piling up
    const auto add = [&](V z, V z_ref) DQO_LAMBDA_INLINE {
        const V d = z - max;
        V t = d * inverse;
        const V e = L::exp_nonpositive(t);
        s += e;
        u = L::fma(e, t, u);
        if constexpr (kRef) {
            const V d_ref = z_ref - ref_max;
            // The difference before any factor: it is exactly 0 for identical rows, which a contracted multiplication is not.
            // p = 0 contributes nothing, even where that difference is infinite or NaN.
            k = L::fma(e, e == 0 ? V{} : d - d_ref, k);
            V t_ref = d_ref * inverse;
            ref_s += L::exp_nonpositive(t_ref);
        }
    };
    const auto close_run = [&]() DQO_LAMBDA_INLINE {
        s_all += s, u_all += u, k_all += k, ref_all += ref_s;
        s = u = k = ref_s = V{};
    };
    std::int64_t i = begin;
    while (i + L::count <= end) {
        const std::int64_t whole = end - (end - i) % L::count;
        const std::int64_t stop = i + kRun * L::count < whole ? i + kRun * L::count : whole;
        for (; i < stop; i += L::count) {
            __builtin_prefetch(row.row + i + kSegment);
            if constexpr (kRef) __builtin_prefetch(ref.row + i + kSegment);
            add(row.at(i), kRef ? ref.at(i) : V{});
        }
        close_run();
    }
    if (i < end) {
        add(row.tail(i, end - i), kRef ? ref.tail(i, end - i) : V{});
        close_run();
    }
    part.s = horizontal_sum<L>(s_all);
    part.u = horizontal_sum<L>(u_all);
    part.k = horizontal_sum<L>(k_all);
    part.ref_s = horizontal_sum<L>(ref_all);
    return part;
}

template <class T>
struct Fields {  // output i of row r
    using real = typename LanesOf<T>::type::real;
    static void put(void* field, std::int64_t r, double value) { static_cast<real*>(field)[r] = value; }
    static double get(const void* field, std::int64_t r) { return static_cast<const real*>(field)[r]; }
    static double get_or_0(const void* field, std::int64_t r) { return field ? get(field, r) : 0.0; }
};

template <class T, bool kCap, bool kRef>
void forward_rows(const TokenStatsArgs& a, std::int64_t first, std::int64_t last) {
    using F = Fields<T>;
    using R = Reader<T, kCap>;
    const double nan = __builtin_nan("");
    for (std::int64_t r = first; r < last; ++r) {
        if (a.mask && !a.mask[r]) {
            void* const fields[] = {a.logprobs,     a.lse,     a.entropy, a.peak,     a.log_total,
                                    a.ref_logprobs, a.ref_lse, a.kl,      a.ref_peak, a.ref_log_total};
            for (int i = 0; i < (kRef ? 10 : 5); ++i) F::put(fields[i], r, 0.0);
            continue;
        }
        const R row(a.logits, r, a.softcap), ref(kRef ? a.ref_logits : a.logits, r, a.softcap);
        const double temperature = a.temperatures ? a.temperatures[r] : a.temperature, inverse = 1.0 / temperature;
        Partial all;
        for (std::int64_t begin = 0; begin < a.vocab; begin += kSegment) {
            const std::int64_t end = begin + kSegment < a.vocab ? begin + kSegment : a.vocab;
            merge<typename R::L>(all, segment<kRef>(row, ref, begin, end, inverse), inverse);
        }
        const std::int64_t action = a.actions[r];
        const bool valid = action >= 0 && action < a.vocab;
        const double log_total = all.s > 0.0 ? __builtin_log(all.s) : nan;  // s = 0: every entry is -inf
        F::put(a.peak, r, all.s == all.s ? all.max : nan);
        F::put(a.log_total, r, log_total);
        F::put(a.lse, r, all.max * inverse + log_total);
        F::put(a.logprobs, r, valid ? (row.one(action) - all.max) * inverse - log_total : nan);
        F::put(a.entropy, r, log_total - all.u / all.s);
        if constexpr (kRef) {
            const double ref_log_total = all.ref_s > 0.0 ? __builtin_log(all.ref_s) : nan;
            F::put(a.ref_peak, r, all.ref_s == all.ref_s ? all.ref_max : nan);
            F::put(a.ref_log_total, r, ref_log_total);
            F::put(a.ref_lse, r, all.ref_max * inverse + ref_log_total);
            F::put(a.ref_logprobs, r, valid ? (ref.one(action) - all.ref_max) * inverse - ref_log_total : nan);
            F::put(a.kl, r, all.k * inverse / all.s - (log_total - ref_log_total));
        }
    }
}

// Reads T, writes a gradient of G.
template <class T, class G, bool kCap, bool kKl, bool kEntropy>
void backward_rows(const TokenStatsArgs& a, std::int64_t first, std::int64_t last) {
    using F = Fields<T>;
    using R = Reader<T, kCap>;
    using L = typename R::L;
    using V = typename R::V;
    using real = typename L::real;
    for (std::int64_t r = first; r < last; ++r) {
        G* grad = static_cast<G*>(a.grad) + r * a.vocab;
        if (a.mask && !a.mask[r]) {
            std::memset(static_cast<void*>(grad), 0, a.vocab * sizeof(G));
            continue;
        }
        const R row(a.logits, r, a.softcap), ref(kKl ? a.ref_logits : a.logits, r, a.softcap);
        const double inverse_temperature = 1.0 / (a.temperatures ? a.temperatures[r] : a.temperature);
        dqo::RowCoefficients c(F::get_or_0(a.c_logprobs, r), F::get_or_0(a.c_lse, r), F::get_or_0(a.c_entropy, r),
                               F::get_or_0(a.c_kl, r), kEntropy ? F::get(a.entropy, r) : 0.0, kKl ? F::get(a.kl, r) : 0.0);
        const std::int64_t action = a.actions[r];
        if (a.c_logprobs && (action < 0 || action >= a.vocab)) c.a = __builtin_nan("");
        // p = exp(t) / s: the divisor and the temperature go into the coefficients.
        const double log_total = F::get(a.log_total, r);
        const double scale = __builtin_exp(-log_total) * inverse_temperature;
        const real max = F::get(a.peak, r), inverse = inverse_temperature, origin = log_total;
        const real ref_max = kKl ? F::get(a.ref_peak, r) : 0.0;
        const real ref_gap = kKl ? log_total - F::get(a.ref_log_total, r) : 0.0;
        const real c_a = c.a * scale, c_kl = c.kl * scale, c_entropy = c.entropy * scale;
        const real at_action = c.action * inverse_temperature;
        // Where p is 0 the ratio is no matter, however infinite; where nobody differentiates the row's KL, nowhere in the row.
        const real nothing = c.kl == 0.0 ? __builtin_inf() : 0.0;

        const auto gradient = [&](std::int64_t i, V z, V z_ref, V slope) DQO_LAMBDA_INLINE {
            const V d = z - max;
            V t = d * inverse;
            const V e = L::exp_nonpositive(t);
            V inner = V{} + c_a;
            if constexpr (kKl) {
                const V log_ratio = L::fma(d - (z_ref - ref_max), V{} + inverse, V{} - ref_gap);
                inner = L::fma(V{} + c_kl, e <= nothing ? V{} : log_ratio, inner);
            }
            if constexpr (kEntropy) inner = L::fma(V{} - c_entropy, t - origin, inner);
            V dz = e * inner;
            if (action >= i && action < i + L::count) dz[action - i] += at_action;
            if constexpr (kCap) dz *= slope;
            return dz;
        };
        const auto partial = [&](std::int64_t i, std::int64_t count) {
            V slope{};
            const V z = row.tail(i, count, &slope);
            store_tail<L>(grad + i, gradient(i, z, kKl ? ref.tail(i, count) : V{}, slope), count);
        };
        std::int64_t i = 0;
        if (a.stream) {  // needs aligned stores: what comes before the first cache line goes the ordinary way
            const auto misaligned = reinterpret_cast<std::uintptr_t>(grad) % kCacheLine;
            const std::int64_t head = misaligned ? (kCacheLine - misaligned) / sizeof(G) : 0;
            for (; i < head && i < a.vocab; i += L::count) {
                const std::int64_t stop = head < a.vocab ? head : a.vocab;
                partial(i, stop - i < L::count ? stop - i : L::count);
            }
            if (i > head) i = head;
        }
        for (; i + L::count <= a.vocab; i += L::count) {
            V slope{};
            const V z = row.at(i, &slope);
            const V dz = gradient(i, z, kKl ? ref.at(i) : V{}, slope);
            if (a.stream)
                L::stream(grad + i, dz);
            else
                L::store(grad + i, dz);
        }
        if (i < a.vocab) partial(i, a.vocab - i);
    }
    if (a.stream) L::fence();
}

template <class T, bool kCap>
void forward_of(const TokenStatsArgs& a, std::int64_t first, std::int64_t last) {
    (a.ref_logits.data ? forward_rows<T, kCap, true> : forward_rows<T, kCap, false>)(a, first, last);
}

template <class T>
void forward(const TokenStatsArgs& a, std::int64_t first, std::int64_t last) {
    (a.softcap > 0.0 ? forward_of<T, true> : forward_of<T, false>)(a, first, last);
}

template <class T, class G, bool kCap>
void backward_of(const TokenStatsArgs& a, std::int64_t first, std::int64_t last) {
    if (a.c_kl)
        (a.c_entropy ? backward_rows<T, G, kCap, true, true> : backward_rows<T, G, kCap, true, false>)(a, first, last);
    else
        (a.c_entropy ? backward_rows<T, G, kCap, false, true> : backward_rows<T, G, kCap, false, false>)(a, first, last);
}

template <class T, class G>
void backward(const TokenStatsArgs& a, std::int64_t first, std::int64_t last) {
    (a.softcap > 0.0 ? backward_of<T, G, true> : backward_of<T, G, false>)(a, first, last);
}

double sum_of(const float* data, std::int64_t count) {
    FloatLanes::V sum[4] = {};
    std::int64_t i = 0;
    for (; i + 4 * DQO_LANES <= count; i += 4 * DQO_LANES)
        for (int j = 0; j < 4; ++j) sum[j] += FloatLanes::load(data + i + j * DQO_LANES);
    double total = 0;
    for (; i < count; ++i) total += data[i];
    for (const auto& part : sum) total += horizontal_sum<FloatLanes>(part);
    return total;
}

}  // namespace

#define DQO_TOKEN_STATS_ROWS(name)                                                    \
    const dqo::cpu::TokenStatsRows dqo::cpu::name = {                                 \
        {forward<float>, forward<bf16>, forward<f16>, forward<double>},               \
        {backward<float, float>, backward<bf16, bf16>, backward<f16, f16>, backward<double, double>}, \
        backward<float, bf16>, sum_of};
