// The scalar maps: what makes a frame call an op. A few numbers in, a few numbers out, in double, for host and
// device alike. triton_kernels/maps.py has the same maps; tests prove them equal.
//
// To add an op: an id in frame.h, a `*_map` here, its line in `gram_rows` and `frame_map`.
#pragma once

#include <cmath>

#include "frame/dual.h"
#include "frame/frame.h"

namespace marquardt {

// --- lm_direction ----------------------------------------------------------------------------------------------
//
// Rows ε and r = p − ε; n = ⟨ε,ε⟩, e = ⟨ε,r⟩, R = ⟨r,r⟩.

enum LmMode : int { kKeepNorm = 0, kPlain = 1, kExtrapolate = 2 };

// out = c0·ε + c1·r. Pt − Et is formed as κR + e, never as the difference of the two inner products, which would
// lose six digits at correlation 0.999999.
template <class S>
MQ_HOST_DEVICE inline void lm_coefficients(int mode, S n, S e, S R, S first, S second, S& c0, S& c1) {
  S G = n * R - e * e;  // Gram determinant, ≥ 0 up to rounding
  if (value(G) < 0.0) G = S(0.0);
  c0 = c1 = S(0.0);
  if (value(n) == 0.0) return;  // eps = 0

  if (mode == kExtrapolate) {
    const S gamma = first;
    const S scale = S(1.0) / square_root(S(1.0) + gamma * gamma * G / (n * n));
    c0 = scale * (S(1.0) + gamma * e / n);
    c1 = -(gamma * scale);
    return;
  }
  const S lambda = first, kappa = second;
  const S Et = n + kappa * e;                                                    // ⟨ε, ε̃⟩
  const S m = n + S(2.0) * kappa * e + kappa * kappa * R;                        // ⟨ε̃, ε̃⟩
  const S a = lambda + kappa * (kappa * R + e), b = kappa * Et;                  // d = a·ε − b·r
  const S dd = lambda * lambda * n + kappa * kappa * G * (S(2.0) * lambda + m);  // ⟨d, d⟩
  if (value(dd) == 0.0) {  // λ = 0 and prev ∥ eps: u = 0, and the direction is eps
    c0 = S(mode == kPlain ? 0.0 : 1.0);
    return;
  }
  if (mode == kPlain) {
    c0 = a / (lambda + m);
    c1 = -(b / (lambda + m));
    return;
  }
  const S scale = square_root(n / dd);
  c0 = scale * a;
  c1 = -(scale * b);
}

MQ_HOST_DEVICE inline int lm_parameters(int mode) {
  return mode == kExtrapolate ? 1 : 2;
}

// κ (or γ) is what brings prev in: the last parameter.
MQ_HOST_DEVICE inline bool lm_reads_prev(int mode, const double* p) {
  return p[lm_parameters(mode) - 1] != 0.0;
}

// Rows (ε, r) -> out.
MQ_HOST_DEVICE inline void lm_map(int mode, const double* gram, const double* p, FrameMap& map) {
  const bool mixes = lm_reads_prev(mode, p);
  double c0 = 1.0, c1 = 0.0;
  if (mixes || mode == kPlain) {
    lm_coefficients(mode, gram[0], gram[1], gram[2], p[0], mode == kExtrapolate ? 0.0 : p[1], c0, c1);
  }
  map.c[0][0] = c0;
  map.c[0][1] = c1;
  map.used = mixes ? 3u : 1u;
}

// The five inputs of lm_coefficients as duals, c0 and c1 with their derivatives.
struct LmDerivatives {
  Dual<5> c0, c1;  // d/d(n, e, R, first, second)
};

MQ_HOST_DEVICE inline LmDerivatives lm_derivatives(int mode, double n, double e, double R, const double* p) {
  using D = Dual<5>;
  LmDerivatives out;
  const double second = mode == kExtrapolate ? 0.0 : p[1];
  lm_coefficients(mode, D::input(n, 0), D::input(e, 1), D::input(R, 2), D::input(p[0], 3), D::input(second, 4), out.c0,
                  out.c1);
  return out;
}

// Rows (ε, r, g) -> (d_eps, d_prev), scalars d_parameters. With F = c0⟨g,ε⟩ + c1⟨g,r⟩:
// r̄ = c1 g + F_e ε + 2F_R r = d_prev;  d_eps = c0 g + 2F_n ε + F_e r − r̄.
MQ_HOST_DEVICE inline void lm_backward_map(int mode, const double* gram, const double* p, FrameMap& map, double* d_p) {
  // At κ = 0 prev may hold anything: only the derivative of κ itself looks at it.
  const bool reads = lm_reads_prev(mode, p);
  const int last = lm_parameters(mode) - 1;
  const double n = gram[0], ge = gram[3];
  const double e = reads ? gram[1] : 0.0, R = reads ? gram[2] : 0.0, gr = reads ? gram[4] : 0.0;
  const LmDerivatives c = lm_derivatives(mode, n, e, R, p);
  double F[5];
  for (int i = 0; i < 5; ++i) F[i] = c.c0.d[i] * ge + c.c1.d[i] * gr;
  for (int i = 0; i <= last; ++i) d_p[i] = F[3 + i];
  if (!reads) {
    const LmDerivatives full = lm_derivatives(mode, n, gram[1], gram[2], p);
    d_p[last] = full.c0.d[3 + last] * ge + full.c1.d[3 + last] * gram[4];
  }

  if (!reads && mode != kPlain) {  // the identity: prev must not be touched
    map.c[0][0] = map.c[0][1] = 0.0;
    map.c[0][2] = n == 0.0 ? 0.0 : 1.0;
    map.used = 4u;
    map.zero = 2u;  // d_prev
    return;
  }
  map.c[0][0] = 2.0 * F[0] - F[1];
  map.c[0][1] = F[1] - 2.0 * F[2];
  map.c[0][2] = c.c0.v - c.c1.v;
  map.c[1][0] = F[1];
  map.c[1][1] = 2.0 * F[2];
  map.c[1][2] = c.c1.v;
  map.used = 7u;
  if (!reads) {  // κ = 0 without renormalisation: out = λ/(λ+n)·ε
    map.c[0][0] = 2.0 * F[0];
    map.c[0][1] = 0.0;
    map.c[0][2] = c.c0.v;
    map.used = 5u;
    map.zero = 2u;
  }
}

// Rows (ε, r, ε', r') -> out' with ṅ = 2⟨ε,ε'⟩, ė = ⟨ε',r⟩ + ⟨ε,r'⟩, Ṙ = 2⟨r,r'⟩; p = (parameters, tangents).
MQ_HOST_DEVICE inline void lm_jvp_map(int mode, const double* dot, const double* p, FrameMap& map) {
  const int m = lm_parameters(mode);
  const bool reads = lm_reads_prev(mode, p) || p[2 * m - 1] != 0.0;  // a tangent of κ brings prev in even at κ = 0
  const double e = reads ? dot[1] : 0.0, R = reads ? dot[2] : 0.0;
  const LmDerivatives c = lm_derivatives(mode, dot[0], e, R, p);
  const double tangent[5] = {dot[3], reads ? dot[4] : 0.0, reads ? dot[5] : 0.0, p[m], m == 2 ? p[m + 1] : 0.0};
  double t0 = 0.0, t1 = 0.0;
  for (int i = 0; i < 5; ++i) {
    t0 += c.c0.d[i] * tangent[i];
    t1 += c.c1.d[i] * tangent[i];
  }
  map.c[0][0] = t0;
  map.c[0][1] = t1;
  map.c[0][2] = c.c0.v;
  map.c[0][3] = c.c1.v;
  map.used = 15u;
  if (!reads) {
    map.c[0][1] = map.c[0][3] = 0.0;
    map.used = 5u;
    if (mode != kPlain) {
      map.c[0][0] = 0.0;
      map.c[0][2] = dot[0] == 0.0 ? 0.0 : 1.0;
      map.used = 4u;
    }
  }
}

// --- the switch ------------------------------------------------------------------------------------------------

// Rows whose Gram the op needs for a sample with these parameters (bit j: row j); 0: no Gram at all.
MQ_HOST_DEVICE inline uint32_t gram_rows(const FrameCall& call, const double* p) {
  const uint32_t all = (1u << call.rows) - 1u;
  switch (call.op) {
    case FrameOp::lm_direction:
      if (call.rows > 1 && lm_reads_prev(call.mode, p)) return 3u;
      return call.mode == kPlain ? 1u : 0u;
    case FrameOp::lm_direction_backward:
    case FrameOp::lm_direction_jvp: return all;
    default: return call.gram == GramKind::none ? 0u : all;
  }
}

// `gram` is packed as call.gram says; entries of rows outside `gram_rows` are 0.
MQ_HOST_DEVICE inline void frame_map(const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                                     double* scalars) {
  map.zero = 0u;
  switch (call.op) {
    case FrameOp::given:
      for (int i = 0; i < call.outputs; ++i)
        for (int j = 0; j < call.rows; ++j) map.c[i][j] = p[i * call.rows + j];
      map.used = (1u << call.rows) - 1u;
      if (scalars != nullptr) {  // the Gram itself, square
        for (int i = 0; i < call.rows; ++i)
          for (int j = 0; j <= i; ++j)
            scalars[i * call.rows + j] = scalars[j * call.rows + i] = gram[i * (i + 1) / 2 + j];
      }
      return;
    case FrameOp::lm_direction: lm_map(call.mode, gram, p, map); return;
    case FrameOp::lm_direction_backward: {
      const double g[5] = {gram[0], gram[1], gram[2], gram[3], gram[4]};
      lm_backward_map(call.mode, g, p, map, scalars);
      return;
    }
    case FrameOp::lm_direction_jvp: {
      const double g[6] = {gram[0], gram[1], gram[2], 2.0 * gram[3], gram[4] + gram[6], 2.0 * gram[7]};
      lm_jvp_map(call.mode, g, p, map);
      return;
    }
    case FrameOp::affine:
      for (int j = 0; j < call.rows; ++j) map.c[0][j] = p[j];
      map.used = (1u << call.rows) - 1u;
      return;
    case FrameOp::affine_backward:
      for (int i = 0; i < call.outputs; ++i) map.c[i][0] = p[i];
      map.used = 1u;
      if (scalars != nullptr)
        for (int j = 1; j < call.rows; ++j) scalars[j - 1] = gram[j - 1];
      return;
  }
}

// Whether float32 products lost what this sample needs: squares out of range, or a determinant of nearly parallel
// vectors. The engine then takes the Gram again with products in double.
MQ_HOST_DEVICE inline bool wants_exact_gram(const FrameCall& call, const double* gram, uint32_t rows) {
  switch (call.op) {
    case FrameOp::lm_direction:
    case FrameOp::lm_direction_backward:
    case FrameOp::lm_direction_jvp: {
      const double n = gram[0], e = gram[1], R = gram[2];
      const double tiny = 1e-30 * static_cast<double>(call.size), huge = 1e37;
      if (!(n > tiny) || !(n < huge)) return true;
      return rows != 1u && (!(R < huge) || (R < tiny && R != 0.0) || n * R - e * e < 1e-2 * n * R);
    }
    default: return false;
  }
}

}  // namespace marquardt
