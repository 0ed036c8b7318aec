"""H v, H⁻¹g and H^(−1/2) z of the damped low-rank Hessian: every kind of test, and the accuracy floors."""

from __future__ import annotations

import functools
import os

import numpy as np
import pytest
import torch

import cases_lowrank as cases
import oracle_lowrank as oracle
from harness import Case, Target, assert_within, check
from harness.compare import norm_bound, norm_error, rows, wide
from harness.determinism import Determinism
from harness.dtypes import Dtypes
from harness.gradients import Gradients
from harness.targets import kind
from harness.tracing import Compile, Opcheck
from harness.transforms import Transforms
from harness.values import SHAPE, Values, differentiable, directions, gradients, tangent_of, upstream
from lowrank_ops import INV_SQRT, MATVEC, NAMES, SOLVE, apply, op_of, per_sample, rounding_of

f32, f64 = torch.float32, torch.float64
FLOOR, GRADIENT = 2e-7, 3e-7
VARIANTS = pytest.mark.parametrize("variant", [MATVEC, SOLVE, INV_SQRT], ids=NAMES)


def floor(found, expected, allowed_of, what: str) -> None:
    """‖found − expected‖ ≤ bound·`allowed_of` per sample, [B]; rounding to subnormal numbers comes on top."""
    gap = oracle.norm(rows(found) - rows(expected))
    info, size = torch.finfo(found.dtype), rows(found).shape[1]
    below = size**0.5 * info.smallest_normal * info.eps
    bad = ~(gap <= allowed_of + below)
    assert not bad.any(), f"{what}: {np.max(gap / np.maximum(allowed_of, 1e-300)):.3g} times what is allowed"


@kind("accuracy")
class Family(Values, Gradients, Transforms, Opcheck, Dtypes, Determinism):
    """Derivatives are judged norm-wise, those of U over all its rows: they are sums of results of other calls, each
    of which rounds once, and no formula in one precision is there to compare with."""

    test_large = None  # `TestFloors`
    test_equal_bits_in_a_new_tensor = None
    large = ((2, 4, 9, 31), 30.0)  # large elements do as well as many

    @pytest.fixture(autouse=True)
    def _quick(self, request):
        """The definition is slow, being the D×D formula: in the quick set it meets one case of each test."""
        given = getattr(getattr(request.node, "callspec", None), "params", {})
        case = given.get("case") or given.get("smooth") or given.get("numeric")
        full = request.config.getoption("--full") or os.environ.get("FULL") == "1"
        reference = given.get("target") is not None and given["target"].backend == "reference"
        if reference and not full and case not in (None, self.op.main):
            pytest.skip("slow: run with --full")

    @pytest.mark.parametrize("leaning", [False, True], ids=["random", "leaning"])
    def test_gradient(self, target: Target, smooth: Case, pair, leaning: bool):
        op, case = self.op, smooth
        tensors = op.inputs(case, SHAPE, pair, target.device, seed=1)
        leaves, numbers = differentiable(tensors, case.scalars)
        out = op.run(target, case, leaves, numbers)
        grad = upstream(out, out if leaning else None)
        found, scalars = gradients(out, leaves, numbers, grad)
        d_tensors, d_scalars, sizes = op.expected_vjp(case, tensors, grad)
        # a gradient that leans on the result may mostly cancel
        stated = GRADIENT * (4 if leaning else 1)
        size = oracle.norm(rows(d_tensors[0]))
        floor(found[0], d_tensors[0], norm_bound(pair[0], stated) * size, op.argument(0))
        if len(tensors) > 1:
            U, expected = torch.stack(found[1:], 1), np.stack(d_tensors[1:], 1)
            assert U.dtype == pair[1]
            floor(U, expected, norm_bound(pair[1], stated) * oracle.norm(rows(expected)), "U")
        for name, size in sizes.items():
            allowed = norm_bound(f64 if pair[0] == f64 else f32, stated) * size.sum()
            assert_within(scalars[name], d_scalars[name].sum(), allowed, f"gradient of {name}")

    def test_tangent(self, target: Target, smooth: Case, pair):
        """Forward mode; what moves with v and what moves with H are one call each, and each is judged by its size."""
        op, case = self.op, smooth
        tensors = op.inputs(case, SHAPE, pair, target.device, seed=2)
        tensors_t, scalars_t = directions(case, tensors)
        tangent = tangent_of(lambda *a: op.run(target, *a), case, tensors, tensors_t, scalars_t)
        expected = op.expected_jvp(case, tensors, tensors_t, scalars_t)
        still = [torch.zeros_like(tensors_t[0]), *tensors_t[1:]]
        of_H = op.expected_jvp(case, tensors, still, scalars_t)
        size = oracle.norm(rows(of_H)) + oracle.norm(rows(expected - of_H))
        floor(tangent, expected, norm_bound(pair[0], GRADIENT) * size, "tangent")


