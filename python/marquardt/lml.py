"""Steps of the LML samplers: DDIM and flow matching with a Levenberg–Marquardt–Langevin direction.

Each is one call of `lm_step`; the numbers come from `lml_coefficients`. DPM-Solver is in `lml_dpm.py`.
"""

from __future__ import annotations

import math

import torch

from . import checks, errors
from . import lml_coefficients as numbers
from .lml_coefficients import Pair
from .lml_common import (
    Guidance,
    add_noise,
    add_output,
    bounds,
    checked_active,
    guided,
    key_of,
    on_host,
    scalar,
    scale_of_x0,
    state,
    warn_orthogonal,
    within,
)
from .noise import Generator
from .scalars import Scalar
from .step import DIRECTION, EXTRAPOLATE, Step, known, lm_rule

Tensor = torch.Tensor


def lml_ddim_step(
    sample: Tensor,
    model_output: Tensor,
    prev_eps: Tensor | None = None,
    *,
    alpha_bar: Scalar,
    alpha_bar_next: Scalar,
    damping: Scalar | None = None,
    kappa: Scalar | None = None,
    extrapolation: Scalar | None = None,
    eta: Scalar = 0.0,
    prediction_type: str = "epsilon",
    clip: Scalar | None = None,
    threshold: tuple[Scalar, Scalar] | None = None,
    use_clipped_output: bool = False,
    guidance: Guidance | None = None,
    active: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generator = None,
    seed: Tensor | int | None = None,
    doubled: bool = False,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""One DDIM step along the Levenberg–Marquardt–Langevin direction, in one memory pass.

    With ᾱ = alpha_bar, ᾱ' = alpha_bar_next, and ε and x₀ of the model's output g by `prediction_type`,

        x' = √ᾱ' x₀ + √(1 − ᾱ' − s²) LM(ε; prev_eps) + s ξ,      s = η √((1 − ᾱ')/(1 − ᾱ) · (1 − ᾱ/ᾱ'))

    LM is `lm_direction` with (`damping`, `kappa`) or `extrapolation`: it keeps the norm of ε and turns it away from
    prev_eps, the ε of the step before. At κ = 0 or without prev_eps the step is plain DDIM, and costs that.

    Args:
        sample: x [B, *sample].
        model_output: g, like `sample`, in its dtype or a narrower one.
        prev_eps: the second result of the step before.
        alpha_bar, alpha_bar_next: numbers, 0-dim tensors or [B]: every sample may stand at a time of its own.
        damping, kappa, extrapolation: as in `lm_direction`. Only the part of the step behind √ᾱ' x₀ is bent, and ε
            counts in x₀ with the other sign: a step that looks ahead, as `lml_dpm_step` does with γ > 0, wants a
            small γ < 0 here (examples/lml_mixture.py). ‖ε‖² is about the number of elements of a sample, so κ‖ε‖² ≫
            damping leaves a step orthogonal to ε (a warning says so once); `extrapolation` has no such scale.
        eta: η ≥ 0; prediction_type: "epsilon", "sample" or "v_prediction".
        clip: x₀ is held within ±clip; ε is not computed anew unless `use_clipped_output`.
        threshold: (ratio, maximum) of `dynamic_threshold`, in place of clip.
        guidance: (uncond, scale): g = uncond + scale·(model_output − uncond).
        active: [B] bool; samples where it is False come back as they are, whatever the other tensors hold there.
        noise, generator, seed: ξ given, or drawn as in `affine_step`.
        doubled: x' twice behind one another, [2B, *sample]: the next input of a network that is asked with and
            without its condition.

    Returns:
        (x', ε): like `sample`; ε in the dtype of the model. Where ε is the model's output it is that very tensor.

    Paper: the LML diffusion sampler, on top of DDIM ("Denoising Diffusion Implicit Models").

    >>> import torch, marquardt as mq
    >>> x, eps = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.6, 0.0]])
    >>> mq.lml_ddim_step(x, eps, alpha_bar=0.64, alpha_bar_next=1.0)[0]
    tensor([[0.8000, 0.0000]])
    """
    op = "lml_ddim_step"
    key = None
    if (
        type(alpha_bar) is float
        and type(alpha_bar_next) is float
        and eta == 0
        and active is threshold is None
    ):
        key = key_of(
            op, (damping, kappa, extrapolation, clip), prev_eps, guidance,
            (alpha_bar, alpha_bar_next, prediction_type, use_clipped_output),
        )  # fmt: skip
        recipe = None if key is None else known(key, doubled, sample)
        if recipe is not None:
            outputs = [model_output] if guidance is None else [model_output, guidance[0]]
            new, direction, _ = recipe.run(op, sample, outputs, prev_eps, doubled, batch_dims)
            return new, direction if recipe.wanted & DIRECTION else model_output
    state(op, sample, batch_dims)
    alpha_bar, alpha_bar_next, damping, kappa, extrapolation, eta, clip = (
        scalar(op, name, value, sample, batch_dims)
        for name, value in (
            ("alpha_bar", alpha_bar), ("alpha_bar_next", alpha_bar_next), ("damping", damping), ("kappa", kappa),
            ("extrapolation", extrapolation), ("eta", eta), ("clip", clip),
        )
    )  # fmt: skip
    variant, rule, prev = lm_rule(op, prev_eps, "prev_eps", damping, kappa, extrapolation)
    checks.one_of(op, "prediction_type", prediction_type, numbers.PREDICTIONS)
    _check_alphas(op, alpha_bar, alpha_bar_next, prediction_type, use_clipped_output)
    within(op, "eta", eta, 0.0, math.inf, "be >= 0")
    bounds(op, clip, threshold)
    uncond, scale = guided(op, guidance, sample, batch_dims)
    at = numbers.ddim(prediction_type, alpha_bar, alpha_bar_next, eta)
    bounded = clip is not None or threshold is not None
    if use_clipped_output and not bounded:
        use_clipped_output = False
    if variant != EXTRAPOLATE and prev is not None:
        warn_orthogonal(op, kappa, damping, sample, batch_dims)

    base = Pair(0.0, 0.0) if bounded else at.base
    eps = Pair(1.0 / at.sigma, 0.0) if use_clipped_output else at.eps
    step = Step(
        op, sample, batch_dims, [base.x], [eps.x], prev=prev, prev_name="prev_eps", variant=variant, rule=rule
    )
    step.weight = at.weight
    x0 = at.x0
    if bounded:
        bound: Scalar = 1.0 if clip is None else clip
        if threshold is not None:
            divisor = scale_of_x0(
                op, sample, "model_output", model_output, uncond, scale, x0, threshold, batch_dims
            )
            x0 = x0.times(1.0 / divisor)
        step.y = (at.on_x0, -at.alpha / at.sigma if use_clipped_output else 0.0, bound)
    step.on_y, step.key = [x0.x], key
    add_output(step, "model_output", model_output, uncond, scale, base.g, eps.g, x0.g)
    add_noise(step, at.noise, noise, generator, seed)
    step.active = checked_active(op, active, sample, batch_dims)
    own = prediction_type == "epsilon" and uncond is None and not use_clipped_output
    new, direction, _ = step.run(0 if own else DIRECTION, doubled)
    return new, model_output if own else direction


def _check_alphas(op: str, alpha_bar: Scalar, alpha_bar_next: Scalar, prediction: str, clipped: bool) -> None:
    within(op, "alpha_bar", alpha_bar, 0.0, 1.0, "lie in [0, 1]")
    within(op, "alpha_bar_next", alpha_bar_next, 0.0, 1.0, "lie in [0, 1]")
    for known_bar in on_host(alpha_bar):
        if prediction == "epsilon" and known_bar == 0:
            raise errors.value(op, "alpha_bar", "be above 0 where the model predicts epsilon", known_bar)
        if (prediction == "sample" or clipped) and known_bar == 1:
            raise errors.value(op, "alpha_bar", "be below 1 where epsilon is made of x0", known_bar)


def lml_flow_step(
    sample: Tensor,
    velocity: Tensor,
    prev_velocity: Tensor | None = None,
    *,
    dt: Scalar | None = None,
    sigma: Scalar | None = None,
    sigma_next: Scalar | None = None,
    stochastic: bool = False,
    damping: Scalar | None = None,
    kappa: Scalar | None = None,
    extrapolation: Scalar | None = None,
    guidance: Guidance | None = None,
    active: Tensor | None = None,
    noise: Tensor | None = None,
    generator: Generator = None,
    seed: Tensor | int | None = None,
    doubled: bool = False,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""One Euler step of a flow along the Levenberg–Marquardt–Langevin direction, in one memory pass.

        x' = x + dt LM(v; prev_velocity),        dt given or sigma_next − sigma
        stochastic:  x' = (1 − σ')(x − σ LM(v)) + σ' ξ

    Args:
        sample: x [B, *sample], kept in float32 where the network works in a narrower dtype.
        velocity: v, like `sample` in its dtype or a narrower one.
        prev_velocity: the second result of the step before.
        dt: or sigma and sigma_next: numbers, 0-dim tensors or [B].
        damping, kappa, extrapolation: as in `lm_direction`.
        guidance, active, noise, generator, seed, doubled: as in `lml_ddim_step`.

    Returns:
        (x', v): v in the model's dtype; without guidance it is the tensor `velocity` itself.

    Paper: the LML diffusion sampler, on top of flow matching.

    >>> import torch, marquardt as mq
    >>> mq.lml_flow_step(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), dt=-0.5)[0]
    tensor([[0.5000, 0.0000]])
    """
    op = "lml_flow_step"
    key = None
    if type(dt) is float and not stochastic and active is None and sigma is sigma_next is None:
        key = key_of(op, (damping, kappa, extrapolation), prev_velocity, guidance, (dt,))
        recipe = None if key is None else known(key, doubled, sample)
        if recipe is not None:
            outputs = [velocity] if guidance is None else [velocity, guidance[0]]
            made, direction, _ = recipe.run(op, sample, outputs, prev_velocity, doubled, batch_dims)
            return made, direction if recipe.wanted & DIRECTION else velocity
    state(op, sample, batch_dims)
    dt, sigma, sigma_next, damping, kappa, extrapolation = (
        scalar(op, name, value, sample, batch_dims)
        for name, value in (
            ("dt", dt), ("sigma", sigma), ("sigma_next", sigma_next), ("damping", damping), ("kappa", kappa),
            ("extrapolation", extrapolation),
        )
    )  # fmt: skip
    variant, rule, prev = lm_rule(op, prev_velocity, "prev_velocity", damping, kappa, extrapolation)
    uncond, scale = guided(op, guidance, sample, batch_dims)
    on_x, weight, heat = _flow_numbers(op, dt, sigma, sigma_next, stochastic)
    if variant != EXTRAPOLATE and prev is not None:
        warn_orthogonal(op, kappa, damping, sample, batch_dims)
    step = Step(
        op,
        sample,
        batch_dims,
        [on_x],
        [0.0],
        prev=prev,
        prev_name="prev_velocity",
        variant=variant,
        rule=rule,
    )
    step.weight, step.key = weight, key
    add_output(step, "velocity", velocity, uncond, scale, 0.0, 1.0)
    add_noise(step, heat, noise, generator, seed)
    step.active = checked_active(op, active, sample, batch_dims)
    new, direction, _ = step.run(0 if uncond is None else DIRECTION, doubled)
    return new, velocity if uncond is None else direction


def _flow_numbers(
    op: str, dt: Scalar | None, sigma: Scalar | None, sigma_next: Scalar | None, stochastic: bool
) -> tuple[Scalar, Scalar, Scalar]:
    """Multiples of x, of LM(v) and of ξ."""
    if (dt is None) == (sigma is None or sigma_next is None) or (dt is not None and stochastic):
        raise errors.value(op, "dt", "be given, or sigma and sigma_next (and these where stochastic)", dt)
    if dt is not None:
        return 1.0, dt, 0.0
    assert sigma is not None and sigma_next is not None
    if not stochastic:
        return 1.0, sigma_next - sigma, 0.0
    return 1.0 - sigma_next, -(1.0 - sigma_next) * sigma, sigma_next
