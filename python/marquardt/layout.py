"""Shapes and strides: what a sample is, and which layout an output takes."""

from __future__ import annotations

import torch

Tensor = torch.Tensor


def is_dense(t: Tensor) -> bool:
    """Whether `t` covers one block of memory once, in any order of its dimensions."""
    expected = 1
    remaining = [d for d in range(t.dim()) if t.shape[d] != 1]
    while remaining:
        following = [d for d in remaining if t.stride(d) == expected]
        if not following:
            return False
        expected = expected * t.shape[following[0]]
        remaining.remove(following[0])
    return True


def output_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of an output shaped like `t`: those of `t` if it is dense, else contiguous."""
    if t.numel() > 0 and is_dense(t):
        return t.stride()
    strides: list[int] = []
    step = 1
    for size in reversed(t.shape):
        strides.append(step)
        step = step * max(size, 1)
    return tuple(reversed(strides))


def empty_output(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A new tensor with the shape of `t` and the strides promised for outputs."""
    return torch.empty_strided(t.shape, output_strides(t), dtype=dtype or t.dtype, device=t.device)


def batch_and_size(t: Tensor, batch_dims: int) -> tuple[int, int]:
    """(B, D): number of samples, elements per sample. `batch_dims` is 0 or 1."""
    if batch_dims == 0:
        return 1, t.numel()
    batch = t.shape[0]
    size = 1
    for length in t.shape[1:]:
        size = size * length
    return batch, size


def per_sample(values: Tensor, like: Tensor, batch_dims: int) -> Tensor:
    """[B] values shaped so that they broadcast against `like`."""
    return values.reshape(values.shape[:batch_dims] + (1,) * (like.dim() - batch_dims))


def empty_twice(t: Tensor) -> Tensor:
    """A new tensor [2B, *sample]: laid out like `t` where its samples lie in a row, else contiguous."""
    sizes = (2 * t.shape[0], *t.shape[1:])
    batch, size = batch_and_size(t, 1)
    if t.numel() > 0 and is_dense(t) and (batch == 1 or t.stride(0) == size):
        return torch.empty_strided(sizes, (size, *t.stride()[1:]), dtype=t.dtype, device=t.device)
    return torch.empty(sizes, dtype=t.dtype, device=t.device)
