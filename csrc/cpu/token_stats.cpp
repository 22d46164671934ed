// token_stats on the CPU: the choice of the instruction set, the threads, and the memory of the gradient.
#include "cpu/token_stats.h"

#include "cpu/isa.h"
#include "cpu/threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace dqo::cpu {

namespace {

const TokenStatsRows& rows() {
#if defined(__x86_64__)
    if (isa() == Isa::kAvx512) return token_stats_avx512;
    if (isa() == Isa::kAvx2) return token_stats_avx2;
#endif
    return token_stats_portable;
}

std::int64_t size_of(Dtype dtype) { return dtype == kFloat32 ? 4 : dtype == kFloat64 ? 8 : 2; }

// From here on memory is mapped for its one owner, so advice about it concerns nobody else (glibc's largest mmap threshold).
constexpr std::int64_t kOwnMapping = 32 << 20;

// A fresh gradient is as large as the logits, and its first touch costs a page fault every 4 KiB: more time than the kernel
// itself. Huge pages make that one every 2 MiB. Only advice: where the system knows no huge pages nothing changes.
void advise_huge_pages(void* data, std::int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::uintptr_t kHuge = 2 << 20;
    const std::uintptr_t begin = (reinterpret_cast<std::uintptr_t>(data) + kHuge - 1) / kHuge * kHuge;
    const std::uintptr_t end = (reinterpret_cast<std::uintptr_t>(data) + bytes) / kHuge * kHuge;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)data, (void)bytes;
#endif
}

}  // namespace

void token_stats_forward(const TokenStatsArgs& args, Dtype dtype, int threads) {
    const auto function = rows().forward[dtype];
    parallel_for(args.rows, args.vocab * (args.ref_logits.data ? 2 : 1), threads,
                 [&](std::int64_t begin, std::int64_t end) { function(args, begin, end); });
}

void token_stats_backward(TokenStatsArgs args, Dtype dtype, int threads) {
    const std::int64_t bytes = args.rows * args.vocab * size_of(args.bfloat16_grad ? kBfloat16 : dtype);
    // A gradient that no cache will hold until it is read is written past them: one pass over memory instead of two.
    constexpr std::int64_t kBeyondCaches = 8 << 20;
    args.stream = bytes >= kBeyondCaches;
    if (bytes >= kOwnMapping) advise_huge_pages(args.grad, bytes);
    const auto function = args.bfloat16_grad ? rows().backward_to_bfloat16 : rows().backward[dtype];
    parallel_for(args.rows, args.vocab * (args.c_kl ? 2 : 1), threads,
                 [&](std::int64_t begin, std::int64_t end) { function(args, begin, end); });
}

void read_sum(const float* data, std::int64_t count, int threads, double* sums) {
    constexpr std::int64_t kPiece = 1 << 16;
    const auto function = rows().sum_of;
    parallel_for((count + kPiece - 1) / kPiece, kPiece, threads, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t i = begin; i < end; ++i)
            sums[i] = function(data + i * kPiece, (i + 1) * kPiece < count ? kPiece : count - i * kPiece);
    });
}

}  // namespace dqo::cpu
