"""Equal bits: over runs, orders of threads, positions in the batch, launches; and results in place."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from frame_calls import Place, bf16, f16, f32, f64, run
from frame_cases import (
    SNR,
    affine,
    affine_backward,
    given,
    lm,
    lm_backward,
    lm_jvp,
    plans,
    step,
    whole_step,
)

from harness import same_bits

pytestmark = [pytest.mark.emulation, pytest.mark.determinism]

MAKERS = {
    "lm": lm,
    "lm_backward": lm_backward,
    "lm_jvp": lm_jvp,
    "affine-noise": lambda shape, **k: affine(shape, 3, noisy=True, **k),
    "affine-seeds": lambda shape, **k: affine(shape, 2, noisy="per-sample", **k),
    "affine_backward": lambda shape, **k: affine_backward(shape, 3, noisy=True, **k),
    "given": lambda shape, **k: given(shape, 5, 3, **k),
    "step": whole_step,
    "step-snr": lambda shape, **k: step(shape, SNR, noisy="per-sample", **k),
    "step-alone": lambda shape, **k: step(shape, models=3, prev=False, direction=True, **k),
    "prologue": lambda shape, **k: given(shape, 2, 2, ones=True, noisy=True, prologue=3, clamped=True, **k),
}
OPS = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def equal(a, b) -> bool:
    return all(same_bits(x, y) for x, y in zip(a.all, b.all, strict=True))


@OPS
def test_runs_and_orders(emulation, make):
    """The order in which CTAs and threads come to run is no argument of the result."""
    frame = make((3, 421), pair=(f32, bf16))
    for plan in plans(frame):
        first = run(emulation, frame, **plan)
        for order in (0, 1, 2, 12345):
            again = run(emulation, frame, **plan, order=order)
            assert equal(first, again), (order, first.plan["text"])


@OPS
def test_position_in_the_batch(emulation, make):
    """A sample has the same bits alone, at another address, and beside others."""
    frame = make((4, 333), per_sample=True)
    shared = frame.seed is not None and frame.seed.dim() == 1  # that noise runs through the call
    for plan in plans(frame)[1:]:
        whole = run(emulation, frame, **plan)
        for b in (0,) if shared else range(4):
            alone = run(emulation, frame.narrowed(b, b + 1), **plan)
            moved = run(emulation, frame.narrowed(b, b + 1).placed([Place(3), Place(1)], [Place(2)]), **plan)
            for w, a, m in zip(whole.all, alone.all, moved.all, strict=True):
                assert same_bits(w[b : b + 1], a) and same_bits(a, m), (b, alone.plan["text"])


@OPS
def test_launches(emulation, make):
    frame = make((5, 150), per_sample=True)
    for plan in plans(frame)[1:]:
        whole = run(emulation, frame, **plan)
        for group in (1, 3):
            assert equal(whole, run(emulation, frame, **plan, group=group)), (group, whole.plan["text"])


@OPS
def test_parameters_of_host_and_device(emulation, make):
    """Values that travel with the launch are those that the kernel reads from memory."""
    frame = make((2, 150))
    for plan in plans(frame):
        there = run(emulation, dataclasses.replace(frame, host=False), **plan)
        assert equal(run(emulation, frame, **plan), there), there.plan["text"]


@OPS
def test_in_place(emulation, make):
    """out= may be an input: no element is read after it was written."""
    frame = make((3, 523))
    for places in ([Place()], [Place(1, 2), Place(3)]):
        frame = frame.placed(places, [Place()])
        for plan in plans(frame):
            apart = run(emulation, frame, **plan)
            for j in range(len(frame.streams)):
                within = dataclasses.replace(frame, in_place=j)
                assert equal(apart, run(emulation, within, **plan)), (j, apart.plan["text"])


PLAIN = {
    "lm": lm,
    "lm-per-sample": lambda shape, **k: lm(shape, per_sample=True, **k),
    "lm_backward": lm_backward,
    "affine-2": lambda shape, **k: affine(shape, 2, **k),
    "affine-3": lambda shape, **k: affine(shape, 3, per_sample=True, **k),
}


@pytest.mark.parametrize("pair", [(f32, f32), (bf16, bf16), (f16, bf16), (f64, f64)], ids=str)
@pytest.mark.parametrize("make", PLAIN.values(), ids=PLAIN.keys())
def test_aligned_and_astray(emulation, make, pair):
    """The short way for calls whose slots are all aligned and whole: the bits of the long one, in place as well."""
    for size in (8, 1048, 3 * 1024):
        frame = make((3, size), pair=pair)
        astray = frame.placed([Place(1), Place(3, 1), Place(2)], [Place(1, 1)])
        for plan in plans(frame):
            aligned = run(emulation, frame, **plan)
            assert equal(aligned, run(emulation, astray, **plan)), (size, aligned.plan["text"])
        if frame.outputs[0] == frame.streams[0].dtype:
            within = dataclasses.replace(frame, in_place=0)
            assert equal(run(emulation, frame), run(emulation, within)), size


def test_flat_and_batched(emulation):
    """A dense batch without sums may be walked as one long sample, one with gaps may not: the same bits."""
    for make in (MAKERS["affine-noise"], lambda shape: given(shape, 3, 2, gram=False)):
        frame = make((4, 211))
        apart = frame.placed([Place(0, 5)], [Place(0, 1)])
        for plan in plans(frame):
            assert equal(run(emulation, frame, **plan), run(emulation, apart, **plan))


def test_sums_have_double_precision(emulation):
    """Products and sums are double in every variant: 1 + 2⁻³⁰ is seen beside 1."""
    x = torch.ones(1, 1024)
    x[0, 7] = 1 + 2.0**-20  # its square is no float32 number
    frame = dataclasses.replace(given((1, 1024), 1, 0), streams=(x,))
    expected = float((x.double() ** 2).sum())
    for plan in plans(frame):
        assert float(run(emulation, frame, **plan).scalars) == expected, plan
