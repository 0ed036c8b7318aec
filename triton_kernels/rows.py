"""Blocks of the vectors of one sample: loads, residuals, noise, dot products and stores.

A *row* is what the maps speak of: the streams in their order (in a residual pair the second becomes second − first),
then the noise. Everything here works on BLOCK consecutive elements in the compute type.
"""

import triton
import triton.language as tl

from .philox import normals


@triton.jit
def scalars(table, sample, table_row, table_column, bits, COUNT: tl.constexpr):
    """The float64 scalars of a sample: from `table` on the device, or from `bits` (int64 patterns) if it is None."""
    values = ()
    for j in tl.static_range(COUNT):
        if table is None:
            values = values + (bits[j].to(tl.int64).to(tl.float64, bitcast=True),)
        else:
            values = values + (tl.load(table + sample * table_row + j * table_column),)
    return values


@triton.jit
def first_elements(streams, strides, sample):
    """Pointers to the first element of the sample in every stream."""
    bases = ()
    for j in tl.static_range(len(streams)):
        bases = bases + (streams[j] + sample * strides[j],)
    return bases


@triton.jit
def residual_rows(bases, start, lane, mask, needed, PAIRS: tl.constexpr, CTYPE: tl.constexpr):
    """The rows of the streams; `needed` has one int32 flag a stream (() = all); a stream not needed is 0, not read."""
    rows = ()
    for j in tl.static_range(len(bases)):
        inside = mask
        if len(needed) > 0:
            inside = mask & (needed[j] + tl.zeros_like(lane) != 0)
        x = tl.load(bases[j] + start + lane, mask=inside, other=0.0).to(CTYPE)
        if j < 2 * PAIRS:
            if j % 2 == 1:
                x -= rows[j - 1]
                if len(needed) > 0:
                    x = tl.where(needed[j] != 0, x, 0.0)
        rows = rows + (x,)
    return rows


@triton.jit
def noise_row(seed, index, mask, BLOCK: tl.constexpr, CTYPE: tl.constexpr):
    """Normals of the elements index ... index + BLOCK − 1 (index is a multiple of 4), 0 outside the sample."""
    return tl.where(mask, normals(seed, index, BLOCK).to(CTYPE), 0.0)


@triton.jit
def round_to_bfloat16(x):
    """float32 -> bfloat16, nearest even, NaN kept: the interpreter's own cast truncates."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where(x != x, 0x7FC0, rounded)
    return rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def store(pointer, value, mask, EMULATED: tl.constexpr):
    """Store in the pointer's type, rounded to nearest even. EMULATED: running in the interpreter."""
    if EMULATED and pointer.dtype.element_ty == tl.bfloat16:
        tl.store(pointer, round_to_bfloat16(value), mask=mask)
    else:
        tl.store(pointer, value.to(pointer.dtype.element_ty), mask=mask)
