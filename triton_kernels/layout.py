"""Memory order of a call: samples are walked flat, in the order in which the outputs lie in memory.

Outputs take the strides of the first tensor if it is dense and without overlap, else they are contiguous. An input
whose samples lie in the same order is read in place, whatever its batch stride (slices, expanded batches); another
one is copied. Where samples of the outputs do not lie one behind the other, or noise needs row-major order, the
call works on contiguous tensors and copies its results.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Row-major strides."""
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step = step * max(length, 1)
    return tuple(reversed(strides))


def is_dense(t: Tensor) -> bool:
    """Whether `t` covers one block of memory once, in any order of its dimensions."""
    step = 1
    for stride, length in sorted((t.stride(d), t.shape[d]) for d in range(t.dim()) if t.shape[d] != 1):
        if stride != step:
            return False
        step *= length
    return True


def output_strides(first: Tensor) -> tuple[int, ...]:
    """Strides of outputs: those of `first` if it is dense, else contiguous."""
    return tuple(first.stride()) if first.numel() > 0 and is_dense(first) else contiguous_strides(first.shape)


def same_order(shape: Sequence[int], a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether strides a and b address `shape` alike (strides of dimensions of length 1 do not count)."""
    return all(n == 1 or s == t for n, s, t in zip(shape, a, b))


@dataclass(frozen=True)
class Layout:
    """Shapes and strides of one call: `batch` samples of `size` elements."""

    shape: tuple[int, ...]
    batch_dims: int
    batch: int
    size: int
    outer: tuple[int, ...]  # strides the outputs leave with
    inner: tuple[int, ...]  # strides the kernels write: samples of `size` elements, one behind the other

    @staticmethod
    def of(first: Tensor, batch_dims: int, row_major: bool = False) -> Layout:
        """The layout that `first` asks for; `row_major` where elements are counted (noise)."""
        shape = tuple(first.shape)
        batch = shape[0] if batch_dims else 1
        size = math.prod(shape[batch_dims:])
        plain = contiguous_strides(shape)
        outer = output_strides(first)
        flat = batch_dims == 0 or batch == 1 or outer[0] == size
        if not flat or (row_major and not same_order(shape, outer, plain)):
            return Layout(shape, batch_dims, batch, size, outer, plain)
        return Layout(shape, batch_dims, batch, size, outer, outer)

    def stream(self, t: Tensor) -> tuple[Tensor, int]:
        """(t, its batch stride), copied only if its samples lie in another order."""
        k = self.batch_dims
        if not same_order(self.shape[k:], t.stride()[k:], self.inner[k:]):
            t = torch.empty_strided(self.shape, self.inner, dtype=t.dtype, device=t.device).copy_(t)
        return t, t.stride(0) if k and self.batch > 1 else 0

    def streams(self, tensors: Sequence[Tensor]) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """(tensors, batch strides) as the kernels take them."""
        pairs = [self.stream(t) for t in tensors]
        return tuple(t for t, _ in pairs), tuple(s for _, s in pairs)

    def empty(self, like: Tensor) -> Tensor:
        """What a kernel writes into: the type of `like`."""
        return torch.empty_strided(self.shape, self.inner, dtype=like.dtype, device=like.device)

    def finish(self, out: Tensor) -> Tensor:
        """The output in the strides promised."""
        if self.inner == self.outer:
            return out
        return torch.empty_strided(self.shape, self.outer, dtype=out.dtype, device=out.device).copy_(out)
