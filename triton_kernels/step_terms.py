"""What a sampler's step is made of, in registers: the numbers of its terms, and blocks of e, r and the terms.

The words are those of step.py; a term is a source, the drawn noise or y, in this order.
"""

import triton
import triton.language as tl

from .maps import EXTRAPOLATE, SNR, lm_value, snr_value
from .rows import noise_row, store

# A step that takes more than this multiple of e or of r = p − e, for a direction of weight 1, shows their rounding.
MAGNIFIED = tl.constexpr(2.0)

# --- the numbers of a sample ----------------------------------------------------------------------------------------


@triton.jit
def looks_at_prev(coef, VARIANT: tl.constexpr, GRAM: tl.constexpr):
    """Whether p counts for this sample, an int1. GRAM: whether there is a p at all."""
    if not GRAM:
        return tl.full((), 0, tl.int1)
    elif VARIANT == SNR:
        return tl.full((), 1, tl.int1)
    elif VARIANT == EXTRAPOLATE:
        return (coef[0] != 0) & (coef[2] != 0)
    else:
        return (coef[1] != 0) & (coef[2] != 0)


@triton.jit
def numbers_of_terms(
    coef, reads, SOURCES: tl.constexpr, NOISY: tl.constexpr, CLIPPED: tl.constexpr, CTYPE: tl.constexpr
):
    """(on_a, on_d, on_y): of every term in x' (beside c0·e + c1·r) and in e; of y the bound, then one a source."""
    BEHIND: tl.constexpr = 3 + 2 * SOURCES  # where the noise begins
    Y: tl.constexpr = BEHIND + (2 if NOISY else 0)
    on_a = ()
    on_d = ()
    on_y = ()
    for j in tl.static_range(SOURCES + (1 if NOISY else 0) + (1 if CLIPPED else 0)):
        if j < SOURCES:
            a = coef[3 + j]
            d = coef[3 + SOURCES + j]
        else:
            a = coef[BEHIND + 2 * (j - SOURCES)]
            d = coef[BEHIND + 2 * (j - SOURCES) + 1]
        on_a = on_a + (tl.where(reads, a, a + coef[2] * d).to(CTYPE),)
        on_d = on_d + (d.to(CTYPE),)
    if CLIPPED:
        for j in tl.static_range(SOURCES + 1):
            on_y = on_y + (coef[Y + 2 + j].to(CTYPE),)
    return on_a, on_d, on_y


@triton.jit
def sources_needed(
    on_a, on_d, on_y, direction, SOURCES: tl.constexpr, GUIDED: tl.constexpr, OUTPUTS: tl.constexpr,
    CONVERTED: tl.constexpr,
):  # fmt: skip
    """One int32 flag a source. `direction`: whether e counts; OUTPUTS: x' does too, CONVERTED: and y itself."""
    CLIPPED: tl.constexpr = len(on_y) > 0
    clip = direction
    if CLIPPED:
        clip = direction & (on_d[len(on_d) - 1] != 0)
        if OUTPUTS:
            clip = clip | (on_a[len(on_a) - 1] != 0)
        if CONVERTED:
            clip = tl.full((), 1, tl.int1)
    needed = ()
    for j in tl.static_range(SOURCES):
        flag = direction & (on_d[j] != 0)
        if OUTPUTS:
            flag = flag | (on_a[j] != 0)
        if CLIPPED:
            flag = flag | (clip & (on_y[1 + j] != 0))
        if GUIDED and j == 2:
            flag = flag | (needed[1] != 0)
        needed = needed + (tl.where(flag, 1, 0),)
    return needed


@triton.jit
def mix(VARIANT: tl.constexpr, gram, coef):
    """(c0, c1) of x' = a + c0·e + c1·r."""
    n, e, R = gram
    if VARIANT == SNR:
        c0, c1 = snr_value(n, R, coef[0], coef[1])
    else:
        c0, c1 = lm_value(VARIANT, n, e, R, coef[0], coef[1])
        c0 *= coef[2]
        c1 *= coef[2]
    return c0, c1


@triton.jit
def magnifies(coef, c0, c1):
    """Whether the rounding of e, which r inherits, would be seen in x'."""
    return tl.maximum(tl.abs(c0), tl.abs(c1)) > tl.abs(coef[2]) * MAGNIFIED


# --- blocks ---------------------------------------------------------------------------------------------------------


