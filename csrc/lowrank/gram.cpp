#include "lowrank/gram.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "core/parallel.h"
#include "frame/frame.h"
#include "lowrank/buffer.h"

namespace marquardt {

const LowrankKernels& lowrank_kernels() {
#if defined(__x86_64__)
  static const LowrankKernels& best = []() -> const LowrankKernels& {
    if (std::strcmp(frame_cpu_isa(), "avx512") == 0) return avx512::lowrank_kernels;
    if (std::strcmp(frame_cpu_isa(), "avx2") == 0) return avx2::lowrank_kernels;
    return baseline::lowrank_kernels;
  }();
  return best;
#else
  return baseline::lowrank_kernels;
#endif
}

template <>
const TypedLowrankKernels<float>& typed_lowrank_kernels<float>() {
  return lowrank_kernels().f32;
}

template <>
const TypedLowrankKernels<double>& typed_lowrank_kernels<double>() {
  return lowrank_kernels().f64;
}

namespace {

// Rows are cut into this many ranges at most, each with sums of its own, merged in their order. The number depends on
// shapes alone, so that results do not depend on the number of threads; more threads than ranges share tiles.
constexpr int64_t kMostRanges = 16;
constexpr int64_t kRangeBytes = 512 << 10;  // of the sums of all ranges, beyond the first two
constexpr int64_t kRowsPerRange = 4 * kProductRows;
// Up to so many products, some milliseconds, they are taken in double: the roundings of few rows do not average out.
constexpr int64_t kExactProducts = 1 << 27;

constexpr int64_t up(int64_t n, int64_t to) {
  return (n + to - 1) / to * to;
}

}  // namespace

// The columns of the packed rows are those of x, zeros up to `x_padded`, those of g, zeros up to `stride`. Tiles cover
// the lower triangle of xᵀx, in steps of a tile's height, and all of gᵀx. The columns of x behind its last whole vector
// stand to the left of tiles, against vectors of g, where that is less work than the other way about.
struct GramPair::Plan {
  Rows x, g;
  int64_t rows, ranges, x_padded, g_padded, stride, sums_each = 0;
  int width = 0, height = 0, vectors = 0;
  std::vector<ProductTile> tiles;
  Buffer<double> sums;  // [ranges, sums_each]; products of the same columns stand in one tile alone

  template <class T>
  void prepare() {
    const TypedLowrankKernels<T>& kernels = typed_lowrank_kernels<T>();
    width = kernels.width, height = kernels.height, vectors = kernels.vectors;
    const int64_t pad = kPadBytes / static_cast<int64_t>(sizeof(T));
    x_padded = up(x.columns, pad), g_padded = up(g.columns, pad);
    // An odd number of cache lines a row: neighbouring rows then fall into different sets of the caches.
    stride = ((x_padded + g_padded) / pad | 1) * pad;
    const int64_t tail = x.columns % width, whole = x.columns - tail, of_g = up(g.columns, width);
    const bool tail_left = tail * of_g < g.columns * width;
    for (int64_t c = 0; c < whole; c += height)
      add_tiles(c, std::min(c + height, whole), 0, std::min(c + height, whole));
    add_tiles(whole, x.columns, 0, x.columns);
    add_tiles(x_padded, x_padded + g.columns, 0, tail_left ? whole : x.columns);
    if (tail_left) add_tiles(whole, x.columns, x_padded, x_padded + g.columns);
    const int64_t bytes = std::max<int64_t>(sums_each * 8, 1);
    ranges = std::clamp(kRangeBytes / bytes, int64_t{2}, kMostRanges);
    ranges = std::clamp((rows + kRowsPerRange - 1) / kRowsPerRange, int64_t{1}, ranges);
  }

  // Columns [left, left_end) against [right, right_end), in blocks of nearly equal height.
  void add_tiles(int64_t left, int64_t left_end, int64_t right, int64_t right_end) {
    const int64_t columns = left_end - left, blocks = (columns + height - 1) / height;
    const int64_t all = (right_end - right + width - 1) / width;
    for (int64_t k = 0; k < blocks; ++k) {
      const int64_t begin = columns * k / blocks, end = columns * (k + 1) / blocks;
      for (int64_t v = 0; v < all; v += vectors) {
        const int n = static_cast<int>(std::min<int64_t>(vectors, all - v));
        tiles.push_back({left + begin, right + v * width, sums_each, static_cast<int>(end - begin), n});
        sums_each += (end - begin) * n * width;
      }
    }
  }

