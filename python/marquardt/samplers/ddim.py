"""DDIM with the Levenberg–Marquardt–Langevin direction."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from .. import checks, errors
from ..lml import lml_ddim_step
from ..lml_coefficients import PREDICTIONS
from ..scalars import Scalar
from . import schedules
from .base import VARIANCES, Correction, Generator, Guidance, Sampler

Tensor = torch.Tensor


class LMLDDIM(Sampler):
    r"""Denoising diffusion implicit models whose direction is damped by a rank-one Hessian.

        x' = √ᾱ'·x0 + √(1 − ᾱ' − σ²)·LM(ε; previous ε) + σ·ξ,   σ = η·√((1 − ᾱ')/(1 − ᾱ)·(1 − ᾱ/ᾱ'))

    One call of `marquardt.lml_ddim_step` a step. The defaults are those of the published scheduler, which has a
    `damping` (its `lamb`) and κ = 0: plain DDIM. As there, ᾱ' belongs to the timestep `num_train_timesteps // n` below,
    whatever the spacing.

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the noise
            schedule of the training; schedules are "linear", "scaled_linear", "squaredcos_cap_v2".
        clip_sample, clip_sample_range: clamps x0.
        thresholding, dynamic_thresholding_ratio, sample_max_value: dynamic thresholding of x0, instead of the clamp.
        set_alpha_to_one: ᾱ' of the last step is 1, else that of timestep 0.
        steps_offset, timestep_spacing: which timesteps; "leading", "trailing" or "linspace".
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
        variance_type: "learned" or "learned_range" for networks with twice the channels, whose first half is taken.
        damping, kappa: λ and κ of the correction, or `extrapolation`, its γ; numbers or tensors, see
            `marquardt.lm_direction`.
        freeze: steps at timesteps from (1 − freeze)·num_train_timesteps up are not corrected.

    >>> import torch
    >>> from marquardt.samplers import LMLDDIM
    >>> sampler = LMLDDIM(damping=1.0, kappa=0.1, clip_sample=False)
    >>> sampler.set_timesteps(4)
    >>> x = torch.randn(2, 3, 8, 8)
    >>> for t in sampler.timesteps:
    ...     x = sampler.step(0.5 * x, t, x)  # in place of a network
    >>> x.shape, sampler.timesteps.tolist()
    (torch.Size([2, 3, 8, 8]), [750, 500, 250, 0])
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Iterable[float] | None = None,
        clip_sample: bool = True,
        clip_sample_range: float = 1.0,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        sample_max_value: float = 1.0,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        variance_type: str | None = None,
        damping: Scalar | None = None,
        kappa: Scalar | None = None,
        extrapolation: Scalar | None = None,
        freeze: float = 0.0,
    ) -> None:
        op = type(self).__name__
        checks.one_of(op, "prediction_type", prediction_type, PREDICTIONS)
        checks.one_of(op, "timestep_spacing", timestep_spacing, schedules.SPACINGS)
        checks.one_of(op, "variance_type", variance_type, VARIANCES)
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
        self.final_alpha_cumprod = 1.0 if set_alpha_to_one else self.alphas_cumprod[0]
        self.prediction_type = prediction_type
        self.timestep_spacing = timestep_spacing
        self.steps_offset = steps_offset
        self.clip = clip_sample_range if clip_sample and not thresholding else None
        self.threshold = (dynamic_thresholding_ratio, sample_max_value) if thresholding else None
        self.prev_eps: Tensor | None = None
        self._alphas: list[tuple[float, float]] = []  # (ᾱ, ᾱ') of each step

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Chooses the timesteps and forgets the last trajectory."""
        op = self._op("set_timesteps")
        number, train = schedules.steps(op, num_inference_steps), self.num_train_timesteps
        timesteps = schedules.ddim_timesteps(op, number, train, self.timestep_spacing, self.steps_offset)
        if timesteps[0] >= train:
            rule = f"leave all timesteps below num_train_timesteps ({train})"
            raise errors.value(op, "steps_offset", rule, self.steps_offset)
        self._alphas = [self._alpha_pair(t, t - train // number) for t in timesteps]
        self._start(timesteps, device, torch.int64)

    def _alpha_pair(self, timestep: int, following: int) -> tuple[float, float]:
        table = self.alphas_cumprod
        return table[timestep], table[following] if following >= 0 else self.final_alpha_cumprod

    @property
    def sigmas(self) -> Tensor:
        """Noise over signal at each timestep and at the end, float64 on the CPU."""
        self._known("sigmas")
        ratios = [schedules.vp_sigma(alpha) for alpha, _ in self._alphas]
        return torch.tensor([*ratios, schedules.vp_sigma(self._alphas[-1][1])], dtype=torch.float64)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        eta: Scalar = 0.0,
        use_clipped_model_output: bool = False,
        guidance: Guidance = None,
        active: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generator = None,
        seed: Tensor | int | None = None,
        doubled: bool = False,
    ) -> Tensor:
        """The next sample.

        ε of the step is kept for the next one, as the network's own tensor where nothing converts it: a network that
        writes its outputs to one buffer must hand over a copy.

        Args:
            model_output: what the network says about `sample`, [B, *sample].
            timestep: any of `timesteps` for the first step (image-to-image starts in the middle), then the following
                ones; a number, a tensor, or None to count on.
            sample: [B, *sample]; its shape, dtype and device stay the same over a trajectory.
            eta: η, 0 for DDIM and 1 for the noise of DDPM.
            use_clipped_model_output: ε is computed anew from the clamped x0.
            guidance: (output without the condition, scale) of classifier-free guidance.
            active: [B] bool; where False the sample comes back as it is.
            noise, generator, seed: where ξ comes from; an int `seed` may be the same in all steps.
            doubled: returns the new sample twice, [2B, *sample]: the next input of a doubled network.
        """
        index = self._enter(timestep, sample)
        extra = self.correction.at(self._known("step").values[index], self.num_train_timesteps)
        alpha_bar, following = self._alphas[index]
        result, eps = lml_ddim_step(
            sample,
            self._mean(model_output, sample),
            self.prev_eps if extra else None,
            alpha_bar=alpha_bar,
            alpha_bar_next=following,
            eta=eta,
            prediction_type=self.prediction_type,
            clip=self.clip,
            threshold=self.threshold,
            use_clipped_output=use_clipped_model_output,
            guidance=self._mean_guidance(guidance, sample),
            active=active,
            noise=noise,
            generator=generator,
            seed=self._seed(seed, index, sample),
            doubled=doubled,
            **extra,
        )
        if self.correction.on:
            self.prev_eps = eps
        self._leave(index, sample)
        return result

    def _forget(self) -> None:
        self.prev_eps = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | int) -> Tensor:
        """√ᾱ·x + √(1 − ᾱ)·noise at timesteps of the training: an int, [1] or [B]."""
        table = self.alphas_cumprod
        if isinstance(timesteps, int):
            return self._mix(
                original_samples, noise, [table[timesteps] ** 0.5, (1 - table[timesteps]) ** 0.5]
            )
        rows = self._table([[a**0.5 for a in table], [(1 - a) ** 0.5 for a in table]], noise.device)
        where = timesteps.to(noise.device)
        return self._mix(original_samples, noise, [row[where] for row in rows])
