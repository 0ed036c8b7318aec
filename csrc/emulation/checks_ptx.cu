// Checks of core/ptx.h. nvcc compiles this file too, for every chip, so that every instruction is assembled.
#if defined(__CUDACC__)
#include "core/launch.h"
#include "core/ptx.h"
#else
#include "emulation/checks.cuh"
#endif

namespace marquardt::checks {

#if defined(__CUDACC__)
struct Arguments {
  void* array[4];
  int64_t number[4];
};
constexpr int kMostThreads = 1024;
template <class T>
MQ_DEVICE inline T* array(const Arguments& a, int i) {
  return static_cast<T*>(a.array[i]);
}
MQ_DEVICE inline int64_t thread_of_grid() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}
#endif

// D = A·B of whole matrices, one warp for a tile of 16 × 8, tile by tile through shared memory.
// arrays: A [M, K], B [K, N] by rows (bits of 16 or 32), D [M, N] float; numbers: N, K, kind, way of loading.
constexpr int kTileBytes = 16 * 16 * 2;

template <class T>
MQ_DEVICE inline void fill_tile(T* to, const T* from, int64_t stride, int rows, int columns, bool transposed) {
  for (int i = static_cast<int>(threadIdx.x); i < rows * columns; i += 32) {
    const int row = i / columns, column = i % columns;
    to[transposed ? column * rows + row : i] = from[row * stride + column];
  }
}

// Way 0: as ptx_matrix.h says. 1: matrix by matrix. 2: A lies transposed in shared memory, B too.
MQ_DEVICE inline void load_fragments(uint32_t (&a)[4], uint32_t (&b)[2], const uint16_t* tile_a, const uint16_t* tile_b,
                                     int64_t way) {
  const int lane = static_cast<int>(threadIdx.x), row = lane % 8, matrix = lane / 8;
  if (way == 0) {
    ptx::ldmatrix_x4(a, tile_a + (row + matrix % 2 * 8) * 16 + matrix / 2 * 8);
    ptx::ldmatrix_x2_trans(b, tile_b + (row + matrix % 2 * 8) * 8);
  } else if (way == 1) {
    for (int i = 0; i < 4; ++i) {
      uint32_t one[1];
      ptx::ldmatrix_x1(one, tile_a + (row + i % 2 * 8) * 16 + i / 2 * 8);
      a[i] = one[0];
    }
    for (int i = 0; i < 2; ++i) {
      uint32_t one[1];
      ptx::ldmatrix_x1_trans(one, tile_b + (row + i * 8) * 8);
      b[i] = one[0];
    }
  } else {
    ptx::ldmatrix_x4_trans(a, tile_a + (row + matrix / 2 * 8) * 16 + matrix % 2 * 8);
    ptx::ldmatrix_x2(b, tile_b + row * 16 + matrix % 2 * 8);
  }
}

MQ_KERNEL(32) product(const __grid_constant__ Arguments args) {
  const int64_t columns = args.number[0], depth = args.number[1];
  const int64_t row = blockIdx.x / (columns / 8) * 16, column = blockIdx.x % (columns / 8) * 8;
  auto* tile_a = reinterpret_cast<uint16_t*>(shared_memory());
  auto* tile_b = reinterpret_cast<uint16_t*>(shared_memory() + kTileBytes);
  const bool transposed = args.number[3] == 2;
  const int g = static_cast<int>(threadIdx.x) / 4, t = static_cast<int>(threadIdx.x) % 4;
  float d[4] = {};
  for (int64_t k = 0; k < depth; k += args.number[2] == 2 ? 8 : 16) {
    uint32_t a[4], b[2];
    if (args.number[2] == 2) {  // tf32: by hand, there is no ldmatrix of 32-bit numbers
      const uint32_t* from_a = array<uint32_t>(args, 0) + row * depth + k;
      const uint32_t* from_b = array<uint32_t>(args, 1) + k * columns + column;
      for (int i = 0; i < 4; ++i) a[i] = from_a[(g + i % 2 * 8) * depth + t + i / 2 * 4];
      for (int i = 0; i < 2; ++i) b[i] = from_b[(t + i * 4) * columns + g];
      ptx::mma_m16n8k8_tf32(d, a, b);
      continue;
    }
    fill_tile(tile_a, array<const uint16_t>(args, 0) + row * depth + k, depth, 16, 16, transposed);
    fill_tile(tile_b, array<const uint16_t>(args, 1) + k * columns + column, columns, 16, 8, transposed);
    __syncwarp();
    load_fragments(a, b, tile_a, tile_b, args.number[3]);
    __syncwarp();
    if (args.number[2] == 0) {
      ptx::mma_m16n8k16_bf16(d, a, b);
    } else {
      ptx::mma_m16n8k16_f16(d, a, b);
    }
  }
  float* out = array<float>(args, 2) + row * columns + column;
  for (int i = 0; i < 4; ++i) out[(g + i / 2 * 8) * columns + 2 * t + i % 2] = d[i];
}

