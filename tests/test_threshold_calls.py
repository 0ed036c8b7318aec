"""Dynamic thresholding: derivatives, transforms, tracing and errors."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.autograd import gradcheck, gradgradcheck

import marquardt as mq
from harness import Target, native_only
from marquardt.threshold import SCALE, dynamic_threshold
from threshold_ops import LARGE, bf16, f64, normal


def leaf(shape, target: Target, seed=0):
    return normal(shape, f64, 3.0, seed).to(target.device).requires_grad_()


@pytest.mark.gradcheck
class TestDerivatives:
    @pytest.mark.parametrize(("ratio", "maximum"), [(0.55, 40.0), (0.9, 1.5)])
    def test_gradcheck(self, target: Target, ratio, maximum):
        """To x0, ratio and maximum; with the quantile as s, and with the maximum as s."""
        numbers = [torch.tensor(v, dtype=f64, requires_grad=True) for v in (ratio, maximum)]

        def function(x, ratio, maximum):
            with target():
                return dynamic_threshold(x, ratio=ratio, maximum=maximum)

        assert gradcheck(function, (leaf((2, 9), target), *numbers), check_forward_ad=True)
        assert gradgradcheck(function, (leaf((2, 6), target), *numbers))

    def test_per_sample_and_unbatched(self, target: Target):
        ratio = torch.tensor([0.4, 0.8], dtype=f64, device=target.device, requires_grad=True)

        def each(x, ratio):
            with target():
                return dynamic_threshold(x, ratio=ratio, maximum=LARGE)

        def alone(x):
            with target():
                return dynamic_threshold(x, ratio=0.7, maximum=LARGE, batch_dims=0)

        assert gradcheck(each, (leaf((2, 3, 4), target), ratio), check_forward_ad=True)
        assert gradcheck(alone, (leaf((3, 5), target),), check_forward_ad=True)

    def test_as_torch_quantile(self, target: Target):
        x = leaf((3, 40), target)
        with target():
            found = torch.autograd.grad(dynamic_threshold(x, ratio=0.77, maximum=LARGE).square().sum(), x)[0]
        s = torch.quantile(x.abs(), 0.77, dim=1, keepdim=True).clamp(1.0, LARGE)
        expected = torch.autograd.grad((torch.clamp(x, -s, s) / s).square().sum(), x)[0]
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)

    def test_transforms(self, target: Target):
        x = leaf((2, 12), target).detach()

        def loss(x):
            with target():
                return dynamic_threshold(x, ratio=0.7, maximum=LARGE).square().sum()

        expected = torch.autograd.functional.jacobian(loss, x)
        torch.testing.assert_close(torch.func.grad(loss)(x), expected)
        tangent = torch.ones_like(x)
        _, along = torch.func.jvp(loss, (x,), (tangent,))
        torch.testing.assert_close(along, (expected * tangent).sum())
        each = torch.func.vmap(torch.func.grad(loss))(torch.stack([x, 2 * x]))
        torch.testing.assert_close(each[0], expected)

    def test_vmap(self, target: Target):
        x, ratio = normal((4, 3, 20)).to(target.device), torch.tensor([0.2, 0.5, 0.9, 1.0], dtype=f64)

        def function(x, ratio=0.6, **options):
            return dynamic_threshold(x, ratio=ratio, maximum=LARGE, **options)

        with target():
            whole = torch.func.vmap(function)(x)
            inside = torch.func.vmap(function, in_dims=1)(x)
            unbatched = torch.func.vmap(lambda t: function(t, batch_dims=0))(x)
            mapped = torch.func.vmap(function)(x, ratio.to(target.device))
            shared = torch.func.vmap(function, in_dims=(None, 0))(x[0], ratio.to(target.device))
            for i in range(4):
                assert torch.equal(whole[i], function(x[i]))
                assert torch.equal(unbatched[i], function(x[i], batch_dims=0))
                assert torch.equal(mapped[i], function(x[i], float(ratio[i])))
                assert torch.equal(shared[i], function(x[0], float(ratio[i])))
            assert torch.equal(inside[1], function(x[:, 1]))


@pytest.mark.opcheck
def test_opcheck():
    native_only()
    two, each = torch.tensor([0.6, 9.0], dtype=f64), torch.tensor([[0.6, 9.0], [1.0, 2.0]], dtype=f64)
    for x, coef, batch_dims in (
        (normal((2, 3, 5)).requires_grad_(), each.clone().requires_grad_(), 1),
        (normal((2, 4, 6, 5), bf16).contiguous(memory_format=torch.channels_last), two, 1),
        (normal((4, 6), f64)[:, ::2], two, 0),
        (torch.empty(0, 3), two, 1),
    ):
        for name, scalars in (("threshold_scale", coef), ("threshold_apply", coef.detach()[..., 1:])):
            operator = getattr(torch.ops.marquardt, name).default
            scalars = scalars.requires_grad_() if x.requires_grad else scalars
            result = torch.library.opcheck(operator, (x, scalars, batch_dims), raise_exception=True)
            assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.compile
class TestCompile:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        native_only()
        torch._dynamo.reset()

    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_fullgraph(self, target: Target, dynamic: bool):
        if dynamic and target.backend == "reference":
            pytest.skip("plain PyTorch, seconds of tracing")

        def step(x, ratio):
            return dynamic_threshold(x, ratio=ratio, maximum=LARGE)

        with target():
            compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
            for shape in ((2, 3, 20), (4, 3, 30)) if dynamic else ((2, 3, 20),):
                ratio = torch.tensor(0.7, dtype=f64, requires_grad=True)
                x = normal(shape).to(target.device).requires_grad_()
                results = [
                    (out := f(x, ratio), *torch.autograd.grad(out.square().sum(), (x, ratio)))
                    for f in (step, compiled)
                ]
                for eager, traced in zip(*results, strict=True):
                    torch.testing.assert_close(traced, eager, rtol=2e-6, atol=2e-6)

    def test_numbers_are_one_graph(self, target: Target):
        counter = CompileCounter()
        x = normal((2, 60)).to(target.device)

        def step(x, ratio, maximum):
            return dynamic_threshold(x, ratio=ratio, maximum=maximum)

        with target():
            compiled = torch.compile(step, fullgraph=True, backend=counter)
            for i in range(10):
                given = (torch.tensor(0.1 * i, dtype=f64), torch.tensor(2.0 + i, dtype=f64))
                assert torch.equal(compiled(x, *given), step(x, *given))
        assert counter.frame_count == 1

    def test_out_and_layouts(self, target: Target):
        def step(x, out):
            dynamic_threshold(x, maximum=9.0, out=out)
            return out * 2, dynamic_threshold(x, maximum=3.0)

        x = normal((2, 4, 5, 6)).to(target.device).contiguous(memory_format=torch.channels_last)
        out = torch.empty(x.shape, device=target.device)  # Dynamo takes a contiguous `out` alone
        with target():
            doubled, plain = torch.compile(step, fullgraph=True, backend="aot_eager")(x, out)
            assert torch.equal(out, dynamic_threshold(x, maximum=9.0)) and torch.equal(doubled, out * 2)
            expected = dynamic_threshold(x, maximum=3.0)
        assert torch.equal(plain, expected) and plain.stride() == expected.stride()


@pytest.mark.errors
class TestErrors:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            ({"x0": 3.0}, TypeError, ("x0", "float")),
            ({"x0": torch.ones(2, 3, dtype=torch.int64)}, TypeError, ("x0", "int64")),
            ({"x0": torch.ones(2, 3).to_sparse()}, TypeError, ("x0", "sparse")),
            ({"x0": torch.tensor(1.0)}, ValueError, ("x0", "batch")),
            ({"batch_dims": 2}, ValueError, ("batch_dims", "0 or 1", "2")),
            ({"ratio": 1.5}, ValueError, ("ratio", "between 0 and 1", "1.5")),
            ({"ratio": -0.1}, ValueError, ("ratio", "between 0 and 1", "-0.1")),
            ({"ratio": math.nan}, ValueError, ("ratio", "nan")),
            ({"ratio": torch.tensor(2.0)}, ValueError, ("ratio", "2")),
            ({"ratio": "much"}, TypeError, ("ratio", "str")),
            ({"ratio": torch.ones(3)}, ValueError, ("ratio", "[2]", "[3]")),
            ({"ratio": torch.ones(2), "batch_dims": 0}, ValueError, ("ratio", "[2]")),
            ({"maximum": 0.5}, ValueError, ("maximum", ">= 1", "0.5")),
            ({"maximum": math.nan}, ValueError, ("maximum", "nan")),
            ({"maximum": None}, TypeError, ("maximum", "NoneType")),
            ({"out": torch.ones(2, 4)}, ValueError, ("out", "[2, 3]", "[2, 4]")),
            ({"out": torch.ones(2, 3, dtype=f64)}, TypeError, ("out", "float32", "float64")),
            ({"out": torch.ones(1, 3).expand(2, 3)}, ValueError, ("out", "repeated")),
            ({"out": [1.0]}, TypeError, ("out", "list")),
        ],
    )  # fmt: skip
    def test_refusals(self, target: Target, change, error, words):
        moved = {k: v.to(target.device) if isinstance(v, torch.Tensor) else v for k, v in change.items()}
        options = {"x0": torch.ones(2, 3, device=target.device), "ratio": 0.5, "maximum": 2.0, **moved}
        with target(), pytest.raises(error) as raised:
            dynamic_threshold(options.pop("x0"), **options)
        for word in ("dynamic_threshold", *words):
            assert word in str(raised.value), str(raised.value)

    def test_overlap(self, target: Target):
        buffer = torch.ones(12, device=target.device)
        with target(), pytest.raises(ValueError, match="dynamic_threshold: out must .* overlap"):
            dynamic_threshold(buffer[:10].view(2, 5), out=buffer[1:11].view(2, 5))

    def test_out_with_grad(self, target: Target):
        x = torch.full((2, 3), 5.0, device=target.device)
        for given in ({"x0": x.clone().requires_grad_()}, {"maximum": torch.tensor(2.0, requires_grad=True)}):
            out = torch.full_like(x, 7.0)
            options = {"x0": x, **given, "out": out}
            with target(), pytest.raises(RuntimeError, match="dynamic_threshold: out= .* requires grad"):
                dynamic_threshold(options.pop("x0"), **options)
            assert bool((out == 7).all())

    def test_numbers_that_only_the_kernel_knows(self, target: Target):
        """Bad ones make their sample NaN."""
        if target.device == "cpu" and target.backend != "reference":
            pytest.skip("the host reads the numbers")
        coef = torch.tensor([[0.5, 2.0], [1.5, 2.0], [0.5, 0.5], [math.nan, 2.0]], dtype=f64)
        x = torch.full((4, 3), 5.0, device=target.device)
        function = SCALE if target.device == "cuda" else SCALE.reference
        found = function(x, coef.to(target.device), 1)
        assert found.isnan().flatten().tolist() == [False, True, True, True]

    def test_explain(self, target: Target):
        found = mq.explain(dynamic_threshold, torch.ones(2, 3, device=target.device))
        assert found.op == "dynamic_threshold" and found.backend == target.backend
