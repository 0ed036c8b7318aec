"""Argument checks of dynamic thresholding, in the words of csrc/select/threshold.cpp."""

from __future__ import annotations

from typing import Any

from . import checks, errors

OP = "dynamic_threshold"  # the public function, in which both operators are called


def threshold_scale(x: Any, coef: Any, batch_dims: int) -> None:
    """What the scale takes: 0 ≤ ratio ≤ 1 and maximum ≥ 1 where the host knows them."""
    checks.floating(OP, "x0", x)
    checks.batched(OP, "x0", x, batch_dims)
    checks.coefficients(OP, coef, 2, x, batch_dims)
    for ratio, maximum in checks.host_values(coef):
        if not 0.0 <= ratio <= 1.0:
            raise errors.value(OP, "ratio", "be between 0 and 1", ratio)
        if not maximum >= 1.0:
            raise errors.value(OP, "maximum", "be >= 1", maximum)


def threshold_apply(x: Any, coef: Any, batch_dims: int) -> None:
    """What the division and the clamp take."""
    checks.floating(OP, "x0", x)
    checks.batched(OP, "x0", x, batch_dims)
    checks.coefficients(OP, coef, 1, x, batch_dims)
