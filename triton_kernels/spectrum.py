"""The eigenproblems of the low-rank family, batched float64 `torch.linalg.eigh` of k × k matrices on the data's device.

H^(−1/2), its derivatives, and the update by a rank. torch.linalg looks at the result, so these calls wait for the
device and cannot be captured in a CUDA graph. Samples with NaN or infinity are taken out before and spoilt behind:
eigh would refuse the whole batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor

TINY = 2e-14  # of the largest eigenvalue of the Gram of unit rows: what is below is rounding
ZERO = 1e-12  # eigenvalues of an update below this part of the largest are none


def finite(*tables: Tensor) -> Tensor:
    """[B] bool."""
    parts = [torch.isfinite(t).flatten(1).all(1) for t in tables]
    return torch.stack(parts).all(0)


def where(good: Tensor, a: Tensor, other: float) -> Tensor:
    """`a` [B, …] with the samples that are not good replaced."""
    return torch.where(good.reshape(-1, *(1,) * (a.dim() - 1)), a, other)


@dataclass(frozen=True)
class Spectrum:
    """Eigenpairs of H on the span of U: μ [B, k], q_i = Σ_l to_rows[l, i] u_l, ρ_ij = ⟨q_i, u_j⟩ (both [B, k, k]).

    Directions that the rows do not span are q = 0 with μ = λ, and add nothing anywhere.
    """

    mu: Tensor
    to_rows: Tensor
    rho: Tensor

    @staticmethod
    def of(G: Tensor, damping: Tensor, s: Tensor) -> Spectrum:
        """G = Ũ Ũᵀ of the rows scaled to 1 is V Λ Vᵀ; on Λ^(−½) Vᵀ Ũ, H = λI + B, B = Λ^½ Vᵀ S V Λ^½ = W (μ − λ) Wᵀ.

        Rows of very different length stay apart by the scaling; where all s ≥ 0 no eigenvalue of H is below λ, whatever
        eigh rounds to. Everything is finite.
        """
        norm = G.diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()  # [B, k]
        length = torch.where(norm > 0, norm, 1.0)
        values, V = torch.linalg.eigh(G / length[:, :, None] / length[:, None, :])
        there = (values > TINY * values[:, -1:]) & (values > 0)
        root = torch.where(there, values, 0.0).sqrt()
        R = root[:, :, None] * V.mT  # [B, k, k], ⟨direction i, ũ_j⟩
        B = (R * (s * length * length)[:, None, :]) @ R.mT
        shift, W = torch.linalg.eigh(0.5 * (B + B.mT))
        shift = torch.where((s >= 0).all(1, keepdim=True), shift.clamp(min=0.0), shift)
        inverse = torch.where(there, 1.0 / torch.where(there, root, 1.0), 0.0)
        to_rows = (V * inverse[:, None, :]) @ W / length[:, :, None]
        return Spectrum(damping[:, None] + shift, to_rows, W.mT @ R * length[:, None, :])


def divided_difference(root_a: Tensor, root_b: Tensor) -> Tensor:
    """f[a, b] of f(x) = x^(−1/2), from the roots of a and b."""
    return -1.0 / (root_a * root_b * (root_a + root_b))


def inv_sqrt(gram: Tensor, numbers: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients [B, 1, n] of H^(−1/2) v over (v, U), info), from gram [B, n, n], n = 1 + k, and (λ, s…) [B, n]."""
    G, p, damping, s = gram[:, 1:, 1:], gram[:, 0, 1:], numbers[:, 0], numbers[:, 1:]
    good = finite(G, numbers) & (info[:, 0] == 0)
    safe = torch.where(good, damping, 1.0)
    found = Spectrum.of(where(good, G, 0.0), safe, where(good, s, 0.0))
    root, m = safe.sqrt()[:, None], found.mu.sqrt()
    a = (found.to_rows.mT @ p[:, :, None])[:, :, 0] * (root - m) / (root * m)
    c = torch.cat([1.0 / root, (found.to_rows @ a[:, :, None])[:, :, 0]], dim=1)
    # Definite by its pivots, not by its eigenvalues: on the edge.
    edge = (good & (found.mu <= 0).any(1))[:, None]
    info = torch.where(edge, float(s.shape[1]), info)
    return where(good & ~edge[:, 0], c, float("nan"))[:, None, :], info


