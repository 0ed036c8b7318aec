// Checks of what CUDA's own functions do.
#include "emulation/checks.cuh"

namespace marquardt::checks {
namespace {

// array 0: int64 [threads of the grid, 6]
MQ_KERNEL(kMostThreads) indices(const __grid_constant__ Arguments a) {
  int64_t* out = array<int64_t>(a, 0) + 6 * thread_of_grid();
  out[0] = threadIdx.x, out[1] = blockIdx.x, out[2] = blockDim.x, out[3] = gridDim.x;
  out[4] = ptx::cluster_rank(), out[5] = ptx::cluster_size();
}

// array 0: int64, written at the thread's number less number 0
MQ_KERNEL(kMostThreads) wide_index(const __grid_constant__ Arguments a) {
  array<int64_t>(a, 0)[thread_of_grid() - a.number[0]] = thread_of_grid();
}

template <class T>
MQ_DEVICE void shuffle_as(const Arguments& a) {
  const int64_t i = thread_of_grid();
  const T x = array<T>(a, 0)[i];
  T* out = array<T>(a, 1) + i;
  const int lanes = static_cast<int>(a.number[1]), width = static_cast<int>(a.number[2]);
  switch (a.number[0]) {
    case 0: *out = __shfl_sync(kFullWarp, x, lanes, width); break;
    case 1: *out = __shfl_xor_sync(kFullWarp, x, lanes, width); break;
    case 2: *out = __shfl_down_sync(kFullWarp, x, static_cast<unsigned>(lanes), width); break;
    case 3: *out = __shfl_up_sync(kFullWarp, x, static_cast<unsigned>(lanes), width); break;
  }
}

// arrays 0 to 1; numbers: kind, lanes, width, type (int32, float, uint64, double)
MQ_KERNEL(kMostThreads) shuffles(const __grid_constant__ Arguments a) {
  switch (a.number[3]) {
    case 0: return shuffle_as<int>(a);
    case 1: return shuffle_as<float>(a);
    case 2: return shuffle_as<unsigned long long>(a);
    case 3: return shuffle_as<double>(a);
  }
}

// array 0: int32 predicates; array 1: uint32 [threads, 3]: ballot, any, all; number 0: the mask
MQ_KERNEL(kMostThreads) votes(const __grid_constant__ Arguments a) {
  const auto mask = static_cast<unsigned>(a.number[0]);
  if (!(mask >> threadIdx.x % 32 & 1u)) return;
  const int predicate = array<int>(a, 0)[thread_of_grid()];
  unsigned* out = array<unsigned>(a, 1) + 3 * thread_of_grid();
  out[0] = __ballot_sync(mask, predicate);
  out[1] = static_cast<unsigned>(__any_sync(mask, predicate));
  out[2] = static_cast<unsigned>(__all_sync(mask, predicate));
}

// Halves of a warp, each on its own, then together. array 0: int32 [threads]
MQ_KERNEL(kMostThreads) half_warps(const __grid_constant__ Arguments a) {
  const unsigned lane = threadIdx.x % 32, mask = lane < 16 ? 0x0000ffffu : 0xffff0000u;
  int x = 1;
  for (int step = lane < 16 ? 8 : 1; step > 0; step /= 2) x += __shfl_xor_sync(mask, x, step);
  __syncwarp();
  array<int>(a, 0)[thread_of_grid()] = x + 100 * __shfl_sync(kFullWarp, x, 31);
}

template <class T>
MQ_DEVICE void atomics_as(const Arguments& a) {
  const T x = array<T>(a, 0)[thread_of_grid()];
  T *to = array<T>(a, 1), *old = array<T>(a, 2) + thread_of_grid();
  switch (a.number[0]) {
    case 0: *old = atomicAdd(to, x); break;
    case 1:
      if constexpr (std::is_integral_v<T>) *old = atomicMax(to, x);
      break;
    case 2:
      if constexpr (std::is_integral_v<T>) *old = atomicMin(to, x);
      break;
    case 3:
      if constexpr (!std::is_same_v<T, double>) *old = atomicExch(to, x);
      break;
    case 4:  // the first thread that finds a zero puts its number there
      if constexpr (std::is_integral_v<T>) *old = atomicCAS(to, T(0), x);
      break;
    case 5:
      if constexpr (std::is_integral_v<T>) *old = atomicOr(to, x);
      break;
    case 6:
      if constexpr (std::is_integral_v<T>) *old = atomicAnd(to, x);
      break;
  }
}

// arrays 0: a value per thread, 1: one number, 2: what each thread found there; numbers: kind, type
MQ_KERNEL(kMostThreads) atomics(const __grid_constant__ Arguments a) {
  switch (a.number[1]) {
    case 0: return atomics_as<int>(a);
    case 1: return atomics_as<unsigned>(a);
    case 2: return atomics_as<unsigned long long>(a);
    case 3: return atomics_as<float>(a);
    case 4: return atomics_as<double>(a);
  }
}

// Sums of CTAs by a tree in shared memory, number 0 times. arrays 0: double per thread, 1: double per CTA
MQ_KERNEL(kMostThreads) tree(const __grid_constant__ Arguments a) {
  auto* shared = reinterpret_cast<double*>(shared_memory());
  const unsigned t = threadIdx.x;
  for (int64_t round = 0; round < a.number[0]; ++round) {
    __syncthreads();
    shared[t] = array<double>(a, 0)[thread_of_grid()];
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
      __syncthreads();
      if (t < half) shared[t] += shared[t + half];
    }
  }
  if (t == 0) array<double>(a, 1)[blockIdx.x] = shared[0];
}

// The order in which threads come by. arrays 0: one int32 zero, 1: int32 [threads]; number 0: behind a barrier
MQ_KERNEL(kMostThreads) order(const __grid_constant__ Arguments a) {
  if (a.number[0] != 0) __syncthreads();
  array<int>(a, 1)[atomicAdd(array<int>(a, 0), 1)] = static_cast<int>(thread_of_grid());
}

// Sums over a cluster. arrays 0: double per thread, 1: double [threads]: the sum over the cluster's CTAs of what the
// thread of that number brought; then what the CTA before stored here
MQ_KERNEL(kMostThreads) cluster_sums(const __grid_constant__ Arguments a) {
  auto* mine = reinterpret_cast<double*>(shared_memory());
  auto* word = reinterpret_cast<uint32_t*>(mine + blockDim.x);
  auto* small = reinterpret_cast<float*>(word + blockDim.x);
  const unsigned t = threadIdx.x, size = ptx::cluster_size(), after = (ptx::cluster_rank() + 1) % size;
  mine[t] = array<double>(a, 0)[thread_of_grid()];
  ptx::cluster_sync();
  double sum = 0.0;
  for (unsigned rank = 0; rank < size; ++rank) sum += ptx::load_cluster(mine + t, rank);
  ptx::store_cluster(word + t, after, static_cast<uint32_t>(1000 * ptx::cluster_rank() + t));
  ptx::store_cluster(small + t, after, 0.5f);
  ptx::cluster_arrive();
  array<double>(a, 1)[2 * thread_of_grid()] = sum;
  ptx::cluster_wait();
  array<double>(a, 1)[2 * thread_of_grid() + 1] =
      word[t] + static_cast<double>(small[t] + ptx::load_cluster(small + t, 0) + ptx::load_cluster(word + t, 0) * 0.0f);
  ptx::cluster_sync();
}

// Shared memory as it begins. array 0: uint8 per byte; number 0: bytes
MQ_KERNEL(kMostThreads) fresh(const __grid_constant__ Arguments a) {
  for (int64_t i = threadIdx.x; i < a.number[0]; i += blockDim.x) array<uint8_t>(a, 0)[i] = shared_memory()[i];
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.number[0]; i += blockDim.x) shared_memory()[i] = 0;  // the next CTA's is fresh
}

