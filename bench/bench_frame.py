"""The frame engine: lm_direction (with a Gram) and affine_step (without), and what a call costs.

The goals are those of the design for float32, on two cores and on an H200; every other row is reported without one.
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
from .protocol import outputs
from .row import Contest, Floor, Goal, Peer, Row

DAMPING, KAPPA, GAMMA = 0.005, 0.3, 0.25

# shape -> (times faster than eager, than torch.compile); all of them: the fraction of the traffic model
LM_GOALS = {
    (1, 4, 64, 64): (10, 6),
    (16, 4, 64, 64): (22, 8),
    (8, 4, 128, 128): (45, 10),
    (64, 4, 128, 128): (25, 4.5),
    (16, 16, 256, 256): (32, 4.3),
}
LM_TRAFFIC = 0.85
AFFINE_TRIAD, AFFINE_EAGER = 0.85, 3
# On a GPU: times faster than torch.compile at the latents of a sampler, a copy kernel's time where a launch is all,
# and the measured copy bandwidth from 64 MB up.
GPU_LATENTS = (
    (1, 4, 64, 64),
    (16, 4, 64, 64),
    (64, 4, 64, 64),
    (1, 4, 128, 128),
    (8, 4, 128, 128),
    (64, 4, 128, 128),
)
GPU_LARGE = ((16, 16, 256, 256), (64, 16, 256, 256))
GPU_COMPILE, GPU_SMALL_COPIES, GPU_COPY, GPU_COPY_BYTES = 3, 1.5, 0.9, 64 << 20
CALL_COST, CALL_COST_WITH_GRADIENTS = 3.5, 6

LATENT, LARGE_LATENT = (16, 4, 64, 64), (8, 4, 128, 128)
AFFINE_COEFFICIENTS = (0.9, -0.3, 0.7, 0.11, -0.05, 0.6, 0.21, -0.4)


def unit(dtype: torch.dtype) -> float:
    """The rounding of storing a result, norm-wise at most; 0 where `stated` accuracy already contains it."""
    return 0.0 if dtype in (torch.float32, torch.float64) else torch.finfo(dtype).eps / 2


def size(shape: Sequence[int], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def doubles(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().double() for t in tensors]


def eager_and_compiled(
    function: Callable[..., Any], *arguments: Any, tolerance: float | None, with_compile: bool
) -> dict[str, Peer]:
    """The peers of a row: function(*arguments) as it is, and compiled once."""
    found = {"eager": Peer(lambda: function(*arguments), tolerance)}
    if with_compile:
        fast = peers.compiled(function)
        found["compile"] = Peer(lambda: fast(*arguments), tolerance)
    return found


def gpu_goals(shape: tuple[int, ...], traffic: int) -> tuple[Goal, ...]:
    """What a float32 row has to reach on a GPU."""
    goals = [Goal("compile", GPU_COMPILE)] if shape in GPU_LATENTS else []
    if shape == GPU_LATENTS[0]:
        goals.append(Goal("copy", 1 / GPU_SMALL_COPIES))
    if traffic >= GPU_COPY_BYTES:
        goals.append(Goal("copy", GPU_COPY))
    return tuple(goals)


def triton_peer(function: Callable[..., Any], *arguments: Any, **keywords: Any) -> dict[str, Peer]:
    """Our own Triton kernels beside the CUDA ones, where a tensor lies on a GPU."""
    on_gpu = any(isinstance(t, Tensor) and t.device.type == "cuda" for t in _tensors(arguments))
    if not on_gpu or "triton" not in mq.backends.available("cuda"):
        return {}

    def call() -> Any:
        with mq.use_backend("triton"):
            return function(*arguments, **keywords)

    return {"triton": Peer(call, peers.TOLERANCE[keywords["out"].dtype])}


def _tensors(arguments: Sequence[Any]) -> list[Any]:
    return [t for a in arguments for t in (a if isinstance(a, (list, tuple)) else [a])]


# --- lm_direction -----------------------------------------------------------------------------------------


def lm_row(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    variant: str = "",
    kappa: float | str = KAPPA,
    gamma: float | None = None,
    with_compile: bool = True,
    goals: tuple[Goal, ...] = (),
) -> Row:
    """`lm_direction(eps, prev, ..., out=out)`. kappa "per sample": a tensor [B] from 0.1 to 0.5."""

    def build() -> Contest:
        eps, prev = peers.correlated_pair(shape, dtype, device)
        out = torch.full_like(eps, torch.nan)
        many = torch.linspace(0.1, 0.5, shape[0], dtype=torch.float64, device=device)  # [B]
        scalar: Any = many if kappa == "per sample" else kappa
        work: Callable[..., Tensor] = peers.published_lm
        arguments: tuple[Any, ...]
        if gamma is None:
            given: dict[str, Any] = {"damping": DAMPING, "kappa": scalar}
            shaped = many.to(dtype).view(-1, *[1] * (len(shape) - 1)) if kappa == "per sample" else kappa
            arguments = (eps, prev, DAMPING, shaped)
        else:
            given = {"extrapolation": gamma}
            work, arguments = peers.extrapolated_lm, (eps, prev, gamma)
        return Contest(
            subject=lambda: mq.lm_direction(eps, prev, out=out, **given),
            oracle=lambda: [reference.lm_direction(*doubles(eps, prev), **given)],
            tolerance=2e-7 + unit(dtype),
            peers={
                **eager_and_compiled(
                    work, *arguments, tolerance=peers.TOLERANCE[dtype], with_compile=with_compile
                ),
                **triton_peer(mq.lm_direction, eps, prev, out=torch.empty_like(out), **given),
            },
            floors=lm_floors(eps, prev, out, reads_prev=kappa != 0),
        )

    streams = 2 if kappa == 0 else 3
    return Row(
        op="lm_direction",
        variant=variant,
        shape=shape,
        dtype=dtype,
        device=device,
        build=build,
        traffic=streams * size(shape, dtype),
        flops=0 if kappa == 0 else 11 * math.prod(shape),
        goals=goals,
    )


def lm_floors(eps: Tensor, prev: Tensor, out: Tensor, reads_prev: bool) -> tuple[Floor, ...]:
    """On the CPU the triad, and the two-level model where a Gram is taken; on a GPU a copy of as many bytes."""
    inputs = [eps, prev] if reads_prev else [eps]
    if out.device.type != "cpu":
        return gpu_floors(inputs, out)
    first = floors.triad(inputs, out)
    return (first, floors.traffic(first, inputs, out)) if reads_prev else (first,)


def gpu_floors(inputs: Sequence[Tensor], out: Tensor) -> tuple[Floor, ...]:
    return (floors.copy(sum(t.numel() * t.element_size() for t in (*inputs, out)), out.device),)


def lm_backward_row(shape: tuple[int, ...], device: str, with_compile: bool) -> Row:
    """Forward and backward: (out, d_eps, d_prev). Traffic: 2 read, 1 written; then 3 read, 2 written."""
    dtype = torch.float32

    def build() -> Contest:
        eps, prev = (t.requires_grad_() for t in peers.correlated_pair(shape, dtype, device))
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
        ours = peers.with_gradients(mq.lm_direction)

        def oracle() -> list[Tensor]:
            g, e, p = doubles(grad, eps, prev)
            exact = peers.with_gradients(reference.lm_direction)
            return outputs(exact(g, e.requires_grad_(), p.requires_grad_(), damping=DAMPING, kappa=KAPPA))

        arguments = (grad, eps, prev, DAMPING, KAPPA)
        tolerance = peers.TOLERANCE[dtype]
        eager = peers.with_gradients(peers.published_lm)
        rivals = {"eager": Peer(lambda: eager(*arguments), tolerance)}
        if with_compile:
            fast = peers.with_gradients(peers.compiled(peers.published_lm))
            rivals["compile"] = Peer(lambda: fast(*arguments), tolerance)
        return Contest(
            subject=lambda: ours(grad, eps, prev, damping=DAMPING, kappa=KAPPA),
            oracle=oracle,
            tolerance=3e-7,
            peers=rivals,
        )

    return Row(
        op="lm_direction",
        variant="forward+backward",
        shape=shape,
        dtype=dtype,
        device=device,
        build=build,
        traffic=8 * size(shape, dtype),
        flops=39 * math.prod(shape),
    )


# --- affine_step ------------------------------------------------------------------------------------------


def affine_row(
    terms: int,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    noise: float = 0.0,
    with_compile: bool,
) -> Row:
    """`affine_step(terms, coefficients, ..., out=out)`; with noise the peers draw their own."""
    coefficients = AFFINE_COEFFICIENTS[:terms]

    def build() -> Contest:
        generator = torch.Generator().manual_seed(terms)
        xs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(terms)]
        out = torch.full_like(xs[0], torch.nan)
        drawn: dict[str, Any] = (
            {"noise_scale": noise, "seed": torch.tensor([5, 7], device=device)} if noise else {}
        )
        return Contest(
            subject=lambda: mq.affine_step(xs, coefficients, out=out, **drawn),
            oracle=lambda: [reference.affine_step(doubles(*xs), coefficients, **drawn)],
            tolerance=5e-7 + unit(dtype),
            peers={
                **eager_and_compiled(
                    peers.sum_of_products,
                    xs,
                    coefficients,
                    noise,
                    tolerance=None if noise else peers.TOLERANCE[dtype],
                    with_compile=with_compile,
                ),
                **triton_peer(mq.affine_step, xs, coefficients, out=torch.empty_like(out), **drawn),
            },
            floors=(floors.triad(xs, out),) if device == "cpu" else gpu_floors(xs, out),
        )

    goals: list[Goal] = []
    if not noise and dtype is torch.float32 and device == "cpu":
        goals.append(Goal("triad", AFFINE_TRIAD))
        goals += [Goal("eager", AFFINE_EAGER)] if terms > 1 else []
    traffic = (terms + 1) * size(shape, dtype)
    if not noise and device != "cpu" and dtype is torch.float32 and traffic >= GPU_COPY_BYTES:
        goals.append(Goal("copy", GPU_COPY))
    return Row(
        op="affine_step",
        variant=f"{terms} term{'s' if terms > 1 else ''}" + (" and noise" if noise else ""),
        shape=shape,
        dtype=dtype,
        device=device,
        build=build,
        traffic=traffic,
        flops=(2 * terms - 1) * math.prod(shape),
        goals=tuple(goals),
    )


# --- what a call costs ------------------------------------------------------------------------------------


def call_row(op: str, device: str, gradients: bool) -> Row:
    """One element, allocating: what is left of the time is the call. The unit is a call of torch.add."""
    shape = (1, 1)

    def build() -> Contest:
        eps, prev = (torch.full(shape, value, device=device) for value in (0.75, 0.5))
        plus = eps.clone()
        for t in (eps, plus):
            t.requires_grad_(gradients)
        if op == "lm_direction":

            def call() -> Tensor:
                return mq.lm_direction(eps, prev, damping=DAMPING, kappa=KAPPA)

            def exact() -> Tensor:
                return reference.lm_direction(*doubles(eps, prev), damping=DAMPING, kappa=KAPPA)
        else:

            def call() -> Tensor:
                return mq.affine_step([eps, prev], (0.9, -0.3))

            def exact() -> Tensor:
                return reference.affine_step(doubles(eps, prev), (0.9, -0.3))

        return Contest(
            subject=call,
            oracle=lambda: [exact()],
            tolerance=5e-7,
            peers={"torch.add": Peer(lambda: torch.add(plus, prev), None)},
        )

    bound = CALL_COST_WITH_GRADIENTS if gradients else CALL_COST
    return Row(
        op=op,
        variant="call cost" + (" with gradients" if gradients else ""),
        shape=shape,
        dtype=torch.float32,
        device=device,
        build=build,
        traffic=12,
        flops=11,
        goals=(Goal("torch.add", bound, slower=True),) if device == "cpu" else (),
    )


# --- the suite --------------------------------------------------------------------------------------------


def lm_rows(device: str, full: bool) -> list[Row]:
    on_cpu, f32 = device == "cpu", torch.float32
    as_copy = (Goal("triad", AFFINE_TRIAD),) if on_cpu else ()
    made = []
    if on_cpu:
        for shape, (eager, compiled) in LM_GOALS.items():
            goals = (Goal("eager", eager), Goal("compile", compiled), Goal("traffic", LM_TRAFFIC))
            made.append(lm_row(shape, f32, device, goals=goals))
    else:
        for shape in (*GPU_LATENTS, *GPU_LARGE):
            wanted = gpu_goals(shape, 3 * size(shape, f32))
            made.append(lm_row(shape, f32, device, goals=wanted, with_compile=full or shape in GPU_LATENTS))
    # Compiling a peer takes seconds, so a quick run does it where a goal asks for it.
    make = functools.partial(lm_row, device=device, with_compile=full)
    for dtype in (torch.bfloat16, torch.float16):
        made += [make(shape, dtype) for shape in (LATENT, LARGE_LATENT)]
    made += [
        make(LARGE_LATENT, f32, variant="kappa per sample", kappa="per sample"),
        make(LARGE_LATENT, f32, variant="extrapolation", gamma=GAMMA),
        make(LARGE_LATENT, f32, variant="kappa 0", kappa=0.0, goals=as_copy),
        lm_backward_row(LATENT, device, with_compile=full),
        lm_backward_row(LARGE_LATENT, device, with_compile=True),
    ]
    if full:
        made += [make(LARGE_LATENT, torch.float64), make((2, 16, 21, 60, 104), f32, variant="video")]
        made += [make((4, 4096, 64), f32, variant="tokens"), make((256, 3, 32, 32), f32)]
    return made


def affine_rows(device: str, full: bool) -> list[Row]:
    f32 = torch.float32
    make = functools.partial(affine_row, device=device)
    made = [make(k, LARGE_LATENT, f32, with_compile=full or k == 3) for k in (1, 2, 3, 8)]
    made.append(make(3, (64, 4, 128, 128), f32, with_compile=full))
    made.append(make(3, LARGE_LATENT, torch.bfloat16, with_compile=full))
    made.append(make(2, LARGE_LATENT, f32, noise=0.5, with_compile=full))
    if full:
        made.append(make(3, LATENT, f32, with_compile=True))
        made.append(make(3, LARGE_LATENT, torch.float16, with_compile=True))
        made.append(make(2, (64, 4, 128, 128), f32, noise=0.5, with_compile=True))
    return made


def rows(device: str, full: bool) -> list[Row]:
    # A device's launches overlap, so the host's cost of a call is measured on the CPU alone.
    kinds = (
        [(op, g) for op in ("lm_direction", "affine_step") for g in (False, True)] if device == "cpu" else []
    )
    calls = [call_row(op, device, gradients) for op, gradients in kinds]
    return [*lm_rows(device, full), *affine_rows(device, full), *calls]


def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
