"""What the LML steps promise beside their values: bits, samples that stay alone, noise, layouts, sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import marquardt as mq
import step_calls as calls
from harness import Target, arena, same_bits
from harness.compare import rows
from harness.layouts import WRITABLE, promised_strides, same_strides
from step_calls import STEPS, Call, bf16, close, f16, f32, f64, usual

pytestmark = [pytest.mark.accuracy, pytest.mark.parametrize("step", STEPS)]
NAN = math.nan


def tensors_of(call: Call) -> dict[str, torch.Tensor]:
    """Every tensor that goes into the arithmetic of a call, by name."""
    found: dict[str, torch.Tensor] = {}
    for name, thing in (*zip(("sample", "output", "prev"), call.args, strict=True), *call.keywords.items()):
        if isinstance(thing, torch.Tensor) and thing.is_floating_point() and thing.dim() > 1:
            found[name] = thing
        elif name == "output" and isinstance(thing, list):
            found.update({f"output{j}": t for j, t in enumerate(thing)})
        elif name == "guidance":
            found["uncond"] = thing[0]
    return found


class TestPlain:
    """What bends nothing costs nothing: the bits of the plain step, and prev unread."""

    @pytest.mark.parametrize("pair", [(f32, f32), (f32, bf16), (f32, f16), (f64, f64)], ids=str)
    @pytest.mark.parametrize(
        "bend",
        [
            {"damping": 0.1, "kappa": 0.0}, {"damping": 0.1, "kappa": 0}, {"extrapolation": 0.0},
            {"damping": 0.1, "kappa": torch.tensor(0.0)}, {"extrapolation": torch.tensor(0.0)},
            {"damping": 0.1, "kappa": torch.zeros(3)}, {"extrapolation": torch.zeros(3)}, {},
        ],
        ids=["kappa", "int", "extrapolation", "kappa-0-dim", "extrapolation-0-dim", "kappas", "extrapolations", "none"],
    )  # fmt: skip
    def test_bits(self, step: str, target: Target, pair, bend):
        call = usual(step, target.device, pair=pair, lm="none")
        plain = call.run(target)
        bend = {k: v.to(target.device) if getattr(v, "ndim", 0) else v for k, v in bend.items()}
        for fill in (NAN, math.inf, 1.0):
            kept = torch.full_like(plain[1], fill)
            call.args[2] = kept
            found = call.run(target, **bend)
            assert same_bits(found[0], plain[0]) and same_bits(found[1], plain[1])

    def test_first_step(self, step: str, target: Target):
        call = usual(step, target.device, lm="none")
        plain = call.run(target)
        for bend in ({"damping": 0.1, "kappa": 0.3}, {"extrapolation": 0.4}):
            found = call.run(target, **bend)
            assert same_bits(found[0], plain[0]) and same_bits(found[1], plain[1])

    def test_a_direction_without_weight_is_unread(self, step: str, target: Target):
        """ᾱ' = 1, dt = 0, SDE without LM: NaN in prev does not matter, in a flow not even in the velocity."""
        more = {"algorithm": "sde-dpmsolver++"} if step == "dpm" else {}
        call = usual(step, target.device, **more)
        last = {"ddim": {"alpha_bar_next": 1.0}, "dpm": {}, "flow": {"dt": 0.0}}[step]
        plain = call.run(target, **last)[0]
        call.args[2].fill_(NAN)
        if step == "flow":
            call.args[1].fill_(NAN)
            assert same_bits(plain, call.args[0])
        found = call.run(target, **last)[0]
        assert bool(found.isfinite().all()) and same_bits(found, plain)

    def test_some_samples(self, step: str, target: Target):
        """κ_b = 0: that sample has the bits of the plain step."""
        call = usual(step, target.device, lm="some-zero")
        plain = usual(step, target.device, lm="none").run(target)[0]
        found = call.run(target)[0]
        assert same_bits(found[0], plain[0]) and not torch.equal(found[1], plain[1])
        assert bool(found.isfinite().all())


