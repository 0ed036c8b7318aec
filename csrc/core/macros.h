// What lets one header serve g++ and nvcc.
#pragma once

#if defined(__CUDACC__)
#define MQ_HOST_DEVICE __host__ __device__
#else
#define MQ_HOST_DEVICE
#endif

#define MQ_INLINE inline __attribute__((always_inline))
