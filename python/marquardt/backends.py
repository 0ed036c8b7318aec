"""Which backend runs an op, and why the others do not.

    cuda        the native CUDA kernels                    CUDA tensors
    cpu         the native C++ kernels                     CPU tensors
    triton      triton_kernels/                            CUDA tensors (CPU tensors under TRITON_INTERPRET=1)
    reference   the definition in plain PyTorch            everything

`auto` takes the first of `PREFERENCE` that can run. Forcing one that cannot raises, with every backend's reason.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from . import _native, gpu

Tensor = torch.Tensor

NAMES = ("cuda", "triton", "cpu", "reference")
NATIVE = ("cuda", "cpu")  # one set of operators: their kernel is found by the device of the data

# What `auto` takes, best first, by the device of the data.
PREFERENCE = {
    "cuda": ("cuda", "triton", "reference"),
    "cpu": ("cpu", "triton", "reference"),  # Triton through its interpreter
}
_ELSEWHERE = ("reference",)

_ENVIRONMENT = "MARQUARDT_BACKEND"


def _checked(name: str) -> str:
    if name not in ("auto", *NAMES):
        raise ValueError(f"use_backend: name must be one of auto, {', '.join(NAMES)}, got {name!r}")
    return name


# A plain global: a context variable cannot be traced by torch.compile. None means auto.
_forced: str | None = None
if os.environ.get(_ENVIRONMENT, "auto") != "auto":
    _forced = _checked(os.environ[_ENVIRONMENT])


def forced() -> str | None:
    """The backend that `use_backend` or MARQUARDT_BACKEND asks for, None for auto."""
    return _forced


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend: "cuda", "triton", "cpu", "reference" or "auto".

    The choice is one for the whole process, and under `torch.compile` it is made when the function is traced.

    >>> import torch, marquardt as mq
    >>> with mq.use_backend("reference"):
    ...     out = mq.affine_step([torch.ones(1, 4)], [2.0])
    >>> out
    tensor([[2., 2., 2., 2.]])
    """
    global _forced
    previous = _forced
    _forced = None if _checked(name) == "auto" else name
    try:
        yield
    finally:
        _forced = previous


