// The scan of one sequence by the threads of one block, a row a thread, in tiles of a warp.
//
// Tiles are counted from where the scan begins, and what a row receives is the state at its tile's beginning through the maps of the
// tile's rows before it: the number of threads decides how many tiles are worked on at once, and no bit of the result.
#pragma once

#include "common/scan_map.h"
#include "cuda/device.cuh"

namespace dqo::cuda {

static_assert(kScanTile == kWarp);
constexpr int kMostThreads = 1024;

// The map of a lane after those of the lanes before it.
DQO_DEVICE ScanMap scan_tile(ScanMap map) {
    const int lane = thread_index() % kWarp;
#pragma unroll
    for (int distance = 1; distance < kWarp; distance *= 2) {
        const ScanMap before = from_lane_before(map, distance);
        if (lane >= distance) map = before.then(map);
    }
    return map;
}

// The maps of the lanes before, of a tile that scan_tile has scanned.
DQO_DEVICE ScanMap before_lane(const ScanMap& scanned) {
    const ScanMap before = from_lane_before(scanned, 1);
    return thread_index() % kWarp == 0 ? ScanMap{} : before;
}

struct ScanShared {  // of a block
    ScanMap tile[kMostThreads / kWarp];
    ScanState before[kMostThreads / kWarp + 1];  // of each tile; the last is the state after all of them
};

// Rows first, first + step, ... (`length` of them): `use(row, state before it)` for each, and the state after the last for all
// threads. `map(row)` gives a row's map, the identity for a row that does not count.
template <class Map, class Use>
DQO_DEVICE ScanState scan_sequence(std::int64_t first, std::int64_t length, int step, ScanState state, Map map, Use use) {
    auto& shared = *reinterpret_cast<ScanShared*>(shared_memory());
    const int tiles = block_threads() / kWarp, tile = thread_index() / kWarp;
    for (std::int64_t begin = 0; begin < length; begin += block_threads()) {
        const std::int64_t i = begin + thread_index(), row = first + step * i;
        const ScanMap scanned = scan_tile(i < length ? map(row) : ScanMap{});
        if (thread_index() % kWarp == kWarp - 1) shared.tile[tile] = scanned;
        sync_block();
        if (thread_index() == 0) {
            for (int k = 0; k < tiles; ++k) {
                shared.before[k] = state;
                state = shared.tile[k](state);
            }
            shared.before[tiles] = state;
        }
        sync_block();
        const ScanMap before = before_lane(scanned);
        if (i < length) use(row, before(shared.before[tile]));
        state = shared.before[tiles];  // written again after all have met above
    }
    return state;
}

// Threads that suit sequences of this average length.
inline int scan_threads(std::int64_t rows, std::int64_t sequences) {
    int threads = kWarp;
    while (threads < kMostThreads && threads * sequences < rows) threads *= 2;
    return threads;
}

}  // namespace dqo::cuda
