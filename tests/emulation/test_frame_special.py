"""Samples that are special: κ = 0, ε = 0, NaN, numbers at the ends of the range; and the noise, word by word."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from frame_calls import Frame, bf16, f16, f32, f64, run
from frame_cases import (
    EXTRAPOLATE,
    KEEP_NORM,
    PLAIN,
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
from frame_oracle import judge, noise, normal_ulps

import cases
import oracle
from harness import assert_within, same_bits
from harness.compare import rows

pytestmark = [pytest.mark.emulation, pytest.mark.accuracy]

SHAPE = (3, 301)
MODES = (KEEP_NORM, PLAIN, EXTRAPOLATE)


def with_parameters(frame: Frame, rows_of_numbers) -> Frame:
    return dataclasses.replace(frame, parameters=torch.tensor(rows_of_numbers, dtype=f64))


def with_stream(frame: Frame, j: int, values: torch.Tensor) -> Frame:
    streams = list(frame.streams)
    streams[j] = values
    return dataclasses.replace(frame, streams=tuple(streams))


def spoiled(frame: Frame, j: int, b: int, value: float, element: int | None = None) -> Frame:
    """Sample b of stream j full of `value`, or one element of it."""
    t = frame.streams[j].clone()
    t[b] = value if element is None else t[b]
    if element is not None:
        t[b, element] = value
    return with_stream(frame, j, t)


def coefficients(mode: int, kappas) -> list[list[float]]:
    return [[k] if mode == EXTRAPOLATE else [2.0, k] for k in kappas]


class TestZeroKappa:
    """Where κ_b = 0 the sample is eps itself, and prev may hold anything."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    def test_value(self, emulation, mode, poison):
        for pair in ((f32, f32), (f32, bf16), (f16, f16), (f64, f64)):
            clean = with_parameters(lm(SHAPE, mode, pair), coefficients(mode, (0.4, 0.0, -0.3)))
            bad = spoiled(clean, 1, 1, poison)
            for plan in plans(clean):
                expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
                judge(clean, expected)
                assert same_bits(found.outputs[0], expected.outputs[0]), found.plan["text"]
                if mode != PLAIN:
                    assert same_bits(found.outputs[0][1], clean.streams[0][1]), found.plan["text"]

    def test_signed_zero(self, emulation):
        """−0 stays −0: the identity is no product with 1 and 0."""
        eps = torch.full((2, 77), -0.0)
        frame = with_parameters(lm((2, 77)), coefficients(KEEP_NORM, (0.0, 0.0)))
        frame = with_stream(spoiled(frame, 1, 0, math.inf), 0, eps)
        for plan in plans(frame):
            assert same_bits(run(emulation, frame, **plan).outputs[0], eps)

    @pytest.mark.parametrize("mode", MODES)
    def test_backward(self, emulation, mode):
        """d_prev is 0 and d_eps the gradient of λ/(λ+n)·ε or ε; only the derivative of κ has seen prev."""
        clean = with_parameters(lm_backward(SHAPE, mode), coefficients(mode, (0.4, 0.0, -0.3)))
        bad = spoiled(clean, 1, 1, math.nan)
        for plan in plans(clean):
            expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
            judge(clean, expected)
            for e, f in zip(expected.outputs, found.outputs, strict=True):
                assert same_bits(e, f), found.plan["text"]
            assert same_bits(found.outputs[1][1], torch.zeros(SHAPE[1]))
            if mode != PLAIN:
                assert same_bits(found.outputs[0][1], clean.streams[2][1])
            others = [0, 2]
            assert same_bits(expected.scalars[others], found.scalars[others])
            assert bool(found.scalars[1, -1].isnan()) and not bool(found.scalars[1, :-1].isnan().any())

    @pytest.mark.parametrize("mode", MODES)
    def test_tangent(self, emulation, mode):
        """No κ and no tangent of κ: neither prev nor its tangent is looked at."""
        moved = [[*c, *(0.0 for _ in c)] for c in coefficients(mode, (0.4, 0.0, -0.3))]
        clean = with_parameters(lm_jvp(SHAPE, mode), moved)
        bad = spoiled(spoiled(clean, 1, 1, math.nan), 3, 1, math.inf)
        for plan in plans(clean):
            expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
            judge(clean, expected)
            assert same_bits(expected.outputs[0], found.outputs[0]), found.plan["text"]

    def test_zero_is_written(self, emulation):
        """An output that is zero is written, whatever the rows hold."""
        frame = with_parameters(lm_backward(SHAPE), [2.0, 0.0])
        frame = spoiled(spoiled(frame, 0, 2, math.nan), 2, 1, math.inf)
        for plan in plans(frame):
            assert same_bits(run(emulation, frame, **plan).outputs[1], torch.zeros(SHAPE)), plan


