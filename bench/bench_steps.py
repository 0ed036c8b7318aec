"""Steps of samplers: LML on DDIM, DPM-Solver and flows, plain DDIM, and Langevin dynamics with noise from the kernel.

The peers are the arithmetic of the published schedulers, its torch.compile, and diffusers' own step if installed. Goals
are for two cores in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import marquardt as mq
from marquardt import reference

from . import floors, peers_steps
from .bench_frame import doubles, eager_and_compiled, gpu_floors, size, unit
from .protocol import outputs
from .row import Contest, Floor, Goal, Peer, Row

DDIM_SHAPES = ((1, 4, 64, 64), (16, 4, 64, 64), (8, 4, 128, 128), (16, 16, 128, 128))
LATENT, LARGE_LATENT = (16, 4, 64, 64), (8, 4, 128, 128)
EAGER, COMPILE, TRAFFIC = 15, 4, 0.8  # lml_ddim_step with guidance
DPM_EAGER = 20
PLAIN_TRIAD, PLAIN_DIFFUSERS = 0.85, 5  # kappa 0
NOISE_EAGER, NOISE_RANDN, NOISE_FLOOR = 3, 1, 0.6

NOW, THEN = 500, 480
SCALE, KAPPA = 7.5, 0.1


def damping_of(shape: tuple[int, ...]) -> float:
    """λ of the size of ‖ε‖², where the published float32 formula still has its digits."""
    return float(math.prod(shape[1:]))


def made(shape: tuple[int, ...], dtype: torch.dtype, device: str, count: int) -> list[Tensor]:
    """`count` tensors; consecutive ones have correlation 0.9, as the outputs of a model along a trajectory."""
    generator = torch.Generator().manual_seed(0)
    found = [torch.randn(*shape, generator=generator)]
    while len(found) < count:
        found.append(0.9 * found[-1] + math.sqrt(1 - 0.81) * torch.randn(*shape, generator=generator))
    return [t.to(device, dtype) for t in found]


def floors_of(swept: list[Tensor], others: list[Tensor], outs: list[Tensor]) -> tuple[Floor, ...]:
    """`swept` is read twice, for the Gram and for the outputs; `others` once."""
    inputs = [*swept, *others]
    if outs[0].device.type != "cpu":
        return gpu_floors([*inputs, *outs[1:]], outs[0])
    lowest = floors.triad(inputs, *outs)
    return (lowest, floors.traffic(lowest, swept, outs[0])) if swept else (lowest,)


# --- DDIM -------------------------------------------------------------------------------------------------


def ddim_row(
    shape: tuple[int, ...], device: str, *, pair: tuple[torch.dtype, torch.dtype] = (torch.float32,) * 2,
    with_compile: bool, goals: tuple[Goal, ...] = (),
) -> Row:  # fmt: skip
    """Guidance, LM and step in one pass: (x', ε) from x, two outputs of the model and prev."""
    state, model = pair

    def build() -> Contest:
        sample, prev, cond, uncond = made(shape, state, device, 4)
        prev, cond, uncond = (t.to(model) for t in (prev, cond, uncond))
        table = peers_steps.cumulative()
        damping = damping_of(shape)
        given: dict[str, Any] = {
            "alpha_bar": table[NOW].item(), "alpha_bar_next": table[THEN].item(), "damping": damping, "kappa": KAPPA,
        }  # fmt: skip
        arguments = (sample, cond, uncond, prev, table, NOW, THEN, SCALE, damping, KAPPA)

        def oracle() -> list[Tensor]:
            x, c, u, p = doubles(sample, cond, uncond, prev)
            return list(reference.lml_ddim_step(x, c, p, guidance=(u, SCALE), **given))[:kept]

        kept = 2 if model == state else 1  # outputs of a row have one dtype
        outs = [torch.empty_like(sample), torch.empty_like(cond)]
        return Contest(
            subject=lambda: mq.lml_ddim_step(sample, cond, prev, guidance=(uncond, SCALE), **given)[:kept],
            oracle=oracle,
            tolerance=5e-7 + unit(model) + unit(state),
            peers=eager_and_compiled(
                peers_steps.published_ddim,
                *arguments,
                tolerance=None if model != state else 1e-2,
                with_compile=with_compile,
            ),  # fmt: skip
            floors=floors_of([cond, uncond, prev], [sample], outs) if model == state else (),
        )

    traffic = 2 * size(shape, state) + 4 * size(shape, model)
    variant = "guided" if model == state else "guided, model in half"
    return Row(
        op="lml_ddim_step", variant=variant, shape=shape, dtype=state, device=device, build=build, traffic=traffic,
        flops=20 * math.prod(shape), goals=goals,
    )  # fmt: skip


def diffusers_ddim(table: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
    """diffusers' own step from NOW to THEN, if it is installed."""
    try:
        from diffusers import DDIMScheduler
    except ImportError:
        return None
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
        set_alpha_to_one=False, timestep_spacing="leading",
    )  # fmt: skip
    scheduler.set_timesteps(1000 // (NOW - THEN))
    return lambda sample, output: scheduler.step(output, NOW, sample, return_dict=False)[0]


def plain_row(shape: tuple[int, ...], device: str, *, with_compile: bool, goals: tuple[Goal, ...]) -> Row:
    """κ = 0: plain DDIM."""
    dtype = torch.float32

    def build() -> Contest:
        sample, cond = made(shape, dtype, device, 2)
        table = peers_steps.cumulative()
        given = {"alpha_bar": table[NOW].item(), "alpha_bar_next": table[THEN].item()}

        def eager(x: Tensor, c: Tensor) -> Tensor:
            return peers_steps.published_ddim(x, c, None, None, table, NOW, THEN, 1.0, 0.0, 0.0)[0]

        rivals = eager_and_compiled(eager, sample, cond, tolerance=1e-3, with_compile=with_compile)
        stock = diffusers_ddim(table)
        if stock is not None:
            rivals["diffusers"] = Peer(lambda: stock(sample, cond), 1e-3)
        return Contest(
            subject=lambda: mq.lml_ddim_step(sample, cond, **given)[0],
            oracle=lambda: [reference.lml_ddim_step(*doubles(sample, cond), **given)[0]],
            tolerance=2e-7,
            peers=rivals,
            floors=floors_of([], [sample, cond], [torch.empty_like(sample)]),
        )

    return Row(
        op="lml_ddim_step", variant="kappa 0", shape=shape, dtype=dtype, device=device, build=build,
        traffic=3 * size(shape, dtype), flops=3 * math.prod(shape), goals=goals,
    )  # fmt: skip


# --- DPM-Solver and flows ---------------------------------------------------------------------------------


def dpm_row(shape: tuple[int, ...], device: str, *, with_compile: bool, goals: tuple[Goal, ...] = ()) -> Row:
    """The third-order update: (x', N) from x, three outputs and N of the step before."""
    dtype, times = torch.float32, (THEN, NOW, NOW + 20, NOW + 40)

    def build() -> Contest:
        sample, m2, m1, m0, prev = made(shape, dtype, device, 5)
        table = peers_steps.cumulative()
        alphas = [math.sqrt(table[i].item()) for i in times]
        sigmas = [math.sqrt(1 - a * a) for a in alphas]
        lambdas = [math.log(a / s) for a, s in zip(alphas, sigmas, strict=True)]
        increment = abs(sigmas[0] * math.expm1(lambdas[0] - lambdas[1]))
        prev = increment * prev
        damping = damping_of(shape) * increment**2
        given: dict[str, Any] = {
            "lambdas": lambdas, "alphas": alphas, "sigmas": sigmas, "order": 3, "algorithm": "dpmsolver",
            "damping": damping, "kappa": KAPPA,
        }  # fmt: skip
        outs = [torch.empty_like(sample) for _ in range(2)]

        def oracle() -> list[Tensor]:
            x, a, b, c, p = doubles(sample, m0, m1, m2, prev)
            return list(reference.lml_dpm_step(x, [a, b, c], p, **given))

        return Contest(
            subject=lambda: mq.lml_dpm_step(sample, [m0, m1, m2], prev, **given),
            oracle=oracle,
            tolerance=5e-7,
            peers=eager_and_compiled(
                peers_steps.published_dpm3,
                sample,
                (m0, m1, m2),
                prev,
                table,
                times,
                damping,
                KAPPA,
                tolerance=1e-2,
                with_compile=with_compile,
            ),  # fmt: skip
            floors=floors_of([m0, m1, m2, prev], [sample], outs),
        )

    return Row(
        op="lml_dpm_step", variant="order 3", shape=shape, dtype=dtype, device=device, build=build,
        traffic=7 * size(shape, dtype), flops=24 * math.prod(shape), goals=goals,
    )  # fmt: skip


def flow_row(shape: tuple[int, ...], device: str, model: torch.dtype, *, with_compile: bool) -> Row:
    """x' from a float32 state, v and the v before in the model's dtype."""

    def build() -> Contest:
        sample, prev, velocity = made(shape, torch.float32, device, 3)
        prev, velocity = prev.to(model), velocity.to(model)
        damping = damping_of(shape)
        given = {"dt": -0.05, "damping": damping, "kappa": KAPPA}

        def exact() -> list[Tensor]:
            x, v, p = doubles(sample, velocity, prev)
            return [reference.lml_flow_step(x, v, p, **given)[0]]

        def eager(x: Tensor, v: Tensor, p: Tensor) -> Tensor:
            return peers_steps.published_flow(x, v, p, -0.05, damping, KAPPA)[0]

        return Contest(
            subject=lambda: mq.lml_flow_step(sample, velocity, prev, **given)[0],
            oracle=exact,
            tolerance=3e-7,
            peers=eager_and_compiled(
                eager,
                sample,
                velocity,
                prev,
                tolerance=1e-3 if model == torch.float32 else None,
                with_compile=with_compile,
            ),  # fmt: skip
            floors=floors_of([velocity, prev], [sample], [torch.empty_like(sample)])
            if model == torch.float32
            else (),
        )

    return Row(
        op="lml_flow_step", variant="" if model == torch.float32 else f"model {str(model).removeprefix('torch.')}",
        shape=shape, dtype=torch.float32, device=device, build=build,
        traffic=2 * size(shape, torch.float32) + 2 * size(shape, model), flops=12 * math.prod(shape),
    )  # fmt: skip


# --- Langevin ---------------------------------------------------------------------------------------------


def langevin_row(
    shape: tuple[int, ...],
    device: str,
    *,
    variant: str = "",
    with_compile: bool,
    goals: tuple[Goal, ...] = (),
) -> Row:
    """x + h·s + √(2hT)·ξ, or the signal-to-noise rule, with ξ from the kernel; the peers draw their own."""
    dtype, h, ratio = torch.float32, 0.01, 0.16

    def build() -> Contest:
        x, score = made(shape, dtype, device, 2)
        seed = torch.tensor([5, 7], device=device)
        rule: dict[str, Any] = {"snr": ratio} if variant else {"step": h}

        def by_ratio(x: Tensor, s: Tensor) -> Tensor:
            dims = tuple(range(1, x.dim()))
            xi = torch.randn_like(x)
            size = torch.linalg.vector_norm(xi, dim=dims, keepdim=True)
            step = 2 * (ratio * size / torch.linalg.vector_norm(s, dim=dims, keepdim=True)) ** 2
            return x + step * s + torch.sqrt(2 * step) * xi

        def plain(x: Tensor, s: Tensor) -> Tensor:
            return peers_steps.eager_langevin(x, s, h, 1.0)

        rivals = eager_and_compiled(
            by_ratio if variant else plain, x, score, tolerance=None, with_compile=with_compile
        )
        rivals["torch.randn"] = Peer(lambda: torch.randn(shape, device=device), None)
        return Contest(
            subject=lambda: mq.langevin_step(x, score, seed=seed, **rule),
            oracle=lambda: [reference.langevin_step(*doubles(x, score), seed=seed, **rule)],
            tolerance=5e-7,
            peers=rivals,
            floors=(floors.noise(x.numel()), *floors_of([], [x, score], [torch.empty_like(x)]))
            if device == "cpu"
            else (),
        )

    return Row(
        op="langevin_step", variant=variant, shape=shape, dtype=dtype, device=device, build=build,
        traffic=3 * size(shape, dtype), flops=5 * math.prod(shape), goals=goals,
    )  # fmt: skip


def underdamped_row(shape: tuple[int, ...], device: str, *, with_compile: bool) -> Row:
    """baoab: (x', v') from x, v, the score and ξ."""
    dtype, h, gamma = torch.float32, 0.1, 1.0

    def build() -> Contest:
        x, v, score = made(shape, dtype, device, 3)
        seed = torch.tensor([5, 7], device=device)
        c = math.exp(-gamma * h)

        def eager(x: Tensor, v: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
            v = v + h * s
            x = x + 0.5 * h * v
            v = c * v + math.sqrt(1 - c * c) * torch.randn_like(v)
            return x + 0.5 * h * v, v

        given: dict[str, Any] = {"step": h, "friction": gamma, "seed": seed}
        return Contest(
            subject=lambda: mq.underdamped_langevin_step(x, v, score, **given),
            oracle=lambda: outputs(reference.underdamped_langevin_step(*doubles(x, v, score), **given)),
            tolerance=5e-7,
            peers=eager_and_compiled(eager, x, v, score, tolerance=None, with_compile=with_compile),
            floors=(floors.noise(x.numel()),) if device == "cpu" else (),
        )

    return Row(
        op="underdamped_langevin_step", variant="baoab", shape=shape, dtype=dtype, device=device, build=build,
        traffic=5 * size(shape, dtype), flops=9 * math.prod(shape),
    )  # fmt: skip


# --- the suite --------------------------------------------------------------------------------------------


def rows(device: str, full: bool) -> list[Row]:
    f32, on_cpu = torch.float32, device == "cpu"
    fused = (Goal("eager", EAGER), Goal("compile", COMPILE), Goal("traffic", TRAFFIC)) if on_cpu else ()
    multistep = (Goal("eager", DPM_EAGER),) if on_cpu else ()
    plain = [Goal("triad", PLAIN_TRIAD)] if on_cpu else []
    if on_cpu and diffusers_ddim(peers_steps.cumulative()) is not None:
        plain.append(Goal("diffusers", PLAIN_DIFFUSERS))
    noisy = (
        (Goal("eager", NOISE_EAGER), Goal("torch.randn", NOISE_RANDN), Goal("noise", NOISE_FLOOR))
        if on_cpu
        else ()
    )
    half = functools.partial(ddim_row, device=device, pair=(f32, torch.bfloat16), with_compile=full)
    found = [ddim_row(shape, device, with_compile=True, goals=fused) for shape in DDIM_SHAPES]
    found.append(half(LARGE_LATENT))
    found += [
        plain_row(shape, device, with_compile=full, goals=tuple(plain)) for shape in (LATENT, LARGE_LATENT)
    ]
    found += [dpm_row(shape, device, with_compile=full, goals=multistep) for shape in (LATENT, LARGE_LATENT)]
    found.append(flow_row((4, 4096, 64), device, torch.bfloat16, with_compile=full))
    found += [langevin_row(shape, device, with_compile=full, goals=noisy) for shape in (LATENT, LARGE_LATENT)]
    found.append(langevin_row(LARGE_LATENT, device, variant="snr", with_compile=full))
    found.append(underdamped_row(LARGE_LATENT, device, with_compile=full))
    if full:
        found.append(flow_row((4, 4096, 64), device, f32, with_compile=True))
        found += [
            plain_row(shape, device, with_compile=True, goals=tuple(plain))
            for shape in ((1, 4, 64, 64), (16, 16, 128, 128))
        ]
        found += [
            dpm_row(shape, device, with_compile=True, goals=multistep)
            for shape in ((1, 4, 64, 64), (16, 16, 128, 128))
        ]
    return found


def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