// arrays 0: float pairs, 1: uint32 [threads, 3]: bf16, f16, tf32 of the first, 2: float [threads, 4]: unpacked
MQ_KERNEL(kMostThreads) packs(const __grid_constant__ Arguments a) {
  const int64_t i = thread_of_grid();
  const float low = array<float>(a, 0)[2 * i], high = array<float>(a, 0)[2 * i + 1];
  uint32_t* words = array<uint32_t>(a, 1) + 3 * i;
  float* back = array<float>(a, 2) + 4 * i;
  words[0] = ptx::pack_bf16(low, high), words[1] = ptx::pack_f16(low, high), words[2] = ptx::tf32_of(low);
  back[0] = ptx::low_bf16(words[0]), back[1] = ptx::high_bf16(words[0]);
  back[2] = ptx::low_f16(words[1]), back[3] = ptx::high_f16(words[1]);
}

// arrays 0: 24 bytes per thread, 1: the same behind loads and stores
MQ_KERNEL(kMostThreads) moves(const __grid_constant__ Arguments a) {
  const int64_t n = static_cast<int64_t>(gridDim.x) * blockDim.x, i = thread_of_grid();
  ptx::store_16(array<char>(a, 1) + 16 * i, ptx::load_16(array<char>(a, 0) + 16 * i));
  ptx::store_8(array<char>(a, 1) + 16 * n + 8 * i, ptx::load_8(array<char>(a, 0) + 16 * n + 8 * i));
}

// Three groups of copies, of 4, 8 and 16 bytes. arrays 0: uint32 [threads, 7], 1: uint32 [4, threads, 7]: shared memory
// before any wait and behind waits that leave 2, 1 and 0 groups.
MQ_KERNEL(kMostThreads) copies(const __grid_constant__ Arguments a) {
  const int64_t n = blockDim.x, t = threadIdx.x;
  auto* shared = reinterpret_cast<uint32_t*>(shared_memory());
  const uint32_t* in = array<uint32_t>(a, 0);
  for (int i = 0; i < 7; ++i) shared[i * n + t] = 5;
  __syncthreads();
  ptx::copy_async_4(shared + t, in + t);
  ptx::copy_async_commit();
  ptx::copy_async_8(shared + n + 2 * t, in + n + 2 * t);
  ptx::copy_async_commit();
  ptx::copy_async_16(shared + 3 * n + 4 * t, in + 3 * n + 4 * t);
  ptx::copy_async_commit();
  for (int state = 0; state < 4; ++state) {
    if (state == 1) ptx::copy_async_wait<2>();
    if (state == 2) ptx::copy_async_wait<1>();
    if (state == 3) ptx::copy_async_wait<0>();
    __syncthreads();
    for (int i = 0; i < 7; ++i) array<uint32_t>(a, 1)[(state * 7 + i) * n + t] = shared[i * n + t];
    __syncthreads();
  }
}

// What a cluster can do, for nvcc.
MQ_KERNEL(kMostThreads) cluster(const __grid_constant__ Arguments a) {
  auto* shared = reinterpret_cast<double*>(shared_memory());
  auto* small = reinterpret_cast<float*>(shared + blockDim.x);
  auto* word = reinterpret_cast<uint32_t*>(small + blockDim.x);
  const unsigned rank = ptx::cluster_rank(), size = ptx::cluster_size();
  ptx::store_cluster(shared + threadIdx.x, (rank + 1) % size, 1.0 + rank);
  ptx::store_cluster(small + threadIdx.x, (rank + 1) % size, 2.0f);
  ptx::store_cluster(word + threadIdx.x, (rank + 1) % size, 3u);
  ptx::cluster_arrive();
  ptx::cluster_wait();
  __syncthreads();  // for a single CTA
  array<double>(a, 0)[thread_of_grid()] = ptx::load_cluster(shared + threadIdx.x, rank) +
                                          ptx::load_cluster(small + threadIdx.x, rank) +
                                          ptx::load_cluster(word + threadIdx.x, rank);
  ptx::cluster_sync();
}

#if defined(__CUDACC__)

void run_product(const Arguments& a) {
  launch("product", &product, {1, 32, 1, 2 * kTileBytes}, nullptr, a);
}

#else

namespace {

const Check kChecks[] = {
    {"product", &product}, {"packs", &packs}, {"moves", &moves}, {"copies", &copies}, {"cluster", &cluster}};

}  // namespace

bool run_ptx_check(const std::string& name, const emulation::Grid& at, const Arguments& a) {
  return run_one_of(kChecks, name, at, a);
}

#endif

}  // namespace marquardt::checks
