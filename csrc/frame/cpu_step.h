// The rows of a sampler step made in registers: a sweep for their Gram, another for the outputs. See cpu_kernels.h;
// included once per instruction set.
#pragma once

#include "frame/cpu_apply.h"

namespace marquardt::MQ_ISA {

// N terms of one vector of elements, the second a residual if Pair.
template <int N, bool Pair, class T>
MQ_INLINE void load_terms(const T* const* rows, int64_t at, Vec<T>* s) {
#pragma GCC unroll 8
  for (int j = 0; j < N; ++j) s[j] = load(rows[j] + at);
  if constexpr (Pair) s[1] -= s[0];
}

// Σ_j c_j s_j.
template <int N, class T>
MQ_INLINE T combination(const T* c, const T* s) {
  T sum = c[0] * s[0];
#pragma GCC unroll 8
  for (int j = 1; j < N; ++j) sum = fma(c[j], s[j], sum);
  return sum;
}

template <class T, int E, bool Pair>
void step_gram_of(const StepTerms<T>& terms, int64_t begin, int64_t n, double (*acc)[kLanes]) {
  constexpr int kUnroll = 4, kStep = kWidth<T>;
  Vec<T> d[E], sum[kUnroll][3] = {};
  const T* rows[E + 1];
  for (int j = 0; j < E; ++j) d[j] = broadcast(terms.d[j]), rows[j] = terms.row[j] + begin;
  rows[E] = terms.prev + begin;
  const auto add = [&](const T* const* from, int64_t at, Vec<T>* to) {
    Vec<T> s[E];
    load_terms<E, Pair>(from, at, s);
    const Vec<T> e = combination<E>(d, s), r = load(from[E] + at) - e;
    to[0] = fma(e, e, to[0]);
    to[1] = fma(e, r, to[1]);
    to[2] = fma(r, r, to[2]);
  };
  int64_t i = 0;
  for (; i + kUnroll * kStep <= n; i += kUnroll * kStep) {
    prefetch_rows<E + 1, kUnroll * kBytes>(rows, i);
#pragma GCC unroll 4
    for (int u = 0; u < kUnroll; ++u) add(rows, i + u * kStep, sum[u]);
  }
  for (; i + kStep <= n; i += kStep) add(rows, i, sum[0]);
  if (i < n) {
    const Tail<T, E + 1> tail(rows, E + 1, i, n - i);
    add(tail.rows, 0, sum[0]);
  }
  for (int entry = 0; entry < 3; ++entry) {
    Vec<T> total = sum[0][entry];
    for (int u = 1; u < kUnroll; ++u) total += sum[u][entry];
    add_lanes(total, acc[entry]);
  }
}

template <class T>
void step_gram(const StepTerms<T>& terms, int64_t n, double (*acc)[kLanes]) {
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t part = n - begin < kChunk ? n - begin : kChunk;
    switch (terms.in_direction + (terms.pair ? 10 : 0)) {
      case 1: step_gram_of<T, 1, false>(terms, begin, part, acc); break;
      case 2: step_gram_of<T, 2, false>(terms, begin, part, acc); break;
      case 3: step_gram_of<T, 3, false>(terms, begin, part, acc); break;
      case 12: step_gram_of<T, 2, true>(terms, begin, part, acc); break;
      default: step_gram_of<T, 3, true>(terms, begin, part, acc);
    }
  }
}

