"""Definition of the step behind every sampler of the Langevin family, in plain differentiable PyTorch.

One form holds them all. With sources s_0 = sample, s_1 … = outputs (of the model), noise ξ and prev p, per sample,

    y  = clamp(Σ Y_j s_j, ±bound)                  only if `clipped`: x₀, or another converted output
    e  = Σ D_j s_j + D_ξ ξ + D_y y                 the direction
    a  = Σ A_j s_j + A_ξ ξ + A_y y
    x' = a + w·LM(e; p)                            the new sample

LM is the Levenberg–Marquardt–Langevin direction of `lm_direction`; without p, at κ = 0 (γ = 0) or at w = 0 it is e
itself, and p is not looked at. In the variant SNR it is h·e + √(2hT)·p with h = 2(r‖p‖/‖e‖)², where p is the noise.
A coefficient that is exactly 0 leaves its tensor unread, whatever it holds. In a guided step s_1 stands for s_1 − s_2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import frame, hessian
from .noise import normal

Tensor = torch.Tensor

KEEP_NORM, EXTRAPOLATE, SNR = hessian.KEEP_NORM, hessian.EXTRAPOLATE, 3
# What is wanted beside x': the direction in the dtype of the model or of the state, y, and x' a second time behind it.
DIRECTION, STATE_DIRECTION, CONVERTED, DOUBLED = 1, 2, 4, 8
# And how the outputs are taken: the first as its residual against the second.
GUIDED = 16


class Columns(NamedTuple):
    """Where the numbers of a step stand in `coef`: (first, second, w, A…, D…, A_ξ, D_ξ, A_y, D_y, bound, Y…).

    first, second: λ and κ; γ and nothing; r and T. The noise columns and those of y are there where the step has them.
    """

    sources: int
    noisy: bool
    clipped: bool

    @property
    def a(self) -> slice:
        """A_0 …"""
        return slice(3, 3 + self.sources)

    @property
    def d(self) -> slice:
        """D_0 …"""
        return slice(3 + self.sources, 3 + 2 * self.sources)

    @property
    def noise(self) -> int:
        """A_ξ; D_ξ stands behind it."""
        return 3 + 2 * self.sources

    @property
    def y(self) -> int:
        """A_y; D_y, the bound and Y stand behind it."""
        return self.noise + (2 if self.noisy else 0)

    @property
    def total(self) -> int:
        """How many columns there are."""
        return self.y + (3 + self.sources if self.clipped else 0)


def sum_of(coefficients: Tensor, rows: Sequence[Tensor], skip: bool) -> Tensor:
    """Σ_j c_j·row_j, [B, D]; coefficients [B, k] are rounded to the type of the rows; `skip`: 0 leaves one unread."""
    total = torch.full_like(rows[0], -0.0)  # what a sum begins with that keeps the sign of a zero
    for j, row in enumerate(rows):
        c = coefficients[:, j : j + 1].to(row.dtype)
        if not skip:
            total = total + c * row
            continue
        used = c != 0  # a NaN behind a zero must not spoil derivatives either
        total = torch.where(used, total + c * torch.where(used, row, torch.zeros_like(row)), total)
    return torch.where((coefficients != 0).any(1, keepdim=True), total, total.abs()) if skip else total


def _asks_gradient(coef: Tensor) -> bool:
    """Whether a derivative to the numbers is asked: then 0 is a number like any other."""
    if coef.requires_grad and torch.is_grad_enabled():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(coef)


def lm_step(
    sample: Tensor,
    outputs: Sequence[Tensor],
    prev: Tensor | None,
    coef: Tensor,
    seed: Tensor | None,
    variant: int,
    wanted: int,
    clipped: bool,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', the direction, y); what is not wanted is [*batch, 0]. coef [m] or [B, m]: see `Columns`."""
    x = frame.flatten(sample, batch_dims)
    c = frame.scalars(coef, x.shape[0], x.device)
    skip = not _asks_gradient(coef)
    at = Columns(1 + len(outputs), seed is not None and variant != SNR, clipped)
    rows = [x, *(frame.flatten(t, batch_dims).to(x.dtype) for t in outputs)]
    if wanted & GUIDED:
        rows[1] = rows[1] - rows[2]
    on_a, on_d = c[:, at.a], c[:, at.d]
    p = None if prev is None else frame.flatten(prev, batch_dims).to(x.dtype)
    if seed is not None:
        xi = normal(seed, tuple(sample.shape), x.dtype, batch_dims).reshape(x.shape)
        if variant == SNR:
            p = xi
        else:
            rows.append(xi)
            on_a, on_d = (torch.cat([on, c[:, at.noise + i, None]], 1) for i, on in enumerate((on_a, on_d)))
    y = None
    if clipped:
        y = sum_of(c[:, at.y + 3 :], rows[: at.sources], skip)
        bound = c[:, at.y + 2, None].to(y.dtype)
        y = torch.minimum(torch.maximum(y, -bound), bound)
        rows.append(y)
        on_a, on_d = (torch.cat([on, c[:, at.y + i, None]], 1) for i, on in enumerate((on_a, on_d)))

    e = sum_of(on_d, rows, skip)
    weight = c[:, 2:3]
    out = sum_of(on_a + weight * on_d, rows, skip)
    if p is not None:
        bent, used = _bent(variant, e, p, c, sum_of(on_a, rows, skip), skip)
        out = torch.where(used[:, None], bent, out)
    new = frame.store(out, sample)
    if wanted & DOUBLED:
        new = torch.cat([new, new])
    nothing = [sample.new_empty((*sample.shape[:batch_dims], 0)) for _ in range(2)]
    model = outputs[0].dtype if outputs else sample.dtype
    direction, converted = nothing
    if wanted & (DIRECTION | STATE_DIRECTION):
        direction = frame.store(e, sample, sample.dtype if wanted & STATE_DIRECTION else model)
    if y is not None and wanted & CONVERTED:
        converted = frame.store(y, sample, model)
    return new, direction, converted


