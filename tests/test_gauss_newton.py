"""softmax_head_hvp and damped_gram_solve: values and derivatives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import marquardt as mq
from gauss_newton_data import (
    DEVICES,
    DTYPES,
    GRAM_SHAPES,
    HEAD_SHAPES,
    bf16,
    cholesky_solve,
    compute,
    error,
    f16,
    f32,
    f64,
    head,
    head_oracle,
    layer,
    leaves,
    name,
    rounding,
    solve,
    solve_oracle,
)
from harness.compare import wide
from marquardt import products
from marquardt.gauss_newton import damped_gram_solve, softmax_head_hvp

# The widest is for FULL=1: its oracle takes seconds in longdouble.
SHAPES = [pytest.param(s, marks=pytest.mark.full) if s[1] > 100 else s for s in GRAM_SHAPES]

# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.accuracy
class TestValues:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", SHAPES, ids=name)
    def test_gram_pair(self, shape, dtype, device):
        """Every element within a few roundings of Σ|products|, chunk by chunk; in float64 products to the ulp."""
        b, i, o = shape
        g, x = layer(b, i, o, dtype, device=device)
        gram, cross = products.gram_pair(g, x)
        assert gram.shape == (i, i) and cross.shape == (o, i) and gram.dtype == cross.dtype == f64
        wg, wx = wide(g), wide(x)
        for found, left in ((gram, wx), (cross, wg)):
            # sums of 256 products (1024 on a GPU): roundings add up like a random walk, √256 · ½ unit, eight deviations
            allowed = 8 * 32 * compute(dtype) / 2 * (np.abs(left).T @ np.abs(wx)) / np.sqrt(b)
            allowed += 2 * compute(dtype) * np.abs(left).T @ np.abs(wx)
            assert np.all(np.abs(wide(found) - left.T @ wx) <= allowed)
        assert torch.equal(gram, gram.mT)

    @pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=name)
    def test_gram_pair_of_many_rows(self, dtype):
        """Beyond 2²⁷ products they are taken in float32; ragged chunks, ranges and vectors."""
        for b, i, o in ((14_001, 147, 13), (12_345, 100, 61), (9_000, 171, 16)):
            g, x = layer(b, i, o, dtype)
            gram, cross = products.gram_pair(g, x)
            wg, wx = g.double(), x.double()
            for found, left in ((gram, wx), (cross, wg)):
                assert bool((found - left.T @ wx).abs().max() > 0), "float32 products were meant here"
                # squares of few bits round to one side
                allowed = 4 * compute(f32) * (left.abs().T @ wx.abs())
                assert bool(((found - left.T @ wx).abs() <= allowed).all())
            assert torch.equal(gram, gram.mT)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize(
        "shape", [s for s in SHAPES if not isinstance(s, tuple) or s[2]] + [(4, 9, 3), (40, 300, 7)], ids=name
    )
    def test_solve(self, shape, dtype, device):
        g, x = layer(*shape, dtype, device=device)
        found = damped_gram_solve(g, x, damping=0.1)
        assert found.dtype == dtype and found.is_contiguous() and found.shape == (shape[2], shape[1])
        # condition of the system at most (largest eigenvalue + 0.1) / 0.1; measured errors are 20 times smaller
        assert error(found, solve_oracle(g, x, 0.1)) <= rounding(dtype) + 8 * compute(dtype)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", HEAD_SHAPES, ids=name)
    def test_head(self, shape, dtype, device):
        """To 1e-6 in float32; a 16-bit result adds its rounding, on a GPU 16-bit logits add theirs."""
        n, c, d = shape
        x, p, G = head(n, c, d, dtype, device=device)
        found = softmax_head_hvp(x, p, G)
        assert found.dtype == dtype and found.shape == (c, d)
        allowed = 1e-14 if dtype is f64 else 1e-6 + (0 if dtype is f32 else torch.finfo(dtype).eps)
        if device != "cpu" and dtype in (f16, bf16):
            allowed *= 4
        assert error(found, head_oracle(x, p, G)) <= allowed

    def test_head_is_the_hessian(self):
        """Against autograd through the loss itself, with probabilities of the head."""
        x, _, G = head(40, 6, 5, f64)
        W = torch.randn(6, 5, dtype=f64, generator=torch.Generator().manual_seed(3))
        labels = torch.arange(40) % 6

        def loss(w):
            return torch.nn.functional.cross_entropy(x @ w.T, labels)

        _, expected = torch.autograd.functional.hvp(loss, W, G)
        torch.testing.assert_close(
            softmax_head_hvp(x, (x @ W.T).softmax(1), G), expected, rtol=1e-12, atol=1e-15
        )

    @pytest.mark.parametrize(
        "size",
        [(500, 48, 0.2), pytest.param((20_000, 128, 0.6), marks=pytest.mark.full)],
        ids=["double", "float32-products"],
    )
    def test_more_accurate_than_the_inverse_as_damping_vanishes(self, size):
        """Condition 1e6 of the Gram: Cholesky of a Gram summed in float64 against a float32 inverse."""
        b, i, bound = size
        g, x = layer(b, i, 8, f32, decay=3)
        eye, dampings = torch.eye(i), (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 0.0)
        for damping, want in zip(dampings, solve_oracle(g, x, *dampings), strict=True):
            inverse = g.T @ x @ torch.linalg.inv(x.T @ x / x.shape[0] + damping * eye)
            ours, theirs = error(damped_gram_solve(g, x, damping=damping), want), error(inverse, want)
            assert ours < bound * theirs, (damping, ours, theirs)

    def test_dual_needs_no_gram_of_the_columns(self):
        """b < i at λ → 0: the i × i system is singular, the dual one is not."""
        g, x = layer(20, 300, 4, f32)
        found = damped_gram_solve(g, x, damping=0.0)
        wg, wx = wide(g), wide(x)
        want = (cholesky_solve(wx @ wx.T / 20, wg).T) @ wx
        assert error(found, want) <= 1e-6
        assert error(damped_gram_solve(g, x, damping=1e-12), want) <= 1e-6

    def test_dual_and_primal_agree(self):
        """Both sides of b = i, by the same oracle, in float64."""
        for b in (29, 30, 31):
            g, x = layer(b, 30, 4, f64)
            assert error(damped_gram_solve(g, x, damping=0.05), solve_oracle(g, x, 0.05)) <= 1e-11

    def test_empty_batch(self):
        for dtype in DTYPES:
            g, x = layer(0, 5, 3, dtype)
            assert bool((damped_gram_solve(g, x, damping=0.1) == 0).all())
            out = softmax_head_hvp(*head(0, 4, 5, dtype))
            assert out.shape == (4, 5) and bool((out == 0).all())
        assert damped_gram_solve(torch.ones(3, 0), torch.ones(3, 2), damping=1.0).shape == (0, 2)
        assert damped_gram_solve(torch.ones(3, 2), torch.ones(3, 0), damping=1.0).shape == (2, 0)
        assert softmax_head_hvp(torch.ones(3, 0), torch.ones(3, 2), torch.ones(2, 0)).shape == (2, 0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_in_nan_out(self, bad):
        """In the last row of a range, in columns of either argument; no error."""
        for rows in (3, 1500):
            g, x = layer(rows, 20, 3)
            for spoiled in (0, 1):
                tensors = [g.clone(), x.clone()]
                tensors[spoiled][-1, -1] = bad
                out = damped_gram_solve(*tensors, damping=0.1)
                assert bool(out.isnan().any()) or bool(out.isinf().any())
                assert spoiled == 0 or bool(out.isnan().all())
            arguments = [t.clone() for t in head(rows, 21, 5)]
            arguments[0][-1, -1] = bad
            assert bool(softmax_head_hvp(*arguments).isnan().any())

    def test_reference(self):
        g, x = layer(50, 6, 3)
        with mq.use_backend("reference"):
            forced = damped_gram_solve(g, x, damping=0.1), softmax_head_hvp(*head(50, 6, 3))
        assert error(forced[0], solve_oracle(g, x, 0.1)) < 1e-7
        assert error(forced[1], head_oracle(*head(50, 6, 3))) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    def test_compositions(self, dtype):
        """What a GPU runs, on CPU tensors."""
        g, x = layer(2500, 12, 5, dtype)
        for found, want in zip(products.compose_gram_pair(g, x), products.gram_pair(g, x), strict=True):
            torch.testing.assert_close(
                found, want, rtol=0, atol=float(16 * compute(dtype) * want.abs().max())
            )
        arguments = head(200, 12, 5, dtype)
        allowed = max(8 * rounding(dtype), 1e-14)
        assert error(products.compose_softmax_head_hvp(*arguments), head_oracle(*arguments)) <= allowed


# --- derivatives and tracing ------------------------------------------------------------------------------


@pytest.mark.gradcheck
class TestDerivatives:
    @pytest.mark.parametrize("rows", [3, 12], ids=["dual", "primal"])
    def test_solve(self, rows):
        arguments = leaves(*layer(rows, 5, 2, f64), torch.tensor(0.3, dtype=f64))
        assert torch.autograd.gradcheck(solve, arguments)
        assert torch.autograd.gradgradcheck(solve, arguments)
        assert torch.autograd.gradcheck(solve, arguments, check_forward_ad=True, check_backward_ad=False)

    def test_head(self):
        arguments = leaves(*head(9, 4, 3, f64))
        assert torch.autograd.gradcheck(softmax_head_hvp, arguments)
        assert torch.autograd.gradgradcheck(softmax_head_hvp, arguments)
        assert torch.autograd.gradcheck(
            softmax_head_hvp, arguments, check_forward_ad=True, check_backward_ad=False
        )

    @pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=name)
    def test_narrow_gradients(self, dtype):
        """Gradients in the dtype of their argument, close to those of the definition in float64."""
        for function, arguments in (
            (solve, [*layer(400, 6, 3, dtype), torch.tensor(0.3, dtype=f64)]),
            (softmax_head_hvp, head(300, 6, 5, dtype)),
        ):
            given, exact = leaves(*arguments), leaves(*(t.double() for t in arguments))
            # weights, for the sum over classes is 0; large ones, for float16 has few small numbers
            out, wanted = function(*given), function(*exact)
            weights = 300 * torch.randn(out.shape, dtype=f64, generator=torch.Generator().manual_seed(7))
            found = torch.autograd.grad((out.double() * weights).sum(), given)
            expected = torch.autograd.grad((wanted * weights).sum(), exact)
            for f, e, t in zip(found, expected, arguments, strict=True):
                assert f.dtype == t.dtype and error(f, wide(e)) <= 4e-6 + 8 * rounding(dtype)

    def test_transforms(self):
        g, x = layer(20, 4, 3, f64)
        damping = torch.tensor([0.1, 0.5], dtype=f64)
        mapped = torch.func.vmap(solve, (None, None, 0))(g, x, damping)
        for found, value in zip(mapped, damping, strict=True):
            torch.testing.assert_close(found, solve(g, x, value))
        x, p, G = head(20, 4, 3, f64)
        both = torch.stack([G, 2 * G])
        for function in (softmax_head_hvp, products.softmax_head_hvp):
            mapped = torch.func.vmap(function, (None, None, 0))(x, p, both)
            torch.testing.assert_close(mapped[1], softmax_head_hvp(x, p, 2 * G))
        pairs = torch.func.vmap(products.gram_pair, (None, 1), (0, 0))(g, torch.stack([x, 2 * x], 1))
        torch.testing.assert_close(pairs[1][1], products.gram_pair(g, 2 * x)[1])
        gradient = torch.func.grad(lambda t: softmax_head_hvp(x, p, t).pow(2).sum())(G)
        (expected,) = torch.autograd.grad(softmax_head_hvp(x, p, leaf := leaves(G)[0]).pow(2).sum(), leaf)
        torch.testing.assert_close(gradient, expected)
