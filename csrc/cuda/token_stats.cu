// Row statistics of logits and their gradient.
//
// Forward: one block for kSplit columns of a row, whatever the number of rows; a row of several splits is finished by a second
// kernel, one warp a row, in the order of the splits. Backward: one block for a tile of a row; it writes aligned words.
#include "cuda/token_stats.h"

#include "cuda/token_stats_row.cuh"

namespace dqo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMergeThreads = 128;

// Field-major, so that neighbouring blocks write neighbouring floats.
template <bool kRef>
DQO_DEVICE void put_partial(float* partial, std::int64_t block, std::int64_t blocks, const Moments<kRef>& moments) {
    const float values[kPartials] = {moments.m, moments.s, moments.u, moments.mr, moments.sr, moments.d};
    for (int i = 0; i < (kRef ? 6 : 3); ++i) partial[i * blocks + block] = values[i];
}

template <bool kRef>
DQO_DEVICE Moments<kRef> get_partial(const float* partial, std::int64_t block, std::int64_t blocks) {
    Moments<kRef> moments;
    float* const values[kPartials] = {&moments.m, &moments.s, &moments.u, &moments.mr, &moments.sr, &moments.d};
    for (int i = 0; i < (kRef ? 6 : 3); ++i) *values[i] = partial[i * blocks + block];
    return moments;
}

struct Place {
    std::int64_t row, part;
};
DQO_DEVICE Place block_in(std::int64_t parts) {  // 32 bits: a division of 64 takes a hundred instructions
    const std::uint32_t block = std::uint32_t(block_index()), count = std::uint32_t(parts);
    return {block / count, block % count};
}

DQO_DEVICE float temperature_of(const TokenStatsArgs& a, std::int64_t row) {
    return a.temperatures ? a.temperatures[row] : a.temperature;
}

template <class T, bool kCap, bool kRef>
DQO_DEVICE void put_statistics(const TokenStatsArgs& a, std::int64_t row, const Moments<kRef>& moments) {
    const std::int64_t action = a.actions[row];
    const bool valid = action >= 0 && action < a.vocab;
    const auto entry = [&](const Rows& rows) {
        return valid ? capped<kCap>(to_float(row_of<T>(rows, row)[action]), a.softcap) : 0.0f;
    };
    const float z_ref = kRef ? entry(a.ref_logits) : 0.0f;
    put_fields<kRef>(a.fields, row, RowStatistics::of(moments, 1.0 / temperature_of(a, row), valid, entry(a.logits), z_ref));
}

template <class T, bool kCap, bool kRef>
DQO_KERNEL(kThreads, 2) token_stats_forward_kernel(TokenStatsArgs a) {
    const std::int64_t parts = splits(a.vocab);
    const auto [row, part] = block_in(parts);
    if (a.mask && !a.mask[row]) {
        if (thread_index() == 0 && part == 0) put_fields<kRef>(a.fields, row, RowStatistics{});
        return;
    }
    const float scale = 1.0f / temperature_of(a, row) * kLog2e;
    const std::int64_t begin = part * kSplit, end = begin + kSplit < a.vocab ? begin + kSplit : a.vocab;
    const T *const logits = row_of<T>(a.logits, row), *const ref = kRef ? row_of<T>(a.ref_logits, row) : nullptr;
    const auto load = [=](std::int64_t first, std::int64_t stride, Chunk<T>(&z)[kInFlight], Chunk<T>(&zr)[kInFlight]) {
        load_chunks_in_loop(logits, first, stride, end, -INFINITY, z);
        if constexpr (kRef) load_chunks_in_loop(ref, first, stride, end, -INFINITY, zr);
    };
    Moments<kRef> moments = thread_moments<T, kCap, kRef>(begin, end, a.softcap, scale, load);
    auto* const exchange = reinterpret_cast<Moments<kRef>*>(shared_memory());
    moments = merge_block(moments, exchange, [=](Moments<kRef> one, const Moments<kRef>& next) {
        one.merge(next, scale);
        return one;
    });
    if (thread_index() != 0) return;
    if (parts > 1)
        put_partial(a.partial, block_index(), a.rows * parts, moments);
    else
        put_statistics<T, kCap>(a, row, moments);
}

