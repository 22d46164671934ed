#include "cpu/isa.h"

#include <atomic>
#include <stdexcept>

namespace dqo::cpu {

namespace {

const char* const kNames[] = {"portable", "avx2", "avx512"};

bool runs(Isa isa) {
#if defined(__x86_64__)
    // F16C came before AVX2 on every processor that has the latter.
    if (isa == Isa::kAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (isa == Isa::kAvx512)
        return runs(Isa::kAvx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
    return isa == Isa::kPortable;
}

Isa best() { return runs(Isa::kAvx512) ? Isa::kAvx512 : runs(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable; }

std::atomic<Isa>& chosen() {
    static std::atomic<Isa> isa{best()};
    return isa;
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (Isa isa : {Isa::kAvx512, Isa::kAvx2, Isa::kPortable})
        if (runs(isa)) names.push_back(kNames[static_cast<int>(isa)]);
    return names;
}

std::string instruction_set() { return kNames[static_cast<int>(isa())]; }

void use_instruction_set(const std::string& name) {
    for (Isa isa : {Isa::kPortable, Isa::kAvx2, Isa::kAvx512})
        if (name == kNames[static_cast<int>(isa)] && runs(isa)) {
            chosen() = isa;
            return;
        }
    std::string known;
    for (const std::string& each : instruction_sets()) known += (known.empty() ? "" : ", ") + each;
    throw std::invalid_argument("instruction set '" + name + "' cannot run here; these can: " + known);
}

Isa isa() { return chosen(); }

}  // namespace dqo::cpu
