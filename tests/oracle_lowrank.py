"""What the low-rank Hessian family should give, in numpy longdouble, written from the formulas alone.

H = λI + Σ_j s_j u_j u_jᵀ. One sample is reduced without loss to the span of its vectors: E, an orthonormal basis from
Gram–Schmidt in longdouble, in which H is a small symmetric matrix and outside of which it is λ. Everything else is the
dense formula there, through an eigendecomposition by Jacobi. No Gram matrix, no Woodbury identity: nothing cancels, so
1e-19·‖H‖/λ_min is all that is lost. `dense_*` are independent of both, for small D, and judge them.

Samples are rows: v [B, D], U [B, k, D], s [B, k], damping [B].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

LD = np.longdouble
MATVEC, SOLVE, INV_SQRT = 0, 1, 2
_DEPENDENT = LD(1e-15)  # what is left of a vector that lies in the span of those before it is rounding


def wide(x) -> np.ndarray:
    return np.asarray(x, dtype=LD)


def norm(x: np.ndarray) -> np.ndarray:
    return np.sqrt((x * x).sum(-1))


def orthonormal(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(E [r, D] orthonormal, R [n, r]) with vectors = R·E; Gram–Schmidt, twice."""
    count, size = vectors.shape
    basis = np.zeros((min(count, size), size), LD)
    coordinates, rank = np.zeros((count, min(count, size)), LD), 0
    for i, row in enumerate(vectors):
        length, rest = norm(row), row.copy()
        for _ in range(2):
            c = basis[:rank] @ rest
            coordinates[i, :rank] += c
            rest -= c @ basis[:rank]
        left = norm(rest)
        if rank < len(basis) and left > _DEPENDENT * length:
            basis[rank], coordinates[i, rank] = rest / left, left
            rank += 1
    return basis[:rank], coordinates[:, :rank]