// A thread a row.
template <class T, bool kCap, bool kRef>
DQO_KERNEL(kMergeThreads, 2) token_stats_merge_kernel(TokenStatsArgs a) {
    const std::int64_t row = block_index() * kMergeThreads + thread_index();
    if (row >= a.rows || (a.mask && !a.mask[row])) return;
    const std::int64_t parts = splits(a.vocab), first = row * parts, blocks = a.rows * parts;
    const float scale = 1.0f / temperature_of(a, row) * kLog2e;
    Moments<kRef> moments = get_partial<kRef>(a.partial, first, blocks);
    for (std::int64_t part = 1; part < parts; ++part) moments.merge(get_partial<kRef>(a.partial, first + part, blocks), scale);
    put_statistics<T, kCap>(a, row, moments);
}

// Columns of a tile, in chunks of what is written.
template <class G>
constexpr std::int64_t kTile = std::int64_t(kThreads) * kInFlight * Chunk<G>::kCount;

struct BackwardArgs {
    TokenStatsArgs stats;
    std::int64_t tiles;  // of a row
};

// The row's part of the gradient, by one thread.
template <bool kKl, bool kEntropy>
DQO_DEVICE RowGradient row_gradient(const TokenStatsArgs& a, std::int64_t row) {
    const auto get = [=](const float* field) { return field ? double(field[row]) : 0.0; };
    RowStatistics s{};
    s.peak = a.fields.peak[row];
    s.log_total = a.fields.log_total[row];
    if constexpr (kKl) {
        s.ref_peak = a.fields.ref_peak[row];
        s.ref_log_total = a.fields.ref_log_total[row];
    }
    const double entropy = kEntropy ? a.fields.entropy[row] : 0.0, kl = kKl ? a.fields.kl[row] : 0.0;
    const RowCoefficients c(get(a.c_logprobs), get(a.c_lse), get(a.c_entropy), get(a.c_kl), entropy, kl);
    const std::int64_t action = a.c_logprobs ? a.actions[row] : 0;
    return RowGradient::of(s, c, action, action >= 0 && action < a.vocab, a.c_logprobs, temperature_of(a, row));
}

// Chunks of the gradient begin where it is aligned, the first one up to 14 bytes before the row. As the logits usually lie as the
// gradient does, they are then read in aligned words too.
template <class T, class G, bool kCap, bool kKl, bool kEntropy>
DQO_KERNEL(kThreads, 2) token_stats_backward_kernel(BackwardArgs b) {
    const TokenStatsArgs& a = b.stats;
    constexpr int kParts = sizeof(T) / sizeof(G);  // chunks of T in one of G
    const auto [row, tile] = block_in(b.tiles);
    G* const grad = static_cast<G*>(a.grad) + row * a.vocab;
    const std::int64_t first = tile * kTile<G> + thread_index() * Chunk<G>::kCount -
                               misalignment(grad) / std::int64_t(sizeof(G));
    const std::int64_t stride = std::int64_t(kThreads) * Chunk<G>::kCount;

    const bool counts = !a.mask || a.mask[row];
    Chunk<T> z[kParts][kInFlight], z_ref[kParts][kInFlight];
    if (counts) {
        const T *const logits = row_of<T>(a.logits, row), *const ref = kKl ? row_of<T>(a.ref_logits, row) : nullptr;
#pragma unroll
        for (int k = 0; k < kParts; ++k) {
            load_chunks(logits, first + k * Chunk<T>::kCount, stride, a.vocab, 0.0f, z[k]);
            if constexpr (kKl) load_chunks(ref, first + k * Chunk<T>::kCount, stride, a.vocab, 0.0f, z_ref[k]);
        }
    }
    auto* const shared = reinterpret_cast<RowGradient*>(shared_memory());
    if (counts && thread_index() == 0) *shared = row_gradient<kKl, kEntropy>(a, row);  // while the chunks are on their way
    sync_block();
    const RowGradient gradient = *shared;
#pragma unroll
    for (int j = 0; j < kInFlight; ++j) {
        const std::int64_t at = first + j * stride;
        if (at >= a.vocab) break;
        float out[Chunk<G>::kCount] = {};
        if (counts) {
#pragma unroll
            for (int k = 0; k < kParts; ++k)
                chunk_gradient<T, kCap, kKl, kEntropy>(gradient, at + k * Chunk<T>::kCount, a.softcap, z[k][j], z_ref[k][j],
                                                       out + k * Chunk<T>::kCount);
        }
        store_chunk(grad, at, a.vocab, Chunk<G>::of(out));
    }
}

