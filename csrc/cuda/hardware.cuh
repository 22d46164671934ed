// The few things that kernels ask of the machine, by name: an NVIDIA GPU here. tests/kernels/emulation/cuda_emulation.h has the same names
// for the CPU, where the same kernel sources are run and checked.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "cuda/api.h"

#define DQO_DEVICE __device__ __forceinline__
// A kernel for blocks of so many threads, of which so many share a multiprocessor at least: what registers are divided by.
#define DQO_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)

namespace dqo::cuda {

DQO_DEVICE int thread_index() { return threadIdx.x; }
DQO_DEVICE std::int64_t block_index() { return blockIdx.x; }
DQO_DEVICE int block_threads() { return blockDim.x; }
DQO_DEVICE void sync_block() { __syncthreads(); }

DQO_DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char shared[];
    return shared;
}

// ---- exchange within a warp; every lane takes part

template <class T, class Shuffle>
DQO_DEVICE T exchanged(const T& value, Shuffle shuffle) {
    static_assert(sizeof(T) % 4 == 0);
    std::uint32_t words[sizeof(T) / 4];
    memcpy(words, &value, sizeof(T));
#pragma unroll
    for (std::uint32_t& word : words) word = shuffle(word);
    T result;
    memcpy(&result, words, sizeof(T));
    return result;
}

template <class T>
DQO_DEVICE T from_lane_xor(const T& value, int mask) {
    return exchanged(value, [=](std::uint32_t word) { return __shfl_xor_sync(~0u, word, mask); });
}
template <class T>
DQO_DEVICE T from_lane_before(const T& value, int distance) {  // its own where there is no such lane
    return exchanged(value, [=](std::uint32_t word) { return __shfl_up_sync(~0u, word, distance); });
}
template <class T>
DQO_DEVICE T from_lane(const T& value, int lane) {
    return exchanged(value, [=](std::uint32_t word) { return __shfl_sync(~0u, word, lane); });
}

// ---- 16 bytes of global memory at an address that is a multiple of 16, once: past the first-level cache

struct Words {
    std::uint32_t word[4];
};

DQO_DEVICE Words read_words(const void* address) {
    Words w;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.word[0]), "=r"(w.word[1]), "=r"(w.word[2]), "=r"(w.word[3])
                 : "l"(address));
    return w;
}
DQO_DEVICE Words read_words_again(const void* address) {  // a neighbour reads them too
    const uint4 w = *static_cast<const uint4*>(address);
    return {{w.x, w.y, w.z, w.w}};
}
DQO_DEVICE void write_words(void* address, const Words& w) {
    *static_cast<uint4*>(address) = make_uint4(w.word[0], w.word[1], w.word[2], w.word[3]);
}
// 16 bytes to shared memory while this thread goes on; there when this thread has waited for its copies.
DQO_DEVICE void copy_words(void* shared, const void* address) {
    const std::uint32_t to = std::uint32_t(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(address) : "memory");
}
DQO_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

DQO_DEVICE std::uint32_t funnel_right(std::uint32_t low, std::uint32_t high, int bits) {
    return __funnelshift_r(low, high, bits);
}

// ---- 16-bit floats

DQO_DEVICE float bfloat16_to_float(std::uint16_t x) { return __uint_as_float(std::uint32_t(x) << 16); }
DQO_DEVICE float float16_to_float(std::uint16_t x) {
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
    return y;
}
// Rounded to nearest; `low` goes to the lower half.
DQO_DEVICE std::uint32_t floats_to_bfloat16(float low, float high) {
    std::uint32_t y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}
DQO_DEVICE std::uint32_t floats_to_float16(float low, float high) {
    std::uint32_t y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

// ---- between blocks: flags and what they publish (PTX memory model, scope of the GPU)

DQO_DEVICE std::uint32_t take_ticket(std::uint32_t* counter) { return atomicAdd(counter, 1u); }

DQO_DEVICE void store_relaxed(double* address, double value) {
    asm volatile("st.relaxed.gpu.global.f64 [%0], %1;" ::"l"(address), "d"(value) : "memory");
}
DQO_DEVICE double load_relaxed(const double* address) {
    double value;
    asm volatile("ld.relaxed.gpu.global.f64 %0, [%1];" : "=d"(value) : "l"(address) : "memory");
    return value;
}
DQO_DEVICE void store_release(std::uint32_t* flag, std::uint32_t value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
DQO_DEVICE std::uint32_t load_acquire(const std::uint32_t* flag) {
    std::uint32_t value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
DQO_DEVICE void wait_a_little() { __nanosleep(32); }

// ---- thread block clusters; only in sources that are compiled for sm_90 and later

#ifdef DQO_CLUSTERS
DQO_DEVICE int cluster_rank() {
    std::uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DQO_DEVICE int cluster_blocks() {
    std::uint32_t count;
    asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(count));
    return count;
}
DQO_DEVICE void sync_cluster() {
    // Not the .aligned form: threads of a warp may come from different branches.
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same variable in the shared memory of another block of the cluster.
template <class T>
DQO_DEVICE T* in_block(T* shared, int rank) {
    std::uint64_t address;
    asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(shared), "r"(rank));
    return reinterpret_cast<T*>(address);
}
#endif

// ---- launches

struct Grid {
    std::int64_t blocks;
    int threads;
    std::size_t shared_bytes = 0;
    int cluster = 1;  // blocks of a cluster
};

template <class Arguments>
Status launch(void (*kernel)(Arguments), const Grid& grid, void* stream, const Arguments& arguments) {
    if (grid.blocks == 0) return cudaSuccess;
    static_assert(kInvalidConfiguration == cudaErrorInvalidConfiguration);
    if (grid.blocks > INT32_MAX) return kInvalidConfiguration;
    if (grid.shared_bytes > 48 * 1024) {
        const Status status =
            cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(grid.shared_bytes));
        if (status != cudaSuccess) return status;
    }
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {unsigned(grid.cluster), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(unsigned(grid.blocks));
    config.blockDim = dim3(unsigned(grid.threads));
    config.dynamicSmemBytes = grid.shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    config.attrs = &cluster;
    config.numAttrs = grid.cluster > 1 ? 1 : 0;
    return cudaLaunchKernelEx(&config, kernel, arguments);
}

}  // namespace dqo::cuda
