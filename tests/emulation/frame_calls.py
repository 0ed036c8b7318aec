"""Frame calls as data: what frame.h calls a FrameCall, with its arrays, their places in memory and their plan.

One description serves both ways of running the CUDA kernels on a CPU: the module `_emulation`, and the stand-alone
executables under sanitizers, which read it from a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

Tensor = torch.Tensor
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

OPS = (
    "given", "lm_direction", "lm_direction_backward", "lm_direction_jvp", "affine", "affine_backward",
    "lowrank", "lowrank_vjp", "lowrank_logdet", "lowrank_logdet_vjp", "lowrank_update", "lm_step",
)  # fmt: skip
GRAMS = ("none", "full", "first", "two")
VARIANTS = ("held", "two_sweeps", "one_sweep")
_CODES = {f32: 0, f64: 1, bf16: 2, f16: 3}  # DType
_BITS = {f32: np.float32, f64: np.float64, bf16: np.uint16, f16: np.uint16}
_MARKS = {f32: 77.0, f64: 77.0, bf16: 0x4142, f16: 0x4142}  # what outputs lie among

_GUARD = 256  # elements before and after an array: keeps its alignment
_ALIGNMENT = 256  # of device memory, in bytes


@dataclass(frozen=True)
class Place:
    """Where the samples of a vector lie: `offset` elements behind an aligned address, `gap` elements apart."""

    offset: int = 0
    gap: int = 0
    shared: bool = False  # every sample is the first one (stride 0)


@dataclass(frozen=True, eq=False)
class Frame:
    """One call. Streams are [B, D]; parameters [p] or [B, p], of `given` the matrix [m, k] or [B, m, k]."""

    op: str
    streams: tuple[Tensor, ...]
    outputs: tuple[torch.dtype, ...]
    parameters: Tensor
    mode: int = 0
    pairs: int = 0
    gram: str = "none"
    scalars: int = 0  # numbers per sample that the op returns
    ones: bool = False
    seed: Tensor | None = None  # [2] or [B, 2]
    prologue: Tensor | None = None  # [k, n] or [B, k, n]
    clamp: Tensor | None = None  # [k, 2]
    sources: int = 0  # of lm_step: its streams without prev
    clipped: bool = False
    guided: bool = False
    step_outputs: int = 1
    step_direction: bool = False
    step_converted: bool = False
    host: bool = True  # parameters without a batch travel with the launch
    stream_places: tuple[Place, ...] = ()
    output_places: tuple[Place, ...] = ()
    in_place: int = -1  # the stream in whose memory output 0 lies

    @property
    def batch(self) -> int:
        return self.streams[0].shape[0]

    @property
    def size(self) -> int:
        return self.streams[0].shape[1]

    @property
    def compute(self) -> torch.dtype:
        return f64 if self.streams[0].dtype == f64 else f32

    @property
    def vectors(self) -> int:
        return len(self.streams) + self.ones + (self.seed is not None)

    @property
    def rows(self) -> int:
        if self.op == "lm_step":
            return 4  # e, r, a, y
        return self.vectors if self.prologue is None else self.prologue.shape[-2]

    @property
    def per_sample(self) -> bool:
        return self.parameters.dim() == (3 if self.op == "given" else 2)

    def parameter_rows(self) -> Tensor:
        """[B, p]: the parameters of each sample."""
        flat = (
            self.parameters
            if self.op != "given" or self.parameters.dim() == 1
            else self.parameters.flatten(-2)
        )
        return flat.expand(self.batch, -1)

    def placed(self, streams: Sequence[Place], outputs: Sequence[Place] = ()) -> Frame:
        """The same call with its arrays elsewhere; places repeat if there are more vectors."""
        values = []
        chosen = [streams[j % len(streams)] for j in range(len(self.streams))]
        for t, place in zip(self.streams, chosen, strict=True):
            values.append(t[:1].expand(t.shape) if place.shared else t)
        outputs = outputs or [Place()]
        return dataclasses.replace(
            self,
            streams=tuple(values),
            stream_places=tuple(chosen),
            output_places=tuple(outputs[i % len(outputs)] for i in range(len(self.outputs))),
        )

    def narrowed(self, first: int, last: int) -> Frame:
        """The samples [first, last) as a call of their own, parameters and seeds with them."""
        one = lambda t, batched: t[first:last] if batched else t  # noqa: E731
        return dataclasses.replace(
            self,
            streams=tuple(t[first:last].clone() for t in self.streams),
            parameters=one(self.parameters, self.per_sample),
            seed=None if self.seed is None else one(self.seed, self.seed.dim() == 2),
            prologue=None if self.prologue is None else one(self.prologue, self.prologue.dim() == 3),
        )


def _places(frame: Frame) -> tuple[list[Place], list[Place]]:
    streams = list(frame.stream_places) or [Place()] * len(frame.streams)
    return streams, list(frame.output_places) or [Place()] * len(frame.outputs)


def _stride(frame: Frame, place: Place) -> int:
    return 0 if place.shared else frame.size + place.gap


def numbers_of(frame: Frame, plan: Mapping[str, Any] | None = None, guard: int = 0) -> dict[str, int]:
    """The call as named whole numbers. `plan` may hold overrides, limits of the device, and the machine's order."""
    matrix = frame.parameter_rows()
    width = matrix.shape[1]
    made = {
        "op": OPS.index(frame.op),
        "mode": frame.mode,
        "batch": frame.batch,
        "size": frame.size,
        "compute": _CODES[frame.compute],
        "streams": len(frame.streams),
        "ones": int(frame.ones),
        "seed_stride": 2 if frame.seed is not None and frame.seed.dim() == 2 else 0,
        "pairs": frame.pairs,
        "rows": frame.rows,
        "sources": frame.sources,
        "clipped": int(frame.clipped),
        "guided": int(frame.guided),
        "step_outputs": frame.step_outputs,
        "step_direction": int(frame.step_direction),
        "step_converted": int(frame.step_converted),
        "gram": GRAMS.index(frame.gram),
        "parameter_stride": width if frame.per_sample else 0,
        "parameter_count": width,
        "host_parameters": int(frame.host and not frame.per_sample),
        "outputs": len(frame.outputs),
        "scalar_stride": frame.scalars,
        "in_place": frame.in_place,
    }
    if frame.prologue is not None and frame.prologue.dim() == 3:
        made["prologue_stride"] = frame.prologue.shape[1] * frame.prologue.shape[2]
    streams, outputs = _places(frame)
    if frame.in_place >= 0:
        outputs[0] = streams[frame.in_place]
    for kind, places, dtypes in (
        ("stream", streams, [t.dtype for t in frame.streams]),
        ("output", outputs, frame.outputs),
    ):
        for j, (place, dtype) in enumerate(zip(places, dtypes, strict=True)):
            made[f"{kind}{j}_dtype"] = _CODES[dtype]
            made[f"{kind}{j}_stride"] = _stride(frame, place)
            made[f"{kind}{j}_offset"] = guard + place.offset
    for name, value in (plan or {}).items():
        made[name] = VARIANTS.index(value) if name == "variant" else int(value)
    return made


