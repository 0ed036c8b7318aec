// Matrix instructions of one warp (sm_80): all lanes take part, and each holds a few elements, its fragment. Included by
// core/ptx.h.
//
// With g = lane / 4, t = lane % 4, and two 16-bit numbers in a word, the lower column (for B: row) in the lower half:
//   D, 16 × 8 float:    d[0], d[1] = D(g, 2t), D(g, 2t + 1);        d[2], d[3] = D(g + 8, 2t), D(g + 8, 2t + 1)
//   A, 16 × 16 16-bit:  a[0] = A(g, 2t …);  a[1] = A(g + 8, 2t …);  a[2] = A(g, 2t + 8 …);  a[3] = A(g + 8, 2t + 8 …)
//   B, 16 × 8 16-bit:   b[0] = B(2t …, g);  b[1] = B(2t + 8 …, g)
//   A, 16 × 8 tf32:     a[0] = A(g, t);     a[1] = A(g + 8, t);     a[2] = A(g, t + 4);     a[3] = A(g + 8, t + 4)
//   B, 8 × 8 tf32:      b[0] = B(t, g);     b[1] = B(t + 4, g)
// ldmatrix reads 8 × 8 matrices of 16-bit numbers from shared memory: lanes 8i … 8i + 7 give the addresses of the rows,
// 16 bytes each and aligned to that, of matrix i; r[i] = M_i(g, 2t …), or with _trans M_i(2t …, g) in both halves' order.
// So A lies in memory by rows: ldmatrix_x4 with the matrices (0, 0), (8, 0), (0, 8), (8, 8) makes a; B by rows:
// ldmatrix_x2_trans with (0, 0), (8, 0) makes b.
#pragma once

#if !defined(__CUDACC__)
#include "emulation/ptx_matrix.h"
#else

namespace marquardt::ptx {

__device__ inline void ldmatrix_x1(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x1_trans(uint32_t (&r)[1], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x2_trans(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
__device__ inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d += a·b, products exact, sums in float.
__device__ inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
__device__ inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// The words are those of floats, of which the last 13 bits are not read.
__device__ inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// A float as tf32, to nearest, halves away from zero.
__device__ inline uint32_t tf32_of(float x) {
  uint32_t word;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(word) : "f"(x));
  return word;
}

}  // namespace marquardt::ptx

#endif
