"""Definition of the Gauss–Newton ops, in plain differentiable PyTorch."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def softmax_head_hvp(x: Tensor, p: Tensor, G: Tensor) -> Tensor:
    """(p⊙z − p Σ_c(p⊙z))ᵀ x / n with z = x Gᵀ; x [*, n, d], p [*, n, C], G [*, C, d] -> [*, C, d]."""
    weighted = p * (x @ G.mT)  # [*, n, C]
    r = weighted - p * weighted.sum(-1, keepdim=True)
    return r.mT @ x / max(x.shape[-2], 1)


def softmax_head_hvp_backward(
    grad: Tensor, x: Tensor, p: Tensor, G: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [n, d] and p [n, C] for `grad` [C, d]; that of G is `softmax_head_hvp(x, p, grad)`."""
    if not any(wants):
        return None, None
    n = max(x.shape[-2], 1)
    z, u = x @ G.mT, x @ grad.mT  # [n, C]
    mean_z, mean_u = (p * z).sum(-1, keepdim=True), (p * u).sum(-1, keepdim=True)  # [n, 1]
    d_x = ((p * (z - mean_z)) @ grad + (p * (u - mean_u)) @ G) / n if wants[0] else None
    d_p = (u * z - u * mean_z - z * mean_u) / n if wants[1] else None
    return d_x, d_p


def gram_pair(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """xᵀx [*, i, i] and gᵀx [*, o, i] in float64; x [*, b, i], g [*, b, o]."""
    wide = x.double()
    return wide.mT @ wide, g.double().mT @ wide


def gram_pair_backward(
    d_gram: Tensor, d_cross: Tensor, g: Tensor, x: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of g and x, in their dtype; d_gram [i, i] and d_cross [o, i] in float64."""
    cross = d_cross.to(x.dtype)
    d_g = x @ cross.mT if wants[0] else None
    d_x = x @ (d_gram + d_gram.mT).to(x.dtype) + g @ cross if wants[1] else None
    return d_g, d_x


def solve(matrix: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """matrix⁻¹ right by Cholesky, and `info` (not 0: the matrix is not positive definite, the result is NaN).

    matrix [*, m, m], right [*, m, k], float64. Batched LU is no alternative: see the contracts of the library.
    """
    factor, info = torch.linalg.cholesky_ex(matrix)
    found = torch.cholesky_solve(right, factor)
    return torch.where((info == 0)[..., None, None], found, torch.nan), info


def damped(gram: Tensor, rows: int, damping: Tensor) -> Tensor:
    """gram / rows + λI, float64; `damping` 0-dim, on the CPU or beside the data."""
    # A number of the host scales a tensor of a GPU without a copy, which would wait.
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return gram / max(rows, 1) + damping * eye


def dual(g: Tensor, x: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """gᵀ (xxᵀ/b + λI)⁻¹ x, equal to the definition, where b < i: a b × b system. And `info` of `solve`."""
    wide = x.double()
    found, info = solve(damped(wide @ wide.mT, x.shape[-2], damping), g.double())  # [*, b, o]
    return found.mT @ wide, info


def primal(gram: Tensor, cross: Tensor, rows: int, damping: Tensor) -> tuple[Tensor, Tensor]:
    """cross (gram/rows + λI)⁻¹, [*, o, i], and `info` of `solve`."""
    found, info = solve(damped(gram, rows, damping), cross.mT)
    return found.mT.contiguous(), info


def damped_gram_solve(g: Tensor, x: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """gᵀ x (xᵀx/b + λI)⁻¹ in x's dtype, all of it in float64, and `info` of `solve`."""
    rows, columns = x.shape[-2:]
    if rows < columns:
        found, info = dual(g, x, damping)
    else:
        found, info = primal(*gram_pair(g, x), rows, damping)
    return found.to(x.dtype), info
