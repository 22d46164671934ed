// Runs the look-back alone: `look_back_harness SEED COUNT` makes COUNT random batches of sequences and lets workers pass the state of
// the scan along, in random order, with few or many of them at a time. Exits with 1 where a row received a wrong state, where two
// orders disagree in a bit, or on a deadlock.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <random>
#include <vector>

#include "cuda/look_back.cuh"
#include "cuda_emulation.h"

using namespace dqo;
using namespace dqo::cuda;

struct Batch {
    std::vector<std::int64_t> cu_seqlens;
    std::vector<double> c, o, add;
    std::vector<char> counts;
    double decay, bridge;
};

struct Arguments {
    const Batch* batch;
    LookBack work;
    ScanState* states;
};

void reset(Arguments a) {
    const std::int64_t row = block_index() * kWarp + thread_index(), rows = a.batch->c.size();
    if (row >= rows) return;
    std::int32_t sequence = 0;
    while (a.batch->cu_seqlens[sequence + 1] <= row) ++sequence;
    look_back_reset(a.work, row, sequence);
}

void worker(Arguments a) {
    const Batch& b = *a.batch;
    for (;;) {
        const std::int64_t row = from_lane(thread_index() == 0 ? take_row(a.work, b.c.size()) : 0, 0);
        if (row < 0) return;
        const ScanMap own = b.counts[row] ? ScanMap::of_row(b.decay, b.bridge, b.c[row], b.o[row], b.add[row]) : ScanMap{};
        const std::int64_t end = b.cu_seqlens[a.work.sequence[row] + 1];
        const ScanState state = look_back(a.work, row, end, own, b.decay, b.bridge, {0.5, 0.5, 0});
        if (thread_index() == 0) a.states[row] = state;
    }
}

std::vector<ScanState> passed_along(const Batch& batch, std::uint64_t seed, int resident, int workers) {
    const std::size_t rows = batch.c.size();
    std::vector<Slot> maps(rows, Slot{{-7, -7, -7}, 99, 0}), states(rows, Slot{{-7, -7, -7}, 99, 0});  // of an earlier call
    std::vector<std::int32_t> sequence(rows);
    std::uint32_t tickets = 1234;
    std::vector<ScanState> result(rows);
    const Arguments a{&batch, {maps.data(), states.data(), sequence.data(), &tickets}, result.data()};
    emulation::configure(seed, resident);
    launch(reset, Grid{std::int64_t(rows + kWarp - 1) / kWarp, kWarp}, nullptr, a);
    launch(worker, Grid{workers, kWarp}, nullptr, a);
    return result;
}

Batch make(std::mt19937& rng) {
    const auto below = [&](int n) { return int(rng() % n); };
    std::normal_distribution<double> normal;
    Batch b;
    b.decay = below(4) ? 0.9 : 0.0;
    b.bridge = below(4) ? 0.1 : 0.0;
    b.cu_seqlens = {0};
    const int longest[] = {3, 40, 130}, sequences = 1 + below(6), most = longest[below(3)];
    for (int i = 0; i < sequences; ++i) b.cu_seqlens.push_back(b.cu_seqlens.back() + below(most + 1));
    const bool holes = below(2);
    for (std::int64_t i = 0; i < b.cu_seqlens.back(); ++i) {
        b.c.push_back(normal(rng)), b.o.push_back(normal(rng)), b.add.push_back(normal(rng));
        b.counts.push_back(!holes || below(3));
    }
    return b;
}

bool wrong(const Batch& b, const std::vector<ScanState>& got) {
    for (std::size_t s = 0; s + 1 < b.cu_seqlens.size(); ++s) {
        ScanState want{0.5, 0.5, 0};
        for (std::int64_t row = b.cu_seqlens[s + 1] - 1; row >= b.cu_seqlens[s]; --row) {
            const double error = std::abs(got[row].y - want.y) + std::abs(got[row].v - want.v) + std::abs(got[row].x - want.x);
            if (!(error < 1e-11)) return true;
            if (b.counts[row]) want = {b.decay * want.y + b.bridge * want.v + b.c[row], b.o[row], want.x + b.add[row]};
        }
    }
    return false;
}

int main(int, char** arguments) {
    const std::uint64_t seed = std::strtoull(arguments[1], nullptr, 10);
    for (std::uint64_t i = 0; i < std::strtoull(arguments[2], nullptr, 10); ++i) {
        std::mt19937 rng(seed + i);
        const Batch batch = make(rng);
        try {
            const auto one = passed_along(batch, seed + i, 1 + int(rng() % 40), 1 + int(rng() % 60));
            const auto other = passed_along(batch, seed + i + 77, 1 + int(rng() % 4), 1 + int(rng() % 9));
            if (wrong(batch, one) || wrong(batch, other)) return std::printf("batch %lu: a wrong state\n", seed + i), 1;
            if (std::memcmp(one.data(), other.data(), one.size() * sizeof(ScanState)))
                return std::printf("batch %lu: the order shows in the bits\n", seed + i), 1;
        } catch (const std::exception& error) {
            return std::printf("batch %lu: %s\n", seed + i, error.what()), 1;
        }
    }
    std::printf("%s batches passed\n", arguments[2]);
}