def same_but_for_nan(found, expected) -> bool:
    """The same bits, and NaN of whatever bits at the same places: conversions to 16 bits on a GPU know one NaN."""
    nan = found.isnan()
    return torch.equal(nan, expected.isnan()) and same_bits(found[~nan], expected[~nan])


class TestSamples:
    @pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
    def test_active(self, step: str, target: Target, noise: bool):
        """A sample that is done keeps its bits, whatever else holds, and the others do not notice."""
        if step == "dpm":
            pytest.skip("has no such argument")
        changes = {"active": True, "guidance": "number", **(calls.NOISY[step] if noise else {})}
        for pair in ((f32, f32), (f32, bf16), (bf16, bf16), (f64, f64)):
            for more in ({}, {"limit": "threshold"}, {"doubled": True}):
                call = usual(step, target.device, pair=pair, **changes, **more)
                clean = call.run(target)[0]
                sample = call.args[0]
                sample[1].view(-1)[:4] = torch.tensor([NAN, -0.0, math.inf, 1e-40]).to(sample)
                for name, t in tensors_of(call).items():
                    if name != "sample":
                        t[1] = NAN
                found = call.run(target)[0]
                for b in range(len(found)):
                    assert same_but_for_nan(found[b], sample[1] if b % 3 == 1 else clean[b])
                assert found.data_ptr() != sample.data_ptr()

    def test_all_active_and_none(self, step: str, target: Target):
        if step == "dpm":
            pytest.skip("has no such argument")
        call = usual(step, target.device)
        plain, batch = call.run(target)[0], len(call.args[0])
        every = torch.ones(batch, dtype=torch.bool, device=target.device)
        assert same_bits(call.run(target, active=every)[0], plain)
        found = call.run(target, active=~every)[0]
        assert same_bits(found, call.args[0]) and found.data_ptr() != call.args[0].data_ptr()

    @pytest.mark.parametrize("pair", [(f32, bf16), (f64, f64)], ids=str)
    @pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
    def test_scalars_per_sample_are_single_calls(self, step: str, target: Target, pair, noise: bool):
        changes = {**calls.NOISY[step], "noise": "seeds"} if noise else {}
        call = usual(step, target.device, form="per-sample", pair=pair, guidance="none", **changes)
        whole = call.run(target)

        def part(thing, b: int, number: bool):
            if isinstance(thing, (list, tuple)):
                return [part(t, b, number) for t in thing]
            if not isinstance(thing, torch.Tensor):
                return thing
            return thing[b].item() if thing.dim() == 1 and number else thing[b : b + 1]

        for b in range(3):
            for number in (False, True):
                single = Call(
                    call.function, [part(a, b, number) for a in call.args],
                    {k: part(v, b, number) for k, v in call.keywords.items()}, call.expected,
                )  # fmt: skip
                for found, all_ in zip(single.run(target), whole, strict=True):
                    close(found, rows(all_[b : b + 1]), "alone", stated=1e-14 if pair[0] == f64 else 1e-7)

    @pytest.mark.parametrize("poison", [NAN, math.inf])
    def test_a_bad_sample_stays_alone(self, step: str, target: Target, poison: float):
        for more in ({}, {"guidance": "number", "prediction": "v_prediction", "limit": "threshold"}):
            call = usual(step, target.device, **more, **calls.NOISY[step])
            clean = call.run(target)
            for name, t in tensors_of(call).items():
                kept = t[1].clone()
                t[1].view(-1)[100] = poison
                for good, bad in zip(clean, call.run(target), strict=True):
                    for b in (0, 2):
                        assert same_bits(good[b], bad[b]), name
                    if good is clean[0] and math.isnan(poison):
                        assert bad[1].isnan().any(), f"{name} does not matter"
                t[1] = kept