// ---- the launches, by dtype and by what is asked for

template <class T, bool kCap, bool kRef>
Status forward_of(const TokenStatsArgs& a, void* stream) {
    const std::int64_t parts = splits(a.vocab);
    const Grid grid{a.rows * parts, kThreads, kThreads / kWarp * sizeof(Moments<kRef>)};
    const Status status = launch(token_stats_forward_kernel<T, kCap, kRef>, grid, stream, a);
    if (parts == 1 || status != Status{}) return status;
    const Grid merge{(a.rows + kMergeThreads - 1) / kMergeThreads, kMergeThreads};
    return launch(token_stats_merge_kernel<T, kCap, kRef>, merge, stream, a);
}

template <class T>
Status forward(const TokenStatsArgs& a, void* stream) {
    if (a.ref_logits.data) return (a.softcap.cap > 0 ? forward_of<T, true, true> : forward_of<T, false, true>)(a, stream);
    return (a.softcap.cap > 0 ? forward_of<T, true, false> : forward_of<T, false, false>)(a, stream);
}

template <class T, class G, bool kCap, bool kKl, bool kEntropy>
Status backward_of(const TokenStatsArgs& a, void* stream) {
    // Where not every row begins at an aligned address, a first chunk may begin before its row.
    const bool aligned = reinterpret_cast<std::uintptr_t>(a.grad) % 16 == 0 && a.vocab * sizeof(G) % 16 == 0;
    const std::int64_t columns = a.vocab + (aligned ? 0 : Chunk<G>::kCount - 1), tiles = (columns + kTile<G> - 1) / kTile<G>;
    const Grid grid{a.rows * tiles, kThreads, sizeof(RowGradient)};
    return launch(token_stats_backward_kernel<T, G, kCap, kKl, kEntropy>, grid, stream, BackwardArgs{a, tiles});
}

template <class T, class G, bool kCap>
Status backward_with(const TokenStatsArgs& a, void* stream) {
    if (a.c_kl) return (a.c_entropy ? backward_of<T, G, kCap, true, true> : backward_of<T, G, kCap, true, false>)(a, stream);
    return (a.c_entropy ? backward_of<T, G, kCap, false, true> : backward_of<T, G, kCap, false, false>)(a, stream);
}

template <class T, class G>
Status backward(const TokenStatsArgs& a, void* stream) {
    return (a.softcap.cap > 0 ? backward_with<T, G, true> : backward_with<T, G, false>)(a, stream);
}

}  // namespace

Status token_stats_forward(const TokenStatsArgs& a, Dtype dtype, void* stream) {
    return (dtype == kFloat32 ? forward<float> : dtype == kBfloat16 ? forward<Bfloat16> : forward<Float16>)(a, stream);
}

Status token_stats_backward(const TokenStatsArgs& a, Dtype dtype, void* stream) {
    if (dtype == kFloat32) return (a.bfloat16_grad ? backward<float, Bfloat16> : backward<float, float>)(a, stream);
    return (dtype == kBfloat16 ? backward<Bfloat16, Bfloat16> : backward<Float16, Float16>)(a, stream);
}

}  // namespace dqo::cuda