def aligned(count: int, dtype) -> np.ndarray:
    """An array whose first element lies where device memory could begin."""
    item = np.dtype(dtype).itemsize
    raw = np.empty(count * item + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + count * item].view(dtype)


def _cells(frame: Frame, place: Place, guard: int) -> np.ndarray:
    """[B, D]: indices of the elements of a vector in its array."""
    b = np.arange(frame.batch, dtype=np.int64)[:, None] * _stride(frame, place)
    return guard + place.offset + b + np.arange(frame.size, dtype=np.int64)


def _extent(frame: Frame, place: Place, guard: int) -> int:
    cells = frame.size and frame.batch
    inner = (frame.batch - 1) * _stride(frame, place) + frame.size if cells else 0
    return 2 * guard + place.offset + inner


def bits_of(t: Tensor) -> np.ndarray:
    """A tensor's elements as numpy has them: 16-bit types as their bits."""
    t = t.detach().contiguous()
    return t.view(torch.int16).numpy().view(np.uint16) if t.dtype in (f16, bf16) else t.numpy()


def tensor_of(a: np.ndarray, dtype: torch.dtype) -> Tensor:
    if dtype in (f16, bf16):
        return torch.from_numpy(a.view(np.int16).copy()).view(dtype)
    return torch.from_numpy(a.copy())


def arrays_of(frame: Frame, guard: int = 0) -> dict[str, np.ndarray]:
    """All arrays of a call: inputs among NaN, outputs full of NaN among marks."""
    made: dict[str, np.ndarray] = {}
    streams, outputs = _places(frame)
    for j, (t, place) in enumerate(zip(frame.streams, streams, strict=True)):
        a = aligned(_extent(frame, place, guard), _BITS[t.dtype])
        a[:] = np.uint16(0x7FFF) if t.dtype in (f16, bf16) else np.nan
        a[_cells(frame, place, guard)] = bits_of(t)
        made[f"stream{j}"] = a
    for i, (dtype, place) in enumerate(zip(frame.outputs, outputs, strict=True)):
        if i == 0 and frame.in_place >= 0:
            continue
        a = aligned(_extent(frame, place, guard), _BITS[dtype])
        a[:] = _MARKS[dtype]
        a[_cells(frame, place, guard)] = np.uint16(0x7FFF) if dtype in (f16, bf16) else np.nan
        made[f"output{i}"] = a
    made["parameters"] = frame.parameters.reshape(-1).to(f64).numpy().copy()
    if frame.seed is not None:
        made["seed"] = frame.seed.reshape(-1).numpy().copy()
    for name in ("prologue", "clamp"):
        t = getattr(frame, name)
        if t is not None:
            made[name] = t.reshape(-1).to(f64).numpy().copy()
    if frame.scalars:
        made["scalars"] = np.full(frame.batch * frame.scalars, np.nan)
    return made


