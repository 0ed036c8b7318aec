"""What the steps of samplers and of Langevin dynamics should give, in numpy longdouble, from the formulas alone.

Nothing here comes from the package under test. A sample is a row: tensors are [B, D], scalars numbers or [B]. Noise is
given (`oracle.noise_like` makes it from a seed). `lm` is None or (mode, *coefficients) of `oracle.lm_direction`; with
`published=True` the direction is the formula as it is printed, evaluated in its printed order.

A product with a coefficient that is exactly 0 is left out, whatever the tensor holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

import oracle
import oracle_lowrank

LD = np.longdouble
NOISE_FORM, DATA_FORM = ("dpmsolver", "sde-dpmsolver"), ("dpmsolver++", "sde-dpmsolver++")


def wide(x) -> np.ndarray:
    return np.asarray(x, dtype=LD)


def column(c) -> np.ndarray:
    """A scalar or [B] as something that multiplies [B, D]."""
    return wide(c)[..., None]


def times(c, v) -> np.ndarray:
    """c·v, and 0 where c = 0."""
    c = column(c)
    with np.errstate(invalid="ignore"):
        return np.where(c == 0, LD(0), c * wide(v))


def bend(v, prev, lm, published: bool = False) -> np.ndarray:
    """The LM direction of v, or v itself where there is nothing to bend by."""
    if lm is None or prev is None:
        return wide(v)
    if not published:
        return oracle.lm_direction(v, prev, *lm)
    mode, *coef = lm
    if mode == oracle.EXTRAPOLATE:
        return oracle.published_extrapolation(v, prev, *coef)
    return oracle.published_lm(v, prev, *coef)


def bend_rounding(v, prev, lm, terms, unit: float) -> np.ndarray:
    """[B]: how far the LM direction of v = Σ terms moves when each term, and each element of it, is off by `unit`.

    At small damping what counts is the part of v that is not along prev, however little that is.
    """
    total = np.zeros(len(v), LD)
    if lm is None or prev is None:
        return total
    signs = np.random.default_rng(0).choice([-1.0, 1.0], np.shape(v))
    exact = bend(v, prev, lm)
    for term in terms:
        for way in (1.0, signs):
            gap = bend(wide(v) + LD(unit) * term * way, prev, lm) - exact
            total += np.sqrt(oracle.dot(gap, gap))
    return total


def guided(output, guidance) -> np.ndarray:
    """uncond + scale·(output − uncond)."""
    if guidance is None:
        return wide(output)
    uncond, scale = wide(guidance[0]), column(guidance[1])
    return uncond + scale * (wide(output) - uncond)


def quantile(x: np.ndarray, ratio: float) -> np.ndarray:
    """[B]: with linear interpolation between the order statistics of each row."""
    place = LD(ratio) * (x.shape[1] - 1)
    low = int(np.floor(place))
    ordered = np.sort(x, axis=1)
    above = ordered[:, min(low + 1, x.shape[1] - 1)]
    return ordered[:, low] + (place - low) * (above - ordered[:, low])


def limited(x0: np.ndarray, clip=None, threshold=None) -> np.ndarray:
    """x0 clamped to ±clip, or dynamically thresholded by (ratio, maximum)."""
    if clip is not None:
        return np.clip(x0, -LD(clip), LD(clip))
    if threshold is None or not x0.size:
        return x0
    ratio, maximum = threshold
    s = np.clip(quantile(np.abs(x0), ratio), LD(1), LD(maximum))[:, None]
    return np.clip(x0, -s, s) / s


# ------------------------------------------------------------------------------------------------------------- DDIM
def ddim_step(
    x, output, prev=None, *, alpha_bar, alpha_bar_next, lm=None, eta=0.0, prediction="epsilon", clip=None,
    threshold=None, use_clipped=False, guidance=None, active=None, noise=None, published=False,
):  # fmt: skip
    """(x', eps) of algorithms.md §1.2."""
    x, g = wide(x), guided(output, guidance)
    a, a1, eta = (wide(c) for c in (alpha_bar, alpha_bar_next, eta))
    root, rest = column(np.sqrt(a)), column(np.sqrt(1 - a))
    if prediction == "epsilon":
        x0, eps = (x - rest * g) / root, g
    elif prediction == "sample":
        x0, eps = g, (x - root * g) / rest
    else:
        x0, eps = root * x - rest * g, root * g + rest * x
    x0 = limited(x0, clip, threshold)
    if use_clipped:
        eps = (x - root * x0) / rest
    sigma = np.where(eta == 0, LD(0), eta * np.sqrt((1 - a1) / (1 - a) * (1 - a / a1)))
    along = np.sqrt(1 - a1 - sigma * sigma)
    bent = np.where(column(along) == 0, LD(0), bend(eps, prev, lm, published))
    moved = column(np.sqrt(a1)) * x0 + times(along, bent)
    if noise is not None:
        moved = moved + times(sigma, noise)
    if active is not None:
        moved = np.where(np.asarray(active)[:, None], moved, x)
    return moved, eps


# ------------------------------------------------------------------------------------------------------- DPM-Solver
def _series(x: np.ndarray, offset: int) -> np.ndarray:
    """Σ_{k ≥ 1} x^k / (k + offset)!"""
    total, term = np.zeros_like(x), wide(1)
    for k in range(1, offset + 1):
        term = term / k
    for k in range(1, 40):
        term = term * x / (k + offset)
        total = total + term
    return total


def phi2(x) -> np.ndarray:
    """(eˣ − 1)/x − 1, without cancellation."""
    x = wide(x)
    near = np.abs(x) < 1
    safe = np.where(near, LD(1), x)
    return np.where(near, _series(np.where(near, x, LD(0)), 1), np.expm1(safe) / safe - 1)


def phi3(x) -> np.ndarray:
    """(eˣ − 1 − x)/x² − ½, without cancellation."""
    x = wide(x)
    near = np.abs(x) < 1
    safe = np.where(near, LD(1), x)
    return np.where(
        near, _series(np.where(near, x, LD(0)), 2), (np.expm1(safe) - safe) / (safe * safe) - LD(0.5)
    )


@dataclass
class Weights:
    """x' = scale·x + Σ_j w_j·D_j + noise·z;  D_j from differences of the outputs by `ratios`."""

    scale: np.ndarray
    w: list[np.ndarray]
    prefactor: np.ndarray
    noise: np.ndarray
    ratios: list[np.ndarray]

    def coefficients(self) -> np.ndarray:
        """[order, B]: what multiplies m_0, m_1, …"""
        count = len(self.w)
        unit = np.eye(count, dtype=LD).reshape(count, 1, count)
        return sum(column(w) * D for w, D in zip(self.w, self.differences(unit), strict=True)).T

    def differences(self, m) -> list[np.ndarray]:
        """[D0, D1, D2] of outputs m, newest first."""
        m, r = [wide(t) for t in m[: len(self.w)]], [column(r) for r in self.ratios]
        if len(self.w) == 1:
            return m
        first = (m[0] - m[1]) / r[0]
        if len(self.w) == 2:
            return [m[0], first]
        second = (m[1] - m[2]) / r[1]
        bend = (first - second) / (r[0] + r[1])
        return [m[0], first + r[0] * bend, bend]


def dpm_weights(
    lambdas, alphas, sigmas, order: int, algorithm: str, solver_type="midpoint", third_order="published"
) -> Weights:
    """The tables of algorithms.md §1.3; `exact` takes the Taylor coefficient of D2, twice the printed one."""
    lam, alpha, sigma = ([wide(c) for c in table] for table in (lambdas, alphas, sigmas))
    h = lam[0] - lam[1]
    ratios = [(lam[j] - lam[j + 1]) / h for j in range(1, order)]
    stochastic = algorithm.startswith("sde")
    if algorithm in NOISE_FORM:
        front, y, scale = -sigma[0], h, alpha[0] / alpha[1]
    else:
        front, y, scale = -alpha[0], -h, sigma[0] / sigma[1]
    noise = np.zeros_like(h)
    if stochastic and algorithm in NOISE_FORM:
        front, noise = 2 * front, sigma[0] * np.sqrt(np.expm1(2 * h))
    elif stochastic:
        y, scale, noise = 2 * y, scale * np.exp(-h), sigma[0] * np.sqrt(-np.expm1(-2 * h))
    prefactor = front * np.expm1(y)
    w = [prefactor]
    if order > 1:
        w.append(prefactor / 2 if order == 2 and solver_type == "midpoint" else front * phi2(y))
    if order > 2:
        second = front * phi3(y)
        if third_order == "exact":
            second = 2 * second
        elif stochastic:  # in print α((1 − e^−2h − 2h)/(2h)² − ½): with ½ subtracted where Taylor adds it
            second = front * (1 + phi3(y))
        w.append(second)
    return Weights(scale, w, prefactor, noise, ratios)


def converted(x, output, alpha, sigma, algorithm, prediction=None, guidance=None, clip=None, threshold=None):
    """Raw network output at s0 in the form that the algorithm works in; no prediction type: it has that form."""
    g = guided(output, guidance)
    if prediction is None:
        return g
    x, a, s = wide(x), column(alpha), column(sigma)
    limits = clip is not None or threshold is not None
    if algorithm in DATA_FORM:
        x0 = {"epsilon": lambda: (x - s * g) / a, "sample": lambda: g, "v_prediction": lambda: a * x - s * g}
        return limited(x0[prediction](), clip, threshold)
    eps = {"epsilon": lambda: g, "sample": lambda: (x - a * g) / s, "v_prediction": lambda: a * g + s * x}
    found = eps[prediction]()
    return (x - a * limited((x - s * found) / a, clip, threshold)) / s if limits else found


def dpm_step(
    x, outputs, prev=None, *, lambdas, alphas, sigmas, order, algorithm="dpmsolver++", solver_type="midpoint",
    third_order="published", lm=None, apply_to="increment", lm_on_sde=False, prediction=None, clip=None,
    threshold=None, guidance=None, noise=None, published=False,
):  # fmt: skip
    """(x', increment, converted outputs[0])."""
    W = dpm_weights(lambdas, alphas, sigmas, order, algorithm, solver_type, third_order)
    made = converted(x, outputs[0], alphas[1], sigmas[1], algorithm, prediction, guidance, clip, threshold)
    parts = W.differences([made, *outputs[1:]])
    N = sum(times(w, D) for w, D in zip(W.w, parts, strict=True))
    factor = LD(1)
    if apply_to == "direction":
        factor, N = W.prefactor, N / column(W.prefactor)
    if algorithm.startswith("sde") and not lm_on_sde:
        lm = None
    moved = times(W.scale, x) + column(factor) * bend(N, prev, lm, published)
    if noise is not None:
        moved = moved + times(W.noise, noise)
    return moved, N, made


# ------------------------------------------------------------------------------------------------------------- flow
def flow_step(
    x, velocity, prev=None, *, dt=None, sigma=None, sigma_next=None, stochastic=False, lm=None, guidance=None,
    active=None, noise=None, published=False,
):  # fmt: skip
    """(x', velocity) of algorithms.md §1.4."""
    x, v = wide(x), guided(velocity, guidance)
    bent = bend(v, prev, lm, published)
    if stochastic:
        s1 = wide(sigma_next)
        moved = times(1 - s1, x - times(sigma, bent)) + times(s1, noise)
    else:
        moved = x + times(wide(sigma_next) - wide(sigma) if dt is None else dt, bent)
    if active is not None:
        moved = np.where(np.asarray(active)[:, None], moved, x)
    return moved, v


# --------------------------------------------------------------------------------------------------------- Langevin
def langevin_size(score, noise, snr) -> np.ndarray:
    """[B]: h = 2(r‖ξ‖/‖score‖)², 0 where the score is 0."""
    n, z = (oracle.dot(wide(t), wide(t)) for t in (score, noise))
    return np.where(n == 0, LD(0), 2 * wide(snr) ** 2 * z / np.where(n == 0, LD(1), n))


def langevin_step(x, score, noise, *, step=None, snr=None, temperature=1.0, hessian=None) -> np.ndarray:
    """x + h·P·score + √(2hT)·P^½ ξ, P = H⁻¹ of (U [B, k, D], s [B, k], damping [B])."""
    x, drift, kick = wide(x), wide(score), wide(noise)
    h = wide(step) if snr is None else langevin_size(score, noise, snr)
    if hessian is not None:
        drift = oracle_lowrank.apply(oracle_lowrank.SOLVE, drift, *hessian)
        kick = oracle_lowrank.apply(oracle_lowrank.INV_SQRT, kick, *hessian)
    return x + times(h, drift) + times(np.sqrt(2 * h * wide(temperature)), kick)


def underdamped_step(
    x, v, score, noise, *, step, friction, temperature=1.0, scheme="baoab", start=False, finish=False
):
    """(x', v') of the schemes of contracts.md; `start` halves the kick, `finish` is the last half kick alone."""
    x, v, s = wide(x), wide(v), wide(score)
    h, gamma, T = (column(c) for c in (step, friction, temperature))
    c = np.exp(-gamma * h)

    def rub(v):
        return c * v + np.sqrt(T * -np.expm1(-2 * gamma * h)) * wide(noise)

    if scheme == "euler":
        v = v + h * (s - gamma * v) + np.sqrt(2 * gamma * T * h) * wide(noise)
        return x + h * v, v
    if finish:
        return x, v + h / 2 * s
    if scheme == "baoab":
        v = v + (h / 2 if start else h) * s
        x = x + h / 2 * v
        v = rub(v)
        return x + h / 2 * v, v
    v = rub(v if start else v + h / 2 * s) + h / 2 * s
    return x + h * v, v


def stationary(M, b) -> np.ndarray:
    """[n, n]: the covariance Σ = MΣMᵀ + bbᵀ of y' = My + bξ, float64."""
    M, b = np.asarray(M, np.float64), np.asarray(b, np.float64).reshape(len(M), -1)
    n = len(M)
    system = np.eye(n * n) - np.kron(M, M)
    return np.linalg.solve(system, (b @ b.T).reshape(-1)).reshape(n, n)


def linear_form(step) -> tuple[np.ndarray, np.ndarray]:
    """(M [2, 2], b [2]) of a linear scheme step(x, v, noise) -> (x', v') on arrays [1, 1]."""
    one, nil = np.ones((1, 1)), np.zeros((1, 1))
    columns = [step(*p) for p in ((one, nil, nil), (nil, one, nil), (nil, nil, one))]
    found = np.array([[float(np.asarray(c[i]).reshape(())) for c in columns] for i in range(2)])
    return found[:, :2], found[:, 2]
