// What the CUDA runtime says about devices and versions.
#include <cuda_runtime.h>

#include <array>
#include <mutex>
#include <stdexcept>

#include "core/check.h"
#include "core/device.h"

namespace marquardt {
namespace {

constexpr int kMaxDevices = 64;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  if (error != cudaSuccess) {
    throw std::runtime_error(join("marquardt: cuda:", device, " cannot be asked: ", cudaGetErrorString(error)));
  }
  return value;
}

// promise: cluster_probe threads=32 ctas>=1 wide=-
__global__ void __launch_bounds__(32) cluster_probe() {}

// Every chip of sm_90 and newer has clusters of 8 CTAs; whether it has 16 depends on how its multiprocessors are grouped,
// and on which of them this process was given.
int largest_cluster(const DeviceLimits& limits, int device) {
  constexpr int kPortable = 8, kLargest = 16;
  if (limits.major < 9) return 1;
  int before = 0, clusters = 0;
  if (cudaGetDevice(&before) != cudaSuccess || cudaSetDevice(device) != cudaSuccess) return 1;
  // Kernels that the driver made from older PTX hold no cluster instructions, whatever the chip could do.
  cudaFuncAttributes compiled{};
  const bool knows_clusters =
      cudaFuncGetAttributes(&compiled, cluster_probe) == cudaSuccess && compiled.ptxVersion >= 90;
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = kLargest;
  size.val.clusterDim.y = size.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kLargest);
  config.blockDim = dim3(32);
  config.dynamicSmemBytes = static_cast<size_t>(limits.shared_per_block);
  config.attrs = &size;
  config.numAttrs = 1;
  const bool fits =
      cudaFuncSetAttribute(cluster_probe, cudaFuncAttributeNonPortableClusterSizeAllowed, 1) == cudaSuccess &&
      cudaFuncSetAttribute(cluster_probe, cudaFuncAttributeMaxDynamicSharedMemorySize, limits.shared_per_block) ==
          cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, cluster_probe, &config) == cudaSuccess && clusters > 0;
  (void)cudaGetLastError();  // a refusal is an answer, not an error of the next launch
  (void)cudaSetDevice(before);
  return !knows_clusters ? 1 : fits ? kLargest : kPortable;
}

DeviceLimits ask(int device) {
  DeviceLimits limits;
  limits.major = attribute(cudaDevAttrComputeCapabilityMajor, device);
  limits.minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
  limits.sms = attribute(cudaDevAttrMultiProcessorCount, device);
  limits.shared_per_block = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  limits.shared_per_sm = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
  limits.threads_per_sm = attribute(cudaDevAttrMaxThreadsPerMultiProcessor, device);
  limits.l2_bytes = attribute(cudaDevAttrL2CacheSize, device);
  limits.max_cluster = largest_cluster(limits, device);
  return limits;
}

}  // namespace

const DeviceLimits& device_limits(int index) {
  static std::array<DeviceLimits, kMaxDevices> known;
  static std::array<std::once_flag, kMaxDevices> asked;
  if (index < 0 || index >= kMaxDevices) throw std::runtime_error(join("marquardt: there is no cuda:", index));
  const auto at = static_cast<size_t>(index);
  std::call_once(asked[at], [&] { known[at] = ask(index); });
  return known[at];
}

}  // namespace marquardt

// 1000·major + 10·minor of the runtime in this library and of the newest CUDA that the driver serves; 0 without one.
extern "C" __attribute__((visibility("default"))) void marquardt_cuda_versions(int* runtime, int* driver) {
  *runtime = *driver = 0;
  if (cudaRuntimeGetVersion(runtime) != cudaSuccess) *runtime = 0;
  if (cudaDriverGetVersion(driver) != cudaSuccess) *driver = 0;
}
