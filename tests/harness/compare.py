"""When a result is right: within twice the error of our reference formula in the same dtype, plus two ulp.

The tolerance is computed, never chosen. All comparisons are written as `all(error <= allowed)`, which a NaN fails.
"""

from __future__ import annotations

import numpy as np
import torch

Tensor = torch.Tensor
LD = np.longdouble


def wide(t) -> np.ndarray:
    """A tensor's values, exactly."""
    return (
        t.detach().to("cpu", torch.float64).numpy().astype(LD) if isinstance(t, Tensor) else np.asarray(t, LD)
    )


def rows(t, batch_dims: int = 1) -> np.ndarray:
    """[B, D]."""
    a = wide(t)
    batch = a.shape[0] if batch_dims else 1
    return a.reshape(batch, int(np.prod(a.shape[batch_dims:], dtype=np.int64)))


def ulp(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Distance between neighbouring numbers of `dtype` at |x|, subnormal numbers included."""
    info = torch.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(x), LD(info.tiny))))
    return np.exp2(exponent) * LD(info.eps)


def assert_within(actual, expected, allowed, what: str = "") -> None:
    error = np.abs(wide(actual) - wide(expected))
    good = error <= allowed
    if not np.all(good):
        excess = np.where(np.isnan(error), np.inf, error / np.maximum(allowed, LD("1e-4900")))
        worst = np.unravel_index(np.argmax(excess), excess.shape)
        raise AssertionError(
            f"{what}: {np.sum(~good)} of {good.size} elements are off; worst at {tuple(map(int, worst))}: "
            f"got {wide(actual)[worst]:.17g}, expected {wide(expected)[worst]:.17g}, "
            f"allowed error {np.broadcast_to(allowed, error.shape)[worst]:.3g}"
        )


def norm_error(actual, expected: np.ndarray, batch_dims: int = 1) -> np.ndarray:
    """‖actual − expected‖ / ‖expected‖ of each sample; 0 where both are 0."""
    a, e = rows(actual, batch_dims), rows(expected, batch_dims)
    gap, size = (np.sqrt((x * x).sum(-1)) for x in (a - e, e))
    return np.where((gap == 0) & (size == 0), 0, gap / np.where(size == 0, LD("1e-4900"), size))


def relative_error(actual, expected: np.ndarray, batch_dims: int = 1) -> float:
    """Largest error of an element relative to the largest element of its sample."""
    a, e = rows(actual, batch_dims), rows(expected, batch_dims)
    gap, size = (np.abs(x).max(axis=1, initial=0) for x in (a - e, e))
    return float(np.max(gap / np.where(size == 0, 1, size), initial=0))


def norm_bound(dtype: torch.dtype, stated: float) -> float:
    """The stated float32 bound; a narrower result adds its own rounding, float64 has only the ulp rule."""
    if dtype == torch.float64:
        return 1e-12
    return stated + (0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2)


def check(
    actual: Tensor,
    expected,
    reference: Tensor,
    stated: float | None,
    batch_dims: int = 1,
    what="",
    slack=0.0,
    usual=0.0,
) -> None:
    """Element by element against twice the reference's largest error in the sample, and norm-wise per sample.

    `stated` is the norm-wise bound in float32, None where none is stated; `slack` [B, D] comes on top of both.
    `usual` is the reference's largest error over other draws, relative to the largest element of the sample: in one
    draw alone the reference may have been lucky.
    """
    assert tuple(actual.shape) == tuple(expected.shape), (what, actual.shape, expected.shape)
    a, e, r = (rows(x, batch_dims) for x in (actual, expected, reference))
    own = np.abs(r - e).max(axis=1, keepdims=True, initial=0)
    own = np.maximum(own, LD(usual) * np.abs(e).max(axis=1, keepdims=True, initial=0))
    assert_within(a, e, 2 * own + 2 * ulp(e, actual.dtype) + slack, what)
    if stated is None:
        return
    gap, size, more = (np.sqrt((x * x).sum(-1)) for x in (a - e, e, np.broadcast_to(LD(1) * slack, e.shape)))
    below = (
        np.sqrt(LD(a.shape[1]))
        * LD(torch.finfo(actual.dtype).smallest_normal)
        * LD(torch.finfo(actual.dtype).eps)
    )
    bound = norm_bound(actual.dtype, stated)
    if not np.all(gap <= bound * size + below + more):  # `below`: what rounding to subnormal numbers may cost
        raise AssertionError(
            f"{what}: norm-wise error {norm_error(actual, expected, batch_dims).max():.3g} above {bound:.3g}"
        )


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits: −0 differs from 0, NaN equals NaN."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    whole = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.detach().contiguous().view(whole), b.detach().contiguous().view(whole))