class TestResults:
    @pytest.mark.parametrize("noise", [False, True], ids=["plain", "noise"])
    def test_doubled(self, step: str, target: Target, noise: bool):
        call = usual(step, target.device, **(calls.NOISY[step] if noise else {}))
        single, double = call.run(target), call.run(target, doubled=True)
        assert same_bits(double[0], torch.cat([single[0], single[0]]))
        assert same_bits(double[1], single[1])

    def test_inputs_are_left_alone(self, step: str, target: Target):
        """Nothing is written to an argument, and the state is a tensor of its own."""
        for more in ({}, {"lm": "none"}, {"guidance": "number", "prediction": "sample"}, {"doubled": True}):
            call = usual(step, target.device, **more)
            before = {k: t.clone() for k, t in tensors_of(call).items()}
            found = call.run(target)
            for name, t in tensors_of(call).items():
                assert same_bits(t, before[name]), name
                assert found[0].untyped_storage().data_ptr() != t.untyped_storage().data_ptr(), name

    def test_one_sample_without_a_batch(self, step: str, target: Target):
        for more in ({}, calls.NOISY[step]):
            call = usual(step, target.device, shape=(1, 4, 9, 7), **more)
            batched = call.run(target)

            def first(thing):
                if isinstance(thing, (list, tuple)):
                    return [first(t) for t in thing]
                return thing[0] if isinstance(thing, torch.Tensor) and thing.dim() == 4 else thing

            single = Call(
                call.function, [first(a) for a in call.args],
                {k: first(v) for k, v in call.keywords.items()}, call.expected,
            )  # fmt: skip
            for a, b in zip(single.run(target, batch_dims=0), batched, strict=True):
                assert same_bits(a, b[0])

    @pytest.mark.parametrize("shape", [(0, 4, 5), (3, 0), (2, 1), (2, 2049), (1, 70001)], ids=str)
    @pytest.mark.parametrize("lm", ["extrapolated", "damped"])
    def test_size(self, step: str, target: Target, lm: str, shape):
        if lm == "damped" and np.prod(shape) != 0:
            pytest.skip("a damping at which any size is exact is a case of the matrix")
        for pair in ((f32, bf16), (f64, f64)):
            for more in ({}, {"doubled": True}):
                call = usual(step, target.device, shape=shape, pair=pair, lm=lm, **more)
                found = call.run(target)
                again = 2 if more.get("doubled") else 1
                assert tuple(found[0].shape) == (again * shape[0], *shape[1:])
                if found[0].numel() and shape != (2, 1):  # one element: every direction is parallel
                    close(found[0], np.concatenate([call.expected[0]] * again), "x'")

    @pytest.mark.parametrize("layout", WRITABLE)
    def test_layout(self, step: str, target: Target, layout: str):
        """Any layout of any argument: the same numbers, nothing read beside them, the strides of the sample."""
        names = ("sample", "output", "prev")
        for shape in ((3, 4, 5, 6), (2, 3, 2, 4, 5), (3, 7, 6)):
            for noise in ({}, calls.NOISY[step]):
                call = usual(step, target.device, shape=shape, **noise)
                for which in (*names, "all"):

                    def placed(thing, name: str, which=which):
                        if isinstance(thing, list):
                            return [placed(t, name) for t in thing]
                        return arena(thing, layout).tensor if which in (name, "all") else thing

                    args = [placed(a, n) for a, n in zip(call.args, names, strict=True)]
                    found = Call(call.function, args, call.keywords, call.expected).run(target)
                    close(found[0], call.expected[0], f"{which} {layout}", call.slack)
                    assert same_strides(found[0], promised_strides(args[0]))

    def test_expanded_output(self, step: str, target: Target):
        """One network output for the whole batch, as an expanded tensor."""
        call = usual(step, target.device)
        outputs = call.args[1] if step == "dpm" else [call.args[1]]
        shared = [t[:1].expand(t.shape) for t in outputs]
        full = [t.contiguous() for t in shared]
        found = [
            Call(
                call.function, [call.args[0], m if step == "dpm" else m[0], call.args[2]], call.keywords, call.expected
            ).run(target)[0]
            for m in (shared, full)
        ]  # fmt: skip
        assert same_bits(*found)


