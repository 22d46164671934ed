#include "cpu/threads.h"

#include <unistd.h>

namespace dqo::cpu {

namespace {

std::atomic<OpenMpParallel> handed_over{nullptr};
std::atomic<pid_t> owner{0};

}  // namespace

void use_openmp(std::uintptr_t gomp_parallel) {
    owner = getpid();
    handed_over = reinterpret_cast<OpenMpParallel>(gomp_parallel);
}

OpenMpParallel openmp() {
    const OpenMpParallel parallel = handed_over;
    return parallel && owner == getpid() ? parallel : nullptr;
}

}  // namespace dqo::cpu
