"""The numbers of sampler steps, in float64: which multiples of which tensors make a step.

Everything here works on Python numbers and on float64 tensors (0-dim or [B], differentiable) alike, none of it on
data. Exponentials are taken as expm1 and series, so that fine schedules keep their digits.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .scalars import Scalar

Tensor = torch.Tensor

PREDICTIONS = ("epsilon", "sample", "v_prediction")
ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
SOLVERS = ("midpoint", "heun")
THIRD_ORDERS = ("published", "exact")

_SERIES_BELOW, _TERMS = 1.0, 20


def wide(x: Scalar) -> Scalar:
    """`x` as a float or a float64 tensor."""
    return x.to(torch.float64) if isinstance(x, Tensor) else x


def root(x: Scalar) -> Scalar:
    """√x; NaN for a negative number."""
    if isinstance(x, Tensor):
        return x.sqrt()
    if isinstance(x, (float, int)):
        return math.sqrt(x) if x >= 0 else math.nan
    return x**0.5  # a symbolic number of torch.compile


def exp(x: Scalar) -> Scalar:
    """e^x."""
    return x.exp() if isinstance(x, Tensor) else math.exp(x)


def expm1(x: Scalar) -> Scalar:
    """e^x − 1."""
    return torch.expm1(x) if isinstance(x, Tensor) else math.expm1(x)


def _series(x: Scalar, shift: int) -> Scalar:
    """Σ_{k ≥ 1} x^k/(k + shift)!"""
    total: Scalar = 0.0
    for k in range(_TERMS, 0, -1):
        total = x * (1.0 / math.factorial(k + shift) + total)
    return total


def phi(x: Scalar, shift: int) -> Scalar:
    """Shift 1: (e^x − 1)/x − 1. Shift 2: (e^x − 1 − x)/x² − ½. Both vanish with x."""
    if isinstance(x, Tensor):
        small = x.abs() < _SERIES_BELOW
        apart = torch.where(small, torch.ones_like(x), x)
        return torch.where(
            small, _series(torch.where(small, x, torch.zeros_like(x)), shift), _direct(apart, shift)
        )
    return _series(x, shift) if abs(x) < _SERIES_BELOW else _direct(x, shift)


def _direct(x: Scalar, shift: int) -> Scalar:
    return expm1(x) / x - 1.0 if shift == 1 else (expm1(x) - x) / (x * x) - 0.5


class Pair(NamedTuple):
    """A multiple of the sample and one of the model's output g."""

    x: Scalar
    g: Scalar

    def times(self, factor: Scalar) -> Pair:
        """The same `factor` times."""
        return Pair(factor * self.x, factor * self.g)


def converted(prediction: str, alpha: Scalar, sigma: Scalar) -> tuple[Pair, Pair]:
    """(ε, x₀) as multiples of x and of the model's output, x = α·x₀ + σ·ε."""
    if prediction == "epsilon":
        return Pair(0.0, 1.0), Pair(1.0 / alpha, -sigma / alpha)
    if prediction == "sample":
        return Pair(1.0 / sigma, -alpha / sigma), Pair(0.0, 1.0)
    return Pair(sigma, alpha), Pair(alpha, -sigma)  # v = α·ε − σ·x₀


class Ddim(NamedTuple):
    """x' = a + weight·LM(ε) + noise·ξ, a = `base` or, with x₀ held between bounds, `on_x0`·x₀."""

    eps: Pair
    x0: Pair
    base: Pair
    on_x0: Scalar
    weight: Scalar
    noise: Scalar
    alpha: Scalar
    sigma: Scalar


