// Python's view of the CUDA kernels: raw addresses, sizes and a stream, no torch headers, so that one build serves every torch.
// The callers in dqo_kernels/*_cuda.py check and lay out the arguments; nothing is checked here. An address of 0 is an absent array.
// Launches return at once; a launch that fails is a RuntimeError.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <stdexcept>

#include "cuda/lambda_return.h"
#include "cuda/properties.h"
#include "cuda/soft_bellman.h"
#include "cuda/soft_bellman_loss.h"
#include "cuda/token_stats.h"
#ifdef DQO_EMULATION
#include "cuda_emulation.h"
#endif

namespace py = pybind11;
using namespace dqo::cuda;
using Address = std::uintptr_t;

template <class T>
static T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

using Where = std::tuple<int, Address>;  // (device, stream)

template <class Launch>
static void on(const Where& where, const char* what, Launch launch) {
    py::gil_scoped_release released;
    const auto [device, stream] = where;
    const int before = current_device();  // the caller's, who finds it as it was
    Status status = before == device ? Status{} : use_device(device);
    if (status == Status{}) status = launch(at<void>(stream));
    if (before >= 0 && before != device) use_device(before);
    if (status != Status{}) throw std::runtime_error(std::string(what) + " cannot be launched: " + text_of(status));
}

// (address, inner, outer_stride, inner_stride) of a tensor seen as rows
using RowsTuple = std::tuple<Address, std::int64_t, std::int64_t, std::int64_t>;
// (logits, ref_logits, actions, mask, temperatures, temperature, softcap, rows, vocab)
using StatsTuple = std::tuple<RowsTuple, RowsTuple, Address, Address, Address, float, float, std::int64_t, std::int64_t>;
using StatsFields = std::array<Address, 10>;

static TokenStatsArgs token_stats_args(const StatsTuple& given, const StatsFields& fields) {
    const auto as_rows = [](const RowsTuple& r) {
        return Rows{at<const void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r), std::get<3>(r)};
    };
    TokenStatsArgs a{};
    a.logits = as_rows(std::get<0>(given));
    a.ref_logits = as_rows(std::get<1>(given));
    a.actions = at<const std::int64_t>(std::get<2>(given));
    a.mask = at<const bool>(std::get<3>(given));
    a.temperatures = at<const float>(std::get<4>(given));
    a.temperature = std::get<5>(given);
    a.softcap = Softcap(std::get<6>(given));
    a.rows = std::get<7>(given);
    a.vocab = std::get<8>(given);
    StatisticsFields& f = a.fields;
    float** const to[] = {&f.logprobs,     &f.lse,     &f.entropy, &f.peak,     &f.log_total,
                          &f.ref_logprobs, &f.ref_lse, &f.kl,      &f.ref_peak, &f.ref_log_total};
    for (std::size_t i = 0; i < fields.size(); ++i) *to[i] = at<float>(fields[i]);
    return a;
}

static void token_stats_fwd(Where where, StatsTuple given, int dtype, StatsFields fields, Address partial) {
    TokenStatsArgs a = token_stats_args(given, fields);
    a.partial = at<float>(partial);
    on(where, "token_stats", [&](void* stream) { return token_stats_forward(a, static_cast<Dtype>(dtype), stream); });
}

static void token_stats_bwd(Where where, StatsTuple given, int dtype, StatsFields fields, std::array<Address, 4> upstream,
                            Address grad, bool bfloat16_grad) {
    TokenStatsArgs a = token_stats_args(given, fields);
    a.c_logprobs = at<const float>(upstream[0]);
    a.c_lse = at<const float>(upstream[1]);
    a.c_entropy = at<const float>(upstream[2]);
    a.c_kl = at<const float>(upstream[3]);
    a.grad = at<void>(grad);
    a.bfloat16_grad = bfloat16_grad;
    on(where, "token_stats' gradient",
       [&](void* stream) { return token_stats_backward(a, static_cast<Dtype>(dtype), stream); });
}

