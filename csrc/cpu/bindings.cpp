// Python's view of the CPU kernels: raw addresses and sizes, no torch headers, so that one build serves every torch.
// The callers in dqo_kernels/*_cpp.py check and lay out the arguments; of them only boundaries are checked here. An address of 0 is an absent array.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/lambda_return.h"
#include "cpu/soft_bellman.h"
#include "cpu/threads.h"
#include "cpu/token_stats.h"

namespace py = pybind11;
using namespace dqo::cpu;
using Address = std::uintptr_t;
using WithoutGil = py::call_guard<py::gil_scoped_release>;

template <class T>
static T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// (address, inner, outer_stride, inner_stride) of a tensor seen as rows
using RowsTuple = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;

static TokenStatsArgs token_stats_args(RowsTuple logits, RowsTuple ref_logits, Address actions, Address mask,
                                       Address temperatures, double temperature, double softcap, std::int64_t rows,
                                       std::int64_t vocab, const std::array<Address, 10>& stats) {
    const auto as_rows = [](const RowsTuple& r) {
        return Rows{at<const void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r), std::get<3>(r)};
    };
    TokenStatsArgs a{};
    a.logits = as_rows(logits);
    a.ref_logits = as_rows(ref_logits);
    a.actions = at<const std::int64_t>(actions);
    a.mask = at<const bool>(mask);
    a.temperatures = at<const double>(temperatures);
    a.temperature = temperature;
    a.softcap = softcap;
    a.rows = rows;
    a.vocab = vocab;
    void** const fields[] = {&a.logprobs,     &a.lse,     &a.entropy, &a.peak,     &a.log_total,
                             &a.ref_logprobs, &a.ref_lse, &a.kl,      &a.ref_peak, &a.ref_log_total};
    for (std::size_t i = 0; i < stats.size(); ++i) *fields[i] = at<void>(stats[i]);
    return a;
}

static void token_stats_fwd(RowsTuple logits, RowsTuple ref_logits, Address actions, Address mask, Address temperatures,
                            double temperature, double softcap, std::int64_t rows, std::int64_t vocab, int dtype,
                            int threads, std::array<Address, 10> stats) {
    const auto args =
        token_stats_args(logits, ref_logits, actions, mask, temperatures, temperature, softcap, rows, vocab, stats);
    token_stats_forward(args, static_cast<Dtype>(dtype), threads);
}

static void token_stats_bwd(RowsTuple logits, RowsTuple ref_logits, Address actions, Address mask, Address temperatures,
                            double temperature, double softcap, std::int64_t rows, std::int64_t vocab, int dtype,
                            int threads, std::array<Address, 10> stats, std::array<Address, 4> upstream, Address grad,
                            bool bfloat16_grad) {
    auto args = token_stats_args(logits, ref_logits, actions, mask, temperatures, temperature, softcap, rows, vocab, stats);
    args.c_logprobs = at<const void>(upstream[0]);
    args.c_lse = at<const void>(upstream[1]);
    args.c_entropy = at<const void>(upstream[2]);
    args.c_kl = at<const void>(upstream[3]);
    args.grad = at<void>(grad);
    args.bfloat16_grad = bfloat16_grad;
    token_stats_backward(args, static_cast<Dtype>(dtype), threads);
}

// Boundaries say what memory a scan reads and writes. Callers check them too, but not those of a compiled function.
static const std::int64_t* boundaries_at(Address address, std::int64_t rows, std::int64_t sequences) {
    const auto* cu_seqlens = at<const std::int64_t>(address);
    bool good = sequences >= 0 && cu_seqlens[0] == 0 && cu_seqlens[sequences] == rows;
    for (std::int64_t b = 0; good && b < sequences; ++b) good = cu_seqlens[b] <= cu_seqlens[b + 1];
    if (!good)
        throw std::invalid_argument("cu_seqlens: expected boundaries from 0 to N = " + std::to_string(rows) +
                                    " that never decrease, got others");
    return cu_seqlens;
}

template <class T>
static void lambda_return_forward(Address rewards, Address values, Address bootstrap, Address cu_seqlens, Address returns,
                                  std::int64_t rows, std::int64_t sequences, double gamma, double lam) {
    const auto* boundaries = boundaries_at(cu_seqlens, rows, sequences);
    lambda_return_fwd(at<const T>(rewards), at<const T>(values), at<const T>(bootstrap), boundaries, at<T>(returns),
                      sequences, gamma, lam);
}

