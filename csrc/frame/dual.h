// Forward-mode numbers: a value and its derivatives with respect to N inputs. The scalar maps of the engine are
// written once for any number type, and differentiate themselves through this one.
#pragma once

#include <cmath>

#include "core/macros.h"

// A map runs in one thread and works on memory that it is given; inlined on the GPU, it needs no stack.
#if defined(__CUDACC__)
#define MQ_MAP __host__ __device__ __forceinline__
#else
#define MQ_MAP inline
#endif

namespace marquardt {

template <int N>
struct Dual {
  double v;
  double d[N];

  MQ_MAP Dual(double value = 0.0) : v(value) {
    for (int i = 0; i < N; ++i) d[i] = 0.0;
  }
  // The i-th input itself.
  MQ_MAP static Dual input(double value, int i) {
    Dual x(value);
    x.d[i] = 1.0;
    return x;
  }
};

template <int N>
MQ_MAP Dual<N> operator+(Dual<N> a, const Dual<N>& b) {
  a.v += b.v;
  for (int i = 0; i < N; ++i) a.d[i] += b.d[i];
  return a;
}

template <int N>
MQ_MAP Dual<N> operator-(Dual<N> a, const Dual<N>& b) {
  a.v -= b.v;
  for (int i = 0; i < N; ++i) a.d[i] -= b.d[i];
  return a;
}

template <int N>
MQ_MAP Dual<N> operator*(const Dual<N>& a, const Dual<N>& b) {
  Dual<N> c(a.v * b.v);
  for (int i = 0; i < N; ++i) c.d[i] = a.d[i] * b.v + a.v * b.d[i];
  return c;
}

template <int N>
MQ_MAP Dual<N> operator/(const Dual<N>& a, const Dual<N>& b) {
  Dual<N> c(a.v / b.v);
  for (int i = 0; i < N; ++i) c.d[i] = (a.d[i] - c.v * b.d[i]) / b.v;
  return c;
}

template <int N>
MQ_MAP Dual<N> operator-(const Dual<N>& a) {
  return Dual<N>(0.0) - a;
}

template <int N>
MQ_MAP Dual<N> square_root(const Dual<N>& a) {
  Dual<N> c(std::sqrt(a.v));
  for (int i = 0; i < N; ++i) c.d[i] = a.d[i] / (2.0 * c.v);
  return c;
}

template <int N>
MQ_MAP double value(const Dual<N>& a) {
  return a.v;
}

MQ_MAP double square_root(double a) {
  return std::sqrt(a);
}
MQ_MAP double value(double a) {
  return a;
}

}  // namespace marquardt
