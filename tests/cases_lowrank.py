"""Inputs that can make the low-rank family fail: what a solve through a Gram matrix is sensitive to.

A maker is (generator, shape of v, batch_dims) -> (v, U): float64, U [B, k, *sample] (or [k, *sample]). Rows have
norms around 1, so `damping` is λ/‖U‖² up to a small factor, and v has elements around 1.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cases import gaussian, pairwise
from harness import Case

Tensor = torch.Tensor
f64 = torch.float64
Maker = Callable[[torch.Generator, Sequence[int], int], tuple[Tensor, Tensor]]

RATIOS = (1e-6, 1e-4, 1e-2, 1.0, 10.0)  # λ/‖U‖² for which accuracy is stated
CONDITIONS = (1.0, 1e3, 1e6)  # of the Gram matrix
RANKS = (1, 2, 3, 4, 5, 8, 15, 16)
SIZES = (7, 252, 2049, 65536)


def _flat(shape: Sequence[int], batch_dims: int) -> tuple[int, int]:
    return math.prod(shape[:batch_dims]), math.prod(shape[batch_dims:])


def _shaped(U: Tensor, shape: Sequence[int], batch_dims: int) -> Tensor:
    return U.reshape(*shape[:batch_dims], U.shape[1], *shape[batch_dims:])


def rows(kind: str, k: int, condition: float = 1.0) -> Callable[[torch.Generator, int, int], Tensor]:
    """[B, k, D] of a kind.

    gaussian     random rows of norm about 1
    unit         random rows of norm 1
    orthonormal  as far as D reaches; equal s make a repeated eigenvalue
    conditioned  W·diag(σ)·Q with σ² geometric from 1 to 1/condition, W and Q random orthogonal
    duplicates   the second row repeats the first, the third is zero
    """

    def make(generator: torch.Generator, batch: int, size: int) -> Tensor:
        U = gaussian(generator, (batch, k, size)) / max(size, 1) ** 0.5
        if kind in ("orthonormal", "conditioned") and 0 < k and batch * size > 0:
            frame = torch.linalg.qr(U.transpose(1, 2))[0].transpose(1, 2)  # [B, min(k, D), D]
            values = condition ** -torch.linspace(0, 0.5, frame.shape[1], dtype=f64)
            turn = torch.linalg.qr(gaussian(generator, (batch, k, k)))[0][:, :, : frame.shape[1]]
            if kind == "orthonormal":
                turn = torch.eye(k, dtype=f64)[None, :, : frame.shape[1]]
            U = (turn * values) @ frame
        if kind == "unit":
            U = U / U.norm(dim=2, keepdim=True).clamp(min=1e-300)
        if kind == "duplicates":
            U[:, 1:2] = U[:, :1]
            U[:, 2:3] = 0
        return U

    return make


def problem(kind: str, k: int, where: str = "random", condition: float = 1.0) -> Maker:
    """v random, in the span of U, or nearly so: for these H⁻¹v is up to ‖U‖²/λ smaller than v/λ."""
    make = rows(kind, k, condition)

    def maker(generator: torch.Generator, shape: Sequence[int], batch_dims: int = 1):
        batch, size = _flat(shape, batch_dims)
        U, v = make(generator, batch, size), gaussian(generator, (batch, size))
        if where != "random" and k:
            inside = (gaussian(generator, (batch, 1, k)) @ U)[:, 0]
            inside = inside * (size**0.5 / inside.norm(dim=1, keepdim=True).clamp(min=1e-300))
            v = inside if where == "span" else inside + 1e-3 * v
        return v.reshape(tuple(shape)), _shaped(U, shape, batch_dims)

    return maker


def vectors(maker: Maker):
    """For the harness, whose tensors all have one shape: (v, u_1, …, u_k)."""

    def tensors(generator: torch.Generator, shape: Sequence[int]) -> list[Tensor]:
        shape = tuple(shape)
        v, U = maker(generator, shape, 1) if len(shape) > 1 else maker(generator, (1, *shape), 1)
        return [v.reshape(shape), *(u.reshape(shape).contiguous() for u in U.unbind(1))]

    return tensors


def case(name: str, maker: Maker, damping: float, s: Sequence[float] = (), keep_norm=False, **flags) -> Case:
    scalars = {"damping": damping, **{f"s{j}": x for j, x in enumerate(s)}}
    return Case(name, vectors(maker), scalars, {"keep_norm": True} if keep_norm else {}, **flags)


def harness_cases(variant: int, keep_norm: bool = False) -> tuple[Case, ...]:
    """Few, because every kind of test meets every one of them; the rest of the range has tests of its own."""
    made = {
        "two": case("two", problem("gaussian", 2), 0.7, (1.0, 0.5), keep_norm),
        "span": case("span", problem("gaussian", 3, "span"), 0.1, (1.0, 2.0, 0.5), keep_norm),
        # −0.5·1.2²: H stays positive definite where transforms scale U and s
        "negative": case("negative", problem("unit", 2), 1.0, (-0.5, 1.0), keep_norm),
        "repeated": case("repeated", problem("orthonormal", 3), 0.5, (0.8, 0.8, 0.8), keep_norm),
        "degenerate": case(
            "degenerate", problem("duplicates", 3), 0.4, (1.0, 1.0, 0.0), keep_norm, numeric=False
        ),
        "none": case("none", problem("gaussian", 0), 0.3, (), keep_norm, numeric=False),
        "five": case(
            "five", problem("conditioned", 5, "near", 1e2), 0.05, (1.0,) * 5, keep_norm, numeric=False
        ),
    }
    chosen = {
        0: ("two", "none"),
        1: ("two",) if keep_norm else ("two", "span", "negative", "none", "five"),
        2: ("two", "negative", "repeated", "degenerate"),
    }[variant]
    return tuple(made[name] for name in chosen)


@dataclass(frozen=True)
class Hard:
    """A problem for the accuracy floors, in float32."""

    name: str
    size: int
    rank: int
    ratio: float
    condition: float
    where: str

    def make(self, batch: int = 2, dtype=torch.float32) -> tuple[Tensor, Tensor, float]:
        """(v, U, damping)"""
        generator = torch.Generator().manual_seed(self.size + self.rank)
        maker = problem("conditioned", self.rank, self.where, self.condition)
        v, U = (t.to(dtype) for t in maker(generator, (batch, self.size), 1))
        return v, U, self.ratio  # the largest singular value of U is 1

    def __str__(self) -> str:
        return self.name


def hard(full: bool) -> list[Hard]:
    """The stated range: all pairs of values at small D, or the whole product at a large one."""
    axes = (RATIOS, CONDITIONS, ("random", "span", "near"))
    chosen = itertools.product(SIZES[-1:], (4, 16), *axes) if full else pairwise((SIZES[:3], RANKS, *axes))
    return [
        Hard(f"D{d}-k{k}-l{r:g}-c{c:g}-{w}", d, k, r, c, w)
        for d, k, r, c, w in chosen
        if k < d  # as many rows as dimensions leave nothing outside of the span
    ]


@dataclass(frozen=True)
class Odd:
    """A structure that a solver may stumble on, with its s; accuracy holds here as everywhere."""

    name: str
    maker: Maker
    s: tuple[float, ...]
    damping: float

    def make(self, shape: Sequence[int], batch_dims: int = 1, dtype=torch.float32, seed: int = 0):
        v, U = self.maker(torch.Generator().manual_seed(seed), shape, batch_dims)
        return v.to(dtype), U.to(dtype), torch.tensor(self.s, dtype=f64)

    def __str__(self) -> str:
        return self.name


ODD = (
    Odd("k0", problem("gaussian", 0), (), 0.3),
    Odd("k1", problem("gaussian", 1), (2.0,), 1e-3),
    Odd("duplicates", problem("duplicates", 5, "span"), (1.0, 2.0, 3.0, 0.5, 1.0), 1e-3),
    Odd("all-zero-rows", lambda g, s, b: (problem("gaussian", 4)(g, s, b)[0], 0 * problem("gaussian", 4)(g, s, b)[1]),
        (1.0, -5.0, 2.0, 0.0), 0.5),
    Odd("all-zero-s", problem("gaussian", 4), (0.0,) * 4, 0.5),
    Odd("zero-s", problem("gaussian", 5, "span"), (1.0, 0.0, 2.0, 0.0, 1.0), 1e-2),
    Odd("repeated", problem("orthonormal", 8), (0.7,) * 8, 1e-3),
    Odd("two-pairs", problem("orthonormal", 4, "span"), (1.0, 2.0, 1.0, 2.0), 1e-2),
    Odd("barely-definite", problem("orthonormal", 2), (-1.0 + 1e-3, 0.5), 1.0),
    Odd("barely-definite-span", problem("orthonormal", 3, "span"), (-1.0 + 1e-3, 0.5, -0.9), 1.0),
    Odd("wide-s", problem("gaussian", 5, "near"), (1e4, 1e2, 1.0, 1e-2, 1e-4), 1e-2),
    Odd("sixteen", problem("gaussian", 16, "near"), tuple(0.5 + 0.1 * j for j in range(16)), 1e-2),
    Odd("fifteen-duplicates", problem("duplicates", 15, "span"), (1.0,) * 15, 1e-2),
)  # fmt: skip


def chain(kind: str, length: int, size: int, dtype=torch.float32, seed: int = 0) -> list[Tensor]:
    """Vectors [size] for a sequence of updates.

    drift      a slowly turning direction plus noise, as gradients along a trajectory
    subspace   combinations of three fixed directions: nothing is lost by truncation to three or more
    same       one vector over and over: rank one
    spread     lengths from 1 to 1e-5: s over ten orders of magnitude
    """
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.linalg.qr(gaussian(generator, (size, 3)))[0].T
    made, v = [], gaussian(generator, (size,))
    for i in range(length):
        noise = gaussian(generator, (size,))
        if kind == "drift":
            v = 0.95 * v + 0.3 * noise
            step = v
        elif kind == "subspace":
            step = gaussian(generator, (3,)) @ fixed
        elif kind == "same":
            step = fixed[0]
        else:
            step = noise * 10.0 ** (-(i % 6))
        made.append(step.to(dtype))
    return made