def jacobi(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues and eigenvectors (columns) of a symmetric matrix, in its dtype."""
    a, n = matrix.copy(), len(matrix)
    vectors = np.eye(n, dtype=a.dtype)
    tiny = np.finfo(a.dtype).eps ** 2
    for _ in range(60):
        off = (np.tril(a, -1) ** 2).sum()
        if not off > tiny * (np.diag(a) ** 2).sum():
            break
        for p in range(n - 1):
            for q in range(p + 1, n):
                if a[p, q] == 0:
                    continue
                theta = (a[q, q] - a[p, p]) / (2 * a[p, q])
                t = (1 if theta >= 0 else -1) / (abs(theta) + np.sqrt(theta * theta + 1))
                c = 1 / np.sqrt(t * t + 1)
                turn = np.array([[c, t * c], [-t * c, c]], a.dtype)
                a[:, [p, q]] = a[:, [p, q]] @ turn
                a[[p, q]] = turn.T @ a[[p, q]]
                a[p, q] = a[q, p] = 0
                vectors[:, [p, q]] = vectors[:, [p, q]] @ turn
    return np.diag(a).copy(), vectors


@dataclass
class Small:
    """One sample in the eigenvectors of H: values t, coordinates of all vectors, and the way back."""

    t: np.ndarray  # [r]
    given: np.ndarray  # [n, r]
    back: np.ndarray  # [r, D]
    tail: int  # directions in which H is λ and every vector is 0

    @property
    def definite(self) -> bool:
        return bool(np.all(self.t > 0))


def reduce(U, s, damping, *vectors) -> Small:
    """The sample in eigencoordinates: the rows of U first, then the vectors."""
    rows = wide(np.concatenate([U, *(v[None] for v in vectors)])) if vectors else wide(U)
    basis, R = orthonormal(rows)
    inner = R[: len(U)]
    t, V = jacobi(damping * np.eye(len(basis), dtype=LD) + (inner.T * wide(s)) @ inner)
    return Small(t, R @ V, V.T @ basis, rows.shape[1] - len(basis))


def _f(variant: int, t: np.ndarray) -> np.ndarray:
    return {MATVEC: lambda: t, SOLVE: lambda: 1 / t, INV_SQRT: lambda: 1 / np.sqrt(t)}[variant]()


def _divided(variant: int, t: np.ndarray) -> np.ndarray:
    """(f(t_i) − f(t_j)) / (t_i − t_j) without the difference: equal eigenvalues are like any others."""
    a, b = t[:, None], t[None, :]
    if variant == MATVEC:
        return np.ones_like(a * b)
    if variant == SOLVE:
        return -1 / (a * b)
    a, b = np.sqrt(a), np.sqrt(b)
    return -1 / (a * b * (a + b))


def _usable(small: Small, variant: int) -> bool:
    finite = bool(np.all(np.isfinite(small.given)) and np.all(np.isfinite(small.t)))
    return finite and (variant == MATVEC or small.definite)


def _batch(function, *arrays):
    """`function` on each sample, its results stacked."""
    made = [function(*rows) for rows in zip(*arrays, strict=True)]
    return [np.stack(column) for column in zip(*made, strict=True)]


def apply(variant: int, v, U, s, damping, keep_norm: bool = False) -> np.ndarray:
    """f(H) v, [B, D]; NaN where H is not positive definite but has to be."""

    def one(v, U, s, lam):
        small = reduce(U, s, lam, v)
        if not _usable(small, variant):
            return (np.full_like(v, np.nan),)
        x = (_f(variant, small.t) * small.given[-1]) @ small.back
        if keep_norm and norm(v) > 0:
            x = x * (norm(v) / norm(x))
        return (x,)

    return _batch(one, wide(v), wide(U), wide(s), wide(damping))[0] if len(v) else wide(v)


def apply_vjp(variant: int, v, U, s, damping, grad, keep_norm: bool = False):
    """(d_v, d_U, d_s, d_damping, size of d_s, size of d_damping): sizes are the products that the sums are made of."""

    def one(v, U, s, lam, g):
        small = reduce(U, s, lam, v, g)
        t, (*_, vh, gh) = small.t, small.given
        uh, extra = small.given[: len(U)], np.zeros_like(v)
        if keep_norm:  # out = ‖v‖·x/‖x‖
            x, n = _f(variant, t) * vh, norm(v)
            if n == 0:
                return v * 0, U * 0, s * 0, lam * 0, s * 0, lam * 0
            unit = x / norm(x)
            extra = (unit @ gh) * v / n
            gh = (gh - unit * (unit @ gh)) * (n / norm(x))
        H = _divided(variant, t) * gh[:, None] * vh[None, :]
        H = (H + H.T) / 2
        d_v = (_f(variant, t) * gh) @ small.back + extra
        moved = uh @ H
        root = norm(gh * _f(variant, t)) * norm(vh * _f(variant, t))
        size = {
            MATVEC: norm(gh) * norm(vh),
            SOLVE: root,
            INV_SQRT: root / (2 * np.sqrt(np.abs(t).min(initial=np.abs(lam)))),
        }[variant]
        return (
            d_v, (2 * s[:, None] * moved) @ small.back, (moved * uh).sum(-1), np.trace(H),
            (U * U).sum(-1) * size, size,
        )  # fmt: skip

    return _batch(one, *map(wide, (v, U, s, damping, grad)))


def apply_jvp(
    variant: int, v, U, s, damping, v_t, U_t, s_t, damping_t, keep_norm: bool = False
) -> np.ndarray:
    """The derivative of f(H) v along a direction in everything."""

    def one(v, U, s, lam, v_t, U_t, s_t, lam_t):
        k = len(U)
        small = reduce(U, s, lam, v, v_t, *U_t)
        uh, (vh, th), ut = small.given[:k], small.given[k : k + 2], small.given[k + 2 :]
        half = (uh.T * s) @ ut
        dH = lam_t * np.eye(len(small.t), dtype=LD) + (uh.T * s_t) @ uh + half + half.T
        f = _f(variant, small.t)
        moved = f * th + (_divided(variant, small.t) * dH) @ vh
        if keep_norm:
            x, n = f * vh, norm(v)
            unit = x / norm(x)
            moved = (v @ v_t) / n * unit + n / norm(x) * (moved - unit * (unit @ moved))
        return (moved @ small.back,)

    return _batch(one, *map(wide, (v, U, s, damping, v_t, U_t, s_t, damping_t)))[0]


def coefficients(variant: int, v, U, s, damping) -> tuple[np.ndarray, np.ndarray]:
    """(c_0 [B], c [B, k]) of f(H) v = c_0 v + Σ c_j u_j, the form that kernels add up.

    f(H) = f(λ) + Uᵀ S φ(H) U with φ(t) = (f(t) − f(λ))/(t − λ), so c_j = s_j ⟨u_j, φ(H) v⟩.
    """

    def one(v, U, s, lam):
        small = reduce(U, s, lam, v)
        if not _usable(small, variant):
            return np.full((), np.nan, LD), np.full_like(s, np.nan)
        phi = _divided(variant, np.append(small.t, lam))[:-1, -1]
        return _f(variant, lam), s * (small.given[: len(U)] @ (phi * small.given[-1]))

    return tuple(_batch(one, *map(wide, (v, U, s, damping))))


def sum_rounding(variant: int, v, U, s, damping, eps: float) -> np.ndarray:
    """[B, D]: (k+2)/2 + 1 roundings of half an ulp on Σ |c_j r_j|, what adding the rows up in one precision costs."""
    c0, c = coefficients(variant, v, U, s, damping)
    size = np.abs(c0[:, None] * wide(v)) + (np.abs(c)[..., None] * np.abs(wide(U))).sum(1)
    return ((c.shape[1] + 2) / 2 + 1) * LD(eps) / 2 * size


def logdet(U, s, damping) -> np.ndarray:
    """log det H, [B]; NaN where H is not positive definite."""

    def one(U, s, lam):
        small = reduce(U, s, lam)
        if not _usable(small, SOLVE):
            return (LD(np.nan),)
        return (small.tail * np.log(lam) + np.log(small.t).sum(),)

    return _batch(one, *map(wide, (U, s, damping)))[0] if len(U) else np.zeros(0, LD)


def logdet_vjp(U, s, damping, grad):
    """(d_U, d_s, d_damping, size of d_s): 2 s_j H⁻¹u_j, ⟨u_j, H⁻¹u_j⟩, tr H⁻¹."""

    def one(U, s, lam, g):
        small = reduce(U, s, lam)
        w = small.given / small.t
        size = np.abs(g) * norm(small.given) * norm(w)
        return (
            2 * g * s[:, None] * (w @ small.back), g * (w * small.given).sum(-1),
            g * (small.tail / lam + (1 / small.t).sum()), size,
        )  # fmt: skip

    return _batch(one, *map(wide, (U, s, damping, grad)))


@dataclass
class Spectrum:
    """Eigenpairs of decay·U diag(s) Uᵀ + weight·v vᵀ of one sample, largest first."""

    values: np.ndarray  # [n]
    rows: np.ndarray  # [n, D]
    coefficients: np.ndarray  # [n, 1 + k]: rows over (v, u_1 … u_k), where the value is not 0


def updated(U, s, v, decay, weight=1.0) -> Spectrum:
    """One sample: U [k, D], s [k], v [D]."""
    basis, R = orthonormal(wide(np.concatenate([v[None], U])))
    w = np.concatenate([[LD(weight)], LD(decay) * wide(s)])
    t, V = jacobi((R.T * w) @ R)
    order = np.argsort(-t, kind="stable")
    t, V = t[order], V[:, order]
    over = np.where(t > 0, t, 1)
    return Spectrum(t, V.T @ basis, (w[:, None] * (R @ V) / over).T)


def distance(U, s, other, other_s) -> LD:
    """Frobenius norm of U diag(s) Uᵀ − the same of others, of one sample."""
    _, R = orthonormal(wide(np.concatenate([U, other])))
    n = len(U)
    gap = (R[:n].T * wide(s)) @ R[:n] - (R[n:].T * wide(other_s)) @ R[n:]
    return np.sqrt((gap * gap).sum())


def dense(U, s, damping) -> np.ndarray:
    """H itself, [D, D], of one sample."""
    U = wide(U)
    return damping * np.eye(U.shape[1], dtype=LD) + (U.T * wide(s)) @ U


def cholesky(a: np.ndarray) -> np.ndarray:
    low = np.zeros_like(a)
    for j in range(len(a)):
        pivot = a[j, j] - (low[j, :j] ** 2).sum()
        low[j, j] = np.sqrt(pivot) if pivot > 0 else np.nan
        low[j + 1 :, j] = (a[j + 1 :, j] - low[j + 1 :, :j] @ low[j, :j]) / low[j, j]
    return low


def inverse(a: np.ndarray) -> np.ndarray:
    """Through L: the columns of L⁻¹ by forward substitution."""
    low, n = cholesky(a), len(a)
    half = np.eye(n, dtype=a.dtype)
    for i in range(n):
        half[i] = (half[i] - low[i, :i] @ half[:i]) / low[i, i]
    return half.T @ half


def dense_apply(variant: int, v, U, s, damping) -> np.ndarray:
    """The D×D formula of one sample: Cholesky, and the Denman–Beavers iteration for the root."""
    H = dense(U, s, damping)
    if variant == MATVEC:
        return H @ wide(v)
    if variant == SOLVE:
        low, x = cholesky(H), wide(v).copy()
        for i in range(len(x)):
            x[i] = (x[i] - low[i, :i] @ x[:i]) / low[i, i]
        for i in reversed(range(len(x))):
            x[i] = (x[i] - low[i + 1 :, i] @ x[i + 1 :]) / low[i, i]
        return x
    root, inverse_root = H, np.eye(len(H), dtype=LD)
    for _ in range(40):
        root, inverse_root = (root + inverse(inverse_root)) / 2, (inverse_root + inverse(root)) / 2
    return inverse_root @ wide(v)


def dense_logdet(U, s, damping) -> LD:
    return 2 * np.log(np.diag(cholesky(dense(U, s, damping)))).sum()
