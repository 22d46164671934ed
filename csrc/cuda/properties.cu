#include "cuda/properties.h"

#include <cuda_runtime.h>

namespace dqo::cuda {
namespace {

int attribute(cudaDeviceAttr which, int device) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : 0;
}

std::string capability_text(int device) {
    return std::to_string(attribute(cudaDevAttrComputeCapabilityMajor, device)) + "." +
           std::to_string(attribute(cudaDevAttrComputeCapabilityMinor, device));
}

}  // namespace

std::string text_of(Status status) {
    const auto error = static_cast<cudaError_t>(status);
    return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ", " + std::to_string(int(status)) + ")";
}

std::string problem(int device) {
    int count = 0;
    const Status status = cudaGetDeviceCount(&count);
    if (status != cudaSuccess) {
        cudaGetLastError();  // so that nobody else meets it
        return "the CUDA runtime finds no usable device: " + text_of(status);
    }
    if (device >= count) return "there is no CUDA device " + std::to_string(device);
    if (attribute(cudaDevAttrComputeCapabilityMajor, device) < 8)
        return "its kernels need compute capability 8.0 or later, this device has " + capability_text(device);
    return "";
}

std::string cluster_problem(int device) {
    const std::string reason = problem(device);
    if (!reason.empty() || attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9) return reason;
    return "it needs thread block clusters, compute capability 9.0 or later; this device has " + capability_text(device);
}

int processors(int device) { return attribute(cudaDevAttrMultiProcessorCount, device); }

int current_device() {
    int device = -1;
    return cudaGetDevice(&device) == cudaSuccess ? device : -1;
}
Status use_device(int device) { return cudaSetDevice(device); }

}  // namespace dqo::cuda
