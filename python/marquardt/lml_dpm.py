"""The DPM-Solver step of the LML samplers: a multistep update with a Levenberg–Marquardt–Langevin direction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import checks, errors
from . import lml_coefficients as numbers
from .lml_common import (
    Guidance,
    add_noise,
    add_output,
    bounds,
    guided,
    key_of,
    scalar,
    scale_of_x0,
    state,
    state_like,
    warn_orthogonal,
)
from .noise import Generator
from .scalars import Scalar
from .step import CONVERTED, DIRECTION, EXTRAPOLATE, STATE_DIRECTION, Step, known, lm_rule

Tensor = torch.Tensor


def _key(
    op: str, rule: tuple[Any, ...], prev: Tensor | None, levels: tuple[Any, ...], rest: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Under what the numbers of an update are kept, if all of them are plain floats."""
    rows = []
    for row in levels:
        if type(row) not in (list, tuple):
            return None
        for number in row:
            if type(number) is not float:
                return None
        rows.append(tuple(row))
    return key_of(op, rule, prev, None, (tuple(rows), rest))


def _sequence(op: str, name: str, values: Any, count: int, sample: Any, batch_dims: int) -> list[Scalar]:
    """(target, s0, …) as `count` scalars."""
    if isinstance(values, torch.Tensor):
        if values.dim() != 1:
            raise errors.value(op, name, "be a sequence or a tensor of one dimension", list(values.shape))
        values = (
            values.tolist() if values.device.type == "cpu" and not values.requires_grad else values.unbind()
        )
    elif not isinstance(values, Sequence) or isinstance(values, str):
        raise errors.kind(op, name, "be a sequence or a tensor of one dimension", type(values).__name__)
    values = list(values)
    if len(values) < count:
        raise errors.value(op, name, f"hold (target, s0, …), {count} numbers for this order", len(values))
    return [scalar(op, f"{name}[{i}]", v, sample, batch_dims) for i, v in enumerate(values[:count])]


def _check_dpm(
    op: str, order: Any, algorithm: str, solver_type: str, third_order: str, apply_to: str
) -> None:
    checks.one_of(op, "algorithm", algorithm, numbers.ALGORITHMS)
    checks.one_of(op, "solver_type", solver_type, numbers.SOLVERS)
    checks.one_of(op, "third_order", third_order, numbers.THIRD_ORDERS)
    checks.one_of(op, "apply_to", apply_to, ("increment", "direction"))
    highest = 2 if algorithm == "sde-dpmsolver" else 3
    if order not in range(1, highest + 1):
        raise errors.value(op, "order", f"be 1 to {highest} for {algorithm}", order)


def _history(op: str, outputs: Any, order: int) -> list[Tensor]:
    history = [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)
    if len(history) < order:
        raise errors.value(op, "outputs", f"hold at least {order} tensors for order {order}", len(history))
    return history


def _check_converted(op: str, prediction_type: str | None, guidance: Any, clip: Any, threshold: Any) -> None:
    """Guidance and bounds are for what a network gave."""
    if prediction_type is not None:
        return checks.one_of(op, "prediction_type", prediction_type, numbers.PREDICTIONS)
    for name, given in (("guidance", guidance), ("clip", clip), ("threshold", threshold)):
        if given is not None:
            rule = "come with prediction_type: converted outputs are taken as they are"
            raise errors.value(op, name, rule, given)


def _check_noise_levels(op: str, lambdas: list[Scalar]) -> None:
    """Of those that the host knows: the last step to σ = 0 is one of first order."""
    known = [v for v in lambdas if isinstance(v, float)]
    if len(known) == len(lambdas):
        if len(known) > 2 and not all(math.isfinite(v) for v in known):
            raise errors.value(op, "lambdas", "be finite above order 1", known)
        if math.isnan(known[0] - known[1]) or known[0] == known[1]:
            raise errors.value(op, "lambdas", "differ from step to step", known)


