"""Dynamic thresholding: a quantile per sample, clamp and rescale.

The eager peer is what samplers run today: torch.quantile, which sorts, then clamp and divide. The floor is the traffic:
x read once and the result written, and x swept over again while it is near.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from marquardt.reference.threshold import dynamic_threshold as exact
from marquardt.threshold import dynamic_threshold

from . import floors, peers
from .bench_frame import GPU_COPY, GPU_COPY_BYTES, doubles, eager_and_compiled, gpu_floors, size, unit
from .row import Contest, Goal, Row

RATIO, MAXIMUM = 0.995, 3.0
PIXELS, LATENT, LARGE_LATENT = (16, 3, 64, 64), (16, 4, 64, 64), (8, 4, 128, 128)


def published(sample: Tensor, ratio: float, maximum: float) -> Tensor:
    """As diffusers thresholds a predicted sample [B, ...]."""
    wide = sample.float() if sample.dtype.itemsize < 4 else sample
    flat = wide.reshape(sample.shape[0], -1)  # [B, D]
    s = torch.quantile(flat.abs(), ratio, dim=1).clamp(min=1, max=maximum).unsqueeze(1)
    return (torch.clamp(flat, -s, s) / s).reshape(sample.shape).to(sample.dtype)


def threshold_row(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    device: str,
    *,
    variant: str = "",
    ratio: float = RATIO,
    maximum: float = MAXIMUM,
    with_compile: bool,
) -> Row:
    """`dynamic_threshold(x, ratio=, maximum=, out=out)`; with `maximum` 1 nothing is selected."""
    options = {"ratio": ratio, "maximum": maximum}

    def build() -> Contest:
        x = (1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(device, dtype)
        out = torch.full_like(x, torch.nan)
        first = floors.triad([x], out) if device == "cpu" else None
        return Contest(
            subject=lambda: dynamic_threshold(x, out=out, **options),
            oracle=lambda: [exact(*doubles(x), **options)],
            tolerance=2e-7 + unit(dtype),
            peers=eager_and_compiled(
                published, x, ratio, maximum, tolerance=peers.TOLERANCE[dtype], with_compile=with_compile
            ),
            floors=(first, floors.traffic(first, [x], out)) if first else gpu_floors([x], out),
        )

    traffic = 2 * size(shape, dtype)
    return Row(
        op="dynamic_threshold",
        variant=variant,
        shape=shape,
        dtype=dtype,
        device=device,
        build=build,
        traffic=traffic,
        flops=2 * math.prod(shape),
        goals=(Goal("copy", GPU_COPY),) if device != "cpu" and traffic >= GPU_COPY_BYTES else (),
    )


def rows(device: str, full: bool) -> list[Row]:
    f32, bf16 = torch.float32, torch.bfloat16

    def make(shape: tuple[int, ...], dtype: torch.dtype = f32, **options: Any) -> Row:
        return threshold_row(shape, dtype, device, **{"with_compile": full, **options})

    made = [make(PIXELS), make(LARGE_LATENT, with_compile=True), make((1, 3, 1024, 1024))]
    made += [
        make(LARGE_LATENT, variant="median", ratio=0.5),
        make(LARGE_LATENT, variant="maximum 1", maximum=1.0),
    ]
    made.append(make(LARGE_LATENT, bf16))
    if full:
        made += [make(LATENT), make((64, 4, 128, 128)), make(LARGE_LATENT, torch.float64)]
    return made


def test_row(row: Row, measure: Callable[[Row], None]) -> None:
    measure(row)
