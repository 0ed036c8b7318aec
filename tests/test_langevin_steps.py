"""Langevin steps, over- and underdamped: values, the snr rule, low-rank preconditioning, derivatives."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cases
import marquardt as mq
import oracle
import oracle_steps as steps
import step_calls as calls
from harness import Target, same_bits
from harness.compare import rows, wide
from harness.layouts import WRITABLE, arena, promised_strides, same_strides
from step_calls import bf16, close, f32, f64

accuracy, gradients = pytest.mark.accuracy, pytest.mark.gradcheck
NAN = math.nan
SCHEMES = ("baoab", "obabo", "euler")
AXES: dict[str, Any] = {
    "pair": calls.PAIRS,
    "shape": calls.SHAPES,
    "form": ("number", "zero-dim", "per-sample"),
    "size": ("step", "snr"),
    "temperature": (1.0, 0.3, 0.0),
    "hessian": ("none", "own", "shared", "no-s", "module"),
    "noise": ("given", "seed", "seeds"),
}
AXES_UNDER: dict[str, Any] = {
    "pair": calls.PAIRS,
    "shape": calls.SHAPES,
    "form": ("number", "zero-dim", "per-sample"),
    "temperature": (1.0, 0.3, 0.0),
    "scheme": SCHEMES,
    "end": ("middle", "start", "finish"),
    "noise": ("given", "seed", "seeds"),
}


def allowed(row: dict) -> bool:
    if "end" in row:
        return row["end"] == "middle" or row["scheme"] != "euler"
    if row["hessian"] != "none" and row["size"] == "snr":
        return False
    return row["hessian"] != "module" or row["pair"][0] == row["pair"][1]


def hessian_of(make: calls.Maker):
    """The argument, and (U [B, k, D], s [B, k], damping [B]) for the oracle."""
    kind, batch = make.row["hessian"], make.batch
    if kind == "none":
        return None, None
    size = math.prod(make.shape[1:])
    count, damping = 3, make.number(0.5)
    if kind == "module":
        module = mq.LowRankHessian(2, damping=damping, decay=0.9)
        for _ in range(3):
            module.update(make.tensor(make.state, size**-0.5))
        U, s, given = module.U, module.s, module
    else:
        shape = (count, *make.shape[1:]) if kind == "shared" else (batch, count, *make.shape[1:])
        U = (size**-0.5 * cases.gaussian(make.generator, shape)).to(make.model).to(make.device)
        s = None if kind == "no-s" else torch.tensor([0.5, 2.0, 1.0], dtype=f64, device=make.device)
        if kind == "own" and make.row["form"] == "per-sample":
            s = s * torch.linspace(1, 0.8, batch, dtype=f64, device=make.device)[:, None]
        given = (U, s, damping)
    flat = wide(U).reshape(1 if kind == "shared" else batch, -1, size)
    s_ = np.ones(flat.shape[1]) if s is None else wide(s)
    return given, (
        np.broadcast_to(flat, (batch, *flat.shape[1:])),
        np.broadcast_to(s_, (batch, flat.shape[1])),
        np.broadcast_to(calls.numbers(damping), (batch,)),
    )


@accuracy
class TestLangevin:
    def run(self, target: Target, *args, **keywords):
        with target():
            return mq.langevin_step(*args, **keywords)

    @pytest.mark.parametrize("row", calls.pairwise(AXES, allowed), ids=calls.name_of)
    def test_value(self, target: Target, row):
        make = calls.Maker({**row, "doubled": False}, target.device)
        x, score = make.tensor(make.state), make.tensor(make.model)
        size, temperature = make.number(0.15), make.number(row["temperature"])
        hessian, dense = hessian_of(make)
        noise = make.noise()
        new = self.run(
            target, x, score, temperature=temperature, hessian=hessian, **{row["size"]: size}, **make.keywords
        )
        expected = steps.langevin_step(
            rows(x), rows(score), noise, temperature=calls.numbers(temperature), hessian=dense,
            **{row["size"]: calls.numbers(size)},
        )  # fmt: skip
        moved = np.sqrt(oracle.dot(expected - rows(x), expected - rows(x)))
        assert new.dtype == make.state and new.shape == x.shape
        close(new, expected, "x'", 0.0 if row["noise"] == "given" else 8 * 2.0**-23 * moved)

    def test_snr_rule(self, target: Target):
        """h = 2(r‖ξ‖/‖score‖)²: the drift is 2r²‖ξ‖²/‖score‖ long, whatever the score's length."""
        x = torch.zeros(3, 500, dtype=f64, device=target.device)
        generator = torch.Generator().manual_seed(0)
        score, noise = (cases.gaussian(generator, (3, 500)).to(target.device) for _ in range(2))
        score *= torch.tensor([[1.0], [1e-3], [1e4]], device=target.device)
        h = 2 * (0.16 * noise.norm(dim=1) / score.norm(dim=1)) ** 2
        new = self.run(target, x, score, snr=0.16, noise=noise)
        torch.testing.assert_close(
            new, h[:, None] * score + (2 * h).sqrt()[:, None] * noise, rtol=1e-13, atol=0
        )
        torch.testing.assert_close(self.run(target, x, score, step=h, noise=noise), new, rtol=1e-13, atol=0)

    def test_zero_score(self, target: Target):
        """A sample whose score is 0 stays where it is under the snr rule, and only diffuses with a step."""
        x, score, noise = (torch.randn(3, 40, device=target.device) for _ in range(3))
        score[1] = 0
        found = self.run(target, x, score, snr=0.2, noise=noise)
        assert same_bits(found[1], x[1]) and not torch.equal(found[0], x[0]) and bool(found.isfinite().all())
        found = self.run(target, x, score, step=0.2, noise=noise)
        close(found[1:2], rows(x[1:2]) + np.sqrt(0.4) * rows(noise[1:2]), "x'")

    def test_no_temperature(self, target: Target):
        """T = 0: gradient ascent, and nothing is drawn."""
        x, score = (torch.randn(3, 40, device=target.device) for _ in range(2))
        before = torch.get_rng_state()
        found = self.run(target, x, score, step=0.2, temperature=0.0)
        assert torch.equal(torch.get_rng_state(), before)
        close(found, rows(x) + 0.2 * rows(score), "x'")
        assert same_bits(self.run(target, x, score, step=0.2, temperature=0.0, noise=x), found)

    def test_no_step(self, target: Target):
        """h = 0: x again, in a tensor of its own."""
        x, score = (torch.randn(3, 40, device=target.device) for _ in range(2))
        found = self.run(target, x, score, step=0.0)
        assert torch.equal(found, x) and found.data_ptr() != x.data_ptr()

    @pytest.mark.parametrize(("size", "rank"), [("step", 0), ("snr", 0), ("step", 2)])
    def test_a_bad_sample_stays_alone(self, target: Target, size: str, rank: int):
        x, score, noise = (torch.randn(3, 40, device=target.device) for _ in range(3))
        U = torch.randn(3, rank, 40, device=target.device)
        more: dict[str, Any] = {size: 0.1, "noise": noise, "hessian": (U, None, 0.5) if rank else None}
        clean = self.run(target, x, score, **more)
        for t in (x, score, noise, U[:, 0] if rank else x):
            kept = t[1, 7].clone()
            t[1, 7] = NAN
            found = self.run(target, x, score, **more)
            assert same_bits(found[0], clean[0]) and same_bits(found[2], clean[2])
            assert bool(found[1].isnan().any())
            t[1, 7] = kept

    @pytest.mark.parametrize("size", ["step", "snr"])
    def test_noise(self, target: Target, size: str):
        x, score = (torch.randn(4, 300, device=target.device) for _ in range(2))
        draw = lambda x, score, **k: self.run(target, x, score, **{size: 0.1}, **k)  # noqa: E731
        seed = torch.tensor([9, -4], device=target.device)
        assert same_bits(draw(x, score, seed=seed), draw(x, score, seed=seed))
        assert same_bits(draw(x, score, seed=5), draw(x, score, seed=5))
        assert not torch.equal(draw(x, score, seed=5), draw(x, score, seed=6))
        given = draw(x, score, noise=mq.reference.normal(seed, (4, 300)).to(target.device))
        torch.testing.assert_close(draw(x, score, seed=seed), given, rtol=2e-6, atol=2e-6)
        make = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
        whole = draw(x, score, generator=make(1, 2, 3, 4))
        assert same_bits(draw(x[:1], score[:1], generator=make(1)), whole[:1])
        assert same_bits(draw(x[2:], score[2:], generator=make(3, 4)), whole[2:])

    @pytest.mark.parametrize("layout", WRITABLE)
    def test_layouts_and_out(self, target: Target, layout: str):
        """Any layout in and out, nothing written beside, x itself as `out`."""
        for size in ("step", "snr"):
            x, score, noise = (torch.randn(3, 4, 5, 6, device=target.device) for _ in range(3))
            plain = self.run(target, x, score, noise=noise, **{size: 0.1})
            placed = [arena(t, layout).tensor for t in (x, score, noise)]
            found = self.run(target, *placed[:2], noise=placed[2], **{size: 0.1})
            torch.testing.assert_close(found, plain, rtol=1e-6, atol=1e-6)
            assert same_strides(found, promised_strides(placed[0]))
            kept = arena(torch.zeros_like(x), layout, 777.0)
            assert self.run(target, x, score, noise=noise, out=kept.tensor, **{size: 0.1}) is kept.tensor
            torch.testing.assert_close(kept.tensor, plain, rtol=1e-6, atol=1e-6)
            assert kept.intact()
            for into in (0, 1, 2):
                tensors = [t.clone() for t in (x, score, noise)]
                self.run(target, *tensors[:2], noise=tensors[2], out=tensors[into], **{size: 0.1})
                torch.testing.assert_close(tensors[into], plain, rtol=1e-6, atol=1e-6)

    def test_sizes(self, target: Target):
        for size in ("step", "snr"):
            for shape in ((0, 4), (3, 0), (4, 1), (2, 2049)):
                x, score, noise = (torch.randn(shape, device=target.device) for _ in range(3))
                found = self.run(target, x, score, noise=noise, **{size: 0.1})
                assert found.shape == x.shape and bool(found.isfinite().all())
            x, score, noise = (torch.randn(1, 4, 9, device=target.device) for _ in range(3))
            single = self.run(target, x[0], score[0], noise=noise[0], batch_dims=0, **{size: 0.1})
            assert same_bits(single, self.run(target, x, score, noise=noise, **{size: 0.1})[0])


