// Measures csrc/cpu/simd.h for one instruction set against double precision and prints "name value" lines, which test_simd.py bounds.
// Usage: simd_accuracy STEP, where every STEP-th float of each range is tried (1: every one).
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>
#include <limits>

#include "cpu/simd.h"

namespace {

using L = FloatLanes;

float of_bits(std::uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
std::uint32_t bits_of(float x) {
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
double ulp(double exact) { return std::ldexp(1.0, std::ilogb(exact) - 23); }
void raise_to(double& worst, double x) {
    if (!(x <= worst)) worst = x;  // NaN stays
}

// f(x vector) of every step-th float from `from` to `to`, both positive, times sign.
template <class F>
void sweep(float from, float to, float sign, std::uint32_t step, const F& f) {
    for (std::uint32_t bits = bits_of(from), end = bits_of(to); bits <= end;) {
        L::V x{};
        for (int lane = 0; lane < L::count; ++lane, bits += bits <= end ? step : 0) x[lane] = sign * of_bits(bits < end ? bits : end);
        f(x);
    }
}

void measure_exp(std::uint32_t step) {
    const double smallest = std::numeric_limits<float>::min();
    double worst_ulp = 0, worst_relative = 0, worst_tiny = 0, nonfinite = 0, above_one = 0;
    sweep(0.0f, 110.0f, -1.0f, step, [&](L::V x) {
        L::V clamped = x;
        const L::V y = L::exp_nonpositive(clamped);
        for (int lane = 0; lane < L::count; ++lane) {
            const double exact = std::exp(double(x[lane])), error = std::fabs(y[lane] - exact);
            if (exact >= smallest * 1.0001) {
                raise_to(worst_ulp, error / ulp(exact));
                raise_to(worst_relative, error / exact);
            } else {
                raise_to(worst_tiny, error);
            }
            nonfinite += !std::isfinite(clamped[lane]);
            above_one += !(y[lane] >= 0.0f && y[lane] <= 1.0f);
        }
    });
    std::printf("exp_ulp %.6g\nexp_relative %.6g\nexp_tiny %.6g\nexp_outside %.6g\n", worst_ulp, worst_relative, worst_tiny,
                nonfinite + above_one);
    L::V x{};
    const float special[] = {0.0f, -0.0f, -INFINITY, NAN, -1e30f, -120.0f};
    const float wanted[] = {1.0f, 1.0f, 0.0f, NAN, 0.0f, 0.0f};
    double wrong = 0;
    for (int i = 0; i < 6; ++i) {
        x = L::V{} + special[i];
        const L::V y = L::exp_nonpositive(x);
        for (int lane = 0; lane < L::count; ++lane)
            wrong += std::isnan(wanted[i]) ? !(std::isnan(y[lane]) && std::isnan(x[lane]))
                                           : !(y[lane] == wanted[i] && y[lane] * x[lane] == 0.0f * wanted[i]);
    }
    std::printf("exp_special_wrong %.6g\n", wrong);
}

void measure_tanh(std::uint32_t step) {
    double relative = 0, absolute = 0, slope_relative = 0, slope_absolute = 0;
    for (const float sign : {1.0f, -1.0f})
        sweep(0.0f, 200.0f, sign, step, [&](L::V x) {
            L::V y, slope;
            L::tanh(x, y, slope);
            for (int lane = 0; lane < L::count; ++lane) {
                const double exact = std::tanh(double(x[lane])), cosh = std::cosh(double(x[lane])), d = 1.0 / (cosh * cosh);
                raise_to(absolute, std::fabs(y[lane] - exact));
                if (std::fabs(exact) >= std::numeric_limits<float>::min()) raise_to(relative, std::fabs(y[lane] / exact - 1.0));
                raise_to(slope_absolute, std::fabs(slope[lane] - d));
                if (std::fabs(x[lane]) < 43.0f) raise_to(slope_relative, std::fabs(slope[lane] / d - 1.0));
            }
        });
    std::printf("tanh_relative %.6g\ntanh_absolute %.6g\nslope_relative %.6g\nslope_absolute %.6g\n", relative, absolute,
                slope_relative, slope_absolute);
    L::V y, slope;
    double wrong = 0;
    for (const float x : {INFINITY, -INFINITY, 1e30f, 0.0f}) {
        L::tanh(L::V{} + x, y, slope);
        wrong += !(y[0] == std::tanh(x) && (x == 0.0f ? slope[0] == 1.0f : slope[0] >= 0.0f && slope[0] < 1e-30f));
    }
    L::tanh(L::V{} + NAN, y, slope);
    wrong += !(std::isnan(y[0]) && std::isnan(slope[0]));
    std::printf("tanh_special_wrong %.6g\n", wrong);
}

double half_value(std::uint32_t h) {
    const int exponent = h >> 10 & 31, fraction = h & 1023;
    const double magnitude = exponent == 31 ? (fraction ? NAN : INFINITY)
                             : exponent     ? std::ldexp(1024 + fraction, exponent - 25)
                                            : std::ldexp(fraction, -24);
    return h & 0x8000 ? -magnitude : magnitude;
}

template <class T>
float loaded(std::uint32_t bits) {
    T half[L::count];
    for (T& h : half) h = {static_cast<std::uint16_t>(bits)};
    return L::load(half)[L::count - 1];
}

template <class T>
std::uint32_t stored(float x) {
    T half[L::count];
    L::V v;
    for (int lane = 0; lane < L::count; ++lane) v[lane] = x;  // V{} + x would lose the sign of a zero
    L::store(half, v);
    return half[L::count - 1].bits;
}

// Every half loads as its value and is stored as itself; what lies between two goes to the nearest, ties to the even one.
template <class T, class Value>
double wrong_halves(std::uint32_t infinity, const Value& value) {
    double wrong = 0;
    for (std::uint32_t h = 0; h < 0x10000; ++h) {
        const float x = loaded<T>(h);
        const double want = value(h);
        if (std::isnan(want)) {
            wrong += !std::isnan(x) || !std::isnan(value(stored<T>(x)));
            continue;
        }
        wrong += x != want || stored<T>(x) != h;
        if ((h & 0x7fff) >= infinity) continue;
        // The largest finite half is followed by the infinity, in whose place rounding sees the next power of two.
        const double next = (h & 0x7fff) + 1 == infinity ? 2 * want - value(h - 1) : value(h + 1);
        const float middle = static_cast<float>(want + (next - want) / 2);
        const float outward = std::copysign(INFINITY, middle);
        wrong += stored<T>(std::nextafter(middle, 0.0f)) != h || stored<T>(middle) != h + (h & 1) ||
                 stored<T>(std::nextafter(middle, outward)) != h + 1;
    }
    return wrong;
}

}  // namespace

int main(int, char** arguments) {
    const std::uint32_t step = std::atoi(arguments[1]);
    measure_exp(step);
    measure_tanh(step);
    std::printf("f16_wrong %.6g\n", wrong_halves<f16>(0x7c00, half_value));
    std::printf("bf16_wrong %.6g\n", wrong_halves<bf16>(0x7f80, [](std::uint32_t h) { return double(of_bits(h << 16)); }));
}
