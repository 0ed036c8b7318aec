// Dynamic thresholding on a GPU. Memory of a call: data, results, and numbers that do not lie on the host, are device
// pointers.
#pragma once

#include "select/select.h"

namespace marquardt {

// Launch on `stream` of the current device; never wait for it.
void select_cuda(const SelectCall& call, void* stream);
void rescale_cuda(const RescaleCall& call, void* stream);

}  // namespace marquardt
