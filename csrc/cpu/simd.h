// Vectors of floats and doubles, and the functions of them that the row kernels need, in the vector extension that GCC and Clang
// share: one source serves AVX-512, AVX2, NEON and plain SSE2. Included once by each translation unit that is compiled for one
// instruction set; everything stays in its anonymous namespace, because an inline function shared between such units could
// carry AVX-512 code into the portable one.
//
// DQO_LANES floats make a vector. exp: relative error below 1.1e-7 (1.1 ulp) wherever the result is a normal number, 0 below those;
// AVX-512: 1.6e-7 down to x = -8, growing to 3.8e-7 (5.3 ulp) at -87, and subnormals. exp(0) is exactly 1. tanh: 2.5e-7, its slope
// 3.5e-7. tests/kernels/test_cpp_compiled.py measures it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#ifndef DQO_LANES
#error "define DQO_LANES before including cpu/simd.h"
#endif

#define DQO_INLINE inline __attribute__((always_inline))
#define DQO_LAMBDA_INLINE __attribute__((always_inline))

namespace {

struct bf16 { std::uint16_t bits; };
struct f16 { std::uint16_t bits; };

constexpr float kLog2e = 0x1.715476p+0f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
constexpr float kRound = 0x1.8p+23f;    // adding it leaves the nearest integer in the low bits
constexpr float kSmallest = -87.3365f;  // exp of anything below is under the smallest normal float, and taken as 0

struct FloatLanes {
    using real = float;
    static constexpr int count = DQO_LANES;
    typedef float V __attribute__((vector_size(DQO_LANES * 4)));
    typedef std::uint32_t U __attribute__((vector_size(DQO_LANES * 4)));
    typedef std::uint16_t H __attribute__((vector_size(DQO_LANES * 2)));

    // 2^k * (1 + tail) = exp(x), with k integral: `bits` holds k in its low bits.
    struct Exponential { V tail; U bits; };

    static DQO_INLINE Exponential split_exp(V x) {
        V n = fma(x, V{} + kLog2e, V{} + kRound);
        U bits = (U)n;
        n -= kRound;
        V r = fma(n, V{} - kLn2High, x);  // exact: n has 7 bits, kLn2High 16
        r = fma(n, V{} - kLn2Low, r);
        V q = fma(r, V{} + 0x1.6a2256p-10f, V{} + 0x1.123b02p-7f);
        q = fma(q, r, V{} + 0x1.5558f8p-5f);
        q = fma(q, r, V{} + 0x1.555490p-3f);
        q = fma(q, r, V{} + 0x1.fffffcp-2f);
        return {fma(q * r, r, r), bits};
    }

    // a*b + c, fused where the processor does that. The compiler fuses nothing by itself (-ffp-contract=off): where a product
    // is rounded decides whether z - max is exactly 0 at the maximum, and whether the KL of identical rows is.
    static DQO_INLINE V fma(V a, V b, V c) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif DQO_LANES == 8 && defined(__FMA__)
        return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif DQO_LANES == 4 && defined(__ARM_NEON)
        return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
        return a * b + c;
#endif
    }

