"""DPM-Solver multistep for diffusers."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_utils import SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ... import checks
from ...lml_coefficients import THIRD_ORDERS
from ...lml_dpm import lml_dpm_step
from ...samplers import schedules
from .state import Counted, Number, forgets, like_stock

Tensor = torch.Tensor


class LMLDPMSolverMultistepScheduler(Counted, DPMSolverMultistepScheduler):
    """`DPMSolverMultistepScheduler` with a damped increment; its arguments and those of the correction.

    These are `damping`, `kappa`, `extrapolation`, `freeze`, `third_order`, `apply_to` and `lm_on_sde` as in
    `marquardt.samplers.LMLDPMSolver`. The result has the dtype of the sample or of the model's output, whichever is
    wider.
    """

    @like_stock(DPMSolverMultistepScheduler)
    def __init__(
        self,
        *args: Any,
        damping: Number = None,
        kappa: Number = None,
        extrapolation: Number = None,
        freeze: float = 0.0,
        third_order: str = "published",
        apply_to: str = "increment",
        lm_on_sde: bool = False,
        **kwargs: Any,
    ) -> None:
        DPMSolverMultistepScheduler.__init__(self, *args, **kwargs)
        op = type(self).__name__
        checks.one_of(op, "third_order", third_order, THIRD_ORDERS)
        checks.one_of(op, "apply_to", apply_to, ("increment", "direction"))
        more = {"third_order": third_order, "apply_to": apply_to, "lm_on_sde": lm_on_sde}
        self._lml_setup(damping, kappa, extrapolation, freeze, **more)

    model_outputs: list[Tensor | None]  # converted, the newest last
    lower_order_nums: int

    set_timesteps = forgets(DPMSolverMultistepScheduler.set_timesteps)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `DPMSolverMultistepScheduler.step`."""
        index = self._lml_index(timestep, sample)
        if self.config.variance_type in ("learned", "learned_range"):
            model_output = model_output.narrow(1, 0, sample.shape[1])
        if sample.dtype != model_output.dtype:  # older outputs are kept in the state's precision
            wide = torch.promote_types(sample.dtype, model_output.dtype)
            sample, model_output = sample.to(wide), model_output.to(wide)
        prev_sample, increment, converted = self._lml_update(
            index, model_output, sample, self._lml_noise(sample, generator, variance_noise)
        )
        self.model_outputs = [*self.model_outputs[1:], converted]
        self.lower_order_nums = min(self.lower_order_nums + 1, self.config.solver_order)
        self._step_index = index + 1
        self._lml_leave(self._step_index, sample, increment)
        return SchedulerOutput(prev_sample=prev_sample) if return_dict else (prev_sample,)

    def _lml_noise(self, sample: Tensor, generator: Any, variance_noise: Tensor | None) -> Tensor | None:
        if not self.config.algorithm_type.startswith("sde"):
            return None
        if variance_noise is None:
            variance_noise = randn_tensor(
                sample.shape, generator=generator, device=sample.device, dtype=torch.float32
            )
        return variance_noise.to(device=sample.device, dtype=sample.dtype)

    def _lml_update(
        self, index: int, model_output: Tensor, sample: Tensor, noise: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(new sample, increment, converted output) of step `index`."""
        config = self.config
        if (
            self._lml_sigmas()[index] == self._lml_sigmas()[index + 1]
        ):  # spread levels that end where they begin
            return sample.clone(), sample, self.convert_model_output(model_output, sample=sample)
        order = self._lml_order(index)
        kind, threshold = config.prediction_type, None
        if kind == "flow_prediction":  # x − σ·v, a conversion of diffusers alone
            model_output, kind = self.convert_model_output(model_output, sample=sample), None
        elif config.thresholding:
            threshold = (config.dynamic_thresholding_ratio, config.sample_max_value)
        window = [index + 1, *(max(index - age, 0) for age in range(order))]  # target, s0, s1, s2
        scales = schedules.flow_scales if config.use_flow_sigmas else schedules.vp_scales
        pairs = [scales(self._lml_sigmas()[i]) for i in window]
        extra = self._lml_extra(self._lml_values()[index])
        older = [output for output in self.model_outputs[::-1] if output is not None]
        result: Any = lml_dpm_step(
            sample,
            [model_output, *older][:order],
            self._lml_prev if extra else None,
            lambdas=[schedules.half_log_snr(*pair) for pair in pairs],
            alphas=[alpha for alpha, _ in pairs],
            sigmas=[sigma for _, sigma in pairs],
            order=order,
            algorithm=config.algorithm_type,
            solver_type=config.solver_type,
            third_order=config.third_order,
            apply_to=config.apply_to,
            lm_on_sde=config.lm_on_sde,
            prediction_type=kind,
            threshold=threshold,
            noise=noise,
            **extra,
        )
        return result if len(result) == 3 else (*result, model_output)

    def _lml_order(self, index: int) -> int:
        config = self.config
        return schedules.dpm_order(
            index,
            len(self.timesteps),
            solver_order=config.solver_order,
            known=self.lower_order_nums,
            lower_final=config.lower_order_final,
            first_order_final=config.euler_at_final or config.final_sigmas_type == "zero",
        )
