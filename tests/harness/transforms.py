"""torch.func: grad, vjp, jvp, jacobians and vmap agree with plain autograd and with a loop."""

from __future__ import annotations

import pytest
import torch
from torch import func

from .declare import Case, Op
from .targets import Target, kind

f64 = torch.float64
SHAPE = (2, 3, 2)
STACK = 3


def _close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@kind("gradcheck")
class Transforms:
    op: Op

    def _function(self, case: Case, target: Target):
        """A function of the tensors and scalars of a case, and a point; all float64."""
        op = self.op
        tensors = op.inputs(case, SHAPE, (f64, f64), target.device, seed=4)
        given = tuple(t for t in tensors if t is not None)
        numbers = tuple(torch.tensor(float(v), dtype=f64) for v in case.scalars.values())

        def function(*arguments):
            rest = iter(arguments)
            filled = [None if t is None else next(rest) for t in tensors]
            return op.run(target, case, filled, dict(zip(case.scalars, rest, strict=True)))

        return function, (*given, *numbers)

    def _autograd(self, function, point, weight):
        leaves = [p.detach().clone().requires_grad_() for p in point]
        return torch.autograd.grad((function(*leaves) * weight).sum(), leaves)

    def test_grad_and_vjp(self, target: Target, numeric: Case):
        function, point = self._function(numeric, target)
        weight = torch.linspace(-1, 2, point[0].numel(), dtype=f64, device=target.device).reshape(SHAPE)
        expected = self._autograd(function, point, weight)
        everything = tuple(range(len(point)))
        for found in (
            func.grad(lambda *a: (function(*a) * weight).sum(), argnums=everything)(*point),
            func.vjp(function, *point)[1](weight),
        ):
            for f, e in zip(found, expected, strict=True):
                _close(f, e)

    def test_jvp(self, target: Target, numeric: Case):
        """⟨w, J·t⟩ = ⟨Jᵀ·w, t⟩ for random w and t."""
        function, point = self._function(numeric, target)
        generator = torch.Generator().manual_seed(6)
        tangents = tuple(torch.randn(p.shape, dtype=f64, generator=generator).to(p.device) for p in point)
        weight = torch.randn(SHAPE, dtype=f64, generator=generator).to(target.device)
        _, tangent = func.jvp(function, point, tangents)
        backward = self._autograd(function, point, weight)
        paired = sum((d * t).sum() for d, t in zip(backward, tangents, strict=True))
        _close((weight * tangent).sum(), paired)

    def test_jacobians(self, target: Target, numeric: Case):
        function, point = self._function(numeric, target)
        everything = tuple(range(len(point)))
        expected = torch.autograd.functional.jacobian(function, point)
        for jacobian in (func.jacrev, func.jacfwd):
            for f, e in zip(jacobian(function, argnums=everything)(*point), expected, strict=True):
                _close(f, e.to(f.device))

    def test_hessian(self, target: Target, numeric: Case):
        function, point = self._function(numeric, target)

        def loss(x):
            return (function(x, *point[1:]) ** 3).sum()

        _close(func.jacrev(func.jacrev(loss))(point[0]), torch.autograd.functional.hessian(loss, point[0]))

    @pytest.mark.parametrize("which", ["all", "first", "last-tensor", "scalars"])
    def test_vmap(self, target: Target, numeric: Case, which: str):
        """vmap over some arguments equals a loop."""
        function, point = self._function(numeric, target)
        count = sum(p.dim() > 0 for p in point)
        mapped = {
            "all": range(len(point)),
            "first": [0],
            "last-tensor": [count - 1],
            "scalars": range(count, len(point)),
        }[which]
        stacked, dims = list(point), [None] * len(point)
        for i in mapped:
            stacked[i] = torch.stack(
                [point[i] * (1 + 0.1 * s) for s in range(STACK)], dim=-1 if i == 0 else 0
            )
            dims[i] = point[0].dim() if i == 0 else 0  # the first tensor carries the new dimension last
        found = func.vmap(function, in_dims=tuple(dims))(*stacked)
        for s in range(STACK):
            single = [p * (1 + 0.1 * s) if dims[i] is not None else p for i, p in enumerate(point)]
            _close(found[s], function(*single))

    def test_vmap_of_grad(self, target: Target, numeric: Case):
        """Per-sample gradients, and a nested vmap."""
        function, point = self._function(numeric, target)
        stacked = torch.stack([point[0], 2 * point[0]])

        def gradient(x):
            return func.grad(lambda y: (function(y, *point[1:]) ** 2 * point[0]).sum())(x)

        found = func.vmap(gradient)(stacked)
        for s in range(2):
            _close(found[s], gradient(stacked[s]))
        nested = func.vmap(func.vmap(lambda x: function(x, *point[1:])))(stacked[None])
        _close(nested[0, 1], function(stacked[1], *point[1:]))
