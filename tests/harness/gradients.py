"""gradcheck: first and second derivatives in float64 against finite differences, in both modes."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from .declare import Case, Op
from .targets import INTERPRETED, Target, kind

f64 = torch.float64
SHAPE = (2, 3, 2)


@kind("gradcheck")
class Gradients:
    op: Op

    def _leaves(self, case: Case, target: Target, per_sample: bool, shape=SHAPE):
        """(function of the leaves, leaves): tensors and scalars, all differentiable."""
        op = self.op
        tensors = op.inputs(case, shape, (f64, f64), target.device, seed=3)
        given = [t.requires_grad_() for t in tensors if t is not None]

        def scalar(value: float) -> torch.Tensor:
            if per_sample:
                spread = torch.linspace(0.8, 1.2, shape[0], dtype=f64, device=target.device)
                return (value * spread).requires_grad_()
            return torch.tensor(value, dtype=f64, requires_grad=True)

        names = list(case.scalars)
        numbers = [scalar(float(case.scalars[k])) for k in names]

        def function(*leaves):
            rest = iter(leaves)
            filled = [None if t is None else next(rest) for t in tensors]
            return op.run(target, case, filled, dict(zip(names, rest, strict=True)))

        return function, (*given, *numbers)

    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    def test_gradcheck(self, target: Target, numeric: Case, per_sample: bool):
        function, leaves = self._leaves(numeric, target, per_sample)
        assert gradcheck(function, leaves, check_forward_ad=True)

    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    def test_gradgradcheck(self, target: Target, numeric: Case, per_sample: bool):
        function, leaves = self._leaves(numeric, target, per_sample, (2, 2, 2))
        assert gradgradcheck(function, leaves)

    def test_each_argument_alone(self, target: Target, numeric: Case):
        """Only one argument requires grad: the others are constants, and its gradient is the same."""
        function, leaves = self._leaves(numeric, target, False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            weight = torch.randn(SHAPE, dtype=f64).to(target.device)
        together = torch.autograd.grad((function(*leaves) * weight).sum(), leaves)
        for i, expected in enumerate(together):
            alone = [leaf.detach().clone().requires_grad_(i == j) for j, leaf in enumerate(leaves)]
            out = function(*alone)
            assert out.requires_grad
            (found,) = torch.autograd.grad((out * weight).sum(), [alone[i]])
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)

    def test_nothing_requires_grad(self, target: Target, case: Case):
        tensors = self.op.inputs(case, SHAPE, (f64, f64), target.device)
        assert not self.op.run(target, case, tensors).requires_grad
        leaves = [None if t is None else t.requires_grad_() for t in tensors]
        with torch.no_grad():
            assert not self.op.run(target, case, leaves).requires_grad
        with torch.inference_mode():
            assert self.op.run(target, case, leaves).is_inference()

    def test_batched_gradients(self, target: Target):
        """Many upstream gradients at once (`is_grads_batched`, `jacobian(vectorize=True)`), as torch's own ops do."""
        if INTERPRETED:
            pytest.skip("batched tensors of this kind have no storage to interpret")
        function, leaves = self._leaves(self.op.main, target, False)
        out = function(*leaves)
        grads = torch.stack(
            [torch.ones_like(out), torch.linspace(-1, 2, out.numel(), dtype=f64).view_as(out).to(out)]
        )
        found = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
        for s in range(2):
            for f, e in zip(
                found, torch.autograd.grad(out, leaves, grads[s], retain_graph=True), strict=True
            ):
                torch.testing.assert_close(f[s], e, rtol=1e-12, atol=1e-12)

    def test_backward_twice(self, target: Target, numeric: Case):
        """retain_graph gives the same gradient again, and a saved input changed in place is noticed."""
        function, leaves = self._leaves(numeric, target, False)
        out = function(*leaves)
        first = torch.autograd.grad(out.sum(), leaves, retain_graph=True)
        second = torch.autograd.grad(out.sum(), leaves)
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a, b)

    def test_accumulation(self, target: Target, numeric: Case):
        """.backward() adds to .grad, also through stride-0 gradients."""
        function, leaves = self._leaves(numeric, target, False)
        once = torch.autograd.grad(function(*leaves).sum(), leaves)
        function(*leaves).sum().backward()
        function(*leaves).sum().backward()
        for leaf, d in zip(leaves, once, strict=True):
            torch.testing.assert_close(leaf.grad, 2 * d, rtol=1e-12, atol=1e-12)
