"""Derivatives of the LML steps in float64, transforms of torch.func, and what torch.compile makes of them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import func
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

import cases
import marquardt as mq
import step_calls as calls
from harness import Target, native_only, same_bits
from step_calls import bf16, f32, f64

SHAPE = (2, 3, 2)
Tensor = torch.Tensor


def ddim(x, output, prev, uncond, noise, a, a1, damping, kappa, scale, eta, **options):
    return mq.lml_ddim_step(
        x, output, prev, alpha_bar=a, alpha_bar_next=a1, damping=damping, kappa=kappa, eta=eta,
        guidance=(uncond, scale), noise=noise, **options,
    )  # fmt: skip


def ddim_plain(x, output, a, a1, **options):
    return mq.lml_ddim_step(x, output, alpha_bar=a, alpha_bar_next=a1, **options)


def ddim_extrapolated(x, output, prev, a, a1, gamma, **options):
    return mq.lml_ddim_step(x, output, prev, alpha_bar=a, alpha_bar_next=a1, extrapolation=gamma, **options)


TABLES = calls.tables((0.6, 0.5, 0.38, 0.25))


def dpm(x, m0, m1, prev, damping, kappa, **options):
    options = {"order": 2, **{k: v[:3] for k, v in TABLES.items()}, **options}
    return mq.lml_dpm_step(x, [m0, m1], prev, damping=damping, kappa=kappa, **options)


def dpm_raw(x, m0, m1, uncond, noise, prev, damping, kappa, scale, **options):
    options = {
        "order": 2, "algorithm": "sde-dpmsolver++", "lm_on_sde": True, **{k: v[:3] for k, v in TABLES.items()},
        "prediction_type": "v_prediction", **options,
    }  # fmt: skip
    return mq.lml_dpm_step(
        x, [m0, m1], prev, damping=damping, kappa=kappa, guidance=(uncond, scale), noise=noise, **options
    )


def flow(x, v, prev, uncond, dt, damping, kappa, scale, **options):
    return mq.lml_flow_step(
        x, v, prev, dt=dt, damping=damping, kappa=kappa, guidance=(uncond, scale), **options
    )


def flow_stochastic(x, v, prev, noise, sigma, sigma_next, gamma, **options):
    return mq.lml_flow_step(
        x, v, prev, sigma=sigma, sigma_next=sigma_next, stochastic=True, extrapolation=gamma, noise=noise, **options
    )  # fmt: skip


# name -> (function, tensors, values of the differentiable scalars)
FUNCTIONS = {
    "ddim": (ddim, 5, (0.4, 0.6, 0.5, 0.3, 2.0, 0.5)),
    "ddim-plain": (ddim_plain, 2, (0.4, 0.6)),
    "ddim-extrapolated": (functools.partial(ddim_extrapolated, prediction_type="v_prediction"), 3, (0.4, 0.6, 0.5)),
    "ddim-clip": (
        functools.partial(ddim, clip=0.7, use_clipped_output=True, prediction_type="sample"), 5,
        (0.4, 0.6, 0.5, 0.3, 2.0, 0.5),
    ),
    "ddim-threshold": (functools.partial(ddim, threshold=(0.7, 2.0)), 5, (0.4, 0.6, 0.5, 0.3, 2.0, 0.5)),
    "ddim-doubled": (functools.partial(ddim_extrapolated, doubled=True), 3, (0.4, 0.6, 0.5)),
    "ddim-active": (
        functools.partial(ddim_extrapolated, active=torch.tensor([True, False])), 3, (0.4, 0.6, 0.5)
    ),
    "dpm": (dpm, 4, (0.5, 0.3)),
    "dpm-direction": (functools.partial(dpm, apply_to="direction", algorithm="dpmsolver"), 4, (0.5, 0.3)),
    "dpm-raw": (dpm_raw, 6, (0.5, 0.3, 2.0)),
    "dpm-clip": (functools.partial(dpm_raw, clip=0.7), 6, (0.5, 0.3, 2.0)),
    "flow": (flow, 4, (-0.2, 0.5, 0.3, 2.0)),
    "flow-stochastic": (flow_stochastic, 4, (0.7, 0.5, 0.4)),
}  # fmt: skip
QUICK = ("ddim", "ddim-threshold", "dpm-raw", "flow-stochastic")
COMPILED = [n if n in QUICK else pytest.param(n, marks=pytest.mark.full) for n in FUNCTIONS]
TWICE = ("ddim", "dpm-raw", "flow", "flow-stochastic")


def point(name: str, target: Target, per_sample=False, shape=SHAPE, grad=True) -> list[Tensor]:
    _, count, scalars = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(3)
    tensors = [cases.gaussian(generator, shape).to(target.device) for _ in range(count)]
    numbers = [
        calls.scalar(s, "per-sample" if per_sample else "zero-dim", shape[0], target.device) for s in scalars
    ]
    return [t.requires_grad_(grad) for t in (*tensors, *numbers)]


def results(name: str):
    """The results of a step that come out of arithmetic: one that is the argument itself is left out."""
    function = FUNCTIONS[name][0]

    def run(*leaves):
        return tuple(t for t in function(*leaves) if not any(t is leaf for leaf in leaves))

    return run


def quick_set(request) -> None:
    """The definition is slow: in the quick set it meets a few functions, scalars of one form, and no compiler."""
    given = request.node.callspec.params
    if given["target"].backend != "reference":
        return
    if request.node.get_closest_marker("compile"):
        pytest.skip("plain PyTorch: minutes of tracing that say nothing of ours")
    if given.get("per_sample") or given.get("name") not in TWICE:
        pytest.skip("the definition is slow, and its derivative PyTorch's: a few functions are enough")


@pytest.mark.gradcheck
class TestGradients:
    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_gradcheck(self, request, target: Target, name: str, per_sample: bool):
        quick_set(request)
        assert gradcheck(results(name), point(name, target, per_sample), check_forward_ad=True)

    @pytest.mark.parametrize("name", TWICE)
    def test_gradgradcheck(self, target: Target, name: str):
        assert gradgradcheck(results(name), point(name, target, True, (2, 2, 2)))

    @pytest.mark.parametrize("name", FUNCTIONS)
    def test_each_argument_alone(self, request, target: Target, name: str):
        quick_set(request)
        leaves = point(name, target)

        def gradients(leaves):
            out = results(name)(*leaves)
            weights = [torch.linspace(-1, 2, t.numel(), dtype=f64, device=t.device).view_as(t) for t in out]
            loss = sum((t * w).sum() for t, w in zip(out, weights, strict=True))
            return torch.autograd.grad(loss, [t for t in leaves if t.requires_grad])

        for i, expected in enumerate(gradients(leaves)):
            alone = [t.detach().clone().requires_grad_(i == j) for j, t in enumerate(leaves)]
            torch.testing.assert_close(gradients(alone)[0], expected, rtol=1e-12, atol=1e-12)

    @pytest.mark.parametrize("step", calls.STEPS)
    def test_drawn_noise(self, target: Target, step: str):
        """Backward sees the noise that forward drew: the derivative is that of the call with the noise given."""
        found = []
        for given in (False, True):
            call = calls.usual(
                step, target.device, pair=(f64, f64), **{**calls.NOISY[step], "form": "zero-dim"}
            )
            seed = call.keywords["seed"]
            if given:
                del call.keywords["seed"]
                call.keywords["noise"] = mq.reference.normal(seed, tuple(call.args[0].shape), f64).to(
                    target.device
                )
            names = {"ddim": ("alpha_bar", "eta"), "dpm": ("damping",), "flow": ("sigma", "sigma_next")}[step]
            for k in names:
                call.keywords[k] = call.keywords[k].clone().requires_grad_()
            x = call.args[0].requires_grad_()
            out = call.run(target)[0]
            found.append(torch.autograd.grad((out**2).sum(), [x, *(call.keywords[k] for k in names)]))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)

    def test_dtypes_of_gradients(self, target: Target):
        for step in calls.STEPS:
            call = calls.usual(step, target.device, pair=(f32, bf16))
            leaves = [t.requires_grad_() for a in call.args for t in (a if isinstance(a, list) else [a])]
            found = torch.autograd.grad(call.run(target)[0].sum(), leaves)
            assert [d.dtype for d in found] == [t.dtype for t in leaves]

    def test_nothing_requires_grad(self, target: Target):
        for step in calls.STEPS:
            call = calls.usual(step, target.device)
            assert not any(t.requires_grad for t in call.run(target))
            with torch.no_grad():
                call.args[0].requires_grad_()
                assert not call.run(target)[0].requires_grad

    @pytest.mark.parametrize("step", ["ddim", "flow"])
    def test_inactive_samples(self, target: Target, step: str):
        """The gradient of a finished sample is the identity, also where the other tensors hold NaN."""
        call = calls.usual(step, target.device, active=True, pair=(f32, f32))
        call.args[1][1], call.args[2][1] = float("nan"), float("nan")
        leaves = [t.requires_grad_() for t in call.args]
        d_x, d_output, d_prev = torch.autograd.grad(call.run(target)[0].sum(), leaves)
        assert bool((d_x[1] == 1).all()) and not bool(d_output[1].any()) and not bool(d_prev[1].any())
        assert all(bool(d.isfinite().all()) for d in (d_x, d_output, d_prev))


@pytest.mark.gradcheck
@pytest.mark.parametrize("name", ("ddim", "dpm-raw", "flow"))
class TestTransforms:
    def close(self, a, b):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)

    def first(self, name: str):
        return lambda *leaves: FUNCTIONS[name][0](*leaves)[0]

    def test_grad(self, target: Target, name: str):
        leaves = point(name, target)
        loss = lambda *p: (self.first(name)(*p) ** 3).sum()  # noqa: E731
        expected = torch.autograd.grad(loss(*leaves), leaves)
        found = func.grad(loss, argnums=tuple(range(len(leaves))))(*point(name, target, grad=False))
        for f, e in zip(found, expected, strict=True):
            self.close(f, e)

    def test_jvp(self, target: Target, name: str):
        leaves = point(name, target, grad=False)
        generator = torch.Generator().manual_seed(6)
        tangents = [torch.randn(t.shape, dtype=f64, generator=generator).to(t.device) for t in leaves]
        out, tangent = func.jvp(self.first(name), tuple(leaves), tuple(tangents))
        weight = torch.linspace(-1, 2, out.numel(), dtype=f64, device=out.device).view_as(out)
        backward = func.vjp(self.first(name), *leaves)[1](weight)
        self.close(
            (weight * tangent).sum(), sum((d * t).sum() for d, t in zip(backward, tangents, strict=True))
        )

    @pytest.mark.parametrize("which", ["all", "first", "scalars"])
    def test_vmap(self, target: Target, name: str, which: str):
        leaves, count = point(name, target, grad=False), FUNCTIONS[name][1]
        mapped = {"all": range(len(leaves)), "first": [0], "scalars": range(count, len(leaves))}[which]
        moved = [
            torch.stack([t * (1 + 0.1 * s) for s in range(3)]) if i in mapped else t
            for i, t in enumerate(leaves)
        ]
        dims = tuple(0 if i in mapped else None for i in range(len(leaves)))
        found = func.vmap(self.first(name), in_dims=dims)(*moved)
        for s in range(3):
            single = [t[s] if i in mapped else t for i, t in enumerate(moved)]
            self.close(found[s], self.first(name)(*single))


@pytest.mark.compile
class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self, request):
        native_only()
        torch._dynamo.reset()
        quick_set(request)

    def loop(self, step: str):
        """Ten steps with coefficients from a table, the first without a previous direction."""
        if step == "ddim":

            def run(x, bars):
                prev = None
                for i in range(10):
                    x, prev = mq.lml_ddim_step(
                        x, torch.tanh(x).to(bf16), prev, alpha_bar=bars[i], alpha_bar_next=bars[i + 1], damping=0.1,
                        kappa=0.2,
                    )  # fmt: skip
                return x
        elif step == "dpm":

            def run(x, bars):
                prev, history = None, []
                lam = (bars.log() - (1 - bars).log()) / 2
                for i in range(10):
                    order = min(i + 1, 3)
                    at = [i + 1 - j for j in range(order + 1)]
                    history = [torch.tanh(x).to(bf16), *history][:3]
                    x, prev, history[0] = mq.lml_dpm_step(
                        x, history, prev, lambdas=[lam[j] for j in at], alphas=[bars[j].sqrt() for j in at],
                        sigmas=[(1 - bars[j]).sqrt() for j in at], order=order, prediction_type="epsilon", damping=0.1,
                        kappa=0.2,
                    )  # fmt: skip
                return x
        else:

            def run(x, bars):
                prev = None
                for i in range(10):
                    x, prev = mq.lml_flow_step(
                        x,
                        torch.tanh(x).to(bf16),
                        prev,
                        sigma=bars[-1 - i],
                        sigma_next=bars[-2 - i],
                        extrapolation=0.3,
                    )
                return x

        return run

    @pytest.mark.parametrize("step", calls.STEPS)
    def test_ten_steps_are_one_graph(self, target: Target, step: str):
        counter = CompileCounterWithBackend("aot_eager")
        run = self.loop(step)
        compiled = torch.compile(run, fullgraph=True, backend=counter)
        bars = torch.linspace(0.1, 0.95, 11, dtype=f64)
        for seed in range(3):
            x = torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(seed)).to(target.device)
            traced, eager = compiled(x, bars * (1 - 0.01 * seed)), run(x, bars * (1 - 0.01 * seed))
            torch.testing.assert_close(traced, eager, rtol=2e-5, atol=2e-5)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("name", COMPILED)
    def test_twenty_coefficients_are_one_graph(self, target: Target, name: str):
        counter = CompileCounter()
        step = results(name)
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        leaves, count = point(name, target, grad=False), FUNCTIONS[name][1]
        for i in range(20):
            moved = [t * (1 + 0.01 * i) if j >= count else t for j, t in enumerate(leaves)]
            for a, b in zip(compiled(*moved), step(*moved), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert counter.frame_count == 1

    @pytest.mark.parametrize("name", COMPILED)
    def test_values_and_gradients(self, target: Target, name: str):
        step = results(name)
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        found = []
        for function in (step, compiled):
            leaves = point(name, target)
            out = function(*leaves)
            found.append((*out, *torch.autograd.grad(sum((t**2).sum() for t in out), leaves)))
        assert [t.stride() for t in found[0]] == [t.stride() for t in found[1]]
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)

    def test_seed_is_data(self, target: Target):
        """Drawn noise under compile: the seed is no constant, and the default generator is taken."""
        x, out = (torch.randn(2, 30).to(target.device) for _ in range(2))

        def step(seed):
            return mq.lml_ddim_step(x, out, alpha_bar=0.5, alpha_bar_next=0.7, eta=1.0, seed=seed)[0]

        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        for values in ((1, 2), (3, 4)):
            seed = torch.tensor(values, device=target.device)
            assert same_bits(compiled(seed), step(seed)) or target.backend == "reference"
        drawn = torch.compile(
            lambda: mq.lml_ddim_step(x, out, alpha_bar=0.5, alpha_bar_next=0.7, eta=1.0)[0], fullgraph=True,
            backend="aot_eager",
        )  # fmt: skip
        torch.manual_seed(5)
        first, second = drawn(), drawn()
        torch.manual_seed(5)
        assert torch.equal(first, drawn()) and not torch.equal(first, second)
