"""Langevin dynamics: one step of a chain in one memory pass."""

from __future__ import annotations

import math
from typing import Any

import torch

from . import checks, errors, scalars
from . import lml_coefficients as numbers
from .langevin import AFFINE, affine_step
from .lml_common import on_host, scalar, state, state_like
from .lowrank import lowrank_inv_sqrt, lowrank_solve
from .lowrank_hessian import LowRankHessian
from .noise import Generator, draw_seed, one_source
from .scalars import Scalar
from .step import SNR, STATE_DIRECTION, Step, rename

Tensor = torch.Tensor
Preconditioner = LowRankHessian | tuple[Tensor, Tensor | None, Scalar]

SCHEMES = ("baoab", "obabo", "euler")


def _at_least_zero(op: str, name: str, value: Any) -> None:
    for known in on_host(value):
        if not (known >= 0 and math.isfinite(known)):
            raise errors.value(op, name, "be finite and >= 0", known)


def _is_zero(x: Scalar) -> bool:
    """Whether a number of the host is 0; what is a tensor is not looked into."""
    return not isinstance(x, (torch.Tensor, torch.SymFloat)) and x == 0


def langevin_step(
    x: Tensor,
    score: Tensor,
    *,
    step: Scalar | None = None,
    snr: Scalar | None = None,
    temperature: Scalar = 1.0,
    hessian: Preconditioner | None = None,
    noise: Tensor | None = None,
    generator: Generator = None,
    seed: Tensor | int | None = None,
    batch_dims: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    r"""One step of (unadjusted) Langevin dynamics, its noise drawn in the kernel.

        x' = x + h P score + √(2hT) P^½ ξ,      P = 1, or H⁻¹ of a damped low-rank Hessian

    Args:
        x: [B, *sample]; score: like `x`, in its dtype or a narrower one: ∇ log p(x).
        step: h ≥ 0: number, 0-dim tensor or [B].
        snr: r instead of step: h = 2(r‖ξ‖/‖score‖)² per sample, the corrector of score-based SDE samplers. Where the
            score is all 0 there is no step.
        temperature: T ≥ 0.
        hessian: a `LowRankHessian`, or (U, s, damping) as in `lowrank_solve`; with `step` only.
        noise: ξ given instead of drawn, like `x`; generator, seed: as in `affine_step`.
        out: where to write; may be `x` itself.

    Returns:
        Tensor like `x`.

    >>> import torch, marquardt as mq
    >>> x = torch.tensor([[1.0, -2.0]])
    >>> mq.langevin_step(x, -x, step=0.1, noise=torch.zeros(1, 2))
    tensor([[ 0.9000, -1.8000]])
    """
    op = "langevin_step"
    if (step is None) == (snr is None):
        raise errors.value(
            op, "step", "be given, or snr, and not both", "both" if snr is not None else "neither"
        )
    one_source(op, noise, generator, seed)
    _at_least_zero(op, "temperature", scalar(op, "temperature", temperature, x, batch_dims, "x"))
    if snr is not None:
        _at_least_zero(op, "snr", scalar(op, "snr", snr, x, batch_dims, "x"))
        if hessian is not None:
            raise errors.value(op, "hessian", "come with step, not with snr", "both")
        made = _by_ratio(x, score, snr, temperature, noise, generator, seed, batch_dims)
        return made if out is None else _into(op, out, made, x, score, noise)
    assert step is not None
    h = scalar(op, "step", step, x, batch_dims, "x")
    _at_least_zero(op, "step", h)
    t = scalar(op, "temperature", temperature, x, batch_dims, "x")
    scale: Scalar = 0.0 if _is_zero(h) or _is_zero(t) else numbers.root(2.0 * h * t)
    if hessian is not None:
        made = _preconditioned(x, score, h, scale, hessian, noise, generator, seed, batch_dims)
        return made if out is None else _into(op, out, made, x, score, noise)
    return _plain(x, score, h, scale, noise, generator, seed, batch_dims, out)


_PLAIN_NAMES = {"terms[0]": "x", "terms[1]": "score", "terms[2]": "noise"}


def _plain(
    x: Tensor, score: Tensor, h: Scalar, scale: Scalar, noise: Tensor | None, generator: Generator, seed: Any,
    batch_dims: int, out: Tensor | None,
) -> Tensor:  # fmt: skip
    op = "langevin_step"
    terms, values = [x, score], [1.0, h]
    drawn = None
    if noise is not None:
        terms.append(noise)
        values.append(scale)
    elif not _is_zero(scale):
        state(op, x, batch_dims, "x")
        drawn = draw_seed(op, x, generator, seed, batch_dims)
        values.append(scale)
    if all(type(v) is float for v in values):
        coef = scalars.of_floats(tuple(values))  # type: ignore[arg-type]
    else:
        state(op, x, batch_dims, "x")
        coef = scalars.pack(op, ("x", "step", "temperature")[: len(values)], values, x, batch_dims)
    try:
        if out is None:
            made: Tensor = AFFINE.call(terms, coef, drawn, batch_dims)
            return made
        return AFFINE.to_out(out, terms, coef, drawn, batch_dims)
    except (TypeError, ValueError, RuntimeError) as error:
        raise rename(error, "affine_step", op, _PLAIN_NAMES) from None


def _by_ratio(
    x: Tensor, score: Tensor, snr: Scalar, temperature: Scalar, noise: Tensor | None, generator: Generator, seed: Any,
    batch_dims: int,
) -> Tensor:  # fmt: skip
    op = "langevin_step"
    state(op, x, batch_dims, "x")
    r, t = (
        scalar(op, "snr", snr, x, batch_dims, "x"),
        scalar(op, "temperature", temperature, x, batch_dims, "x"),
    )
    made = Step(
        op, x, batch_dims, [1.0], [0.0], variant=SNR, rule=(r, t), prev=noise, prev_name="noise", name="x"
    )
    if noise is None:
        made.seed = draw_seed(op, x, generator, seed, batch_dims)
    made.add("score", score, 0.0, 1.0)
    return made.run(0)[0]


def _preconditioned(
    x: Tensor, score: Tensor, h: Scalar, scale: Scalar, hessian: Any, noise: Tensor | None, generator: Generator,
    seed: Any, batch_dims: int,
) -> Tensor:  # fmt: skip
    """Three passes: H⁻¹ score, H^(−1/2) ξ, and their sum."""
    op = "langevin_step"
    state(op, x, batch_dims, "x")
    checks.like(op, "score", score, "x", x)
    if noise is not None:
        checks.like(op, "noise", noise, "x", x)
    if not isinstance(hessian, LowRankHessian) and not (
        isinstance(hessian, (tuple, list)) and len(hessian) == 3
    ):
        raise errors.kind(op, "hessian", "be a LowRankHessian or (U, s, damping)", type(hessian).__name__)

    def solve(g: Tensor) -> Any:
        if isinstance(hessian, LowRankHessian):
            return hessian.solve(g)
        return lowrank_solve(g, hessian[0], hessian[1], damping=hessian[2], batch_dims=batch_dims)

    def inv_sqrt(z: Tensor) -> Any:
        if isinstance(hessian, LowRankHessian):
            return hessian.inv_sqrt(z)
        return lowrank_inv_sqrt(z, hessian[0], hessian[1], damping=hessian[2], batch_dims=batch_dims)

    terms, values = [x, solve(score.to(x.dtype))], [1.0, h]
    if not _is_zero(scale):
        if noise is None:
            drawn = draw_seed(op, x, generator, seed, batch_dims)
            noise = affine_step(
                [torch.zeros_like(x)], [0.0], noise_scale=1.0, seed=drawn, batch_dims=batch_dims
            )
        terms.append(inv_sqrt(noise.to(x.dtype)))
        values.append(scale)
    return affine_step(terms, values, batch_dims=batch_dims)


def _into(op: str, out: Tensor, made: Tensor, *inputs: Tensor | None) -> Tensor:
    """`out` filled with a result that was made beside it."""
    checks.out(op, out, "x", made, inputs)
    if torch.is_grad_enabled() and (made.requires_grad or out.requires_grad):
        raise RuntimeError(
            f"{op}: out= does not support automatic differentiation, but one of the arguments requires grad; call it "
            "under torch.no_grad() or without out="
        )
    return out.copy_(made)


Row = tuple[Scalar, ...]


def _closing(h: Scalar) -> tuple[Row, Row]:
    """The half kick that ends a chain."""
    return (1.0, 0.0, 0.0, 0.0), (0.0, 1.0, 0.5 * h, 0.0)


def _underdamped(
    scheme: str, h: Scalar, friction: Scalar, temperature: Scalar, start: bool
) -> tuple[Row, Row]:
    """Multiples of (x, v, score, ξ) that make x' and v'."""
    if scheme == "euler":
        noise = numbers.root(2.0 * friction * temperature * h)
        on_v = (0.0, 1.0 - h * friction, h, noise)
        return (1.0, h * on_v[1], h * on_v[2], h * noise), on_v
    c = numbers.exp(-friction * h)
    noise = numbers.root(-temperature * numbers.expm1(-2.0 * friction * h))
    if scheme == "baoab":  # v₁ = v + kick·s; x₁ = x + ½h·v₁; v' = c·v₁ + noise·ξ; x' = x₁ + ½h·v'
        kick = 0.5 * h if start else h
        half = 0.5 * h * (1.0 + c)
        return (1.0, half, half * kick, 0.5 * h * noise), (0.0, c, c * kick, noise)
    # obabo: v₁ = v + ½h·s; v' = c·v₁ + noise·ξ + ½h·s; x' = x + h·v'
    kick = (0.0 if start else 0.5 * h * c) + 0.5 * h
    return (1.0, h * c, h * kick, h * noise), (0.0, c, kick, noise)


def underdamped_langevin_step(
    x: Tensor,
    v: Tensor,
    score: Tensor,
    *,
    step: Scalar,
    friction: Scalar,
    temperature: Scalar = 1.0,
    scheme: str = "baoab",
    start: bool = False,
    finish: bool = False,
    noise: Tensor | None = None,
    generator: Generator = None,
    seed: Tensor | int | None = None,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""One step of underdamped (kinetic) Langevin dynamics of unit mass, positions and velocities in one memory pass.

    With s the score at x, h = step, γ = friction, c = e^(−γh), k = √(T(1 − c²)), in this order:

        baoab   v += h s;   x += ½h v;   v = c v + k ξ;   x += ½h v
        obabo   v += ½h s;  v = c v + k ξ;   v += ½h s;   x += h v
        euler   v += h(s − γ v) + √(2γTh) ξ;   x += h v

    One score and one noise per call: the two half kicks of the splitting that meet at x are one. At the ends of a
    chain they are halves: `start` for its first call, and one last call with `finish`, whose score is that of the last
    x: it gives v the closing half kick ½h s and leaves x.

    Args:
        x, v: [B, *sample]; score: like them, in their dtype or a narrower one.
        step, friction, temperature: numbers, 0-dim tensors or [B], ≥ 0.
        scheme: "baoab", "obabo" or "euler", which has no half kicks.
        noise, generator, seed: as in `langevin_step`.

    Returns:
        (x', v').

    >>> import torch, marquardt as mq
    >>> x, v = torch.tensor([[1.0]]), torch.tensor([[0.0]])
    >>> mq.underdamped_langevin_step(x, v, -x, step=0.1, friction=0.0, temperature=0.0)
    (tensor([[0.9900]]), tensor([[-0.1000]]))
    """
    op = "underdamped_langevin_step"
    checks.one_of(op, "scheme", scheme, SCHEMES)
    if start and finish:
        raise errors.value(op, "start", "come without finish", "both")
    if (start or finish) and scheme == "euler":
        raise errors.value(op, "scheme", "be baoab or obabo where start or finish is asked", repr(scheme))
    one_source(op, noise, generator, seed)
    state(op, x, batch_dims, "x")
    state_like(op, "v", v, x, "x")
    named = (("step", step), ("friction", friction), ("temperature", temperature))
    h, gamma, t = (scalar(op, name, value, x, batch_dims, "x") for name, value in named)
    for (name, _), value in zip(named, (h, gamma, t), strict=True):
        _at_least_zero(op, name, value)
    on_x, on_v = _closing(h) if finish else _underdamped(scheme, h, gamma, t, start)
    made = Step(op, x, batch_dims, [on_x[0]], [on_v[0]], weight=0.0, name="x")
    made.add("v", v, on_x[1], on_v[1])
    made.add("score", score, on_x[2], on_v[2])
    if not (_is_zero(on_x[3]) and _is_zero(on_v[3])):
        made.add_noise(on_x[3], on_v[3], noise, generator, seed)
    new_x, new_v, _ = made.run(STATE_DIRECTION)
    return new_x, new_v
