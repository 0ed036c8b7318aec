// Plans in place of launches: what `marquardt.explain` asks of the GPU kernels.
#pragma once

#include <string>

namespace marquardt {

// Whether this thread only plans: then nothing may be launched, and each call says in words how it would run.
bool planning();
void planned(const std::string& words);

}  // namespace marquardt
