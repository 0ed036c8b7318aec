"""The step behind every sampler of the Langevin family: x' = a + w·LM(e; p), in the words of `marquardt::lm_step`.

    y = clamp(Σ Y_j s_j, ±bound)   e = Σ D_j s_j + D_ξ ξ + D_y y   a = Σ A_j s_j + A_ξ ξ + A_y y   r = p − e

A *term* is what e and a are sums of: the sources (1 to 6), then drawn noise, then y. A sample that looks at p takes the
Gram of e and r first: in the same launch while it is one chunk, else in one of its own. One that does not (no p, κ = 0,
γ = 0, w = 0) is Σ (A_j + w·D_j) s_j + …, and its p is not read; nor is a term whose numbers are 0. In the variant SNR p
is the noise, given or drawn, and r is p itself. Where the outputs are guided s_1 stands for s_1 − s_2.

Numbers of a sample: first, second, w, A…, D…, [A_ξ, D_ξ], [A_y, D_y, bound, Y…]; first and second are λ and κ, γ and
nothing, or the ratio and the temperature of SNR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from . import launch
from .kernels import merged_gram, place
from .launch import Scalars
from .layout import Layout
from .maps import EXTRAPOLATE, KEEP_NORM, SNR
from .rows import first_elements, scalars
from .step_terms import apply_step, gram_of_step, looks_at_prev, magnifies, mix

Tensor = torch.Tensor

MOST_NUMBERS = 26  # k0 ... k25: six sources, noise and y
NUMBERS = [f"k{i}" for i in range(MOST_NUMBERS)]
# What is wanted beside x': the direction in the type of the model or of the state, y, and x' a second time behind it.
DIRECTION, STATE_DIRECTION, CONVERTED, DOUBLED = 1, 2, 4, 8
GUIDED = 16  # s_1 stands for s_1 − s_2


# --- kernels --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=NUMBERS)
def step_gram_kernel(
    sources, strides, prev, prev_row, seed, seed_row, partials, size, chunk, splits,
    table, table_row, table_column,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64, k5: tl.int64, k6: tl.int64,
    k7: tl.int64, k8: tl.int64, k9: tl.int64, k10: tl.int64, k11: tl.int64, k12: tl.int64, k13: tl.int64,
    k14: tl.int64, k15: tl.int64, k16: tl.int64, k17: tl.int64, k18: tl.int64, k19: tl.int64, k20: tl.int64,
    k21: tl.int64, k22: tl.int64, k23: tl.int64, k24: tl.int64, k25: tl.int64,
    SCALARS: tl.constexpr, VARIANT: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, NOISE: tl.constexpr,
    SHARED_NOISE: tl.constexpr, PHASE: tl.constexpr, CTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """partials[sample, split] = the Gram entries of the chunk."""
    sample, split, origin, begin, end = place(size, chunk, splits, PHASE)
    bits = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19, k20, k21, k22,
            k23, k24, k25)  # fmt: skip
    coef = scalars(table, sample, table_row, table_column, bits, SCALARS)
    reads = looks_at_prev(coef, VARIANT, True)
    noise_start = sample * size if SHARED_NOISE else sample * 0
    stream = seed
    if NOISE:
        stream = seed + sample * seed_row
    before = prev
    if prev is not None:
        before = prev + sample * prev_row
    gram = gram_of_step(
        first_elements(sources, strides, sample), before, reads, coef, stream, noise_start, origin, begin, end,
        GUIDED, CLIPPED, NOISE, VARIANT, PHASE, CTYPE, BLOCK,
    )  # fmt: skip
    for k in tl.static_range(3):
        tl.store(partials + (sample * splits + split) * 3 + k, gram[k])


@triton.jit(do_not_specialize=NUMBERS)
def step_kernel(
    sources, strides, prev, prev_row, new, again, direction, converted, seed, seed_row, partials, size, chunk, splits,
    table, table_row, table_column,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64, k5: tl.int64, k6: tl.int64,
    k7: tl.int64, k8: tl.int64, k9: tl.int64, k10: tl.int64, k11: tl.int64, k12: tl.int64, k13: tl.int64,
    k14: tl.int64, k15: tl.int64, k16: tl.int64, k17: tl.int64, k18: tl.int64, k19: tl.int64, k20: tl.int64,
    k21: tl.int64, k22: tl.int64, k23: tl.int64, k24: tl.int64, k25: tl.int64,
    SCALARS: tl.constexpr, VARIANT: tl.constexpr, GUIDED: tl.constexpr, CLIPPED: tl.constexpr, FUSED: tl.constexpr,
    SPLITS: tl.constexpr, NOISE: tl.constexpr, SHARED_NOISE: tl.constexpr, PHASE: tl.constexpr, CTYPE: tl.constexpr,
    EMULATED: tl.constexpr, WARPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x' (in `new`, and in `again` where it is given), e and y of the chunk; FUSED: the kernel takes the Gram too."""
    GRAM: tl.constexpr = prev is not None or VARIANT == SNR
    sample, split, origin, begin, end = place(size, chunk, splits, PHASE)
    bits = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17, k18, k19, k20, k21, k22,
            k23, k24, k25)  # fmt: skip
    coef = scalars(table, sample, table_row, table_column, bits, SCALARS)
    reads = looks_at_prev(coef, VARIANT, GRAM)
    noise_start = sample * size if SHARED_NOISE else sample * 0
    stream = seed
    if NOISE:
        stream = seed + sample * seed_row
    before = prev
    if prev is not None:
        before = prev + sample * prev_row
    bases = first_elements(sources, strides, sample)

    if GRAM:
        if FUSED:
            gram = gram_of_step(
                bases, before, reads, coef, stream, noise_start, origin, begin, end,
                GUIDED, CLIPPED, NOISE, VARIANT, PHASE, CTYPE, BLOCK,
            )  # fmt: skip
        else:
            gram = merged_gram(partials, sample, splits, 3, SPLITS)
        c0, c1 = mix(VARIANT, gram, coef)
    else:
        c0, c1 = coef[0], coef[1]
    rounded = end  # where the rows of the compute type end: nowhere, or before they begin
    if GRAM and VARIANT != SNR and CTYPE != tl.float64:
        # Rows whose rounding would be seen are made in float64, one element a thread at a time: what that needs is
        # within the registers of the other walk. (Behind it, it would cost registers: its numbers would be live.)
        wide = magnifies(coef, c0, c1)
        rounded = tl.where(wide, origin, end)
        apply_step(
            bases, before, reads, coef, c0, c1, stream, noise_start, origin, begin, tl.where(wide, end, origin),
            sample * size, new, again, direction, converted,
            GUIDED, CLIPPED, NOISE, VARIANT, GRAM, PHASE, CTYPE, tl.float64, EMULATED, 32 * WARPS,
        )  # fmt: skip
    apply_step(
        bases, before, reads, coef, c0, c1, stream, noise_start, origin, begin, rounded, sample * size, new, again,
        direction, converted, GUIDED, CLIPPED, NOISE, VARIANT, GRAM, PHASE, CTYPE, CTYPE, EMULATED, BLOCK,
    )  # fmt: skip


