// Planted faults: kernels that are right, and wrong where one line is left out or off. What finds each of them is tested
// in tests/emulation/test_faults.py.
//
//   faults_tsan NAME|all [faulty] [fibers] [seed=N]
//
// Exit status 0: the output is right; 1: it is not; 2: the machine refused; a sanitizer has its own. Kernels take
// `in` with in[i] = i + 1 and write `out`, both of `n` floats.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "core/launch.h"
#include "core/ptx.h"

namespace marquardt {
namespace {

constexpr unsigned kFullWarp = 0xffffffffu;
constexpr int kBlock = 64, kTail = 5;

MQ_DEVICE int thread_of_grid() {
  return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
}

// Every thread reads what its neighbour wrote.
MQ_KERNEL(kBlock) barrier(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  shared[t] = in[thread_of_grid()];  // writes
  if (!faulty) __syncthreads();
  out[thread_of_grid()] = shared[(t + 1) % blockDim.x];  // reads
}

// The last element is n − 1.
MQ_KERNEL(kBlock) bounds_global(const float* in, float* out, int n, bool faulty) {
  const int i = thread_of_grid(), end = faulty ? n + 1 : n;
  if (i < end) out[i] = in[i];
}

// The same in shared memory, which is a float longer than a CTA has threads.
MQ_KERNEL(kBlock) bounds_shared(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = in[thread_of_grid()];
  if (t == 0) shared[kBlock + (faulty ? 1 : 0)] = 0.0f;
  __syncthreads();
  out[thread_of_grid()] = shared[t];
}

// Four floats at once, from a multiple of 16 bytes.
MQ_KERNEL(kBlock) misaligned(const float* in, float* out, int n, bool faulty) {
  const int i = 4 * thread_of_grid();
  if (i + 4 > n) return;
  const float4 four = *reinterpret_cast<const float4*>(in + (faulty && i > 0 ? i - 1 : i));
  *reinterpret_cast<float4*>(out + i) = four;
}

// The neighbour's shared memory, while the neighbour is there.
MQ_KERNEL(kBlock) last_cluster_barrier(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  shared[t] = in[thread_of_grid()];
  ptx::cluster_sync();
  const unsigned beside = (ptx::cluster_rank() + 1) % ptx::cluster_size();
  out[thread_of_grid()] = ptx::load_cluster(shared + t, beside);  // reads
  if (!faulty) ptx::cluster_sync();
}

// As `barrier`, within a warp.
MQ_KERNEL(kBlock) syncwarp(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  shared[t] = in[thread_of_grid()];  // writes
  if (!faulty) __syncwarp();
  out[thread_of_grid()] = shared[t ^ 1u];  // reads
}

// Read, then overwritten, with barriers all around but none in between. `how` 0: of the CTA, 1: of a warp, 2: of a
// cluster. What a thread does before it arrives at the next barrier is not ordered before what others do after this one.
template <int How>
MQ_KERNEL(kBlock)
second_barrier(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x, after = How == 1 ? t ^ 1u : (t + 1) % blockDim.x;
  const auto sync = [] { How == 0 ? __syncthreads() : How == 1 ? __syncwarp() : ptx::cluster_sync(); };
  shared[t] = in[thread_of_grid()];
  sync();
  const float x = How == 2 ? ptx::load_cluster(shared + after, 0) : shared[after];  // reads
  if (!faulty) sync();
  shared[t] = x;  // writes
  sync();
  out[thread_of_grid()] = shared[t];
}

// A shuffle, at which the lanes meet, orders no memory.
MQ_KERNEL(kBlock) shuffle_for_syncwarp(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  const float x = in[thread_of_grid()];
  shared[t] = x;  // writes
  const float y = __shfl_xor_sync(kFullWarp, x, 1);
  if (!faulty) __syncwarp();
  out[thread_of_grid()] = 0.5f * (shared[t ^ 1u] + y);  // reads
}

// cp.async arrives at the wait.
MQ_KERNEL(kBlock) copy_without_wait(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  ptx::copy_async_4(shared + t, in + thread_of_grid());
  ptx::copy_async_commit();
  if (!faulty) ptx::copy_async_wait<0>();
  out[thread_of_grid()] = shared[t];
  if (faulty) ptx::copy_async_wait<0>();
}

// cp.async overwrites what others still read.
MQ_KERNEL(kBlock) copy_too_early(const float* in, float* out, int, bool faulty) {
  float* shared = reinterpret_cast<float*>(shared_memory());
  const unsigned t = threadIdx.x;
  shared[t] = in[thread_of_grid()];
  __syncthreads();
  const unsigned other = (t + 1) % blockDim.x;
  float x = 0.0f;
  if (!faulty) x = shared[other];
  if (!faulty) __syncthreads();
  ptx::copy_async_4(shared + t, in);
  ptx::copy_async_commit();
  if (faulty) x = shared[other];
  ptx::copy_async_wait<0>();
  __syncthreads();
  out[thread_of_grid()] = x + shared[other] - in[0];
}

// Half of a CTA goes another way.
MQ_KERNEL(kBlock) divergent(const float* in, float* out, int, bool faulty) {
  if (!faulty || threadIdx.x < blockDim.x / 2) __syncthreads();
  out[thread_of_grid()] = in[thread_of_grid()];
}

// CTAs of a grid add to the same numbers; only atomics may.
MQ_KERNEL(kBlock) sum_of_grid(const float* in, float* out, int n, bool faulty) {
  const float x = blockIdx.x == 0 ? in[threadIdx.x] : 0.0f;
  for (int i = static_cast<int>(threadIdx.x); i < n; i += static_cast<int>(blockDim.x)) {
    const float add = i < kBlock ? x : blockIdx.x == 0 ? in[i] : 0.0f;
    if (faulty) {
      out[i] += add;  // reads and writes
    } else {
      atomicAdd(out + i, add);
    }
  }
}

// The last CTA to come by goes on with what all have written. The counter lies behind the numbers.
MQ_KERNEL(kBlock) last_block(const float* in, float* out, int n, bool faulty) {
  int* is_last = reinterpret_cast<int*>(shared_memory());
  out[thread_of_grid()] = in[thread_of_grid()] - 1.0f;  // writes
  if (!faulty) __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    *is_last = atomicAdd(reinterpret_cast<int*>(out + n - 1), 1) == static_cast<int>(gridDim.x) - 1;
    __threadfence();
  }
  __syncthreads();
  if (*is_last == 0) return;
  for (int i = static_cast<int>(threadIdx.x); i < n - 1; i += static_cast<int>(blockDim.x)) out[i] += 1.0f;  // reads
  if (threadIdx.x == 0) out[n - 1] = in[n - 1];
}

// Addresses are 64-bit.
MQ_KERNEL(kBlock) overflow(const float* in, float* out, int n, bool faulty) {
  const int i = thread_of_grid(), stride = 1 << 25;
  const int64_t wide = faulty ? static_cast<int64_t>(i * stride) : static_cast<int64_t>(i) * stride;
  if (i < n) out[i] = in[wide / stride];
}

using Kernel = void (*)(const float*, float*, int, bool);

struct Case {
  const char* name;
  Kernel kernel;
  Launch at;
  int n;                 // floats
  int (*source)(int i);  // the number of `in` that out[i] is
};

int itself(int i) {
  return i;
}
int next_in_block(int i) {
  return i / kBlock * kBlock + (i + 1) % kBlock;
}
int next_in_first_block(int i) {
  return (i + 1) % kBlock;
}
int lane_beside(int i) {
  return i ^ 1;
}
int next_of_cluster(int i) {
  return (i + kBlock) % (4 * kBlock);
}

const Case kCases[] = {
    {"barrier", &barrier, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &next_in_block},
    {"bounds_global", &bounds_global, {2, kBlock, 1, 0}, kBlock + kTail, &itself},
    {"bounds_shared", &bounds_shared, {2, kBlock, 1, kBlock * 4 + 4}, 2 * kBlock, &itself},
    {"misaligned", &misaligned, {1, kBlock, 1, 0}, 4 * kBlock, &itself},
    {"last_cluster_barrier", &last_cluster_barrier, {4, kBlock, 4, kBlock * 4}, 4 * kBlock, &next_of_cluster},
    {"syncwarp", &syncwarp, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &lane_beside},
    {"second_barrier", &second_barrier<0>, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &next_in_block},
    {"second_syncwarp", &second_barrier<1>, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &lane_beside},
    {"second_cluster_barrier", &second_barrier<2>, {2, kBlock, 2, kBlock * 4}, 2 * kBlock, &next_in_first_block},
    {"shuffle_for_syncwarp", &shuffle_for_syncwarp, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &lane_beside},
    {"copy_without_wait", &copy_without_wait, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &itself},
    {"copy_too_early", &copy_too_early, {2, kBlock, 1, kBlock * 4}, 2 * kBlock, &next_in_block},
    {"divergent", &divergent, {2, kBlock, 1, 0}, 2 * kBlock, &itself},
    {"sum_of_grid", &sum_of_grid, {3, kBlock, 1, 0}, kBlock + kTail, &itself},
    {"last_block", &last_block, {3, kBlock, 1, 4}, 3 * kBlock + 1, &itself},
    {"overflow", &overflow, {2, kBlock, 1, 0}, 2 * kBlock, &itself},
};

// Memory of exactly n floats, aligned as device memory is.
float* floats(int n) {
  void* place = nullptr;
  if (posix_memalign(&place, 256, static_cast<size_t>(n) * 4) != 0) std::abort();
  return static_cast<float*>(place);
}

int run_case(const Case& one, bool faulty) {
  float *in = floats(one.n), *out = floats(one.n);
  for (int i = 0; i < one.n; ++i) in[i] = static_cast<float>(i + 1), out[i] = 0.0f;
  int wrong = 0;
  launch(one.name, one.kernel, one.at, nullptr, in, out, one.n, faulty);
  for (int i = 0; i < one.n; ++i) {
    const float right = in[one.source(i)];
    if (out[i] != right && ++wrong == 1) std::printf("wrong: out[%d] is %g, not %g\n", i, out[i], right);
  }
  std::free(in);
  std::free(out);
  return wrong == 0 ? 0 : 1;
}

}  // namespace
}  // namespace marquardt

int main(int count, char** words) {
  using namespace marquardt;
  emulation::Machine machine{.mode = emulation::Mode::threads};
  bool faulty = false;
  for (int i = 2; i < count; ++i) {
    const std::string word = words[i];
    if (word == "faulty") faulty = true;
    if (word == "fibers") machine.mode = emulation::Mode::fibers;
    if (word.starts_with("seed=")) machine.seed = std::stoull(word.substr(5));
  }
  emulation::set_machine(machine);
  int ran = 0;
  for (const Case& one : kCases) {
    if (count < 2 || (std::strcmp(words[1], one.name) != 0 && std::strcmp(words[1], "all") != 0)) continue;
    try {
      ++ran;
      if (const int status = run_case(one, faulty); status != 0) return status;
    } catch (const std::exception& error) {
      std::printf("refused: %s\n", error.what());
      return 2;
    }
  }
  std::printf("%d kernels ran, and were right\n", ran);
  if (ran == 0)
    for (const Case& one : kCases) std::printf("%s\n", one.name);
  return ran == 0 ? 3 : 0;
}
