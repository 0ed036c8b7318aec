"""The plan: which variant runs and how it is laid out, without running it."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from frame_calls import A100, H200, OPS, SMALL, arrays_of, bf16, f16, f32, f64, numbers_of, plan_of
from frame_cases import affine, affine_backward, given, lm, lm_backward, lm_jvp, step, whole_step

pytestmark = pytest.mark.emulation

WIDTH = {"f32": 4, "half": 8, "mixed": 4, "f64": 2}
LATENT = 4 * 64 * 64
GRID = 2**31 - 1

FRAMES = {
    "lm": lm((2, 8)),
    "lm-bf16": lm((2, 8), pair=(bf16, bf16)),
    "lm-mixed": lm((2, 8), pair=(f32, f16)),
    "lm-f64": lm((2, 8), pair=(f64, f64)),
    "lm-no-prev": lm((2, 8), prev=False),
    "lm-per-sample": lm((2, 8), per_sample=True),
    "backward": lm_backward((2, 8)),
    "jvp": lm_jvp((2, 8)),
    "affine": affine((2, 8), 3),
    "affine-9": affine((2, 8), 8, noisy=True, per_sample=True),
    "affine_backward": affine_backward((2, 8), 8),
    "given": given((2, 8), 5, 2),
    "given-18": given((2, 8), 16, 17, ones=True, noisy=True),
    "given-apply": given((2, 8), 5, 2, gram=False, prologue=3),
    "step": whole_step((2, 8)),
    "step-f64": step((2, 8), pair=(f64, f64), models=5, per_sample=True),
    "step-apply": step((2, 8), prev=False),
    "prologue": given((2, 8), 2, 2, prologue=18, per_sample=True),
}
SIZES = (0, 1, 5, 257, LATENT, 4 * 128 * 128, 1 << 20, (1 << 20) + 1, 1 << 24, 1 << 31, 1 << 36)
BATCHES = (0, 1, 2, 17, 64, 1000, 1 << 20, 1 << 33)


@pytest.mark.parametrize("limits", [H200, A100, SMALL], ids=["H200", "A100", "small"])
@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES.keys())
def test_every_plan_can_run(emulation, frame, limits):
    """Within the chip, and every element is somebody's."""
    for batch, size in itertools.product(BATCHES, SIZES):
        if batch * size > 1 << 40:  # beyond any memory
            continue
        plan = plan_of(emulation, frame, (batch, size), **limits)
        text = f"B = {batch}, D = {size}: {plan}"
        assert plan["threads"] % 32 == 0 and 32 <= plan["threads"] <= 1024, text
        assert 0 <= plan["shared"] <= limits["shared_per_block"], text
        assert 1 <= plan["cluster"] <= limits["max_cluster"], text
        assert plan["cluster"] == 1 or plan["variant"] == "held", text
        assert plan["splits"] >= 1 and plan["group"] >= 1 and plan["stages"] >= 1, text
        assert plan["group"] * max(plan["splits"], plan["cluster"]) <= GRID, text
        assert plan["workspace"] >= 0, text
        if batch * size:
            # samples that lie behind one another may be walked as one
            flat = plan["variant"] == "one_sweep" and frame.parameters.dim() == (
                2 if frame.op == "given" else 1
            )
            walked = plan["splits"] * plan["tiles"] * plan["threads"] * WIDTH[plan["access"]]
            assert walked >= (batch * size if flat else size) or (flat and walked >= size), text
        if frame.gram == "none":
            assert plan["variant"] == "one_sweep", text
        else:
            assert plan["variant"] in ("held", "two_sweeps"), text


def test_text(emulation):
    """One line that names the variant and the numbers people ask for."""
    for frame, limits in itertools.product(FRAMES.values(), (H200, A100)):
        for size in (100, LATENT, 1 << 24):
            plan = plan_of(emulation, frame, (2, size), **limits)
            text = plan["text"]
            assert "\n" not in text and len(text) < 200
            name, words = plan["variant"], text.replace("_", " ")
            assert name.replace("_", " ") in words and str(plan["threads"]) in text, text
            if plan["splits"] > 1:
                assert str(plan["splits"]) in text, text