// (cu_seqlens, rows, sequences)
using PackTuple = std::tuple<Address, std::int64_t, std::int64_t>;

static void lambda_return_fwd(Where where, std::array<Address, 4> arrays, PackTuple pack, double gamma, double lam) {
    LambdaReturnArgs a{};
    a.rewards = at<const float>(arrays[0]);
    a.values = at<const float>(arrays[1]);
    a.bootstrap = at<const float>(arrays[2]);
    a.returns = at<float>(arrays[3]);
    a.cu_seqlens = at<const std::int64_t>(std::get<0>(pack));
    a.rows = std::get<1>(pack), a.sequences = std::get<2>(pack);
    a.gamma = gamma, a.lam = lam;
    on(where, "lambda_return", [&](void* stream) { return lambda_return_forward(a, stream); });
}

static void lambda_return_bwd(Where where, std::array<Address, 4> arrays, PackTuple pack, double gamma, double lam) {
    LambdaReturnArgs a{};
    a.grad_returns = at<const float>(arrays[0]);
    a.grad_rewards = at<float>(arrays[1]);
    a.grad_values = at<float>(arrays[2]);
    a.grad_bootstrap = at<float>(arrays[3]);
    a.cu_seqlens = at<const std::int64_t>(std::get<0>(pack));
    a.rows = std::get<1>(pack), a.sequences = std::get<2>(pack);
    a.gamma = gamma, a.lam = lam;
    on(where, "lambda_return's gradient", [&](void* stream) { return lambda_return_backward(a, stream); });
}

// (beta, gamma, lam, policy_target, residual, is_level, is_cap, is_floor)
using OptionsTuple = std::tuple<double, double, double, int, bool, int, double, double>;

static dqo::SoftBellmanOptions options_of(const OptionsTuple& o) {
    return {std::get<0>(o), std::get<1>(o), std::get<2>(o), static_cast<dqo::PolicyTarget>(std::get<3>(o)),
            std::get<4>(o), static_cast<dqo::IsLevel>(std::get<5>(o)), std::get<6>(o), std::get<7>(o)};
}

// in: logprobs, ref_logprobs, rewards, values, mask, behavior_logprobs, bootstrap, target_values
static SoftBellmanArgs soft_bellman_args(const std::array<Address, 8>& in, const PackTuple& pack, const OptionsTuple& options,
                                         const std::array<Address, 7>& out) {
    SoftBellmanArgs a{};
    a.logprobs = at<const float>(in[0]);
    a.ref_logprobs = at<const float>(in[1]);
    a.rewards = at<const float>(in[2]);
    a.values = at<const float>(in[3]);
    a.mask = at<const bool>(in[4]);
    a.behavior_logprobs = at<const float>(in[5]);
    a.bootstrap = at<const float>(in[6]);
    a.target_values = at<const float>(in[7]);
    a.cu_seqlens = at<const std::int64_t>(std::get<0>(pack));
    a.rows = std::get<1>(pack), a.sequences = std::get<2>(pack);
    float** const to[] = {&a.policy_loss, &a.value_loss, &a.returns, &a.advantages, &a.weights, &a.policy_grad, &a.value_grad};
    for (std::size_t i = 0; i < out.size(); ++i) *to[i] = at<float>(out[i]);
    a.options = options_of(options);
    return a;
}

static void soft_bellman_fwd(Where where, std::array<Address, 8> in, PackTuple pack, OptionsTuple options,
                             std::array<Address, 7> out) {
    const SoftBellmanArgs a = soft_bellman_args(in, pack, options, out);
    on(where, "soft_bellman", [&](void* stream) { return soft_bellman_forward(a, stream); });
}

