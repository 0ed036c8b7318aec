// The functions of core/ptx_matrix.h on the CPU: lanes exchange their fragments, and each computes its own elements.
//
// Sums are double, rounded once. The hardware adds the products of an instruction in another order and cuts their last
// bits, so its results differ by a few units of float: tests that compare with emulated ones must allow for that.
#pragma once

#include "core/cuda.h"
#include "core/half.h"

namespace marquardt::ptx {

using emulation::Place;

constexpr uint32_t kAllLanes = 0xffffffffu;

template <int N>
inline void load_matrices(const char* what, uint32_t (&r)[N], const void* row, bool transposed, const Place& at) {
  const auto address = reinterpret_cast<uintptr_t>(row);
  const unsigned lane = emulation::current->lane, g = lane / 4, t = lane % 4;
  if (lane < 8 * N) emulation::check_aligned(row, 16, "ldmatrix of a row that is", at);
  const uint32_t mine[2] = {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)};
  uint32_t all[32 * 2];
  emulation::exchange(what, kAllLanes, mine, 2, all, at);
  for (unsigned i = 0; i < N; ++i) {
    const auto element = [&](unsigned row_of, unsigned column) {
      const uint32_t* words = all + 2 * (8 * i + row_of);
      const uintptr_t start = words[0] | static_cast<uintptr_t>(words[1]) << 32;
      return static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(start)[column]);
    };
    r[i] =
        transposed ? element(2 * t, g) | element(2 * t + 1, g) << 16 : element(g, 2 * t) | element(g, 2 * t + 1) << 16;
  }
}

inline void ldmatrix_x1(uint32_t (&r)[1], const void* row, Place at = Place::current()) {
  load_matrices("ldmatrix_x1", r, row, false, at);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, Place at = Place::current()) {
  load_matrices("ldmatrix_x2", r, row, false, at);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, Place at = Place::current()) {
  load_matrices("ldmatrix_x4", r, row, false, at);
}
inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row, Place at = Place::current()) {
  load_matrices("ldmatrix_x1_trans", r, row, true, at);
}
inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row, Place at = Place::current()) {
  load_matrices("ldmatrix_x2_trans", r, row, true, at);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, Place at = Place::current()) {
  load_matrices("ldmatrix_x4_trans", r, row, true, at);
}

// All fragments of A and B, by lane.
struct Fragments {
  uint32_t word[32][6];

  Fragments(const char* what, const uint32_t (&a)[4], const uint32_t (&b)[2], const Place& at) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    emulation::exchange(what, kAllLanes, mine, 6, &word[0][0], at);
  }
};

// d += A·B for this lane's elements, with A(row, k) and B(k, column) as double.
template <class A, class B>
inline void multiply(float (&d)[4], int depth, const A& a, const B& b) {
  const int g = static_cast<int>(emulation::current->lane / 4), t = static_cast<int>(emulation::current->lane % 4);
  for (int i = 0; i < 4; ++i) {
    double sum = static_cast<double>(d[i]);
    for (int k = 0; k < depth; ++k) sum += a(g + i / 2 * 8, k) * b(k, 2 * t + i % 2);
    d[i] = static_cast<float>(sum);
  }
}

template <class Half>
inline void multiply_halves(float (&d)[4], const Fragments& f, const Half& half) {
  const auto number = [&](uint32_t word, int k) {
    return static_cast<double>(half(static_cast<uint16_t>(k % 2 == 0 ? word : word >> 16)));
  };
  multiply(
      d, 16, [&](int row, int k) { return number(f.word[row % 8 * 4 + k % 8 / 2][row / 8 + 2 * (k / 8)], k); },
      [&](int k, int column) { return number(f.word[column * 4 + k % 8 / 2][4 + k / 8], k); });
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                              Place at = Place::current()) {
  multiply_halves(d, Fragments("mma_m16n8k16_bf16", a, b, at), [](uint16_t h) { return float_of_bf16(h); });
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Place at = Place::current()) {
  multiply_halves(d, Fragments("mma_m16n8k16_f16", a, b, at), [](uint16_t h) { return float_of_f16(h); });
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                             Place at = Place::current()) {
  const Fragments f("mma_m16n8k8_tf32", a, b, at);
  const auto number = [](uint32_t word) { return static_cast<double>(float_of_bits(word & 0xffffe000u)); };
  multiply(
      d, 8, [&](int row, int k) { return number(f.word[row % 8 * 4 + k % 4][row / 8 + 2 * (k / 4)]); },
      [&](int k, int column) { return number(f.word[column * 4 + k % 4][4 + k / 4]); });
}
inline uint32_t tf32_of(float x) {
  if (std::isnan(x)) return 0x7fffffffu;
  const uint32_t bits = bits_of_float(x);
  return std::isinf(x) ? bits : (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace marquardt::ptx
