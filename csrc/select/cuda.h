// Dynamic thresholding on a GPU. Memory of a call: data, results, and numbers that do not lie on the host, are device
// pointers.
#pragma once

#include <string>

#include "select/select.h"

namespace marquardt {

// Launch on `stream` of the current device; never wait for it.
void select_cuda(const SelectCall& call, void* stream);
void rescale_cuda(const RescaleCall& call, void* stream);

// How these would run, in words.
std::string select_plan(const SelectCall& call);
std::string rescale_plan(const RescaleCall& call);

}  // namespace marquardt
