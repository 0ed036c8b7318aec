"""What the samplers share: the correction, where a trajectory stands, and what may enter it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .. import checks, errors
from ..langevin import affine_step
from ..noise import Generator
from ..scalars import Scalar

Tensor = torch.Tensor
Guidance = tuple[Tensor, Scalar] | None
VARIANCES = (None, "learned", "learned_range")


@dataclass(frozen=True)
class Correction:
    """The numbers of the Levenberg–Marquardt–Langevin direction, checked once.

    Off, which means the plain sampler at its cost, unless `extrapolation` or `kappa` is a number other than 0 or a
    tensor. `freeze` is the fraction of the noise axis, from its noisy end, that stays uncorrected.
    """

    damping: Scalar | None = None
    kappa: Scalar | None = None
    extrapolation: Scalar | None = None
    freeze: float = 0.0

    @classmethod
    def checked(
        cls,
        op: str,
        damping: Scalar | None,
        kappa: Scalar | None,
        extrapolation: Scalar | None,
        freeze: float,
    ) -> Correction:
        """As above; a `damping` without `kappa` is the published default κ = 0."""
        if extrapolation is not None and (damping is not None or kappa is not None):
            raise errors.value(op, "extrapolation", "come without damping and kappa", "both")
        if kappa is not None and damping is None:
            raise errors.value(op, "damping", "come with kappa", None)
        _host_number(op, "damping", damping, lowest=0.0)
        _host_number(op, "kappa", kappa)
        _host_number(op, "extrapolation", extrapolation)
        if not 0.0 <= freeze <= 1.0:
            raise errors.value(op, "freeze", "lie between 0 and 1", freeze)
        return cls(damping, 0.0 if kappa is None and damping is not None else kappa, extrapolation, freeze)

    @property
    def on(self) -> bool:
        """Whether any step of a trajectory is corrected; a tensor is not looked into."""
        strength = self.kappa if self.extrapolation is None else self.extrapolation
        return strength is not None and (isinstance(strength, Tensor) or strength != 0)

    def at(self, timestep: float, train: int) -> dict[str, Any]:
        """Arguments of the step functions at a timestep of `train`: none where the step is not corrected."""
        if not self.on or timestep >= train * (1 - self.freeze):
            return {}
        if self.extrapolation is not None:
            return {"extrapolation": self.extrapolation}
        return {"damping": self.damping, "kappa": self.kappa}


def _host_number(op: str, argument: str, value: Scalar | None, lowest: float = -math.inf) -> None:
    if value is None or isinstance(value, Tensor):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise errors.kind(op, argument, "be a number or a tensor", type(value).__name__)
    if not lowest <= value < math.inf or value == -math.inf:
        raise errors.value(op, argument, "be finite and >= 0" if lowest == 0 else "be finite", value)


def place(timesteps: Tensor, timestep: Tensor) -> int | None:
    """Index of `timestep` in `timesteps` if it is one of its elements, found by address: no device is asked."""
    if timestep.numel() != 1 or timestep.dtype != timesteps.dtype or timestep.device != timesteps.device:
        return None
    if timesteps.numel() == 0 or not timesteps.is_contiguous():
        return None
    index, rest = divmod(timestep.data_ptr() - timesteps.data_ptr(), timesteps.element_size())
    return index if rest == 0 and 0 <= index < timesteps.numel() else None


class Trajectory:
    """Timesteps and the index of the next one, counted on the host."""

    def __init__(self, values: Sequence[float], tensor: Tensor) -> None:
        self.values = list(values)  # what a user reads from `tensor`
        self.tensor = tensor
        self.begin: int | None = None
        self.next: int | None = None

    def locate(self, op: str, timestep: Any) -> int:
        """Index of the step at `timestep`: any at first, then one after the other.

        Numbers, tensors of the host and elements of `tensor` are compared; the value of any other device tensor is
        read for the first step alone and only if no begin index is set.
        """
        expected = self.begin if self.next is None else self.next
        if expected is not None and expected >= len(self.values):
            rule = f"belong to a trajectory that is not over ({len(self.values)} steps done; reset starts another)"
            raise errors.value(op, "timestep", rule, self._shown(timestep))
        if timestep is None:
            return expected or 0
        given = self._index(op, timestep, expected)
        if expected is not None and given != expected:
            rule = f"be the next of the trajectory ({self.values[expected]})"
            raise errors.value(op, "timestep", rule, self._shown(timestep))
        return given

    def _index(self, op: str, timestep: Any, expected: int | None) -> int:
        if isinstance(timestep, Tensor):
            if timestep.numel() != 1:
                raise errors.value(op, "timestep", "be one number", f"shape {list(timestep.shape)}")
            found = place(self.tensor, timestep)
            if found is not None:
                return found
            if timestep.device.type != "cpu" and expected is not None:
                return expected
        value = float(timestep)
        hits = [i for i, t in enumerate(self.values) if math.isclose(t, value, rel_tol=1e-6)]
        if not hits:
            raise errors.value(op, "timestep", "be one of timesteps", self._shown(timestep))
        return expected if expected is not None and expected in hits else hits[0]

    @staticmethod
    def _shown(timestep: Any) -> Any:
        known = not isinstance(timestep, Tensor) or timestep.device.type == "cpu"
        return (timestep.item() if isinstance(timestep, Tensor) else timestep) if known else "a device tensor"


class Sampler:
    """Base of the samplers: counts steps, guards the state of a trajectory, never waits for a device."""

    order = 1
    init_noise_sigma = 1.0

    def __init__(self, correction: Correction, num_train_timesteps: int, variance_type: str | None) -> None:
        self.correction = correction
        self.num_train_timesteps = num_train_timesteps
        self.variance_type = variance_type
        self._trajectory: Trajectory | None = None
        self._like: Tensor | None = None  # a tensor without elements that has the sample's dtype and device
        self._shape: torch.Size | None = None
        self._tables: dict[torch.device, list[Tensor]] = {}

    # --- what a pipeline asks ---

    @property
    def timesteps(self) -> Tensor:
        """Timesteps, the first one first, on the device given to `set_timesteps`."""
        return self._known("timesteps").tensor

    @property
    def num_inference_steps(self) -> int:
        """Steps of a whole trajectory."""
        return len(self._known("num_inference_steps").values)

    @property
    def step_index(self) -> int | None:
        """Index of the next step, None before the first."""
        return None if self._trajectory is None else self._trajectory.next

    def __len__(self) -> int:
        return self.num_train_timesteps

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Where the next trajectory starts, for image-to-image: no timestep has to be looked up then."""
        steps = self._known("set_begin_index")
        if not 0 <= begin_index < len(steps.values):
            rule = f"be an index of timesteps (0 to {len(steps.values) - 1})"
            raise errors.value(self._op("set_begin_index"), "begin_index", rule, begin_index)
        steps.begin = begin_index

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the sample itself, the samplers here need no scaling."""
        return sample

    def reset(self) -> None:
        """Forgets the trajectory: the next step may be any, of any shape. The timesteps stay."""
        if self._trajectory is not None:
            self._trajectory.next = None
        self._shape = self._like = None
        self._forget()

    def _forget(self) -> None:
        """Drops the tensors kept from step to step."""

    # --- what a step asks ---

    def _op(self, method: str = "step") -> str:
        return f"{type(self).__name__}.{method}"

    def _known(self, what: str) -> Trajectory:
        if self._trajectory is None:
            raise errors.value(self._op(what), "timesteps", "be made by set_timesteps first", None)
        return self._trajectory

    def _start(self, timesteps: Sequence[float], device: Any, dtype: torch.dtype) -> None:
        """A new schedule; whatever a trajectory left behind is gone."""
        host = torch.tensor(timesteps, dtype=dtype)
        self._trajectory = Trajectory(host.tolist(), host.to(device) if device is not None else host)
        self._tables.clear()
        self.reset()

    def _enter(self, timestep: Any, sample: Tensor) -> int:
        """Index of this step, after the sample and the timestep are found to continue the trajectory."""
        op = self._op()
        index = self._known("step").locate(op, timestep)
        checks.floating(op, "sample", sample)
        if self._like is not None:
            same_trajectory(op, sample, self._shape, self._like)
        return index

    def _leave(self, index: int, sample: Tensor) -> None:
        """Counts the step, once it has succeeded."""
        self._known("step").next = index + 1
        if self._like is None:
            self._shape, self._like = sample.shape, sample.detach().new_empty(0)

    def _seed(self, seed: Tensor | int | None, index: int, sample: Tensor) -> Tensor | int | None:
        """An int seeds a whole trajectory: each step has a stream of its own. A tensor is taken as it is."""
        if not isinstance(seed, int) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
            return seed  # None, a tensor, or something that the step refuses
        made = torch.full((2,), seed, dtype=torch.int64, device=sample.device)
        made.narrow(0, 1, 1).fill_(index)
        return made

    def _mean(self, model_output: Tensor, sample: Tensor) -> Tensor:
        """The prediction without the variance that some networks predict in as many further channels."""
        if self.variance_type is None or model_output.shape[1:2] == sample.shape[1:2]:
            return model_output
        return model_output.narrow(1, 0, model_output.shape[1] // 2)

    def _mean_guidance(self, guidance: Guidance, sample: Tensor) -> Guidance:
        return None if guidance is None else (self._mean(guidance[0], sample), guidance[1])

    # --- noising ---

    def _mix(self, clean: Tensor, noise: Tensor, scales: Sequence[Scalar]) -> Tensor:
        """α·clean + σ·noise; scales of one element serve the whole batch."""
        flat = [s.reshape(()) if isinstance(s, Tensor) and s.numel() == 1 else s for s in scales]
        return affine_step([clean, noise], flat)

    def _table(self, rows: Sequence[Sequence[float]], device: torch.device) -> list[Tensor]:
        """Host tables beside the data, float64, copied once."""
        if device not in self._tables:
            self._tables[device] = [torch.tensor(row, dtype=torch.float64).to(device) for row in rows]
        return self._tables[device]


def same_trajectory(op: str, sample: Tensor, shape: torch.Size | None, like: Tensor | None) -> None:
    """A sample in the middle of a trajectory is what the trajectory began with; None is not compared."""
    if shape is not None and sample.shape != shape:
        rule = f"keep the shape of its trajectory ({list(shape)}; reset starts another)"
        raise errors.value(op, "sample", rule, list(sample.shape))
    if like is not None and sample.dtype != like.dtype:
        rule = f"keep the dtype of its trajectory ({checks.name(like.dtype)}; reset starts another)"
        raise errors.value(op, "sample", rule, checks.name(sample.dtype))
    if like is not None and sample.device != like.device:
        rule = f"keep the device of its trajectory ({like.device}; reset starts another)"
        raise errors.value(op, "sample", rule, sample.device)


__all__ = ["Correction", "Generator", "Guidance", "Sampler", "Trajectory", "place", "same_trajectory"]
