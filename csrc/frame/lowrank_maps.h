// The scalar maps of the damped low-rank Hessian H = λI + U diag(s) Uᵀ, whose rows u_1 … u_k stand behind the vectors that
// an op is about. A few k × k matrices each; run by a team of lanes (core/small.h).
//
//   op              head rows            parameters          outputs                          scalars
//   lowrank         v                    λ, s_1 … s_k        H v, H⁻¹ v or H^(−1/2) v         info
//   lowrank_vjp     grad, v              λ, s_1 … s_k        d u_1 … d u_k                    d λ, d s_1 … d s_k
//   lowrank_logdet  (none)               λ, s_1 … s_k        (none)                           log det H, info
//   lowrank_logdet_vjp (none)            λ, s_1 … s_k, grad  d u_1 … d u_k                    d λ, d s_1 … d s_k
//   lowrank_update  v                    decay, weight, s    the new rows                     the new s
//
// info: 0; j > 0 where H is not positive definite and row j of U is the first that breaks it (rows of positive s come
// first); −1 for a damping that is not positive. NaN among the data is not an error: it makes its sample NaN.
#pragma once

#include "frame/lowrank_basis.h"

namespace marquardt {

enum LowRankMode : int { kMatvec = 0, kSolve = 1, kInvSqrt = 2 };

MQ_MAP bool is_lowrank(FrameOp op) {
  return op >= FrameOp::lowrank && op <= FrameOp::lowrank_update;
}

// --- the ops -----------------------------------------------------------------------------------------------------

// Coefficients of (v, u_1 … u_k) into c; returns info.
template <class Team>
MQ_SMALL int solve_coefficients(const Team& team, int k, const double* gram, const double* p, double* c,
                                LowRankWork& w) {
  const double lambda = p[0];
  const int info = factorise(team, k, 1, gram, lambda, p + 1, w);
  if (info != 0) return info;
  deal(team, k, [&](int i) { w.B[i * kLd] = w.t[i] * gram_at(gram, 1 + w.order[i], 0); });
  team.sync();
  ldl_solve(team, k, w.A, w.B, 1);
  const double inverse = 1.0 / lambda;
  deal(team, k, [&](int i) { c[1 + w.order[i]] = -(w.t[i] * w.B[i * kLd]) * inverse; });
  if (team.lane() == 0) c[0] = inverse;
  team.sync();
  return 0;
}

template <class Team>
MQ_SMALL int inv_sqrt_coefficients(const Team& team, int k, const double* gram, const double* p, double* c,
                                   LowRankWork& w) {
  const double lambda = p[0], root = std::sqrt(lambda);
  bool mixed = false;
  for (int j = 0; j < k; ++j) mixed = mixed || p[1 + j] < 0.0;
  if (mixed) {  // says which row breaks H
    const int info = factorise(team, k, 1, gram, lambda, p + 1, w);
    if (info != 0) return info;
  }
  const int r = spectrum(team, k, 1, gram, lambda, p + 1, w);
  if (r < 0) return k;
  coordinates(team, r, 1, 0, gram, w.y, w.z, w);
  deal(team, r, [&](int i) {
    const double m = std::sqrt(w.mu[i]);
    w.y[i] = w.z[i] * (root - m) / (root * m);
  });
  team.sync();
  deal(team, r, [&](int l) {
    double sum = 0.0;
    for (int i = 0; i < r; ++i) sum += w.Z[i * kLd + l] * w.y[i];
    w.B[l * kLd] = sum;
  });
  deal(team, k + 1, [&](int j) { c[j] = j == 0 ? 1.0 / root : 0.0; });
  team.sync();
  to_rows_of_u(team, r, 1, w.B, w);
  deal(team, r, [&](int i) { c[1 + w.piv[i]] = w.B[i * kLd]; });
  team.sync();
  return 0;
}

template <class Team>
MQ_SMALL void lowrank_value(const Team& team, const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                            double* scalars, LowRankWork& w) {
  const int k = call.rows - 1;
  double* c = map.c[0];
  int info = 0;
  if (call.mode == kMatvec) {  // the Gram is row 0 with the others
    deal(team, k + 1, [&](int j) { c[j] = j == 0 ? p[0] : p[j] * gram[j - 1]; });
    team.sync();
    if (team.lane() == 0) map.wide = true;
  } else {
    if (!(p[0] > 0.0)) {
      info = -1;
    } else if (k > 0) {
      info = call.mode == kSolve ? solve_coefficients(team, k, gram, p, c, w)
                                 : inv_sqrt_coefficients(team, k, gram, p, c, w);
    } else if (team.lane() == 0) {
      c[0] = call.mode == kSolve ? 1.0 / p[0] : 1.0 / std::sqrt(p[0]);
      map.wide = beyond_float(c[0]);
    }
    if (info == 0 && k > 0) {
      const bool wide = cancels(team, k + 1, gram, c, w);
      if (team.lane() == 0) map.wide = wide;
    } else if (info != 0) {
      spoil(team, call, map);
      info = info_of(info, call, gram, p);
    }
  }
  if (team.lane() == 0 && scalars != nullptr) scalars[0] = info;
}

// Derivatives of ⟨grad, f(H) v⟩, f by the mode: d u_j, d λ, d s_j.

// ⟨grad, H v⟩: d u_j = s_j(⟨u_j,v⟩ grad + ⟨u_j,grad⟩ v).
template <class Team>
MQ_SMALL void matvec_vjp(const Team& team, const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                         double* scalars) {
  const int k = call.rows - 2;
  // gram: (0, j) at j − 1, then (1, j) for j ≥ 2
  deal(team, k, [&](int j) {
    const double on_grad = gram[1 + j], on_v = gram[1 + k + j];
    for (int i = 0; i < call.rows; ++i) map.c[j][i] = 0.0;
    map.c[j][0] = p[1 + j] * on_v;
    map.c[j][1] = p[1 + j] * on_grad;
    if (scalars != nullptr) scalars[1 + j] = on_grad * on_v;
  });
  if (team.lane() == 0) {
    map.used = 3u;
    map.wide = true;
    if (scalars != nullptr) scalars[0] = gram[0];
  }
}

// With w = H⁻¹ grad and y = H⁻¹ v: d u_j = −s_j(⟨u_j,y⟩ w + ⟨u_j,w⟩ y), d s_j = −⟨u_j,w⟩⟨u_j,y⟩, d λ = −⟨w,y⟩. w and y stay
// sums of the rows: rounded to float32 first, they would have lost ⟨u_j,w⟩ wherever λ ≪ ‖u_j‖².
template <class Team>
MQ_SMALL void solve_vjp(const Team& team, const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                        double* scalars, LowRankWork& w) {
  const int k = call.rows - 2;
  const double lambda = p[0];
  if (!(lambda > 0.0) || factorise(team, k, 2, gram, lambda, p + 1, w) != 0) {
    spoil(team, call, map);
    if (scalars != nullptr) deal(team, k + 1, [&](int j) { scalars[j] = kNan; });
    return;
  }
  deal(team, 2 * k, [&](int e) { w.B[e / 2 * kLd + e % 2] = w.t[e / 2] * gram_at(gram, 2 + w.order[e / 2], e % 2); });
  team.sync();
  ldl_solve(team, k, w.A, w.B, 2);
  // w = (grad − Σ x_i u_i)/λ and y = (v − Σ y_i u_i)/λ
  deal(team, k, [&](int i) {
    w.x[i] = w.t[i] * w.B[i * kLd];
    w.y[i] = w.t[i] * w.B[i * kLd + 1];
  });
  team.sync();
  // ⟨u,w⟩ and ⟨u,y⟩ of row order[i], into z and mu
  deal(team, k, [&](int i) {
    if (w.t[i] > 0.0) {
      w.z[i] = w.sign[i] * w.B[i * kLd] / w.t[i];
      w.mu[i] = w.sign[i] * w.B[i * kLd + 1] / w.t[i];
      return;
    }
    double on_w = gram_at(gram, 2 + w.order[i], 0), on_y = gram_at(gram, 2 + w.order[i], 1);
    for (int l = 0; l < k; ++l) {
      const double g = gram_at(gram, 2 + w.order[i], 2 + w.order[l]);
      on_w -= g * w.x[l], on_y -= g * w.y[l];
    }
    w.z[i] = on_w / lambda, w.mu[i] = on_y / lambda;
  });
  team.sync();
  deal(team, k, [&](int j) {
    const int row = w.order[j];
    const double on_w = w.z[j], on_y = w.mu[j], factor = p[1 + row] / lambda;
    double* c = map.c[row];
    c[0] = -factor * on_y;
    c[1] = -factor * on_w;
    for (int i = 0; i < k; ++i) c[2 + w.order[i]] = factor * (on_y * w.x[i] + on_w * w.y[i]);
    if (scalars != nullptr) scalars[1 + row] = -on_w * on_y;
  });
  if (team.lane() == 0) {
    map.wide = true;
    double across = gram_at(gram, 1, 0), inside = 0.0;  // λ ⟨w, v⟩, and ⟨w, U S Uᵀ y⟩
    for (int i = 0; i < k; ++i) {
      across -= w.x[i] * gram_at(gram, 2 + w.order[i], 1);
      inside += p[1 + w.order[i]] * w.z[i] * w.mu[i];
    }
    if (scalars != nullptr) scalars[0] = -(across / lambda - inside) / lambda;
  }
}

// P = ∂⟨grad, H^(−1/2) v⟩/∂H in the eigenbasis (Daleckii and Krein), with h the divided differences of x^(−1/2):
//   P u_j = Σ_i q_i (F_ij − α_j b_i − β_j a_i) + α_j v + β_j grad,   F = E ρ,  E_il = ½ h(μ_i, μ_l)(a_i b_l + a_l b_i),
//   α_j = ½ Σ_i h(μ_i, λ) ρ_ij a_i,  β_j = ½ Σ_i h(μ_i, λ) ρ_ij b_i,  ρ_ij = ⟨q_i, u_j⟩, a = ⟨q, grad⟩, b = ⟨q, v⟩.
// d u_j = 2 s_j P u_j, d s_j = ⟨u_j, P u_j⟩ = Σ_i ρ_ij F_ij, d λ = tr P.
template <class Team>
MQ_SMALL void inv_sqrt_vjp(const Team& team, const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                           double* scalars, LowRankWork& w) {
  const int k = call.rows - 2;
  const double lambda = p[0], root = std::sqrt(lambda);
  const int r = lambda > 0.0 ? spectrum(team, k, 2, gram, lambda, p + 1, w) : -2;
  if (r < 0) {
    spoil(team, call, map);
    if (scalars != nullptr) deal(team, k + 1, [&](int j) { scalars[j] = kNan; });
    return;
  }
  double *a = w.t, *b = w.z;
  coordinates(team, r, 2, 0, gram, w.y, a, w);
  coordinates(team, r, 2, 1, gram, w.y, b, w);
  // ρ = W R into A, F = E ρ into B.
  deal(team, r * k, [&](int e) {
    const int i = e / k, j = e % k;
    double sum = 0.0;
    for (int l = 0; l < r; ++l) sum += w.Z[i * kLd + l] * w.R[l * kLd + j];
    w.A[i * kLd + j] = sum;
  });
  deal(team, r, [&](int i) { w.sign[i] = std::sqrt(w.mu[i]); });
  team.sync();
  deal(team, r * k, [&](int e) {
    const int i = e / k, j = e % k;
    double sum = 0.0;
    for (int l = 0; l < r; ++l) {
      const double h = 0.5 * divided_difference(w.sign[i], w.sign[l]) * (a[i] * b[l] + a[l] * b[i]);
      sum += h * w.A[l * kLd + j];
    }
    w.B[i * kLd + j] = sum;
  });
  team.sync();
  double *alpha = w.x, *beta = w.y;
  deal(team, k, [&](int j) {
    double on_v = 0.0, on_grad = 0.0, d_s = 0.0;
    for (int i = 0; i < r; ++i) {
      const double h = 0.5 * divided_difference(w.sign[i], root) * w.A[i * kLd + j];
      on_v += h * a[i];
      on_grad += h * b[i];
      d_s += w.A[i * kLd + j] * w.B[i * kLd + j];
    }
    alpha[j] = on_v, beta[j] = on_grad;
    if (scalars != nullptr) scalars[1 + j] = d_s;
    for (int i = 0; i < r; ++i) w.B[i * kLd + j] -= on_v * b[i] + on_grad * a[i];
  });
  team.sync();
  // Coefficients of the q's, then of the basis that R was made in (into A), then of the rows of U.
  deal(team, r * k, [&](int e) {
    const int l = e / k, j = e % k;
    double sum = 0.0;
    for (int i = 0; i < r; ++i) sum += w.Z[i * kLd + l] * w.B[i * kLd + j];
    w.A[l * kLd + j] = sum;
  });
  team.sync();
  to_rows_of_u(team, r, k, w.A, w);
  deal(team, k, [&](int j) {
    const double twice = 2.0 * p[1 + j];
    double* c = map.c[j];
    for (int i = 0; i < call.rows; ++i) c[i] = 0.0;
    c[0] = twice * beta[j];
    c[1] = twice * alpha[j];
    for (int i = 0; i < r; ++i) c[2 + w.piv[i]] = twice * w.A[i * kLd + j];
  });
  if (team.lane() == 0) {
    map.wide = true;
    double trace = 0.0, inside = 0.0;
    for (int i = 0; i < r; ++i) {
      const double product = a[i] * b[i];
      trace -= 0.5 * product / (w.mu[i] * w.sign[i]);
      inside += product;
    }
    if (scalars != nullptr) scalars[0] = trace - 0.5 * (gram_at(gram, 1, 0) - inside) / (lambda * root);
  }
}

// log det H = (D − k) log λ + Σ log |d_i| from the pivots.
template <class Team>
MQ_SMALL void logdet_value(const Team& team, const FrameCall& call, const double* gram, const double* p,
                           double* scalars, LowRankWork& w) {
  const int k = call.rows;
  const int info = p[0] > 0.0 ? factorise(team, k, 0, gram, p[0], p + 1, w) : -1;
  if (info == 0) deal(team, k, [&](int i) { w.x[i] = std::log(std::fabs(w.A[i * kLd + i]) / p[0]); });
  team.sync();
  if (team.lane() != 0 || scalars == nullptr) return;
  double sum = info == 0 ? static_cast<double>(call.size) * std::log(p[0]) : kNan;
  for (int i = 0; i < k && info == 0; ++i) sum += w.x[i];
  scalars[0] = sum;
  scalars[1] = info == 0 ? 0 : info_of(info, call, gram, p);
}

// With K = (λJ + T G T)⁻¹: d u_j = 2 ḡ t_j Σ_i u_i t_i K_ij, d s_j = ḡ ⟨u_j, H⁻¹ u_j⟩, d λ = ḡ tr H⁻¹.
template <class Team>
MQ_SMALL void logdet_vjp(const Team& team, const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                         double* scalars, LowRankWork& w) {
  const int k = call.rows;
  const double lambda = p[0], grad = p[1 + k];
  if (!(lambda > 0.0) || factorise(team, k, 0, gram, lambda, p + 1, w) != 0) {
    spoil(team, call, map);
    if (scalars != nullptr) deal(team, k + 1, [&](int j) { scalars[j] = kNan; });
    return;
  }
  deal(team, k * k, [&](int e) { w.B[e / k * kLd + e % k] = e / k == e % k ? 1.0 : 0.0; });
  // T G, to be solved with too: H⁻¹ u_j = (u_j − U T K T G e_j)/λ
  deal(team, k * k,
       [&](int e) { w.R[e / k * kLd + e % k] = w.t[e / k] * gram_at(gram, w.order[e / k], w.order[e % k]); });
  team.sync();
  ldl_solve(team, k, w.A, w.B, k);
  deal(team, k * k, [&](int e) { w.Z[e / k * kLd + e % k] = w.R[e / k * kLd + e % k]; });
  team.sync();
  ldl_solve(team, k, w.A, w.Z, k);
  deal(team, k, [&](int j) {
    double* c = map.c[w.order[j]];
    for (int i = 0; i < k; ++i) c[w.order[i]] = 2.0 * grad * w.t[j] * w.t[i] * w.B[i * kLd + j];
    double taken = 0.0;
    for (int i = 0; i < k; ++i) taken += w.R[i * kLd + j] * w.Z[i * kLd + j];
    if (scalars != nullptr) scalars[1 + w.order[j]] = grad * (gram_at(gram, w.order[j], w.order[j]) - taken) / lambda;
  });
  if (team.lane() == 0) {
    map.wide = true;
    double diagonal = 0.0;
    for (int i = 0; i < k; ++i) diagonal += w.sign[i] * w.B[i * kLd + i];
    if (scalars != nullptr) scalars[0] = grad * ((static_cast<double>(call.size) - k) / lambda + diagonal);
  }
}

// The best rank-m factors of decay·U diag(s) Uᵀ + weight·v vᵀ = Σ t_j² r_j r_jᵀ over the frame r = (v, u_1 … u_k): the
// Gram of the t_j r_j is T G T = Σ ν_i w_i w_iᵀ, and the new rows are Σ_j (t_j w_ij/√ν_i) r_j.
template <class Team>
MQ_SMALL void update_map(const Team& team, const FrameCall& call, const double* gram, const double* p, FrameMap& map,
                         double* scalars, LowRankWork& w) {
  constexpr double kZero = 1e-12;  // of the largest: what counts as nothing
  const int n = call.rows, m = call.outputs;
  const double decay = p[0], weight = p[1];
  deal(team, n, [&](int j) { w.t[j] = std::sqrt(j == 0 ? weight : decay * p[1 + j]); });
  team.sync();
  deal(team, n * n, [&](int e) { w.A[e / n * kLd + e % n] = w.t[e / n] * gram_at(gram, e / n, e % n) * w.t[e % n]; });
  team.sync();
  const int r = pivoted_cholesky(team, n, w.A, 1e-15, 0.0, w.Z, w.piv);
  if (r < 0) {
    spoil(team, call, map);
    if (scalars != nullptr) deal(team, m, [&](int i) { scalars[i] = kNan; });
    return;
  }
  orthogonalise_rows(team, r, n, w.Z, w.x);
  deal(team, r, [&](int i) { w.mu[i] = row_dot(w.Z + i * kLd, w.Z + i * kLd, n); });
  team.sync();
  deal(team, r, [&](int i) {  // its place in descending order
    int place = 0;
    for (int l = 0; l < r; ++l) place += w.mu[l] > w.mu[i] || (w.mu[l] == w.mu[i] && l < i) ? 1 : 0;
    w.order[place] = i;
  });
  team.sync();
  const double largest = r > 0 ? w.mu[w.order[0]] : 0.0;
  deal(team, m, [&](int i) {
    const bool there = i < r && w.mu[w.order[i]] > kZero * largest;
    double* c = map.c[i];
    w.x[i] = there ? w.mu[w.order[i]] : 0.0;
    w.y[i] = 0.0;
    if (scalars != nullptr) scalars[i] = w.x[i];
    for (int j = 0; j < n; ++j) c[j] = 0.0;
    if (!there) return;
    const double* z = w.Z + w.order[i] * kLd;
    const double inverse = 1.0 / w.mu[w.order[i]];
    int top = 0;
    double size = 0.0;
    for (int j = 0; j < n; ++j) {
      c[j] = w.t[j] * z[j] * inverse;
      size += beyond_float(c[j]) ? kNan : c[j] * c[j] * gram_at(gram, j, j);
      if (std::fabs(c[j]) > std::fabs(c[top])) top = j;
    }
    if (c[top] < 0.0)
      for (int j = 0; j < n; ++j) c[j] = -c[j];
    w.y[i] = size;  // ‖row‖ = 1: more than 2 means that parts cancel; NaN, that float32 is too narrow
  });
  team.sync();
  if (team.lane() == 0) {
    uint32_t zero = 0u;
    bool wide = false;
    for (int i = 0; i < m; ++i) {
      if (w.x[i] == 0.0) zero |= 1u << i;
      wide = wide || !(w.y[i] <= 2.0);
    }
    map.zero = zero;
    map.wide = wide;
  }
}

// Rows whose Gram an op needs, packed as `lowrank_gram` says.
MQ_MAP GramKind lowrank_gram(FrameOp op, int mode) {
  if (op == FrameOp::lowrank && mode == kMatvec) return GramKind::first;
  if (op == FrameOp::lowrank_vjp && mode == kMatvec) return GramKind::two;
  return GramKind::full;
}

// All lanes of the team; map.used, map.zero and map.wide hold their usual values before.
template <class Team>
MQ_HOST_DEVICE inline void lowrank_map(const Team& team, const FrameCall& call, const double* gram, const double* p,
                                       FrameMap& map, double* scalars, LowRankWork& w) {
  switch (call.op) {
    case FrameOp::lowrank: return lowrank_value(team, call, gram, p, map, scalars, w);
    case FrameOp::lowrank_vjp:
      if (call.mode == kMatvec) return matvec_vjp(team, call, gram, p, map, scalars);
      if (call.mode == kSolve) return solve_vjp(team, call, gram, p, map, scalars, w);
      return inv_sqrt_vjp(team, call, gram, p, map, scalars, w);
    case FrameOp::lowrank_logdet: return logdet_value(team, call, gram, p, scalars, w);
    case FrameOp::lowrank_logdet_vjp: return logdet_vjp(team, call, gram, p, map, scalars, w);
    case FrameOp::lowrank_update: return update_map(team, call, gram, p, map, scalars, w);
    default: return;
  }
}

}  // namespace marquardt
