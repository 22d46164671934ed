// token_stats on the CPU: statistics of rows of logits, and their gradient. Equations: dqo_kernels/token_stats.py.
#pragma once

#include <cstdint>

namespace dqo::cpu {

enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kFloat64 = 3, kDtypes = 4 };

// A (rows / inner, inner, V) tensor seen as rows: row i starts at (i / inner) * outer_stride + (i % inner) * inner_stride elements.
struct Rows {
    const void* data;  // nullptr: absent
    std::int64_t inner, outer_stride, inner_stride;
};

// Row statistics are float, or double when the logits are; c_* are the gradients that arrive at them (nullptr: absent).
struct TokenStatsArgs {
    Rows logits, ref_logits;
    const std::int64_t* actions;
    const bool* mask;           // nullptr: every row counts
    const double* temperatures;  // nullptr: `temperature` for all rows
    double temperature, softcap;  // softcap 0: none
    std::int64_t rows, vocab;
    void *logprobs, *lse, *entropy, *peak, *log_total;
    void *ref_logprobs, *ref_lse, *kl, *ref_peak, *ref_log_total;
    const void *c_logprobs, *c_lse, *c_entropy, *c_kl;
    void* grad;  // (rows, V) contiguous, in the dtype of the logits, or bfloat16 of float logits
    bool bfloat16_grad;
    bool stream;  // write grad past the caches
};

// What one instruction set offers: functions of rows [begin, end), by dtype.
struct TokenStatsRows {
    using Function = void (*)(const TokenStatsArgs&, std::int64_t begin, std::int64_t end);
    Function forward[kDtypes], backward[kDtypes], backward_to_bfloat16;
    double (*sum_of)(const float*, std::int64_t);  // a bare read loop, the yardstick of benchmarks
};

extern const TokenStatsRows token_stats_portable;
#if defined(__x86_64__)
extern const TokenStatsRows token_stats_avx2, token_stats_avx512;
#endif

void token_stats_forward(const TokenStatsArgs&, Dtype, int threads);
void token_stats_backward(TokenStatsArgs, Dtype, int threads);

// sums[i] of every piece of 65,536 floats: what merely reading memory costs, for benchmarks.
void read_sum(const float* data, std::int64_t count, int threads, double* sums);

}  // namespace dqo::cpu
