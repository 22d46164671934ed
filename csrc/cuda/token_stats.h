// token_stats on a CUDA device: launches on a stream, no synchronisation. Equations: dqo_kernels/token_stats.py.
#pragma once

#include <cstdint>

#include "common/host_device.h"
#include "cuda/api.h"

namespace dqo::cuda {

struct StatisticsFields {  // (rows,) each; the reference's may be nullptr
    float *logprobs, *lse, *entropy, *peak, *log_total;
    float *ref_logprobs, *ref_lse, *kl, *ref_peak, *ref_log_total;
};

struct Softcap {
    float cap = 0, inverse = 0;  // cap 0: none

    Softcap() = default;
    explicit Softcap(float cap) : cap(cap), inverse(1.0f / cap) {}
};

struct TokenStatsArgs {
    Rows logits, ref_logits;
    const std::int64_t* actions;
    const bool* mask;            // nullptr: every row counts
    const float* temperatures;   // nullptr: `temperature` for all rows
    float temperature;
    Softcap softcap;
    std::int64_t rows, vocab;
    StatisticsFields fields;
    float* partial;  // kPartials floats for each of rows * splits(vocab) blocks, where there are more splits than one
    const float *c_logprobs, *c_lse, *c_entropy, *c_kl;  // gradients that arrive at the fields; nullptr: none
    void* grad;                                          // (rows, V) contiguous, in the dtype of the logits, or
    bool bfloat16_grad;                                  // bfloat16 of float logits
};

constexpr int kPartials = 6;
constexpr std::int64_t kSplit = 32768;  // columns of one forward block: a function of nothing, so that a row's bits are the row's
DQO_HOST_DEVICE inline std::int64_t splits(std::int64_t vocab) { return (vocab + kSplit - 1) / kSplit; }

Status token_stats_forward(const TokenStatsArgs&, Dtype, void* stream);
Status token_stats_backward(const TokenStatsArgs&, Dtype, void* stream);

}  // namespace dqo::cuda