# --- the entry point ------------------------------------------------------------------------------------------------


@dataclass
class Walk:
    """One call as the kernels see it: inputs in the order of `layout`, and where the outputs go."""

    layout: Layout
    sources: Sequence[Tensor]
    prev: Tensor | None
    new: Tensor
    again: Tensor | None  # the second copy of x'
    direction: Tensor | None
    converted: Tensor | None

    @property
    def outputs(self) -> list[Tensor]:
        """All that is written."""
        return [t for t in (self.new, self.again, self.direction, self.converted) if t is not None]

    def as_one_sample(self) -> Walk:
        """The whole batch as one long sample; the same where tensors do not lie without gaps."""
        layout = self.layout
        if layout.batch == 1 or any(layout.stream(t)[1] != layout.size for t in self.sources):
            return self
        count = layout.batch * layout.size

        def flat(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.as_strided((count,), (1,))

        outputs = (flat(t) for t in (self.new, self.again, self.direction, self.converted))
        sources = [t.as_strided((count,), (1,)) for t in self.sources]
        return Walk(Layout((count,), 0, 1, count, (1,), (1,)), sources, None, *outputs)


def _run(walk: Walk, coef: Tensor, seed: Tensor | None, variant: int, guided: bool, clipped: bool) -> None:
    """Gram and apply: one launch while a sample is one chunk, else two."""
    gram = walk.prev is not None or variant == SNR.value
    shared = coef.dim() == 1 and (seed is None or seed.dim() == 1)
    if not gram and shared:
        walk = walk.as_one_sample()
    layout, first = walk.layout, walk.sources[0]
    tensors, strides = layout.streams(walk.sources)
    prev, prev_row = (None, 0) if walk.prev is None else layout.stream(walk.prev)
    seed, seed_row, flags = launch.noise(seed, layout)
    live = len(tensors) + len(walk.outputs) + int(prev is not None) + 2 * int(seed is not None) + int(clipped)
    live += 2 * int(gram)  # e and r of the Gram, in float64
    config = launch.choose(launch.span(layout, flags), live, gram=gram, double=first.dtype == torch.float64)
    numbers = Scalars.of(coef, first.device, MOST_NUMBERS)
    shared_flags = {
        "SCALARS": numbers.count,
        "VARIANT": variant if gram else KEEP_NORM.value,
        "GUIDED": guided,
        "CLIPPED": clipped,
        **flags,
        "CTYPE": launch.compute_type(first),
        "BLOCK": config.block,
        "num_warps": config.num_warps,
    }
    grid = (layout.batch * config.splits,)
    partials = None
    if gram and config.splits > 1:
        partials = first.new_empty((layout.batch, config.splits, 3), dtype=torch.float64)
    with launch.on(first.device):
        if partials is not None:
            step_gram_kernel[grid](
                tensors, strides, prev, prev_row, seed, seed_row, partials, layout.size, config.chunk, config.splits,
                *numbers.arguments, **shared_flags,
            )  # fmt: skip
        step_kernel[grid](
            tensors, strides, prev, prev_row, walk.new, walk.again, walk.direction, walk.converted, seed, seed_row,
            partials, layout.size, config.chunk, config.splits, *numbers.arguments, **shared_flags,
            FUSED=partials is None, SPLITS=config.splits_padded if gram else 1, EMULATED=launch.emulated(),
            WARPS=config.num_warps,
        )  # fmt: skip


def _counts(prev: Tensor | None, coef: Tensor, variant: int) -> bool:
    """Whether p may count: a number of the host says where it does not."""
    if prev is None or variant == SNR.value or coef.dim() == 2 or coef.device.type != "cpu":
        return prev is not None
    gate = coef[0 if variant == EXTRAPOLATE.value else 1]
    return bool(gate != 0) and bool(coef[2] != 0)


@launch.entry
def lm_step(
    sample: Tensor,
    outputs: Sequence[Tensor],
    prev: Tensor | None,
    coef: Tensor,
    seed: Tensor | None,
    variant: int,
    wanted: int,
    clipped: bool,
    batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(x', e, y), see the module; variant 0 KEEP_NORM, 2 EXTRAPOLATE, 3 SNR; what is not wanted is [*batch, 0]."""
    launch.check_device("lm_step", [sample])
    layout = Layout.of(sample, batch_dims, row_major=seed is not None)
    doubled = bool(wanted & DOUBLED)
    whole = layout.twice(sample) if doubled else layout
    model = outputs[0] if outputs else sample
    new = whole.empty(sample)
    direction = converted = None
    if wanted & (DIRECTION | STATE_DIRECTION):
        direction = layout.empty(sample if wanted & STATE_DIRECTION else model)
    if wanted & CONVERTED:
        converted = layout.empty(model)
    if sample.numel() > 0:
        sources = [layout.stream(t)[0] for t in (sample, *outputs)]
        again = new[layout.batch :] if doubled else None
        before = prev if _counts(prev, coef, variant) else None
        walk = Walk(layout, sources, before, new, again, direction, converted)
        _run(walk, coef, seed, variant, bool(wanted & GUIDED), clipped)

    def finished(out: Tensor | None) -> Tensor:
        return sample.new_empty((*sample.shape[:batch_dims], 0)) if out is None else layout.finish(out)

    return whole.finish(new), finished(direction), finished(converted)
