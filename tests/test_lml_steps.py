"""Values of the DDIM, DPM-Solver and flow steps: against the oracle in every mix of options, and along trajectories.

Bounds are norm-wise per sample, ‖found − exact‖ ≤ bound·‖exact‖: 1e-13 in float64, 5e-7 in float32, half an ulp more
where the result is narrower; noise drawn from a seed may be off by 4 ulp of float32.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases
import marquardt as mq
import oracle
import oracle_steps as steps
import step_calls as calls
from harness import Target
from harness.compare import rows, wide
from harness.declare import dtype_name
from step_calls import bf16, close, f16, f32, f64

pytestmark = pytest.mark.accuracy
LD = np.longdouble


def check(call: calls.Call, target: Target) -> None:
    found = call.run(target)
    again = 2 if call.keywords.get("doubled") else 1
    expected = np.concatenate([call.expected[0]] * again)
    slack = np.tile(np.broadcast_to(call.slack, call.expected[0].shape[:1]), again)
    assert found[0].dtype == call.args[0].dtype and len(found[0]) == again * len(call.args[0])
    close(found[0], expected, "x'", slack)
    for name, tensor, exact in zip(("second", "third"), found[1:], call.expected[1:], strict=False):
        assert tensor.shape == call.args[0].shape
        close(tensor, exact, f"{name} result")


def given(call: calls.Call) -> torch.Tensor:
    output = call.args[1]
    return output[0] if isinstance(output, list) else output


class TestMatrix:
    """Any two options meet in a row."""

    @pytest.mark.parametrize("row", calls.pairwise(calls.AXES_DDIM), ids=calls.name_of)
    def test_ddim(self, target: Target, row):
        call = calls.ddim_call(row, target.device)
        check(call, target)
        _, eps = call.run(target)
        same = row["prediction"] == "epsilon" and row["guidance"] == "none" and not row["use_clipped"]
        assert (eps is call.args[1] or not same) and eps.dtype == row["pair"][1]

    @pytest.mark.parametrize("row", calls.pairwise(calls.AXES_DPM, calls.dpm_allowed), ids=calls.name_of)
    def test_dpm(self, target: Target, row):
        call = calls.dpm_call(row, target.device)
        check(call, target)
        _, increment, *third = call.run(target)
        assert increment.dtype == row["pair"][0] and len(third) == (row["prediction"] is not None)
        own = "epsilon" if row["algorithm"] in steps.NOISE_FORM else "sample"
        same = row["prediction"] == own and row["guidance"] == row["limit"] == "none"
        for made in third:
            assert made.dtype == row["pair"][1] and (made is given(call) or not same)

    @pytest.mark.parametrize("row", calls.pairwise(calls.AXES_FLOW), ids=calls.name_of)
    def test_flow(self, target: Target, row):
        call = calls.flow_call(row, target.device)
        check(call, target)
        _, velocity = call.run(target)
        assert velocity.dtype == row["pair"][1]
        assert velocity is call.args[1] or row["guidance"] != "none"


# what bends the direction along a trajectory: keywords, and the same for the oracle
BENDS = {
    "small-damping": (
        {"damping": 1e-3, "kappa": 0.1},
        (oracle.KEEP_NORM, 1e-3, 0.1),
    ),
    "large-damping": (
        {"damping": 3e3, "kappa": 0.3},
        (oracle.KEEP_NORM, 3e3, 0.3),
    ),
    "extrapolation": ({"extrapolation": 0.4}, (oracle.EXTRAPOLATE, 0.4)),
}
STEPS = 50


class Gaussian:
    """Data N(μ, s²) per element: what a perfect network says about them, in float32 or float64."""

    def __init__(self, shape, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.mean = cases.gaussian(generator, shape)
        self.square = torch.rand(shape, generator=generator, dtype=f64) ** 2
        self.start = cases.gaussian(generator, shape)

    def eps(self, x, a: float):
        mean, square = self.mean.to(x), self.square.to(x)
        return (1 - a) ** 0.5 * (x - a**0.5 * mean) / (a * square + 1 - a)

    def velocity(self, x, s: float):
        mean, square = self.mean.to(x), self.square.to(x)
        rest = (x - (1 - s) * mean) / ((1 - s) ** 2 * square + s * s)
        return s * rest - mean - (1 - s) * square * rest


def terms_of(x, outputs, given: dict, order: int, algorithm: str) -> tuple[list, list]:
    """All that m_0 and N are sums of, rows, where outputs[0] is a raw ε."""
    first = [outputs[0]]
    if algorithm == "dpmsolver++":
        a, s = given["alphas"][1], given["sigmas"][1]
        first = [x / a, -s / a * outputs[0]]
    c = steps.dpm_weights(*(given[k] for k in calls.TABLES), order, algorithm).coefficients()
    older = [steps.column(w) * m for w, m in zip(c[1:], outputs[1:], strict=False)]
    return first, [*(steps.column(c[0]) * t for t in first), *older]


def size_of(terms: list) -> np.ndarray:
    """[B]: ‖Σ |terms|‖."""
    return np.sqrt((sum(np.abs(t) for t in terms) ** 2).sum(1))


@pytest.mark.filterwarnings("ignore:.*nearly orthogonal")
@pytest.mark.parametrize("bend", BENDS)
@pytest.mark.parametrize("pair", [(f64, f64), (f32, f32), (f32, bf16), (f32, f16)], ids=dtype_name)
class TestTrajectory:
    """Fifty steps, each compared with the exact step from the same inputs, and in float64 with the formula as printed:
    1e-12·(1 + ‖direction‖²/λ). The results that are kept for the next step may be sums that cancel: their bound counts
    against what went in. So does that of x' where a small damping leaves little but the rounding of a direction that is
    computed in the step (ε of v, N of x₀); a direction that is given is as exact as it stands."""

    shape = (2, 4, 16, 24)

    def published(self, found, step, args, more: dict, direction, bend: str) -> None:
        if found.dtype == f64 and "damping" in BENDS[bend][0]:
            square = float((wide(direction) ** 2).reshape(2, -1).sum(1).max())
            exact = step(*args, **more, published=True)[0]
            close(found, exact, "in print", stated=1e-12 * (1 + square / BENDS[bend][0]["damping"]))

    def slack(self, direction, prev, bend: str, terms: list, unit: float):
        if bend != "small-damping":
            return 0.0
        return steps.bend_rounding(direction, prev, BENDS[bend][1], terms, unit)

    @pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
    def test_ddim(self, target: Target, pair, bend: str, prediction: str):
        keywords, lm = BENDS[bend]
        bars = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=f64).square()
        bars = [1.0, *(1 - bars).cumprod(0)[torch.linspace(0, 999, STEPS).long()].tolist()][::-1]
        model = Gaussian(self.shape)
        x, prev = model.start.to(pair[0]).to(target.device), None
        for a, a1 in zip(bars, bars[1:], strict=False):
            output = model.eps(x, a)
            if prediction == "v_prediction":
                output = (output - (1 - a) ** 0.5 * x) / a**0.5
            output = output.to(pair[1])
            with target():
                new, eps = mq.lml_ddim_step(
                    x, output, prev, alpha_bar=a, alpha_bar_next=a1, prediction_type=prediction, **keywords
                )
            args = rows(x), rows(output), None if prev is None else rows(prev)
            more = {"alpha_bar": a, "alpha_bar_next": a1, "lm": lm, "prediction": prediction}
            exact, exact_eps = steps.ddim_step(*args, **more)
            terms = [(1 - a) ** 0.5 * args[0], a**0.5 * args[1]] if prediction != "epsilon" else []
            unit = torch.finfo(pair[0]).eps
            close(new, exact, f"x' at {a:.4g}", self.slack(exact_eps, args[2], bend, terms, unit))
            close(eps, exact_eps, f"eps at {a:.4g}", unit * size_of(terms) if terms else 0.0)
            self.published(new, steps.ddim_step, args, more, exact_eps, bend)
            x, prev = new, eps

    @pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
    def test_dpm(self, target: Target, pair, bend: str, algorithm: str):
        keywords, lm = BENDS[bend]
        bars = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=f64).square()
        bars = (1 - bars).cumprod(0)[torch.linspace(0, 999, STEPS + 1).long()].tolist()[::-1]
        model = Gaussian(self.shape)
        x, prev, history = model.start.to(pair[0]).to(target.device), None, []
        for i in range(STEPS):
            order = min(i + 1, 3, STEPS - i)
            given = calls.tables([bars[i + 1 - j] for j in range(order + 1)])
            outputs = [model.eps(x, bars[i]).to(pair[1]), *history]
            with target():
                new, increment, made = mq.lml_dpm_step(
                    x, outputs, prev, **given, order=order, algorithm=algorithm, prediction_type="epsilon", **keywords
                )  # fmt: skip
            args = rows(x), [rows(m) for m in outputs], None if prev is None else rows(prev)
            more = {**given, "order": order, "algorithm": algorithm, "lm": lm, "prediction": "epsilon"}
            exact = steps.dpm_step(*args, **more)
            unit, (first, terms) = torch.finfo(pair[0]).eps, terms_of(*args[:2], given, order, algorithm)
            close(new, exact[0], f"x' of step {i}", self.slack(exact[1], args[2], bend, terms, unit))
            close(increment, exact[1], f"N of step {i}", unit * size_of(terms))
            close(made, exact[2], f"m of step {i}", unit * size_of(first))
            self.published(new, steps.dpm_step, args, more, exact[1], bend)
            x, prev, history = new, increment, [made, *history][:2]

    def test_flow(self, target: Target, pair, bend: str):
        keywords, lm = BENDS[bend]
        sigmas = [3 * s / (1 + 2 * s) for s in torch.linspace(1, 0, STEPS + 1, dtype=f64).tolist()]
        model = Gaussian(self.shape)
        x, prev = model.start.to(pair[0]).to(target.device), None
        for s, s1 in zip(sigmas, sigmas[1:], strict=False):
            v = model.velocity(x, s).to(pair[1])
            with target():
                new, _ = mq.lml_flow_step(x, v, prev, sigma=s, sigma_next=s1, **keywords)
            args = rows(x), rows(v), None if prev is None else rows(prev)
            more = {"sigma": s, "sigma_next": s1, "lm": lm}
            close(new, steps.flow_step(*args, **more)[0], f"x' at {s:.4g}")
            self.published(new, steps.flow_step, args, more, v, bend)
            x, prev = new, v


FAMILY = [
    (algorithm, order, solver, third)
    for algorithm in calls.ALGORITHMS
    for order, solver, third in (
        (1, "midpoint", "published"),
        (2, "midpoint", "published"),
        (2, "heun", "published"),
        (3, "midpoint", "published"),
        (3, "heun", "exact"),
    )
    if (algorithm, order) != ("sde-dpmsolver", 3)
]


# (algorithm, order or third_order, local order)
ORDERS = (
    ("dpmsolver++", 1, 2),
    ("dpmsolver++", 2, 3),
    ("dpmsolver++", "published", 3),
    ("dpmsolver++", "exact", 4),
    ("dpmsolver", "exact", 4),
    ("sde-dpmsolver++", "published", 2),  # its factor of D2 does not vanish with h
    ("sde-dpmsolver++", "exact", 4),
)


class TestCoefficients:
    @pytest.mark.parametrize("kind", FAMILY, ids=lambda k: "-".join(map(str, k)))
    @pytest.mark.parametrize("form", ["number", "zero-dim", "per-sample"])
    @pytest.mark.parametrize("h", [1e-4, 0.01, 0.3, 2.0])
    def test_dpm(self, target: Target, kind, form: str, h: float):
        """Unit vectors read them out: 1e-13 each, however fine the steps are (no exp(h) − 1, no difference over h²)."""
        algorithm, order, solver, third = kind
        lambdas = [0.5 + h, 0.5, 0.5 - 0.8 * h, 0.5 - 2.1 * h][: order + 1]
        alphas, sigmas = [0.9, 0.8, 0.7, 0.6][: order + 1], [0.45, 0.65, 0.7, 0.8][: order + 1]
        given = {
            name: [calls.scalar(c, form, 1, target.device) for c in table]
            for name, table in (("lambdas", lambdas), ("alphas", alphas), ("sigmas", sigmas))
        }
        unit = torch.eye(5, dtype=f64, device=target.device)[:, None]
        noise = {"noise": unit[4]} if algorithm.startswith("sde") else {}
        with target():
            found, increment = mq.lml_dpm_step(
                unit[0], list(unit[1 : order + 1]), **given, order=order, algorithm=algorithm, solver_type=solver,
                third_order=third, **noise,
            )  # fmt: skip
        W = steps.dpm_weights(lambdas, alphas, sigmas, order, algorithm, solver, third)
        columns = W.differences([wide(t) for t in unit[1:4].cpu()])
        exact = sum(w * D for w, D in zip(W.w, columns, strict=True))
        expected = exact + W.scale * wide(unit[0].cpu()) + W.noise * wide(unit[4].cpu())
        assert np.all(np.abs(wide(found) - expected) <= 1e-13 * np.abs(expected)), wide(found) / expected
        assert np.all(np.abs(wide(increment) - exact) <= 1e-13 * np.abs(exact))

    @pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
    def test_last_step_to_no_noise(self, target: Target, algorithm: str):
        """σ_t = 0, λ_t = ∞ as schedules that end at 0 have it: x' = α_t·m0."""
        x, m = (torch.randn(2, 30, device=target.device) for _ in range(2))
        given = {"lambdas": [float("inf"), 1.0], "alphas": [1.0, 0.9], "sigmas": [0.0, 0.3]}
        with target():
            new, _ = mq.lml_dpm_step(x, m, **given, order=1, algorithm=algorithm)
        close(new, rows(m), "x'")

    @pytest.mark.parametrize("kind", ORDERS, ids=lambda k: "-".join(map(str, k)))
    def test_local_order(self, target: Target, kind):
        """The error of a step from exact data falls as h^order: 3 with the D2 coefficient in print, 4 with `exact`."""
        algorithm, which, local = kind
        order, third = (which, "published") if isinstance(which, int) else (3, which)

        def error(h: float) -> float:
            worst = 0.0
            for end in np.linspace(-1.5, 1.5, 13):  # the leading term changes its sign somewhere
                lam = [end - j * h for j in range(order + 1)]
                sigma = [1 / (1 + np.exp(2 * v)) ** 0.5 for v in lam]
                alpha = [np.exp(v) * s for v, s in zip(lam, sigma, strict=True)]
                # m(λ) = sin λ: the integrals of e^λ m, e^2λ m and e^−λ m are known
                front, primitive = {
                    "dpmsolver++": (sigma[0], lambda v: np.exp(v) * (np.sin(v) - np.cos(v)) / 2),
                    "sde-dpmsolver++": (
                        2 * alpha[0] * np.exp(-2 * lam[0]), lambda v: np.exp(2 * v) * (2 * np.sin(v) - np.cos(v)) / 5
                    ),
                    "dpmsolver": (-alpha[0], lambda v: -np.exp(-v) * (np.sin(v) + np.cos(v)) / 2),
                }[algorithm]  # fmt: skip
                exact = front * (primitive(lam[0]) - primitive(lam[1]))
                outputs = [torch.full((1, 1), np.sin(v), dtype=f64, device=target.device) for v in lam[1:]]
                with target():
                    _, N = mq.lml_dpm_step(
                        torch.zeros_like(outputs[0]), outputs, lambdas=lam, alphas=alpha, sigmas=sigma, order=order,
                        algorithm=algorithm, third_order=third, **({"seed": 1} if "sde" in algorithm else {}),
                    )  # fmt: skip
                worst = max(worst, abs(float(N) - exact))
            return worst

        assert abs(np.log2(error(0.02) / error(0.01)) - local) < 0.2


