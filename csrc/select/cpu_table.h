// The table of one instruction set; the body of cpu_avx512.cpp, cpu_avx2.cpp and cpu_baseline.cpp.
#pragma once

#include "select/cpu_rescale.h"
#include "select/cpu_select.h"

namespace marquardt::MQ_ISA {

const SelectKernels select_kernels = {
    {sift, count_below, largest}, {sift_wide, count_below_wide, largest_wide}, rescale<float>, rescale<double>};

}  // namespace marquardt::MQ_ISA
