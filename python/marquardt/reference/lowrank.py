"""Definition of the low-rank Hessian ops in plain differentiable PyTorch: H = λI + U diag(s) Uᵀ per sample.

Rows, scalar products and sums are float64 whatever the inputs are: for g in the span of U everything but λ/(λ + s‖u‖²)
of g cancels. The k × k stage uses G = U Uᵀ (rows are vectors) and is written with plain sums and products of G and s,
so that rank-deficient U, repeated eigenvalues and s_j = 0 are like any other point, to any derivative:

    H⁻¹ g     = (g − U a)/λ,               (λI + S G) a = S U g
    H^(−½) z  = (z − U S X⁻¹ U z)/√λ,       X = M^½ (√λ I + M^½),   M = λI + G S
    log det H = D log λ + log det(I + S G/λ)
"""

from __future__ import annotations

import math
from typing import Any

import torch

from ..layout import batch_and_size, is_dense, output_strides
from . import frame

Tensor = torch.Tensor

MATVEC, SOLVE, INV_SQRT = 0, 1, 2
NAMES = ("lowrank_matvec", "lowrank_solve", "lowrank_inv_sqrt")
ZERO = 1e-12  # eigenvalues below this part of the largest are none


def is_shared(basis: Tensor, v: Tensor, batch_dims: int) -> bool:
    """Whether the batch of v shares the stack [k, *sample]."""
    return basis.dim() == v.dim() - batch_dims + 1


def wide(t: Tensor, batch: int, size: int) -> Tensor:
    """[B, D] float64 (float32 where the device has none)."""
    return t.reshape(batch, size).to(frame.scalar_dtype(t.device))


def rows_of(basis: Tensor, batch: int, size: int, shared: bool) -> Tensor:
    """[B, k, D] float64; a shared stack is expanded."""
    flat = basis.reshape(basis.shape[0], size) if shared else basis.reshape(batch, basis.shape[1], size)
    flat = flat.to(frame.scalar_dtype(basis.device))
    return flat.expand(batch, *flat.shape) if shared else flat


def unpack(v: Tensor, basis: Tensor, coef: Tensor, batch_dims: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """v [B, D], U [B, k, D], λ [B], s [B, k]."""
    batch, size = batch_and_size(v, batch_dims)
    U = basis.reshape(1, *basis.shape) if batch_dims == 0 else basis
    shared = batch_dims == 1 and is_shared(basis, v, batch_dims)
    numbers = frame.scalars(coef, batch, v.device)
    return wide(v, batch, size), rows_of(U, batch, size, shared), numbers[:, 0], numbers[:, 1:]


def products(U: Tensor, v: Tensor) -> Tensor:
    """⟨u_j, v⟩, [B, k]."""
    return (U * v.unsqueeze(1)).sum(-1)


def gram(U: Tensor) -> Tensor:
    """⟨u_i, u_j⟩, [B, k, k]."""
    return U @ U.transpose(-1, -2)


def combine(c: Tensor, U: Tensor) -> Tensor:
    """Σ_j c_j u_j, [B, D]."""
    return (c.unsqueeze(-1) * U).sum(1)


def identity_like(G: Tensor) -> Tensor:
    """I for each of [B, k, k]."""
    return torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G)


def definite(G: Tensor, damping: Tensor, s: Tensor) -> Tensor:
    """info [B, 1] float64: 0, −1 for a damping that is not positive, j + 1 where row j of U breaks H.

    The signs of the pivots of λJ + T G T (T = √|s|, J the signs of s, positive s first) tell; NaN is not an error.
    """
    with torch.no_grad():
        G, damping, s = G.detach(), damping.detach(), s.detach()
        k = s.shape[1]
        order = torch.argsort((s < 0).to(torch.int8), dim=1, stable=True)
        s = s.gather(1, order)
        t, sign = s.abs().sqrt(), torch.where(s < 0, -1.0, 1.0).to(s.dtype)
        A = G.gather(1, order[:, :, None].expand_as(G)).gather(2, order[:, None, :].expand_as(G))
        A = t[:, :, None] * A * t[:, None, :] + torch.diag_embed(damping[:, None] * sign)
        info = torch.zeros_like(damping)
        for j in range(k):
            # λ + (positive semidefinite) has no positive pivot below λ: what rounding left there is lifted.
            pivot = torch.where(sign[:, j] > 0, torch.maximum(A[:, j, j], damping), A[:, j, j])
            failed = (info == 0) & (pivot * sign[:, j] <= 0)
            info = torch.where(failed, order[:, j].to(info.dtype) + 1, info)
            A = A - A[:, :, j, None] * A[:, None, j, :] / pivot[:, None, None]
        info = torch.where(damping > 0, info, torch.full_like(info, -1.0))
        finite = torch.isfinite(G).flatten(1).all(1) & torch.isfinite(s).all(1) & torch.isfinite(damping)
        return torch.where(finite, info, torch.zeros_like(info))[:, None]