def outputs_in(frame: Frame, arrays: Mapping[str, np.ndarray], guard: int = 0) -> list[Tensor]:
    """The outputs [B, D] out of their arrays."""
    streams, outputs = _places(frame)
    found = []
    for i, (dtype, place) in enumerate(zip(frame.outputs, outputs, strict=True)):
        within = i == 0 and frame.in_place >= 0
        place = streams[frame.in_place] if within else place
        name = f"stream{frame.in_place}" if within and f"output{i}" not in arrays else f"output{i}"
        found.append(tensor_of(arrays[name][_cells(frame, place, guard)], dtype))
    return found


@dataclass
class Result:
    outputs: list[Tensor]  # [B, D]
    scalars: Tensor | None  # [B, s] float64
    plan: dict[str, Any]

    @property
    def all(self) -> list[Tensor]:
        return self.outputs + ([] if self.scalars is None else [self.scalars])


def run(module, frame: Frame, **plan: Any) -> Result:
    """Runs the call on the emulated machine. What lies beside the outputs, and every input, must be as before."""
    arrays = arrays_of(frame, _GUARD)
    before = {name: a.copy() for name, a in arrays.items()}
    used = module.run_frame(numbers_of(frame, plan, _GUARD), arrays)
    found = outputs_in(frame, arrays, _GUARD)
    streams, outputs = _places(frame)
    for i, place in enumerate(outputs):
        name = f"output{i}"
        if i == 0 and frame.in_place >= 0:
            name, place = f"stream{frame.in_place}", streams[frame.in_place]
        cells = _cells(frame, place, _GUARD)
        arrays[name][cells] = before[name][cells]
    scalars = None
    if frame.scalars:
        scalars = torch.from_numpy(arrays["scalars"].reshape(frame.batch, frame.scalars).copy())
        arrays["scalars"][:] = np.nan
    for name, a in arrays.items():
        assert a.tobytes() == before[name].tobytes(), (
            f"{name} was written where it should not be ({used['text']})"
        )
    return Result(found, scalars, used)


def plan_of(module, frame: Frame, size: tuple[int, int] | None = None, **plan: Any) -> dict[str, Any]:
    """The plan alone, for a batch and size (B, D) of which no memory is needed."""
    numbers = numbers_of(frame, plan)
    if size is not None:
        numbers["batch"], numbers["size"] = size
        for name in numbers:
            if name.endswith("_stride") and name.startswith(("stream", "output")):
                numbers[name] = size[1]
    present = [n for n in ("seed", "prologue", "clamp") if getattr(frame, n) is not None]
    present += ["scalars"] if frame.scalars else []
    on_host = bool(numbers["host_parameters"])  # those may be looked at
    arrays = {"parameters": arrays_of(frame)["parameters"]} if on_host else {}
    return module.frame_plan(numbers, arrays, present if on_host else [*present, "parameters"])


def write_case(
    folder: Path,
    frame: Frame,
    fields: Sequence[str],
    wanted: Sequence[tuple[np.ndarray, np.ndarray]],
    **plan: Any,
) -> None:
    """The call as a folder for the stand-alone executables; `wanted` = (expected, allowed) per output, then scalars.

    Numbers of the plan that are not given are −1 in the header: as frame_plan has them.
    """
    folder.mkdir(parents=True)
    numbers = {**DEFAULTS, **numbers_of(frame, plan)}
    unknown = set(numbers) - set(fields)
    assert not unknown, f"header.npy has no {unknown}"
    np.save(folder / "header.npy", np.array([numbers.get(name, 0) for name in fields], np.int64))
    for name, a in arrays_of(frame).items():
        np.save(folder / f"{name}.npy", a)
    suffixes = [str(i) for i in range(len(frame.outputs))] + (["_scalars"] if frame.scalars else [])
    for suffix, (expected, allowed) in zip(suffixes, wanted, strict=True):
        np.save(folder / f"expected{suffix}.npy", np.asarray(expected, np.float64))
        np.save(
            folder / f"allowed{suffix}.npy", np.broadcast_to(allowed, np.shape(expected)).astype(np.float64)
        )


# Limits of devices, as plans and headers take them.
H200 = {
    "major": 9, "minor": 0, "sms": 132, "shared_per_block": 232448, "shared_per_sm": 233472, "threads_per_sm": 2048,
    "max_cluster": 16, "l2_bytes": 50 << 20,
}  # fmt: skip
A100 = {
    **H200, "major": 8, "sms": 108, "shared_per_block": 166912, "shared_per_sm": 167936, "max_cluster": 1,
    "l2_bytes": 40 << 20,
}  # fmt: skip
SMALL = {
    **H200,
    "sms": 8,
    "shared_per_block": 49152,
    "shared_per_sm": 65536,
    "max_cluster": 8,
    "l2_bytes": 1 << 20,
}
# What a header holds where nothing is said: the plan's own choice on an H200.
DEFAULTS = {
    **dict.fromkeys(("variant", "threads", "cluster", "splits", "group", "shared"), -1),
    **H200,
}
