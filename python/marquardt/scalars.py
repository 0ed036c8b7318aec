"""Per-step scalars: Python numbers, 0-dim tensors or one value per sample become one `coef`.

A `coef` of Python floats only stays a tuple (eager calls hand it to C++ as it is); otherwise it is a float64
tensor, [m] on the CPU (read on the host, so it never synchronises) or [B, m] beside the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Union

import torch

from . import errors
from .layout import batch_and_size

Tensor = torch.Tensor
Scalar = Union[float, int, Tensor]
Coef = Union[tuple[float, ...], Tensor]


def pack(op: str, names: Sequence[str], values: Sequence[Scalar], like: Tensor, batch_dims: int) -> Coef:
    """The `coef` of `values`, one column each; differentiable in every tensor among them."""
    if all(type(v) is float for v in values):
        return tuple(values)  # type: ignore[arg-type]
    batch = batch_and_size(like, batch_dims)[0]
    columns = [_column(op, name, v, batch, batch_dims) for name, v in zip(names, values, strict=True)]
    if not any(isinstance(c, Tensor) for c in columns):
        return tuple(columns)  # type: ignore[return-value,arg-type]
    shared = all(not isinstance(c, Tensor) or (c.dim() == 0 and c.device.type == "cpu") for c in columns)
    device = torch.device("cpu") if shared else like.device
    if torch.finfo(torch.float64) and device.type == "mps":
        device = torch.device("cpu")
    tensors = [
        c.to(device=device, dtype=torch.float64)
        if isinstance(c, Tensor)
        else torch.full((), c, dtype=torch.float64, device=device)
        for c in columns
    ]
    if shared:
        return torch.stack(tensors)
    return torch.stack([t.expand(batch) for t in tensors], dim=1)


def as_tensor(coef: Coef) -> Tensor:
    """`coef` as the float64 tensor that tracing and the other backends take."""
    return torch.tensor(coef, dtype=torch.float64) if isinstance(coef, tuple) else coef


def _column(op: str, name: str, value: Scalar, batch: int, batch_dims: int) -> float | Tensor:
    if isinstance(value, Tensor):
        if value.is_complex() or value.dtype == torch.bool:
            raise errors.kind(op, name, "be a real number", str(value.dtype).removeprefix("torch."))
        if value.dim() == 0 or (value.dim() == 1 and batch_dims == 1 and value.shape[0] == batch):
            return value
        rule = f"be a number, a 0-dim tensor or of shape [{batch}]" if batch_dims else "be a number or a 0-dim tensor"
        raise errors.value(op, name, rule, list(value.shape))
    if isinstance(value, (bool, str, bytes)) or not hasattr(value, "__float__"):
        if not isinstance(value, torch.SymFloat) and not isinstance(value, torch.SymInt):
            raise errors.kind(op, name, "be a number or a tensor", type(value).__name__)
    return float(value)