// A thread waits for another by asking again and again. array 0: one int32 zero
MQ_KERNEL(kMostThreads) patience(const __grid_constant__ Arguments a) {
  int* flag = array<int>(a, 0);
  if (threadIdx.x == blockDim.x - 1) atomicExch(flag, 1);
  while (atomicAdd(flag, 0) == 0) __nanosleep(100);
}

// array 0: int32 [threads, 5]
MQ_KERNEL(kMostThreads) bits(const __grid_constant__ Arguments a) {
  const int x = static_cast<int>(threadIdx.x) * 40503 << 3;
  int* out = array<int>(a, 0) + 5 * thread_of_grid();
  out[0] = x, out[1] = __ffs(x), out[2] = __popc(static_cast<unsigned>(x)), out[3] = __clz(x);
  out[4] = __float_as_int(__fmaf_rn(__int_as_float(0x3f800000), 2.0f, static_cast<float>(__ldg(out + 1))));
}

const Check kChecks[] = {{"indices", &indices}, {"wide_index", &wide_index}, {"shuffles", &shuffles},
                         {"votes", &votes},     {"half_warps", &half_warps}, {"atomics", &atomics},
                         {"tree", &tree},       {"order", &order},           {"cluster_sums", &cluster_sums},
                         {"fresh", &fresh},     {"patience", &patience},     {"bits", &bits}};

}  // namespace

bool run_machine_check(const std::string& name, const emulation::Grid& at, const Arguments& a) {
  return run_one_of(kChecks, name, at, a);
}

}  // namespace marquardt::checks