class TestChoice:
    def test_small_batches_have_several_ctas_a_sample(self, emulation):
        """One latent must not be the work of one multiprocessor."""
        for make in (lm, lm_backward, lm_jvp, lambda shape: given(shape, 5, 2)):
            for batch in (1, 2, 4):
                plan = plan_of(emulation, make((1, 8)), (batch, LATENT))
                assert plan["splits"] > 1 or plan["cluster"] > 1, plan["text"]
                old = plan_of(emulation, make((1, 8)), (batch, 4 * 128 * 128), **A100)
                assert old["splits"] > 1, old["text"]
        plan = plan_of(emulation, affine((1, 8), 3), (1, LATENT))
        assert plan["splits"] > 1, plan["text"]

    def test_large_batches_have_one(self, emulation):
        """With many samples for each multiprocessor nothing is gained by sharing one."""
        plan = plan_of(emulation, lm((1, 8)), (4096, 4096))
        assert plan["variant"] == "held" and plan["cluster"] == 1, plan["text"]

    def test_small_samples_are_held(self, emulation):
        for frame in (lm((1, 8)), lm_backward((1, 8)), lm((1, 8), pair=(f64, f64))):
            for limits in (H200, A100, SMALL):
                plan = plan_of(emulation, frame, (256, 1024), **limits)
                assert plan["variant"] == "held", plan["text"]

    @pytest.mark.parametrize("limits", [H200, A100, SMALL], ids=["H200", "A100", "small"])
    def test_sweeps_are_one_wave(self, emulation, limits):
        """As many CTAs as are resident at once, or fewer; more only where each walks the most tiles, or has one."""
        places = 3 * limits["sms"]
        for make, batch, size in itertools.product(
            (lambda shape: affine(shape, 3), lm), (1, 2, 3, 17, 48, 100), (1 << 17, 3145728, 1 << 22, 1 << 24)
        ):
            plan = plan_of(emulation, make((1, 8)), (batch, size), **limits)
            if plan["variant"] == "held":
                continue
            ctas = plan["splits"] * (min(batch, plan["group"]) if plan["variant"] == "two_sweeps" else 1)
            assert ctas <= places or plan["splits"] == 1 or plan["tiles"] >= 64, (batch, size, plan["text"])
            # and not many fewer, while there are tiles for them
            assert ctas * 2 > places or plan["tiles"] == 1, (batch, size, plan["text"])

    def test_a_lone_medium_sample_has_the_chip(self, emulation):
        """A cluster's 16 CTAs would be slower than two launches over all multiprocessors."""
        for batch in (1, 2, 4):
            plan = plan_of(emulation, lm((1, 8)), (batch, 4 * 128 * 128))
            assert plan["variant"] == "two_sweeps" and plan["splits"] * batch >= 64, plan["text"]
        for batch, size in ((1, LATENT), (8, 4 * 128 * 128), (8, LATENT)):
            assert plan_of(emulation, lm((1, 8)), (batch, size))["variant"] == "held"

    def test_a_frame_beyond_the_cluster_is_swept_twice(self, emulation):
        for batch in (1, 8, 64):
            plan = plan_of(emulation, lm((1, 8)), (batch, 1 << 24))
            assert plan["variant"] == "two_sweeps", plan["text"]

    def test_what_fits_a_cluster_is_read_once(self, emulation):
        """Video latents: beyond one multiprocessor, within the shared memory of eight."""
        for frame, size in ((lm((1, 8)), 1 << 17), (lm((1, 8), pair=(bf16, bf16)), 1 << 18)):
            plan = plan_of(emulation, frame, (64, size))
            assert plan["variant"] == "held" and plan["cluster"] > 1, plan["text"]

    def test_no_cluster_before_sm_90(self, emulation):
        for frame, batch, size in itertools.product(FRAMES.values(), (1, 3, 500), SIZES):
            plan = plan_of(emulation, frame, (batch, size), **A100)
            assert plan["cluster"] == 1, plan["text"]

    def test_a_step_without_its_prev_is_one_sweep(self, emulation):
        """κ = 0 or w = 0 that the host knows: no Gram, although there is a prev."""
        for changes in ({1: 0.0}, {2: 0.0}):
            plan = plan_of(emulation, step((1, 8), changes=changes), (8, LATENT))
            assert plan["variant"] == "one_sweep", plan["text"]
        for frame in (step((1, 8)), dataclasses.replace(step((1, 8), changes={1: 0.0}), host=False)):
            assert plan_of(emulation, frame, (8, LATENT))["variant"] == "held"

    def test_a_batch_beyond_the_grid_is_cut(self, emulation):
        for frame in (lm((1, 8)), affine((1, 8), 2, per_sample=True)):
            plan = plan_of(emulation, frame, (2**33, 5))
            assert plan["group"] < 2**33, plan["text"]

    def test_the_second_sweep_finds_the_frame_in_cache(self, emulation):
        """Two launches of many large samples go through the batch in groups that L2 holds."""
        plan = plan_of(emulation, lm((1, 8)), (64, 1 << 21), **A100)
        assert plan["variant"] == "two_sweeps", plan["text"]
        assert plan["group"] * 2 * 4 * (1 << 21) <= 40 << 20 or plan["group"] == 1, plan["text"]


class TestRefusals:
    """A plan made by hand that cannot run says so."""

    @pytest.mark.parametrize(
        "plan",
        [
            {"variant": "held", "threads": 33},
            {"variant": "held", "threads": 0},
            {"variant": "held", "threads": 2048},
            {"variant": "held", "threads": 64, "cluster": 32},
            {"variant": "held", "threads": 64, "cluster": 0},
            {"variant": "two_sweeps", "threads": 64, "splits": 0},
            {"variant": "one_sweep", "threads": 64, "splits": 2},  # there is a Gram
            {"variant": "held", "threads": 64, "cluster": 2, "major": 8},
            {"variant": "held", "threads": 32, "cluster": 16, "max_cluster": 8},
        ],
        ids=str,
    )
    def test_impossible_plans(self, emulation, plan):
        with pytest.raises(ValueError):
            plan_of(emulation, lm((2, 1000)), **plan)

    def test_too_much_shared_memory(self, emulation):
        with pytest.raises(ValueError):
            plan_of(emulation, lm((1, 8)), (1, 1 << 22), variant="held", threads=256, cluster=1)

    def test_the_module_checks_its_arrays(self, emulation):
        """The bench of the tests itself: an array that is too short is refused before anything runs."""
        frame = lm((2, 10))
        numbers = numbers_of(frame)
        with pytest.raises(ValueError, match="stream0"):
            emulation.run_frame(numbers, {})
        with pytest.raises(ValueError, match="colour"):
            emulation.run_frame({**numbers, "colour": 1}, {})
        with pytest.raises(ValueError, match="op"):
            emulation.run_frame({**numbers, "op": len(OPS)}, {})
        arrays = arrays_of(dataclasses.replace(frame))
        arrays["stream1"] = arrays["stream1"][:-1]
        with pytest.raises(ValueError, match="stream1"):
            emulation.run_frame(numbers, arrays)
