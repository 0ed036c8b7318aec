"""Sizes at which loops end, and places where vectors begin: every element once, none beside."""

from __future__ import annotations

import itertools
import mmap

import numpy as np
import pytest
import torch
from frame_calls import Place, bf16, f16, f32, f64, numbers_of, run
from frame_cases import affine, affine_backward, given, lm, lm_backward, plans, step, whole_step
from frame_oracle import judge

pytestmark = [pytest.mark.emulation, pytest.mark.accuracy]

_WIDTH = {f32: 4, f64: 2, bf16: 8, f16: 8}  # elements of 16 bytes


def sizes(width: int, threads: int = 32) -> list[int]:
    """Around nothing, a vector access, a tile, and several tiles."""
    tile = width * threads
    near = [0, 1, 3, 4, width - 1, width, width + 1, tile - 1, tile, tile + 1]
    return sorted({n for n in [*near, 2 * tile, 3 * tile + width + 1, 9 * tile - 1] if n >= 0})


@pytest.mark.parametrize("pair", [(f32, f32), (f32, bf16), (bf16, bf16), (f64, f64)], ids=str)
@pytest.mark.parametrize(
    "make", [lm, lm_backward, affine, affine_backward, whole_step], ids=lambda m: m.__name__
)
def test_sizes(emulation, make, pair):
    for size in sizes(_WIDTH[pair[0]]):
        frame = make((2, size), pair=pair)
        for plan in plans(frame):
            judge(frame, run(emulation, frame, **plan))


@pytest.mark.parametrize("pair", [(f32, f32), (f32, f16), (f16, f16), (f64, f64)], ids=str)
def test_beginnings(emulation, pair):
    """Every offset of inputs against every offset of outputs, and samples that begin elsewhere than the first."""
    for make, (a, b, c) in itertools.product((lm, given), itertools.product(range(4), repeat=3)):
        frame = make((3, 137), pair=pair).placed(
            [Place(a, 1), Place(b), Place(b, 2)], [Place(c), Place(c, 3)]
        )
        chosen = plans(frame)
        for plan in (chosen[1 + (a + b + c) % 4], chosen[-1 - (a + 2 * b + c) % 3]):
            judge(frame, run(emulation, frame, **plan))


def test_aligned_gaps(emulation):
    """Samples apart, all of them aligned: the vector path with a stride of its own."""
    for make, gap in itertools.product((lm, affine, given), (4, 16, 64)):
        frame = make((3, 256)).placed([Place(0, gap)], [Place(4, 2 * gap)])
        for plan in plans(frame):
            judge(frame, run(emulation, frame, **plan))


@pytest.mark.parametrize("batch", [0, 1, 3, 17])
def test_batches(emulation, batch):
    for make in (lm, lm_backward, affine, affine_backward, given, whole_step):
        for per_sample in (False, True):
            frame = make((batch, 70), per_sample=per_sample)
            for plan in plans(frame):
                judge(frame, run(emulation, frame, **plan))


def test_shared_gradient(emulation):
    """A gradient of stride 0, as sum() has, and terms that every sample shares."""
    frame = lm_backward((4, 201)).placed([Place(), Place(), Place(0, 0, shared=True)])
    other = affine((4, 201), 3).placed([Place(), Place(1, 0, shared=True), Place(0, 0, shared=True)])
    for f in (frame, other):
        for plan in plans(f):
            judge(f, run(emulation, f, **plan))


def test_many_splits(emulation):
    """More CTAs than there are tiles: the idle ones neither read nor write, and their sums are 0."""
    for make in (lm, lm_backward, given, whole_step):
        for size, splits in itertools.product((1, 130, 700), (2, 16, 33)):
            frame = make((2, size))
            judge(frame, run(emulation, frame, variant="two_sweeps", threads=32, splits=splits))
    for size, splits in itertools.product((1, 130, 700), (2, 16, 33)):
        frame = affine((2, size), 2, noisy=True, per_sample=True)
        judge(frame, run(emulation, frame, variant="one_sweep", threads=32, splits=splits))


@pytest.mark.parametrize("group", [1, 2, 5])
def test_several_launches(emulation, group):
    """A batch beyond the grid is cut into launches."""
    for make in (lm, lm_backward, affine, affine_backward, given, step):
        frame = make((5, 99), per_sample=True)
        for plan in plans(frame):
            judge(frame, run(emulation, frame, **plan, group=group))
    noise = affine((5, 99), 2, noisy=True, per_sample=True)
    judge(noise, run(emulation, noise, variant="one_sweep", threads=32, splits=2, group=group))
    seeds = affine((5, 99), 2, noisy="per-sample")
    judge(seeds, run(emulation, seeds, variant="one_sweep", threads=32, splits=2, group=group))
    for noisy in (True, "per-sample"):
        drawn = whole_step((5, 99), noisy=noisy)
        judge(drawn, run(emulation, drawn, variant="two_sweeps", threads=32, splits=2, group=group))


def test_addresses_beyond_32_bits(emulation):
    """The second sample lies 2³¹ elements behind the first, in memory that is only there where it is touched."""
    size, stride = 77, 2**31 + 8
    for make in (lm, affine):
        frame = make((2, size), pair=(bf16, bf16))
        for plan in plans(frame):
            numbers, arrays, maps = numbers_of(frame, plan), {}, []
            values = [t.view(torch.int16).numpy().view(np.uint16) for t in frame.streams]
            for name, value in [(f"stream{j}", v) for j, v in enumerate(values)] + [("output0", None)]:
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
                maps.append(mmap.mmap(-1, 2 * (stride + size), flags=flags))
                arrays[name] = np.frombuffer(maps[-1], np.uint16)
                numbers[f"{name}_stride"] = stride
                if value is not None:
                    arrays[name][:size], arrays[name][stride:] = value[0], value[1]
            arrays["parameters"] = frame.parameters.numpy().copy()
            emulation.run_frame(numbers, arrays)
            there = np.stack([arrays["output0"][:size], arrays["output0"][stride:]])
            whole = run(emulation, frame, **plan).outputs[0]
            assert np.array_equal(there, whole.view(torch.int16).numpy().view(np.uint16))
            judge(frame, run(emulation, frame, **plan))