def ddim(prediction: str, alpha_bar: Scalar, alpha_bar_next: Scalar, eta: Scalar) -> Ddim:
    """The step from ᾱ to ᾱ': x' = √ᾱ'·x₀ + √(1 − ᾱ' − s²)·LM(ε) + s·ξ, s = η√((1 − ᾱ')/(1 − ᾱ)·(1 − ᾱ/ᾱ'))."""
    a, b = wide(alpha_bar), wide(alpha_bar_next)
    alpha, sigma, target = root(a), root(1.0 - a), root(b)
    eps, x0 = converted(prediction, alpha, sigma)
    variance: Scalar = 0.0
    if isinstance(eta, Tensor) or eta != 0:
        variance = wide(eta) ** 2 * ((1.0 - b) / (1.0 - a) * (1.0 - a / b))
    return Ddim(eps, x0, x0.times(target), target, root(1.0 - b - variance), root(variance), alpha, sigma)


class Dpm(NamedTuple):
    """x' = on_x·x + prefactor·LM(Σ direction_j·m_j) + noise·ξ with m_0 the newest output."""

    on_x: Scalar
    prefactor: Scalar
    direction: tuple[Scalar, ...]
    noise: Scalar


def _differences(order: int, weights: Sequence[Scalar], r0: Scalar, r1: Scalar) -> tuple[Scalar, ...]:
    """w₀·D0 + w₁·D1 + w₂·D2 as multiples of m_0, m_1, m_2."""
    if order == 1:
        return (weights[0],)
    if order == 2:
        k = weights[1] / r0
        return weights[0] + k, -k
    share = 1.0 / (r0 + r1)
    on_new = (weights[1] * (1.0 + r0 * share) + weights[2] * share) / r0  # of (m_0 − m_1)
    on_old = -(weights[1] * r0 * share + weights[2] * share) / r1  # of (m_1 − m_2)
    return weights[0] + on_new, on_old - on_new, -on_old


def _third(scale: Scalar, z: Scalar, third: str, published_apart: bool) -> Scalar:
    """The multiple of D2. The published tables have half of what the Taylor series asks for, and the one of
    sde-dpmsolver++ has (1 − e^z + z)/z² − ½ for −((e^z − 1 − z)/z² − ½), which does not vanish with the step."""
    if third == "exact":
        return 2.0 * scale * phi(z, 2)
    return scale * (phi(z, 2) + 1.0) if published_apart else scale * phi(z, 2)


def dpm(
    algorithm: str,
    order: int,
    solver: str,
    third: str,
    lambdas: Sequence[Scalar],
    alphas: Sequence[Scalar],
    sigmas: Sequence[Scalar],
) -> Dpm:
    """The DPM-Solver multistep update from s0 to the target; the lists run (target, s0, s1, s2)."""
    lam, alpha, sigma = ([wide(v) for v in row] for row in (lambdas, alphas, sigmas))
    h = lam[0] - lam[1]
    r0 = (lam[1] - lam[2]) / h if order > 1 else 1.0
    r1 = (lam[2] - lam[3]) / h if order > 2 else 1.0
    plus, sde = algorithm.endswith("++"), algorithm.startswith("sde")
    # One variable z for all: the integral runs over e^z, z = h, −h or −2h.
    z = (-2.0 * h if sde else -h) if plus else h
    scale = -alpha[0] if plus else (-2.0 if sde else -1.0) * sigma[0]
    w0 = scale * expm1(z)
    if order == 2 and solver == "midpoint":
        w1: Scalar = 0.5 * w0
    elif order > 1:
        w1 = scale * phi(z, 1)
    else:
        w1 = 0.0
    w2 = _third(scale, z, third, plus and sde) if order > 2 else 0.0
    if plus:
        on_x = sigma[0] / sigma[1] * (exp(-h) if sde else 1.0)
        noise = sigma[0] * root(-expm1(-2.0 * h)) if sde else 0.0
    else:
        on_x = alpha[0] / alpha[1]
        noise = sigma[0] * root(expm1(2.0 * h)) if sde else 0.0
    parts = _differences(order, (w0, w1, w2), r0, r1)
    return Dpm(on_x, w0, parts, noise)