class TestStep:
    """Numbers of a step that are 0: what they stand before may hold anything."""

    CASES = {
        "kappa": (KEEP_NORM, {1: [0.4, 0.0, -0.3]}, "prev"),
        "gamma": (EXTRAPOLATE, {0: [0.7, 0.0, -0.3]}, "prev"),
        "weight": (KEEP_NORM, {2: [0.75, 0.0, 0.75]}, "prev"),
        "output": (KEEP_NORM, {5: [-0.3, 0.0, 0.1], 8: [-0.35, 0.0, 0.2]}, 2),
        "output-snr": (SNR, {5: [-0.3, 0.0, 0.1], 8: [-0.35, 0.0, 0.2]}, 2),
        "guided": (
            KEEP_NORM,
            {4: [0.5, 0.0, 0.1], 7: [1.0, 0.0, 0.5], 5: 0.0, 8: 0.0},
            2,
        ),  # s_2 in s_1 alone
        "joined": (KEEP_NORM, {1: 0.0, 2: 0.5, 5: [-0.3, -0.5, 0.1], 8: 1.0}, 2),  # A + w·D = 0
    }

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize(("variant", "changes", "stream"), CASES.values(), ids=CASES.keys())
    def test_unread(self, emulation, variant, changes, stream, poison):
        """In the middle sample, of each dtype pair, with the direction as an output where that reads no more."""
        for pair in ((f32, f32), (f32, bf16), (f16, f16), (f64, f64)):
            name = next(k for k, c in self.CASES.items() if c[1] is changes)
            clean = step(
                SHAPE, variant, pair, 2, guided=name == "guided", direction=name != "joined", changes=changes
            )
            bad = spoiled(clean, 3 if stream == "prev" else stream, 1, poison)
            for plan in plans(clean):
                expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
                judge(clean, expected)
                for e, f in zip(expected.outputs, found.outputs, strict=True):
                    assert same_bits(e, f), found.plan["text"]
                    assert bool(f.isfinite().all())

    @pytest.mark.parametrize("place", [1, 2], ids=["kappa", "weight"])
    def test_unread_in_every_sample(self, emulation, place):
        """One number for the batch: no Gram at all if the host knows it, an empty one if only the device does."""
        for host in (True, False):
            clean = dataclasses.replace(whole_step(SHAPE, changes={place: 0.0}), host=host)
            bad = spoiled(clean, 3, slice(None), math.nan)
            some = plans(clean)[1:] + (
                ({"variant": "one_sweep", "threads": 32, "splits": 2},) if host else ()
            )
            for plan in ({}, *some):
                found = run(emulation, bad, **plan)
                judge(clean, found)
                assert all(
                    same_bits(a, b) for a, b in zip(found.outputs, run(emulation, clean, **plan).outputs)
                )

    def test_noise_that_does_not_count_is_not_drawn(self, emulation):
        """Its numbers are 0 in the middle sample: the bits of a step without noise."""
        changes = {9: [0.5, 0.0, 0.5], 10: [0.25, 0.0, -0.25]}
        noisy, plain = (
            step(SHAPE, models=2, noisy=True, changes=changes),
            step(SHAPE, models=2, per_sample=True),
        )
        plain = dataclasses.replace(plain, parameters=noisy.parameters[:, :9])
        for plan in plans(noisy):
            found = run(emulation, noisy, **plan)
            judge(noisy, found)
            assert same_bits(found.outputs[0][1], run(emulation, plain, **plan).outputs[0][1]), found.plan[
                "text"
            ]

    def test_outputs_are_apart(self, emulation):
        """What spoils e or y alone is not seen in x', although they are outputs too."""
        joined = step(SHAPE, models=2, direction=True, changes={1: 0.0, 2: 0.5, 5: -0.5, 8: 1.0})
        bent = step(SHAPE, models=2, clipped=True, converted=True, changes={5: 0.0, 8: 0.0, 9: 0.0, 10: 0.0})
        for clean in (joined, bent):
            bad = spoiled(clean, 2, 1, math.nan)
            for plan in plans(clean):
                expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
                judge(clean, expected)
                assert same_bits(expected.outputs[0], found.outputs[0]), found.plan["text"]
                assert bool(found.outputs[1][1].isnan().all()), found.plan["text"]

    def test_y_that_does_not_count(self, emulation):
        """A_y = D_y = 0, and y no output: sources that stand in y alone are not read."""
        changes = {3: 0.0, 6: 0.0, 9: [0.4, 0.0, 0.4], 10: [-0.3, 0.0, 0.2]}
        clean = step(SHAPE, models=2, clipped=True, changes=changes)
        bad = spoiled(clean, 0, 1, math.nan)
        for plan in plans(clean):
            expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
            judge(clean, expected)
            assert same_bits(expected.outputs[0], found.outputs[0]), found.plan["text"]

    def test_clamp_keeps_nan(self, emulation):
        frame = spoiled(whole_step(SHAPE, prev=False), 1, 1, math.nan, element=5)
        for plan in plans(frame):
            for out in run(emulation, frame, **plan).outputs:
                assert bool(out[1, 5].isnan()) and int(out.isnan().sum()) == 1

    @pytest.mark.parametrize("variant", [KEEP_NORM, EXTRAPOLATE, SNR])
    def test_degenerate(self, emulation, variant):
        """p = e, 2e, −e, 0 and e = 0: there x' is a, to the last bit, or with p in SNR."""
        x = cases.gaussian(torch.Generator().manual_seed(5), (6, 145)).to(f32)
        prev = x * torch.tensor([1.0, 2.0, -1.0, 0.0, 0.0, 5.0])[:, None]
        x[4:] = 0.0
        prev[4] = 1.0
        rule = {
            KEEP_NORM: ((0.0, 0.5), (2.0, 1.0)),
            EXTRAPOLATE: ((0.7, 0.0), (-2.0, 0.0)),
            SNR: ((0.1, 1.0),),
        }
        for first, second in rule[variant]:
            frame = step((6, 145), variant, changes={0: first, 1: second, 3: 0.5, 4: 0.0, 5: 0.0, 6: 1.0})
            other = frame.streams[0].clone()
            frame = dataclasses.replace(frame, streams=(other, x, prev))
            for plan in plans(frame):
                found = run(emulation, frame, **plan)
                judge(frame, found)
                assert same_bits(found.outputs[0][4:], 0.5 * other[4:]), found.plan["text"]

    @pytest.mark.parametrize("scale", [1e30, 1e-20])
    def test_range(self, emulation, scale):
        """Squares beyond float32."""
        for frame in (step(SHAPE, changes={0: scale**2}), step(SHAPE, EXTRAPOLATE), step(SHAPE, SNR)):
            streams = tuple((t.double() * scale).to(f32) for t in frame.streams)
            frame = dataclasses.replace(frame, streams=streams)
            for plan in plans(frame):
                judge(frame, run(emulation, frame, **plan))


