"""The same mathematics as its users write it today.

Tolerances (norm-wise, worst sample). The published LM formula in float32 cancels: the rescaled difference
u = ε − ε̃c/(λ+m) loses the digits by which |u| is smaller than |ε|, and at κ = 0 all of them. A peer within
`TOLERANCE` is called the same result; beyond it the table marks it `inexact` and its time still stands.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-2}


@functools.cache  # one wrapper for all sets of buffers of a row
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile with inductor in its default mode, one graph per shape; the gate pays for compiling.

    Static shapes are the kinder choice for the peer: a second shape would otherwise get a dynamic graph.
    """
    return torch.compile(function, dynamic=False)


def published_lm(eps: Tensor, prev: Tensor, damping: float, kappa: float | Tensor) -> Tensor:
    """The published LM correction in the order of its operations.

    eps, prev: [B, ...]; kappa a number or [B, 1, ...].

    ε̃ = κp + (1−κ)ε; u = ε − ε̃⟨ε,ε̃⟩/(λ+⟨ε̃,ε̃⟩); u·√⟨ε,ε⟩/√⟨u,u⟩. Every sum runs over the whole sample.
    """
    dims = tuple(range(1, eps.dim()))
    blend = kappa * prev + (1 - kappa) * eps  # [B, ...]
    n = torch.sum(eps * eps, dim=dims, keepdim=True)  # [B, 1, ...]
    m = torch.sum(blend * blend, dim=dims, keepdim=True)
    c = torch.sum(eps * blend, dim=dims, keepdim=True)
    part2 = blend * c / (damping + m)
    u = eps - part2
    return u * torch.sqrt(n) / torch.sqrt(torch.sum(u * u, dim=dims, keepdim=True))


def extrapolated_lm(eps: Tensor, prev: Tensor, gamma: float) -> Tensor:
    """The limit λ ≪ |ε|², as one would write it: d = (1 − γ⟨ε, ε−p⟩/n)ε + γ(ε − p), rescaled to |ε|."""
    dims = tuple(range(1, eps.dim()))
    difference = eps - prev
    n = torch.sum(eps * eps, dim=dims, keepdim=True)
    d = (1 - gamma * torch.sum(eps * difference, dim=dims, keepdim=True) / n) * eps + gamma * difference
    return d * torch.sqrt(n) / torch.sqrt(torch.sum(d * d, dim=dims, keepdim=True))


def with_gradients(function: Callable[..., Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """(out, d_eps, d_prev) of function(eps, prev, ...) for a given output gradient."""

    def run(grad: Tensor, eps: Tensor, prev: Tensor, *scalars: Any, **keywords: Any) -> tuple[Tensor, ...]:
        out = function(eps, prev, *scalars, **keywords)
        return out, *torch.autograd.grad(out, (eps, prev), grad)

    return run


def sum_of_products(
    terms: Sequence[Tensor], coefficients: Sequence[float], noise_scale: float = 0.0
) -> Tensor:
    """The body of a sampler's step: c₁x₁ + c₂x₂ + … + σ·randn."""
    out = coefficients[0] * terms[0]
    for c, term in zip(coefficients[1:], terms[1:], strict=True):
        out = out + c * term
    return out if noise_scale == 0.0 else out + noise_scale * torch.randn_like(terms[0])


def correlated_pair(
    shape: Sequence[int], dtype: torch.dtype, device: str, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """(eps, prev) as two consecutive noise predictions of a trajectory: correlation 0.9."""
    generator = torch.Generator().manual_seed(seed)
    eps, other = (torch.randn(*shape, generator=generator) for _ in range(2))
    prev = 0.9 * eps + math.sqrt(1 - 0.9**2) * other
    return eps.to(device, dtype), prev.to(device, dtype)
