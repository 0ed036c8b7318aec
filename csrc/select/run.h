// Where a checked call runs: on the CPU, or on the GPU that holds its data.
#pragma once

#include "core/tensor.h"
#include "select/select.h"

namespace marquardt {

// On the device of `state`; on a GPU in the current stream, without waiting for it.
void run_select(const SelectCall& call, const View& state);
void run_rescale(const RescaleCall& call, const View& state);

}  // namespace marquardt
