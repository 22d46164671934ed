// Scans along a sequence by composing what rows do to a state: what parallel scans (CUDA) share, and the CPU tests check.
//
// The state is (y, v, x): a discounted sum, the value that the row before needs beside it, and a plain sum. A row maps it to
//   (decay*y + bridge*v + c,  o,  x + add);   a row that does not count leaves it as it is, whatever it holds.
// Maps compose associatively up to rounding; composed in a fixed order they give a state that depends on the rows alone.
#pragma once

#include "common/times.h"

namespace dqo {

struct ScanState {
    double y = 0, v = 0, x = 0;
};

struct ScanMap {
    double decay = 1, bridge = 0, c = 0, o = 0, add = 0;  // the identity
    double keeps = 1;                                     // 1: v stays, 0: v becomes o

    DQO_HOST_DEVICE static ScanMap of_row(double decay, double bridge, double c, double o, double add) {
        return {decay, bridge, c, o, add, 0};
    }

    DQO_HOST_DEVICE ScanMap then(const ScanMap& next) const {
        ScanMap both;
        both.decay = decay * next.decay;
        both.bridge = next.decay * bridge + next.bridge * keeps;
        both.c = times(next.decay, c) + times(next.bridge, o) + next.c;
        both.o = next.keeps != 0 ? o : next.o;
        both.add = add + next.add;
        both.keeps = keeps * next.keeps;
        return both;
    }

    DQO_HOST_DEVICE ScanState operator()(const ScanState& s) const {
        return {times(decay, s.y) + times(bridge, s.v) + c, keeps != 0 ? s.v : o, s.x + add};
    }
};

// A scan goes over tiles of this many rows: within a tile maps are composed as a tree, from tile to tile the state goes on.
constexpr int kScanTile = 32;

}  // namespace dqo
