"""Steps of samplers as published, in the order of their operations: what the rows of bench_steps stand beside.

Schedules are float32 tables on the CPU, entered by an index, as in schedulers; the rest are operations of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .peers import published_lm


@functools.cache
def cumulative(count: int = 1000) -> Tensor:
    """ᾱ [1000], the scaled linear schedule of latent diffusion, float32."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, count, dtype=torch.float32) ** 2
    return torch.cumprod(1.0 - betas, dim=0)


def guided(cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance, a pass of its own for each operation."""
    return cond if uncond is None else uncond + scale * (cond - uncond)


def published_ddim(
    sample: Tensor, cond: Tensor, uncond: Tensor | None, prev: Tensor | None, table: Tensor, now: int, then: int,
    scale: float, damping: float, kappa: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', ε): guidance, x₀, variance, the LM correction, the direction, the sum. prev None: plain DDIM."""
    eps = guided(cond, uncond, scale)
    alpha_bar, next_bar = table[now], table[then]
    beta = 1 - alpha_bar
    x0 = (sample - beta**0.5 * eps) / alpha_bar**0.5
    variance = (1 - next_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_bar)
    deviation = 0.0 * variance**0.5
    bent = eps if prev is None else published_lm(eps, prev, damping, kappa)
    return next_bar**0.5 * x0 + (1 - next_bar - deviation**2) ** 0.5 * bent, eps


def published_dpm3(
    sample: Tensor, outputs: Sequence[Tensor], prev: Tensor, table: Tensor, times: Sequence[int], damping: float,
    kappa: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(x', N): the third-order update of DPM-Solver on ε and the LM correction; times (target, s0, s1, s2)."""
    alpha = [table[i] ** 0.5 for i in times]
    sigma = [(1 - table[i]) ** 0.5 for i in times]
    lam = [torch.log(a) - torch.log(s) for a, s in zip(alpha, sigma, strict=True)]
    h, h0, h1 = lam[0] - lam[1], lam[1] - lam[2], lam[2] - lam[3]
    r0, r1 = h0 / h, h1 / h
    m0, m1, m2 = outputs
    first, older = (1.0 / r0) * (m0 - m1), (1.0 / r1) * (m1 - m2)
    d1 = first + (r0 / (r0 + r1)) * (first - older)
    d2 = (1.0 / (r0 + r1)) * (first - older)
    grown = torch.exp(h)
    increment = (
        -(sigma[0] * (grown - 1.0)) * m0
        - (sigma[0] * ((grown - 1.0) / h - 1.0)) * d1
        - (sigma[0] * ((grown - 1.0 - h) / h**2 - 0.5)) * d2
    )
    return (alpha[0] / alpha[1]) * sample + published_lm(increment, prev, damping, kappa), increment


def published_flow(
    sample: Tensor, velocity: Tensor, prev: Tensor, dt: float, damping: float, kappa: float
) -> tuple[Tensor, Tensor]:
    """(x', v): the Euler step in float32, cast back."""
    bent = published_lm(velocity.float(), prev, damping, kappa)
    return (sample.float() + dt * bent).to(velocity.dtype), velocity


def eager_langevin(x: Tensor, score: Tensor, step: float, temperature: float) -> Tensor:
    """x + h·s + √(2hT)·randn."""
    return x + step * score + (2 * step * temperature) ** 0.5 * torch.randn_like(x)


def eager_threshold(x0: Tensor, ratio: float, maximum: float) -> Tensor:
    """Dynamic thresholding."""
    flat = x0.reshape(x0.shape[0], -1)
    s = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1.0, max=maximum).unsqueeze(1)
    return (flat.clamp(-s, s) / s).reshape(x0.shape)
