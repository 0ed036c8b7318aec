// The table of one instruction set; the body of cpu_avx512.cpp, cpu_avx2.cpp and cpu_baseline.cpp.
#pragma once

#include "frame/cpu_apply.h"
#include "frame/cpu_convert.h"
#include "frame/cpu_gram.h"
#include "frame/cpu_noise.h"
#include "frame/cpu_step.h"

namespace marquardt::MQ_ISA {

template <class T>
constexpr TypedFrameKernels<T> typed_kernels() {
  return {gram<T>,       apply<T>, apply_wide<T>, sum_in_double<T>, step_gram<T>,
          step_apply<T>, clamp<T>, load_chunk,    store_chunk,      fill_noise};
}

constexpr const char* name_of_isa() {
  return kBytes == 64 ? "avx512" : kBytes == 32 ? "avx2" : "baseline";
}

const FrameKernels frame_kernels = {name_of_isa(), typed_kernels<float>(), typed_kernels<double>()};

}  // namespace marquardt::MQ_ISA