@triton.jit
def block_of_step(
    bases, prev, reads, needed, on_d, on_y, seed, noise_start, start, begin, end,
    GUIDED: tl.constexpr, NOISE: tl.constexpr, VARIANT: tl.constexpr, GRAM: tl.constexpr, PHASE: tl.constexpr,
    CTYPE: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(terms, e, r, mask), [BLOCK] each: the elements start ... start + BLOCK − 1 that lie in begin ... end − 1.

    Sums are of the type WIDE, noise is drawn in CTYPE. All but y is 0 outside; r is −e where p is not read.
    """
    lane = tl.arange(0, BLOCK)
    count = tl.minimum(end - start, BLOCK).to(tl.int32)
    mask = lane < count
    if PHASE:
        mask = mask & (lane >= tl.maximum(begin - start, 0).to(tl.int32))
    terms = ()
    for j in tl.static_range(len(bases)):
        inside = mask & (lane < count * needed[j])
        s = tl.load(bases[j] + start + lane, mask=inside, other=0.0).to(WIDE)
        if GUIDED and j == 2:
            terms = (terms[0], terms[1] - s)
        terms = terms + (s,)
    zero = tl.full((BLOCK,), 0.0, WIDE)
    r = zero
    if NOISE:
        drawn = noise_row(seed, noise_start + start, mask, BLOCK, CTYPE).to(WIDE)
        if VARIANT == SNR:
            r = drawn
        else:
            terms = terms + (drawn,)
    if len(on_y) > 0:
        y = zero
        for j in tl.static_range(len(bases)):
            y = tl.where(on_y[1 + j] != 0, tl.fma(on_y[1 + j], terms[j], y), y)
        y = tl.where(y < -on_y[0], -on_y[0], y)  # comparisons that leave a NaN as it is
        y = tl.where(y > on_y[0], on_y[0], y)
        terms = terms + (y,)
    e = zero
    for j in tl.static_range(len(on_d)):
        e = tl.where(on_d[j] != 0, tl.fma(on_d[j], terms[j], e), e)
    if GRAM and not (NOISE and VARIANT == SNR):
        inside = mask & (lane < count * tl.where(reads, 1, 0))
        r = tl.load(prev + start + lane, mask=inside, other=0.0).to(WIDE)
    if VARIANT != SNR:
        r = r - e
    return terms, e, r, mask


@triton.jit
def gram_of_step(
    bases, prev, reads, coef, seed, noise_start, origin, begin, end, GUIDED: tl.constexpr, CLIPPED: tl.constexpr,
    NOISE: tl.constexpr, VARIANT: tl.constexpr, PHASE: tl.constexpr, CTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(⟨e,e⟩, ⟨e,r⟩, ⟨r,r⟩) over origin ... end − 1, all of it in float64; 0 where p is not looked at."""
    on_a, on_d, on_y = numbers_of_terms(
        coef, reads, len(bases), NOISE and VARIANT != SNR, CLIPPED, tl.float64
    )
    needed = sources_needed(on_a, on_d, on_y, reads, len(bases), GUIDED, False, False)
    n = tl.full((BLOCK,), 0.0, tl.float64)
    both = tl.full((BLOCK,), 0.0, tl.float64)
    R = tl.full((BLOCK,), 0.0, tl.float64)
    for start in range(origin, tl.where(reads, end, origin), BLOCK):
        terms, e, r, mask = block_of_step(
            bases, prev, reads, needed, on_d, on_y, seed, noise_start, start, begin, end,
            GUIDED, NOISE, VARIANT, True, PHASE, CTYPE, tl.float64, BLOCK,
        )  # fmt: skip
        if len(on_y) > 0:  # a bound below 0 leaves y outside the sample
            e = tl.where(mask, e, 0.0)
            r = tl.where(mask, r, 0.0)
        n += e * e
        both += e * r
        R += r * r
    return tl.sum(n), tl.sum(both), tl.sum(R)


@triton.jit
def apply_step(
    bases, prev, reads, coef, c0, c1, seed, noise_start, origin, begin, end, place, new, again, direction, converted,
    GUIDED: tl.constexpr, CLIPPED: tl.constexpr, NOISE: tl.constexpr, VARIANT: tl.constexpr, GRAM: tl.constexpr,
    PHASE: tl.constexpr, CTYPE: tl.constexpr, WIDE: tl.constexpr, EMULATED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes x', e and y of origin ... end − 1 of the sample whose outputs begin at `place`, with sums of type WIDE."""
    on_a, on_d, on_y = numbers_of_terms(coef, reads, len(bases), NOISE and VARIANT != SNR, CLIPPED, WIDE)
    on_e = c0.to(WIDE)
    on_r = c1.to(WIDE)
    wanted = reads
    if direction is not None:
        wanted = tl.full((), 1, tl.int1)
    needed = sources_needed(on_a, on_d, on_y, wanted, len(bases), GUIDED, True, converted is not None)
    for start in range(origin, end, BLOCK):
        terms, e, r, mask = block_of_step(
            bases, prev, reads, needed, on_d, on_y, seed, noise_start, start, begin, end,
            GUIDED, NOISE, VARIANT, GRAM, PHASE, CTYPE, WIDE, BLOCK,
        )  # fmt: skip
        at = place + start + tl.arange(0, BLOCK)
        value = tl.full((BLOCK,), 0.0, WIDE)
        for j in tl.static_range(len(on_a)):
            value = tl.where(on_a[j] != 0, tl.fma(on_a[j], terms[j], value), value)
        if GRAM:
            value = tl.where(reads, tl.fma(on_r, r, tl.fma(on_e, e, value)), value)
        store(new + at, value.to(CTYPE), mask, EMULATED)
        if again is not None:
            store(again + at, value.to(CTYPE), mask, EMULATED)
        if direction is not None:
            store(direction + at, e.to(CTYPE), mask, EMULATED)
        if converted is not None:
            store(converted + at, terms[len(on_a) - 1].to(CTYPE), mask, EMULATED)
