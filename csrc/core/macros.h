// What lets one header serve g++, nvcc, and g++ in nvcc's place (csrc/emulation).
#pragma once

#if defined(__CUDACC__)
#define MQ_HOST_DEVICE __host__ __device__
#define MQ_DEVICE __device__
#else
#define MQ_HOST_DEVICE
#define MQ_DEVICE
#endif

#define MQ_INLINE inline __attribute__((always_inline))
