"""The frame engine for any matrix: Gram and C·rows of up to 18 vectors, 17 outputs, prologue and clamp.

    vectors v = streams, then "ones", then noise (n ≤ 18);  rows r = clamp(L v) (k);  Gram r rᵀ;  outputs C r (m ≤ 17)

The Gram is tiled: a program takes TILE × TILE of its entries over one chunk of one sample, so that few partial sums
stay in registers whatever k is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import launch
from .kernels import merge_kernel, place
from .layout import Layout
from .rows import first_elements, noise_row, store

Tensor = torch.Tensor

TILE = 4


@triton.jit
def clamped(x, clamp, row, mask, inside):
    """x held between the two bounds of `row` (NaN stays NaN), 0 outside the sample."""
    if clamp is not None:
        low = tl.load(clamp + 2 * row, mask=inside, other=float("-inf")).to(x.dtype)
        high = tl.load(clamp + 2 * row + 1, mask=inside, other=float("inf")).to(x.dtype)
        x = tl.where(x < low, low, x)
        x = tl.where(x > high, high, x)
    return tl.where(mask, x, 0.0)


@triton.jit
def vector(
    j: tl.constexpr, bases, ONES: tl.constexpr, seed, noise_start, start, lane, mask,
    CTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Vector j of the sample: a stream, then ones, then noise."""
    if j < len(bases):
        return tl.load(bases[j] + start + lane, mask=mask, other=0.0).to(CTYPE)
    elif ONES and j == len(bases):
        return tl.where(mask, 1.0, 0.0).to(CTYPE)
    else:
        return noise_row(seed, noise_start + start, mask, BLOCK, CTYPE)


