"""The CUDA kernels of the frame engine against the float64 oracle: every op, dtype pair and variant."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from frame_calls import A100, H200, SMALL, Place, bf16, f16, f32, f64, run
from frame_cases import (
    EXTRAPOLATE,
    KEEP_NORM,
    PAIRS,
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
from frame_oracle import judge, wanted
from frame_step_oracle import Step

import oracle
from harness.compare import norm_error

pytestmark = [pytest.mark.emulation, pytest.mark.accuracy]

SHAPE = (3, 301)  # several tiles of 32 threads, and a tail
MODES = pytest.mark.parametrize(
    "mode", [KEEP_NORM, PLAIN, EXTRAPOLATE], ids=["keep-norm", "plain", "extrapolate"]
)
PAIR = pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda p: "-".join(str(d).removeprefix("torch.") for d in p)
)
PLACES = (
    ((Place(),), (Place(),)),
    ((Place(1, 3), Place(2), Place(3, 1)), (Place(1, 1), Place(3))),
)


def check(module, make, stated=False, places=PLACES):
    """Every plan, in two places: as an allocator gives memory, and as slices of other tensors lie."""
    draw = functools.cache(lambda seed: make(seed=seed))
    for streams, outputs in places:
        frame = draw(0).placed(streams, outputs)
        for plan in plans(frame):
            judge(frame, run(module, frame, **plan), draw, stated)


@PAIR
@MODES
class TestHessian:
    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    def test_value(self, emulation, mode, pair, per_sample):
        check(emulation, functools.partial(lm, SHAPE, mode, pair, per_sample=per_sample), stated=True)

    def test_without_prev(self, emulation, mode, pair):
        check(emulation, functools.partial(lm, SHAPE, mode, pair, prev=False), places=PLACES[1:])

    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    def test_backward(self, emulation, mode, pair, per_sample):
        check(
            emulation, functools.partial(lm_backward, SHAPE, mode, pair, per_sample=per_sample), stated=True
        )

    def test_tangent(self, emulation, mode, pair):
        check(emulation, functools.partial(lm_jvp, SHAPE, mode, pair), stated=True)


class TestCorrelation:
    """p = 0.999999·ε + …: six digits lie in the residual alone."""

    @pytest.mark.parametrize(("kappa", "damping"), [(0.9, 5e-5), (1e-8, 5.0), (0.5, 1e-3)], ids=str)
    @pytest.mark.parametrize("rho", [0.0, 0.999999])
    def test_value_and_gradient(self, emulation, rho, kappa, damping):
        shape = (1, 3072)
        for make in (lm, lm_backward):
            make = functools.partial(make, shape, values=[damping, kappa], rho=rho)
            draw = functools.cache(lambda seed, make=make: make(seed=seed))
            for plan in (
                {},
                {"variant": "held", "threads": 64, "cluster": 4},
                {"variant": "two_sweeps", "splits": 2},
            ):
                judge(draw(1), run(emulation, draw(1), **plan), draw, stated=True)

    @pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
    @pytest.mark.parametrize("pair", [(f32, f32), (f32, bf16), (bf16, f32)], ids=str)
    def test_parallel(self, emulation, pair, multiple):
        """p near a multiple of ε: large multiples of both cancel, and what is left is all there."""
        frame = lm((2, 301), KEEP_NORM, pair, values=[1e-3, 0.1])
        eps = frame.streams[0]
        noise = torch.randn(eps.shape, generator=torch.Generator().manual_seed(7), dtype=f64)
        prev = (multiple * (eps.double() + 1e-3 * noise)).to(frame.streams[1].dtype)
        frame = dataclasses.replace(frame, streams=(eps, prev))
        for plan in plans(frame):
            result = run(emulation, frame, **plan)
            judge(frame, result, functools.cache(lambda seed: frame), stated=True)
            if pair[0] == f32:
                assert norm_error(result.outputs[0], wanted(frame).outputs[0]).max() <= 2e-7

    @pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
    @pytest.mark.parametrize("pair", [(f32, f32), (f32, bf16)], ids=str)
    def test_gradient_of_parallel(self, emulation, pair, multiple):
        """The same of gradients; a sample at κ = 0 among them has the gradient 0 to p."""
        frame = lm_backward((3, 301), KEEP_NORM, pair, values=[1e-3, 0.1], per_sample=True)
        eps, _, grad = frame.streams
        noise = torch.randn(eps.shape, generator=torch.Generator().manual_seed(7), dtype=f64)
        prev = (multiple * (eps.double() + 1e-3 * noise)).to(frame.streams[1].dtype)
        frame.parameters[1, 1] = 0.0
        frame = dataclasses.replace(frame, streams=(eps, prev, grad))
        for plan in plans(frame):
            result = run(emulation, frame, **plan)
            judge(frame, result, functools.cache(lambda seed: frame))
            assert not result.outputs[1][1].any()

    @pytest.mark.parametrize("gamma", [-1.5, 1e-4])
    def test_extrapolation(self, emulation, gamma):
        make = functools.partial(lm, (2, 1000), EXTRAPOLATE, values=[gamma], rho=0.999999)
        check(emulation, make, stated=True)


class TestLangevin:
    @PAIR
    @pytest.mark.parametrize("terms", [1, 2, 3, 5, 8, 9])
    def test_value(self, emulation, terms, pair):
        check(emulation, functools.partial(affine, SHAPE, terms, pair))
        check(emulation, functools.partial(affine, SHAPE, terms, pair, per_sample=True), places=PLACES[1:])

    @PAIR
    @pytest.mark.parametrize("noisy", [True, "per-sample"], ids=["one-seed", "seeds"])
    def test_noise(self, emulation, noisy, pair):
        """D % 4 ≠ 0: a sample begins in the middle of a counter."""
        for terms in (1, 3, 8):
            check(emulation, functools.partial(affine, SHAPE, terms, pair, noisy))

    @PAIR
    @pytest.mark.parametrize("noisy", [False, True, "per-sample"], ids=["no-noise", "one-seed", "seeds"])
    def test_backward(self, emulation, noisy, pair):
        for terms in (1, 2, 4, 8):
            check(emulation, functools.partial(affine_backward, SHAPE, terms, pair, noisy), places=PLACES[1:])
        check(emulation, functools.partial(affine_backward, SHAPE, 3, pair, noisy, per_sample=True))
        check(emulation, functools.partial(affine_backward, SHAPE, 3, pair, noisy, d_terms=False))
        check(emulation, functools.partial(affine_backward, SHAPE, 3, pair, noisy, d_coef=False))


VARIANTS = pytest.mark.parametrize(
    "variant", [KEEP_NORM, EXTRAPOLATE, SNR], ids=["keep-norm", "extrapolate", "snr"]
)


class TestStep:
    @PAIR
    @VARIANTS
    def test_value(self, emulation, variant, pair):
        """All that a step has, and the least."""
        check(emulation, functools.partial(whole_step, SHAPE, variant, pair), stated=True, places=PLACES[1:])
        make = functools.partial(step, SHAPE, variant, pair, per_sample=True, direction=True)
        check(emulation, make, stated=True, places=PLACES[:1])

    @VARIANTS
    @pytest.mark.parametrize("models", [0, 1, 2, 3, 4, 5])
    def test_sources(self, emulation, variant, models):
        make = functools.partial(
            step, SHAPE, variant, (f32, bf16), models, direction="state", noisy=models % 2 == 1
        )
        check(emulation, make, places=PLACES[1:])

    @pytest.mark.parametrize("noisy", [False, True, "per-sample"], ids=["no-noise", "one-seed", "seeds"])
    @pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
    def test_without_prev(self, emulation, clipped, noisy):
        """No Gram: one sweep, and a dense batch may be one long sample."""
        for pair, more in (
            ((f32, bf16), {}),
            ((f16, f16), {"direction": True}),
            ((f64, f64), {"doubled": True}),
        ):
            make = functools.partial(
                step, SHAPE, KEEP_NORM, pair, 2, False, noisy, clipped, converted=clipped, **more
            )
            check(emulation, make)

    @pytest.mark.parametrize("noisy", [True, "per-sample"], ids=["one-seed", "seeds"])
    @VARIANTS
    def test_noise(self, emulation, variant, noisy):
        """D % 4 ≠ 0: a sample begins in the middle of a counter. In SNR the noise is p itself."""
        for pair in ((f32, f16), (f64, f64)):
            check(emulation, functools.partial(step, SHAPE, variant, pair, 1, noisy=noisy), places=PLACES[1:])

    def test_which_outputs(self, emulation):
        for doubled, direction, converted in itertools.product(
            (False, True), (False, True, "state"), (False, True)
        ):
            make = functools.partial(
                step, (3, 150), pair=(f32, bf16), clipped=True, doubled=doubled, direction=direction,
                converted=converted,
            )  # fmt: skip
            check(emulation, make, places=PLACES[1:])

    @pytest.mark.parametrize("prev", [False, True], ids=["", "prev"])
    def test_guided(self, emulation, prev):
        """s_1 stands for s_1 − s_2, which keeps the digits of two outputs that are nearly equal."""
        for pair, models in (((f32, f32), 2), ((f32, bf16), 3), ((f64, f64), 5)):

            def make(seed, pair=pair, models=models):
                frame = step(SHAPE, KEEP_NORM, pair, models, prev, guided=True, direction=True, seed=seed)
                streams = list(frame.streams)
                streams[1] = (streams[2].double() * (1 + 2.0**-6)).to(pair[1])
                return dataclasses.replace(frame, streams=tuple(streams))

            check(emulation, make, places=PLACES[1:])

    @pytest.mark.parametrize("rho", [-0.5, 0.999999])
    def test_correlation(self, emulation, rho):
        """p = 0.999999·e + …: digits that only the residual has."""
        make = functools.partial(step, (1, 3072), rho=rho, changes={0: 1e-3, 1: 0.9})
        check(emulation, make, stated=rho < 0.9, places=PLACES[:1])

    @pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
    @pytest.mark.parametrize("clipped", [False, True], ids=["", "clipped"])
    @pytest.mark.parametrize("guided", [False, True], ids=["", "guided"])
    def test_small_damping(self, emulation, guided, clipped, multiple):
        """The step is nearly orthogonal to r and shows what e and r = p − e were rounded by: their sums are float64.

        Near p = e the multiple of r is large, near p = 3e those of e and of r, which then cancel.
        """
        shape = (2, 301)
        frame = step(
            shape, KEEP_NORM, (f32, f32), 2, clipped=clipped, guided=guided, doubled=True, direction="state",
            converted=clipped, changes={0: 1e-3, 1: 0.1},
        )  # fmt: skip
        e = torch.from_numpy(Step(frame, oracle.LD(2.0**-24), None, None).e.v.astype("float64"))
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(7), dtype=f64)
        prev = (multiple * (e.reshape(shape) + 1e-3 * noise)).float()
        frame = dataclasses.replace(frame, streams=(*frame.streams[:-1], prev))
        for plan in plans(frame):
            judge(frame, run(emulation, frame, **plan), functools.cache(lambda seed: frame), stated=True)
            for found, right in zip(
                run(emulation, frame, **plan).outputs, wanted(frame).outputs, strict=True
            ):
                assert norm_error(found, right).max() <= 3e-7


class TestEngine:
    """Any matrix, with all that may come before the Gram."""

    @pytest.mark.full
    @pytest.mark.parametrize("vectors", [1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16, 18])
    def test_counts(self, emulation, vectors):
        for outputs, gram in ((1, True), (2, False), (min(vectors + 1, 17), True), (0, True)):
            check(
                emulation, functools.partial(given, (2, 150), vectors, outputs, gram=gram), places=PLACES[1:]
            )

    @PAIR
    def test_dtypes(self, emulation, pair):
        for vectors, outputs in ((2, 2), (5, 3)):
            check(emulation, functools.partial(given, SHAPE, vectors, outputs, pair))

    @pytest.mark.full
    @pytest.mark.parametrize("pair", [(f32, f32), (f32, bf16), (f64, f64)], ids=str)
    @pytest.mark.parametrize("noisy", [False, True, "per-sample"], ids=["no-noise", "one-seed", "seeds"])
    @pytest.mark.parametrize("ones", [False, True], ids=["", "ones"])
    def test_virtual_rows(self, emulation, ones, noisy, pair):
        for prologue, clamped, per_sample in itertools.product((0, 1, 4), (False, True), (False, True)):
            make = functools.partial(
                given, (3, 133), 2, 2, pair, ones=ones, noisy=noisy, prologue=prologue, clamped=clamped,
                per_sample=per_sample,
            )  # fmt: skip
            check(emulation, make, places=PLACES[1:])

    @pytest.mark.full
    @pytest.mark.parametrize("gram", [False, True], ids=["apply", "gram"])
    def test_largest(self, emulation, gram):
        """18 vectors in, 17 out; 18 rows made of three vectors; one row made of 18."""
        check(emulation, functools.partial(given, (2, 261), 16, 17, gram=gram, ones=True, noisy=True))
        check(emulation, functools.partial(given, (2, 261), 3, 17, gram=gram, prologue=18, per_sample=True))
        check(
            emulation, functools.partial(given, (2, 261), 16, 1, gram=gram, ones=True, noisy=True, prologue=1)
        )

    @pytest.mark.parametrize("pairs", [1, 2])
    def test_residual_pairs(self, emulation, pairs):
        for vectors in range(2 * pairs, 5):
            for pair in ((f32, f32), (f32, f16), (f64, f64)):
                check(
                    emulation,
                    functools.partial(given, SHAPE, vectors, 2, pair, pairs=pairs),
                    places=PLACES[1:],
                )


@pytest.mark.parametrize("limits", [H200, A100, SMALL], ids=["H200", "A100", "small"])
def test_real_sizes(emulation, limits):
    """Latents of 4×64×64 as the heuristic runs them: whole CTAs, many tiles, large clusters."""
    frames = (
        lm((2, 16384)),
        lm((1, 65539), pair=(bf16, bf16)).placed([Place(1), Place(8)]),
        lm_backward((2, 16384), pair=(f32, bf16)),
        affine((2, 16384), 3, noisy=True, per_sample=True),
        affine_backward((1, 16384), 8),
        given((1, 20001), 10, 3, noisy=True),
        whole_step((2, 16384), pair=(f32, bf16)),
        step((1, 65539), prev=False, noisy=True),
    )
    for frame in frames:
        judge(frame, run(emulation, frame, **limits))
    for plan in (
        {"variant": "held", "threads": 256, "cluster": 16},
        {"variant": "two_sweeps", "threads": 256, "splits": 5},
    ):
        judge(frames[0], run(emulation, frames[0], **plan))


def test_agreement_of_plans(emulation):
    """Gram products and sums are double whatever the plan: results differ by a rounding of the outputs at most."""
    frame = given((2, 1500), 3, 2)
    results = [run(emulation, frame, **plan) for plan in plans(frame)]
    assert len({r.plan["text"] for r in results}) > 4
    first = results[0]
    norms = first.scalars.reshape(2, 3, 3).diagonal(dim1=1, dim2=2).sqrt()
    size = (norms[:, :, None] * norms[:, None, :]).reshape(2, 9)
    for other in results[1:]:
        gap = (other.scalars - first.scalars).abs()
        assert bool((gap <= 1e-14 * size).all()), other.plan["text"]
    direction = lm((2, 1500))
    outputs = [run(emulation, direction, **plan).outputs[0] for plan in plans(direction)]
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], rtol=3e-7, atol=1e-7)
