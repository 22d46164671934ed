// Device memory of the look-back; its protocol is in look_back.cuh.
#pragma once

#include <cstdint>

namespace dqo::cuda {

struct alignas(32) Slot {  // a sector of the second-level cache
    double value[3];
    std::uint32_t flag, unused;
};

struct LookBack {
    Slot *maps, *states;     // (rows,)
    std::int32_t* sequence;  // (rows,)
    std::uint32_t* tickets;  // how many have been taken
};

}  // namespace dqo::cuda