class TestBadSamples:
    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize(
        "make",
        [lm, lm_backward, lm_jvp, affine, affine_backward, given, step, whole_step],
        ids=lambda m: m.__name__,
    )
    def test_a_bad_sample_stays_alone(self, emulation, make, poison):
        clean = make(SHAPE)
        for j in range(len(clean.streams)):
            bad = spoiled(clean, j, 1, poison, element=SHAPE[1] - 1)
            for plan in plans(clean):
                expected, found = run(emulation, clean, **plan), run(emulation, bad, **plan)
                for e, f in zip(expected.all, found.all, strict=True):
                    assert same_bits(e[[0, 2]], f[[0, 2]]), found.plan["text"]
                if math.isnan(poison):
                    assert any(bool(f[1].isnan().any()) for f in found.all), found.plan["text"]

    def test_clamp_keeps_nan(self, emulation):
        """As torch.clamp does, and in every element that is NaN: a bound must not hide it."""
        frame = spoiled(given(SHAPE, 2, 2, clamped=True, gram=False, prologue=2), 0, 1, math.nan, element=5)
        for plan in plans(frame):
            found = run(emulation, frame, **plan).outputs
            for out in found:
                assert bool(out[1, 5].isnan()) and int(out.isnan().sum()) == 1

    @pytest.mark.parametrize("mode", MODES)
    def test_degenerate(self, emulation, mode):
        """p = ε, 2ε, −ε, 0 and ε = 0: determinant 0, to the last bit."""
        eps = lm((6, 145), mode).streams[0]
        factor = torch.tensor([1.0, 2.0, -1.0, 0.0, 0.0, 5.0])[:, None]
        eps, prev = eps.clone(), eps * factor
        eps[4:] = 0.0
        prev[4] = 1.0
        scalars = (
            [(0.7,), (-2.0,)]
            if mode == EXTRAPOLATE
            else itertools.product((0.0, 1e-30, 2.0, 1e30), (0.5, 1.0))
        )
        for values in scalars:
            value = dataclasses.replace(lm((6, 145), mode, values=values), streams=(eps, prev))
            gradient = lm_backward((6, 145), mode, values=values)
            gradient = dataclasses.replace(gradient, streams=(eps, prev, gradient.streams[2]))
            for plan in plans(value):
                judge(value, run(emulation, value, **plan))
                found = run(emulation, gradient, **plan)
                if values[0] != 1e-30:  # there the gradient is 1e60
                    assert all(bool(t.isfinite().all()) for t in found.all), (values, found.plan["text"])


