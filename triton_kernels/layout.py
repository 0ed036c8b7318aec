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


def stack_strides(first: Tensor, count: int, batch_dims: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shape and strides of a stack [B, count, *sample] whose samples lie like those of `first`, if these are dense."""
    shape = tuple(first.shape[batch_dims:])
    inner = tuple(first.stride()[batch_dims:])
    if first.numel() == 0 or not is_dense(torch.empty_strided(shape, inner, device="meta")):
        inner = contiguous_strides(shape)
    size = max(math.prod(shape), 1)
    if batch_dims == 0:
        return (count, *shape), (size, *inner)
    return (first.shape[0], count, *shape), (max(count * size, 1), size, *inner)


def twice_strides(first: Tensor) -> tuple[int, ...]:
    """Strides of a batch [2B, *sample]: laid out like `first` where its samples lie in a row, else contiguous."""
    size = math.prod(first.shape[1:])
    if first.numel() > 0 and is_dense(first) and (first.shape[0] == 1 or first.stride(0) == size):
        return (size, *first.stride()[1:])
    return contiguous_strides((2 * first.shape[0], *first.shape[1:]))


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

    @staticmethod
    def of_stack(first: Tensor, batch_dims: int) -> Layout:
        """The layout of samples like `first` in stacks: each lies alone, dense in the order of its own."""
        shape = tuple(first.shape)
        size = math.prod(shape[batch_dims:])
        inner = stack_strides(first, 1, batch_dims)[1]
        inner = (size, *inner[2:]) if batch_dims else inner[1:]
        return Layout(shape, batch_dims, shape[0] if batch_dims else 1, size, inner, inner)

    def twice(self, first: Tensor) -> Layout:
        """The layout of outputs [2B, *sample]: two batches, one behind the other."""
        shape = (2 * self.batch, *self.shape[1:])
        inner = (max(self.size, 1), *self.inner[1:])
        return Layout(shape, 1, 2 * self.batch, self.size, twice_strides(first), inner)

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

    def stack(self, basis: Tensor) -> tuple[Tensor, int, int, int]:
        """(basis, its stride from sample to sample, from row to row, k) of [B, k, *sample] or a shared [k, *sample]."""
        order = self.inner[self.batch_dims :]
        at = basis.dim() - len(order)  # 1: one stack for all samples
        shape = tuple(basis.shape)
        if not same_order(shape[at:], basis.stride()[at:], order):
            row = max(self.size, 1)
            strides = (shape[1] * row, row) if at == 2 else (row,)
            basis = torch.empty_strided(
                shape, (*strides, *order), dtype=basis.dtype, device=basis.device
            ).copy_(basis)
        own = at == 2 and self.batch > 1
        return basis, basis.stride(0) if own else 0, basis.stride(at - 1), shape[at - 1]

    def empty_stack(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """What a kernel writes `count` rows a sample into."""
        like = torch.empty_strided(self.shape, self.inner, dtype=dtype, device="meta")
        shape, strides = stack_strides(like, count, self.batch_dims)
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    def empty(self, like: Tensor) -> Tensor:
        """What a kernel writes into: the type of `like`."""
        return torch.empty_strided(self.shape, self.inner, dtype=like.dtype, device=like.device)

    def finish(self, out: Tensor) -> Tensor:
        """The output in the strides promised."""
        if self.inner == self.outer:
            return out
        return torch.empty_strided(self.shape, self.outer, dtype=out.dtype, device=out.device).copy_(out)