class TestMatvec(Family):
    op = op_of(MATVEC)


class TestSolve(Family):
    op = op_of(SOLVE)


class TestSolveKeepNorm(Family):
    op = op_of(SOLVE, keep_norm=True)


class TestInvSqrt(Family):
    op = op_of(INV_SQRT)


@kind("compile")
class Traced(Compile):
    """One op meets every kind of trace in the quick set; the others pass through the same code."""

    test_out = None
    test_fullgraph = None

    def test_one_graph(self, target: Target):
        for case in (self.op.main, self.op.cases[-1]):
            torch._dynamo.reset()
            self._same(case, target)


class TestSolveTraced(Traced):
    op = op_of(SOLVE)


@pytest.mark.full
class TestMatvecTraced(Traced):
    op = op_of(MATVEC)


@pytest.mark.full
class TestInvSqrtTraced(Traced):
    op = op_of(INV_SQRT)


@pytest.fixture
def quick_set(request):
    """In the quick set the definition does not walk through the whole range."""
    full = request.config.getoption("--full") or os.environ.get("FULL") == "1"
    if request.node.callspec.params["target"].backend == "reference" and not full:
        pytest.skip("slow: run with --full")


@functools.cache
def hard_problem(hard: cases.Hard, variant: int):
    v, U, damping = hard.make()
    return v, U, damping, oracle.apply(variant, *per_sample(v, U, None, damping))


def _hard() -> list:
    quick = cases.hard(False) + [cases.Hard("long", 65536, 4, 1e-6, 1e6, "span")]
    return quick + [pytest.param(h, marks=pytest.mark.full) for h in cases.hard(True)]


@pytest.mark.accuracy
@pytest.mark.usefixtures("quick_set")
class TestFloors:
    """The stated range in float32: norm-wise 2e-7 against the exact result for the given data."""

    @VARIANTS
    @pytest.mark.parametrize("hard", _hard(), ids=str)
    def test_forward(self, target: Target, hard: cases.Hard, variant: int):
        v, U, damping, expected = hard_problem(hard, variant)
        out = apply(target, variant, v.to(target.device), U.to(target.device), damping=damping)
        error = norm_error(out, expected).max()
        assert error <= FLOOR, f"{float(error):.3g}"

    @pytest.mark.parametrize("hard", cases.hard(False)[::4], ids=str)
    def test_keep_norm(self, target: Target, hard: cases.Hard):
        v, U, damping, exact = hard_problem(hard, SOLVE)
        given = v.to(target.device), U.to(target.device)
        out = apply(target, SOLVE, *given, damping=damping, keep_norm=True)
        expected = exact * (oracle.norm(wide(v)) / oracle.norm(exact))[:, None]
        assert norm_error(out, expected).max() <= FLOOR

    @VARIANTS
    @pytest.mark.parametrize("hard", [h for h in cases.hard(False) if h.ratio >= 1e-2][::2], ids=str)
    def test_gradients(self, target: Target, hard: cases.Hard, variant: int):
        """3e-7 where H is well conditioned: λ/‖U‖² ≥ 1e-2; s and damping by the products that they are sums of."""
        v, U, damping = hard.make()
        s = torch.linspace(0.5, 1.0, hard.rank, dtype=f64)
        lam = torch.tensor(damping, dtype=f64)
        leaves = [t.to(target.device).requires_grad_() for t in (v, U)] + [
            t.clone().requires_grad_() for t in (s.to(target.device), lam)
        ]
        out = apply(target, variant, *leaves[:3], damping=leaves[3])
        grad = upstream(out)
        found = torch.autograd.grad(out, leaves, grad)
        d_v, d_U, d_s, d_lam, size_s, size = oracle.apply_vjp(
            variant, *per_sample(v, U, s, damping), rows(grad)
        )
        floor(found[0], d_v, GRADIENT * oracle.norm(d_v), "v")
        floor(found[1], d_U, GRADIENT * oracle.norm(rows(d_U)), "U")
        assert_within(found[2], d_s.sum(0), GRADIENT * size_s.sum(0), "s")
        assert_within(found[3], d_lam.sum(), GRADIENT * size.sum(), "damping")


