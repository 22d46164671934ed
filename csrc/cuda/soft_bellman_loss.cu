// The one-pass kernel. A cluster of blocks holds a row of logits (of both models) in its shared memory: statistics of the row, the
// state of the reverse scan from the rows after it (look_back.cuh), and its gradient. So logits are read once and the gradient is
// written once. As soon as a chunk of the gradient is made, the chunk of the next row is on its way to the same slot; and two
// clusters share a multiprocessor, so that one moves data while the other one waits.
//
// A row's coefficients may depend on itself and on later rows: importance weights of level none, token or suffix, targets
// detached. Compiled for sm_90 and later only.
#define DQO_CLUSTERS
#include "cuda/soft_bellman_loss.h"

#include "cuda/look_back.cuh"
#include "cuda/soft_bellman_row.cuh"
#include "cuda/token_stats_row.cuh"

namespace dqo::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kMostBlocks = 8;  // of a portable cluster
constexpr std::size_t kSharedOfTwo = 110 * 1024, kSharedOfOne = 224 * 1024;  // bytes a block, of two or one on a multiprocessor

struct OnePassLaunch {
    OnePassArgs args;
    std::int64_t slice;
};

enum class Ref { kNone, kStatistics, kGradient };  // the reference's logits: not given, for statistics, for the KL's gradient too

template <bool kRef>
struct Shared {  // of a block; the parked chunks follow
    Moments<kRef> exchange[kThreads / kWarp];
    Moments<kRef> parts[kMostBlocks];  // of the cluster's blocks, in the first
    RowGradient gradient;
    std::int64_t row;
};

DQO_DEVICE float given(const float* values, std::int64_t row) { return values ? values[row] : 0.0f; }

// By the first warp of a cluster: everything about the row that is not as long as the vocabulary. Writes the row's outputs.
template <class T, bool kCap, bool kRef>
DQO_DEVICE RowGradient work_row(const OnePassArgs& a, std::int64_t row, bool counts, const Moments<kRef>& moments) {
    const TokenStatsArgs& t = a.stats;
    const SoftBellmanArgs& b = a.bellman;
    const SoftBellmanOptions& o = b.options;
    const std::int64_t sequence = a.look_back.sequence[row], end = b.cu_seqlens[sequence + 1];
    const double bootstrap = b.bootstrap ? b.bootstrap[sequence] : 0.0;
    const double decay = o.gamma * o.lam, bridge = o.gamma * (1.0 - o.lam);
    const float temperature = t.temperatures ? t.temperatures[row] : t.temperature;
    const std::int64_t action = t.actions[row];
    const bool valid = action >= 0 && action < t.vocab;

    RowStatistics s{};
    BellmanInputs in{};
    ScanMap own;
    if (counts) {
        const auto entry = [&](const Rows& rows) {
            return valid ? capped<kCap>(to_float(row_of<T>(rows, row)[action]), t.softcap) : 0.0f;
        };
        s = RowStatistics::of(moments, 1.0 / temperature, valid, entry(t.logits), kRef ? entry(t.ref_logits) : 0.0f);
        if constexpr (!kRef) {
            s.ref_logprob = b.ref_logprobs[row];
            s.ref_lse = given(a.ref_lse, row);
        }
        const float value = b.values ? b.values[row] : float(o.beta) * (s.lse - s.ref_lse);
        in = BellmanInputs::of(b, row, s.logprob, s.ref_logprob, value);
        own = in.map(o);
    }
    const ScanState next = look_back(a.look_back, row, end, own, decay, bridge, {bootstrap, bootstrap, 0});

    SoftBellmanRow out{};
    double weight = 0.0;
    if (counts) {
        weight = 1.0;
        if (o.is_level == IsLevel::kSuffix) weight = importance_weight(next.x + in.log_ratio, o);
        if (o.is_level == IsLevel::kToken) weight = importance_weight(in.log_ratio, o);
        out = in.row(weight, next, o);
    }
    if (thread_index() == 0) {
        put_fields<kRef>(t.fields, row, s);
        put_row(b, row, out, weight);
    }
    const double scale = *a.scale, c_lse = b.values ? 0.0 : a.value_coef * scale * o.beta * out.value_grad;
    const RowCoefficients c(a.policy_scale * scale * out.policy_grad, c_lse, 0.0, a.kl_coef * scale, 0.0, s.kl);
    return RowGradient::of(s, c, action, valid, true, temperature);
}