@accuracy
class TestUnderdamped:
    def run(self, target: Target, *args, **keywords):
        with target():
            return mq.underdamped_langevin_step(*args, **keywords)

    @pytest.mark.parametrize("row", calls.pairwise(AXES_UNDER, allowed), ids=calls.name_of)
    def test_value(self, target: Target, row):
        make = calls.Maker({**row, "doubled": False}, target.device)
        x, v, score = make.tensor(make.state), make.tensor(make.state), make.tensor(make.model)
        numbers = {
            k: make.number(c)
            for k, c in (("step", 0.3), ("friction", 1.4), ("temperature", row["temperature"]))
        }
        noise = make.noise()
        end = {} if row["end"] == "middle" else {row["end"]: True}
        found = self.run(target, x, v, score, scheme=row["scheme"], **numbers, **end, **make.keywords)
        expected = steps.underdamped_step(
            rows(x), rows(v), rows(score), noise, scheme=row["scheme"], **end,
            **{k: calls.numbers(c) for k, c in numbers.items()},
        )  # fmt: skip
        slack = make.slack(1.0, noise)
        for name, new, exact in zip(("x'", "v'"), found, expected, strict=True):
            assert new.dtype == make.state and new.shape == x.shape
            close(new, exact, name, slack)

    def test_limits(self, target: Target):
        """No friction: no noise, v turns by the score alone. Strong friction: v is forgotten."""
        x, v, score, noise = (torch.randn(2, 30, dtype=f64, device=target.device) for _ in range(4))
        for scheme in SCHEMES:
            _, new = self.run(target, x, v, score, step=0.1, friction=0.0, scheme=scheme, noise=noise)
            torch.testing.assert_close(new, v + 0.1 * score, rtol=1e-13, atol=1e-13)
        _, new = self.run(target, x, v, score, step=0.1, friction=1e4, noise=noise)
        torch.testing.assert_close(new, noise, rtol=1e-13, atol=1e-13)

    def test_noise(self, target: Target):
        x, v, score = (torch.randn(4, 300, device=target.device) for _ in range(3))
        draw = lambda *t, **k: self.run(target, *t, step=0.1, friction=1.0, **k)[1]  # noqa: E731
        assert same_bits(draw(x, v, score, seed=5), draw(x, v, score, seed=5))
        assert not torch.equal(draw(x, v, score, seed=5), draw(x, v, score, seed=6))
        make = lambda *seeds: [torch.Generator().manual_seed(s) for s in seeds]  # noqa: E731
        whole = draw(x, v, score, generator=make(1, 2, 3, 4))
        assert same_bits(draw(x[2:], v[2:], score[2:], generator=make(3, 4)), whole[2:])
        single = self.run(target, x[0], v[0], score[0], step=0.1, friction=1.0, seed=5, batch_dims=0)
        batch = self.run(target, x[:1], v[:1], score[:1], step=0.1, friction=1.0, seed=5)
        assert all(same_bits(a, b[0]) for a, b in zip(single, batch, strict=True))

    @pytest.mark.parametrize("layout", WRITABLE)
    def test_layouts(self, target: Target, layout: str):
        tensors = [torch.randn(3, 4, 5, 6, device=target.device) for _ in range(4)]
        options = {"step": 0.1, "friction": 1.0}
        plain = self.run(target, *tensors[:3], noise=tensors[3], **options)
        placed = [arena(t, layout).tensor for t in tensors]
        for a, b in zip(self.run(target, *placed[:3], noise=placed[3], **options), plain, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
            assert same_strides(a, promised_strides(placed[0]))


@gradients
class TestGradients:
    SHAPE = (2, 3, 2)

    def leaves(self, target: Target, count: int, values, rank=0, per_sample=False):
        generator = torch.Generator().manual_seed(3)
        tensors = [cases.gaussian(generator, self.SHAPE).to(target.device) for _ in range(count)]
        if rank:
            tensors.append(cases.gaussian(generator, (2, rank, 3, 2)).to(target.device))
            tensors.append(torch.rand(rank, dtype=f64, generator=generator).to(target.device) + 0.5)
        form = "per-sample" if per_sample else "zero-dim"
        return [
            t.requires_grad_() for t in (*tensors, *(calls.scalar(c, form, 2, target.device) for c in values))
        ]

    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    @pytest.mark.parametrize(("size", "rank"), [("step", 0), ("snr", 0), ("step", 2)])
    def test_langevin(self, target: Target, size: str, rank: int, per_sample: bool):
        def step(x, score, noise, *rest):
            *hessian, h, T = rest
            hessian = tuple(hessian) if rank else None
            return mq.langevin_step(x, score, noise=noise, temperature=T, hessian=hessian, **{size: h})

        if target.backend == "reference" and per_sample:
            pytest.skip("slow, and the same as the shared form")
        values = (0.7, 0.2, 1.3) if rank else (0.2, 1.3)
        assert gradcheck(step, self.leaves(target, 3, values, rank, per_sample), check_forward_ad=True)
        if per_sample and not rank:
            assert gradgradcheck(step, self.leaves(target, 3, values, rank, per_sample))

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_underdamped(self, target: Target, scheme: str):
        def step(x, v, score, noise, h, gamma, T):
            return mq.underdamped_langevin_step(
                x, v, score, noise=noise, step=h, friction=gamma, temperature=T, scheme=scheme
            )

        leaves = self.leaves(target, 4, (0.3, 1.2, 0.9), per_sample=scheme == "baoab")
        assert gradcheck(step, leaves, check_forward_ad=True)
        if scheme == "baoab":
            assert gradgradcheck(step, leaves)

    def test_drawn_noise(self, target: Target):
        """Forward and backward see the same noise: temperature's gradient is that of the noise that was drawn."""
        seed = torch.tensor([3, 4], device=target.device)
        noise = mq.reference.normal(seed, (2, 50), f64).to(target.device)
        for size in ("step", "snr"):
            found = []
            for more in ({"seed": seed}, {"noise": noise}):
                x, score = (torch.ones(2, 50, dtype=f64, device=target.device) for _ in range(2))
                leaves = [
                    x.requires_grad_(),
                    score.requires_grad_(),
                    torch.tensor(0.8, requires_grad=True, dtype=f64),
                ]
                with target():
                    out = mq.langevin_step(*leaves[:2], temperature=leaves[2], **{size: 0.1}, **more)
                found.append(torch.autograd.grad((out**2).sum(), leaves))
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)

    def test_dtypes(self, target: Target):
        x, v = (torch.randn(2, 9, device=target.device, requires_grad=True) for _ in range(2))
        score = torch.randn(2, 9, device=target.device).to(bf16).requires_grad_()
        with target():
            one = mq.langevin_step(x, score, step=0.1, seed=1)
            two, _ = mq.underdamped_langevin_step(x, v, score, step=0.1, friction=1.0, seed=1)
        assert one.dtype == two.dtype == f32
        for out, leaves in ((one, (x, score)), (two, (x, v, score))):
            assert [d.dtype for d in torch.autograd.grad(out.sum(), leaves)] == [t.dtype for t in leaves]

    @pytest.mark.compile
    def test_compiled(self, target: Target):
        """Twenty step sizes, one graph."""
        from torch._dynamo.testing import CompileCounter

        from harness import native_only

        native_only()
        torch._dynamo.reset()
        counter = CompileCounter()
        x, v, score, noise = (torch.randn(2, 30, dtype=f64, device=target.device) for _ in range(4))

        def both(h, T):
            x1 = mq.langevin_step(x, score, step=h, temperature=T, noise=noise)
            x1 = mq.langevin_step(x1, score, snr=h, temperature=T, noise=noise)
            return mq.underdamped_langevin_step(
                x1, v, score, step=h, friction=1.5, temperature=T, noise=noise
            )

        compiled = torch.compile(both, fullgraph=True, backend=counter)
        with target():
            for i in range(20):
                numbers = torch.tensor(0.1 + 0.01 * i, dtype=f64), torch.tensor(1.0 - 0.02 * i, dtype=f64)
                for a, b in zip(compiled(*numbers), both(*numbers), strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert counter.frame_count == 1
