"""log det H of the damped low-rank Hessian, and the gain-ratio rule for the damping."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

import cases_lowrank as cases
import marquardt as mq
import oracle_lowrank as oracle
from harness import Target, arena, assert_within, native_only, same_bits
from harness.compare import rows
from lowrank_ops import per_sample

f32, f64 = torch.float32, torch.float64


def logdet(target: Target, U, s=None, **options):
    with target():
        return mq.lowrank_logdet(U, s, **options)


def expected(U, s, damping):
    """[B], for U [B, k, *sample]."""
    return oracle.logdet(*per_sample(U[:, 0] if U.shape[1] else U.sum(1), U, s, damping)[1:])


@pytest.mark.accuracy
class TestValue:
    @pytest.mark.parametrize("hard", cases.hard(False), ids=str)
    def test_floor(self, target: Target, hard: cases.Hard):
        _, U, damping = hard.make()
        out = logdet(target, U.to(target.device), damping=damping)
        assert out.dtype == f64 and out.shape == (2,)
        exact = expected(U, None, damping)
        assert_within(out, exact, 1e-6 * np.abs(exact))

    @pytest.mark.parametrize("odd", cases.ODD, ids=str)
    @pytest.mark.parametrize("shape", [(3, 4, 9, 7), (2, 7), (2, 1)], ids=str)
    @pytest.mark.parametrize("dtype", [f32, f64], ids=str)
    def test_odd(self, target: Target, odd: cases.Odd, shape, dtype):
        v, U, s = odd.make(shape, dtype=dtype)
        if not len(odd.s):
            pytest.skip("k = 0 has its own test")
        out = logdet(target, U.to(target.device), s.to(target.device), damping=odd.damping)
        exact = expected(U, s, odd.damping)
        # a Gram matrix in float64, divided by the smallest eigenvalue
        arrays = per_sample(v, U, s, odd.damping)
        least = [
            np.abs(np.append(oracle.reduce(*a).t, odd.damping)).min() for a in zip(*arrays[1:], strict=True)
        ]
        size = odd.damping + (np.abs(arrays[2]) * oracle.norm(arrays[1]) ** 2).sum(1)
        k, D = U.shape[1], math.prod(shape[1:])
        rounding = 8 * (k + 2) * np.finfo(float).eps * k * size / np.array(least)
        rounding = rounding + 4 * np.finfo(float).eps * D * abs(math.log(odd.damping))
        assert_within(out, exact, rounding)

    def test_no_rows(self, target: Target):
        U = torch.zeros(3, 0, 4, 5, device=target.device)
        lam = torch.tensor([0.5, 1.0, 3.0], dtype=f64, device=target.device)
        out = logdet(target, U, damping=lam)
        torch.testing.assert_close(out, 20 * lam.log(), rtol=1e-14, atol=1e-14)
        assert logdet(target, U[:0], damping=1.0).shape == (0,)

    def test_shared_and_unbatched(self, target: Target):
        _, U = cases.problem("gaussian", 3)(torch.Generator().manual_seed(0), (2, 50), 1)
        U = U.float().to(target.device)
        s = torch.tensor([1.0, 0.5, 2.0], dtype=f64, device=target.device)
        whole = logdet(target, U, s, damping=0.4)
        for out in (
            logdet(target, U[1], s, damping=0.4, shared=True),
            logdet(target, U[1], s, damping=0.4, batch_dims=0),
            logdet(target, U[1], s, damping=torch.tensor(0.4, dtype=f64), shared=True),
        ):
            assert out.shape == () and out.dtype == f64
            torch.testing.assert_close(out, whole[1], rtol=1e-13, atol=1e-13)
        per = logdet(
            target, U, s.expand(2, 3), damping=torch.full((2,), 0.4, dtype=f64, device=target.device)
        )
        torch.testing.assert_close(per, whole, rtol=1e-13, atol=1e-13)

    @pytest.mark.parametrize("odd", [o for o in cases.ODD if o.s], ids=str)
    def test_gradient(self, target: Target, odd: cases.Odd):
        _, U, s = odd.make((2, 60))
        lam = torch.tensor(odd.damping, dtype=f64, requires_grad=True)
        leaves = [t.to(target.device).requires_grad_() for t in (U, s)]
        out = logdet(target, *leaves, damping=lam)
        grad = torch.tensor([1.0, -0.3], dtype=f64, device=target.device)
        found = torch.autograd.grad(out, (*leaves, lam), grad)
        assert [d.dtype for d in found] == [f32, f64, f64]
        arrays = per_sample(U[:, 0], U, s, odd.damping)[1:]
        d_U, d_s, d_lam, size = oracle.logdet_vjp(*arrays, grad.cpu().numpy())
        gap = oracle.norm(rows(found[0]) - rows(d_U))
        assert np.all(gap <= 3e-7 * oracle.norm(rows(d_U)) + 1e-43)
        assert_within(found[1], d_s.sum(0), 3e-7 * size.sum(0), "s")
        assert_within(found[2], d_lam.sum(), 3e-7 * np.abs(d_lam).sum(), "damping")


@pytest.mark.gradcheck
@pytest.mark.parametrize("kind", ["gaussian", "orthonormal", "duplicates"])
class TestDerivatives:
    def _leaves(self, kind: str, target: Target, size: int = 5):
        _, U = cases.problem(kind, 3)(torch.Generator().manual_seed(0), (2, size), 1)
        s = torch.tensor([0.8, 0.8, 0.0], dtype=f64)
        lam = torch.tensor([0.5, 0.7], dtype=f64)
        return tuple(t.to(target.device).requires_grad_() for t in (U, s, lam))

    def test_gradcheck(self, target: Target, kind: str):
        def function(U, s, lam):
            return logdet(target, U, s, damping=lam)

        assert gradcheck(function, self._leaves(kind, target), check_forward_ad=True)
        assert gradgradcheck(function, self._leaves(kind, target, 3))

    def test_shared(self, target: Target, kind: str):
        U, s, lam = self._leaves(kind, target, 4)
        leaves = tuple(t.detach().requires_grad_() for t in (U[0], s, lam[0].cpu()))
        assert gradcheck(lambda U, s, lam: logdet(target, U, s, damping=lam, shared=True), leaves)

    def test_transforms(self, target: Target, kind: str):
        U, s, lam = (t.detach() for t in self._leaves(kind, target))

        def function(U, s):
            return logdet(target, U, s, damping=lam).sum()

        expected = torch.autograd.functional.jacobian(function, (U, s))
        for found in (torch.func.grad(function, (0, 1))(U, s), torch.func.jacrev(function, (0, 1))(U, s)):
            for f, e in zip(found, expected, strict=True):
                torch.testing.assert_close(f, e, rtol=1e-11, atol=1e-12)
        stack = torch.stack([U, 2 * U])
        mapped = torch.func.vmap(function, (0, None))(stack, s)
        torch.testing.assert_close(mapped[1], function(2 * U, s), rtol=1e-11, atol=1e-12)


@pytest.mark.errors
class TestIndefinite:
    def test_check_and_info(self, target: Target):
        U = torch.zeros(3, 1, 6, device=target.device)
        U[:, 0, 2] = 1.0
        s = torch.tensor([[1.0], [-2.0], [0.5]], dtype=f64, device=target.device)
        out, info = logdet(target, U, s, damping=1.0, check=False, return_info=True)
        assert info.dtype == torch.int32 and (info > 0).tolist() == [False, True, False]
        assert out.isnan().tolist() == [False, True, False]
        if target.device == "cpu":
            with pytest.raises(ValueError) as raised:
                logdet(target, U, s, damping=1.0)
            for word in ("lowrank_logdet", "positive definite", "sample 1"):
                assert word in str(raised.value)

    def test_an_even_number_of_negative_eigenvalues(self, target: Target):
        """The determinant is positive there, and H is still not definite."""
        U = torch.eye(4, device=target.device)[None, :2]
        s = torch.tensor([-3.0, -3.0], dtype=f64, device=target.device)
        assert bool(logdet(target, U, s, damping=1.0, check=False).isnan().all())

    def test_nan_stays_alone(self, target: Target):
        _, U = cases.problem("gaussian", 2)(torch.Generator().manual_seed(0), (3, 20), 1)
        U = U.float().to(target.device)
        clean = logdet(target, U, damping=0.5)
        U[1, 1, 3] = math.nan
        out = logdet(target, U, damping=0.5)
        assert bool(out[1].isnan()) and same_bits(out[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (lambda U, s: ((3.0, s), {}), TypeError, ("U", "float")),
            (lambda U, s: ((U.long(), s), {}), TypeError, ("U", "int64")),
            (lambda U, s: ((U, s[:1]), {}), ValueError, ("s", "[1]")),
            (lambda U, s: ((U, s), {"damping": 0.0}), ValueError, ("damping",)),
            (lambda U, s: ((U, s), {"damping": math.nan}), ValueError, ("damping", "nan")),
            (lambda U, s: ((U, s), {"damping": torch.ones(5)}), ValueError, ("damping", "[5]")),
            (lambda U, s: ((U[:, :1].expand(2, 17, 9), None), {}), ValueError, ("U", "16", "17")),
        ],
    )  # fmt: skip
    def test_refusals(self, target: Target, change, error, words):
        given, options = change(
            torch.ones(2, 3, 9, device=target.device), torch.ones(3, device=target.device)
        )
        with pytest.raises(error) as raised:
            logdet(target, *given, **{"damping": 0.5, **options})
        for word in ("lowrank_logdet", *words):
            assert word in str(raised.value)


@pytest.mark.opcheck
def test_opcheck():
    native_only()
    generator = torch.Generator().manual_seed(0)

    def arguments(shape, coef, batch_dims=1, grad=False, dtype=f32):
        U = (torch.randn(shape, generator=generator, dtype=f64) / 3).to(dtype)
        c = torch.rand(coef, generator=generator, dtype=f64) + 0.5
        return [t.requires_grad_(grad) for t in (U, c)], batch_dims

    for given in (
        arguments((2, 3, 5), 4), arguments((2, 3, 5), (2, 4), grad=True), arguments((3, 4, 5), 4, 0, True),
        arguments((0, 2, 5), 3), arguments((2, 2, 5), 3, dtype=f64),
        arguments((2, 2, 5), 3, dtype=torch.bfloat16),
    ):  # fmt: skip
        tensors, batch_dims = given
        for check in (True, False):
            result = torch.library.opcheck(
                torch.ops.marquardt.lowrank_logdet.default,
                (*tensors, check, batch_dims),
                raise_exception=True,
            )
            assert set(result.values()) == {"SUCCESS"}, result
        U, c = (t.detach() for t in tensors)
        batch = U.shape[0] if batch_dims else 1
        c = torch.cat([c.expand(batch, -1), torch.ones(batch, 1, dtype=f64)], dim=1)
        operator = torch.ops.marquardt.lowrank_logdet_vjp.default
        result = torch.library.opcheck(operator, (U, c, batch_dims), raise_exception=True)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.compile
def test_compile(target: Target):
    native_only()
    torch._dynamo.reset()
    _, U = cases.problem("gaussian", 3)(torch.Generator().manual_seed(0), (2, 4, 5), 1)
    leaf = U.to(target.device).requires_grad_()

    def step(U, lam):
        return logdet(target, U, damping=lam)

    lam = torch.tensor(0.3, dtype=f64)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    results = [(out := f(leaf, lam), torch.autograd.grad(out.sum(), leaf)[0]) for f in (step, compiled)]
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-13, atol=1e-13)


@pytest.mark.strides
@pytest.mark.parametrize(
    "layout", ["misaligned", "gaps", "cropped", "transposed", "reversed", "expanded-batch"]
)
def test_layout(target: Target, layout: str):
    _, U = cases.problem("gaussian", 3)(torch.Generator().manual_seed(0), (2, 4, 9), 1)
    place = arena(U.float().to(target.device), layout)
    exact = expected(place.tensor.cpu(), None, 0.3)
    assert_within(logdet(target, place.tensor, damping=0.3), exact, 1e-12 * np.abs(exact) + 1e-12)
    assert place.intact()


@pytest.mark.determinism
def test_bits(target: Target):
    if not target.steady:
        pytest.skip("the reference reduces whole batches")
    _, U = cases.problem("gaussian", 16)(torch.Generator().manual_seed(0), (3, 9001), 1)
    U = U.float().to(target.device)
    whole = logdet(target, U, damping=0.3)
    for b in range(3):
        assert same_bits(logdet(target, U[b : b + 1], damping=0.3)[0], whole[b])


@pytest.mark.accuracy
class TestUpdateDamping:
    """λ·down where actual/predicted > high, λ·up where < low or NaN, else λ."""

    def test_rule(self):
        lam = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 8.0], dtype=f64)
        actual = torch.tensor([0.9, 0.5, 0.1, -3.0, 0.25, 0.75, 2.0], dtype=f64)
        out = mq.update_damping(lam, actual, torch.ones(7, dtype=f64))
        third = 1 / 3
        torch.testing.assert_close(out, torch.tensor([third, 1, 2, 2, 1, 1, 8 * third], dtype=f64))
        out = mq.update_damping(lam, actual, 1.0, low=0.6, high=0.8, down=0.5, up=10.0)
        torch.testing.assert_close(out, torch.tensor([0.5, 10, 10, 10, 10, 1, 4], dtype=f64))

    def test_failed_steps_raise_it(self):
        nan, inf = math.nan, math.inf
        actual = torch.tensor([nan, 1.0, 0.0, -inf, -1.0], dtype=f64)
        predicted = torch.tensor([1.0, nan, 0.0, 1.0, 0.0], dtype=f64)
        out = mq.update_damping(1.0, actual, predicted)
        torch.testing.assert_close(out, torch.full((5,), 2.0, dtype=f64), check_dtype=False)

    def test_numbers_and_shapes(self):
        assert float(mq.update_damping(3.0, 1.0, 1.0)) == pytest.approx(1.0)
        assert isinstance(mq.update_damping(3.0, 0.5, 1.0), torch.Tensor)
        assert mq.update_damping(torch.ones(4), 1.0, 1.0).shape == (4,)
        assert mq.update_damping(1.0, torch.ones(4), torch.ones(4)).shape == (4,)
        narrow = mq.update_damping(torch.ones(4), torch.ones(4, dtype=f64), 1.0)
        assert narrow.dtype == f32

    def test_one_graph(self):
        native_only()
        torch._dynamo.reset()
        compiled = torch.compile(mq.update_damping, fullgraph=True, backend="aot_eager")
        given = torch.ones(5), torch.linspace(-1, 2, 5), torch.ones(5)
        torch.testing.assert_close(compiled(*given), mq.update_damping(*given))
        mapped = torch.func.vmap(mq.update_damping)(*given)
        torch.testing.assert_close(mapped, mq.update_damping(*given))
