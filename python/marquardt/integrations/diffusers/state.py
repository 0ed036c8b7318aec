"""What the schedulers for diffusers share: the correction in their configuration, the state of a trajectory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from ... import checks, errors
from ...samplers.base import Correction, place, same_trajectory

Tensor = torch.Tensor
Number = float | int | None


def like_stock(stock: Any) -> Callable[[Any], Any]:
    """Gives an `__init__` the parameters of the stock one and its own: `from_config` reads them off the signature."""

    def decorate(init: Any) -> Any:
        own = [p for p in inspect.signature(init).parameters.values() if p.kind is p.KEYWORD_ONLY]
        known = [
            p for p in inspect.signature(stock.__init__).parameters.values() if p.kind is not p.VAR_KEYWORD
        ]
        init.__signature__ = inspect.Signature([*known, *own])
        return init

    return decorate


def forgets(stock_method: Any) -> Any:
    """`set_timesteps` of the stock scheduler under its own signature, which pipelines inspect; then a fresh start."""

    @functools.wraps(stock_method)
    def set_timesteps(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_method(self, *args, **kwargs)
        self._lml_tables()
        self._lml_forget()

    return set_timesteps


class Corrected:
    """What the three schedulers share: the correction's numbers in the configuration, and the state of a trajectory."""

    config: Any
    timesteps: Tensor
    sigmas: Tensor
    num_inference_steps: int | None

    def _lml_setup(
        self, damping: Number, kappa: Number, extrapolation: Number, freeze: float, **more: Any
    ) -> None:
        op, numbers = (
            type(self).__name__,
            {"damping": damping, "kappa": kappa, "extrapolation": extrapolation},
        )
        for name, value in numbers.items():
            if isinstance(value, Tensor):  # it would not survive save_config
                raise errors.kind(op, name, "be a number or None", "a tensor")
        self._lml = Correction.checked(op, damping, kappa, extrapolation, freeze)
        self.register_to_config(**numbers, freeze=freeze, **more)  # type: ignore[attr-defined]
        self._lml_tables()
        self._lml_forget()

    def _lml_tables(self) -> None:
        """Numbers of the stock scheduler on the host, read once."""
        self._lml_timesteps = (self.timesteps, self.timesteps.tolist())

    def _lml_forget(self) -> None:
        self._lml_prev: Tensor | None = None  # direction of the last step
        self._lml_shape: torch.Size | None = None
        self._lml_next: Any = None  # where the step has to be for these to be of its trajectory

    def _lml_values(self) -> list[float]:
        """The timesteps as numbers, also after a pipeline has replaced them."""
        if self._lml_timesteps[0] is not self.timesteps:
            self._lml_timesteps = (self.timesteps, self.timesteps.tolist())
        return self._lml_timesteps[1]

    def _lml_enter(self, here: Any, sample: Tensor) -> None:
        """Drops the state unless it leads `here`; a trajectory keeps its shape."""
        if self.num_inference_steps is None:
            raise errors.value(self._lml_op, "timesteps", "be made by set_timesteps first", None)
        if here is None or here != self._lml_next:
            self._lml_forget()
        if self._lml_shape is not None:
            same_trajectory(self._lml_op, sample, self._lml_shape, None)

    def _lml_leave(self, following: Any, sample: Tensor, direction: Tensor) -> None:
        self._lml_next = following
        if self._lml.on:  # else nothing is kept, and nothing is asked of the next sample
            self._lml_prev, self._lml_shape = direction, sample.shape

    def _lml_extra(self, timestep: float) -> dict[str, Any]:
        return self._lml.at(timestep, self.config.num_train_timesteps)

    @property
    def _lml_op(self) -> str:
        return f"{type(self).__name__}.step"


class Counted(Corrected):
    """The schedulers that count their steps: `step_index` is found without asking the device where that can be."""

    _step_index: int | None

    def _lml_tables(self) -> None:
        super()._lml_tables()
        self._lml_levels = (self.sigmas, self.sigmas.tolist())

    def _lml_sigmas(self) -> list[float]:
        if self._lml_levels[0] is not self.sigmas:
            self._lml_levels = (self.sigmas, self.sigmas.tolist())
        return self._lml_levels[1]

    def _init_step_index(self, timestep: Any) -> None:
        found = place(self.timesteps, timestep) if isinstance(timestep, Tensor) else None
        if found is None or self.begin_index is not None:  # type: ignore[attr-defined]
            super()._init_step_index(timestep)  # type: ignore[misc]
            return
        values = self._lml_values()
        equal = [i for i, value in enumerate(values) if value == values[found]]
        self._step_index = equal[min(1, len(equal) - 1)]  # of equal timesteps the second, as diffusers does

    def _lml_index(self, timestep: Any, sample: Tensor) -> int:
        """Index of this step; the state is that of the step before it, or none."""
        if self._step_index is None:
            self._lml_next = None
            self._init_step_index(timestep)
        index = self._step_index
        assert index is not None
        self._lml_enter(index, sample)
        if not 0 <= index < len(self._lml_sigmas()) - 1:
            steps = len(self._lml_sigmas()) - 1
            raise errors.value(
                self._lml_op, "timestep", f"be one of {steps} of a trajectory", f"step {index}"
            )
        return index


def paired(sample: Tensor, model_output: Tensor) -> tuple[Tensor, Tensor]:
    """Both as a pair of dtypes that the ops take: where they are none, both in the wider one, as torch promotes."""
    if (sample.dtype, model_output.dtype) in checks.PAIRS:
        return sample, model_output
    wide = torch.promote_types(sample.dtype, model_output.dtype)
    return sample.to(wide), model_output.to(wide)