    // exp(x) for x <= 0 or NaN. An x that underflows, -inf too, gives exactly 0; on return x is finite (or NaN), so that
    // exp(x) * x is 0 there.
    static DQO_INLINE V exp_nonpositive(V& x) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        // 2^(n/16) from a register, exp of the rest by a cubic: fewer multiplications than a polynomial alone.
        const __m512 powers = _mm512_setr_ps(0x1p0f, 0x1.0b5586p0f, 0x1.172b84p0f, 0x1.2387a6p0f, 0x1.306fe0p0f, 0x1.3dea64p0f,
                                             0x1.4bfdaep0f, 0x1.5ab07ep0f, 0x1.6a09e6p0f, 0x1.7a1148p0f, 0x1.8ace54p0f,
                                             0x1.9c4918p0f, 0x1.ae89fap0f, 0x1.c199bep0f, 0x1.d5818ep0f, 0x1.ea4afap0f);
        x = max(V{} - 120.0f, x);
        const V shifted = fma(x, V{} + kLog2e, V{} + 0x1.8p+19f);  // rounds to sixteenths
        const V n = shifted - 0x1.8p+19f;
        const V r = fma(n, V{} - 0x1.62e430p-1f, x);
        V q = fma(r, V{} + 0x1.55559ap-3f, V{} + 0x1.00022p-1f);
        q = fma(q, r, V{} + 1.0f);
        q = fma(q, r, V{} + 1.0f);
        const __m512 power = _mm512_permutexvar_ps((__m512i)shifted, powers);
        return (V)_mm512_scalef_ps(_mm512_mul_ps((__m512)q, power), (__m512)n);
#else
        const V given = x;
        x = max(V{} + kSmallest, x);
        Exponential e = split_exp(x);
        V y = (V)((U)(1.0f + e.tail) + (e.bits << 23));
        return given < kSmallest ? V{} : y;
#endif
    }

    // The larger of floor and x, where NaN stays NaN if it is in x.
    static DQO_INLINE V max(V floor, V x) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        return (V)_mm512_max_ps((__m512)floor, (__m512)x);
#elif DQO_LANES == 8 && defined(__AVX2__)
        return (V)_mm256_max_ps((__m256)floor, (__m256)x);
#else
        return floor > x ? floor : x;
#endif
    }

    // tanh and its derivative, from expm1, which keeps its relative accuracy near 0; near 1 from what is missing to 1.
    static DQO_INLINE void tanh(V x, V& y, V& slope) {
        V twice = x > 0.0f ? -2.0f * x : 2.0f * x;  // -2|x|
        Exponential e = split_exp(max(V{} + kSmallest, twice));
        V scale = (V)((U)(V{} + 1.0f) + (e.bits << 23));
        V expm1 = fma(scale, e.tail, scale - 1.0f);
        V divisor = expm1 + 2.0f;
        V exp = fma(scale, e.tail, scale);  // not expm1 + 1, which cancels
        V quotient = (exp < 0.5f ? -2.0f * exp : -expm1) / divisor;
        V magnitude = exp < 0.5f ? 1.0f + quotient : quotient;
        y = x < 0.0f ? -magnitude : magnitude;
        slope = 4.0f * exp / (divisor * divisor);  // 1 - y*y would cancel where tanh saturates
    }

    static DQO_INLINE V load(const float* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static DQO_INLINE V load(const bf16* p) {
        H h;
        std::memcpy(&h, p, sizeof h);
        return (V)(__builtin_convertvector(h, U) << 16);
    }
    static DQO_INLINE V load(const f16* p) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        return (V)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif DQO_LANES == 8 && defined(__F16C__)
        return (V)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        H h;
        std::memcpy(&h, p, sizeof h);
        U half = __builtin_convertvector(h, U);
        U magnitude = (half & 0x7fffu) << 13;
        V value = (V)magnitude * 0x1p112f;  // also right for subnormals
        U special = (half & 0x7c00u) == 0x7c00u ? U{} + 0x7f800000u : U{};
        return (V)((U)value | special | ((half & 0x8000u) << 16));
#endif
    }

    static DQO_INLINE void store(float* p, V v) { std::memcpy(p, &v, sizeof v); }
    static DQO_INLINE void store(bf16* p, V v) {
        H h = to_bf16(v);
        std::memcpy(p, &h, sizeof h);
    }
    static DQO_INLINE void store(f16* p, V v) {
        H h = to_f16(v);
        std::memcpy(p, &h, sizeof h);
    }
    static DQO_INLINE H to_bf16(V v) {
        U bits = (U)v;
        U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
        U is_nan = (U)((bits & 0x7fffffffu) > 0x7f800000u);
        return __builtin_convertvector(is_nan ? U{} + 0x7fc0u : rounded, H);
    }
    static DQO_INLINE H to_f16(V v) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        return (H)_mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif DQO_LANES == 8 && defined(__F16C__)
        return (H)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
        U bits = (U)v, sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
        // Normal halves: rebias the exponent and round to nearest even in integers.
        U normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
        // Subnormal halves: adding 1/2 leaves the rounded multiple of 2^-24 in the low bits.
        U subnormal = (U)((V)magnitude + 0.5f) - 0x3f000000u;
        U half = magnitude < 0x38800000u ? subnormal : normal;
        half = magnitude >= 0x47800000u ? U{} + 0x7c00u : half;
        half = magnitude > 0x7f800000u ? U{} + 0x7e00u : half;
        return __builtin_convertvector(half | sign, H);
