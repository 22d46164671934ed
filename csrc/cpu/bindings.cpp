// Python's view of the CPU kernels: raw addresses and sizes, no torch headers, so that one build serves every torch.
// The callers in dqo_kernels/ check shapes, dtypes and contiguity; nothing is checked here.
#include <pybind11/pybind11.h>

#include <cstdint>

#include "cpu/lambda_return.h"

namespace py = pybind11;
using Address = std::uintptr_t;

template <typename T>
static T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

template <typename T>
static void lambda_return_fwd(Address rewards, Address values, Address bootstrap, Address cu_seqlens, Address returns,
                              std::int64_t sequences, double gamma, double lam) {
    py::gil_scoped_release release;
    dqo::cpu::lambda_return_fwd(at<const T>(rewards), at<const T>(values), at<const T>(bootstrap),
                                at<const std::int64_t>(cu_seqlens), at<T>(returns), sequences, gamma, lam);
}

template <typename T>
static void lambda_return_bwd(Address grad_returns, Address cu_seqlens, Address grad_rewards, Address grad_values,
                              Address grad_bootstrap, std::int64_t sequences, double gamma, double lam) {
    py::gil_scoped_release release;
    dqo::cpu::lambda_return_bwd(at<const T>(grad_returns), at<const std::int64_t>(cu_seqlens), at<T>(grad_rewards),
                                at<T>(grad_values), at<T>(grad_bootstrap), sequences, gamma, lam);
}

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of dqo_kernels; arguments are addresses of contiguous memory.";
    m.def("lambda_return_fwd_f32", &lambda_return_fwd<float>);
    m.def("lambda_return_fwd_f64", &lambda_return_fwd<double>);
    m.def("lambda_return_bwd_f32", &lambda_return_bwd<float>);
    m.def("lambda_return_bwd_f64", &lambda_return_bwd<double>);
}
