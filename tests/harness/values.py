"""Accuracy: values, gradients and tangents against the float64 oracle, and what special inputs must give."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.autograd.forward_ad as forward_ad

from .compare import assert_within, check, norm_bound, norm_error, relative_error, rows, same_bits, wide
from .declare import Case, Op
from .targets import Target, kind

SHAPE = (3, 4, 9, 7)  # D = 252: no multiple of a vector register
f32, f64 = torch.float32, torch.float64


def upstream(like: torch.Tensor, value: torch.Tensor | None = None, seed: int = 5) -> torch.Tensor:
    """A gradient from outside; with `value`, one that leans towards the result, as gradients of losses do."""
    g = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=f64)
    if value is not None:
        g = g + 2 * value.detach().cpu().to(f64)
    return g.to(like.dtype).to(like.device)


def differentiable(tensors, scalars):
    """Leaves that require grad: the tensors, and 0-dim float64 scalars."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    numbers = {k: torch.tensor(float(v), dtype=f64, requires_grad=True) for k, v in scalars.items()}
    return leaves, numbers


def gradients(out, leaves, numbers, grad):
    """(gradients of the tensors, {scalar: gradient}); what the result does not depend on is None."""
    wanted = [t for t in leaves if t is not None] + list(numbers.values())
    found = iter(torch.autograd.grad(out, wanted, grad, allow_unused=True))
    return [None if t is None else next(found) for t in leaves], {k: next(found) for k in numbers}


def tangent_of(run, case: Case, tensors, tensors_t, scalars_t):
    """Forward mode along one direction in all arguments."""
    with forward_ad.dual_level():
        duals = [
            None if t is None else forward_ad.make_dual(t, d) for t, d in zip(tensors, tensors_t, strict=True)
        ]
        numbers = {
            k: forward_ad.make_dual(torch.tensor(float(v), dtype=f64), torch.tensor(scalars_t[k], dtype=f64))
            for k, v in case.scalars.items()
        }
        return forward_ad.unpack_dual(run(case, duals, numbers)).tangent


def directions(case: Case, tensors):
    tensors_t = [None if t is None else upstream(t, seed=10 + j) for j, t in enumerate(tensors)]
    return tensors_t, {k: 0.5 + i for i, k in enumerate(case.scalars)}


def reference_gradients(op: Op, case: Case, tensors, grad, leaning: bool = False):
    """Gradients of our reference formula through autograd, in the same dtype, on the CPU."""
    leaves, numbers = differentiable([None if t is None else t.cpu() for t in tensors], case.scalars)
    out = op.define(case, leaves, numbers)
    grad = upstream(out, out if leaning else None) if grad is None else grad.cpu()
    return (*gradients(out, leaves, numbers, grad), grad)


@functools.cache
def usual_error(op: Op, case: Case, shape, pair, what: str) -> tuple[float, ...]:
    """Largest error of the reference formula over a few draws, relative to the largest element of its sample."""
    draws = []
    for seed in range(100, 104):
        tensors = op.inputs(case, shape, pair, seed=seed)
        if what == "value":
            results = [(op.define(case, tensors), op.expected(case, tensors))]
        elif what == "tangent":
            along = directions(case, tensors)
            results = [(tangent_of(op.define, case, tensors, *along), op.expected_jvp(case, tensors, *along))]
        else:
            found, _, grad = reference_gradients(op, case, tensors, None, what == "leaning")
            expected, _, _ = op.expected_vjp(case, tensors, grad)
            results = [(f, e) for f, e in zip(found, expected, strict=True) if f is not None]
        draws.append([relative_error(own, expected) for own, expected in results])
    return tuple(max(column) for column in zip(*draws, strict=True))


