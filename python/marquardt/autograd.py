"""The autograd side of an op: two Functions for eager mode and the registration for tracing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from . import batching

if TYPE_CHECKING:
    from .declare import Op

Tensor = torch.Tensor


def call_eager(op: Op, *args: Any) -> Any:
    """How derivatives reach other ops in eager mode: all four paths are open again."""
    return op(*args)


def call_traced(op: Op, *args: Any) -> Any:
    """How derivatives reach other ops inside a trace: one node."""
    return op.traced(*op._tensors(args))


def _split(flat: Sequence[Any]) -> tuple[list[Tensor], list[Any]]:
    """Tensors to save, and the rest with placeholders at their places."""
    tensors = [a for a in flat if isinstance(a, Tensor)]
    return tensors, [_SAVED if isinstance(a, Tensor) else a for a in flat]


def _join(tensors: Sequence[Tensor], rest: Sequence[Any]) -> list[Any]:
    saved = iter(tensors)
    return [next(saved) if a is _SAVED else a for a in rest]


class _Saved:
    """Marks the place of a saved tensor."""


_SAVED = _Saved()


def _gradients(op: Op, ctx: Any, grads: Sequence[Any]) -> tuple[Any, ...]:
    args = op.unflatten(_join(ctx.saved_tensors, ctx.rest), ctx.lengths)
    if op.returns_list:
        grads = (list(grads[:-1]), grads[-1])
    needs = op.unflatten(ctx.needs_input_grad[1:], ctx.lengths)
    result = op.backward(call_eager, grads, needs, *args)
    return (None, *_flat_gradients(op, result, ctx.lengths))


def _flat_gradients(op: Op, result: Sequence[Any], lengths: Sequence[int]) -> list[Any]:
    """One gradient per flat argument; a list of gradients may be left out as a whole."""
    flat: list[Any] = []
    remaining = iter(lengths)
    for argument, g in zip(op.arguments, result, strict=True):
        if argument.kind == "list":
            count = next(remaining)
            flat += g or [None] * count
        else:
            flat.append(g)
    return flat


def functions_of(op: Op) -> tuple[type, type]:
    """(for torch.func and forward mode, for eager training)."""

    class Functorch(torch.autograd.Function):
        @staticmethod
        def forward(lengths: Any, *flat: Any) -> Any:
            return op.flatten_outputs(op.plain(*op.unflatten(flat, lengths)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.lengths, flat = inputs[0], inputs[1:]
            tensors, ctx.rest = _split(flat)
            ctx.save_for_backward(*tensors)
            ctx.save_for_forward(*tensors)
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return _gradients(op, ctx, grads)

        @staticmethod
        def jvp(ctx: Any, _: Any, *tangents: Any) -> Any:
            args = op.unflatten(_join(ctx.saved_tensors, ctx.rest), ctx.lengths)
            return op.jvp(call_eager, op.unflatten(tangents, ctx.lengths), *args)

        @staticmethod
        def vmap(info: Any, in_dims: Any, lengths: Any, *flat: Any) -> Any:
            args = op.unflatten(flat, lengths)
            dims = op.unflatten(in_dims[1:], lengths)
            result, out_dims = batching.vmap_eager(op, info.batch_size, dims, args)
            return op.flatten_outputs(result), out_dims

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, lengths: Any, *flat: Any) -> Any:
            ctx.lengths = lengths
            tensors, ctx.rest = _split(flat)
            ctx.save_for_backward(*tensors)
            ctx.set_materialize_grads(False)
            return op.flatten_outputs(op.plain(*op.unflatten(flat, lengths)))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return _gradients(op, ctx, grads)

    Functorch.__name__ = Functorch.__qualname__ = f"{op.name}_functorch"
    Eager.__name__ = Eager.__qualname__ = f"{op.name}_eager"
    return Functorch, Eager


def register(op: Op, qualified: str, library: torch.library.Library) -> None:
    """The formula that tracing sees."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        flat, ctx.lengths = op.flatten(inputs)
        tensors, ctx.rest = _split(flat)
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)

    def backward(ctx: Any, *grads: Any) -> Any:
        args = op.unflatten(_join(ctx.saved_tensors, ctx.rest), ctx.lengths)
        return op.backward(call_traced, grads, ctx.needs_input_grad, *args)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
