// What the launch heuristics need to know of a GPU.
#pragma once

#include <cstdint>

namespace marquardt {

// The defaults are those of an H200.
struct DeviceLimits {
  int major = 9, minor = 0;       // compute capability
  int sms = 132;                  // streaming multiprocessors
  int shared_per_block = 232448;  // bytes of shared memory that one CTA may ask for
  int shared_per_sm = 233472;     // bytes of shared memory of one multiprocessor
  int threads_per_sm = 2048;
  int max_cluster = 16;  // CTAs of a cluster, each with all its shared memory; 1 before sm_90
  int64_t l2_bytes = int64_t{50} << 20;
};

// Of the device with this index, asked once.
const DeviceLimits& device_limits(int index);

}  // namespace marquardt
