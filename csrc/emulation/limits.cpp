// The GPU that the emulated library plays: an H200, or the one that MARQUARDT_EMULATED_GPU names.
#include "core/device.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace marquardt {
namespace {

DeviceLimits chosen() {
  DeviceLimits limits;  // an H200
  const char* name = std::getenv("MARQUARDT_EMULATED_GPU");
  if (name == nullptr || std::string(name) == "sm_90") return limits;
  if (std::string(name) == "sm_80") {  // an A100: no clusters
    limits.major = 8;
    limits.sms = 108;
    limits.shared_per_block = 163 << 10;
    limits.shared_per_sm = 164 << 10;
    limits.l2_bytes = int64_t{40} << 20;
    return limits;
  }
  if (std::string(name) == "sm_100") {  // a B200
    limits.major = 10;
    limits.sms = 148;
    limits.l2_bytes = int64_t{126} << 20;
    return limits;
  }
  throw std::runtime_error("MARQUARDT_EMULATED_GPU must be sm_80, sm_90 or sm_100, got " + std::string(name));
}

}  // namespace

const DeviceLimits& device_limits(int) {
  static const DeviceLimits limits = chosen();
  return limits;
}

}  // namespace marquardt
