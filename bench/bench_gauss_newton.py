"""Gauss–Newton products and solves: softmax_head_hvp and damped_gram_solve against what their users write.

Goals are those of the issue, for float32 on the CPU; other rows are reported without one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from marquardt.gauss_newton import damped_gram_solve, softmax_head_hvp
from marquardt.reference import gauss_newton as definition

from . import peers
from .row import Contest, Goal, Peer, Row

HEAD_EAGER, SOLVE_INVERSE = 1.2, 1.5
DAMPING = 1e-3

# (rows, classes, features): CIFAR-100 and ImageNet heads, ten classes, a vocabulary
HEADS = ((4096, 1000, 512), (8192, 1000, 768), (16384, 100, 64), (16384, 10, 512))
FULL_HEADS = ((128, 1000, 512), (4096, 1000, 2048), (50000, 100, 512), (2048, 32000, 64))
# (rows, inputs, outputs): the patches of a 7 × 7 convolution over 3 channels; layers of other widths
SOLVES = ((1_600_000, 147, 64), (100_000, 64, 64), (32_768, 576, 128))
FULL_SOLVES = ((8192, 1024, 1024), (128, 2048, 256))
GOAL_SOLVE = SOLVES[0]


def eager_head(x: Tensor, p: Tensor, G: Tensor) -> Tensor:
    """The closed form; x [n, d], p [n, C], G [C, d]."""
    z = x @ G.T  # [n, C]
    weighted = p * z
    r = weighted - p * weighted.sum(1, keepdim=True)
    return r.T @ x / x.shape[0]


def softmax_backward_head(x: Tensor, p: Tensor, G: Tensor) -> Tensor:
    """The best of torch's own operators: two products and the backward of a softmax."""
    r = torch.ops.aten._softmax_backward_data(torch.mm(x, G.T), p, 1, p.dtype)
    return torch.mm(r.T, x).div_(x.shape[0])


def explicit_inverse(g: Tensor, x: Tensor, damping: float) -> Tensor:
    """gᵀ x (xᵀx/b + λI)⁻¹ as it is printed; x [b, i], g [b, o]."""
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return g.T @ x @ torch.linalg.inv(x.T @ x / x.shape[0] + damping * eye)


def cholesky_solve(g: Tensor, x: Tensor, damping: float) -> Tensor:
    """The same without an inverse, in the dtype of the data."""
    eye = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    factor = torch.linalg.cholesky(x.T @ x / x.shape[0] + damping * eye)
    return torch.cholesky_solve(x.T @ g, factor).T


def rivals(functions: dict[str, Callable[..., Any]], *arguments: Any, tolerance: float) -> dict[str, Peer]:
    return {name: Peer(functools.partial(f, *arguments), tolerance) for name, f in functions.items()}


def head_row(shape: tuple[int, int, int], dtype: torch.dtype, device: str, with_compile: bool) -> Row:
    n, classes, features = shape

    def build() -> Contest:
        generator = torch.Generator().manual_seed(0)
        x, logits, G = (
            torch.randn(s, generator=generator) for s in ((n, features), (n, classes), (classes, features))
        )
        arguments = tuple(t.to(device, dtype) for t in (x, logits.softmax(1), G))
        functions = {"eager": eager_head, "softmax backward": softmax_backward_head}
        if with_compile:
            functions["compile"] = peers.compiled(eager_head)
        return Contest(
            subject=lambda: softmax_head_hvp(*arguments),
            oracle=lambda: [definition.softmax_head_hvp(*(t.double() for t in arguments)).flatten()[None]],
            tolerance=1e-6 + (0 if dtype is torch.float32 else torch.finfo(dtype).eps),
            peers=rivals(functions, *arguments, tolerance=peers.TOLERANCE[dtype]),
        )

    return Row(
        op="softmax_head_hvp",
        shape=shape,
        dtype=dtype,
        device=device,
        build=_flat(build),
        traffic=dtype.itemsize * (n * features + n * classes + 2 * classes * features),
        flops=4 * n * classes * features + 5 * n * classes,
        goals=(Goal("eager", HEAD_EAGER),) if device == "cpu" and dtype is torch.float32 else (),
    )


def solve_row(shape: tuple[int, int, int], dtype: torch.dtype, device: str, with_compile: bool) -> Row:
    b, i, o = shape

    def build() -> Contest:
        generator = torch.Generator(device).manual_seed(0)
        # made in place: at 1.6 million rows a copy is a gigabyte
        x, g = (torch.empty(b, k, device=device).normal_(generator=generator).to(dtype) for k in (i, o))
        g += x[:, :1]  # not independent of x, or the result is noise
        functions = {"eager": explicit_inverse, "cholesky": cholesky_solve}
        if with_compile:
            functions["compile"] = peers.compiled(explicit_inverse)
        return Contest(
            subject=lambda: damped_gram_solve(g, x, damping=DAMPING),
            oracle=lambda: [_exact_solve(g, x).flatten()[None]],
            tolerance=2e-6 + (0 if dtype is torch.float32 else torch.finfo(dtype).eps),
            peers=rivals(functions, g, x, DAMPING, tolerance=peers.TOLERANCE[dtype]),
        )

    wanted = device == "cpu" and shape == GOAL_SOLVE and dtype is torch.float32
    return Row(
        op="damped_gram_solve",
        shape=shape,
        dtype=dtype,
        device=device,
        build=_flat(build),
        traffic=dtype.itemsize * (b * (i + o) + i * o),
        flops=b * i * (i + 1) + 2 * b * i * o + i**3 // 3 + 2 * i * i * o,
        goals=(Goal("eager", SOLVE_INVERSE),) if wanted else (),
    )


def _flat(build: Callable[[], Contest]) -> Callable[[], Contest]:
    """The result as one sample: the error is that of the whole matrix, whose rows have no claim of their own."""

    def flattened(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return lambda: call().reshape(1, -1)

    def made() -> Contest:
        contest = build()
        named = {k: Peer(flattened(v.call), v.tolerance) for k, v in contest.peers.items()}
        return Contest(flattened(contest.subject), contest.oracle, contest.tolerance, named, contest.floors)

    return made


def _exact_solve(g: Tensor, x: Tensor) -> Tensor:
    """In float64, block by block."""
    i, o = x.shape[1], g.shape[1]
    gram, cross = (x.new_zeros(s, dtype=torch.float64) for s in ((i, i), (o, i)))
    for begin in range(0, x.shape[0], 65536):
        a, b = (t[begin : begin + 65536].double() for t in (x, g))
        gram += a.T @ a
        cross += b.T @ a
    damping = torch.tensor(DAMPING, dtype=torch.float64)
    return definition.primal(gram, cross, x.shape[0], damping)[0]


def rows(device: str, full: bool) -> list[Row]:
    f32, bf16 = torch.float32, torch.bfloat16
    heads, solves = (*HEADS, *(FULL_HEADS if full else ())), (*SOLVES, *(FULL_SOLVES if full else ()))
    if device != "cpu" and not full:  # compositions of library products there: one row of each tells enough
        return [head_row(HEADS[0], f32, device, False), solve_row(SOLVES[1], f32, device, False)]
    made = [head_row(s, f32, device, with_compile=full or s == HEADS[0]) for s in heads]
    made += [solve_row(s, f32, device, with_compile=full or s == SOLVES[1]) for s in solves]
    return [
        *made,
        head_row(HEADS[0], bf16, device, False),
    ]  # torch has no inverse in 16 bits to compare a solve with


def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