template <class T, bool kCap, Ref kRefUse>
DQO_KERNEL(kThreads, 2) one_pass_kernel(OnePassLaunch launched) {
    constexpr bool kRef = kRefUse != Ref::kNone, kKl = kRefUse == Ref::kGradient;
    constexpr int kCount = Chunk<T>::kCount;
    const OnePassArgs& a = launched.args;
    const TokenStatsArgs& t = a.stats;
    auto& shared = *reinterpret_cast<Shared<kRef>*>(shared_memory());
    auto* const parked = reinterpret_cast<Chunk<T>*>(shared_memory() + (sizeof(Shared<kRef>) + 15) / 16 * 16);
    auto* const parked_ref = parked + launched.slice / kCount;
    const int rank = cluster_rank(), blocks = cluster_blocks();
    const std::int64_t begin = rank * launched.slice;
    const std::int64_t end = begin + launched.slice < t.vocab ? begin + launched.slice : t.vocab;
    const bool leads = rank == 0 && thread_index() < kWarp;  // its first warp works for the cluster
    const auto tell = [&](const RowGradient& gradient, std::int64_t row) {
        if (thread_index() < blocks) {
            auto& to = *in_block(&shared, thread_index());
            to.gradient = gradient;
            to.row = row;
        }
    };
    const auto counts = [&](std::int64_t row) { return row >= 0 && (!t.mask || t.mask[row]); };
    // A thread fills and reads slots of its own: nobody need be waited for. nullptr: a row that does not count.
    const T *z = nullptr, *z_ref = nullptr;  // the row that is on its way
    const auto take = [&](std::int64_t row) {
        z = counts(row) ? row_of<T>(t.logits, row) : nullptr;
        if constexpr (kRef) z_ref = z ? row_of<T>(t.ref_logits, row) : nullptr;
    };
    const auto park = [&](std::int64_t at) {
        const std::int64_t slot = (at - begin) / kCount;
        park_chunk(parked[slot], z, at, end);
        if constexpr (kRef) park_chunk(parked_ref[slot], z_ref, at, end);
    };

    sync_cluster();  // all blocks run, so that their shared memory may be written to
    if (leads) tell({}, from_lane(thread_index() == 0 ? take_row(a.look_back, t.rows) : 0, 0));
    sync_cluster();
    const std::int64_t own = begin + thread_index() * kCount, stride = kThreads * kCount;
    std::int64_t row = shared.row;
    take(row);
    for (std::int64_t at = own; z && at < end; at += stride) park(at);
    while (row >= 0) {
        std::int64_t next = 0;
        if (leads && thread_index() == 0) next = take_row(a.look_back, t.rows);  // told when the row's gradient is known
        Moments<kRef> moments;
        const bool row_counts = z != nullptr;
        const float temperature = row_counts && t.temperatures ? t.temperatures[row] : t.temperature;
        const float scale = 1.0f / temperature * kLog2e;
        if (row_counts) {
            wait_for_copies();
            using Chunks = Chunk<T>[kInFlight];
            const auto load = [&](std::int64_t first, std::int64_t step, Chunks& chunk, Chunks& chunk_ref) {
#pragma unroll
                for (int j = 0; j < kInFlight; ++j) {
                    const std::int64_t at = first + j * step, slot = (at - begin) / kCount;
                    chunk[j] = at < end ? parked[slot] : Chunk<T>::all(-INFINITY);
                    if constexpr (kRef) chunk_ref[j] = at < end ? parked_ref[slot] : Chunk<T>::all(-INFINITY);
                }
            };
            moments = thread_moments<T, kCap, kRef>(begin, end, t.softcap, scale, load);
            moments = merge_block(moments, shared.exchange, [=](Moments<kRef> one, const Moments<kRef>& other) {
                one.merge(other, scale);
                return one;
            });
            if (thread_index() == 0) in_block(&shared, 0)->parts[rank] = moments;
        }
        sync_cluster();
        if (leads) {
            if (row_counts) {
                moments = shared.parts[0];
                for (int i = 1; i < blocks; ++i) moments.merge(shared.parts[i], scale);
            }
            tell(work_row<T, kCap>(a, row, row_counts, moments), from_lane(next, 0));
        }
        sync_cluster();
        const RowGradient gradient = shared.gradient;
        next = shared.row;
        take(next);
        T* const grad = static_cast<T*>(t.grad) + row * t.vocab;
        for (std::int64_t at = own; at < end; at += stride) {
            float out[kCount] = {};
            const std::int64_t slot = (at - begin) / kCount;
            if (row_counts)
                chunk_gradient<T, kCap, kKl, false>(gradient, at, t.softcap, parked[slot], kKl ? parked_ref[slot] : Chunk<T>{},
                                                    out);
            store_chunk(grad, at, end, Chunk<T>::of(out));
            if (z) park(at);
        }
        row = next;
    }
}

// ---- the rows' sequences, and empty slots

constexpr int kResetThreads = 128;

DQO_KERNEL(kResetThreads, 2) reset_kernel(OnePassArgs a) {
    const std::int64_t row = block_index() * kResetThreads + thread_index();
    if (row >= a.stats.rows) return;
    std::int64_t low = 0, high = a.bellman.sequences;  // cu_seqlens[low] <= row < cu_seqlens[high]
    while (high - low > 1) {
        const std::int64_t middle = (low + high) / 2;
        (a.bellman.cu_seqlens[middle] <= row ? low : high) = middle;
    }
    look_back_reset(a.look_back, row, std::int32_t(low));
}