def inv_sqrt_vjp(gram: Tensor, numbers: Tensor, info: Tensor) -> tuple[Tensor, Tensor]:
    """(coefficients [B, k, 2 + k] of d u_j over (grad, v, U), (d λ, d s…) [B, 1 + k]).

    P = ∂⟨grad, H^(−1/2) v⟩/∂H in the eigenbasis (Daleckii and Krein), h the divided differences of x^(−1/2):
      P u_j = Σ_i q_i (F_ij − α_j b_i − β_j a_i) + α_j v + β_j grad,
      F = E ρ,  E_il = ½ h(μ_i, μ_l)(a_i b_l + a_l b_i),
      α_j = ½ Σ_i h(μ_i, λ) ρ_ij a_i,  β_j = ½ Σ_i h(μ_i, λ) ρ_ij b_i,  a = ⟨q, grad⟩, b = ⟨q, v⟩;
    d u_j = 2 s_j P u_j, d s_j = ⟨u_j, P u_j⟩ = Σ_i ρ_ij F_ij, d λ = tr P.
    """
    damping, s = numbers[:, 0], numbers[:, 1:]
    good = finite(gram, numbers) & (info[:, 0] == 0)
    gram, safe, s = where(good, gram, 0.0), torch.where(good, damping, 1.0), where(good, s, 0.0)
    found = Spectrum.of(gram[:, 2:, 2:], safe, s)
    root, m = safe.sqrt()[:, None], found.mu.sqrt()
    ab = gram[:, :2, 2:] @ found.to_rows  # [B, 2, k]
    a, b = ab[:, 0], ab[:, 1]
    outer = a[:, :, None] * b[:, None, :]
    E = 0.5 * divided_difference(m[:, :, None], m[:, None, :]) * (outer + outer.mT)
    F = E @ found.rho
    half = 0.5 * divided_difference(m, root)[:, :, None] * found.rho  # [B, k, k]
    alpha, beta = (half * a[:, :, None]).sum(1), (half * b[:, :, None]).sum(1)
    P = F - b[:, :, None] * alpha[:, None, :] - a[:, :, None] * beta[:, None, :]
    C = (
        torch.cat([beta[:, :, None], alpha[:, :, None], (found.to_rows @ P).mT], dim=2)
        * (2.0 * s)[:, :, None]
    )
    d_damping = -0.5 * (a * b / (found.mu * m)).sum(1)
    d_damping = d_damping - 0.5 * (gram[:, 0, 1] - (a * b).sum(1)) / (safe * root[:, 0])
    d_numbers = torch.cat([d_damping[:, None], (found.rho * F).sum(1)], dim=1)
    return where(good, C, float("nan")), where(good, d_numbers, float("nan"))


def update(gram: Tensor, numbers: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(coefficients [B, rank, n] of the new rows over (v, U), the new s [B, rank]), from (decay, weight, s…)

    T G T = Σ ν_i w_i w_iᵀ; the new rows are Σ_j (t_j w_ij/√ν_i) r_j. eigh finds ν_i to a few 1e-16·ν_1, so a row is of
    length 1 to about 1e-16·ν_1/ν_i.
    """
    batch, n = gram.shape[:2]
    t = torch.cat([numbers[:, 1:2], numbers[:, :1] * numbers[:, 2:]], dim=1).sqrt()
    A = t[:, :, None] * gram * t[:, None, :]
    good = finite(A)
    nu, W = torch.linalg.eigh(where(good, A, 0.0))
    nu, W = nu.flip(1), W.flip(2)  # descending
    there = (nu > ZERO * nu[:, :1]) & (nu > 0)
    scale = torch.where(there, 1.0 / torch.where(there, nu, 1.0).sqrt(), 0.0)
    C = (where(good, t, 0.0)[:, :, None] * W * scale[:, None, :]).mT  # [B, n, n], a row of it a new row
    top = C.gather(2, C.abs().argmax(dim=2, keepdim=True))
    C = torch.where(top < 0, -C, C)
    C = where(good, C, float("nan"))
    nu = where(good, torch.where(there, nu, 0.0), float("nan"))
    count = min(rank, n)
    matrix, found = gram.new_zeros((batch, rank, n)), gram.new_zeros((batch, rank))
    matrix[:, :count], found[:, :count] = C[:, :count], nu[:, :count]
    matrix = where(good, matrix, float("nan"))
    return matrix, where(good, found, float("nan"))
