// The one place that launches kernels. For .cu files alone.
#pragma once

#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "core/cuda.h"

#if defined(__CUDACC__)
#include <map>
#include <mutex>
#else
#include <tuple>

#include "emulation/machine.h"
#endif

namespace marquardt {

struct Launch {
  unsigned grid = 1;     // CTAs
  unsigned block = 32;   // threads of a CTA
  unsigned cluster = 1;  // CTAs of a cluster
  size_t shared = 0;     // bytes of shared memory of a CTA
};

inline std::string text_of(const Launch& at) {
  return "grid " + std::to_string(at.grid) + ", block " + std::to_string(at.block) + ", cluster " +
         std::to_string(at.cluster) + ", shared " + std::to_string(at.shared);
}

constexpr size_t kMostParameterBytes = 32764;  // what a launch can carry on sm_70 and newer

#if defined(__CUDACC__)

inline void check_launch(const char* name, const Launch& at, cudaError_t status) {
  if (status == cudaSuccess) return;
  (void)cudaGetLastError();  // or the next launch would be blamed for it
  throw std::runtime_error(std::string(name) + ": launch failed: " + cudaGetErrorString(status) + " (" + text_of(at) +
                           ")");
}

// A kernel must be told once per device that it may take more shared memory than 48 KiB, or a cluster of more CTAs than
// every chip has.
inline void allow_launch(const char* name, const void* kernel, const Launch& at) {
  constexpr size_t kDefaultShared = 48 * 1024;
  constexpr unsigned kPortableCluster = 8;
  if (at.shared <= kDefaultShared && at.cluster <= kPortableCluster) return;
  struct Allowed {
    size_t shared = kDefaultShared;
    unsigned cluster = kPortableCluster;
  };
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, Allowed> all;
  int device = 0;
  check_launch(name, at, cudaGetDevice(&device));
  const std::lock_guard<std::mutex> lock(mutex);
  Allowed& allowed = all[{kernel, device}];
  if (at.shared > allowed.shared) {
    check_launch(
        name, at,
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(at.shared)));
    allowed.shared = at.shared;
  }
  if (at.cluster > allowed.cluster) {
    check_launch(name, at, cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    allowed.cluster = at.cluster;
  }
}

// Launches on a stream of the current device. Throws where the launch is refused; what goes wrong on the device itself
// is reported by a later call.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Launch& at, void* stream, A&&... args) {
  static_assert((sizeof(std::decay_t<P>) + ... + 0) <= kMostParameterBytes, "too many bytes of parameters");
  allow_launch(name, reinterpret_cast<const void*>(kernel), at);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = at.cluster;
  cluster.val.clusterDim.y = 1;
  cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(at.grid);
  config.blockDim = dim3(at.block);
  config.dynamicSmemBytes = at.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = at.cluster > 1 ? 1 : 0;  // older chips know no clusters
  check_launch(name, at, cudaLaunchKernelEx(&config, kernel, std::forward<A>(args)...));
}

#else

// Runs the kernel to its end.
template <class... P, class... A>
void launch(const char* name, void (*kernel)(P...), const Launch& at, void* /*stream*/, A&&... args) {
  static_assert((sizeof(std::decay_t<P>) + ... + 0) <= kMostParameterBytes, "too many bytes of parameters");
  const std::tuple<std::decay_t<P>...> parameters(std::forward<A>(args)...);
  emulation::run(name, {at.grid, at.block, at.cluster, at.shared}, [&] { std::apply(kernel, parameters); });
}

#endif

}  // namespace marquardt