static void soft_bellman_bwd_residual(Where where, Address cotangent, Address policy_grad, Address mask, PackTuple pack,
                                      OptionsTuple options, std::array<Address, 3> out) {
    const ResidualArgs a{at<const float>(cotangent), at<const float>(policy_grad), at<const std::int64_t>(std::get<0>(pack)),
                         std::get<1>(pack), std::get<2>(pack), at<const bool>(mask), at<float>(out[0]), at<float>(out[1]),
                         at<float>(out[2]), options_of(options)};
    on(where, "soft_bellman's gradient", [&](void* stream) { return soft_bellman_backward_residual(a, stream); });
}

// (ref_lse, scale, policy_scale, value_coef, kl_coef)
using LossTuple = std::tuple<Address, Address, double, double, double>;
// (maps, states, sequence, tickets)
using LookBackTuple = std::tuple<Address, Address, Address, Address>;

static void one_pass(Where where, StatsTuple stats, int dtype, StatsFields fields, std::array<Address, 8> in, PackTuple pack,
                     OptionsTuple options, std::array<Address, 7> out, LossTuple loss, LookBackTuple look_back, Address grad) {
    OnePassArgs a{};
    a.stats = token_stats_args(stats, fields);
    a.stats.grad = at<void>(grad);
    a.bellman = soft_bellman_args(in, pack, options, out);
    a.ref_lse = at<const float>(std::get<0>(loss));
    a.scale = at<const float>(std::get<1>(loss));
    a.policy_scale = std::get<2>(loss), a.value_coef = std::get<3>(loss), a.kl_coef = std::get<4>(loss);
    a.look_back = {at<Slot>(std::get<0>(look_back)), at<Slot>(std::get<1>(look_back)),
                   at<std::int32_t>(std::get<2>(look_back)), at<std::uint32_t>(std::get<3>(look_back))};
    on(where, "soft_bellman_loss in one pass", [&](void* stream) {
        return soft_bellman_loss_one_pass(a, static_cast<Dtype>(dtype), processors(std::get<0>(where)), stream);
    });
}

static void rescale_by(Where where, Address grad, std::int64_t count, int dtype, Address factor) {
    on(where, "a gradient's factor", [&](void* stream) {
        const int count_of = processors(std::get<0>(where));
        return rescale(at<void>(grad), count, static_cast<Dtype>(dtype), at<const float>(factor), count_of, stream);
    });
}

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "CUDA kernels of dqo_kernels; arguments are addresses.";
    m.attr("PARTIALS") = kPartials;
    m.attr("SLOT_BYTES") = sizeof(Slot);
    m.def("problem", &problem, "Why no kernel can run on this device, or an empty string.");
    m.def("cluster_problem", &cluster_problem, "Why no kernel that needs thread block clusters can, or an empty string.");
    m.def("splits", &splits, "Blocks that share a row in token_stats' forward.");
    m.def(
        "one_pass_shape",
        [](std::int64_t vocab, int dtype, bool two_models) {
            const OnePassShape shape = one_pass_shape(vocab, static_cast<Dtype>(dtype), two_models);
            return std::make_tuple(shape.cluster, shape.slice, shape.shared_bytes);
        },
        "(blocks, columns of a block, bytes of a block) of the cluster that holds a row; 0 blocks when none can.");
    m.def("token_stats_fwd", &token_stats_fwd);
    m.def("token_stats_bwd", &token_stats_bwd);
    m.def("lambda_return_fwd", &lambda_return_fwd);
    m.def("lambda_return_bwd", &lambda_return_bwd);
    m.def("soft_bellman_fwd", &soft_bellman_fwd);
    m.def("soft_bellman_bwd_residual", &soft_bellman_bwd_residual);
    m.def("soft_bellman_loss_one_pass", &one_pass);
    m.def("rescale", &rescale_by);
#ifdef DQO_EMULATION  // the tests' emulated device
    m.def("end_arrays", &emulation::end_arrays, "Addresses that no 16 bytes of an access may lie across.");
    m.def("configure", &emulation::configure, "Seed of the order of threads, and how many clusters run at a time.");
#endif
}
