"""Inputs that can make an op fail, gathered so that every accuracy row uses them.

Plain Gaussian data hides most faults: with them the two directions of a Gram op are far from parallel, the damping
is of the size of everything else, and every upstream gradient is nearly orthogonal to everything.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from harness import Case

Tensor = torch.Tensor

# The ranges for which lm_direction states its accuracy.
CORRELATIONS = (0.0, 0.9, 0.999999)
KAPPAS = (1e-8, 1e-4, 0.01, 0.1, 0.5, 0.9)
DAMPINGS = (5e-5, 1e-3, 0.1, 5.0)
SIZES = (3072, 16384, 65536, 262144)


def gaussian(generator: torch.Generator, shape: Sequence[int]) -> Tensor:
    """Standard normals of `shape` in float64."""
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64)


def correlated(generator: torch.Generator, shape: Sequence[int], correlation: float) -> list[Tensor]:
    """(ε, p) with the given correlation: 1 − 1e-6 is what two neighbouring steps of a fine schedule look like."""
    eps, other = gaussian(generator, shape), gaussian(generator, shape)
    return [eps, correlation * eps + (1 - correlation**2) ** 0.5 * other]


def pair(correlation: float):
    return lambda generator, shape: correlated(generator, shape, correlation)


def alone(generator: torch.Generator, shape: Sequence[int]) -> list[Tensor | None]:
    return [gaussian(generator, shape), None]


def opposite(generator: torch.Generator, shape: Sequence[int]) -> list[Tensor]:
    """p leans against ε and is longer: ⟨ε, r⟩ is large and negative."""
    eps, other = correlated(generator, shape, 0.9)
    return [eps, -3.0 * other]


LM = (
    Case("uncorrelated", pair(0.0), {"damping": 0.1, "kappa": 0.3}),
    Case("correlated", pair(0.9), {"damping": 1e-3, "kappa": 0.1}),
    Case("parallel", pair(0.999999), {"damping": 5e-5, "kappa": 0.9}),
    Case("small-kappa", pair(0.9), {"damping": 5.0, "kappa": 1e-8}),
    Case("opposite", opposite, {"damping": 30.0, "kappa": 0.5}, stated=False),
    Case("negative-kappa", pair(0.9), {"damping": 2.0, "kappa": -0.4}, stated=False),
    Case("plain", pair(0.9), {"damping": 3.0, "kappa": 0.4}, {"keep_norm": False}),
    Case("plain-parallel", pair(0.999999), {"damping": 0.01, "kappa": 0.9}, {"keep_norm": False}),
    Case("extrapolation", pair(0.9), {"extrapolation": 0.7}),
    Case("extrapolation-parallel", pair(0.999999), {"extrapolation": -1.5}),
    # Derivatives to the scalars are left out where the op does not depend on them.
    Case("no-prev", alone, {"damping": 1.0, "kappa": 0.5}, smooth=False, identity=True),
    Case("zero-kappa", pair(0.9), {"damping": 1.0, "kappa": 0.0}, smooth=False, identity=True),
    Case("zero-extrapolation", pair(0.9), {"extrapolation": 0.0}, smooth=False, identity=True),
    Case("plain-no-prev", alone, {"damping": 2.0, "kappa": 0.5}, {"keep_norm": False}, smooth=False),
)


def lm_sweep(full: bool) -> list[tuple[int, float, float, float]]:
    """(D, κ, λ, correlation): the whole product, or rows in which every pair of values meets at least once."""
    axes = (SIZES, KAPPAS, DAMPINGS, CORRELATIONS)
    if full:
        return list(itertools.product(*axes))
    return pairwise(axes)


def pairwise(axes: Sequence[Sequence]) -> list[tuple]:
    """Few rows of the product of `axes` such that any two values of different axes meet in one (greedy)."""
    places = list(itertools.combinations(range(len(axes)), 2))
    open_ = {(i, j, x, y) for i, j in places for x in axes[i] for y in axes[j]}
    rows: list[tuple] = []
    candidates = list(itertools.product(*axes))

    def gain(row: tuple) -> int:
        return sum((i, j, row[i], row[j]) in open_ for i, j in places)

    while open_:
        best = max(candidates, key=gain)
        rows.append(best)
        open_ -= {(i, j, best[i], best[j]) for i, j in places}
    return rows


def terms(count: int, spread: float = 1.0):
    """`count` tensors, each `spread` times as large as the one before."""
    return lambda generator, shape: [gaussian(generator, shape) * spread**j for j in range(count)]


def cancelling(generator: torch.Generator, shape: Sequence[int]) -> list[Tensor]:
    """Three terms whose sum with coefficients (1, −1, 1e-3) loses almost everything."""
    x = gaussian(generator, shape)
    return [x, x + 1e-4 * gaussian(generator, shape), gaussian(generator, shape)]


def _coefficients(*values: float, noise: float | None = None) -> dict[str, float]:
    named = {f"c{j}": v for j, v in enumerate(values)}
    return named if noise is None else {**named, "noise_scale": noise}


AFFINE = (
    Case("one", terms(1), _coefficients(0.7)),
    Case("two", terms(2), _coefficients(1.25, -0.3)),
    Case("three", terms(3), _coefficients(0.9, -1.7, 0.4)),
    Case("cancelling", cancelling, _coefficients(1.0, -1.0, 1e-3), stated=False),
    Case("five-spread", terms(5, 8.0), _coefficients(1.0, 0.1, -0.01, 1e-3, -1e-4), numeric=False),
    Case("eight", terms(8), _coefficients(*(0.3 * (-1) ** j * (j + 1) for j in range(8)))),
    Case("zero-coefficient", terms(3), _coefficients(1.0, 0.0, 0.5)),
    Case("noise", terms(2), _coefficients(0.8, 0.5, noise=0.6), {"seed": torch.tensor([1234, -17])}),
    Case("noise-only", terms(1), _coefficients(0.0, noise=1.0), {"seed": torch.tensor([99, 3])}),
    Case(
        "eight-noise",
        terms(8),
        _coefficients(*(0.1 * (j + 1) for j in range(8)), noise=-0.3),
        {"seed": torch.tensor([7, 2**40])},
    ),
)


def grams(generator: torch.Generator, count: int) -> list[tuple[float, float, float]]:
    """Random (n, e, R) over many orders of magnitude with cos(ε, r) up to 0.99."""
    rows = []
    for _ in range(count):
        n, R = (10.0 ** float(x) for x in torch.empty(2).uniform_(-6, 9, generator=generator))
        cosine = float(torch.empty(1).uniform_(-0.99, 0.99, generator=generator))
        rows.append((n, cosine * (n * R) ** 0.5, R))
    return rows


# Grams whose determinant is exactly 0, in exact numbers: ε = 0, p = ε, p = 2ε, p = −ε, p = 0, everything 0.
DEGENERATE_GRAMS = (
    (0.0, 0.0, 5.0),
    (4.0, 0.0, 0.0),
    (4.0, 4.0, 4.0),
    (4.0, -8.0, 16.0),
    (4.0, -4.0, 4.0),
    (0.0, 0.0, 0.0),
)
EXTREME_DAMPINGS = (0.0, 1e-30, 1e-12, 1e-3, 1.0, 1e8, 1e30)
EXTREME_KAPPAS = (0.0, 1e-8, 1e-3, 0.5, 0.9, 1.0, -0.5)