def lml_dpm_step(
    sample: Tensor,
    outputs: Sequence[Tensor] | Tensor,
    prev_increment: Tensor | None = None,
    *,
    lambdas: Sequence[Scalar] | Tensor,
    alphas: Sequence[Scalar] | Tensor,
    sigmas: Sequence[Scalar] | Tensor,
    order: int,
    algorithm: str = "dpmsolver++",
    solver_type: str = "midpoint",
    third_order: str = "published",
    damping: Scalar | None = None,
    kappa: Scalar | None = None,
    extrapolation: Scalar | None = None,
    apply_to: str = "increment",
    lm_on_sde: bool = False,
    prediction_type: str | None = None,
    clip: Scalar | None = None,
    threshold: tuple[Scalar, Scalar] | None = None,
    guidance: Guidance | None = None,
    noise: Tensor | None = None,
    generator: Generator = None,
    seed: Tensor | int | None = None,
    doubled: bool = False,
    batch_dims: int = 1,
) -> tuple[Tensor, ...]:
    r"""One multistep DPM-Solver update along the Levenberg–Marquardt–Langevin direction, in one memory pass.

        x' = a x + LM(N; prev_increment) + s ξ,     N = Σ_j c_j m_j

    with the numbers of the algorithm, in float64 through expm1 and series: a = α/α_s0 and exponentials of
    h = λ − λ_s0 for "dpmsolver" (m_j are ε), a = σ/σ_s0 and those of −h for "dpmsolver++" (m_j are x₀); the SDE forms
    add noise. LM is `lm_direction`; at κ = 0 or without prev_increment the update is the plain one.

    Args:
        sample: x [B, *sample].
        outputs: m_0 (the newest), m_1, …: at least `order` of them.
        prev_increment: the second result of the step before.
        lambdas, alphas, sigmas: λ = log(α/σ), α and σ at (target, s0, s1, s2): order + 1 numbers each.
        order: 1 to 3; solver_type: "midpoint" or "heun", for order 2.
        third_order: "published" (the tables in use, whose local order is 3; for sde-dpmsolver++ with the factor of D2
            that is in use, which does not vanish with h) or "exact" (the Taylor series; local order 4).
        damping, kappa, extrapolation: as in `lm_direction`.
        apply_to: LM bends N, as published ("increment"), or N less its factor in front ("direction"), whose norm does
            not change with the length of the step.
        lm_on_sde: whether LM applies to the SDE forms too (their increment without noise).
        prediction_type: None: all outputs are converted. Else outputs[0] is what the network gave ("epsilon",
            "sample" or "v_prediction"); it is guided and converted here, x₀ within `clip` or `threshold`.
        guidance: (uncond, scale), of a raw outputs[0].

    Returns:
        (x', N or the direction in the state's dtype), and with prediction_type the converted m_0 in the model's dtype
        as the third, to be kept for the next steps.

    Paper: the LML diffusion sampler, on top of DPM-Solver and DPM-Solver++.

    >>> import math, torch, marquardt as mq
    >>> alphas, sigmas = [0.8, 0.6], [0.6, 0.8]
    >>> x, x0 = torch.tensor([[1.0]]), torch.tensor([[0.5]])
    >>> mq.lml_dpm_step(
    ...     x, [x0], lambdas=[math.log(a / s) for a, s in zip(alphas, sigmas)], alphas=alphas, sigmas=sigmas, order=1
    ... )[0]
    tensor([[0.9250]])
    """
    op = "lml_dpm_step"
    state_like(op, "prev_increment", prev_increment, sample)
    key = None
    plain = prediction_type is guidance is clip is threshold is None and not algorithm.startswith("sde")
    if plain and type(outputs) is list and type(order) is int:
        key = _key(
            op, (damping, kappa, extrapolation), prev_increment, (lambdas, alphas, sigmas),
            (order, algorithm, solver_type, third_order, apply_to),
        )  # fmt: skip
        recipe = None if key is None else known(key, doubled, sample)
        if recipe is not None and len(outputs) >= order:
            new, increment, _ = recipe.run(op, sample, outputs[:order], prev_increment, doubled, batch_dims)
            return new, increment
    _check_dpm(op, order, algorithm, solver_type, third_order, apply_to)
    history = _history(op, outputs, order)
    _check_converted(op, prediction_type, guidance, clip, threshold)
    state(op, sample, batch_dims)
    lam, alpha, sigma = (
        _sequence(op, name, values, order + 1, sample, batch_dims)
        for name, values in (("lambdas", lambdas), ("alphas", alphas), ("sigmas", sigmas))
    )
    _check_noise_levels(op, lam)
    damping, kappa, extrapolation, clip = (
        scalar(op, name, value, sample, batch_dims)
        for name, value in (
            ("damping", damping), ("kappa", kappa), ("extrapolation", extrapolation), ("clip", clip),
        )
    )  # fmt: skip
    bounds(op, clip, threshold)
    variant, rule, prev = lm_rule(op, prev_increment, "prev_increment", damping, kappa, extrapolation)
    if algorithm.startswith("sde") and not lm_on_sde:
        prev = None
    at = numbers.dpm(algorithm, order, solver_type, third_order, lam, alpha, sigma)
    if variant != EXTRAPOLATE and prev is not None:
        unit = 1.0 if apply_to == "direction" else at.prefactor
        if isinstance(unit, float):
            warn_orthogonal(op, kappa, damping, sample, batch_dims, unit)

    weight: Scalar = 1.0
    direction = at.direction
    if apply_to == "direction":
        weight, direction = at.prefactor, tuple(c / at.prefactor for c in direction)
    step = Step(op, sample, batch_dims, [at.on_x], [0.0], variant=variant, rule=rule, weight=weight, key=key)
    step.prev, step.prev_name = prev, "prev_increment"
    kept: Tensor | None = None
    converts = prediction_type is not None
    if converts:
        kept = _add_raw(
            step, history[0], prediction_type, algorithm, alpha[1], sigma[1], direction[0], clip, threshold, guidance
        )  # fmt: skip
    else:
        step.add("outputs[0]", history[0], 0.0, direction[0])
    for j in range(1, order):
        step.add(f"outputs[{j}]", history[j], 0.0, direction[j])
    add_noise(step, at.noise, noise, generator, seed)
    wanted = STATE_DIRECTION | (CONVERTED if converts and kept is None else 0)
    new, increment, made = step.run(wanted, doubled)
    if not converts:
        return new, increment
    return new, increment, made if kept is None else kept


