// CUDA for a .cu file: the real one under nvcc, the emulated one under g++. All shared memory of a kernel is one dynamic
// buffer, whose size the launch gives.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/macros.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#elif defined(MARQUARDT_EMULATION)
#include "emulation/cuda.h"
#else
#error "core/cuda.h is for .cu files: compile them with nvcc, or with -DMARQUARDT_EMULATION"
#endif

// Opens a kernel's definition: MQ_KERNEL(most threads of a CTA [, CTAs per multiprocessor]) name(parameters) { ... }
#define MQ_KERNEL(...) __global__ void __launch_bounds__(__VA_ARGS__)

namespace marquardt {

// The CTA's shared memory, aligned to 128 bytes.
#if defined(__CUDACC__)
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char marquardt_shared[];
  return marquardt_shared;
}
#else
inline unsigned char* shared_memory() {
  return emulation::current->shared;
}
#endif

}  // namespace marquardt