// ---- a factor that arrives after the gradient was made

struct RescaleArgs {
    void* grad;
    std::int64_t count, blocks;
    const float* factor;
};

template <class T>
DQO_KERNEL(kThreads, 2) rescale_kernel(RescaleArgs a) {
    const float factor = *a.factor;
    if (factor == 1.0f) return;
    T* const grad = static_cast<T*>(a.grad);
    constexpr int kCount = Chunk<T>::kCount;
    const std::int64_t stride = std::int64_t(kThreads) * kCount, step = a.blocks * kInFlight * stride;
    for (std::int64_t at = block_index() * kInFlight * stride + thread_index() * kCount; at < a.count; at += step) {
        Chunk<T> chunk[kInFlight];
        load_chunks(grad, at, stride, a.count, 0.0f, chunk);
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
            float values[kCount];
#pragma unroll
            for (int i = 0; i < kCount; ++i) values[i] = chunk[j].get(i) * factor;
            store_chunk(grad, at + j * stride, a.count, Chunk<T>::of(values));
        }
    }
}

// ---- the launches, by dtype and by what is asked for

constexpr std::int64_t kSliceUnit = 64;  // columns

template <class T, bool kCap, Ref kRefUse>
Status launch_one_pass(const OnePassArgs& a, const OnePassShape& shape, int processors, void* stream) {
    const std::int64_t clusters = std::int64_t(processors) * 3 / shape.cluster + 1;  // more than run at once find no row left
    const Grid grid{(clusters < a.stats.rows ? clusters : a.stats.rows) * shape.cluster, kThreads, shape.shared_bytes, shape.cluster};
    return launch(one_pass_kernel<T, kCap, kRefUse>, grid, stream, OnePassLaunch{a, shape.slice});
}

template <class T, bool kCap>
Status one_pass_of(const OnePassArgs& a, const OnePassShape& shape, int processors, void* stream) {
    if (!a.stats.ref_logits.data) return launch_one_pass<T, kCap, Ref::kNone>(a, shape, processors, stream);
    if (a.kl_coef == 0.0) return launch_one_pass<T, kCap, Ref::kStatistics>(a, shape, processors, stream);
    return launch_one_pass<T, kCap, Ref::kGradient>(a, shape, processors, stream);
}

template <class T>
Status one_pass(const OnePassArgs& a, const OnePassShape& shape, int processors, void* stream) {
    return (a.stats.softcap.cap > 0 ? one_pass_of<T, true> : one_pass_of<T, false>)(a, shape, processors, stream);
}

template <class T>
Status rescale_of(void* grad, std::int64_t count, const float* factor, int processors, void* stream) {
    const std::int64_t tile = std::int64_t(kThreads) * kInFlight * Chunk<T>::kCount, needed = (count + tile - 1) / tile;
    const std::int64_t blocks = needed < processors * 8 ? needed : processors * 8;
    return launch(rescale_kernel<T>, Grid{blocks, kThreads}, stream, RescaleArgs{grad, count, blocks, factor});
}

}  // namespace

OnePassShape one_pass_shape(std::int64_t vocab, Dtype dtype, bool two_models) {
    const std::size_t entry = (dtype == kFloat32 ? 4 : 2) * (two_models ? 2 : 1);
    const std::size_t fixed = (sizeof(Shared<true>) + 15) / 16 * 16;
    for (const std::size_t limit : {kSharedOfTwo, kSharedOfOne})
        for (int cluster = 1; cluster <= kMostBlocks; cluster *= 2) {
            const std::int64_t even = (vocab + cluster - 1) / cluster;
            const std::int64_t slice = (even + kSliceUnit - 1) / kSliceUnit * kSliceUnit;
            const std::size_t bytes = fixed + slice * entry;
            if (bytes <= limit) return {cluster, slice, bytes};
        }
    return {};
}

Status soft_bellman_loss_one_pass(const OnePassArgs& a, Dtype dtype, int processors, void* stream) {
    const OnePassShape shape = one_pass_shape(a.stats.vocab, dtype, a.stats.ref_logits.data != nullptr);
    if (shape.cluster == 0) return kInvalidConfiguration;
    const Grid reset{(a.stats.rows + kResetThreads - 1) / kResetThreads, kResetThreads};
    const Status status = launch(reset_kernel, reset, stream, a);
    if (status != Status{}) return status;
    return (dtype == kFloat32 ? one_pass<float> : dtype == kBfloat16 ? one_pass<Bfloat16> : one_pass<Float16>)(
        a, shape, processors, stream);
}

Status rescale(void* grad, std::int64_t count, Dtype dtype, const float* factor, int processors, void* stream) {
    return (dtype == kFloat32 ? rescale_of<float> : dtype == kBfloat16 ? rescale_of<Bfloat16> : rescale_of<Float16>)(
        grad, count, factor, processors, stream);
}

}  // namespace dqo::cuda