  // One range of rows for the tiles [first, last).
  template <class T>
  void run_range(int64_t range, size_t first, size_t last, T* packed) {
    const TypedLowrankKernels<T>& kernels = typed_lowrank_kernels<T>();
    const int64_t chunks = (rows + kProductRows - 1) / kProductRows;
    const int64_t begin = chunks * range / ranges * kProductRows;
    const int64_t end = std::min(chunks * (range + 1) / ranges * kProductRows, rows);
    double* to = sums.get() + range * sums_each;
    for (int64_t r = begin; r < end; r += kProductRows) {
      const int64_t n = std::min(kProductRows, end - r);
      pack(kernels, x, r, n, x_padded, packed);
      pack(kernels, g, r, n, g_padded, packed + x_padded);
      Ahead ahead;
      add_ahead(x, r + n, std::min(kProductRows, end - r - n), 0, ahead);
      add_ahead(g, r + n, std::min(kProductRows, end - r - n), 1, ahead);
      kernels.products(tiles.data() + first, static_cast<int64_t>(last - first), packed, stride, n, to, ahead);
    }
  }

  // Rows that lie behind one another; others are fetched when they are needed.
  static void add_ahead(const Rows& from, int64_t r, int64_t n, int i, Ahead& ahead) {
    if (n <= 0 || from.stride != from.columns) return;
    ahead.from[i] = static_cast<const char*>(from.data) + r * from.stride * size_of(from.dtype);
    ahead.bytes[i] = n * from.stride * size_of(from.dtype);
  }

  template <class T>
  void pack(const TypedLowrankKernels<T>& kernels, const Rows& from, int64_t r, int64_t n, int64_t padded,
            T* to) const {
    const char* row = static_cast<const char*>(from.data) + r * from.stride * size_of(from.dtype);
    kernels.pack(from.dtype, row, from.stride, n, from.columns, padded, to, stride);
  }

  template <class T>
  void run() {
    sums = allocate<double>(ranges * sums_each);
    std::memset(sums.get(), 0, static_cast<size_t>(ranges * sums_each) * sizeof(double));
    const int64_t threads = rows * stride < 1 << 16 ? 1 : thread_count();
    const int64_t groups = std::clamp((threads + ranges - 1) / ranges, int64_t{1}, static_cast<int64_t>(tiles.size()));
    const std::vector<size_t> cut = cut_tiles(groups);
    parallel_for(ranges * groups, threads > 1, [&](int64_t begin, int64_t end) {
      const Buffer<T> packed = allocate<T>(kProductRows * stride);
      for (int64_t k = begin; k < end; ++k) {
        const auto group = static_cast<size_t>(k % groups);
        run_range<T>(k / groups, cut[group], cut[group + 1], packed.get());
      }
    });
  }

  // Groups of neighbouring tiles with nearly equal work.
  std::vector<size_t> cut_tiles(int64_t groups) const {
    std::vector<size_t> cut;
    for (size_t t = 0; t < tiles.size(); ++t)
      while (static_cast<int64_t>(cut.size()) < groups &&
             tiles[t].sums * groups >= sums_each * static_cast<int64_t>(cut.size()))
        cut.push_back(t);
    while (static_cast<int64_t>(cut.size()) <= groups) cut.push_back(tiles.size());
    return cut;
  }
};

GramPair::GramPair(const Rows& x, const Rows& g, int64_t rows) : plan_(new Plan{}) {
  plan_->x = x, plan_->g = g, plan_->rows = rows;
}

GramPair::~GramPair() {
  delete plan_;
}

void GramPair::run() {
  if (plan_->x.columns == 0) return;
  const Plan& p = *plan_;
  const int64_t products = p.rows * p.x.columns * (p.x.columns + 2 * p.g.columns) / 2;
  if (p.x.dtype == DType::f64 || products <= kExactProducts) {
    plan_->prepare<double>();
    plan_->run<double>();
  } else {
    plan_->prepare<float>();
    plan_->run<float>();
  }
}

void GramPair::write(double* gram, double* cross) const {
  const Plan& p = *plan_;
  const int64_t i = p.x.columns, g_begin = p.x_padded, g_end = p.x_padded + p.g.columns;
  for (const ProductTile& t : p.tiles) {
    const int64_t columns = static_cast<int64_t>(t.vectors) * p.width;
    for (int64_t m = 0; m < t.height; ++m)
      for (int64_t j = 0; j < columns; ++j) {
        double sum = 0.0;
        for (int64_t range = 0; range < p.ranges; ++range)
          sum += p.sums[range * p.sums_each + t.sums + m * columns + j];
        const int64_t a = t.left + m, b = t.right + j;
        if (a >= g_begin) {
          if (b < i) cross[(a - g_begin) * i + b] = sum;
        } else if (b >= g_begin) {
          if (b < g_end) cross[(b - g_begin) * i + a] = sum;
        } else if (b <= a) {
          gram[a * i + b] = gram[b * i + a] = sum;
        }
      }
  }
}

}  // namespace marquardt
