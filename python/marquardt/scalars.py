"""Per-step scalars: Python numbers, 0-dim tensors or one value per sample become one `coef`.

A `coef` is float64: [m] on the CPU, shared by the batch and read on the host, so that it never synchronises; or
[B, m] beside the data. As a tensor it is one graph for all values under `torch.compile`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch

from . import errors
from .layout import batch_and_size

Tensor = torch.Tensor
Scalar: TypeAlias = float | int | Tensor

# A sampler calls with the same few numbers over and over, and making a tensor costs more than a small kernel.
_known: dict[tuple[float, ...], Tensor] = {}
_MOST_KNOWN = 4096

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack


def of_floats(values: tuple[float, ...]) -> Tensor:
    """[m] on the CPU from Python floats."""
    if _is_compiling() or _dispatch_modes():
        return torch.tensor(values, dtype=torch.float64, device="cpu")
    found = _known.get(values)
    return _remember(values) if found is None else found


def _remember(values: tuple[float, ...]) -> Tensor:
    with torch.inference_mode(False):  # it may be saved for a backward later
        made = torch.tensor(values, dtype=torch.float64, device="cpu")
    if type(made) is Tensor and not torch._C._functorch.is_functorch_wrapped_tensor(made):
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[values] = made
    return made


def pack(
    op: str,
    names: Sequence[str],
    values: Sequence[Scalar],
    like: Tensor,
    batch_dims: int,
    beside: bool = False,
) -> Tensor:
    """The `coef` of `values`, one column each; differentiable in every tensor among them.

    `beside`: per sample and beside the data whatever the values are; numbers of the host get there without a copy.
    """
    batch = batch_and_size(like, batch_dims)[0]
    columns = [column(op, name, v, batch, batch_dims) for name, v in zip(names, values, strict=True)]
    on_host = like.device.type in ("cpu", "mps")  # an MPS device has no float64
    if (on_host or not beside) and not any(isinstance(c, Tensor) for c in columns):
        made = of_floats(tuple(columns))  # type: ignore[arg-type]
        return made.expand(batch, -1) if beside else made
    shared = not beside and all(
        not isinstance(c, Tensor) or (c.dim() == 0 and c.device.type == "cpu") for c in columns
    )
    device = torch.device("cpu") if shared or like.device.type == "mps" else like.device
    tensors = [
        c.to(device=device, dtype=torch.float64)
        if isinstance(c, Tensor) and not _is_number(c, device)
        else torch.full((), float(c), dtype=torch.float64, device=device)
        for c in columns
    ]
    if shared:
        return torch.stack(tensors)
    return torch.stack([t.expand(batch) for t in tensors], dim=1)


def _is_number(c: Tensor, device: torch.device) -> bool:
    """Whether a host tensor may go to a GPU as a number: a copy would wait, and cannot be captured in a CUDA graph."""
    return (
        device.type == "cuda"
        and c.device.type == "cpu"
        and type(c) is Tensor
        and not c.requires_grad
        and torch.autograd.forward_ad._current_level < 0  # a tangent would be lost
        and not _is_compiling()
        and not _dispatch_modes()
        and not torch._C._functorch.is_functorch_wrapped_tensor(c)
    )


def column(op: str, name: str, value: Scalar, batch: int, batch_dims: int) -> float | Tensor:
    """A scalar as a float or a tensor, 0-dim or [B]."""
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise errors.kind(op, name, "be a real number", str(value.dtype).removeprefix("torch."))
        if value.dim() == 0 or (value.dim() == 1 and batch_dims == 1 and value.shape[0] == batch):
            return value
        rule = (
            f"be a number, a 0-dim tensor or of shape [{batch}]"
            if batch_dims
            else "be a number or a 0-dim tensor"
        )
        raise errors.value(op, name, rule, list(value.shape))
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        return float(value)  # first: a symbolic float of torch.compile cannot be asked for attributes
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        if not isinstance(value, torch.SymFloat) and not isinstance(value, torch.SymInt):
            raise errors.kind(op, name, "be a number or a tensor", type(value).__name__)
    return float(value)


def with_weights(
    op: str, names: Sequence[str], numbers: Sequence[Scalar], s: Tensor | None, k: int, like: Tensor,
    batch_dims: int,
) -> Tensor:  # fmt: skip
    """(numbers…, s_1 … s_k), float64: [m] on the CPU where all of it lies there, else [B, m] beside the data."""
    if s is None and all(type(n) is float for n in numbers):
        return of_floats((*numbers, *(1.0,) * k))  # type: ignore[arg-type]
    batch, _ = batch_and_size(like, batch_dims)
    if s is not None:
        _check_weights(op, s, k, like, batch, batch_dims)
    on_host = s is None or (s.dim() == 1 and s.device.type == "cpu")
    head = pack(op, names, numbers, like, batch_dims, beside=not on_host)
    weights = torch.ones(k, dtype=torch.float64, device=head.device) if s is None else s.to(torch.float64)
    if head.dim() == 1:
        return torch.cat([head, weights])
    return torch.cat([head, _beside(weights, like, batch)], dim=1)


def _beside(rows: Tensor, like: Tensor, batch: int) -> Tensor:
    """[B, m] on the device of the data."""
    device = like.device if like.device.type != "mps" else torch.device("cpu")
    rows = rows.to(device)
    return rows.expand(batch, -1) if rows.dim() == 1 else rows


def _check_weights(op: str, s: Any, k: int, like: Tensor, batch: int, batch_dims: int) -> None:
    if not isinstance(s, Tensor):
        raise errors.kind(op, "s", "be a tensor or None", type(s).__name__)
    if not s.is_floating_point():
        raise errors.kind(op, "s", "be a floating tensor", str(s.dtype).removeprefix("torch."))
    if s.device.type != "cpu" and s.device != like.device:
        raise errors.value(op, "s", f"be on the CPU or beside the data ({like.device})", s.device)
    allowed = ((k,), (batch, k)) if batch_dims else ((k,),)
    if tuple(s.shape) not in allowed:
        rule = f"have shape [{k}]" + (f" or [{batch}, {k}]" if batch_dims else "") + ", a number per row of U"
        raise errors.value(op, "s", rule, list(s.shape))
