// What the device can do, and what an error means.
#pragma once

#include <string>

#include "cuda/api.h"

namespace dqo::cuda {

// Why no kernel can run in this process, or "": no driver, an old one, no device, a device before compute capability 8.0.
std::string problem(int device);
// Why no kernel that needs thread block clusters can run, or "".
std::string cluster_problem(int device);
int processors(int device);  // multiprocessors

int current_device();  // of this thread; -1 when there is none
Status use_device(int device);
std::string text_of(Status);

}  // namespace dqo::cuda
