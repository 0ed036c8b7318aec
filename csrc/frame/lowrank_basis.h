// What the maps of the low-rank Hessian (lowrank_maps.h) share: H factorised for solves and determinants, and in its eigenbasis
// for roots. G is the Gram matrix of the rows of U, which stand behind `head` other rows of the frame.
#pragma once

#include <limits>

#include "core/small.h"
#include "frame/dual.h"
#include "frame/frame.h"

namespace marquardt {

struct LowRankWork {
  double A[kSmallMatrix], B[kSmallMatrix], R[kSmallMatrix], Z[kSmallMatrix];
  double t[kSmall], sign[kSmall], x[kSmall], y[kSmall], z[kSmall], mu[kSmall];
  int order[kSmall], piv[kSmall];
};

// Entry (i, j) of the packed Gram.
MQ_MAP double gram_at(const double* gram, int i, int j) {
  return i >= j ? gram[i * (i + 1) / 2 + j] : gram[j * (j + 1) / 2 + i];
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A sample that has no answer.
template <class Team>
MQ_SMALL void spoil(const Team& team, const FrameCall& call, FrameMap& map) {
  deal(team, call.outputs * call.rows, [&](int e) { map.c[e / call.rows][e % call.rows] = kNan; });
}

// Whether a coefficient is beyond what float32 holds with all its digits.
MQ_MAP bool beyond_float(double c) {
  const double size = std::fabs(c);
  return size > 3e38 || (size < 1e-37 && size != 0.0);
}

// Whether Σ_j c_j r_j loses digits that float32 sums would miss: ‖Σ c_j r_j‖² from the Gram against Σ ‖c_j r_j‖².
template <class Team>
MQ_SMALL bool cancels(const Team& team, int rows, const double* gram, const double* c, LowRankWork& w) {
  deal(team, rows, [&](int j) {
    double sum = 0.0;
    for (int i = 0; i < rows; ++i) sum += gram_at(gram, i, j) * c[i];
    w.x[j] = c[j] * sum;
    w.y[j] = c[j] * c[j] * gram_at(gram, j, j);
  });
  team.sync();
  double whole = 0.0, parts = 0.0;
  bool beyond = false;
  for (int j = 0; j < rows; ++j) {
    whole += w.x[j], parts += w.y[j];
    beyond = beyond || beyond_float(c[j]);
  }
  team.sync();
  return beyond || !(parts <= 2.0 * whole);
}

// A = λJ + T G T with T = √|s| and J the signs of s, rows of positive s first, factorised; order[i] is the row of U that
// index i stands for. Returns info.
template <class Team>
MQ_SMALL int factorise(const Team& team, int k, int head, const double* gram, double lambda, const double* s,
                       LowRankWork& w) {
  if (team.lane() == 0) {
    int at = 0;
    for (int pass = 0; pass < 2; ++pass)
      for (int j = 0; j < k; ++j)
        if ((s[j] < 0.0) == (pass == 1)) w.order[at++] = j;
  }
  team.sync();
  deal(team, k, [&](int i) {
    const double weight = s[w.order[i]];
    w.t[i] = std::sqrt(std::fabs(weight));
    w.sign[i] = weight < 0.0 ? -1.0 : 1.0;
  });
  team.sync();
  deal(team, k * k, [&](int e) {
    const int i = e / k, j = e % k;
    const double g = gram_at(gram, head + w.order[i], head + w.order[j]);
    w.A[i * kLd + j] = w.t[i] * g * w.t[j] + (i == j ? lambda * w.sign[i] : 0.0);
  });
  team.sync();
  const int failed = signed_ldl(team, k, w.A, w.sign, lambda);
  return failed == 0 ? 0 : w.order[failed - 1] + 1;
}

// Whether a failed factorisation met NaN or Inf instead of an indefinite H.
MQ_MAP bool all_finite(const double* x, int n) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i) sum += x[i] - x[i];
  return sum == 0.0;
}

MQ_MAP int info_of(int failed, const FrameCall& call, const double* gram, const double* p) {
  const bool finite = all_finite(gram, call.rows * (call.rows + 1) / 2) && all_finite(p, call.parameter_count);
  return finite ? failed : 0;
}

