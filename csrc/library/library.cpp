// What belongs to the library as a whole: how it was built, and the test flag.
#include <torch/csrc/stable/library.h>

#include <string>

#include "core/check.h"
#include "core/tensor.h"
#include "frame/frame.h"

#if __has_include("build_config.h")
#include "build_config.h"
#endif
#ifndef MARQUARDT_VERSION
#define MARQUARDT_VERSION "unknown"
#endif
#ifndef MARQUARDT_COMPILER
#define MARQUARDT_COMPILER "unknown"
#endif
#ifndef MARQUARDT_CXX_FLAGS
#define MARQUARDT_CXX_FLAGS ""
#endif
#ifndef MARQUARDT_CUDA_ARCHS
#define MARQUARDT_CUDA_ARCHS "none"
#endif
#if defined(MARQUARDT_EMULATION)
#define MARQUARDT_ISA_IN_USE "emulated CUDA"
#else
#define MARQUARDT_ISA_IN_USE marquardt::frame_cpu_isa()
#endif
#ifndef MARQUARDT_COMMIT
#define MARQUARDT_COMMIT "unknown"
#endif

// JSON, for marquardt.env.
extern "C" __attribute__((visibility("default"))) const char* marquardt_build_info() {
  static const std::string text =
      marquardt::join(R"({"version": ")", MARQUARDT_VERSION, R"(", "compiler": ")", MARQUARDT_COMPILER,
                      R"(", "flags": ")", MARQUARDT_CXX_FLAGS, R"(", "cuda": ")", MARQUARDT_CUDA_ARCHS,
                      R"(", "commit": ")", MARQUARDT_COMMIT, R"(", "isa": ")", MARQUARDT_ISA_IN_USE, R"("})");
  return text.c_str();
}

namespace {

void set_poison(bool on) {
  marquardt::set_poison(on);
}

}  // namespace

STABLE_TORCH_LIBRARY(marquardt, m) {
  m.def("_set_poison(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(marquardt, CompositeExplicitAutograd, m) {
  m.impl("_set_poison", TORCH_BOX(&set_poison));
}
