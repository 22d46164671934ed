// Marks the mathematics that runs on the host and, when nvcc compiles it, on the device too.
#pragma once

#ifdef __CUDACC__
#define DQO_HOST_DEVICE __host__ __device__
#else
#define DQO_HOST_DEVICE
#endif
