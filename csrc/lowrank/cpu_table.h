// The table of one instruction set; the body of cpu_avx512.cpp, cpu_avx2.cpp and cpu_baseline.cpp.
#pragma once

#include "lowrank/cpu_head.h"
#include "lowrank/cpu_products.h"
#include "lowrank/cpu_softmax.h"

namespace marquardt::MQ_ISA {

template <class T>
constexpr TypedLowrankKernels<T> typed_lowrank_kernels() {
  return {kWidth<T>, kTileHeight, kTileVectors, products<T>, pack_rows<T>, softmax_jvp<T>, few_classes<T>};
}

const LowrankKernels lowrank_kernels = {kBytes == 64   ? "avx512"
                                        : kBytes == 32 ? "avx2"
                                                       : "baseline",
                                        typed_lowrank_kernels<float>(), typed_lowrank_kernels<double>()};

}  // namespace marquardt::MQ_ISA