def _why_not_cuda(op: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"the data is on {device.type}"
    if _native.why_not() is not None:
        return _native.why_not()
    if gpu.versions() is not None and not torch._C._dispatch_has_kernel_for_dispatch_key(
        f"marquardt::_{op}", "CUDA"
    ):
        return f"this build has no CUDA kernel of {op}"
    return gpu.why_not(device)


def _why_not_triton(op: str, device: torch.device) -> str | None:
    try:
        from . import triton_kernels
    except ImportError as error:
        return f"triton_kernels is not installed: {error}"
    fits, reason = triton_kernels.available()
    if not fits:
        return str(reason)
    if op in triton_kernels.WITHOUT:
        return f"there is no Triton kernel of {op}"
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cuda" or (device.type == "cpu" and interpreted):
        return None
    return f"the data is on {device.type}"


def _why_not_cpu(op: str, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"the data is on {device.type}"
    return _native.why_not()


def _why_not_reference(op: str, device: torch.device) -> str | None:
    return None


_WHY_NOT = {
    "cuda": _why_not_cuda,
    "triton": _why_not_triton,
    "cpu": _why_not_cpu,
    "reference": _why_not_reference,
}


def reasons(op: str, device: torch.device) -> dict[str, str | None]:
    """For each backend None if it can run `op` on `device`, else why not."""
    return {name: _WHY_NOT[name](op, device) for name in NAMES}


def available(device: str = "cpu") -> tuple[str, ...]:
    """The backends that can run here on tensors of `device`."""
    return tuple(
        name for name, reason in reasons("lm_direction", torch.device(device)).items() if reason is None
    )


_chosen: dict[tuple[str | None, str, torch.device], str] = {}
_native_devices: dict[str, set[torch.device]] = {}


def native_devices(op: str) -> set[torch.device]:
    """Devices other than the CPU for which `auto` has chosen the native kernels of `op`; grows as calls are made."""
    return _native_devices.setdefault(op, set())


def forget() -> None:
    """Decide anew at the next call: for tests that change what can run."""
    _chosen.clear()
    for devices in _native_devices.values():
        devices.clear()


def choose(op: str, first: Tensor) -> str:
    """The backend for `op` on the data that begin with `first`.

    Raises if a forced one cannot run, warns once for the slow reference. Asked once per device.
    """
    device = first.device
    found = _chosen.get((_forced, op, device))
    if found is None:
        if device.type == "cuda" and _forced is None and _is_fake(first):
            return "cuda" if _native.why_not() is None else "reference"  # shapes alone: no device is asked
        found = _chosen[_forced, op, device] = _decided(op, device)
        if found == "cuda" and _forced is None:
            native_devices(op).add(device)
    return found


def _decided(op: str, device: torch.device) -> str:
    if _forced is not None:
        if _WHY_NOT[_forced](op, device) is None:
            return _forced
        raise NotImplementedError(_refusal(op, device))
    for name in PREFERENCE.get(device.type, _ELSEWHERE):
        if _WHY_NOT[name](op, device) is None:
            if name == "reference":
                _warn(op, device)
            return name
    raise AssertionError("the reference runs everywhere")


def _is_fake(t: Tensor) -> bool:
    if type(t) is Tensor:
        return False
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(t, FakeTensor)


def when_traced(op: str, index: int | None) -> str:
    """The backend of `op` in a program traced for a CUDA device. Without one here the operator itself is recorded."""
    if not torch.cuda.is_available():
        return "cuda"
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    return next(name for name in PREFERENCE["cuda"] if _WHY_NOT[name](op, device) is None)


# torch.compile calls it while it traces and keeps the answer; what `torch.compiler.assume_constant_result` sets, which
# would import the whole of Dynamo.
when_traced.__dict__["_dynamo_marked_constant"] = True


_warned: set[tuple[str, str]] = set()


def _refusal(op: str, device: torch.device) -> str:
    lines = [f"{op}: backend must be one that can run, got {_forced!r} on {device}"]
    lines += [f"  {name}: {why or 'can run'}" for name, why in reasons(op, device).items()]
    return "\n".join(lines)


def _warn(op: str, device: torch.device) -> None:
    if (op, device.type) in _warned or torch.compiler.is_compiling():
        return
    _warned.add((op, device.type))
    why = "; ".join(f"{name}: {reason}" for name, reason in reasons(op, device).items() if reason)
    warnings.warn(f"marquardt.{op} runs as plain PyTorch on {device.type} ({why})", stacklevel=6)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that a call would take, why others do not, and which inputs are copied.

    `plan` says how the CUDA kernels would be launched: which variant of them, on how many CTAs, in how much shared
    memory, one after the other where a call has several; of the Triton kernels only what is no kernel of theirs.
    """

    op: str
    backend: str | None
    reasons: dict[str, str | None]
    copies: tuple[str, ...] = field(default_factory=tuple)
    plan: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can run'}"]
        lines += [f"  {name}: {reason or 'can run'}" for name, reason in self.reasons.items()]
        lines += [f"  copied: {line}" for line in self.copies]
        lines += [f"  plan: {self.plan}"] if self.plan else []
        return "\n".join(lines)


_ALWAYS_NOISY = ("langevin_step", "underdamped_langevin_step")


def _draws_noise(public: str, kwargs: dict[str, Any]) -> bool:
    scale = kwargs.get("noise_scale", kwargs.get("eta", 1.0 if public in _ALWAYS_NOISY else 0.0))
    scale = 1.0 if str(kwargs.get("algorithm", "")).startswith("sde") or kwargs.get("stochastic") else scale
    drawn = isinstance(scale, Tensor) or scale != 0 or kwargs.get("seed") is not None
    return (drawn or kwargs.get("generator") is not None) and kwargs.get("noise") is None


def _copies(tensors: list[tuple[str, Tensor]], batch_dims: int, noisy: bool) -> tuple[str, ...]:
    """Inputs that do not lie in the order in which the kernel walks a sample: that of the first, or row-major."""
    from .layout import is_dense

    def sample(t: Tensor) -> Tensor:
        return t.select(0, 0) if batch_dims and t.shape[0] else t

    def steps(t: Tensor) -> list[int]:
        return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]

    first = tensors[0][1]
    walk = sample(first)
    why = f"the order of the first tensor {tuple(first.stride())}"
    if noisy or not is_dense(walk):
        walk = torch.empty(walk.shape, device="meta")
        why = "row-major order, in which noise is counted" if noisy else "row-major order"

    def lies_otherwise(t: Tensor) -> bool:
        if t.shape == first.shape:
            return steps(sample(t)) != steps(walk)
        inner = walk.dim()  # a stack of rows beside the first: its last dimensions are those of a sample
        if not 0 < inner < t.dim() or t.shape[t.dim() - inner :] != walk.shape:
            return False
        return steps(t[(0,) * (t.dim() - inner)]) != steps(walk)

    return tuple(
        f"{label} (strides {tuple(t.stride())}, not in {why})"
        for label, t in tensors
        if t.numel() and lies_otherwise(t)
    )


def explain(op: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Which backend would run `op(*args, **kwargs)`, and why the others would not. Nothing is computed.

    >>> import torch, marquardt as mq
    >>> mq.explain(mq.affine_step, [torch.ones(2, 4)], [1.0]).backend in ("cpu", "reference")
    True
    """
    from .declare import operator_of, registry

    public = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    name = operator_of.get(public, public)
    if name not in registry:
        raise ValueError(
            f"explain: op must be one of {', '.join(sorted({*registry, *operator_of}))}, got {public}"
        )
    tensors: list[tuple[str, Tensor]] = []
    for label, value in [*((f"argument {i}", v) for i, v in enumerate(args)), *kwargs.items()]:
        members = enumerate(value) if isinstance(value, (list, tuple)) else [(None, value)]
        tensors += [
            (label if j is None else f"{label}[{j}]", t)
            for j, t in members
            if isinstance(t, Tensor) and t.dim() > 0
        ]
    if not tensors:
        raise ValueError("explain: args must hold a tensor, got none")
    if public == "lowrank_update":  # the kernel walks like v, which stands behind U and s
        tensors.sort(key=lambda pair: pair[0] not in ("v", "argument 2"))
    first = tensors[0][1]
    why = reasons(name, first.device)
    candidates = [forced()] if forced() else PREFERENCE.get(first.device.type, _ELSEWHERE)
    backend = next((n for n in candidates if n and why[n] is None), None)
    copies = (
        _copies(tensors, kwargs.get("batch_dims", 1), _draws_noise(public, kwargs))
        if backend != "reference"
        else ()
    )
    plan = None
    if backend == "cuda" or (backend == "cpu" and _native.emulated()):
        plan = _plan(op, public, args, kwargs)
    if backend == "triton":
        from . import triton_kernels

        plan = triton_kernels.plan(public)
    return Explanation(public, backend, why, copies, plan)


def _plan(op: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """How the CUDA kernels would run the call. It goes all the way to the launch, which is left out."""
    import marquardt

    function = op if callable(op) else getattr(marquardt, name)
    kwargs = {k: v for k, v in kwargs.items() if k != "out"}
    if _draws_noise(name, kwargs) and kwargs.get("seed") is None:  # no generator may move
        state = args[0] if args else next(iter(kwargs.values()))
        state = state[0] if isinstance(state, (list, tuple)) else state
        listed = isinstance(kwargs.pop("generator", None), (list, tuple))
        shape = (state.shape[0], 2) if listed else (2,)
        kwargs["seed"] = torch.zeros(shape, dtype=torch.int64, device=state.device)
    with torch.no_grad():
        return _native.plan_of(lambda: function(*args, **kwargs))