template <class T>
static void lambda_return_backward(Address grad_returns, Address cu_seqlens, Address grad_rewards, Address grad_values,
                                   Address grad_bootstrap, std::int64_t rows, std::int64_t sequences, double gamma,
                                   double lam) {
    lambda_return_bwd(at<const T>(grad_returns), boundaries_at(cu_seqlens, rows, sequences), at<T>(grad_rewards),
                      at<T>(grad_values), at<T>(grad_bootstrap), sequences, gamma, lam);
}

// (beta, gamma, lam, policy_target, residual, is_level, is_cap, is_floor)
using OptionsTuple = std::tuple<double, double, double, int, bool, int, double, double>;

static dqo::SoftBellmanOptions options_of(const OptionsTuple& o) {
    return {std::get<0>(o), std::get<1>(o), std::get<2>(o), static_cast<dqo::PolicyTarget>(std::get<3>(o)),
            std::get<4>(o), static_cast<dqo::IsLevel>(std::get<5>(o)), std::get<6>(o), std::get<7>(o)};
}

template <class T>
static void soft_bellman_fwd(std::array<Address, 4> inputs, Address cu_seqlens, std::int64_t rows, std::int64_t sequences,
                             Address mask, Address behavior_logprobs, Address bootstrap, Address target_values,
                             OptionsTuple options, int threads, std::array<Address, 7> out) {
    const SoftBellmanArgs<T> args{
        at<const T>(inputs[0]), at<const T>(inputs[1]), at<const T>(inputs[2]), at<const T>(inputs[3]),
        boundaries_at(cu_seqlens, rows, sequences), rows, sequences, at<const bool>(mask), at<const T>(behavior_logprobs),
        at<const T>(bootstrap), at<const T>(target_values),
        at<T>(out[0]), at<T>(out[1]), at<T>(out[2]), at<T>(out[3]), at<T>(out[4]), at<T>(out[5]), at<T>(out[6])};
    soft_bellman_forward(args, options_of(options), threads);
}

template <class T>
static void soft_bellman_bwd_residual(Address cotangent, Address policy_grad, Address cu_seqlens, std::int64_t rows,
                                      std::int64_t sequences, Address mask, OptionsTuple options, int threads,
                                      std::array<Address, 3> out) {
    const ResidualArgs<T> args{at<const T>(cotangent), at<const T>(policy_grad), boundaries_at(cu_seqlens, rows, sequences),
                               rows, sequences, at<const bool>(mask), at<T>(out[0]), at<T>(out[1]), at<T>(out[2])};
    soft_bellman_backward_residual(args, options_of(options), threads);
}

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of dqo_kernels; arguments are addresses.";
    m.def("token_stats_fwd", &token_stats_fwd, WithoutGil());
    m.def("token_stats_bwd", &token_stats_bwd, WithoutGil());
    m.def("lambda_return_fwd_f32", &lambda_return_forward<float>, WithoutGil());
    m.def("lambda_return_fwd_f64", &lambda_return_forward<double>, WithoutGil());
    m.def("lambda_return_bwd_f32", &lambda_return_backward<float>, WithoutGil());
    m.def("lambda_return_bwd_f64", &lambda_return_backward<double>, WithoutGil());
    m.def("soft_bellman_fwd_f32", &soft_bellman_fwd<float>, WithoutGil());
    m.def("soft_bellman_fwd_f64", &soft_bellman_fwd<double>, WithoutGil());
    m.def("soft_bellman_bwd_residual_f32", &soft_bellman_bwd_residual<float>, WithoutGil());
    m.def("soft_bellman_bwd_residual_f64", &soft_bellman_bwd_residual<double>, WithoutGil());
    m.def("instruction_sets", &instruction_sets, "Those of this build that this processor can run, the best first.");
    m.def("instruction_set", &instruction_set, "The one that the vector kernels use.");
    m.def("use_instruction_set", &use_instruction_set, "Choose one by name; ValueError when it cannot run here.");
    m.def("use_openmp", &use_openmp, "Address of GOMP_parallel in the runtime whose threads to use; 0: start threads.");
    m.def(
        "read_sum",
        [](Address data, std::int64_t count, int threads, Address sums) {
            read_sum(at<const float>(data), count, threads, at<double>(sums));
        },
        "Sums of every 65,536 floats: what merely reading memory costs.", WithoutGil());
}