#endif
    }

    // Past the caches: the line is neither read first nor kept. p is aligned to the vector in memory.
    static DQO_INLINE void stream(float* p, V v) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        _mm512_stream_ps(p, (__m512)v);
#elif DQO_LANES == 8 && defined(__AVX2__)
        _mm256_stream_ps(p, (__m256)v);
#else
        store(p, v);
#endif
    }
    static DQO_INLINE void fence() {  // streamed stores become visible before anything that follows
#if defined(__AVX2__)
        _mm_sfence();
#endif
    }
    static DQO_INLINE void stream(bf16* p, V v) { stream_half(p, to_bf16(v)); }
    static DQO_INLINE void stream(f16* p, V v) { stream_half(p, to_f16(v)); }
    static DQO_INLINE void stream_half(void* p, H h) {
#if DQO_LANES == 16 && defined(__AVX512F__)
        _mm256_stream_si256((__m256i*)p, (__m256i)h);
#elif DQO_LANES == 8 && defined(__AVX2__)
        _mm_stream_si128((__m128i*)p, (__m128i)h);
#else
        std::memcpy(p, &h, sizeof h);
#endif
    }
};

// The double path serves gradient checks, not speed: the library's exp and tanh, lane by lane.
struct DoubleLanes {
    using real = double;
    static constexpr int count = DQO_LANES / 2;
    typedef double V __attribute__((vector_size(DQO_LANES * 4)));

    static DQO_INLINE V exp_nonpositive(V& x) {
        x = max(V{} - 800.0, x);
        V y{};
        for (int i = 0; i < count; ++i) y[i] = __builtin_exp(x[i]);
        return y;
    }
    static DQO_INLINE V max(V floor, V x) { return floor > x ? floor : x; }
    static DQO_INLINE V fma(V a, V b, V c) { return a * b + c; }
    static DQO_INLINE void tanh(V x, V& y, V& slope) {
        for (int i = 0; i < count; ++i) y[i] = __builtin_tanh(x[i]);
        slope = (1.0 - y) * (1.0 + y);
    }
    static DQO_INLINE V load(const double* p) {
        V v;
        std::memcpy(&v, p, sizeof v);
        return v;
    }
    static DQO_INLINE void store(double* p, V v) { std::memcpy(p, &v, sizeof v); }
    static DQO_INLINE void stream(double* p, V v) { store(p, v); }
    static DQO_INLINE void fence() {}
};

template <class T> struct LanesOf { using type = FloatLanes; };
template <> struct LanesOf<double> { using type = DoubleLanes; };


// count < L::count elements, the other lanes -inf.
template <class L, class T>
DQO_INLINE typename L::V load_tail(const T* p, std::int64_t count) {
    T padded[L::count];
    std::memset(padded, 0, sizeof padded);
    std::memcpy(padded, p, count * sizeof(T));
    typename L::V v = L::load(padded);
    for (int i = 0; i < L::count; ++i)
        if (i >= count) v[i] = -__builtin_inf();
    return v;
}

template <class L, class T>
DQO_INLINE void store_tail(T* p, typename L::V v, std::int64_t count) {
    T padded[L::count];
    L::store(padded, v);
    std::memcpy(p, padded, count * sizeof(T));
}

template <class L>
DQO_INLINE typename L::real horizontal_sum(typename L::V v) {  // a fixed tree
    for (int width = L::count / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) v[i] += v[i + width];
    return v[0];
}

template <class L>
DQO_INLINE typename L::real horizontal_max(typename L::V v) {
    typename L::real m = v[0];
    for (int i = 1; i < L::count; ++i) m = v[i] > m ? v[i] : m;
    return m;
}

}  // namespace