// --- H^(−1/2) ----------------------------------------------------------------------------------------------------

// H on the span of U, in the orthonormal basis q_i: G = Rᵀ R by Cholesky with pivots, H = λI + R S Rᵀ in the basis
// U R⁺, whose eigenvectors w_i and eigenvalues μ_i one-sided Jacobi finds. Leaves R [r, k], piv, W [r, r] in Z, mu; nothing
// is divided by a small eigenvalue, so degenerate and rank-deficient U are like any other. Returns r; −1 for NaN, −2
// where H is not positive definite.
template <class Team>
MQ_SMALL int spectrum(const Team& team, int k, int head, const double* gram, double lambda, const double* s,
                      LowRankWork& w) {
  constexpr double kTiny = 2e-14;  // squares; what is below is rounding of the Gram
  deal(team, k * k, [&](int e) { w.A[e / k * kLd + e % k] = gram_at(gram, head + e / k, head + e % k); });
  team.sync();
  const int r = pivoted_cholesky(team, k, w.A, kTiny, 0.0, w.R, w.piv);
  if (r < 0) return -1;
  deal(team, r * r, [&](int e) {
    const int i = e / r, l = e % r;
    double sum = i == l ? lambda : 0.0;
    for (int j = 0; j < k; ++j) sum += w.R[i * kLd + j] * s[j] * w.R[l * kLd + j];
    w.A[i * kLd + l] = sum;
  });
  team.sync();
  bool mixed = false;
  for (int j = 0; j < k; ++j) mixed = mixed || s[j] < 0.0;
  const int found = pivoted_cholesky(team, r, w.A, 0.0, mixed ? 0.0 : lambda, w.Z, w.order);
  if (found < 0) return -1;
  if (found < r) return -2;
  orthogonalise_rows(team, r, r, w.Z, w.x);
  deal(team, r, [&](int i) {
    const double square = row_dot(w.Z + i * kLd, w.Z + i * kLd, r);
    w.mu[i] = square;
    const double scale = 1.0 / std::sqrt(square);
    for (int l = 0; l < r; ++l) w.Z[i * kLd + l] *= scale;
  });
  team.sync();
  return r;
}

// b_i = ⟨q_i, x⟩ for a vector x that is row `which` of the frame: R⁻ᵀ ⟨u, x⟩, then W. `room` is overwritten.
template <class Team>
MQ_SMALL void coordinates(const Team& team, int r, int head, int which, const double* gram, double* room, double* b,
                          const LowRankWork& w) {
  deal(team, r, [&](int i) { room[i] = gram_at(gram, head + w.piv[i], which); });
  team.sync();
  for (int i = 0; i < r; ++i) {
    const double y = room[i] / w.R[i * kLd + w.piv[i]];
    team.sync();
    deal(team, r, [&](int j) {
      if (j == i) room[j] = y;
      if (j > i) room[j] -= w.R[i * kLd + w.piv[j]] * y;
    });
    team.sync();
  }
  deal(team, r, [&](int i) { b[i] = row_dot(w.Z + i * kLd, room, r); });
  team.sync();
}

// X := R⁻¹ X for columns of coefficients in the basis of the q's own Cholesky, X [r, columns]: coefficients of the rows
// piv[0] … of U.
template <class Team>
MQ_SMALL void to_rows_of_u(const Team& team, int r, int columns, double* X, const LowRankWork& w) {
  for (int i = r - 1; i >= 0; --i) {
    deal(team, columns, [&](int c) { X[i * kLd + c] /= w.R[i * kLd + w.piv[i]]; });
    for (int l = 0; l < i; ++l)
      deal(team, columns, [&](int c) { X[l * kLd + c] -= w.R[l * kLd + w.piv[i]] * X[i * kLd + c]; });
  }
  team.sync();
}

// f[a, b] of f(x) = x^(−1/2), from the roots of a and b.
MQ_MAP double divided_difference(double root_a, double root_b) {
  return -1.0 / (root_a * root_b * (root_a + root_b));
}

}  // namespace marquardt