class TestRange:
    @pytest.mark.parametrize("scale", [1e30, 3e37, 1e-20, 1e-39])
    def test_float32(self, emulation, scale):
        """Squares beyond float32, and subnormal numbers."""
        for damping in (3.0, 0.0, 1e2 * scale**2):
            frame = lm(SHAPE, values=[damping, 0.4])
            for j in range(2):
                frame = with_stream(frame, j, (frame.streams[j].double() * scale).to(f32))
            for plan in plans(frame):
                judge(frame, run(emulation, frame, **plan))

    @pytest.mark.parametrize("dtype", [f16, bf16])
    def test_half(self, emulation, dtype):
        """Squared norms beyond 65504, sums of many, and results that round to infinity or to subnormal numbers."""
        for scale in (300.0, 1e-6):
            frame = lm((2, 5000), pair=(dtype, dtype))
            for j in range(2):
                frame = with_stream(frame, j, (frame.streams[j].double() * scale).to(dtype))
            for plan in plans(frame):
                judge(frame, run(emulation, frame, **plan))

    @pytest.mark.parametrize("dtype", [bf16, f16, f32])
    def test_rounding_to_nearest_even(self, emulation, dtype):
        """Halfway cases, the largest numbers, infinities, NaN and subnormals: torch's own rounding, bit by bit."""
        bits = torch.randint(
            -(2**31), 2**31, (2, 4000), generator=torch.Generator().manual_seed(0), dtype=torch.int64
        )
        edge = torch.tensor(
            [0x3F808000, 0x3F818000, 0x3F808001, 0x7F7FFFFF, 0x7F800000, 0x7FC00001, 1, 0x477FF000]
        )
        x = torch.cat([bits, edge.expand(2, -1), edge.expand(2, -1) | 0x33000000, bits & 0x38FFF000], 1)
        x = x.to(torch.int32).view(f32)
        frame = Frame("affine_backward", (x,), (dtype, f32), torch.tensor([1.0, 1.0], dtype=f64))
        expected = x.to(dtype)
        for plan in plans(frame):
            found = run(emulation, frame, **plan).outputs[0]
            same = (found == expected) | (found.isnan() & expected.isnan())
            assert bool(same.all())
            zero = expected == 0
            assert torch.equal(found[zero].signbit(), expected[zero].signbit())


