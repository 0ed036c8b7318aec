// Linear algebra of matrices of at most 18 × 18 doubles, by a team of threads: one on the CPU, a warp on a GPU, where the
// matrices lie in shared memory. Loops are dealt out by lane; `sync` orders what one lane writes and another reads.
//
// A team's type has `lane()`, `lanes()` and `sync()`. Rows of every matrix are kLd apart.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/macros.h"

// Functions of many lines that both sides call: on a GPU kept out of line, so that they do not decide a kernel's registers.
#if defined(__CUDACC__)
#define MQ_SMALL __host__ __device__ __noinline__ inline
#else
#define MQ_SMALL inline
#endif

namespace marquardt {

constexpr int kSmall = 18;
constexpr int kLd = kSmall;
constexpr int kSmallMatrix = kSmall * kLd;

// A team of one.
struct Alone {
  MQ_HOST_DEVICE static constexpr int lane() { return 0; }
  MQ_HOST_DEVICE static constexpr int lanes() { return 1; }
  MQ_HOST_DEVICE static constexpr void sync() {}
};

template <class Team, class F>
MQ_HOST_DEVICE inline void deal(const Team& team, int n, const F& f) {
  for (int i = team.lane(); i < n; i += team.lanes()) f(i);
}

// A = L D Lᵀ in place for a symmetric A [n, n] whose pivot j must have the sign of sign[j] (±1): L below the diagonal, D on
// it. With the positive signs first, such an A = [P, Q; Qᵀ, −R] has them all exactly if P and R + Qᵀ P⁻¹ Q are positive
// definite. A = λJ + (positive semidefinite) has no positive pivot below λ: `floor` is that λ, and what rounding left below
// it is lifted. Returns 0, or j + 1 for the first pivot that fails (also where it is NaN).
template <class Team>
MQ_SMALL int signed_ldl(const Team& team, int n, double* A, const double* sign, double floor) {
  for (int j = 0; j < n; ++j) {
    double d = A[j * kLd + j];
    if (sign[j] > 0.0 && d < floor) d = floor;
    if (!(d * sign[j] > 0.0)) {
      team.sync();  // the caller may overwrite what another lane still looks at
      return j + 1;
    }
    const int below = n - j - 1;
    const double inverse = 1.0 / d;
    // The trailing block with the column as it is: a_il − a_ij a_lj / d, lower triangle.
    deal(team, below * below, [&](int e) {
      const int i = j + 1 + e / below, l = j + 1 + e % below;
      if (l <= i) A[i * kLd + l] -= A[i * kLd + j] * A[l * kLd + j] * inverse;
    });
    team.sync();
    deal(team, below + 1, [&](int i) {
      if (i == below) {
        A[j * kLd + j] = d;
      } else {
        A[(j + 1 + i) * kLd + j] *= inverse;
      }
    });
    team.sync();
  }
  return 0;
}

// X := A⁻¹ X from signed_ldl, X [n, columns]; a lane takes whole columns.
template <class Team>
MQ_SMALL void ldl_solve(const Team& team, int n, const double* A, double* X, int columns) {
  for (int i = 1; i < n; ++i)
    for (int l = 0; l < i; ++l) deal(team, columns, [&](int c) { X[i * kLd + c] -= A[i * kLd + l] * X[l * kLd + c]; });
  for (int i = n - 1; i >= 0; --i) {
    deal(team, columns, [&](int c) { X[i * kLd + c] /= A[i * kLd + i]; });
    for (int l = i + 1; l < n; ++l)
      deal(team, columns, [&](int c) { X[i * kLd + c] -= A[l * kLd + i] * X[l * kLd + c]; });
  }
  team.sync();
}

// R [r, n] with A = Rᵀ R for a positive semidefinite A [n, n], which is overwritten: Cholesky with the largest pivot first,
// until what is left is below `tiny` times the largest; pivots below `floor` are lifted to it. piv[i] is the column that row i begins with: R[i, piv[l]] = 0 for
// l < i. Returns the rank r; −1 where A holds a NaN or an infinity.
template <class Team>
MQ_SMALL int pivoted_cholesky(const Team& team, int n, double* A, double tiny, double floor, double* R, int* piv) {
  double largest = 0.0;
  uint32_t taken = 0u;  // every lane keeps its own, all alike
  for (int i = 0; i < n; ++i) {
    int best = -1;
    double pivot = 0.0, sum = 0.0;
    for (int j = 0; j < n; ++j) {
      double d = A[j * kLd + j];
      sum += d - d;  // 0, or NaN where one is not finite
      if (d < floor) d = floor;
      if (!(taken >> j & 1u) && d > pivot) best = j, pivot = d;
    }
    if (i == 0) largest = pivot;
    if (!(sum == 0.0) || best < 0 || !(pivot > tiny * largest)) {
      team.sync();  // the caller may overwrite what another lane still looks at
      return sum == 0.0 ? i : -1;
    }
    const uint32_t before = taken;
    taken |= 1u << best;
    const double root = std::sqrt(pivot);
    deal(team, n, [&](int j) {
      R[i * kLd + j] = before >> j & 1u ? 0.0 : j == best ? root : A[best * kLd + j] / root;
      if (j == 0) piv[i] = best;
    });
    team.sync();
    deal(team, n * n, [&](int e) {
      const int a = e / n, b = e % n;
      A[a * kLd + b] -= R[i * kLd + a] * R[i * kLd + b];
    });
    team.sync();
  }
  return n;
}

MQ_HOST_DEVICE inline double row_dot(const double* x, const double* y, int n) {
  double a = 0.0, b = 0.0;
  int i = 0;
  for (; i + 2 <= n; i += 2) {
    a += x[i] * y[i];
    b += x[i + 1] * y[i + 1];
  }
  if (i < n) a += x[i] * y[i];
  return a + b;
}

// Rotates two rows until they are orthogonal; true if they were not yet.
MQ_SMALL bool rotate_rows(double* x, double* y, int n) {
  const double a = row_dot(x, x, n), b = row_dot(y, y, n), c = row_dot(x, y, n);
  if (!(std::fabs(c) > 3e-16 * std::sqrt(a) * std::sqrt(b))) return false;  // two units; NaN ends here too
  const double zeta = (b - a) / (2.0 * c);
  const double t = (zeta >= 0.0 ? 1.0 : -1.0) / (std::fabs(zeta) + std::sqrt(1.0 + zeta * zeta));
  const double cosine = 1.0 / std::sqrt(1.0 + t * t), sine = cosine * t;
  for (int i = 0; i < n; ++i) {
    const double xi = x[i], yi = y[i];
    x[i] = cosine * xi - sine * yi;
    y[i] = sine * xi + cosine * yi;
  }
  return true;
}

// One-sided Jacobi: rotates the rows of Z [r, n] among each other until they are orthogonal. If Zᵀ Z = A, row i becomes
// σ_i w_iᵀ with A = Σ σ_i² w_i w_iᵀ. On rows that come from a Cholesky factorisation small eigenvalues keep their digits.
// Rows are paired as in a tournament, so that the pairs of a round do not meet; `flags` has room for kSmall numbers.
template <class Team>
MQ_SMALL void orthogonalise_rows(const Team& team, int r, int n, double* Z, double* flags) {
  const int seats = r + r % 2, pairs = seats / 2;
  for (int sweep = 0; sweep < 40; ++sweep) {
    deal(team, pairs, [&](int i) { flags[i] = 0.0; });
    for (int round = 0; round + 1 < seats; ++round) {
      deal(team, pairs, [&](int i) {
        const auto seat = [&](int k) { return k == 0 ? 0 : 1 + (k - 1 + round) % (seats - 1); };
        int p = seat(i), q = seat(seats - 1 - i);
        if (p > q) {
          const int swap = p;
          p = q, q = swap;
        }
        if (q < r && rotate_rows(Z + p * kLd, Z + q * kLd, n)) flags[i] = 1.0;
      });
      team.sync();
    }
    double turned = 0.0;
    for (int i = 0; i < pairs; ++i) turned += flags[i];
    team.sync();  // before the flags are cleared
    if (turned == 0.0) return;
  }
}

}  // namespace marquardt
