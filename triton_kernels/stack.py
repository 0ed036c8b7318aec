"""The heavy stages over a stack of rows: Gram and C·rows of a few vectors ("heads") and U [B, k, *sample].

    rows = heads h_1 … h_m (m ≤ 2), then u_1 … u_k (k ≤ 16);     Gram [B, columns, m + k];  outputs [B, count, *sample]

The stack is one pointer with a stride from row to row and one from sample to sample (0 where the batch shares it), so
blocks are two-dimensional: rows × elements. All products and sums are float64: a solve follows, and with g in the span
of U everything but λ/(λ + s‖u‖²) of it cancels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import launch
from .kernels import merge_kernel, place
from .layout import Layout
from .rows import first_elements, store

Tensor = torch.Tensor

COLUMNS = 4  # columns of the Gram that one program takes: few sums stay in registers whatever k is


@triton.jit(do_not_specialize=["k", "columns"])
def stack_gram_kernel(
    heads, head_strides, stack, stack_batch, stack_row, partials, size, chunk, splits, k, columns,
    T: tl.constexpr, K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[sample, split, j, i] = ⟨row j, row i⟩ over the chunk, for the T columns j of program_id(1).

    Heads are columns of the first program alone. K is k rounded up to a power of two, at least 1.
    """
    sample, split, origin, begin, end = place(size, chunk, splits, False)
    M: tl.constexpr = len(heads)
    first = tl.program_id(1) * T
    bases = first_elements(heads, head_strides, sample)
    base = stack + sample * stack_batch
    i = tl.arange(0, K)[:, None]
    lane = tl.arange(0, BLOCK)[None, :]
    wanted = (i < k) & (i + M >= first)  # the rows before are columns of an earlier program

    sums = ()
    for a in tl.static_range(T):
        sums = sums + (tl.zeros((K, BLOCK), tl.float64),)
    between = ()
    for a in tl.static_range(M * (M + 1) // 2):
        between = between + (tl.zeros((1, BLOCK), tl.float64),)
    for start in range(origin, end, BLOCK):
        mask = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
        x = tl.load(base + i.to(tl.int64) * stack_row + start + lane, mask=mask & wanted, other=0.0)
        x = x.to(tl.float64)
        head = ()
        for h in tl.static_range(M):
            y = tl.load(bases[h] + start + lane, mask=mask & (first == 0), other=0.0)
            head = head + (y.to(tl.float64),)
        grown = ()
        for a in tl.static_range(T):
            j = first + a
            inside = mask & (j >= M) & (j < columns)
            y = tl.load(base + (j - M).to(tl.int64) * stack_row + start + lane, mask=inside, other=0.0)
            y = y.to(tl.float64)
            for h in tl.static_range(M):
                y = tl.where(j == h, head[h], y)
            grown = grown + (sums[a] + x * y,)
        sums = grown
        grown = ()
        for h in tl.static_range(M):
            for g in tl.static_range(h + 1):
                grown = grown + (between[h * (h + 1) // 2 + g] + head[h] * head[g],)
        between = grown

    n = M + k
    target = partials + (sample * splits + split) * columns * n
    for a in tl.static_range(T):
        j = first + a
        value = tl.sum(sums[a], axis=1)[:, None]
        inside = wanted & (j < columns)
        tl.store(target + j * n + M + i, value, mask=inside)
        tl.store(target + (M + i) * n + j, value, mask=inside & (M + i < columns))
    if first == 0:
        for h in tl.static_range(M):
            for g in tl.static_range(h + 1):
                own = tl.sum(between[h * (h + 1) // 2 + g])
                tl.store(target + h * n + g, own)
                tl.store(target + g * n + h, own)


@triton.jit(do_not_specialize=["k", "count"])
def stack_apply_kernel(
    heads, head_strides, stack, stack_batch, stack_row, matrix, out, out_batch, out_row, size, chunk, splits, k, count,
    K: tl.constexpr, OUT: tl.constexpr, EMULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[sample, o] = Σ_i matrix[sample, o, i]·row_i over the chunk; OUT and K are count and k rounded up."""
    sample, split, origin, begin, end = place(size, chunk, splits, False)
    M: tl.constexpr = len(heads)
    bases = first_elements(heads, head_strides, sample)
    base = stack + sample * stack_batch
    o = tl.arange(0, OUT)[:, None].to(tl.int64)
    lane = tl.arange(0, BLOCK)[None, :]
    line = matrix + (sample * count + o) * (M + k)
    target = out + sample * out_batch + o * out_row
    for start in range(origin, end, BLOCK):
        mask = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
        sums = tl.zeros((OUT, BLOCK), tl.float64)
        for h in tl.static_range(M):
            c = tl.load(line + h, mask=o < count, other=0.0)
            sums += c * tl.load(bases[h] + start + lane, mask=mask, other=0.0).to(tl.float64)
        for i in tl.static_range(K):
            c = tl.load(line + M + i, mask=(o < count) & (i < k), other=0.0)
            row = base + tl.full((), i, tl.int64) * stack_row
            sums += c * tl.load(row + start + lane, mask=mask & (i < k), other=0.0).to(tl.float64)
        if out.dtype.element_ty != tl.float64:
            sums = sums.to(tl.float32)
        store(target + start + lane, sums, mask & (o < count), EMULATED)


@dataclass(frozen=True)
class Rows:
    """Heads and stack of a call as the kernels take them, in the order in which `layout` walks a sample."""

    layout: Layout
    heads: tuple[Tensor, ...]
    strides: tuple[int, ...]  # of the heads, from sample to sample
    stack: Tensor
    batch: int  # stride of the stack from sample to sample
    row: int  # and from row to row
    k: int

    @staticmethod
    def of(layout: Layout, heads: Sequence[Tensor], basis: Tensor) -> Rows:
        """Inputs of another memory order are copied; a stack that the batch shares is copied once at most."""
        tensors, strides = layout.streams(heads)
        stack, batch, row, k = layout.stack(basis)
        return Rows(layout, tensors, strides, stack, batch, row, k)

    def heads_alone(self) -> Rows:
        """The same without the stack: its coefficients would all be 0."""
        return Rows(self.layout, self.heads, self.strides, self.stack, 0, 0, 0)

    @property
    def count(self) -> int:
        return len(self.heads) + self.k

    @property
    def arguments(self) -> tuple[object, ...]:
        stack = self.stack if self.k else self.heads[0]  # an empty tensor has no address
        return self.heads, self.strides, stack, self.batch, self.row


def gram(rows: Rows, heads_alone: bool = False) -> Tensor:
    """[B, columns, n] float64 with n = heads + k: all of the Gram, or the columns of the heads alone."""
    layout, device = rows.layout, rows.stack.device
    columns = len(rows.heads) if heads_alone else rows.count
    shape = (layout.batch, columns, rows.count)
    if layout.size == 0 or layout.batch == 0:
        return torch.zeros(shape, dtype=torch.float64, device=device)
    K, T = launch.power_of_two(rows.k), min(COLUMNS, launch.power_of_two(columns))
    config = launch.choose_stack(layout.size, K, gram=True)
    partials = torch.empty((layout.batch, config.splits, *shape[1:]), dtype=torch.float64, device=device)
    with launch.on(device):
        stack_gram_kernel[(layout.batch * config.splits, -(-columns // T))](
            *rows.arguments, partials, layout.size, config.chunk, config.splits, rows.k, columns,
            T=T, K=K, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
        if config.splits == 1:
            return partials[:, 0]
        entries = columns * rows.count
        found = torch.empty(shape, dtype=torch.float64, device=device)
        merge_kernel[(layout.batch, -(-entries // 16))](
            partials, found, config.splits, entries, SPLITS=config.splits_padded, WIDTH=16
        )
    return found


def apply(rows: Rows, matrix: Tensor, out: Tensor, batch: int, row: int) -> None:
    """out[b, o] = Σ_i matrix[b, o, i]·row_i, matrix [B, count, n]; `batch` and `row` are the strides of out."""
    layout = rows.layout
    count = matrix.shape[1]
    if out.numel() == 0:
        return
    OUT = launch.power_of_two(count)
    config = launch.choose_stack(layout.size, OUT, gram=False)
    with launch.on(out.device):
        stack_apply_kernel[(layout.batch * config.splits,)](
            *rows.arguments, matrix, out, batch, row, layout.size, config.chunk, config.splits, rows.k, count,
            K=launch.power_of_two(rows.k) if rows.k else 0, OUT=OUT, EMULATED=launch.emulated(), BLOCK=config.block,
            num_warps=config.num_warps,
        )  # fmt: skip
