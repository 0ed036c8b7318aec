"""Euler steps of flow matching with the Levenberg–Marquardt–Langevin direction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import checks, errors
from ..lml import lml_flow_step
from ..scalars import Scalar
from . import schedules
from .base import Correction, Generator, Guidance, Sampler

Tensor = torch.Tensor


class LMLFlowEuler(Sampler):
    r"""Euler's method on the velocity of a flow, whose direction is damped by a rank-one Hessian.

        x' = x + (σ' − σ)·LM(v; previous v),   or, stochastic,   x' = (1 − σ')·(x − σ·LM(v)) + σ'·ξ

    One call of `marquardt.lml_flow_step` a step. Timesteps are σ·num_train_timesteps, float32.

    Args:
        num_train_timesteps: timesteps of the training.
        shift: moves the noise levels towards noise, s·σ/(1 + (s − 1)·σ).
        use_dynamic_shifting: moves them by `mu` of `set_timesteps` instead, e^μ in place of s.
        time_shift_type: "exponential", or "linear" for μ itself in place of s.
        shift_terminal: stretches the levels so that the last one is this.
        invert_sigmas: time runs from 0 to 1.
        stochastic_sampling: noise of the next level after each step.
        damping, kappa, extrapolation, freeze: as in `LMLDDIM`.

    >>> import torch
    >>> from marquardt.samplers import LMLFlowEuler
    >>> sampler = LMLFlowEuler(shift=3.0)
    >>> sampler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    >>> x = torch.randn(2, 16, 8)
    >>> for t in sampler.timesteps:
    ...     x = sampler.step(-x, t, x)
    >>> sampler.sigmas
    tensor([1.0000, 0.9000, 0.7500, 0.5000, 0.0000], dtype=torch.float64)
    """

    def __init__(
        self,
        *,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        invert_sigmas: bool = False,
        stochastic_sampling: bool = False,
        damping: Scalar | None = None,
        kappa: Scalar | None = None,
        extrapolation: Scalar | None = None,
        freeze: float = 0.0,
    ) -> None:
        op = type(self).__name__
        checks.one_of(op, "time_shift_type", time_shift_type, ("exponential", "linear"))
        super().__init__(
            Correction.checked(op, damping, kappa, extrapolation, freeze), num_train_timesteps, None
        )
        self.shift = shift
        self.use_dynamic_shifting = use_dynamic_shifting
        self.time_shift_type = time_shift_type
        self.shift_terminal = shift_terminal
        self.invert_sigmas = invert_sigmas
        self.stochastic_sampling = stochastic_sampling
        self.prev_velocity: Tensor | None = None
        self._levels: list[float] = []

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: torch.device | str | None = None,
        *,
        sigmas: Sequence[float] | None = None,
        mu: float | None = None,
    ) -> None:
        """Chooses the noise levels, or shifts those given, and forgets the last trajectory."""
        op = self._op("set_timesteps")
        if (mu is not None) != self.use_dynamic_shifting:
            rule = "be given" if mu is None else "come with use_dynamic_shifting"
            raise errors.value(op, "mu", rule, mu)
        levels = schedules.flow_sigmas(
            op,
            self._number(op, num_inference_steps, sigmas),
            self.num_train_timesteps,
            shift=self.shift,
            mu=mu,
            time_shift=self.time_shift_type,
            terminal=self.shift_terminal,
            given=sigmas,
        )
        if self.invert_sigmas:
            levels = [1 - level for level in levels]
        self._levels = [*levels, 1.0 if self.invert_sigmas else 0.0]
        self._start([level * self.num_train_timesteps for level in levels], device, torch.float32)

    @staticmethod
    def _number(op: str, number: int | None, sigmas: Sequence[float] | None) -> int:
        if sigmas is None:
            return schedules.steps(op, number)
        if number is not None and number != len(sigmas):
            raise errors.value(op, "num_inference_steps", f"be the number of sigmas ({len(sigmas)})", number)
        return schedules.steps(op, len(sigmas))

    @property
    def sigmas(self) -> Tensor:
        """Noise levels at each timestep and at the end, float64 on the CPU."""
        self._known("sigmas")
        return torch.tensor(self._levels, dtype=torch.float64)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        guidance: Guidance = None,
        active: Tensor | None = None,
        noise: Tensor | None = None,
        generator: Generator = None,
        seed: Tensor | int | None = None,
        doubled: bool = False,
    ) -> Tensor:
        """The next sample; arguments and what is kept as in `LMLDDIM.step`."""
        index = self._enter(timestep, sample)
        extra = self.correction.at(self._known("step").values[index], self.num_train_timesteps)
        result, velocity = lml_flow_step(
            sample,
            model_output,
            self.prev_velocity if extra else None,
            sigma=self._levels[index],
            sigma_next=self._levels[index + 1],
            stochastic=self.stochastic_sampling,
            guidance=guidance,
            active=active,
            noise=noise,
            generator=generator,
            seed=self._seed(seed, index, sample),
            doubled=doubled,
            **extra,
        )
        if self.correction.on:
            self.prev_velocity = velocity
        self._leave(index, sample)
        return result

    def _forget(self) -> None:
        self.prev_velocity = None

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor | float) -> Tensor:
        """(1 − σ)·x + σ·noise with σ = timestep / num_train_timesteps: a number, [1] or [B]."""
        if isinstance(timesteps, Tensor):
            level: Any = timesteps.to(device=noise.device, dtype=torch.float64) / self.num_train_timesteps
        else:
            level = timesteps / self.num_train_timesteps
        return self._mix(original_samples, noise, [1 - level, level])