class TestNoise:
    def drawn(self, step: str, target: Target, *, shape=(3, 4, 9, 7), pair=(f32, f32), **keywords):
        call = usual(step, target.device, shape=shape, pair=pair, **{"noise": "given", **calls.NOISY[step]})
        call.keywords.pop("seed", None)
        call.keywords.pop("noise", None)
        return call.run(target, **keywords)[0]

    def test_governed(self, step: str, target: Target):
        """By a seed, by a generator that is then alone, by manual_seed."""
        assert same_bits(self.drawn(step, target, seed=3), self.drawn(step, target, seed=3))
        assert not torch.equal(self.drawn(step, target, seed=3), self.drawn(step, target, seed=4))
        torch.manual_seed(1)
        a, b = self.drawn(step, target), self.drawn(step, target)
        torch.manual_seed(1)
        assert same_bits(self.drawn(step, target), a) and not torch.equal(a, b)
        before = torch.get_rng_state()
        one, two = (self.drawn(step, target, generator=torch.Generator().manual_seed(s)) for s in (7, 7))
        assert same_bits(one, two) and torch.equal(torch.get_rng_state(), before)

    def test_list_of_generators(self, step: str, target: Target):
        """Each sample has a stream of its own: its noise does not depend on the batch it is in."""
        call = usual(step, target.device, pair=(f32, f32), **calls.NOISY[step])
        call.keywords.pop("seed", None)

        def run(which, *seeds):
            def cut(thing):
                if isinstance(thing, list):
                    return [cut(t) for t in thing]
                return thing[which] if isinstance(thing, torch.Tensor) and thing.dim() > 1 else thing

            cut_call = Call(call.function, [cut(a) for a in call.args], call.keywords, call.expected)
            return cut_call.run(target, generator=[torch.Generator().manual_seed(s) for s in seeds])[0]

        whole = run([0, 1, 2], 5, 6, 7)
        assert same_bits(run([0, 1], 5, 6), whole[:2]) and same_bits(run([2], 7), whole[2:])
        assert same_bits(run([2, 0, 1], 7, 5, 6), whole[[2, 0, 1]])

    @pytest.mark.parametrize("per_sample", [False, True], ids=["seed", "seeds"])
    def test_given_is_drawn(self, step: str, target: Target, per_sample: bool):
        """`noise=` with the normals that the seed means, to 4 ulp of float32 each."""
        seed = torch.tensor([[5, 6], [7, 8], [-9, 2**50]] if per_sample else [5, 6], device=target.device)
        for pair in ((f32, f32), (f32, bf16), (f64, f64)):
            call = usual(step, target.device, pair=pair, **calls.NOISY[step])
            call.keywords.pop("seed", None)
            shape = call.args[0].shape
            noise = mq.reference.normal(seed, tuple(shape), pair[0], 1).to(target.device)
            drawn, given = call.run(target, seed=seed)[0], call.run(target, noise=noise)[0]
            slack = 4 * 2.0**-23 * np.sqrt((rows(noise) ** 2).sum(1))
            close(drawn, rows(given), "drawn", slack, stated=1e-15 if pair[0] == f64 else 1e-7)

    def test_nothing_is_drawn_in_vain(self, step: str, target: Target):
        call = usual(step, target.device)
        call.keywords.pop("seed", None)
        torch.manual_seed(2)
        before = torch.get_rng_state()
        call.run(target)
        assert torch.equal(torch.get_rng_state(), before)

    def test_steps_draw_different_noise(self, step: str, target: Target):
        generator = torch.Generator().manual_seed(3)
        one, two = (self.drawn(step, target, generator=generator) for _ in range(2))
        assert not torch.equal(one, two)
