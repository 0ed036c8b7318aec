"""Noise schedules and timesteps as Python numbers: what samplers compute once and on the host.

Tables are lists of float64, made by sums and products in float64, so that the coefficients of a step carry no rounding
of a float32 table. The timesteps are those of the published schedulers, number by number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from .. import checks, errors

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SPACINGS = ("linspace", "leading", "trailing")
TINY_SNR = 2.0**-24  # ᾱ of the last timestep where a sampler cannot start from 0: float16's smallest number


def steps(op: str, number: object) -> int:
    """A number of steps: a positive int."""
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise errors.value(op, "num_inference_steps", "be an int >= 1", number)
    return number


# --- the noise schedule of the training ------------------------------------------------------------------------------


def linspace(first: float, last: float, number: int) -> list[float]:
    """`number` evenly spaced values with both ends, in the order of operations of numpy's."""
    if number == 1:
        return [first]
    step = (last - first) / (number - 1)
    return [first + i * step for i in range(number - 1)] + [last]


def make_betas(
    op: str,
    number: int,
    *,
    start: float,
    end: float,
    schedule: str,
    trained: Iterable[float] | None = None,
) -> list[float]:
    """The variances β_t of `number` noising steps; `trained` overrides the schedule."""
    if trained is not None:
        betas = [float(beta) for beta in trained]
        if len(betas) != number:
            raise errors.value(
                op, "trained_betas", f"hold num_train_timesteps ({number}) numbers", len(betas)
            )
        return betas
    checks.one_of(op, "beta_schedule", schedule, BETA_SCHEDULES)
    if schedule == "linear":
        return linspace(start, end, number)
    if schedule == "scaled_linear":
        return [root * root for root in linspace(math.sqrt(start), math.sqrt(end), number)]
    edges = [math.cos((i / number + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(number + 1)]
    return [min(1 - after / before, 0.999) for before, after in zip(edges, edges[1:])]


def cumulative_alphas(betas: Sequence[float], zero_snr: bool = False) -> list[float]:
    """ᾱ_t = Π (1 − β); with `zero_snr` √ᾱ is shifted and scaled to end at 0 and keep its first value.

    >>> cumulative_alphas([0.5, 0.5])
    [0.5, 0.25]
    """
    kept, table = 1.0, []
    for beta in betas:
        kept *= 1.0 - beta
        table.append(kept)
    if not zero_snr:
        return table
    roots = [math.sqrt(alpha) for alpha in table]
    scale = roots[0] / (roots[0] - roots[-1])
    return [((root - roots[-1]) * scale) ** 2 for root in roots]


def vp_sigma(alpha_bar: float) -> float:
    """Noise over signal, √((1 − ᾱ)/ᾱ); infinite where no signal is left."""
    return math.sqrt((1 - alpha_bar) / alpha_bar) if alpha_bar > 0 else math.inf


def vp_scales(sigma: float) -> tuple[float, float]:
    """(α, σ) with α² + σ² = 1 of a noise-to-signal ratio."""
    alpha = 1 / math.sqrt(sigma * sigma + 1)
    return alpha, sigma * alpha


def flow_scales(sigma: float) -> tuple[float, float]:
    """(α, σ) of the straight path (1 − σ)·x0 + σ·noise."""
    return 1 - sigma, sigma


def half_log_snr(alpha: float, sigma: float) -> float:
    """λ = log α − log σ, infinite at both ends of the schedule."""
    if alpha <= 0 or sigma <= 0:
        return -math.inf if alpha <= 0 else math.inf
    return math.log(alpha) - math.log(sigma)


# --- timesteps -------------------------------------------------------------------------------------------------------


def _trailing(last: int, train: int, number: int) -> list[int]:
    """From `last` down in equal strides, minus one; the values of numpy's arange, whose ties round as there."""
    stride = train / number
    second = last - stride
    count = math.ceil(last / stride)  # what is left above 0
    return [round(last + i * (second - last)) - 1 for i in range(count)]


def ddim_timesteps(op: str, number: int, train: int, spacing: str, offset: int) -> list[int]:
    """Timesteps of DDIM, the first one first.

    >>> ddim_timesteps("", 4, 1000, "leading", 1)
    [751, 501, 251, 1]
    """
    checks.one_of(op, "timestep_spacing", spacing, SPACINGS)
    if number > train:
        raise errors.value(op, "num_inference_steps", f"be at most num_train_timesteps ({train})", number)
    if spacing == "linspace":
        return [round(t) for t in linspace(0, train - 1, number)][::-1]
    if spacing == "leading":
        return [i * (train // number) + offset for i in range(number)][::-1]
    return _trailing(train, train, number)


def dpm_timesteps(op: str, number: int, train: int, spacing: str, offset: int, last: int) -> list[int]:
    """Timesteps of DPM-Solver below `last`: one interval more than DDIM has, whose end is the final target.

    >>> dpm_timesteps("", 4, 1000, "linspace", 0, 1000)
    [999, 749, 500, 250]
    """
    checks.one_of(op, "timestep_spacing", spacing, SPACINGS)
    if spacing == "linspace":
        return [round(t) for t in linspace(0, last - 1, number + 1)][:0:-1]
    if spacing == "leading":
        return [i * (last // (number + 1)) + offset for i in range(number + 1)][:0:-1]
    return _trailing(last, train, number)


def last_timestep(alphas_bar: Sequence[float], lowest: float) -> int:
    """How many timesteps of the table have λ at or above `lowest` (where cosine schedules must be cut)."""
    lambdas = (half_log_snr(math.sqrt(a), math.sqrt(1 - a)) for a in alphas_bar)
    return sum(value >= lowest for value in lambdas)


def karras_sigmas(low: float, high: float, number: int) -> list[float]:
    """`number` ratios from `high` to `low`, evenly spaced in the seventh root (Karras et al.)."""
    return _spread(low, high, number, lambda sigma: sigma ** (1 / 7), lambda root: root**7)


def exponential_sigmas(low: float, high: float, number: int) -> list[float]:
    """`number` ratios from `high` to `low`, evenly spaced in the logarithm."""
    return _spread(low, high, number, math.log, math.exp)


def _spread(
    low: float, high: float, number: int, to: Callable[[float], float], back: Callable[[float], float]
) -> list[float]:
    """Evenly spaced after `to`. The ends are exact: a step from `low` to `low` has no length, not a rounding's."""
    inner = [back(value) for value in linspace(to(high), to(low), number)[1:-1]]
    return [high, *inner, low][:number]


def sigma_timestep(sigma: float, sigmas: Sequence[float]) -> float:
    """Where `sigma` lies in the ascending table, linear in the logarithm; a fraction of a timestep."""
    value = math.log(max(sigma, 1e-10))
    low = max((i for i, s in enumerate(sigmas) if math.log(s) <= value), default=0)
    low = min(low, len(sigmas) - 2)
    below, above = math.log(sigmas[low]), math.log(sigmas[low + 1])
    return low + min(max((value - below) / (above - below), 0.0), 1.0)


def interpolate(timesteps: Sequence[float], table: Sequence[float]) -> list[float]:
    """The table at the timesteps, linear in between and constant beyond its ends."""
    values = []
    for t in timesteps:
        low = min(max(math.floor(t), 0), len(table) - 1)
        high = min(low + 1, len(table) - 1)
        part = min(max(t - low, 0.0), 1.0)
        values.append(table[low] if part == 0 else (1 - part) * table[low] + part * table[high])
    return values


# --- flow matching ---------------------------------------------------------------------------------------------------


def shifted(shift: float, sigma: float) -> float:
    """σ moved towards noise by `shift`: s·σ / (1 + (s − 1)·σ)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def _mover(op: str, shift: float, mu: float | None, kind: str) -> Callable[[float], float]:
    """What moves each σ: the fixed shift, or with `mu` that of the image's size (e^μ, or μ itself)."""
    if mu is None:
        return lambda sigma: shifted(shift, sigma)
    checks.one_of(op, "time_shift_type", kind, ("exponential", "linear"))
    weight = math.exp(mu) if kind == "exponential" else mu
    return lambda sigma: weight / (weight + (1 / sigma - 1)) if sigma > 0 else 0.0


def flow_sigmas(
    op: str,
    number: int,
    train: int,
    *,
    shift: float = 1.0,
    mu: float | None = None,
    time_shift: str = "exponential",
    terminal: float | None = None,
    given: Sequence[float] | None = None,
) -> list[float]:
    """Noise levels of flow matching, the first one first, without the final one.

    The range of the default levels is that of the training levels, which a fixed shift has moved once already; the
    shift is applied again to what lies in between, as the published scheduler does.

    >>> flow_sigmas("", 4, 1000, given=[1.0, 0.75, 0.5, 0.25], shift=3.0)
    [1.0, 0.9, 0.75, 0.5]
    """
    lowest = 1 / train if mu is not None else shifted(shift, 1 / train)
    levels = list(given) if given is not None else linspace(1.0, lowest, number)
    move = _mover(op, shift, mu, time_shift)
    levels = [move(float(level)) for level in levels]
    if terminal:
        stretch = (1 - levels[-1]) / (1 - terminal)
        levels = [1 - (1 - level) / stretch for level in levels]
    return levels


# --- which order a multistep solver takes ----------------------------------------------------------------------------


def dpm_order(
    index: int, number: int, *, solver_order: int, known: int, lower_final: bool, first_order_final: bool
) -> int:
    """Order of step `index` of `number` with `known` older outputs at hand; short runs end in lower orders.

    >>> [dpm_order(i, 5, solver_order=3, known=i, lower_final=True, first_order_final=False) for i in range(5)]
    [1, 2, 3, 2, 1]
    """
    lowered = lower_final and number < 15
    order = min(solver_order, known + 1)
    if index == number - 1 and (first_order_final or lowered):
        return 1
    return min(order, 2) if index == number - 2 and lowered else order
