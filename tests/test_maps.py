"""The scalar maps of the ops, in C++ and in the reference, against longdouble."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import cases
import marquardt  # noqa: F401  (registers the operators)
import oracle
from harness import assert_within, native_only, same_bits

f64 = torch.float64
KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2


@pytest.fixture(autouse=True)
def _native():
    native_only()


def frame_map(op: int, mode: int, gram_row, coef) -> np.ndarray:
    made = torch.ops.marquardt._frame_map(
        op, mode, torch.tensor([gram_row], dtype=f64), torch.tensor([coef], dtype=f64)
    )
    return oracle.wide(made[0].numpy())


def scalar_choices(mode: int):
    if mode == EXTRAPOLATE:
        return [(g,) for g in (0.0, 1e-8, 0.3, 1.0, -2.0, 1e4)]
    return list(itertools.product(cases.EXTREME_DAMPINGS, cases.EXTREME_KAPPAS))


def reference_map(mode: int, gram_row, coef) -> np.ndarray:
    """The map of `marquardt.reference`, in float64."""
    from marquardt.reference.hessian import lm_coefficients

    n, e, R = (torch.tensor([x], dtype=f64) for x in gram_row)
    c0, c1 = lm_coefficients(mode, n, e, R, torch.tensor([coef], dtype=f64))
    return oracle.wide([float(c0), float(c1)])


@pytest.mark.accuracy
class TestMaps:
    """The scalar maps of C++ and of the reference against longdouble, to 1e-13.

    An entry is judged against the sum of the sizes of its summands: where they cancel, its own size says nothing.
    """

    GRAMS = (
        *cases.grams(torch.Generator().manual_seed(9), 30),
        (3072.0, -0.003, 0.006),  # correlation 0.999999
        (262144.0, 40.0, 0.52),
        (1e-12, 1e-13, 1e-12),
        (1.0, -0.5, 1.0),
        (2.0, -2.0, 4.0),
    )

    @pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
    @pytest.mark.parametrize("which", ["native", "reference"])
    def test_value(self, mode: int, which: str):
        for row in self.GRAMS:
            for coef in scalar_choices(mode):
                expected = oracle.lm_row(mode, row, coef)
                found = frame_map(1, mode, row, coef) if which == "native" else reference_map(mode, row, coef)
                size = value_size(mode, row, coef) + np.abs(expected)
                assert_within(found, expected, 1e-13 * size, f"mode {mode}, gram {row}, coef {coef}")

    @pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
    def test_degenerate(self, mode: int):
        """Determinant 0 in exact numbers: the special cases, exactly."""
        for row in cases.DEGENERATE_GRAMS:
            for coef in scalar_choices(mode):
                found = frame_map(1, mode, row, coef)
                assert np.all(np.isfinite(found)), (row, coef)
                n, _, R = row
                if n == 0:  # whatever multiplies ε does not matter there
                    assert found[1] == 0 or mode == PLAIN, (row, coef, found)
                elif mode != PLAIN and coef[-1] == 0:
                    assert tuple(found) == (1, 0), (row, coef, found)
                elif mode == KEEP_NORM and coef[0] == 0:
                    assert tuple(found) == (1, 0), (row, coef, found)
                elif mode == PLAIN and coef[0] == 0:
                    assert found[0] == 0 and (found[1] == 0 or R == 0), (row, coef, found)
                else:
                    expected = oracle.lm_row(mode, row, coef)
                    assert_within(
                        found,
                        expected,
                        1e-13 * (value_size(mode, row, coef) + np.abs(expected)),
                        f"{row} {coef}",
                    )

    @pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
    def test_backward(self, mode: int):
        """d_eps and d_prev over (ε, r, g), then the gradients of the scalars."""
        generator = torch.Generator().manual_seed(10)
        for row in self.GRAMS:
            ge, gr = (
                float(x) * row[i] ** 0.5
                for i, x in zip((0, 2), torch.randn(2, generator=generator), strict=True)
            )
            for coef in scalar_choices(mode):
                expected, size = backward_row(mode, row, coef, ge, gr)
                if expected is None:
                    continue
                found = frame_map(2, mode, (*row, ge, gr), coef)
                assert found.shape == expected.shape
                assert_within(found, expected, 1e-12 * size, f"mode {mode}, gram {row}, coef {coef}")

    @pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
    def test_tangent(self, mode: int):
        generator = torch.Generator().manual_seed(11)
        for row in self.GRAMS:
            n, _, R = row
            row_t = tuple(
                float(x) * s
                for x, s in zip(torch.randn(3, generator=generator), (n, (n * R) ** 0.5, R), strict=True)
            )
            for coef in scalar_choices(mode):
                coef_t = tuple(
                    float(x) * c
                    for x, c in zip(torch.randn(len(coef), generator=generator), coef, strict=True)
                )
                expected, size = tangent_row(mode, row, coef, row_t, coef_t)
                if expected is None:
                    continue
                found = frame_map(3, mode, (*row, *row_t), (*coef, *coef_t))
                assert_within(found, expected, 1e-12 * size, f"mode {mode}, gram {row}, coef {coef}")

    @pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
    def test_identity_derivatives(self, mode: int):
        """Where the result is eps the gradient is g; where it is 0 by ε = 0 the gradient is 0."""
        for row, coef in itertools.product(self.GRAMS[:5], scalar_choices(mode)):
            if mode != PLAIN and coef[-1] == 0 and (mode == EXTRAPOLATE or coef[0] > 0):
                found = frame_map(2, mode, (*row, 0.3, -0.2), coef)
                assert tuple(found[:6]) == (0, 0, 1, 0, 0, 0), (row, coef, found)
        for coef in scalar_choices(mode):
            found = frame_map(2, mode, (0.0, 0.0, 5.0, 0.0, 0.7), coef)
            assert np.all(np.isfinite(found)), (coef, found)
            if mode != PLAIN:
                assert np.all(found[:6] == 0), (coef, found)

    @pytest.mark.parametrize("damping", [-1.0, -1e-300, float("nan")])
    def test_bad_damping(self, damping: float):
        """Not refused here, where it may come from a device: it spoils its sample, unless κ = 0 leaves eps as it is."""
        for mode in (KEEP_NORM, PLAIN):
            assert np.isnan(frame_map(1, mode, (2.0, 0.3, 1.0), (damping, 0.2))).all()
        assert tuple(frame_map(1, KEEP_NORM, (2.0, 0.3, 1.0), (damping, 0.0))) == (1, 0)

    def test_batch(self):
        """Many samples at once are the samples one by one."""
        grams = torch.tensor(self.GRAMS, dtype=f64)
        coef = torch.tensor([[0.1, 0.3]], dtype=f64).repeat(len(self.GRAMS), 1)
        whole = torch.ops.marquardt._frame_map(1, KEEP_NORM, grams, coef)
        for b in range(len(self.GRAMS)):
            assert same_bits(
                whole[b : b + 1],
                torch.ops.marquardt._frame_map(1, KEEP_NORM, grams[b : b + 1], coef[b : b + 1]),
            )


def value_size(mode: int, row, coef) -> np.ndarray:
    """Sum of the sizes of the summands of (c0, c1), and what the rounding of the determinant adds."""
    n, e, R = (oracle.wide(x) for x in row)
    loss = (n * R + e * e) / np.maximum(
        n * R - e * e, oracle.LD("1e-4000")
    )  # relative error of G in roundings
    if mode == EXTRAPOLATE:
        (gamma,) = (oracle.wide(c) for c in coef)
        if n == 0:
            return oracle.wide([0, 0])
        c0, c1 = oracle.lm_map(mode, n, e, R, gamma)
        scale = np.abs(c1) / np.abs(gamma) if gamma else oracle.LD(1)
        return oracle.wide([scale * (1 + np.abs(gamma * e / n)), np.abs(c1)]) * min(loss, oracle.LD(1e6))
    damping, kappa = (oracle.wide(c) for c in coef)
    m = n + 2 * kappa * e + kappa * kappa * R
    a, b = damping + np.abs(kappa) * (np.abs(kappa) * R + np.abs(e)), np.abs(kappa) * (n + np.abs(kappa * e))
    if damping + m == 0:
        return oracle.wide([1, 1])
    spread = (n + 2 * np.abs(kappa * e) + kappa * kappa * R) / (damping + m) + 1
    if mode == PLAIN:
        return oracle.wide([a, b]) / (damping + m) * spread
    dd = damping * damping * n + kappa * kappa * (n * R - e * e) * (2 * damping + m)
    if dd == 0 or n == 0:
        return oracle.wide([1, 1])
    return oracle.wide([a, b]) * np.sqrt(n / dd) * spread * min(loss, oracle.LD(1e6))


def _is_special(mode, row, coef) -> bool:
    same, zero = oracle.lm_special(mode, *(oracle.wide([x]) for x in row), *(oracle.wide([c]) for c in coef))
    return bool(same[0] or zero[0])


def _derivatives(mode, row, coef):
    """c0, c1 and their derivatives to (n, e, R, *coef), with the sizes that errors are judged by."""
    variables = oracle.Dual.variables(*([x] for x in row), *([c] for c in coef))
    c0, c1 = oracle.lm_map(mode, *variables)
    n, _, R = (oracle.wide(x) for x in row)
    size = value_size(mode, row, coef)
    # a derivative to a variable of size s loses what the value loses, over s, per power of the loss
    loss = np.max(size / np.maximum(np.abs([c0.v[0], c1.v[0]]), oracle.LD("1e-4000")))
    scales = [n, np.sqrt(n * R), R, *(np.abs(oracle.wide(c)) for c in coef)]
    bounds = [
        np.maximum(np.abs(d[:, 0]), v / np.array(scales)) for d, v in zip((c0.d, c1.d), size, strict=True)
    ]
    return c0, c1, bounds, min(loss, oracle.LD(1e4))


def backward_row(mode, row, coef, ge, gr):
    if _is_special(mode, row, coef) or coef[-1] == 0 or coef[0] == 0:
        return None, None
    with np.errstate(all="ignore"):
        c0, c1, (b0, b1), loss = _derivatives(mode, row, coef)
    F = c0.d[:, 0] * ge + c1.d[:, 0] * gr
    S = (b0 * abs(ge) + b1 * abs(gr)) * (1 + loss)
    v = c0.v[0], c1.v[0]
    w = np.abs(v[0]) + np.abs(v[1])
    expected = [2 * F[0] - F[1], F[1] - 2 * F[2], v[0] - v[1], F[1], 2 * F[2], v[1], *F[3:]]
    size = [2 * S[0] + S[1], S[1] + 2 * S[2], w * (1 + loss), S[1], 2 * S[2], w * (1 + loss), *S[3:]]
    return oracle.wide(expected), oracle.wide(size)


def tangent_row(mode, row, coef, row_t, coef_t):
    if _is_special(mode, row, coef) or coef[-1] == 0 or coef[0] == 0:
        return None, None
    with np.errstate(all="ignore"):
        c0, c1, bounds, loss = _derivatives(mode, row, coef)
    steps = oracle.wide([*row_t, *coef_t])
    moved = [(c.d[:, 0] * steps).sum() for c in (c0, c1)]
    sizes = [(b * np.abs(steps)).sum() * (1 + loss) for b in bounds]
    values = value_size(mode, row, coef) * (1 + loss)
    return oracle.wide([*moved, c0.v[0], c1.v[0]]), oracle.wide([*sizes, *values])