def _add_raw(
    step: Step, output: Tensor, prediction: Any, algorithm: str, alpha: Scalar, sigma: Scalar, d: Scalar,
    clip: Scalar | None, threshold: Any, guidance: Any,
) -> Tensor | None:  # fmt: skip
    """Adds what the network gave; returns m_0 where it is there before the step, else it is row y of the step."""
    op, sample, batch_dims = step.op, step.sample, step.batch_dims
    uncond, scale = guided(op, guidance, sample, batch_dims)
    eps, x0 = numbers.converted(prediction, numbers.wide(alpha), numbers.wide(sigma))
    on_data = algorithm.endswith("++")
    wanted, bounded = x0 if on_data else eps, clip is not None or threshold is not None
    own = prediction == ("sample" if on_data else "epsilon")  # conversion is the identity
    if own and not bounded and uncond is None:
        step.add("outputs[0]", output, 0.0, d)
        return output
    bound: Scalar = math.inf if clip is None else clip
    if threshold is not None:
        divisor = scale_of_x0(op, sample, "outputs[0]", output, uncond, scale, x0, threshold, batch_dims)
        x0, bound = x0.times(1.0 / divisor), 1.0
        wanted = x0 if on_data else wanted
    if bounded and not on_data:  # m_0 = (x − α·y)/σ with y the bounded x₀; kept by a pass of its own
        a, s = numbers.wide(alpha), numbers.wide(sigma)
        alone = Step(
            op, sample, batch_dims, [0.0], [1.0 / s], weight=0.0, y=(0.0, -a / s, bound), on_y=[x0.x]
        )
        add_output(alone, "outputs[0]", output, uncond, scale, 0.0, 0.0, x0.g)
        step.d[0], step.y, step.on_y = d / s, (0.0, -d * a / s, bound), [x0.x]
        add_output(step, "outputs[0]", output, uncond, scale, 0.0, 0.0, x0.g)
        return alone.run(DIRECTION)[1]
    step.y, step.on_y = (0.0, d, bound), [wanted.x]
    add_output(step, "outputs[0]", output, uncond, scale, 0.0, 0.0, wanted.g)
    return None
