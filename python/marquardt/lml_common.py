"""What the steps of the LML samplers have in common: guidance, noise, bounds on x₀, checks."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from . import checks, errors
from . import lml_coefficients as numbers
from .layout import batch_and_size
from .lml_coefficients import Pair
from .noise import Generator, one_source
from .scalars import Scalar, column
from .step import STATE_DIRECTION, Step, rename
from .threshold import threshold_scale

Tensor = torch.Tensor
Guidance = tuple[Tensor, Scalar]

_warned: set[str] = set()
_THRESHOLD = {"ratio": "threshold[0]", "maximum": "threshold[1]"}


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


def warn_orthogonal(
    op: str, kappa: Any, damping: Any, sample: Tensor, batch_dims: int, unit: float = 1.0
) -> None:
    """κ‖e‖² ≫ λ: the damped inverse takes all of e that lies along the mix away. The data are not looked at: their
    elements are taken to be about `unit`."""
    square = unit * unit * batch_and_size(sample, batch_dims)[1]
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


def guided(op: str, guidance: Any, sample: Any, batch_dims: int) -> tuple[Tensor | None, Scalar]:
    """(uncond, scale); scale 1 without guidance."""
    if guidance is None:
        return None, 1.0
    if not isinstance(guidance, (tuple, list)) or len(guidance) != 2:
        raise errors.kind(op, "guidance", "be a pair (uncond, scale)", type(guidance).__name__)
    uncond, scale = guidance
    if not isinstance(uncond, torch.Tensor):
        raise errors.kind(op, "guidance[0]", "be a tensor", type(uncond).__name__)
    return uncond, scalar(op, "guidance[1]", scale, sample, batch_dims)


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
    """ξ with this scale in x'. Nothing where the scale is a plain 0."""
    one_source(step.op, noise, generator, seed)
    if isinstance(scale, (torch.Tensor, torch.SymFloat)) or scale != 0:
        step.add_noise(scale, 0.0, noise, generator, seed)


def checked_active(op: str, active: Any, sample: Tensor, batch_dims: int) -> Tensor | None:
    """bool [B]."""
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
    """What the host knows of a number lies in [low, high]."""
    for known_value in on_host(value):
        if not low <= known_value <= high:
            raise errors.value(op, name, rule, known_value)


def on_host(value: Any) -> list[float]:
    """The numbers of a scalar that the host knows without waiting for a device."""
    if isinstance(value, torch.Tensor):
        rows = checks.host_values(value.reshape(1, -1))
        return [number for row in rows for number in row]
    return [value] if isinstance(value, (float, int)) else []


def scalar(op: str, name: str, value: Any, sample: Any, batch_dims: int, sample_name: str = "sample") -> Any:
    """A number as a float or a float64 tensor, 0-dim or [B]; None stays None."""
    if type(value) is float or value is None:
        return value
    state(op, sample, batch_dims, sample_name)
    return numbers.wide(column(op, name, value, batch_and_size(sample, batch_dims)[0], batch_dims))


def state(op: str, sample: Any, batch_dims: int, name: str = "sample") -> None:
    """A floating tensor with its batch."""
    checks.floating(op, name, sample)
    checks.batched(op, name, sample, batch_dims)


def state_like(op: str, name: str, t: Any, sample: Any, sample_name: str = "sample") -> None:
    """A tensor of the state has the dtype of the state."""
    if isinstance(t, torch.Tensor) and isinstance(sample, torch.Tensor) and t.dtype is not sample.dtype:
        rule = f"have the dtype of {sample_name} ({checks.name(sample.dtype)})"
        raise errors.kind(op, name, rule, checks.name(t.dtype))


def bounds(op: str, clip: Scalar | None, threshold: Any) -> None:
    """x₀ is held by one of the two, if at all."""
    if clip is not None and threshold is not None:
        raise errors.value(op, "clip", "come without threshold", "both")
    within(op, "clip", clip, 0.0, math.inf, "be >= 0")
    if threshold is not None and (not isinstance(threshold, (tuple, list)) or len(threshold) != 2):
        raise errors.kind(op, "threshold", "be a pair (ratio, maximum)", type(threshold).__name__)


def scale_of_x0(
    op: str, sample: Tensor, name: str, output: Tensor, uncond: Tensor | None, scale: Scalar, x0: Pair, threshold: Any,
    batch_dims: int,
) -> Tensor:  # fmt: skip
    """The divisor of dynamic thresholding, [B]: a pass for x₀ and a selection."""
    step = Step(op, sample, batch_dims, [0.0], [x0.x], weight=0.0)
    add_output(step, name, output, uncond, scale, 0.0, x0.g)
    predicted = step.run(STATE_DIRECTION)[1]
    try:
        divisor = threshold_scale(predicted, threshold[0], threshold[1], batch_dims)[:, 0]
    except (TypeError, ValueError) as error:
        raise rename(error, "dynamic_threshold", op, _THRESHOLD) from None
    return divisor if batch_dims else divisor[0]
