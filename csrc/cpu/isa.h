// Which instruction set the vector kernels use: the best that this processor has, or one asked for by name.
#pragma once

#include <string>
#include <vector>

namespace dqo::cpu {

enum class Isa { kPortable, kAvx2, kAvx512 };

std::vector<std::string> instruction_sets();  // those of this build and processor, the best first
std::string instruction_set();                // the one in use
void use_instruction_set(const std::string& name);  // throws std::invalid_argument when it cannot run here
Isa isa();

}  // namespace dqo::cpu
