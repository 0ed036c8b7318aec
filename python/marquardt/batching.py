"""vmap for every op at once: the mapped dimension is folded into the batch.

Every op works per sample, so mapping over V batches of B samples is one batch of V·B. Noise is the exception: its
index runs through the whole call, so calls with a seed shared by the batch are made one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .declare import Op

Tensor = torch.Tensor


def vmap_eager(op: Op, size: int, dims: Sequence[Any], args: Sequence[Any]) -> tuple[Any, Any]:
    """Result and out_dims of an op mapped over `dims` (one entry per argument, a list for a list)."""
    return _vmap(op, op, size, dims, args)


def vmap_traced(op: Op, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """The same for the traced operator."""
    return _vmap(op, op.traced, info.batch_size, dims, args)


def vmap_raw(op: Op, info: Any, dims: Sequence[Any], *args: Any) -> tuple[Any, Any]:
    """The same for the operator without autograd."""
    return _vmap(op, op.plain, info.batch_size, dims, args)


def _vmap(
    op: Op, call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]
) -> tuple[Any, Any]:
    names = [a.name for a in op.arguments]
    seed = args[names.index("seed")] if "seed" in names else None
    result = _one_by_one(call, size, dims, args) if seed is not None else _folded(op, call, size, dims, args)
    flat = op.flatten_outputs(result)
    return result, tuple(0 for _ in flat) if isinstance(flat, tuple) else 0


def _folded(op: Op, call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]) -> Any:
    at = len(args) - 1  # batch_dims comes last in every schema
    batch_dims = args[at]
    batch = _batch(args, dims) if batch_dims else 1

    def fold(a: Any, dim: Any) -> Any:
        """[V, B, ...] -> [V·B, ...]; what is not mapped is repeated."""
        if isinstance(a, list):
            inner = dim if isinstance(dim, (list, tuple)) else [dim] * len(a)
            return [fold(t, d) for t, d in zip(a, inner, strict=True)]
        if not isinstance(a, Tensor):
            return a
        moved = a.movedim(dim, 0) if dim is not None else a.expand(size, *a.shape)
        return moved.flatten(0, 1) if batch_dims else moved

    def fold_coef(a: Any, dim: Any) -> Any:
        """[m] stays shared; [B, m], [V, m] and [V, B, m] become [V·B, m]."""
        if not isinstance(a, Tensor) or (dim is None and a.dim() == 1):
            return a
        device = next(t for t in _tensors(args) if t.is_floating_point()).device
        moved = (a.movedim(dim, 0) if dim is not None else a.expand(size, *a.shape)).to(device)
        if moved.dim() == 2:
            moved = moved.unsqueeze(1).expand(size, batch, moved.shape[-1])
        return moved.flatten(0, 1)

    def fold_stack(a: Tensor, dim: Any) -> Tensor:
        """A stack beside vectors: [k, ...] stays shared, [V, k, ...] becomes one for each of V·B samples."""
        inner = a.dim() - (dim is not None)  # dimensions that the mapped function sees
        shared = inner == _dims(args[0], dims[0]) + 1 - batch_dims
        if not shared:
            return fold(a, dim)
        if dim is None or not batch_dims:
            return a if dim is None else a.movedim(dim, 0)
        stacks = a.movedim(dim, 0).unsqueeze(1)
        return stacks.expand(size, batch, *stacks.shape[2:]).flatten(0, 1)

    def fold_one(position: int, argument: Any, a: Any, dim: Any) -> Any:
        if argument.name.startswith("coef"):
            return fold_coef(a, dim)
        return fold_stack(a, dim) if argument.name == "basis" and position > 0 else fold(a, dim)

    folded = [
        fold_one(position, argument, a, dim)
        for position, (argument, a, dim) in enumerate(zip(op.arguments, args, dims, strict=True))
    ]
    folded[at] = 1
    result = call(*folded)

    def unfold(t: Any) -> Any:
        """[V·B, ...] -> [V, B, ...]; an unbatched call has nothing to unfold."""
        if isinstance(t, (list, tuple)):
            return type(t)(unfold(member) for member in t)
        return t.unflatten(0, (size, batch)) if batch_dims else t

    if not op.returns_scalars:
        return unfold(result)
    if isinstance(result, Tensor):
        return result.unflatten(0, (size, batch))
    *tensors, d_coef = result  # per-sample scalars have a batch dimension also in an unbatched call
    return (
        *unfold(tensors),
        d_coef.unflatten(0, (size, batch)) if d_coef.dim() == 2 else d_coef.expand(size, 0),
    )


def _batch(args: Sequence[Any], dims: Sequence[Any]) -> int:
    """B of the first tensor, seen through its mapped dimension."""
    first, dim = args[0], dims[0]
    if isinstance(first, list):
        first = first[0]
        dim = dim[0] if isinstance(dim, (list, tuple)) else dim
    shape = list(first.shape)
    if dim is not None:
        shape.pop(dim)
    return shape[0]


def _dims(a: Tensor, dim: Any) -> int:
    """Dimensions of an argument as the mapped function sees it."""
    return a.dim() - (dim is not None)


def _tensors(args: Sequence[Any]) -> list[Tensor]:
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def _one_by_one(call: Callable[..., Any], size: int, dims: Sequence[Any], args: Sequence[Any]) -> Any:
    def pick(a: Any, dim: Any, i: int) -> Any:
        if isinstance(a, list):
            inner = dim if isinstance(dim, (list, tuple)) else [dim] * len(a)
            return [pick(t, d, i) for t, d in zip(a, inner, strict=True)]
        return a.select(dim, i) if isinstance(a, Tensor) and dim is not None else a

    results = [call(*[pick(a, d, i) for a, d in zip(args, dims, strict=True)]) for i in range(size)]
    return _stack(results)


def _stack(results: Sequence[Any]) -> Any:
    if isinstance(results[0], (list, tuple)):
        return type(results[0])(_stack([r[j] for r in results]) for j in range(len(results[0])))
    return torch.stack(list(results))
