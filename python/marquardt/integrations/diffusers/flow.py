"""Flow matching for diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ... import errors
from ...hessian import lm_direction
from ...lml import lml_flow_step
from .state import Counted, Number, forgets, like_stock, paired

Tensor = torch.Tensor


class LMLFlowMatchEulerScheduler(Counted, FlowMatchEulerDiscreteScheduler):
    """`FlowMatchEulerDiscreteScheduler` with a damped direction; its arguments and `damping`, `kappa`, `extrapolation`,
    `freeze`, as in `marquardt.samplers.LMLFlowEuler`.
    """

    @like_stock(FlowMatchEulerDiscreteScheduler)
    def __init__(
        self,
        *args: Any,
        damping: Number = None,
        kappa: Number = None,
        extrapolation: Number = None,
        freeze: float = 0.0,
        **kwargs: Any,
    ) -> None:
        FlowMatchEulerDiscreteScheduler.__init__(self, *args, **kwargs)
        self.num_inference_steps = None
        self._lml_setup(damping, kappa, extrapolation, freeze)

    set_timesteps = forgets(FlowMatchEulerDiscreteScheduler.set_timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        s_churn: float = 0.0,
        s_tmin: float = 0.0,
        s_tmax: float = float("inf"),
        s_noise: float = 1.0,
        generator: Any = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `FlowMatchEulerDiscreteScheduler.step`, which ignores the four `s_` arguments too."""
        if isinstance(timestep, int) or (isinstance(timestep, Tensor) and not timestep.is_floating_point()):
            raise errors.value(self._lml_op, "timestep", "be one of timesteps, not an index", timestep)
        index = self._lml_index(timestep, sample)
        extra = self._lml_extra(self._lml_values()[index])
        if per_token_timesteps is not None:
            return self._lml_per_token(
                index, extra, model_output, timestep, sample, generator, per_token_timesteps, return_dict
            )
        state, velocity = paired(sample, model_output)
        stochastic = self.config.stochastic_sampling
        noise = None
        if stochastic:
            noise = randn_tensor(state.shape, generator=generator, device=state.device, dtype=torch.float32)
        prev_sample, direction = lml_flow_step(
            state,
            velocity,
            self._lml_prev if extra else None,
            sigma=self._lml_sigmas()[index],
            sigma_next=self._lml_sigmas()[index + 1],
            stochastic=stochastic,
            noise=None if noise is None else noise.to(state.dtype),
            **extra,
        )
        self._step_index = index + 1
        self._lml_leave(self._step_index, sample, direction)
        prev_sample = prev_sample.to(model_output.dtype)
        return (
            FlowMatchEulerDiscreteSchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)
        )

    def _lml_per_token(
        self,
        index: int,
        extra: dict[str, Any],
        velocity: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any,
        per_token: Tensor,
        return_dict: bool,
    ) -> Any:
        """Steps of a size for each token [B, N] are diffusers'; only their direction is ours."""
        prev = self._lml_prev if extra else None
        direction = velocity if prev is None else lm_direction(velocity, prev, **extra)
        output = FlowMatchEulerDiscreteScheduler.step(
            self,
            direction,
            timestep,
            sample,
            generator=generator,
            per_token_timesteps=per_token,
            return_dict=return_dict,
        )
        self._lml_leave(index + 1, sample, velocity)
        return output
