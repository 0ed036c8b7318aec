"""DDIM for diffusers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import DDIMScheduler
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from diffusers.utils.torch_utils import randn_tensor

from ... import errors
from ...langevin import affine_step
from ...lml import lml_ddim_step
from ...samplers.base import place
from .state import Corrected, Number, forgets, like_stock, paired

Tensor = torch.Tensor


class _DDIMOutput(DDIMSchedulerOutput):
    """`pred_original_sample` takes a memory pass of its own, so it is computed when somebody looks."""

    def __init__(self, prev_sample: Tensor, original: Callable[[], Tensor]) -> None:
        super().__init__(prev_sample=prev_sample)
        self.__dict__["_original"] = functools.cache(original)

    @property
    def pred_original_sample(self) -> Tensor | None:
        original = self.__dict__.get("_original")  # not there yet while the base class looks
        return None if original is None else original()

    @pred_original_sample.setter
    def pred_original_sample(self, value: Any) -> None:
        """The base class sets its default."""

    def to_tuple(self) -> tuple[Any, ...]:
        return self.prev_sample, self.pred_original_sample

    def __getitem__(self, key: Any) -> Any:
        return getattr(self, key) if isinstance(key, str) else _Results((self.prev_sample, self))[key]


class _Results(tuple):
    """(prev_sample, pred_original_sample) for `return_dict=False`, of which the second is computed when looked at."""

    def __getitem__(self, key: Any) -> Any:
        if key in (0, -2):
            return super().__getitem__(0)
        return tuple(self)[key]

    def __iter__(self) -> Any:
        yield super().__getitem__(0)
        yield super().__getitem__(1).pred_original_sample


class LMLDDIMScheduler(Corrected, DDIMScheduler):
    """`DDIMScheduler` with a damped direction; its arguments and `damping`, `kappa`, `extrapolation`, `freeze`.

    The arguments of the correction are those of `marquardt.samplers.LMLDDIM`. A timestep that does not follow the last
    one starts a new trajectory, as a scheduler without state must allow. An element of `timesteps` is recognised
    without asking its device; any other tensor is read, as diffusers does.
    """

    @like_stock(DDIMScheduler)
    def __init__(
        self,
        *args: Any,
        damping: Number = None,
        kappa: Number = None,
        extrapolation: Number = None,
        freeze: float = 0.0,
        **kwargs: Any,
    ) -> None:
        DDIMScheduler.__init__(self, *args, **kwargs)
        self._lml_setup(damping, kappa, extrapolation, freeze)

    set_timesteps = forgets(DDIMScheduler.set_timesteps)

    def _lml_tables(self) -> None:
        super()._lml_tables()
        self._lml_alphas = self.alphas_cumprod.tolist()
        self._lml_final = float(self.final_alpha_cumprod)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: Any = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        """As `DDIMScheduler.step`; the second result, x0, is computed when it is looked at."""
        here, following = self._lml_place(timestep)
        self._lml_enter(here, sample)
        alpha_bar, alpha_bar_next = self._lml_alpha_pair(here)
        sample, model_output = paired(sample, model_output)
        config = self.config
        extra = self._lml_extra(here)
        prev_sample, eps = lml_ddim_step(
            sample,
            model_output,
            self._lml_prev if extra else None,
            alpha_bar=alpha_bar,
            alpha_bar_next=alpha_bar_next,
            eta=eta,
            prediction_type=config.prediction_type,
            clip=config.clip_sample_range if config.clip_sample and not config.thresholding else None,
            threshold=self._lml_threshold(),
            use_clipped_output=use_clipped_model_output,
            noise=self._lml_noise(model_output, sample, generator, variance_noise) if eta > 0 else None,
            **extra,
        )
        self._lml_leave(following, sample, eps)
        output = _DDIMOutput(
            prev_sample, functools.partial(self._lml_original, model_output, alpha_bar, sample)
        )
        return output if return_dict else _Results((prev_sample, output))

    def _lml_place(self, timestep: Any) -> tuple[int, int | None]:
        """The timestep as a number, and the one that follows it in the schedule."""
        values = self._lml_values()
        found = place(self.timesteps, timestep) if isinstance(timestep, Tensor) else None
        if found is None:
            here = int(timestep)
            found = values.index(here) if here in values else len(values)
        else:
            here = int(values[found])
        return here, int(values[found + 1]) if found + 1 < len(values) else None

    def _lml_alpha_pair(self, timestep: int) -> tuple[float, float]:
        if not 0 <= timestep < len(self._lml_alphas):
            rule = f"lie between 0 and {len(self._lml_alphas) - 1}"
            raise errors.value(self._lml_op, "timestep", rule, timestep)
        following = timestep - self.config.num_train_timesteps // self.num_inference_steps
        return self._lml_alphas[timestep], self._lml_alphas[following] if following >= 0 else self._lml_final

    def _lml_threshold(self) -> tuple[float, float] | None:
        config = self.config
        return (config.dynamic_thresholding_ratio, config.sample_max_value) if config.thresholding else None

    def _lml_noise(
        self, model_output: Tensor, sample: Tensor, generator: Any, variance_noise: Tensor | None
    ) -> Tensor:
        if variance_noise is None:
            variance_noise = randn_tensor(
                model_output.shape, generator=generator, device=model_output.device, dtype=model_output.dtype
            )
        elif generator is not None:
            raise errors.value(self._lml_op, "variance_noise", "come without generator", "both")
        return variance_noise.to(sample.dtype)

    def _lml_original(self, model_output: Tensor, alpha_bar: float, sample: Tensor) -> Tensor:
        """x0 as the step sees it, [B, *sample]."""
        alpha, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        kind = self.config.prediction_type
        if kind == "sample":
            original = model_output
        elif kind == "epsilon":
            original = affine_step([sample, model_output], [1 / alpha, -sigma / alpha])
        else:
            original = affine_step([sample, model_output], [alpha, -sigma])
        if self.config.thresholding:
            return self._threshold_sample(original)
        bound = self.config.clip_sample_range
        return original.clamp(-bound, bound) if self.config.clip_sample else original
