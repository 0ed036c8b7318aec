// The loops of dynamic thresholding on the CPU, as a table of functions for one instruction set.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace marquardt {

// Keys that a sift may write beyond those it keeps.
constexpr int64_t kKeyPad = 16;

// What a pass found of a band low < high.
template <class K>
struct Sifted {
  int64_t over = 0;  // keys > low
  int64_t kept = 0;  // of them those < high
  K largest = 0;     // of all keys
};

// K: int32_t holds the keys of float32 and of the 16-bit types, int64_t those of float64. Keys are not negative.
template <class K>
struct TypedSelectKernels {
  // Adds n numbers to `found` and writes the keys between low and high behind one another to `kept`, which has room for
  // n + kKeyPad. The largest K as `high` stands for no bound.
  void (*sift)(DType dtype, const void* from, int64_t n, K low, K high, K* kept, Sifted<K>& found);
  int64_t (*count_below)(DType dtype, const void* from, int64_t n, K key);  // keys < key
  K (*largest)(DType dtype, const void* from, int64_t n);
};

struct SelectKernels {
  TypedSelectKernels<int32_t> narrow;
  TypedSelectKernels<int64_t> wide;
  // out = clamp(x/s, −1, 1), NaN stays NaN. `streaming` writes past the caches.
  void (*rescale_f32)(const float* x, float s, float* out, int64_t n, bool streaming);
  void (*rescale_f64)(const double* x, double s, double* out, int64_t n, bool streaming);
};

namespace avx512 {
extern const SelectKernels select_kernels;
}
namespace avx2 {
extern const SelectKernels select_kernels;
}
namespace baseline {
extern const SelectKernels select_kernels;
}

}  // namespace marquardt
