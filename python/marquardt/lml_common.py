"""What the steps of the LML samplers have in common: guidance, noise, bounds on x₀, checks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from . import checks, errors
from . import lml_coefficients as numbers
from .langevin import affine_step
from .lml_coefficients import Pair
from .noise import Generator, draw_seed
from .scalars import Scalar
from .step import Step

Tensor = torch.Tensor
Guidance = tuple[Tensor, Scalar]

_warned: set[str] = set()


def key_of(
    op: str, rule: tuple[Any, ...], prev: Tensor | None, guidance: Any, rest: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Under what the numbers of a step are kept: None where one of `rule` or the guidance is no plain float."""
    for number in rule:
        if number is not None and type(number) is not float:
            return None
    if guidance is None:
        return (op, rule, prev is None, None, rest)
    if type(guidance) is not tuple or len(guidance) != 2 or type(guidance[1]) is not float:
        return None
    return (op, rule, prev is None, guidance[1], rest)


def warn_orthogonal(op: str, kappa: Any, damping: Any, square: float) -> None:
    """κ‖e‖² ≫ λ: the damped inverse takes the whole of e along the mix away. Known without looking at the data."""
    if op in _warned or type(kappa) is not float or type(damping) is not float or kappa == 0.0:
        return
    if abs(kappa) * square > 1e3 * damping:
        _warned.add(op)
        warnings.warn(
            f"{op}: kappa·‖direction‖² (about {abs(kappa) * square:.3g} for a direction of unit variance) is far above "
            f"damping ({damping:.3g}), so the step is nearly orthogonal to the direction; extrapolation=γ says how far "
            "to go along eps − prev instead",
            stacklevel=3,
        )


def guided(op: str, guidance: Any) -> tuple[Tensor | None, Scalar]:
    """(uncond, scale); scale 1 without guidance."""
    if guidance is None:
        return None, 1.0
    if not isinstance(guidance, (tuple, list)) or len(guidance) != 2:
        raise errors.kind(op, "guidance", "be a pair (uncond, scale)", type(guidance).__name__)
    uncond, scale = guidance
    if not isinstance(uncond, torch.Tensor):
        raise errors.kind(op, "guidance[0]", "be a tensor", type(uncond).__name__)
    return uncond, numbers.wide(scale)


def add_output(
    step: Step,
    name: str,
    t: Tensor,
    uncond: Tensor | None,
    scale: Scalar,
    a: Scalar,
    d: Scalar,
    y: Scalar = 0.0,
) -> None:
    """A network output g = uncond + scale·(t − uncond), as one tensor or two."""
    if uncond is None:
        step.add(name, t, a, d, y)
        return
    step.guided = True  # uncond + scale·(t − uncond)
    step.add(name, t, a * scale, d * scale, y * scale)
    step.add("guidance[0]", uncond, a, d, y)


def add_noise(step: Step, scale: Scalar, noise: Tensor | None, generator: Generator, seed: Any) -> None:
    """ξ with this scale: given, or drawn in the kernel. Nothing where the scale is a plain 0."""
    if noise is not None:
        for name, given in (("generator", generator), ("seed", seed)):
            if given is not None:
                raise errors.value(step.op, "noise", f"come without {name}", "both")
    if not isinstance(scale, (torch.Tensor, torch.SymFloat)) and scale == 0:
        return
    if noise is not None:
        step.add("noise", noise, scale, 0.0)
        return
    checks.floating(step.op, "sample", step.sample)
    checks.batched(step.op, "sample", step.sample, step.batch_dims)
    step.seed = draw_seed(step.op, step.sample, generator, seed, step.batch_dims)
    step.noise = (scale, 0.0)


def checked_active(op: str, active: Any, sample: Tensor, batch_dims: int) -> Tensor | None:
    if active is None:
        return None
    if not isinstance(active, torch.Tensor) or active.dtype != torch.bool:
        got = (
            str(active.dtype).removeprefix("torch.")
            if isinstance(active, torch.Tensor)
            else type(active).__name__
        )
        raise errors.kind(op, "active", "be a bool tensor", got)
    shape = (sample.shape[0],) if batch_dims else ()
    if tuple(active.shape) != shape:
        raise errors.value(op, "active", f"have shape {list(shape)}", list(active.shape))
    return active


def within(op: str, name: str, value: Any, low: float, high: float, rule: str) -> None:
    """A number of the host lies in [low, high]."""
    if isinstance(value, (float, int)) and not low <= value <= high:
        raise errors.value(op, name, rule, value)


def one_of(op: str, name: str, value: Any, names: Sequence[str]) -> None:
    if value not in names:
        raise errors.value(op, name, f"be one of {', '.join(names)}", repr(value))


def bounds(op: str, clip: Scalar | None, threshold: Any) -> None:
    if clip is not None and threshold is not None:
        raise errors.value(op, "clip", "come without threshold", "both")
    within(op, "clip", clip, 0.0, math.inf, "be >= 0")
    if threshold is not None and (not isinstance(threshold, (tuple, list)) or len(threshold) != 2):
        raise errors.kind(op, "threshold", "be a pair (ratio, maximum)", type(threshold).__name__)


def scale_of_x0(
    op: str, sample: Tensor, model_output: Tensor, uncond: Tensor | None, scale: Scalar, x0: Pair, threshold: Any,
    batch_dims: int,
) -> Tensor:  # fmt: skip
    """The divisor of dynamic thresholding, [B]: a pass for x₀ and a selection."""
    terms = [sample, model_output] if uncond is None else [sample, model_output, uncond]
    factors = [x0.x, x0.g] if uncond is None else [x0.x, x0.g * scale, x0.g * (1.0 - scale)]
    from .threshold import threshold_scale

    predicted = affine_step(terms, factors, batch_dims=batch_dims)
    divisor = threshold_scale(predicted, threshold[0], threshold[1], batch_dims)[:, 0]
    return divisor if batch_dims else divisor[0]