class TestOracle:
    """The oracle against formulas as they are printed."""

    @pytest.mark.parametrize("kind", FAMILY, ids=lambda k: "-".join(map(str, k)))
    @pytest.mark.parametrize("h", [1e-4, 0.3, 1.7])
    def test_dpm_weights(self, kind, h: float):
        mp = pytest.importorskip("mpmath")  # comes with torch
        algorithm, order, solver, third = kind
        with mp.workdps(60):
            H, a, s = mp.mpf(h), mp.mpf(0.75), mp.mpf(0.5)
            up, down, twice = mp.exp(H) - 1, mp.exp(-H) - 1, 1 - mp.exp(-2 * H)
            first, half, heun, second = {
                "dpmsolver": (
                    -s * up, -s * up / 2, -s * (up / H - 1), -s * ((up - H) / H**2 - mp.mpf(0.5))
                ),
                "dpmsolver++": (
                    -a * down, -a * down / 2, a * (down / H + 1), -a * ((down + H) / H**2 - mp.mpf(0.5))
                ),
                "sde-dpmsolver": (-2 * s * up, -s * up, -2 * s * (up / H - 1), None),
                "sde-dpmsolver++": (
                    a * twice, a * twice / 2, a * (twice / (-2 * H) + 1),
                    a * ((twice - 2 * H) / (2 * H) ** 2 + mp.mpf(0.5 if third == "exact" else -0.5)),
                ),
            }[algorithm]  # fmt: skip
            if third == "exact":
                second = 2 * second
            printed = [first, half if order == 2 and solver == "midpoint" else heun, second][:order]
            W = steps.dpm_weights(
                [LD(h), LD(0), -LD(h), -2 * LD(h)], [0.75] * 4, [0.5] * 4, order, algorithm, solver, third
            )
            for w, p in zip(W.w, printed, strict=True):
                assert abs(mp.mpf(str(np.format_float_scientific(w, 25))) / p - 1) < 1e-16

    def test_quantile(self):
        x = torch.rand(3, 1001, dtype=f64)
        for ratio in (0.0, 0.3, 0.995, 1.0):
            expected = torch.quantile(x, ratio, dim=1)
            assert np.allclose(steps.quantile(wide(x), ratio).astype(float), expected, rtol=1e-12)

    @pytest.mark.parametrize("damping", [1e-3, 1.0, 1e4])
    def test_closed_form_and_print(self, damping: float):
        eps, prev = (rows(t) for t in cases.correlated(torch.Generator().manual_seed(0), (2, 3072), 0.99))
        for lm in ((oracle.KEEP_NORM, damping, 0.2), (oracle.EXTRAPOLATE, 0.5)):
            a, b = (steps.bend(eps, prev, lm, p) for p in (False, True))
            assert np.abs(a - b).max() <= 1e-17 * (1 + 3072 / damping) * np.abs(a).max()
