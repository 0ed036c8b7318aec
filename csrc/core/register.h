// How an op's operators are registered: each twice over the same kernels, `name` (with autograd and fake, what tracing sees) and
// `_name` (bare, what eager calls take once autograd is settled), for both devices, because the tensors say where a call runs.
#pragma once

#include <torch/csrc/stable/library.h>

#include <string>

namespace marquardt {

using StableLibrary = torch::stable::detail::StableLibrary;

// `arguments` is the rest of the schema: "(Tensor a, int b) -> Tensor".
inline void define_both(StableLibrary& m, const char* name, const char* arguments) {
  m.def((std::string(name) + arguments).c_str());
  m.def((std::string("_") + name + arguments).c_str());
}

template <class Boxed>
void implement_both(StableLibrary& m, const char* name, Boxed* kernel) {
  m.impl(name, kernel);
  m.impl((std::string("_") + name).c_str(), kernel);
}

}  // namespace marquardt

#if defined(MARQUARDT_WITH_CUDA)
#define MQ_ON_EVERY_DEVICE(register_kernels)      \
  STABLE_TORCH_LIBRARY_IMPL(marquardt, CPU, m) {  \
    register_kernels(m);                          \
  }                                               \
  STABLE_TORCH_LIBRARY_IMPL(marquardt, CUDA, m) { \
    register_kernels(m);                          \
  }
#else
#define MQ_ON_EVERY_DEVICE(register_kernels)     \
  STABLE_TORCH_LIBRARY_IMPL(marquardt, CPU, m) { \
    register_kernels(m);                         \
  }
#endif
