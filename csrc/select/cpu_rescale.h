// clamp(x/s, −1, 1). See cpu_kernels.h; included once per instruction set.
#pragma once

#include "core/simd.h"
#include "select/cpu_kernels.h"

namespace marquardt::MQ_ISA {

// NaN compares as false, and so stays.
template <class T>
MQ_INLINE Vec<T> to_unit(Vec<T> y) {
  const Vec<T> one = broadcast(T(1));
  y = y > one ? one : y;
  return y < -one ? -one : y;
}

template <class T>
MQ_INLINE T to_unit(T y) {
  return y > T(1) ? T(1) : y < T(-1) ? T(-1) : y;
}

// Unit: s = 1, which divides nothing.
template <class T, bool Unit>
void rescale_rows(const T* x, T s, T* out, int64_t n, bool streaming) {
  const Vec<T> scale = broadcast(s);
  int64_t i = 0;
  if (streaming) {
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % kBytes != 0; ++i)
      out[i] = to_unit<T>(Unit ? x[i] : x[i] / s);
    for (; i + kWidth<T> <= n; i += kWidth<T>) {
      const Vec<T> v = load(x + i);
      stream(out + i, to_unit<T>(Unit ? v : v / scale));
    }
  }
  for (; i + kWidth<T> <= n; i += kWidth<T>) {
    const Vec<T> v = load(x + i);
    store(out + i, to_unit<T>(Unit ? v : v / scale));
  }
  for (; i < n; ++i) out[i] = to_unit<T>(Unit ? x[i] : x[i] / s);
  if (streaming) stream_fence();
}

template <class T>
void rescale(const T* x, T s, T* out, int64_t n, bool streaming) {
  if (s == T(1)) return rescale_rows<T, true>(x, s, out, n, streaming);
  rescale_rows<T, false>(x, s, out, n, streaming);
}

}  // namespace marquardt::MQ_ISA
