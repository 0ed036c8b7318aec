"""The damped low-rank Hessian: products, solves, roots, determinants and the rank-k update.

The eager peers are what one writes today: einsum for the Gram matrix, a batched Cholesky or eigh of k × k, einsum back.
The goals are for two cores in float32, against eager, torch.compile and the two-level traffic model at k = 4; at k = 16
against eager and the arithmetic that the double Gram products cost.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import marquardt as mq
from marquardt import reference

from . import floors, peers
from .bench_frame import GPU_COPY, GPU_COPY_BYTES, doubles, eager_and_compiled, gpu_floors, size, unit
from .cuda import GRAPH_TRAFFIC
from .protocol import outputs
from .row import Call, Contest, Floor, Goal, Row

LATENT, LARGE_LATENT = (16, 4, 64, 64), (8, 4, 128, 128)
DAMPING, DECAY, WEIGHT = 0.5, 0.9, 1.0
EAGER, COMPILE, TRAFFIC = 6, 3, 0.8  # k = 4
EAGER_16, ARITHMETIC = 3, 0.6  # k = 16


# --- what people write ------------------------------------------------------------------------------------


def flat(g: Tensor, U: Tensor) -> tuple[Tensor, Tensor]:
    """g [B, D], U [B, k, D]."""
    return g.reshape(g.shape[0], -1), U.reshape(*U.shape[:2], -1)


def eager_solve(g: Tensor, U: Tensor, s: Tensor, damping: float) -> Tensor:
    x, rows = flat(g, U)
    small = torch.einsum("bkd,bld->bkl", rows, rows) + torch.diag_embed(damping / s)
    inner = torch.einsum("bkd,bd->bk", rows, x)
    a = torch.cholesky_solve(inner[..., None], torch.linalg.cholesky(small))[..., 0]
    return ((x - torch.einsum("bk,bkd->bd", a, rows)) / damping).reshape(g.shape)


def eager_inv_sqrt(z: Tensor, U: Tensor, s: Tensor, damping: float) -> Tensor:
    x, rows = flat(z, U)
    rows = s.sqrt()[..., None] * rows
    nu, w = torch.linalg.eigh(torch.einsum("bkd,bld->bkl", rows, rows))
    inner = torch.einsum("bkl,bk->bl", w, torch.einsum("bkd,bd->bk", rows, x))
    factor = ((damping + nu).rsqrt() - damping**-0.5) / nu
    back = torch.einsum("bkl,bl->bk", w, factor * inner)
    return (x * damping**-0.5 + torch.einsum("bk,bkd->bd", back, rows)).reshape(z.shape)


def eager_matvec(v: Tensor, U: Tensor, s: Tensor, damping: float) -> Tensor:
    x, rows = flat(v, U)
    inner = s * torch.einsum("bkd,bd->bk", rows, x)
    return (damping * x + torch.einsum("bk,bkd->bd", inner, rows)).reshape(v.shape)


def eager_logdet(U: Tensor, s: Tensor, damping: float) -> Tensor:
    rows = s.sqrt()[..., None] * U.reshape(*U.shape[:2], -1)
    small = torch.einsum("bkd,bld->bkl", rows, rows) / damping
    eye = torch.eye(U.shape[1], dtype=U.dtype, device=U.device)
    return rows.shape[-1] * math.log(damping) + torch.logdet(small + eye)


def eager_update(v: Tensor, U: Tensor, s: Tensor, decay: float, weight: float) -> tuple[Tensor, Tensor]:
    x, rows = flat(v, U)
    frame = torch.cat([weight**0.5 * x[:, None], (decay * s).sqrt()[..., None] * rows], dim=1)
    nu, w = torch.linalg.eigh(torch.einsum("bkd,bld->bkl", frame, frame))
    nu, w = nu[:, 1:].flip(1), w[:, :, 1:].flip(2)
    made = torch.einsum("bji,bjd->bid", w, frame) * nu.rsqrt()[..., None]
    return made.reshape(U.shape), nu


# --- floors -----------------------------------------------------------------------------------------------


def two_levels(rows: Sequence[Tensor], out: Tensor, writes: int) -> tuple[Floor, ...]:
    """The traffic model with `writes` outputs: the triad of one output, and the others at the same bandwidth."""
    if out.device.type != "cpu":
        return gpu_floors(rows, out)
    some = rows[:8]  # the most that the streaming kernel reads at a time
    one = floors.triad(some, out)
    factor = (len(rows) + writes) / (len(some) + 1)
    first = Floor("triad", one.contestants, lambda t: one.seconds(t) * factor, one.how, one.substitute)
    return first, floors.traffic(first, rows, out)


def arithmetic(rows: int, batch: int, length: int) -> Floor:
    """The time of the Gram matrix' double products alone, at the rate of fused multiply-adds in registers."""
    products = (rows * (rows + 1) // 2) * batch * length
    kernel = getattr(torch.ops.marquardt, "_arithmetic_floor", None)
    steps = 20_000
    if kernel is None:
        a = torch.randn(512, 512, dtype=torch.float64)
        calls: dict[str, Call] = {"double GEMM": lambda: a @ a}
        return Floor(
            "arithmetic", calls, lambda t: products * t["double GEMM"] / 512**3, "float64 GEMM", True
        )
    done = kernel(steps)
    calls = {"double fma": lambda: kernel(steps)}
    how = "double fused multiply-adds in registers, all threads"
    return Floor("arithmetic", calls, lambda t: products * t["double fma"] / done, how)


# --- rows -------------------------------------------------------------------------------------------------


def operands(shape: Sequence[int], k: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
    """v, U with orthonormal rows, s: what an update keeps."""
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(*shape, generator=generator)
    length = math.prod(shape[1:])
    raw = torch.randn(shape[0], length, k, generator=generator)
    U = torch.linalg.qr(raw)[0].transpose(1, 2).reshape(shape[0], k, *shape[1:]).contiguous()
    s = torch.linspace(2.0, 0.5, k).expand(shape[0], k).contiguous()
    return v.to(device, dtype), U.to(device, dtype), s.to(device)


Work = tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]  # ours, exact, eager


def works(name: str, s: Tensor) -> Work:
    """Ours and the exact one as functions of (v, U), the eager one of (v, U, s)."""
    if name == "lowrank_update":

        def ours(v: Tensor, U: Tensor) -> Any:
            return mq.lowrank_update(U, s, v, decay=DECAY, weight=WEIGHT)

        def exact(v: Tensor, U: Tensor) -> Any:
            return reference.lowrank_update(U, s, v, decay=DECAY, weight=WEIGHT)

        return ours, exact, lambda v, U, s: eager_update(v, U, s, DECAY, WEIGHT)
    if name == "lowrank_logdet":
        return (
            lambda v, U: mq.lowrank_logdet(U, s, damping=DAMPING),
            lambda v, U: reference.lowrank_logdet(U, s, damping=DAMPING),
            lambda v, U, s: eager_logdet(U, s, DAMPING),
        )
    eager = {
        "lowrank_solve": eager_solve,
        "lowrank_inv_sqrt": eager_inv_sqrt,
        "lowrank_matvec": eager_matvec,
    }[name]
    return (
        lambda v, U: getattr(mq, name)(v, U, s, damping=DAMPING),
        lambda v, U: getattr(reference, name)(v, U, s, damping=DAMPING),
        functools.partial(eager, damping=DAMPING),
    )


def lowrank_row(
    name: str, k: int, shape: tuple[int, ...], dtype: torch.dtype, device: str, *, with_compile: bool,
    goals: tuple[Goal, ...] = (),
) -> Row:  # fmt: skip
    batch, length = shape[0], math.prod(shape[1:])
    writes = k if name == "lowrank_update" else 0 if name == "lowrank_logdet" else 1

    def build() -> Contest:
        v, U, s = operands(shape, k, dtype, device)
        ours, exact, eager = works(name, s)
        # Eigenvectors of an eager peer have any sign: not comparable by value.
        tolerance = None if name == "lowrank_update" else peers.TOLERANCE[dtype]
        rivals = eager_and_compiled(eager, v, U, s, tolerance=tolerance, with_compile=with_compile)
        small = (k + 2) * size(shape, dtype) < GRAPH_TRAFFIC
        if device != "cpu" and small and name not in ("lowrank_matvec", "lowrank_logdet"):
            rivals = {}  # torch.linalg waits for the device: it cannot be captured, as rows of this size are
        rows = [v, *U.unbind(1)]
        made: tuple[Floor, ...] = two_levels(
            [t.contiguous() for t in rows], torch.empty_like(v), max(writes, 1)
        )
        if device == "cpu" and name != "lowrank_matvec" and k > 8:
            made = (*made, arithmetic(k + (name != "lowrank_logdet"), batch, length))
        return Contest(
            subject=lambda: ours(v, U),
            oracle=lambda: outputs(exact(*doubles(v, U))),
            tolerance=(1e-6 if name == "lowrank_update" else 2e-7) + unit(dtype),
            peers=rivals,
            floors=made,
            numbers=int(name in ("lowrank_update", "lowrank_logdet")),
        )

    return Row(
        op=name,
        variant=f"rank {k}",
        shape=shape,
        dtype=dtype,
        device=device,
        build=build,
        traffic=(k + (name != "lowrank_logdet") + writes) * size(shape, dtype),
        flops=(k + 1) * (k + 2) * math.prod(shape) + 2 * (k + 1) * writes * math.prod(shape),
        goals=goals,
    )


def goals_of(name: str, k: int, device: str, traffic: int) -> tuple[Goal, ...]:
    if device != "cpu":
        return (Goal("copy", GPU_COPY),) if traffic >= GPU_COPY_BYTES else ()
    if name not in ("lowrank_solve", "lowrank_update"):
        return ()
    if k == 4:
        return Goal("eager", EAGER), Goal("compile", COMPILE), Goal("traffic", TRAFFIC)
    return Goal("eager", EAGER_16), Goal("arithmetic", ARITHMETIC)


def rows(device: str, full: bool) -> list[Row]:
    f32 = torch.float32
    made = []
    for name in ("lowrank_solve", "lowrank_update"):
        for k in (4, 16):
            wanted = goals_of(name, k, device, (k + 2) * size(LARGE_LATENT, f32))
            made.append(
                lowrank_row(name, k, LARGE_LATENT, f32, device, with_compile=full or k == 4, goals=wanted)
            )
    others = ("lowrank_inv_sqrt", "lowrank_matvec", "lowrank_logdet")
    made += [lowrank_row(name, 4, LARGE_LATENT, f32, device, with_compile=full) for name in others]
    if device != "cpu":
        for name, k, shape in (
            ("lowrank_solve", 4, (1, 4, 64, 64)),
            ("lowrank_solve", 4, (64, 16, 128, 128)),
        ):
            wanted = goals_of(name, k, device, (k + 2) * size(shape, f32))
            made.append(lowrank_row(name, k, shape, f32, device, with_compile=False, goals=wanted))
    if full:
        make = functools.partial(lowrank_row, device=device, with_compile=True)
        made += [make("lowrank_solve", k, LATENT, f32) for k in (1, 2, 4, 8)]
        made += [make("lowrank_solve", 4, LARGE_LATENT, dtype) for dtype in (torch.bfloat16, torch.float64)]
        made += [make(name, 16, LARGE_LATENT, f32) for name in others]
    return made


def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
