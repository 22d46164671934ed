// How rows that are worked on at the same time pass the state of the reverse scan to each other.
//
// Tickets are rows from the last to the first, so that a row's ticket is higher than those of the rows after it in time. A worker (a
// cluster) takes a ticket only when it runs, works its tickets one after the other, and for a ticket waits on lower tickets alone.
//
// No deadlock, whatever the number of sequences, rows or workers: consider the lowest ticket that is taken and not finished. Its
// worker has finished its earlier tickets, so it is working on this one; all it may wait for are lower tickets, which are finished
// and have published. It goes on. Tickets that nobody has taken are waited for by nobody. (A ticket taken ahead, while the worker is
// busy with a lower one, changes nothing in this argument.)
//
// A row publishes its map as soon as it knows its statistics and before it waits. Rows of a sequence, counted from its end, form
// tiles of kScanTile; the last of a tile publishes the state after it. A row composes the maps of its tile before it, and applies
// them to the state after the tile before: the same maps in the same order as scan.cuh, whoever came first, so that the result is
// the same bit by bit. The chain of waits is one per tile, not one per row.
//
// Each slot is written once a launch, its payload before its flag (release), and read after its flag (acquire).
#pragma once

#include "cuda/look_back.h"
#include "cuda/scan.cuh"

namespace dqo::cuda {

constexpr std::uint32_t kEmpty = 0, kFull = 1, kPasses = 2;  // kPasses: a row that does not count; it has no payload

DQO_DEVICE void look_back_reset(const LookBack& w, std::int64_t row, std::int32_t sequence) {
    w.maps[row].flag = w.states[row].flag = kEmpty;
    w.sequence[row] = sequence;
    if (row == 0) *w.tickets = 0;
}

// The next row to work on, by one thread; negative when there is none.
DQO_DEVICE std::int64_t take_row(const LookBack& w, std::int64_t rows) { return rows - 1 - take_ticket(w.tickets); }

DQO_DEVICE void publish(Slot& slot, double a, double b, double c) {
    store_relaxed(&slot.value[0], a);
    store_relaxed(&slot.value[1], b);
    store_relaxed(&slot.value[2], c);
    store_release(&slot.flag, kFull);
}

DQO_DEVICE std::uint32_t wait_for(const Slot& slot) {
    std::uint32_t flag;
    while ((flag = load_acquire(&slot.flag)) == kEmpty) wait_a_little();
    return flag;
}

DQO_DEVICE ScanState published_state(const Slot& slot) {
    wait_for(slot);
    return {load_relaxed(&slot.value[0]), load_relaxed(&slot.value[1]), load_relaxed(&slot.value[2])};
}

DQO_DEVICE ScanMap published_map(const Slot& slot, double decay, double bridge) {
    if (wait_for(slot) == kPasses) return {};
    return ScanMap::of_row(decay, bridge, load_relaxed(&slot.value[0]), load_relaxed(&slot.value[1]),
                           load_relaxed(&slot.value[2]));
}

// By a warp: the state before `row` in the scan of its sequence, whose rows end before `end` and whose scan begins with `initial`.
// Every row that counts has the same decay and bridge.
DQO_DEVICE ScanState look_back(const LookBack& w, std::int64_t row, std::int64_t end, const ScanMap& own, double decay,
                               double bridge, ScanState initial) {
    const int lane = thread_index() % kWarp;
    const std::int64_t position = end - 1 - row;
    const int place = int(position % kScanTile);
    const std::int64_t first = row + place;  // the first row of the tile in the order of the scan
    if (lane == 0) {
        if (own.keeps != 0)
            store_release(&w.maps[row].flag, kPasses);
        else
            publish(w.maps[row], own.c, own.o, own.add);
    }
    ScanMap map;
    if (lane < place) map = published_map(w.maps[first - lane], decay, bridge);
    if (lane == place) map = own;
    const ScanMap scanned = scan_tile(map);
    const ScanState state = position < kScanTile ? initial : published_state(w.states[first + 1]);
    if (place == kScanTile - 1 && lane == place) {
        const ScanState after = scanned(state);
        publish(w.states[row], after.y, after.v, after.x);
    }
    return from_lane(before_lane(scanned), place)(state);
}

}  // namespace dqo::cuda
