// A discount of exactly 0 takes its side out.
#pragma once

#include "common/host_device.h"

namespace dqo {

// gain * x, and 0 for a gain of exactly 0: neither infinity nor NaN comes through it.
template <typename Accumulator>
DQO_HOST_DEVICE inline Accumulator times(Accumulator gain, Accumulator x) {
    return gain == Accumulator(0) ? Accumulator(0) : gain * x;
}

}  // namespace dqo