class TestNoise:
    SEEDS = ((0, 0), (-1, -1), (2**63 - 1, -(2**63)), (123456789012, 2**40 + 5))

    @pytest.mark.parametrize("seed", SEEDS, ids=str)
    def test_words(self, emulation, seed):
        """The words are exact, high counters included."""
        for first in (0, 2**32 - 4, 2**62 - 8):
            counter = np.arange(first, first + 8, dtype=np.uint64)
            key, high = (s % 2**64 for s in seed)
            found = emulation.noise_words(key, counter, high)
            assert np.array_equal(found, oracle.noise_words(seed, 4 * counter))

    @pytest.mark.parametrize("per_sample", [False, True], ids=["one-seed", "seeds"])
    def test_normals(self, emulation, per_sample):
        """Noise alone, within 4 ulp: in rows that are written, and in rows that only a Gram sees."""
        for size, seed in itertools.product((1, 3, 129, 1026), self.SEEDS):
            seeds = torch.tensor([seed] * 5 if per_sample else seed, dtype=torch.int64)
            if per_sample:
                seeds[1:, 0] += torch.arange(4) if seed[0] < 2**62 else -torch.arange(4)
            for dtype in (f32, f64, bf16):
                frame = dataclasses.replace(affine((5, size), 1, (dtype, dtype), True), seed=seeds)
                frame = dataclasses.replace(frame, parameters=torch.tensor([0.0, 1.0], dtype=f64))
                xi = oracle.wide(noise(frame))
                allowed = normal_ulps(noise(frame)) + torch.finfo(dtype).eps / 2 * np.abs(xi)
                for plan in plans(frame):
                    assert_within(rows(run(emulation, frame, **plan).outputs[0]), xi, allowed, str(plan))

    def test_both_sweeps_draw_the_same(self, emulation):
        """A matrix that takes the noise away again, with its Gram: nothing is left but what was there before."""
        frame = given((3, 333), 2, 1, noisy=True, prologue=3)
        L = torch.tensor([[1.0, 0, 1], [0, 1, -1], [0, 0, 1]], dtype=f64)
        frame = dataclasses.replace(frame, prologue=L, parameters=torch.tensor([[0.0, 0.0, 1.0]], dtype=f64))
        bits = set()
        for plan in plans(frame):
            result = run(emulation, frame, **plan)
            judge(frame, result)
            bits.add(result.outputs[0].numpy().tobytes())
        assert len(bits) == 1, "every variant draws the same normals"


def test_maps(emulation):
    """The maps as the kernels are compiled with them, against longdouble."""
    for mode, (n, e, R) in itertools.product(MODES, cases.grams(torch.Generator().manual_seed(9), 10)):
        values = [0.7] if mode == EXTRAPOLATE else [3.0, 0.4]
        gram = np.zeros(171)
        gram[:3] = n, e, R
        numbers = {"op": 1, "mode": mode, "rows": 2, "outputs": 1, "gram": 1}
        C, used, zero, _ = emulation.frame_map(numbers, gram, np.array(values))
        expected = oracle.lm_row(mode, (n, e, R), values)
        assert_within(
            C[0], expected, 1e-11 * (np.abs(expected) + np.abs(expected).max()), f"{mode} {n} {e} {R}"
        )
        assert used == 3 and zero == 0