def raise_if_indefinite(op: str, info: Tensor) -> None:
    """The error of `check=True`, on the CPU, where looking costs nothing."""
    from .. import errors

    if info.device.type != "cpu" or torch.compiler.is_compiling():
        return
    if type(info) is not Tensor or torch._C._functorch.is_functorch_wrapped_tensor(info):
        return
    bad = [(b, int(x)) for b, x in enumerate(info.flatten().tolist()) if x != 0]
    if bad:
        rule = "be positive definite in every sample (or check=False be given, which makes such samples NaN)"
        got = f"sample {bad[0][0]}, where row {bad[0][1] - 1} of U breaks it"
        raise errors.value(op, "H = damping·I + U diag(s) Uᵀ", rule, got)


def square_root(M: Tensor) -> Tensor:
    """M^½ of matrices [B, k, k] with positive eigenvalues, by the product form of Denman and Beavers' iteration."""
    k = M.shape[-1]
    eye = identity_like(M)
    X, P = M, M
    for step in range(13):
        inverse = torch.linalg.inv(P)
        if step < 7:  # scaled by the determinant, so that the eigenvalues of P come near 1 in a few steps
            scale = P.detach().det().abs().clamp(1e-300, 1e300) ** (-0.5 / k)
            scale = torch.where(torch.isfinite(scale), scale, torch.ones_like(scale))[:, None, None]
            X, P, inverse = scale * X, scale * scale * P, inverse / (scale * scale)
        X = 0.5 * X @ (eye + inverse)
        P = 0.5 * (eye + 0.5 * (P + inverse))
    return X


def value_of(v: Tensor, U: Tensor, damping: Tensor, s: Tensor, variant: int) -> Tensor:
    """H v, H⁻¹ v or H^(−½) v, [B, D] float64."""
    inner = products(U, v)
    if variant == MATVEC:
        return damping[:, None] * v + combine(s * inner, U)
    if U.shape[1] == 0:
        return v / (damping if variant == SOLVE else damping.sqrt())[:, None]
    G = gram(U)
    if variant == SOLVE:
        M = damping[:, None, None] * identity_like(G) + s[:, :, None] * G
        a = torch.linalg.solve(M, (s * inner)[:, :, None])[:, :, 0]
        return (v - combine(a, U)) / damping[:, None]
    root = damping.sqrt()[:, None, None]
    half = square_root(damping[:, None, None] * identity_like(G) + G * s[:, None, :])
    X = half @ (root * identity_like(G) + half)
    a = s * torch.linalg.solve(X, inner[:, :, None])[:, :, 0]
    return (v - combine(a, U)) / damping.sqrt()[:, None]


