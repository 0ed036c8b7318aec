"""Dynamic thresholding in tests: data, the public function and its scale on a backend, numpy's quantile."""

from __future__ import annotations

import numpy as np
import torch

from harness import Target, assert_within
from harness.compare import rows, ulp
from marquardt.threshold import dynamic_threshold, threshold_scale

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (f32, f64, f16, bf16)
RATIOS = (0.0, 0.1, 0.5, 0.9, 0.995, 1.0)
LARGE = 1e6  # a maximum that is not reached


def normal(shape, dtype=f32, scale=50.0, seed=0):
    """Magnitudes mostly above 1, so that the quantile shows in s."""
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=generator, dtype=f64)).to(dtype)


def run(target: Target, x, **options):
    with target():
        return dynamic_threshold(x.to(target.device), **options).cpu()


def scale(target: Target, x, ratio, maximum=LARGE, batch_dims=1):
    with target():
        return threshold_scale(x.to(target.device), ratio, maximum, batch_dims).cpu()


def quantile(x, ratio, batch_dims=1):
    """numpy's, in float64, [B]."""
    return np.quantile(np.abs(rows(x, batch_dims)).astype(np.float64), ratio, axis=1)


def check_scale(target: Target, x, ratio, maximum=LARGE, batch_dims=1):
    found = scale(target, x, ratio, maximum, batch_dims)
    expected = np.clip(quantile(x, ratio, batch_dims), 1.0, maximum)
    assert found.dtype == f64 and found.shape == (len(expected), 1)
    assert_within(found[:, 0], expected, 8 * ulp(expected, f64), f"ratio {ratio}")
    return found


def check_value(target: Target, x, batch_dims=1, **options):
    """Against clamp(x/s, −1, 1) in float64 with numpy's s."""
    s = np.clip(quantile(x, options["ratio"], batch_dims), 1.0, options["maximum"])
    exact = np.clip(rows(x, batch_dims) / s[:, None], -1.0, 1.0).reshape(x.shape)
    out = run(target, x, batch_dims=batch_dims, **options)
    assert out.dtype == x.dtype and out.shape == x.shape
    compute = f64 if x.dtype == f64 else f32  # of s and the quotient, before x's dtype rounds
    assert_within(out, exact, 0.51 * ulp(exact, x.dtype) + 1.5 * ulp(exact, compute))
    return out
