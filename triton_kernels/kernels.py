"""The two heavy stages, with all rows in registers: Gram (partial sums), and apply (merge, map, C·rows).

One program works on one chunk of one sample; a sample has `splits` chunks, partial sums are [B, splits, entries].
The chunks depend on the sample's size alone and are merged in a fixed order: results are bitwise repeatable, and the
same wherever in whatever batch a sample stands. With one chunk the apply kernel takes the Gram itself (FUSED).
"""

import triton
import triton.language as tl

from .maps import coefficients, streams_of_gram
from .rows import first_elements, noise_row, residual_rows, scalars, store

# Blocks whose products one lane adds up in the compute type before the sum moves to float64.
SEGMENT = tl.constexpr(32)


@triton.jit
def block_rows(
    bases, seed, noise_start, start, begin, end, needed,
    PAIRS: tl.constexpr, NOISE: tl.constexpr, PHASE: tl.constexpr, CTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(rows, mask) of the elements start ... start + BLOCK − 1 that lie in begin ... end − 1."""
    lane = tl.arange(0, BLOCK)
    mask = lane < tl.minimum(end - start, BLOCK).to(tl.int32)
    if PHASE:
        mask = mask & (lane >= tl.maximum(begin - start, 0).to(tl.int32))
    rows = residual_rows(bases, start, lane, mask, needed, PAIRS, CTYPE)
    if NOISE:
        rows = rows + (noise_row(seed, noise_start + start, mask, BLOCK, CTYPE),)
    return rows, mask


@triton.jit
def gram_of_chunk(
    bases, seed, noise_start, origin, begin, end, needed,
    ENTRIES: tl.constexpr, PAIRS: tl.constexpr, NOISE: tl.constexpr, PHASE: tl.constexpr,
    CTYPE: tl.constexpr, PTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The dot products ENTRIES = (i, j, i, j, ...) of rows i and j over origin ... end − 1, in float64.

    Products are taken in PTYPE and added up lane by lane, for SEGMENT blocks at most before float64 takes over. With
    float64 products residuals are float64 too: p − ε may be a small part of what two almost parallel vectors are.
    """
    COUNT: tl.constexpr = len(ENTRIES) // 2
    RTYPE: tl.constexpr = PTYPE if PTYPE == tl.float64 else CTYPE
    total = ()
    for k in tl.static_range(COUNT):
        total = total + (tl.full((), 0.0, tl.float64),)
    for segment in range(origin, end, SEGMENT * BLOCK):
        sums = ()
        for k in tl.static_range(COUNT):
            sums = sums + (tl.zeros((BLOCK,), PTYPE),)
        for start in range(segment, tl.minimum(segment + SEGMENT * BLOCK, end), BLOCK):
            rows, mask = block_rows(
                bases, seed, noise_start, start, begin, end, needed, PAIRS, NOISE, PHASE, RTYPE, BLOCK
            )
            grown = ()
            for k in tl.static_range(COUNT):
                grown = grown + (
                    sums[k] + rows[ENTRIES[2 * k]].to(PTYPE) * rows[ENTRIES[2 * k + 1]].to(PTYPE),
                )
            sums = grown
        merged = ()
        for k in tl.static_range(COUNT):
            merged = merged + (total[k] + tl.sum(sums[k].to(tl.float64)),)
        total = merged
    return total


@triton.jit
def place(size, chunk, splits, PHASE: tl.constexpr):
    """(sample, split, phase, origin, begin, end) of this program.

    Elements of a sample are 0 ... size − 1. With noise that runs on over samples whose size is no multiple of 4,
    blocks start `phase` elements earlier, so that a block's first element starts a Philox counter.
    """
    program = tl.program_id(0)
    sample = (program // splits).to(tl.int64)
    split = (program % splits).to(tl.int64)
    origin = split * chunk
    begin = tl.zeros_like(origin)
    if PHASE:
        phase = sample * size % 4
        origin -= phase
    end = tl.minimum(origin + chunk, size)
    return sample, split, origin, begin, end


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8", "k9"])
def gram_kernel(
    streams, strides, seed, seed_row, partials, size, chunk, splits,
    table, table_row, table_column,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64,
    k5: tl.int64, k6: tl.int64, k7: tl.int64, k8: tl.int64, k9: tl.int64,
    SCALARS: tl.constexpr, OP: tl.constexpr, MODE: tl.constexpr, ENTRIES: tl.constexpr, PAIRS: tl.constexpr,
    NOISE: tl.constexpr, SHARED_NOISE: tl.constexpr, PHASE: tl.constexpr, CTYPE: tl.constexpr,
    PTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[sample, split] = dot products of the chunk."""
    sample, split, origin, begin, end = place(size, chunk, splits, PHASE)
    coef = scalars(table, sample, table_row, table_column, (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9), SCALARS)
    needed = streams_of_gram(OP, MODE, coef)
    noise_start = sample * size if SHARED_NOISE else sample * 0
    stream = seed
    if NOISE:
        stream = seed + sample * seed_row
    gram = gram_of_chunk(
        first_elements(streams, strides, sample), stream, noise_start, origin, begin, end, needed,
        ENTRIES, PAIRS, NOISE, PHASE, CTYPE, PTYPE, BLOCK,
    )  # fmt: skip
    COUNT: tl.constexpr = len(ENTRIES) // 2
    for k in tl.static_range(COUNT):
        tl.store(partials + (sample * splits + split) * COUNT + k, gram[k])


@triton.jit
def merged_gram(partials, sample, splits, COUNT: tl.constexpr, SPLITS: tl.constexpr):
    """The partial sums of a sample added in a fixed order; SPLITS is `splits` rounded up to a power of two."""
    lane = tl.arange(0, SPLITS)
    gram = ()
    for k in tl.static_range(COUNT):
        part = tl.load(partials + (sample * splits + lane) * COUNT + k, mask=lane < splits, other=0.0)
        gram = gram + (tl.sum(part),)
    return gram


# An output whose parts, squared, exceed it by this much shows their rounding.
CANCELS = tl.constexpr(4.0)


@triton.jit
def sums_cancel(C, gram, ENTRIES: tl.constexpr, OUTPUTS: tl.constexpr, ROWS: tl.constexpr):
    """Whether an output is small beside what it is the sum of, by the full Gram: ‖Σ c_j x_j‖² = cᵀGc."""
    found = tl.full((), 0, tl.int1)
    for o in tl.static_range(OUTPUTS):
        parts = tl.full((), 0.0, tl.float64)
        total = tl.full((), 0.0, tl.float64)
        for k in tl.static_range(len(ENTRIES) // 2):
            product = C[o * ROWS + ENTRIES[2 * k]] * C[o * ROWS + ENTRIES[2 * k + 1]] * gram[k]
            if ENTRIES[2 * k] == ENTRIES[2 * k + 1]:
                parts += product
                total += product
            else:
                total += product * 2.0
        found = found | (parts > total * CANCELS)
    return found


@triton.jit(do_not_specialize=["k0", "k1", "k2", "k3", "k4", "k5", "k6", "k7", "k8", "k9"])
def apply_kernel(
    streams, strides, outputs, extra, seed, seed_row, partials, size, chunk, splits,
    table, table_row, table_column,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64,
    k5: tl.int64, k6: tl.int64, k7: tl.int64, k8: tl.int64, k9: tl.int64,
    SCALARS: tl.constexpr, OP: tl.constexpr, MODE: tl.constexpr, ENTRIES: tl.constexpr, PAIRS: tl.constexpr,
    EXTRA: tl.constexpr, FUSED: tl.constexpr, SPLITS: tl.constexpr, SKIP: tl.constexpr, WIDENS: tl.constexpr,
    NOISE: tl.constexpr, SHARED_NOISE: tl.constexpr, PHASE: tl.constexpr, CTYPE: tl.constexpr, PTYPE: tl.constexpr,
    EMULATED: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """outputs[o][sample] = Σ_i C[o, i]·row_i over the chunk; extra[sample] = the EXTRA scalars behind C.

    SKIP: a coefficient that is exactly 0 drops its row, and a stream that no row needs is not read.
    WIDENS: the Gram is full, and outputs that are small beside what they are the sum of are summed in float64.
    """
    sample, split, origin, begin, end = place(size, chunk, splits, PHASE)
    coef = scalars(table, sample, table_row, table_column, (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9), SCALARS)
    noise_start = sample * size if SHARED_NOISE else sample * 0
    stream = seed
    if NOISE:
        stream = seed + sample * seed_row
    bases = first_elements(streams, strides, sample)
    targets = ()
    for o in tl.static_range(len(outputs)):
        targets = targets + (outputs[o] + sample * size,)

    COUNT: tl.constexpr = len(ENTRIES) // 2
    gram = ()
    if COUNT > 0:
        if FUSED:
            needed = streams_of_gram(OP, MODE, coef)
            gram = gram_of_chunk(
                bases, stream, noise_start, origin, begin, end, needed,
                ENTRIES, PAIRS, NOISE, PHASE, CTYPE, PTYPE, BLOCK,
            )  # fmt: skip
        else:
            gram = merged_gram(partials, sample, splits, COUNT, SPLITS)
    C = coefficients(OP, MODE, gram, coef)
    ROWS: tl.constexpr = len(streams) + (1 if NOISE else 0)
    WIDTH: tl.constexpr = len(outputs) * ROWS
    if EXTRA > 0:
        if split == 0:
            for k in tl.static_range(EXTRA):
                tl.store(extra + sample * EXTRA + k, C[WIDTH + k])

    needed = ()
    if SKIP:
        for j in tl.static_range(len(streams)):
            flag = C[j] != 0
            for o in tl.static_range(len(outputs)):
                flag = flag | (C[o * ROWS + j] != 0)
                if j < 2 * PAIRS:
                    if j % 2 == 0:  # the residual of a pair needs its first stream
                        flag = flag | (C[o * ROWS + j + 1] != 0)
            needed = needed + (tl.where(flag, 1, 0),)

    last = end
    if WIDENS and CTYPE != tl.float64:
        # Sums that cancel are taken in float64 and of the streams themselves, one element a thread at a time: what that
        # needs is within the registers of the other walk.
        wide = sums_cancel(C, gram, ENTRIES, len(outputs), ROWS)
        last = tl.where(wide, origin, end)
        for start in range(origin, tl.where(wide, end, origin), 32 * WARPS):
            rows, mask = block_rows(
                bases, stream, noise_start, start, begin, end, (), 0, NOISE, PHASE, tl.float64, 32 * WARPS
            )
            lane = tl.arange(0, 32 * WARPS)
            for o in tl.static_range(len(outputs)):
                value = tl.full((32 * WARPS,), 0.0, tl.float64)
                for j in tl.static_range(ROWS):
                    c = C[o * ROWS + j]
                    if j < 2 * PAIRS:
                        if j % 2 == 0:  # the residual of the pair is taken against this stream
                            c = c - C[o * ROWS + j + 1]
                    value = tl.fma(tl.zeros_like(value) + c, rows[j], value)
                store(targets[o] + start + lane, value.to(CTYPE), mask, EMULATED)

    for start in range(origin, last, BLOCK):
        rows, mask = block_rows(
            bases, stream, noise_start, start, begin, end, needed, PAIRS, NOISE, PHASE, CTYPE, BLOCK
        )
        lane = tl.arange(0, BLOCK)
        for o in tl.static_range(len(outputs)):
            # Starting from the first product keeps −0 where C = (1, 0, ...).
            value = C[o * ROWS].to(CTYPE) * rows[0]
            if SKIP:
                value = tl.where(C[o * ROWS] != 0, value, 0.0)
            for i in tl.static_range(1, ROWS):
                c = C[o * ROWS + i]
                # Fused by name: the compiler's own choice differs between kernels of one size and another.
                more = tl.fma(c.to(CTYPE), rows[i], value)
                value = tl.where(c != 0, more, value) if SKIP else more
            store(targets[o] + start + lane, value, mask, EMULATED)


@triton.jit
def merge_kernel(partials, out, splits, columns, SPLITS: tl.constexpr, WIDTH: tl.constexpr):
    """out[sample, column] = Σ_split partials[sample, split, column], in a fixed order."""
    sample = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    split = tl.arange(0, SPLITS)
    inside = (split[:, None] < splits) & (column[None, :] < columns)
    part = tl.load(
        partials + (sample * splits + split[:, None]) * columns + column[None, :], mask=inside, other=0.0
    )
    tl.store(out + sample * columns + column, tl.sum(part, axis=0), mask=column < columns)
