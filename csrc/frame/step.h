// The rows of a sampler step, one form for all of them. Sources s_0 = sample, s_1 … = outputs of the model, noise ξ,
// and p, the direction of the step before:
//
//   y = clamp(Σ Y_j s_j, ±bound)                     where the call is clipped
//   e = Σ D_j s_j + D_ξ ξ + D_y y                    row 0, the direction
//   r = p − e                                        row 1 (snr: r = p, the noise)
//   a = Σ A_j s_j + A_ξ ξ + A_y y                    row 2
//   x' = a + w·LM(e; p) = a + w(c0 e + c1 r)         y is row 3
//
// Where a sample does not look at p (κ = 0, w = 0, no p) LM(e) = e goes into row 2, whose numbers then are A + w·D.
// A number that is exactly 0 leaves its vector unread. Where the call is guided s_1 stands for s_1 − s_2, the two outputs
// of a guided model: their difference keeps digits that a difference of large multiples would lose.
//
// Parameters: first, second, w, A_0 …, D_0 …, [A_ξ, D_ξ], [A_y, D_y, bound, Y_0 …]; first and second are (λ, κ), (γ, –)
// or, in the variant snr, (r, T).
#pragma once

#include "frame/dual.h"
#include "frame/frame.h"

namespace marquardt {

constexpr int kMaxSources = 6;
constexpr int kStepRows = 4;
constexpr int kSnr = 3;  // beside the modes of lm_direction

// Vectors of a step: sources, p (if there is one), then drawn noise; where the noise is p it stands there itself.
struct StepShape {
  int sources;
  bool has_prev, noisy, clipped, guided;

  MQ_MAP int prev() const { return sources; }
  MQ_MAP int noise() const { return sources + (has_prev ? 1 : 0); }
  MQ_MAP int a(int j) const { return 3 + j; }
  MQ_MAP int d(int j) const { return 3 + sources + j; }
  MQ_MAP int a_noise() const { return 3 + 2 * sources; }
  MQ_MAP int d_noise() const { return a_noise() + 1; }
  MQ_MAP int a_y() const { return 3 + 2 * sources + (noisy ? 2 : 0); }
  MQ_MAP int d_y() const { return a_y() + 1; }
  MQ_MAP int bound() const { return a_y() + 2; }
  MQ_MAP int y(int j) const { return a_y() + 3 + j; }
  MQ_MAP int parameters() const { return a_y() + (clipped ? 3 + sources : 0); }
};

MQ_MAP StepShape step_shape(const FrameCall& call) {
  const bool drawn = call.seed != nullptr;
  if (call.mode == kSnr) return {call.sources, true, false, call.clipped, call.guided};
  return {call.sources, call.streams > call.sources, drawn, call.clipped, call.guided};
}

// Whether this sample looks at p. The last parameter of the LM rule brings it in.
MQ_MAP bool step_reads_prev(const FrameCall& call, const StepShape& s, const double* p) {
  if (!s.has_prev) return false;
  if (call.mode == kSnr) return true;
  return p[call.mode == 2 ? 0 : 1] != 0.0 && p[2] != 0.0;
}

// The number of a vector (a source, or the noise) in row 2.
MQ_MAP double step_base(const StepShape& s, const double* p, int j, bool reads) {
  const int a = j < s.sources ? s.a(j) : s.a_noise(), d = j < s.sources ? s.d(j) : s.d_noise();
  return reads ? p[a] : p[a] + p[2] * p[d];
}

MQ_MAP double step_base_y(const StepShape& s, const double* p, bool reads) {
  return reads ? p[s.a_y()] : p[s.a_y()] + p[2] * p[s.d_y()];
}

// Whether row 0 is needed where p is not looked at: for an output alone.
MQ_MAP bool step_needs_direction(const FrameCall& call, bool reads) {
  return reads || call.step_direction;
}

// Vectors that count (bit j), for the Gram alone or for the outputs too.
MQ_MAP uint32_t step_vectors(const FrameCall& call, const double* p, bool outputs) {
  const StepShape s = step_shape(call);
  const bool reads = step_reads_prev(call, s, p), direction = step_needs_direction(call, reads);
  bool needs_y = outputs && call.step_converted;
  if (s.clipped) {
    needs_y = needs_y || (outputs && step_base_y(s, p, reads) != 0.0) || (direction && p[s.d_y()] != 0.0);
  }
  uint32_t mask = 0u;
  for (int j = 0; j < s.sources; ++j) {
    const bool used = (outputs && step_base(s, p, j, reads) != 0.0) || (direction && p[s.d(j)] != 0.0) ||
                      (needs_y && p[s.y(j)] != 0.0);
    if (used) mask |= 1u << j;
  }
  if (s.guided && (mask & 2u) != 0u) mask |= 4u;
  if (s.noisy) {
    const bool used = (outputs && step_base(s, p, s.sources, reads) != 0.0) || (direction && p[s.d_noise()] != 0.0);
    if (used) mask |= 1u << s.noise();
  }
  if (reads) mask |= 1u << s.prev();
  return mask;
}

}  // namespace marquardt
