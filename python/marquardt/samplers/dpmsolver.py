"""DPM-Solver and DPM-Solver++ multistep, and their SDE forms, with the Levenberg–Marquardt–Langevin direction."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from .. import checks, errors
from ..lml_coefficients import ALGORITHMS, PREDICTIONS, SOLVERS, THIRD_ORDERS
from ..lml_dpm import lml_dpm_step
from ..scalars import Scalar
from . import schedules
from .base import VARIANCES, Correction, Generator, Guidance, Sampler

Tensor = torch.Tensor

FINALS = ("zero", "sigma_min")


class LMLDPMSolver(Sampler):
    r"""Multistep DPM-Solver whose increment is damped by a rank-one Hessian.

        x' = a·x + LM(N; previous N),   N = c0·m0 + c1·m1 + c2·m2

    with the last converted outputs m and the coefficients of Lu et al. One call of `marquardt.lml_dpm_step` a step.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr,
            prediction_type, variance_type, steps_offset, timestep_spacing, freeze: as in `LMLDDIM`.
        solver_order: 1, 2 or 3; the SDE form of "dpmsolver" has no third order.
        algorithm_type: "dpmsolver", "dpmsolver++", "sde-dpmsolver" or "sde-dpmsolver++".
        solver_type: second order by "midpoint" or "heun".
        third_order: "published", or "exact" with the coefficient that Taylor's series gives.
        lower_order_final: runs of fewer than 15 steps end in second and first order.
        euler_at_final: the last step is of first order in any case.
        final_sigmas_type: the last target is "zero" noise, which makes the last step one of first order, or that of
            timestep 0 ("sigma_min"); by default the first where it exists, in the ++ algorithms.
        use_karras_sigmas, use_exponential_sigmas: noise levels evenly spaced in σ^(1/7) or log σ.
        lambda_min_clipped: timesteps whose log-SNR is below are left out; needed by cosine schedules.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0.
        damping, kappa, extrapolation: as in `LMLDDIM`; the previous increment takes the place of the previous ε.
        apply_to: "increment" corrects N, as published; "direction" N without its step size, which leaves two steps
            of different sizes comparable.
        lm_on_sde: also corrects the increments of SDE forms, without their noise.

    >>> import torch
    >>> from marquardt.samplers import LMLDPMSolver
    >>> sampler = LMLDPMSolver(solver_order=2, damping=1.0, kappa=0.1)
    >>> sampler.set_timesteps(4)
    >>> x = torch.randn(2, 3, 8, 8)
    >>> for t in sampler.timesteps:
    ...     x = sampler.step(0.5 * x, t, x)
    >>> sampler.timesteps.tolist()
    [999, 749, 500, 250]
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Iterable[float] | None = None,
        solver_order: int = 2,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        algorithm_type: str = "dpmsolver++",
        solver_type: str = "midpoint",
        third_order: str = "published",
        lower_order_final: bool = True,
        euler_at_final: bool = False,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        final_sigmas_type: str | None = None,
        lambda_min_clipped: float = -math.inf,
        variance_type: str | None = None,
        timestep_spacing: str = "linspace",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        damping: Scalar | None = None,
        kappa: Scalar | None = None,
        extrapolation: Scalar | None = None,
        freeze: float = 0.0,
        apply_to: str = "increment",
        lm_on_sde: bool = False,
    ) -> None:
        op = type(self).__name__
        plus = algorithm_type.endswith("++")
        final = final_sigmas_type or ("zero" if plus else "sigma_min")
        for name, value, allowed in (
            ("solver_order", solver_order, (1, 2, 3)),
            ("prediction_type", prediction_type, PREDICTIONS),
            ("algorithm_type", algorithm_type, ALGORITHMS),
            ("solver_type", solver_type, SOLVERS),
            ("third_order", third_order, THIRD_ORDERS),
            ("final_sigmas_type", final, FINALS if plus else FINALS[1:]),
            ("variance_type", variance_type, VARIANCES),
            ("timestep_spacing", timestep_spacing, schedules.SPACINGS),
            ("apply_to", apply_to, ("increment", "direction")),
        ):
            checks.one_of(op, name, value, allowed)
        if solver_order == 3 and algorithm_type == "sde-dpmsolver":
            raise errors.value(op, "solver_order", "be 1 or 2 with sde-dpmsolver", 3)
        if use_karras_sigmas and use_exponential_sigmas:
            raise errors.value(op, "use_exponential_sigmas", "come without use_karras_sigmas", "both")
        correction = Correction.checked(op, damping, kappa, extrapolation, freeze)
        super().__init__(correction, num_train_timesteps, variance_type)
        betas = schedules.make_betas(
            op,
            num_train_timesteps,
            start=beta_start,
            end=beta_end,
            schedule=beta_schedule,
            trained=trained_betas,
        )
        self.alphas_cumprod = schedules.cumulative_alphas(betas, rescale_betas_zero_snr)
        if rescale_betas_zero_snr:
            self.alphas_cumprod[-1] = schedules.TINY_SNR  # λ of the first step is a number
        self.solver_order = solver_order
        self.prediction_type = prediction_type
        self.algorithm_type = algorithm_type
        self.solver_type = solver_type
        self.third_order = third_order
        self.lower_order_final = lower_order_final
        self.first_order_final = euler_at_final or final == "zero"
        self.final_sigmas_type = final
        self.spread = {(True, False): "karras", (False, True): "exponential"}.get(
            (use_karras_sigmas, use_exponential_sigmas), ""
        )
        self.keeps_fractions = beta_schedule == "squaredcos_cap_v2"
        self.lambda_min_clipped = lambda_min_clipped
        self.timestep_spacing = timestep_spacing
        self.steps_offset = steps_offset
        self.apply_to = apply_to
        self.lm_on_sde = lm_on_sde
        self.threshold = (dynamic_thresholding_ratio, sample_max_value) if thresholding else None
        self.model_outputs: list[Tensor] = []  # converted, newest first
        self.prev_increment: Tensor | None = None
        # At each timestep and at the final target.
        self._levels: list[float] = []
        self._alphas: list[float] = []
        self._scales: list[float] = []
        self._lambdas: list[float] = []

    # --- schedule ---

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Chooses the timesteps, or takes those given, and forgets the last trajectory."""
        op = self._op("set_timesteps")
        if (num_inference_steps is None) == (timesteps is None):
            got = "neither" if timesteps is None else "both"
            raise errors.value(op, "num_inference_steps", "be given, or else timesteps", got)
        if timesteps is not None:
            chosen, levels = self._given(op, timesteps)
        else:
            chosen, levels = self._chosen(op, schedules.steps(op, num_inference_steps))
        last = schedules.vp_sigma(self.alphas_cumprod[0]) if self.final_sigmas_type == "sigma_min" else 0.0
        self._levels = [*levels, last]
        pairs = [schedules.vp_scales(level) for level in self._levels]
        self._alphas, self._scales = [alpha for alpha, _ in pairs], [sigma for _, sigma in pairs]
        self._lambdas = [schedules.half_log_snr(*pair) for pair in pairs]
        self._start(chosen, device, torch.int64)

    def _given(self, op: str, timesteps: Sequence[int]) -> tuple[list[int], list[float]]:
        if self.spread:
            raise errors.value(op, "timesteps", f"come without use_{self.spread}_sigmas", "both")
        chosen = [int(t) for t in timesteps]
        if not chosen or any(later >= t for t, later in zip(chosen, chosen[1:])):
            raise errors.value(op, "timesteps", "descend", chosen)
        return chosen, self._levels_at(op, chosen)

    def _chosen(self, op: str, number: int) -> tuple[list[int], list[float]]:
        train = self.num_train_timesteps
        if not self.spread:
            last = schedules.last_timestep(self.alphas_cumprod, self.lambda_min_clipped)
            chosen = schedules.dpm_timesteps(
                op, number, train, self.timestep_spacing, self.steps_offset, last
            )
            return chosen, self._levels_at(op, chosen)
        table = [schedules.vp_sigma(alpha) for alpha in self.alphas_cumprod]
        spread = schedules.karras_sigmas if self.spread == "karras" else schedules.exponential_sigmas
        levels = spread(table[0], table[-1], number)
        fractions = [schedules.sigma_timestep(level, table) for level in levels]
        if self.spread == "karras" and not self.keeps_fractions:
            return [round(t) for t in fractions], levels
        return [int(t) for t in fractions], levels

    def _levels_at(self, op: str, timesteps: Sequence[int]) -> list[float]:
        if not 0 <= min(timesteps) <= max(timesteps) < self.num_train_timesteps:
            rule = f"lie between 0 and num_train_timesteps − 1 ({self.num_train_timesteps - 1})"
            raise errors.value(op, "timesteps", rule, list(timesteps))
        return [schedules.vp_sigma(self.alphas_cumprod[t]) for t in timesteps]

    @property
    def sigmas(self) -> Tensor:
        """Noise over signal at each timestep and at the end, float64 on the CPU."""
        self._known("sigmas")
        return torch.tensor(self._levels, dtype=torch.float64)

    # --- steps ---

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        guidance: Guidance = None,
        noise: Tensor | None = None,
        generator: Generator = None,
        seed: Tensor | int | None = None,
        doubled: bool = False,
    ) -> Tensor:
        """The next sample; arguments and what is kept as in `LMLDDIM.step`.

        The first steps have the order that the outputs at hand allow, wherever the trajectory starts.
        """
        index = self._enter(timestep, sample)
        if self._levels[index] == self._levels[index + 1]:  # spread levels reach the final one a step early
            self._leave(index, sample)
            return torch.cat([sample, sample]) if doubled else sample.clone()
        order = self._order(index)
        window = [index + 1, *(max(index - age, 0) for age in range(order))]  # target, s0, s1, s2
        extra = self.correction.at(self._known("step").values[index], self.num_train_timesteps)
        result, increment, converted = lml_dpm_step(
            sample,
            [self._mean(model_output, sample), *self.model_outputs][:order],
            self.prev_increment if extra else None,
            lambdas=[self._lambdas[i] for i in window],
            alphas=[self._alphas[i] for i in window],
            sigmas=[self._scales[i] for i in window],
            order=order,
            algorithm=self.algorithm_type,
            solver_type=self.solver_type,
            third_order=self.third_order,
            apply_to=self.apply_to,
            lm_on_sde=self.lm_on_sde,
            prediction_type=self.prediction_type,
            threshold=self.threshold,
            guidance=self._mean_guidance(guidance, sample),
            noise=noise,
            generator=generator,
            seed=self._seed(seed, index, sample),
            doubled=doubled,
            **extra,
        )
        self.model_outputs = [converted, *self.model_outputs][: self.solver_order - 1]
        if self.correction.on:
            self.prev_increment = increment
        self._leave(index, sample)
        return result

    def _order(self, index: int) -> int:
        return schedules.dpm_order(
            index,
            len(self._levels) - 1,
            solver_order=self.solver_order,
            known=len(self.model_outputs),
            lower_final=self.lower_order_final,
            first_order_final=self.first_order_final,
        )

    def _forget(self) -> None:
        self.model_outputs = []
        self.prev_increment = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """α·x + σ·noise at timesteps: an int, [1] or [B].

        They are timesteps of the training, or of the schedule where its noise levels are spread.
        """
        if self.spread:
            alphas, scales = self._alphas, self._scales
        else:
            alphas = [alpha**0.5 for alpha in self.alphas_cumprod]
            scales = [(1 - alpha) ** 0.5 for alpha in self.alphas_cumprod]
        if isinstance(timesteps, int):
            where = self._known("add_noise").values.index(timesteps) if self.spread else timesteps
            return self._mix(original_samples, noise, [alphas[where], scales[where]])
        rows = self._table([alphas, scales], noise.device)
        at = timesteps.to(noise.device)
        if self.spread:  # found by comparison, so that the host need not know them
            at = (at.reshape(-1, 1) == self.timesteps.to(noise.device)).to(torch.uint8).argmax(1)
        return self._mix(original_samples, noise, [row[at] for row in rows])
