"""The frame engine in plain PyTorch: T ↦ C(T Tᵀ)·T for a k-frame T of vectors, per sample.

vectors v = streams, then "ones", then noise        [B, n, D]
rows    r = clamp(L v)                              [B, k, D]
gram    G = r rᵀ                                    [B, k, k]
outputs   = C r                                     [B, m, D]
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..layout import batch_and_size, output_strides
from .noise import normal

Tensor = torch.Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 stays, everything narrower is computed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalar_dtype(device: torch.device) -> torch.dtype:
    """Scalars are float64 wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def flatten(t: Tensor, batch_dims: int) -> Tensor:
    """[B, D] in the compute type."""
    return t.reshape(batch_and_size(t, batch_dims)).to(compute_dtype(t.dtype))


def store(rows: Tensor, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[B, D] as a tensor of the shape of `like`, with the strides promised for outputs."""
    out = rows.to(dtype or like.dtype).reshape(like.shape)
    if out.stride() == output_strides(like):
        return out
    return torch.empty_strided(like.shape, output_strides(like), dtype=out.dtype, device=out.device).copy_(
        out
    )


def dot(a: Tensor, b: Tensor) -> Tensor:
    """⟨a, b⟩ per sample, [B], in float64: squares of float32 numbers leave its range."""
    dtype = scalar_dtype(a.device)
    return (a.to(dtype) * b.to(dtype)).sum(-1)


def scalars(coef: Tensor, batch: int, device: torch.device) -> Tensor:
    """[B, m] float64, whether `coef` is shared or per sample."""
    coef = coef.to(device=device, dtype=scalar_dtype(device))
    return coef.expand(batch, -1) if coef.dim() == 1 else coef


def rows_of(
    streams: Sequence[Tensor],
    prologue: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor | None,
    ones: bool,
    batch_dims: int,
) -> Tensor:
    """[B, k, D]: the rows behind prologue and clamp."""
    first = streams[0]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    vectors = [flatten(t, batch_dims).to(dtype) for t in streams]
    if ones:
        vectors.append(torch.ones_like(vectors[0]))
    if seed is not None:
        vectors.append(normal(seed, tuple(first.shape), dtype, batch_dims).reshape(vectors[0].shape))
    rows = torch.stack(vectors, dim=1)
    if prologue is not None:
        matrix = prologue.to(dtype=dtype, device=first.device)
        rows = (matrix.expand(rows.shape[0], *matrix.shape[-2:]).unsqueeze(-1) * rows.unsqueeze(1)).sum(2)
    if clamp is not None:
        bounds = clamp.to(dtype=dtype, device=first.device)
        rows = torch.minimum(torch.maximum(rows, bounds[:, 0, None]), bounds[:, 1, None])
    return rows


def frame_gram(
    streams: Sequence[Tensor],
    prologue: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor | None,
    ones: bool,
    exact: bool,
    batch_dims: int,
) -> Tensor:
    """[B, k, k] float64. Kernels take the products in float64 only if `exact`; the definition always does."""
    rows = rows_of(streams, prologue, clamp, seed, ones, batch_dims)
    return dot(rows.unsqueeze(2), rows.unsqueeze(1))


def frame_apply(
    streams: Sequence[Tensor],
    matrix: Tensor,
    prologue: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor | None,
    ones: bool,
    batch_dims: int,
) -> list[Tensor]:
    """C·rows: m tensors like the first stream; `matrix` is [m, k] or [B, m, k]."""
    rows = rows_of(streams, prologue, clamp, seed, ones, batch_dims)
    c = matrix.to(dtype=rows.dtype, device=rows.device)
    c = c.expand(rows.shape[0], *c.shape[-2:])
    outputs = (c.unsqueeze(-1) * rows.unsqueeze(1)).sum(2)  # [B, m, D]
    return [store(outputs[:, i], streams[0]) for i in range(outputs.shape[1])]