@pytest.mark.accuracy
@pytest.mark.usefixtures("quick_set")
class TestOdd:
    """Duplicates, zeros, repeated eigenvalues, barely definite matrices, k = 0 and 16, ragged sizes."""

    @VARIANTS
    @pytest.mark.parametrize("odd", cases.ODD, ids=str)
    @pytest.mark.parametrize("shape", [(3, 4, 9, 7), (2, 2049), (2, 7), (2, 1)], ids=str)
    def test_value(self, target: Target, odd: cases.Odd, variant: int, shape):
        pairs = [(f32, f32), (f64, f64)]
        if min(odd.s, default=0) >= 0:  # rounded to bfloat16 a barely definite matrix is no longer definite
            pairs.append((f32, torch.bfloat16))
        for pair in pairs:
            v, U, s = odd.make(shape, dtype=f64)
            v, U = v.to(pair[0]).to(target.device), U.to(pair[1]).to(target.device)
            given = s.to(target.device)
            out = apply(target, variant, v, U, given, damping=odd.damping)
            arrays = per_sample(v, U, s, odd.damping)
            expected = oracle.apply(variant, *arrays)
            assert out.dtype == v.dtype and out.shape == v.shape
            size = oracle.norm(expected)
            if pair[0] == f64:
                floor(out, expected, float64_bound(variant, *arrays) * size, "float64")
                continue
            floor(out, expected, FLOOR * size, str(pair[1]))
            own = apply(Target("cpu", "reference"), variant, v.cpu(), U.cpu(), s, damping=odd.damping)
            slack = rounding_of(variant, *arrays, f32)
            check(out, expected.reshape(v.shape), own, None, slack=slack)

    @VARIANTS
    @pytest.mark.parametrize("odd", cases.ODD, ids=str)
    def test_gradients_in_float64(self, target: Target, odd: cases.Odd, variant: int):
        """Also where eigenvalues repeat, U has dependent rows or s_j = 0: no division by a difference."""
        v, U, s = odd.make((2, 40), dtype=f64)
        leaves = [t.to(target.device).requires_grad_() for t in (v, U, s)]
        lam = torch.tensor(odd.damping, dtype=f64, requires_grad=True)
        out = apply(target, variant, *leaves, damping=lam)
        grad = upstream(out)
        found = torch.autograd.grad(out, (*leaves, lam), grad)
        arrays = per_sample(v, U, s, odd.damping)
        d_v, d_U, d_s, d_lam, size_s, size = oracle.apply_vjp(variant, *arrays, rows(grad))
        bound = float64_bound(variant, *arrays)
        floor(found[0], d_v, bound * oracle.norm(d_v), "v")
        # Ū_j = −s_j(⟨u_j,y⟩w + ⟨u_j,w⟩y): judged by the size of its products
        largest = np.sqrt((size_s * np.abs(arrays[2])).sum(1) * np.abs(arrays[2]).max(1, initial=0) * size)
        floor(found[1], d_U, bound * (oracle.norm(rows(d_U)) + largest), "U")
        assert_within(found[2], d_s.sum(0), (bound[:, None] * size_s).sum(0), "s")
        assert_within(found[3], d_lam.sum(), (bound * size).sum(), "damping")


def float64_bound(variant: int, v, U, s, damping) -> np.ndarray:
    """8(k+2) roundings of float64 on Σ|s|‖u‖² + λ, relative to the smallest eigenvalue, [B].

    A Gram matrix is exact to a few roundings of its own size; H⁻¹ divides that by λ_min, and so does the
    cancellation of g − Σ c_j u_j for g in the span.
    """
    own = [oracle.reduce(u, sj, lam) for u, sj, lam in zip(U, s, damping, strict=True)]
    smallest = np.array([np.abs(np.append(o.t, lam)).min() for o, lam in zip(own, damping, strict=True)])
    norms = [oracle.norm(oracle.wide(x)) for x in U]
    size = np.array([lam + (np.abs(sj) * n**2).sum() for lam, sj, n in zip(damping, s, norms, strict=True)])
    if variant == MATVEC:  # H v itself may cancel
        smallest = np.minimum(smallest, oracle.norm(oracle.apply(MATVEC, v, U, s, damping)) / oracle.norm(v))
    return 8 * (U.shape[1] + 2) * np.finfo(np.float64).eps * size / smallest