@triton.jit
def tiled_gram_kernel(
    streams, strides, seed, seed_row, prologue, prologue_row, clamp, partials, size, chunk, splits, rows,
    N: tl.constexpr, ONES: tl.constexpr, SHARED_NOISE: tl.constexpr, NOISE: tl.constexpr, PHASE: tl.constexpr,
    T: tl.constexpr, PTYPE: tl.constexpr, CTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[sample, split, i, j] = ⟨row i, row j⟩ over the chunk, for i, j in the tile program_id(1).

    Without a prologue row i is vector i, and vectors outside the tile are not read.
    """
    sample, split, origin, begin, end = place(size, chunk, splits, PHASE)
    tile = tl.program_id(1)
    tiles = tl.cdiv(rows, T)
    first, second = tile // tiles * T, tile % tiles * T
    if first < second:
        return  # the transpose of a tile that another program takes
    noise_start = sample * size if SHARED_NOISE else sample * 0
    stream = seed
    if NOISE:
        stream = seed + sample * seed_row
    bases = first_elements(streams, strides, sample)
    lane = tl.arange(0, BLOCK)

    sums = ()
    for k in tl.static_range(T * T):
        sums = sums + (tl.zeros((BLOCK,), PTYPE),)
    for start in range(origin, end, BLOCK):
        mask = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
        if PHASE:
            mask = mask & (lane >= tl.maximum(begin - start, 0).to(tl.int32))
        left = ()
        right = ()
        for a in tl.static_range(T):
            left = left + (tl.zeros((BLOCK,), CTYPE),)
            right = right + (tl.zeros((BLOCK,), CTYPE),)
        for j in tl.static_range(N):
            inside = mask
            if prologue is None:
                wanted = ((j >= first) & (j < first + T)) | ((j >= second) & (j < second + T))
                inside = mask & (tl.where(wanted, 1, 0) + tl.zeros_like(lane) != 0)
            v = vector(j, bases, ONES, stream, noise_start, start, lane, inside, CTYPE, BLOCK)
            grown_left = ()
            grown_right = ()
            for a in tl.static_range(T):
                x = left[a]
                y = right[a]
                if prologue is None:
                    x = tl.where(first + a == j, v, x)
                    y = tl.where(second + a == j, v, y)
                else:
                    line = prologue + sample * prologue_row + j
                    x += tl.load(line + (first + a) * N, mask=first + a < rows, other=0.0).to(CTYPE) * v
                    y += tl.load(line + (second + a) * N, mask=second + a < rows, other=0.0).to(CTYPE) * v
                grown_left = grown_left + (x,)
                grown_right = grown_right + (y,)
            left = grown_left
            right = grown_right
        grown = ()
        for a in tl.static_range(T):
            x = clamped(left[a], clamp, first + a, mask, first + a < rows).to(PTYPE)
            for b in tl.static_range(T):
                y = clamped(right[b], clamp, second + b, mask, second + b < rows).to(PTYPE)
                grown = grown + (sums[a * T + b] + x * y,)
        sums = grown

    target = partials + (sample * splits + split) * rows * rows
    for a in tl.static_range(T):
        for b in tl.static_range(T):
            i = first + a
            j = second + b
            value = tl.sum(sums[a * T + b].to(tl.float64))
            inside = (i < rows) & (j < rows)
            tl.store(target + i * rows + j, value, mask=inside)
            tl.store(target + j * rows + i, value, mask=inside)


@triton.jit
def matrix_apply_kernel(
    streams, strides, outputs, seed, seed_row, prologue, prologue_row, clamp, matrix, matrix_row, size, chunk, splits,
    N: tl.constexpr, K: tl.constexpr, ONES: tl.constexpr, SHARED_NOISE: tl.constexpr, NOISE: tl.constexpr,
    PHASE: tl.constexpr, CTYPE: tl.constexpr, EMULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """outputs[o][sample] = Σ_i matrix[o, i]·row_i over the chunk."""
    sample, split, origin, begin, end = place(size, chunk, splits, PHASE)
    noise_start = sample * size if SHARED_NOISE else sample * 0
    stream = seed
    if NOISE:
        stream = seed + sample * seed_row
    bases = first_elements(streams, strides, sample)
    lane = tl.arange(0, BLOCK)
    for start in range(origin, end, BLOCK):
        mask = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
        if PHASE:
            mask = mask & (lane >= tl.maximum(begin - start, 0).to(tl.int32))
        vectors = ()
        for j in tl.static_range(N):
            vectors = vectors + (
                vector(j, bases, ONES, stream, noise_start, start, lane, mask, CTYPE, BLOCK),
            )
        rows = ()
        for i in tl.static_range(K):
            if prologue is None:
                x = vectors[i]
            else:
                line = prologue + sample * prologue_row + i * N
                x = tl.load(line).to(CTYPE) * vectors[0]
                for j in tl.static_range(1, N):
                    x = tl.fma(tl.load(line + j).to(CTYPE), vectors[j], x)
            rows = rows + (clamped(x, clamp, i, mask, True),)
        for o in tl.static_range(len(outputs)):
            line = matrix + sample * matrix_row + o * K
            value = tl.load(line).to(CTYPE) * rows[0]
            for i in tl.static_range(1, K):
                value = tl.fma(tl.load(line + i).to(CTYPE), rows[i], value)
            store(outputs[o] + sample * size + start + lane, value, mask, EMULATED)


def _matrix(m: Tensor | None, device: torch.device) -> tuple[Tensor | None, int]:
    """(a [k, n] or [B, k, n] matrix beside the data, its batch stride)."""
    if m is None:
        return None, 0
    m = launch.to_device(m, device).contiguous()
    return m, m.stride(0) if m.dim() == 3 else 0


def _noise_flags(seed: Tensor | None, layout: Layout) -> dict[str, bool]:
    shared = seed is not None and seed.dim() == 1
    phase = shared and layout.batch > 1 and layout.size % 4 != 0
    return {"NOISE": seed is not None, "SHARED_NOISE": shared, "PHASE": phase}


def frame_gram(
    streams: Sequence[Tensor],
    prologue: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor | None,
    ones: bool,
    exact: bool,
    batch_dims: int,
) -> Tensor:
    """Gram matrix of the rows, [B, k, k] float64; `exact` takes the products in float64."""
    launch.check_device("frame_gram", streams)
    first = streams[0]
    device = first.device
    layout = Layout.of(first, batch_dims, row_major=seed is not None)
    vectors = len(streams) + int(ones) + int(seed is not None)
    k = vectors if prologue is None else prologue.shape[-2]
    gram = torch.zeros((layout.batch, k, k), dtype=torch.float64, device=device)
    if first.numel() == 0 or k == 0:
        return gram
    tensors, strides = layout.streams(streams)
    seed = None if seed is None else seed.contiguous()
    table, table_row = _matrix(prologue, device)
    flags = _noise_flags(seed, layout)
    double = exact or first.dtype == torch.float64
    config = launch.choose(layout.size + (3 if flags["PHASE"] else 0), 4 * TILE, gram=True, double=double)
    partials = torch.empty((layout.batch, config.splits, k * k), dtype=torch.float64, device=device)
    tiles = -(-k // TILE)
    with launch.on(device):
        tiled_gram_kernel[(layout.batch * config.splits, tiles * tiles)](
            tensors, strides, seed, 0 if flags["SHARED_NOISE"] else 2, table, table_row, _matrix(clamp, device)[0],
            partials, layout.size, config.chunk, config.splits, k,
            N=vectors, ONES=ones, **flags, T=TILE, PTYPE=tl.float64 if double else tl.float32,
            CTYPE=launch.compute_type(first), BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
        merge_kernel[(layout.batch, -(-k * k // 16))](
            partials, gram, config.splits, k * k, SPLITS=config.splits_padded, WIDTH=16
        )
    return gram


def frame_apply(
    streams: Sequence[Tensor],
    matrix: Tensor,
    prologue: Tensor | None,
    clamp: Tensor | None,
    seed: Tensor | None,
    ones: bool,
    batch_dims: int,
) -> list[Tensor]:
    """C·rows: m tensors like the first stream; `matrix` C is [m, k] or [B, m, k]."""
    launch.check_device("frame_apply", streams)
    first = streams[0]
    device = first.device
    layout = Layout.of(first, batch_dims, row_major=seed is not None)
    outputs = tuple(layout.empty(first) for _ in range(matrix.shape[-2]))
    if first.numel() > 0 and outputs:
        vectors = len(streams) + int(ones) + int(seed is not None)
        tensors, strides = layout.streams(streams)
        seed = None if seed is None else seed.contiguous()
        table, table_row = _matrix(prologue, device)
        C, C_row = _matrix(matrix, device)
        flags = _noise_flags(seed, layout)
        live = vectors + (matrix.shape[-1] if prologue is not None else 1)
        double = first.dtype == torch.float64
        config = launch.choose(layout.size + (3 if flags["PHASE"] else 0), live, gram=False, double=double)
        with launch.on(device):
            matrix_apply_kernel[(layout.batch * config.splits,)](
                tensors, strides, outputs, seed, 0 if flags["SHARED_NOISE"] else 2, table, table_row,
                _matrix(clamp, device)[0], C, C_row, layout.size, config.chunk, config.splits,
                N=vectors, K=matrix.shape[-1], ONES=ones, **flags, CTYPE=launch.compute_type(first),
                EMULATED=launch.emulated(), BLOCK=config.block, num_warps=config.num_warps,
            )  # fmt: skip
    return [layout.finish(out) for out in outputs]
