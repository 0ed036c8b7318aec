"""The judge is judged: the reduction to a small matrix against the D×D formula, derivatives against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases_lowrank as cases
import oracle_lowrank as oracle
from lowrank_ops import INV_SQRT, MATVEC, SOLVE, per_sample

pytestmark = pytest.mark.accuracy
f64 = torch.float64
LD = np.longdouble

PROBLEMS = [
    *(cases.Odd(f"hard-{w}", cases.problem("conditioned", 4, w, 1e6), (1.0,) * 4, 1e-6) for w in ("random", "span")),
    *cases.ODD,
]  # fmt: skip


def arrays(odd: cases.Odd, size: int):
    v, U, s = odd.make((1, size), dtype=f64)
    return per_sample(v, U, s, odd.damping)


@pytest.mark.parametrize("odd", PROBLEMS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 20])
def test_low_rank_equals_dense(odd: cases.Odd, size: int):
    given = arrays(odd, size)
    v, U, s, damping = (x[0] for x in given)
    spread = (damping + (np.abs(s) * oracle.norm(U) ** 2).sum()) / np.abs(oracle.reduce(U, s, damping).t).min(
        initial=damping
    )
    for variant in (MATVEC, SOLVE, INV_SQRT):
        dense = oracle.dense_apply(variant, v, U, s, damping)
        # a thousand roundings of longdouble times the condition; Denman–Beavers loses the square of it
        allowed = 1e-16 * spread ** (2 if variant == INV_SQRT else 1) * oracle.norm(dense)
        assert oracle.norm(oracle.apply(variant, *given)[0] - dense) <= allowed
        c0, c = oracle.coefficients(variant, *given)
        assert oracle.norm(c0[0] * v + c[0] @ U - dense) <= allowed
    logdet = oracle.dense_logdet(U, s, damping)
    assert abs(oracle.logdet(*given[1:])[0] - logdet) <= 1e-17 * spread * size * max(1, abs(np.log(damping)))


@pytest.mark.parametrize("keep_norm", [False, True], ids=["plain", "keep_norm"])
@pytest.mark.parametrize("variant", [MATVEC, SOLVE, INV_SQRT])
@pytest.mark.parametrize("odd", cases.ODD, ids=str)
def test_derivatives(odd: cases.Odd, variant: int, keep_norm: bool):
    """The tangent against central differences in longdouble, the gradient as its transpose."""
    given, rng = arrays(odd, 20), np.random.default_rng(0)
    moved = [rng.standard_normal(x.shape).astype(LD) for x in given]
    step = LD(1e-6) * min(1.0, odd.damping)
    if "barely" in odd.name:
        step = step * LD(1e-3)

    def at(h):
        return oracle.apply(variant, *(x + h * t for x, t in zip(given, moved, strict=True)), keep_norm)

    tangent = oracle.apply_jvp(variant, *given, *moved, keep_norm)
    numeric = (at(step) - at(-step)) / (2 * step)
    assert oracle.norm(tangent - numeric) < 1e-6 * oracle.norm(tangent)
    grad = rng.standard_normal(given[0].shape)
    d = oracle.apply_vjp(variant, *given, grad, keep_norm)[:4]
    paired = sum((a * b).sum() for a, b in zip(d, moved, strict=True))
    assert abs(paired - (tangent * grad).sum()) < 1e-12 * oracle.norm(tangent)[0] * np.sqrt(20)


@pytest.mark.parametrize("odd", cases.ODD, ids=str)
def test_logdet_derivatives(odd: cases.Odd):
    given, rng = arrays(odd, 20)[1:], np.random.default_rng(0)
    moved = [rng.standard_normal(x.shape).astype(LD) for x in given]
    step = LD(1e-9) * min(1.0, odd.damping)
    high, low = (
        oracle.logdet(*(x + h * t for x, t in zip(given, moved, strict=True))) for h in (step, -step)
    )
    d = oracle.logdet_vjp(*given, np.ones(1))[:3]
    paired = sum((a * b).sum() for a, b in zip(d, moved, strict=True))
    assert abs(paired - (high - low)[0] / (2 * step)) < 1e-6 * abs(paired)


@pytest.mark.parametrize("odd", [o for o in cases.ODD if min(o.s, default=0) >= 0], ids=str)
def test_update(odd: cases.Odd):
    """All eigenpairs give the matrix back, in the order and form that is promised."""
    v, U, s, _ = (x[0] for x in arrays(odd, 20))
    spectrum = oracle.updated(U, s, v, 0.7, 1.3)
    size = max(spectrum.values[0], 1e-300)
    whole = np.concatenate([v[None], U]), np.concatenate([[LD(1.3)], LD(0.7) * s])
    assert oracle.distance(spectrum.rows, spectrum.values, *whole) < 1e-16 * size
    assert np.all(np.diff(spectrum.values) <= 0)
    identity = np.eye(len(spectrum.rows))
    assert np.abs(spectrum.rows @ spectrum.rows.T - identity).max() < 1e-17
    for value, row, c in zip(spectrum.values, spectrum.rows, spectrum.coefficients, strict=True):
        if value > 1e-8 * size:
            assert oracle.norm(c @ whole[0] - row) < 1e-10
