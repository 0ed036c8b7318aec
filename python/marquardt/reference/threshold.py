"""Definition of dynamic thresholding, in plain differentiable PyTorch: any size, which `torch.quantile` does not take.

s = clamp(quantile(|x|, ratio), 1, maximum) per sample      [B, 1]
out = clamp(x/s, −1, 1)                                     [B, D]

The quantile is that of `torch.quantile`: at position ratio·(D − 1) among the sorted |x|, linear between two of them.
"""

from __future__ import annotations

from typing import Any

import torch

from .. import scalars
from . import frame

Tensor = torch.Tensor

NAMES = ("ratio", "maximum")


def _quantile(rows: Tensor, ratio: Tensor) -> Tensor:
    """The quantile of rows [B, D] at ratio [B, 1]; positions are float64 wherever the device has it."""
    last = rows.shape[1] - 1
    position = ratio * last
    below = position.detach().nan_to_num().floor().clamp(0, last)  # [B, 1]
    fraction = position - below
    above = (below + (fraction.detach() > 0)).clamp(max=last)
    ordered = rows.sort(dim=1).values
    a, b = (ordered.gather(1, k.to(torch.int64)).to(ratio.dtype) for k in (below, above))
    return a + torch.where(torch.isinf(a), 0.0, b - a) * fraction  # two infinite numbers have no distance


def threshold_scale(x: Tensor, coef: Tensor, batch_dims: int) -> Tensor:
    """s, [B, 1] float64; coef = (ratio, maximum), [2] or [B, 2]. NaN in a sample, or bad scalars, give NaN there."""
    rows = frame.flatten(x, batch_dims).abs()  # [B, D]
    numbers = frame.scalars(coef, rows.shape[0], x.device)
    ratio, maximum = numbers[:, :1], numbers[:, 1:]
    low = torch.ones_like(ratio)
    good = (ratio >= 0) & (ratio <= 1) & (maximum >= 1)
    found = low  # nothing exceeds 1 in a sample without elements
    if rows.shape[1] > 0:
        found = torch.clamp(_quantile(rows, ratio), min=low, max=maximum)
        good = good & ~rows.isnan().any(1, keepdim=True)
    return torch.where(good, found, float("nan"))


def threshold_apply(x: Tensor, coef: Tensor, batch_dims: int) -> Tensor:
    """clamp(x/s, −1, 1); coef = s, [1] or [B, 1]."""
    rows = frame.flatten(x, batch_dims)
    s = frame.scalars(coef, rows.shape[0], x.device).to(rows.dtype)
    return frame.store(torch.clamp(rows / s, -1.0, 1.0), x)


def dynamic_threshold(
    x0: Tensor, *, ratio: Any = 0.995, maximum: Any = 1.0, batch_dims: int = 1, out: Tensor | None = None
) -> Tensor:
    """`marquardt.dynamic_threshold` as a formula."""
    coef = scalars.pack("dynamic_threshold", NAMES, (ratio, maximum), x0, batch_dims)
    result = threshold_apply(x0, threshold_scale(x0, coef, batch_dims), batch_dims)
    return result if out is None else out.copy_(result)