@kind("accuracy")
class Values:
    op: Op

    def _right(self, case: Case, tensors, out, scalars=None):
        op = self.op
        expected, own = op.expected(case, tensors, scalars), op.define(case, tensors, scalars)
        usual = max(usual_error(op, case, SHAPE, pair_of(tensors), "value"))
        check(out, expected, own, op.bound(case), slack=op.extra(case, tensors, scalars), usual=usual)

    def test_value(self, target: Target, case: Case, pair):
        tensors = self.op.inputs(case, SHAPE, pair, target.device)
        out = self.op.run(target, case, tensors)
        assert out.dtype == pair[0]
        self._right(case, tensors, out)

    def test_large(self, target: Target, sweep):
        size, case = sweep
        tensors = self.op.inputs(case, (1, size), (f32, f32), target.device, seed=size)
        leaves, numbers = differentiable(tensors, {})
        out = self.op.run(target, case, leaves, {**case.scalars, **numbers})
        self._right(case, tensors, out)
        grad = upstream(out, seed=size + 1)
        found, _ = gradients(out, leaves, numbers, grad)
        d_tensors, _, _ = self.op.expected_vjp(case, tensors, grad)
        for j, (d, e) in enumerate(zip(found, d_tensors, strict=True)):
            error = norm_error(d, e).max()
            assert error <= self.op.gradient_bound, f"gradient of {self.op.argument(j)}: {float(error):.3g}"

    @pytest.mark.parametrize("leaning", [False, True], ids=["random", "leaning"])
    def test_gradient(self, target: Target, smooth: Case, pair, leaning: bool):
        op, case = self.op, smooth
        tensors = op.inputs(case, SHAPE, pair, target.device, seed=1)
        leaves, numbers = differentiable(tensors, case.scalars)
        out = op.run(target, case, leaves, numbers)
        grad = upstream(out, out if leaning else None)
        found, scalars = gradients(out, leaves, numbers, grad)
        own_found, own_scalars, _ = reference_gradients(op, case, tensors, grad)
        usual = usual_error(op, case, SHAPE, pair, "leaning" if leaning else "gradient")
        d_tensors, d_scalars, sizes = op.expected_vjp(case, tensors, grad)
        # a gradient that leans on the result mostly cancels: its bound counts against what went in
        stated = op.bound(case, derivative=True)
        if leaning and stated is not None:
            stated *= 4
        for j, t in enumerate(tensors):
            if t is not None:
                assert found[j].dtype == t.dtype
                check(
                    found[j],
                    d_tensors[j],
                    own_found[j],
                    stated,
                    usual=usual[j],
                    what=f"gradient of {op.argument(j)}",
                )
        for name, size in sizes.items():
            exact = pair[0] == f64 and "seed" not in case.keywords  # normals are float32
            allowed = norm_bound(f64 if exact else f32, op.gradient_bound) * size.sum()
            own_error = abs(wide(own_scalars[name]) - d_scalars[name].sum())
            assert_within(
                scalars[name], d_scalars[name].sum(), allowed + 2 * own_error, f"gradient of {name}"
            )

    def test_tangent(self, target: Target, smooth: Case, pair):
        """Forward mode: the derivative along a direction in all arguments at once."""
        op, case = self.op, smooth
        if op.jvp is None:
            pytest.skip("no tangent is declared")
        tensors = op.inputs(case, SHAPE, pair, target.device, seed=2)
        tensors_t, scalars_t = directions(case, tensors)
        tangent = tangent_of(lambda *a: op.run(target, *a), case, tensors, tensors_t, scalars_t)
        expected = op.expected_jvp(case, tensors, tensors_t, scalars_t)
        on_host = [[None if t is None else t.cpu() for t in ts] for ts in (tensors, tensors_t)]
        own = tangent_of(op.define, case, *on_host, scalars_t)
        (usual,) = usual_error(op, case, SHAPE, pair, "tangent")
        slack = op.extra(case, tensors, scalars_t)
        check(
            tangent, expected, own, op.bound(case, derivative=True), what="tangent", slack=slack, usual=usual
        )

    def test_scalars_of_every_kind(self, target: Target, case: Case):
        """Python numbers, 0-dim tensors and [B] tensors are the same call."""
        tensors = self.op.inputs(case, SHAPE, device=target.device)
        plain = self.op.run(target, case, tensors)
        for make in (
            lambda v: torch.tensor(v, dtype=f64),
            lambda v: torch.full((SHAPE[0],), v, dtype=f64, device=target.device),
            lambda v: torch.full((SHAPE[0],), v, dtype=f64, device=target.device)[:1].expand(SHAPE[0]),
        ):
            made = self.op.run(target, case, tensors, {k: make(float(v)) for k, v in case.scalars.items()})
            assert same_bits(made, plain)

    def test_per_sample_scalars(self, target: Target, smooth: Case):
        op, case = self.op, smooth
        tensors = op.inputs(case, SHAPE, device=target.device)
        factor = torch.linspace(0.5, 1.5, SHAPE[0], dtype=f64, device=target.device)
        leaves, _ = differentiable(tensors, {})
        numbers = {k: (v * factor).requires_grad_() for k, v in case.scalars.items()}
        out = op.run(target, case, leaves, numbers)
        self._right(case, tensors, out, _cpu(numbers))
        grad = upstream(out)
        _, found = gradients(out, leaves, numbers, grad)
        _, expected, sizes = op.expected_vjp(case, tensors, grad, numbers)
        for name, size in sizes.items():
            assert found[name].shape == (SHAPE[0],) and found[name].dtype == f64
            assert_within(found[name], expected[name], 2 * op.gradient_bound * size, f"gradient of {name}")

    def test_equal_bits_in_a_new_tensor(self, target: Target, identity: Case, pair):
        tensors = self.op.inputs(identity, SHAPE, pair, target.device)
        out = self.op.run(target, identity, tensors)
        assert same_bits(out, tensors[0])
        assert out.untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr()

    @pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=["nan", "inf", "-inf"])
    def test_a_bad_sample_stays_alone(self, target: Target, case: Case, poison: float):
        """A NaN or Inf in one sample changes no bit of the others, forward and backward."""
        op = self.op
        clean = op.inputs(case, SHAPE, device=target.device)
        for j, t in enumerate(clean):
            if t is None:
                continue
            spoiled = [None if c is None else c.clone() for c in clean]
            spoiled[j][1].view(-1)[100] = poison
            results = []
            for tensors in (clean, spoiled):
                leaves, numbers = differentiable(tensors, {})
                out = op.run(target, case, leaves, {**case.scalars, **numbers})
                found, _ = gradients(out, leaves, numbers, upstream(out))
                results.append([out, *(d for d in found if d is not None)])
            for good, bad in zip(*results, strict=True):
                for b in (0, 2):
                    assert same_bits(good[b], bad[b]), op.argument(j)
            if math.isnan(poison) and j == 0:
                assert results[1][0][1].isnan().any(), "a NaN in the first tensor must show in its sample"

    def test_denormals(self, target: Target, case: Case, pair):
        """Subnormal elements among normal ones are neither flushed nor do they disturb."""
        if target.device == "cuda":
            pytest.skip("GPU kernels may flush subnormal numbers")
        tensors = self.op.inputs(case, SHAPE, pair, target.device)
        for t in tensors:
            if t is not None:
                t.view(-1)[::5] = torch.finfo(t.dtype).smallest_normal / 8
        out = self.op.run(target, case, tensors)
        self._right(case, tensors, out)

    def test_zero_input(self, target: Target, case: Case, pair):
        """All tensors zero: a finite result and finite gradients."""
        tensors = [
            None if t is None else torch.zeros_like(t)
            for t in self.op.inputs(case, SHAPE, pair, target.device)
        ]
        leaves, numbers = differentiable(tensors, {})
        out = self.op.run(target, case, leaves, {**case.scalars, **numbers})
        self._right(case, tensors, out)
        found, _ = gradients(out, leaves, numbers, upstream(out))
        for d in found:
            assert d is None or bool(d.isfinite().all())

    # Shape and factor of the first tensor at which its squared norm is far beyond 65504.
    large: tuple[tuple[int, ...], float] = ((2, 4, 141, 130), 1.0)

    def test_no_overflow_inside(self, target: Target, case: Case):
        """float16 samples whose squared norm is far beyond 65504."""
        if "seed" in case.keywords:
            pytest.skip("noise has nothing to overflow, and takes long to judge")
        shape, factor = self.large
        for pair in ((torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (f32, torch.float16)):
            made = self.op.inputs(case, shape, (f64, f64), target.device)
            made = [factor * t if j == 0 else t for j, t in enumerate(made)]
            tensors = [None if t is None else t.to(pair[min(j, 1)]) for j, t in enumerate(made)]
            out = self.op.run(target, case, tensors)
            assert float((rows(tensors[0]) ** 2).sum(-1).min()) > 65504
            self._right(case, tensors, out)


def pair_of(tensors):
    """The (state, model) dtypes of some tensors."""
    given = [t.dtype for t in tensors if t is not None]
    return given[0], given[-1]


def _cpu(numbers):
    return {k: v.detach().cpu() for k, v in numbers.items()}
