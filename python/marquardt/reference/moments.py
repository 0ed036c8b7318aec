"""Definition of the Fisher moments in plain differentiable PyTorch: x = α·y + σ·ε, y one of the rows of a data set.

    ℓ_i = log ω_i − ‖x − α y_i‖²/2σ²,   w = softmax(ℓ),   ỹ_i = y_i − Σ w_j y_j

    log_density = log Σ exp ℓ_i − log Σ ω_i − (D/2) log 2πσ²
    mean        = Σ w_i y_i
    variance    = Σ w_i ‖ỹ_i‖²             the trace of the posterior's covariance C
    mvp         = Σ w_i ỹ_i ⟨ỹ_i, v⟩       C v

Distances are sums of squared differences in float64: expanded into products they would lose, at σ = 0.01 and 3072
dimensions, more than the logits of near neighbours differ by. What is behind it all is F = −∇² log q(x):

    score = −(x − α mean)/σ²,   F v = v/σ² − (α²/σ⁴) C v,   tr F = D/σ² − (α²/σ⁴) tr C

A `State` is what some of the rows say of one query. States of disjoint rows merge into that of their union.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import frame

Tensor = torch.Tensor


class State(NamedTuple):
    """What rows say of one query x [D] and of r directions v."""

    log_sum: Tensor  # log Σ exp ℓ_i; −inf where there was no row
    mean: Tensor  # [D]
    variance: Tensor  # a number, like log_sum
    mvp: Tensor  # [r, D]


def stored(data: Tensor, scale: float | None, shift: float | None) -> Tensor:
    """The rows [N, D] in float64; integers stand for scale·data + shift."""
    rows = data.reshape(data.shape[0], -1).to(frame.scalar_dtype(data.device))
    if scale is not None:
        rows = rows * scale
    return rows if shift is None else rows + shift


def seen(
    count: int,
    query: int,
    log_weights: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which rows the query may see, [N] bool. What the others hold is never looked at."""
    allowed = torch.ones(count, dtype=torch.bool, device=device)
    if log_weights is not None:
        allowed &= log_weights.detach() != -math.inf
    if mask is not None:
        allowed &= mask if mask.dim() == 1 else mask[query]
    if rows is not None:
        place = torch.arange(count, device=device)
        allowed &= (place >= rows[query, 0]) & (place < rows[query, 1])
    return allowed


def state_of(
    x: Tensor, rows: Tensor, alpha: Tensor, sigma: Tensor, v: Tensor, log_weights: Tensor | None = None
) -> State:
    """Of one query x [D], with directions v [r, D], over `rows` [n, D], n ≥ 1."""
    logits = -((x - alpha * rows).square().sum(1)) / (2 * sigma * sigma)
    if log_weights is not None:
        logits = logits + log_weights
    weights = logits.softmax(0)
    mean = weights @ rows
    apart = rows - mean
    products = apart @ v.T  # [n, r]
    return State(
        logits.logsumexp(0),
        mean,
        weights @ apart.square().sum(1),
        (weights[:, None] * products).T @ apart,
    )


def merged(one: State, two: State, v: Tensor) -> State:
    """The state of both sets of rows: means of means, and what is between them on top of what is within."""
    log_sum = torch.logaddexp(one.log_sum, two.log_sum)
    share = torch.exp(two.log_sum - log_sum)  # of the second
    gap = two.mean - one.mean
    between = share * (1 - share)
    return State(
        log_sum,
        one.mean + share * gap,
        one.variance + share * (two.variance - one.variance) + between * gap.square().sum(),
        one.mvp + share * (two.mvp - one.mvp) + between * (v @ gap)[:, None] * gap,
    )


def moments(
    x: Tensor,
    data: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    *,
    v: Tensor | None = None,
    log_weights: Tensor | None = None,
    mask: Tensor | None = None,
    rows: Tensor | None = None,
    scale: float | None = None,
    shift: float | None = None,
    block: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(log_density [B], mean [B, D], variance [B], mvp [B, r, D]) of queries x [B, D], α and σ [B], v [B, r, D].

    With `block` the rows are taken so many at a time, and the states merged in their order.
    """
    wide = frame.scalar_dtype(x.device)
    batch, size = x.shape[0], x[0].numel()
    x, alpha, sigma = x.reshape(batch, size).to(wide), alpha.to(wide), sigma.to(wide)
    v = x.new_zeros(batch, 0, size) if v is None else v.reshape(batch, -1, size).to(wide)
    every, numbers = stored(data, scale, shift), None if log_weights is None else log_weights.to(wide)
    found: list[State] = []
    for b in range(batch):
        allowed = seen(every.shape[0], b, numbers, mask, rows, x.device).nonzero()[:, 0]
        if allowed.numel() == 0:
            raise ValueError(f"query {b} may see no row")
        state: State | None = None
        for part in allowed.split(block or allowed.numel()):
            inside = None if numbers is None else numbers[part]
            more = state_of(x[b], every[part], alpha[b], sigma[b], v[b], inside)
            state = more if state is None else merged(state, more, v[b])
        assert state is not None
        total = x.new_tensor(math.log(allowed.numel())) if numbers is None else numbers[allowed].logsumexp(0)
        normal = 0.5 * size * torch.log(2 * math.pi * sigma[b] * sigma[b])
        found.append(state._replace(log_sum=state.log_sum - total - normal))
    return _stacked(found)


def _stacked(states: Sequence[State]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    log_density, mean, variance, mvp = (torch.stack(column) for column in zip(*states, strict=True))
    return log_density, mean, variance, mvp


def score(x: Tensor, mean: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """∇ log q, [B, D]."""
    return -(x - alpha[:, None] * mean) / sigma.square()[:, None]


def fisher_trace(size: int, variance: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """tr F, [B]."""
    return size / sigma.square() - (alpha.square() / sigma**4) * variance


def fisher_mvp(v: Tensor, mvp: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """F v, [B, r, D]."""
    a, s = alpha[:, None, None], sigma[:, None, None]
    return v / s.square() - (a.square() / s**4) * mvp