def apply(
    v: Tensor, basis: Tensor, coef: Tensor, variant: int, check: bool, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """(H v, H⁻¹ v or H^(−½) v, info [B, 1]); samples whose H is not positive definite are NaN."""
    x, U, damping, s = unpack(v, basis, coef, batch_dims)
    info = torch.zeros_like(damping)[:, None].detach()
    if variant != MATVEC:
        info = definite(gram(U), damping, s)
        if check and x.shape[1] > 0:
            raise_if_indefinite(NAMES[variant], info)
        bad = info != 0
        # A harmless H, so that nothing but the NaN put in at the end comes of a bad one.
        damping, s = torch.where(bad[:, 0], 1.0, damping), torch.where(bad, 0.0, s)
    out = value_of(x, U, damping, s, variant)
    if variant != MATVEC:
        out = torch.where(bad, float("nan"), out)
    return frame.store(out, v), info


def vjp(
    grad: Tensor, v: Tensor, basis: Tensor, coef: Tensor, variant: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """Derivatives of ⟨grad, f(H) v⟩ by the rows of U, per sample, and by (damping, s…), [B, 1 + k]."""
    x, U, damping, s = unpack(v, basis, coef, batch_dims)
    bad = torch.zeros_like(damping)[:, None] != 0
    if variant != MATVEC:
        bad = definite(gram(U), damping, s) != 0
        damping, s = torch.where(bad[:, 0], 1.0, damping), torch.where(bad, 0.0, s)
    _, pullback = _vjp(lambda U, damping, s: value_of(x, U, damping, s, variant), U, damping, s)
    d_U, d_damping, d_s = pullback(wide(grad, *x.shape))
    d_coef = torch.where(bad, float("nan"), torch.cat([d_damping[:, None], d_s], dim=1))
    return store_stack(torch.where(bad[:, :, None], float("nan"), d_U), grad, basis.dtype, batch_dims), d_coef


_vjp: Any = torch.func.vjp


def stack_strides(v: Tensor, count: int, batch_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a stack [B, count, *sample] whose samples lie like those of v, if these are dense."""
    inner_shape = tuple(v.shape[batch_dims:])
    inner = tuple(v.stride()[batch_dims:])
    size = batch_and_size(v, batch_dims)[1]
    if v.numel() == 0 or not is_dense(torch.empty_strided(inner_shape, inner, device="meta")):
        inner = output_strides(torch.empty(inner_shape, device="meta"))
    size = max(size, 1)
    if batch_dims == 0:
        return (count, *inner_shape), (size, *inner)
    return (v.shape[0], count, *inner_shape), (max(count * size, 1), size, *inner)


def store_stack(rows: Tensor, v: Tensor, dtype: torch.dtype, batch_dims: int) -> Tensor:
    """[B, count, D] as a stack in the order of v's samples."""
    shape, strides = stack_strides(v, rows.shape[1], batch_dims)
    out = rows.to(dtype).reshape(shape)
    if out.stride() == strides:
        return out
    return torch.empty_strided(shape, strides, dtype=dtype, device=rows.device).copy_(out)


def _alone(basis: Tensor, coef: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """U [B, k, D] and the scalars [B, m] of a call about the stack itself."""
    U = basis if batch_dims else basis.unsqueeze(0)
    batch, k = U.shape[:2]
    size = math.prod(U.shape[2:])
    flat = U.reshape(batch, k, size).to(frame.scalar_dtype(basis.device))
    return flat, frame.scalars(coef, batch, basis.device)


def logdet_of(U: Tensor, damping: Tensor, s: Tensor) -> Tensor:
    """log det H, [B]."""
    M = identity_like(gram(U)) + s[:, :, None] * gram(U) / damping[:, None, None]
    return U.shape[-1] * damping.log() + torch.linalg.slogdet(M)[1]


def logdet(basis: Tensor, coef: Tensor, check: bool, batch_dims: int) -> Tensor:
    """(log det H, info), [B, 2] float64."""
    U, numbers = _alone(basis, coef, batch_dims)
    damping, s = numbers[:, 0], numbers[:, 1:]
    info = definite(gram(U), damping, s)
    if check:
        raise_if_indefinite("lowrank_logdet", info)
    bad = info != 0
    value = logdet_of(U, torch.where(bad[:, 0], 1.0, damping), torch.where(bad, 0.0, s))
    return torch.cat([torch.where(bad, float("nan"), value[:, None]), info], dim=1)


def logdet_vjp(basis: Tensor, coef: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Derivatives of grad·log det H by U and (damping, s…), with coef = (damping, s…, grad)."""
    U, numbers = _alone(basis, coef, batch_dims)
    damping, s = numbers[:, 0], numbers[:, 1:-1]
    bad = definite(gram(U), damping, s) != 0
    damping, s = torch.where(bad[:, 0], 1.0, damping), torch.where(bad, 0.0, s)
    _, pullback = _vjp(logdet_of, U, damping, s)
    d_U, d_damping, d_s = pullback(numbers[:, -1])
    row = basis.select(batch_dims, 0)
    d_coef = torch.where(bad, float("nan"), torch.cat([d_damping[:, None], d_s], dim=1))
    d_U = torch.where(bad[:, :, None], float("nan"), d_U)
    return store_stack(d_U, row, basis.dtype, batch_dims), d_coef


def update(v: Tensor, basis: Tensor, coef: Tensor, rank: int, batch_dims: int) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of decay·U diag(s) Uᵀ + weight·v vᵀ: rows, and s [B, rank] descending."""
    x, U, decay, rest = unpack(v, basis, coef, batch_dims)
    weight, s = rest[:, 0], rest[:, 1:]
    t = torch.cat([weight[:, None], decay[:, None] * s], dim=1).sqrt()
    rows = torch.cat([x[:, None], U], dim=1) * t[:, :, None]  # their Gram matrix is that of the sum
    batch, n, size = rows.shape
    made, found = rows.new_zeros((batch, rank, size)), rows.new_zeros((batch, rank))
    if batch and size and rank:
        clean = torch.isfinite(rows).flatten(1).all(1)
        left, sigma, right = torch.linalg.svd(
            torch.where(clean[:, None, None], rows, 0.0), full_matrices=False
        )
        count = min(rank, sigma.shape[1])
        nu = sigma[:, :count] ** 2
        there = (nu > ZERO * nu[:, :1]) & (nu > 0)
        c = t[:, :, None] * left[:, :, :count] / torch.where(there, sigma[:, :count], 1.0)[:, None]
        top = c.gather(1, c.abs().argmax(dim=1, keepdim=True))[:, 0]  # the largest coefficient of each row
        sign = torch.where(top < 0, -1.0, 1.0).to(nu.dtype)
        made[:, :count] = torch.where(there[:, :, None], sign[:, :, None] * right[:, :count], 0.0)
        found[:, :count] = torch.where(there, nu, 0.0)
        made = torch.where(clean[:, None, None], made, float("nan"))
        found = torch.where(clean[:, None], found, float("nan"))
    return store_stack(made, v, v.dtype, batch_dims), found