def _bent(variant: int, e: Tensor, p: Tensor, c: Tensor, a: Tensor, skip: bool) -> tuple[Tensor, Tensor]:
    """a + w·LM(e; p), and for which samples it counts, [B]."""
    zero = torch.zeros_like(e)
    if variant == SNR:
        return snr_sum(e, p, c, a), torch.ones_like(c[:, 0], dtype=torch.bool)
    gate = c[:, 0] if variant == EXTRAPOLATE else c[:, 1]
    used = (gate != 0) & (c[:, 2] != 0) if skip else torch.ones_like(gate, dtype=torch.bool)
    r = torch.where(used[:, None], p - e, zero)
    c0, c1 = hessian.lm_coefficients(
        variant, *hessian._dots(e, r), c[:, :1] if variant == EXTRAPOLATE else c[:, :2]
    )
    c0, c1 = ((c[:, 2] * k).to(e.dtype)[:, None] for k in (c0, c1))
    return a + (c0 * e + c1 * r), used


def snr_sum(e: Tensor, xi: Tensor, c: Tensor, a: Tensor) -> Tensor:
    """a + h·e + √(2hT)·ξ, h = 2(r‖ξ‖/‖e‖)²; h = 0 where e = 0."""
    n, size = frame.dot(e, e), frame.dot(xi, xi)
    empty = n == 0
    h = (
        2
        * c[:, 0] ** 2
        * torch.where(empty, torch.zeros_like(n), size / torch.where(empty, torch.ones_like(n), n))
    )
    heat = h * c[:, 1]
    none = heat == 0
    scale = torch.where(
        none, torch.zeros_like(heat), (2 * torch.where(none, torch.ones_like(heat), heat)).sqrt()
    )
    return a + h.to(e.dtype)[:, None] * e + scale.to(e.dtype)[:, None] * xi
