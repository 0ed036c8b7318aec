// The scalar maps: what makes a frame call an op. A few numbers in, a few numbers out, in double, for host and
// device alike. triton_kernels/maps.py has the same maps; tests prove them equal.
//
// To add an op: an id in frame.h, a `*_map` here, its line in `gram_rows` and `frame_map`.
#pragma once

#include <cmath>
#include <limits>

#include "frame/dual.h"
#include "frame/frame.h"
#include "frame/lowrank_maps.h"
#include "frame/step.h"

namespace marquardt {

// --- lm_direction ----------------------------------------------------------------------------------------------
//
// Rows ε and r = p − ε; n = ⟨ε,ε⟩, e = ⟨ε,r⟩, R = ⟨r,r⟩.

enum LmMode : int { kKeepNorm = 0, kPlain = 1, kExtrapolate = 2 };

// out = c0·ε + c1·r. Pt − Et is formed as κR + e, never as the difference of the two inner products, which would
// lose six digits at correlation 0.999999.
template <class S>
MQ_MAP void lm_coefficients(int mode, S n, S e, S R, S first, S second, S& c0, S& c1) {
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
  if (!(value(lambda) >= 0.0)) {  // refused where the host knows it; a number of the device spoils its sample
    c0 = c1 = S(std::numeric_limits<double>::quiet_NaN());
    return;
  }
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

MQ_MAP int lm_parameters(int mode) {
  return mode == kExtrapolate ? 1 : 2;
}

// κ (or γ) is what brings prev in: the last parameter.
MQ_MAP bool lm_reads_prev(int mode, const double* p) {
  return p[lm_parameters(mode) - 1] != 0.0;
}

// Rows (ε, r) -> out.
MQ_MAP void lm_map(int mode, const double* gram, const double* p, FrameMap& map) {
  const bool mixes = lm_reads_prev(mode, p);
  double c0 = 1.0, c1 = 0.0;
  if (mixes || mode == kPlain) {
    // Without prev there is one row, and one entry.
    lm_coefficients(mode, gram[0], mixes ? gram[1] : 0.0, mixes ? gram[2] : 0.0, p[0],
                    mode == kExtrapolate ? 0.0 : p[1], c0, c1);
  }
  map.c[0][0] = c0;
  map.c[0][1] = c1;
  map.used = mixes ? 3u : 1u;
}

// c0 and c1 with their derivatives by the five inputs of lm_coefficients: n, e, R, first, second. They lie in the work
// space of the map, which is shared memory on a GPU.
struct LmDerivatives {
  static constexpr int kInputs = 5, kSize = 2 + 2 * kInputs;
  double* work;
  MQ_MAP double& c0() const { return work[0]; }
  MQ_MAP double& c1() const { return work[1]; }
  MQ_MAP double& c0(int input) const { return work[2 + input]; }
  MQ_MAP double& c1(int input) const { return work[2 + kInputs + input]; }
};

// By one input; input 0 leaves the values too.
MQ_MAP void lm_derivative(int mode, double n, double e, double R, const double* p, int input, LmDerivatives out) {
  using D = Dual<1>;
  const auto along = [input](double x, int i) {
    D number(x);
    number.d[0] = i == input ? 1.0 : 0.0;
    return number;
  };
  const double second = mode == kExtrapolate ? 0.0 : p[1];
  D c0, c1;
  lm_coefficients(mode, along(n, 0), along(e, 1), along(R, 2), along(p[0], 3), along(second, 4), c0, c1);
  if (input == 0) {
    out.c0() = c0.v;
    out.c1() = c1.v;
  }
  out.c0(input) = c0.d[0];
  out.c1(input) = c1.d[0];
}

// Whether the derivatives look at prev: forward mode does too where a tangent of κ brings it in at κ = 0.
MQ_MAP bool lm_derivatives_read_prev(FrameOp op, int mode, const double* p) {
  return lm_reads_prev(mode, p) || (op == FrameOp::lm_direction_jvp && p[2 * lm_parameters(mode) - 1] != 0.0);
}

// Rows (ε, r, g) -> (d_eps, d_prev), scalars d_parameters. With F = c0⟨g,ε⟩ + c1⟨g,r⟩:
// r̄ = c1 g + F_e ε + 2F_R r = d_prev;  d_eps = c0 g + 2F_n ε + F_e r − r̄.
MQ_MAP void lm_backward_map(int mode, const double* gram, const double* p, FrameMap& map, double* d_p) {
  // At κ = 0 prev may hold anything: only the derivative of κ itself looks at it.
  const bool reads = lm_reads_prev(mode, p);
  const int last = lm_parameters(mode) - 1;
  const double n = gram[0], ge = gram[3];
  const double gr = reads ? gram[4] : 0.0;
  const LmDerivatives c{map.work};
  const auto F = [&](int input) { return c.c0(input) * ge + c.c1(input) * gr; };
  if (d_p != nullptr) {
    for (int i = 0; i <= last; ++i) d_p[i] = F(3 + i);
    if (!reads) {
      const LmDerivatives full{map.work + LmDerivatives::kSize};
      d_p[last] = full.c0(3 + last) * ge + full.c1(3 + last) * gram[4];
    }
  }

  if (!reads && mode != kPlain) {  // the identity: prev must not be touched
    map.c[0][0] = map.c[0][1] = 0.0;
    map.c[0][2] = n == 0.0 ? 0.0 : 1.0;
    map.used = 4u;
    map.zero = 2u;  // d_prev
    return;
  }
  map.c[0][0] = 2.0 * F(0) - F(1);
  map.c[0][1] = F(1) - 2.0 * F(2);
  map.c[0][2] = c.c0() - c.c1();
  map.c[1][0] = F(1);
  map.c[1][1] = 2.0 * F(2);
  map.c[1][2] = c.c1();
  map.used = 7u;
  if (!reads) {  // κ = 0 without renormalisation: out = λ/(λ+n)·ε
    map.c[0][0] = 2.0 * F(0);
    map.c[0][1] = 0.0;
    map.c[0][2] = c.c0();
    map.used = 5u;
    map.zero = 2u;
  }
}

// Rows (ε, r, ε', r') -> out' with ṅ = 2⟨ε,ε'⟩, ė = ⟨ε',r⟩ + ⟨ε,r'⟩, Ṙ = 2⟨r,r'⟩; p = (parameters, tangents).
MQ_MAP void lm_jvp_map(int mode, const double* gram, const double* p, FrameMap& map) {
  const int m = lm_parameters(mode);
  const bool reads = lm_derivatives_read_prev(FrameOp::lm_direction_jvp, mode, p);
  const LmDerivatives c{map.work};
  const double tangent[5] = {2.0 * gram[3], reads ? gram[4] + gram[6] : 0.0, reads ? 2.0 * gram[7] : 0.0, p[m],
                             m == 2 ? p[m + 1] : 0.0};
  double t0 = 0.0, t1 = 0.0;
  for (int i = 0; i < 5; ++i) {
    t0 += c.c0(i) * tangent[i];
    t1 += c.c1(i) * tangent[i];
  }
  map.c[0][0] = t0;
  map.c[0][1] = t1;
  map.c[0][2] = c.c0();
  map.c[0][3] = c.c1();
  map.used = 15u;
  if (!reads) {
    map.c[0][1] = map.c[0][3] = 0.0;
    map.used = 5u;
    if (mode != kPlain) {
      map.c[0][0] = 0.0;
      map.c[0][2] = gram[0] == 0.0 ? 0.0 : 1.0;
      map.used = 4u;
    }
  }
}

// --- steps of samplers -----------------------------------------------------------------------------------------

// Rows (e, r, a, y) -> x' (once or twice), e, y. Gram entries n = ⟨e,e⟩, ⟨e,r⟩, ⟨r,r⟩.
MQ_MAP void step_map(const FrameCall& call, const double* gram, const double* p, FrameMap& map) {
  const StepShape shape = step_shape(call);
  double c0 = 0.0, c1 = 0.0;
  map.used = 4u;
  map.zero = 0u;
  map.wide = false;
  map.apart = true;
  if (step_reads_prev(call, shape, p)) {
    map.used = 7u;
    if (call.mode == kSnr) {  // h·e + √(2hT)·ξ with h = 2(r‖ξ‖/‖e‖)²; no direction, no step
      c0 = gram[0] == 0.0 ? 0.0 : 2.0 * p[0] * p[0] * gram[2] / gram[0];
      c1 = std::sqrt(2.0 * c0 * p[1]);
    } else {
      lm_coefficients(call.mode, gram[0], gram[1], gram[2], p[0], p[1], c0, c1);
      c0 *= p[2];
      c1 *= p[2];
      // So large a multiple of e or of r = p − e would show their rounding in x'.
      constexpr double kLarge = 2.0;
      map.wide = std::fmax(std::fabs(c0), std::fabs(c1)) > kLarge * std::fabs(p[2]);
    }
  }
  int i = 0;
  const auto put = [&](double on_e, double on_r, double on_a, double on_y) {
    map.c[i][0] = on_e;
    map.c[i][1] = on_r;
    map.c[i][2] = on_a;
    map.c[i][3] = on_y;
    ++i;
  };
  for (int copy = 0; copy < call.step_outputs; ++copy) put(c0, c1, 1.0, 0.0);
  if (call.step_direction) {
    put(1.0, 0.0, 0.0, 0.0);
    map.used |= 1u;
  }
  if (call.step_converted) {
    put(0.0, 0.0, 0.0, 1.0);
    map.used |= 8u;
  }
}

// --- the switch ------------------------------------------------------------------------------------------------

// Rows whose Gram the op needs for a sample with these parameters (bit j: row j); 0: no Gram at all.
MQ_MAP uint32_t gram_rows(const FrameCall& call, const double* p) {
  const uint32_t all = (1u << call.rows) - 1u;
  switch (call.op) {
    case FrameOp::lm_direction:
      if (call.rows > 1 && lm_reads_prev(call.mode, p)) return 3u;
      return call.mode == kPlain ? 1u : 0u;
    case FrameOp::lm_direction_backward:
    case FrameOp::lm_direction_jvp: return all;
    case FrameOp::lm_step: return step_reads_prev(call, step_shape(call), p) ? 3u : 0u;
    default: return call.gram == GramKind::none ? 0u : all;
  }
}

// Rows whose values may count at all for a sample with these parameters: at κ = 0 prev is not looked at.
MQ_MAP uint32_t rows_read(const FrameCall& call, const double* p) {
  if (call.op == FrameOp::lm_direction) return call.rows > 1 && lm_reads_prev(call.mode, p) ? 3u : 1u;
  return (1u << call.rows) - 1u;
}

// The long parts of a map, which do not need one another: a GPU gives each a lane. They write to map.work.
MQ_MAP int map_parts(const FrameCall& call, const double* p) {
  switch (call.op) {
    case FrameOp::lm_direction_backward:  // κ's own derivative looks at prev even at κ = 0
      return lm_reads_prev(call.mode, p) ? LmDerivatives::kInputs : 2 * LmDerivatives::kInputs;
    case FrameOp::lm_direction_jvp: return LmDerivatives::kInputs;
    default: return 0;
  }
}

MQ_MAP void map_part(const FrameCall& call, const double* gram, const double* p, int part, FrameMap& map) {
  const int set = part / LmDerivatives::kInputs;
  const bool reads = set == 1 || lm_derivatives_read_prev(call.op, call.mode, p);
  lm_derivative(call.mode, gram[0], reads ? gram[1] : 0.0, reads ? gram[2] : 0.0, p, part % LmDerivatives::kInputs,
                LmDerivatives{map.work + set * LmDerivatives::kSize});
}

// The rest, after the parts. `scalars` may be null. `gram` is packed as call.gram says; entries of rows outside
// `gram_rows` are 0.
MQ_MAP void finish_map(const FrameCall& call, const double* gram, const double* p, FrameMap& map, double* scalars) {
  map.zero = 0u;
  map.wide = false;
  map.apart = false;
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
    case FrameOp::lm_direction_backward: lm_backward_map(call.mode, gram, p, map, scalars); return;
    case FrameOp::lm_direction_jvp: lm_jvp_map(call.mode, gram, p, map); return;
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
    default: return;  // of steps and of the low-rank family see frame_map
  }
}

// What the map of a low-rank op finds before it decides.
MQ_MAP void begin_lowrank(const FrameCall& call, FrameMap& map) {
  map.used = (1u << call.rows) - 1u;
  map.zero = 0u;
  map.wide = false;
  map.apart = false;
}

// The whole scalar stage by one thread.
inline void frame_map(const FrameCall& call, const double* gram, const double* p, FrameMap& map, double* scalars) {
  if (is_lowrank(call.op)) {
    LowRankWork work;
    begin_lowrank(call, map);
    return lowrank_map(Alone{}, call, gram, p, map, scalars, work);
  }
  if (call.op == FrameOp::lm_step) return step_map(call, gram, p, map);
  const int parts = map_parts(call, p);
  for (int part = 0; part < parts; ++part) map_part(call, gram, p, part, map);
  finish_map(call, gram, p, map, scalars);
}

// lm_direction and its derivatives.
MQ_MAP bool is_direction(FrameOp op) {
  return op == FrameOp::lm_direction || op == FrameOp::lm_direction_backward || op == FrameOp::lm_direction_jvp;
}

// Whether an output is small beside what it is the sum of, judged by the full Gram: ‖Σ c_j x_j‖² = cᵀGc.
MQ_MAP bool sums_cancel(const FrameCall& call, const double* gram, const FrameMap& map) {
  constexpr double kMuch = 4.0;
  if (call.gram != GramKind::full) return false;
  for (int i = 0; i < call.outputs; ++i) {
    if (map.zero >> i & 1u) continue;  // its numbers were never set
    double parts = 0.0, sum = 0.0;
    for (int j = 0; j < call.rows; ++j) {
      if (!(map.used >> j & 1u)) continue;
      const double c = map.c[i][j];
      for (int k = 0; k <= j; ++k)
        if (map.used >> k & 1u) sum += (k < j ? 2.0 : 1.0) * c * map.c[i][k] * gram[j * (j + 1) / 2 + k];
      parts += c * c * gram[j * (j + 1) / 2 + j];
    }
    if (parts > kMuch * sum) return true;
  }
  return false;
}

// Whether float32 products lost what this sample needs: squares out of range, or a determinant of nearly parallel
// vectors. The engine then takes the Gram again with products in double.
MQ_MAP bool wants_exact_gram(const FrameCall& call, const double* gram, uint32_t rows) {
  switch (call.op) {
    case FrameOp::lm_direction:
    case FrameOp::lm_direction_backward:
    case FrameOp::lm_direction_jvp:
    case FrameOp::lm_step: {
      const double n = gram[0], e = gram[1], R = gram[2];
      const double tiny = 1e-30 * static_cast<double>(call.size), huge = 1e37;
      if (!(n > tiny) || !(n < huge)) return true;
      return rows != 1u && (!(R < huge) || (R < tiny && R != 0.0) || n * R - e * e < 1e-2 * n * R);
    }
    default: return false;
  }
}

}  // namespace marquardt
