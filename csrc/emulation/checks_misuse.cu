// What no GPU would survive: every check ends with an error, of which the message is tested.
#include <stdexcept>

#include "emulation/checks.cuh"

namespace marquardt::checks {
namespace {

MQ_KERNEL(kMostThreads) half_waits(const Arguments) {
  if (threadIdx.x < blockDim.x / 2) __syncthreads();
}

MQ_KERNEL(kMostThreads) two_barriers(const Arguments) {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

MQ_KERNEL(kMostThreads) lane_missing(const Arguments) {
  if (threadIdx.x != 3) __shfl_xor_sync(kFullWarp, 1, 1);
}

MQ_KERNEL(kMostThreads) mask_without_caller(const Arguments) {
  __syncwarp(0x0000ffffu);
}

MQ_KERNEL(kMostThreads) other_operation(const Arguments) {
  if (threadIdx.x == 0) {
    __syncwarp();
  } else {
    __shfl_sync(kFullWarp, 1, 0);
  }
}

MQ_KERNEL(kMostThreads) lane_outside_of_mask(const Arguments) {
  if (threadIdx.x < 16) __shfl_sync(0x0000ffffu, 1, 20);
}

MQ_KERNEL(kMostThreads) width_of_three(const Arguments) {
  __shfl_sync(kFullWarp, 1, 0, 3);
}

MQ_KERNEL(kMostThreads) barrier_and_shuffle(const Arguments) {
  if (threadIdx.x / 32 == 0) {
    __syncthreads();
  } else {
    if (threadIdx.x % 32 != 0) __syncwarp();
  }
}

MQ_KERNEL(kMostThreads) block_missing(const Arguments) {
  if (ptx::cluster_rank() != 0) ptx::cluster_sync();
}

MQ_KERNEL(kMostThreads) wait_without_arrive(const Arguments) {
  ptx::cluster_wait();
}

MQ_KERNEL(kMostThreads) arrive_twice(const Arguments) {
  ptx::cluster_arrive();
  ptx::cluster_arrive();
}

MQ_KERNEL(kMostThreads) arrive_and_end(const Arguments) {
  ptx::cluster_arrive();
}

MQ_KERNEL(kMostThreads) rank_beyond(const Arguments) {
  ptx::load_cluster(reinterpret_cast<const float*>(shared_memory()), ptx::cluster_size());
}

MQ_KERNEL(kMostThreads) address_beyond(const Arguments) {
  ptx::load_cluster(reinterpret_cast<const double*>(shared_memory() + 64), 0);
}

MQ_KERNEL(kMostThreads) block_gone(const Arguments) {
  ptx::cluster_sync();
  if (ptx::cluster_rank() == 0) return;
  for (int i = 0; i < 100; ++i) __nanosleep(100);
  ptx::load_cluster(reinterpret_cast<const float*>(shared_memory()), 0);
}

MQ_KERNEL(kMostThreads) copy_misaligned(const Arguments a) {
  ptx::copy_async_16(shared_memory(), array<unsigned char>(a, 0) + 8);
}

MQ_KERNEL(kMostThreads) copy_not_awaited(const Arguments a) {
  ptx::copy_async_8(shared_memory(), a.array[0]);
  ptx::copy_async_commit();
}

MQ_KERNEL(kMostThreads) load_misaligned(const Arguments a) {
  ptx::load_16(array<unsigned char>(a, 0) + 8);
}

MQ_KERNEL(kMostThreads) store_misaligned(const Arguments a) {
  ptx::store_8(array<unsigned char>(a, 0) + 4, make_uint2(1, 2));
}

MQ_KERNEL(kMostThreads) behind_shared(const Arguments a) {
  if (threadIdx.x == 0) shared_memory()[a.number[0]] = 1;
}

MQ_KERNEL(kMostThreads) throws(const Arguments a) {
  if (threadIdx.x == 40 && blockIdx.x == a.number[0]) throw std::out_of_range("thread 40 has had enough");
  __syncthreads();
}

MQ_KERNEL(kMostThreads) row_misaligned(const Arguments) {
  uint32_t r[1];
  ptx::ldmatrix_x1(r, shared_memory() + threadIdx.x * 8);
}

MQ_KERNEL(kMostThreads) half_a_warp_multiplies(const Arguments) {
  float d[4] = {};
  const uint32_t a[4] = {}, b[2] = {};
  ptx::mma_m16n8k16_bf16(d, a, b);
}

MQ_KERNEL(kMostThreads) nested(const Arguments a) {
  launch("inner", &throws, {1, 32, 1, 0}, nullptr, a);
}

const Check kChecks[] = {
    {"half_waits", &half_waits},
    {"two_barriers", &two_barriers},
    {"lane_missing", &lane_missing},
    {"mask_without_caller", &mask_without_caller},
    {"other_operation", &other_operation},
    {"lane_outside_of_mask", &lane_outside_of_mask},
    {"width_of_three", &width_of_three},
    {"barrier_and_shuffle", &barrier_and_shuffle},
    {"block_missing", &block_missing},
    {"wait_without_arrive", &wait_without_arrive},
    {"arrive_twice", &arrive_twice},
    {"arrive_and_end", &arrive_and_end},
    {"rank_beyond", &rank_beyond},
    {"address_beyond", &address_beyond},
    {"block_gone", &block_gone},
    {"copy_misaligned", &copy_misaligned},
    {"copy_not_awaited", &copy_not_awaited},
    {"load_misaligned", &load_misaligned},
    {"store_misaligned", &store_misaligned},
    {"behind_shared", &behind_shared},
    {"throws", &throws},
    {"row_misaligned", &row_misaligned},
    {"half_a_warp_multiplies", &half_a_warp_multiplies},
    {"nested", &nested},
};

}  // namespace

bool run_misuse_check(const std::string& name, const emulation::Grid& at, const Arguments& a) {
  return run_one_of(kChecks, name, at, a);
}

}  // namespace marquardt::checks