// N terms, E of them in the direction.
template <class T, int N, int E, bool Pair, bool Direction>
void step_apply_of(const StepTerms<T>& terms, T c0, T c1, T* out, T* copy, T* direction, int64_t n, bool streaming) {
  constexpr int kStep = kWidth<T>;
  Vec<T> a[N], d[E];
  const T* rows[N + 1];
  for (int j = 0; j < N; ++j) a[j] = broadcast(terms.a[j]), rows[j] = terms.row[j];
  for (int j = 0; j < E; ++j) d[j] = broadcast(terms.d[j]);
  rows[N] = terms.prev;
  const Vec<T> on_e = broadcast(c0), on_r = broadcast(c1);
  const auto combine = [&](const T* const* from, int64_t at, Vec<T>& e) {
    Vec<T> s[N];
    load_terms<N, Pair>(from, at, s);
    e = combination<E>(d, s);
    const Vec<T> r = load(from[N] + at) - e;
    return fma(on_r, r, fma(on_e, e, combination<N>(a, s)));
  };
  const auto part = [&](int64_t at, int64_t count) {
    if (count <= 0) return;
    const Tail<T, N + 1> tail(rows, N + 1, at, count);
    Vec<T> e;
    const Vec<T> x = combine(tail.rows, 0, e);
    for (int i = 0; i < count; ++i) {
      out[at + i] = x[i];
      if (copy != nullptr) copy[at + i] = x[i];
      if constexpr (Direction) direction[at + i] = e[i];
    }
  };
  const auto misaligned = [](const T* to) {
    return static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % static_cast<unsigned>(kBytes));
  };
  int64_t i = 0;
  if (streaming) {
    const int64_t off = misaligned(out), head = off == 0 ? 0 : (kBytes - off) / static_cast<int64_t>(sizeof(T));
    i = head < n ? head : n;
    part(0, i);
    streaming = misaligned(out + i) == 0 && (copy == nullptr || misaligned(copy + i) == 0);
    if constexpr (Direction) streaming = streaming && misaligned(direction + i) == 0;
  }
  const auto sweep = [&](auto put) {
    for (; i + kStep <= n; i += kStep) {
      prefetch_rows<N + 1, kBytes>(rows, i);
      Vec<T> e;
      const Vec<T> x = combine(rows, i, e);
      put(out + i, x);
      if (copy != nullptr) put(copy + i, x);
      if constexpr (Direction) put(direction + i, e);
    }
  };
  if (streaming) {
    sweep([](T* to, Vec<T> v) { stream(to, v); });
  } else {
    sweep([](T* to, Vec<T> v) { store(to, v); });
  }
  part(i, n - i);
}

template <class T, int N, int E>
bool step_apply_terms(const StepTerms<T>& terms, T c0, T c1, T* out, T* copy, T* direction, int64_t n, bool streaming) {
  const auto run = [&](auto pair) {
    constexpr bool kPair = decltype(pair)::value != 0;
    if (direction != nullptr) {
      step_apply_of<T, N, E, kPair, true>(terms, c0, c1, out, copy, direction, n, streaming);
    } else {
      step_apply_of<T, N, E, kPair, false>(terms, c0, c1, out, copy, direction, n, streaming);
    }
  };
  if constexpr (E > 1) {
    if (terms.pair) {
      run(Count<1>{});
      return true;
    }
  }
  if (terms.pair) return false;
  run(Count<0>{});
  return true;
}

// The numbers of terms that samplers have: outputs of one model or of two (guidance), their history, the sample, noise.
template <class T>
bool step_apply(const StepTerms<T>& terms, T c0, T c1, T* out, T* copy, T* direction, int64_t n, bool streaming) {
  static_assert(kStepTerms == 5 && kDirectionTerms == 3);
  switch (terms.count * 10 + terms.in_direction) {
    case 11: return step_apply_terms<T, 1, 1>(terms, c0, c1, out, copy, direction, n, streaming);
    case 21: return step_apply_terms<T, 2, 1>(terms, c0, c1, out, copy, direction, n, streaming);
    case 22: return step_apply_terms<T, 2, 2>(terms, c0, c1, out, copy, direction, n, streaming);
    case 31: return step_apply_terms<T, 3, 1>(terms, c0, c1, out, copy, direction, n, streaming);
    case 32: return step_apply_terms<T, 3, 2>(terms, c0, c1, out, copy, direction, n, streaming);
    case 33: return step_apply_terms<T, 3, 3>(terms, c0, c1, out, copy, direction, n, streaming);
    case 42: return step_apply_terms<T, 4, 2>(terms, c0, c1, out, copy, direction, n, streaming);
    case 43: return step_apply_terms<T, 4, 3>(terms, c0, c1, out, copy, direction, n, streaming);
    case 53: return step_apply_terms<T, 5, 3>(terms, c0, c1, out, copy, direction, n, streaming);
    default: return false;
  }
}

}  // namespace marquardt::MQ_ISA
