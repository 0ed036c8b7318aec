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
    return op.traced(*args)


def _save(op: Op, ctx: Any, flat: Sequence[Any]) -> None:
    """Tensors (and absent ones) are saved; the plain values between them are kept as they are."""
    first, last = (
        (op.tensors, len(op.arguments)) if op.list_at is None else (op.tensors - 1, len(op.arguments) - 1)
    )
    ctx.save_for_backward(*flat[:first], *flat[last:])
    ctx.values = flat[first:last]
    ctx.set_materialize_grads(False)


def _saved(op: Op, ctx: Any) -> tuple[Any, ...]:
    """The arguments of the op again."""
    tensors = ctx.saved_tensors
    first = op.tensors if op.list_at is None else op.tensors - 1
    return op.unflatten((*tensors[:first], *ctx.values, *tensors[first:]))


def _gradients(op: Op, ctx: Any, grads: Sequence[Any]) -> Any:
    """One gradient per flat argument; the list of gradients may be left out as a whole."""
    args = _saved(op, ctx)
    if op.returns_list:
        grads = (list(grads[:-1]), grads[-1])
    result = _with_list(op, op.backward(call_eager, grads, op.unflatten(ctx.needs_input_grad), *args), args)
    return op.flatten(result)


def _with_list(op: Op, result: Sequence[Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """Gradients where the list of gradients may have been left out as a whole."""
    at = op.list_at
    if at is None or result[at]:
        return tuple(result)
    return (*result[:at], [None] * len(args[at]), *result[at + 1 :])


def functions_of(op: Op) -> tuple[Any, Any]:
    """The `apply` for torch.func and forward mode, and the one for eager training."""

    class Functorch(torch.autograd.Function):
        @staticmethod
        def forward(*flat: Any) -> Any:
            return op.flatten_outputs(op.plain(*op.unflatten(flat)))

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            _save(op, ctx, inputs)
            ctx.save_for_forward(*ctx.to_save)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return _gradients(op, ctx, grads)

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> Any:
            return op.jvp(call_eager, op.unflatten(tangents), *_saved(op, ctx))

        @staticmethod
        def vmap(info: Any, in_dims: Any, *flat: Any) -> Any:
            result, out_dims = batching.vmap_eager(
                op, info.batch_size, op.unflatten(in_dims), op.unflatten(flat)
            )
            return op.flatten_outputs(result), out_dims

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *flat: Any) -> Any:
            _save(op, ctx, flat)
            return op.flatten_outputs(op.plain(*op.unflatten(flat)))

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return _gradients(op, ctx, grads)

    if op.list_at is None and not op.returns_tuple:
        # The most common kind without the detours: half of the time of a small training step is spent here.
        tensors = op.tensors

        def forward(ctx: Any, *args: Any) -> Any:
            ctx.save_for_backward(*args[:tensors])
            ctx.values = args[tensors:]
            return op.plain(*args)

        Eager.forward = staticmethod(forward)  # type: ignore[method-assign]

    Functorch.__name__ = Functorch.__qualname__ = f"{op.name}_functorch"
    Eager.__name__ = Eager.__qualname__ = f"{op.name}_eager"
    # The eager one is applied by the C++ base class: Function.apply asks about torch.func first, which the caller
    # has done, at the price of a small kernel.
    return Functorch.apply, super(torch.autograd.Function, Eager).apply


def register(op: Op, qualified: str, library: torch.library.Library) -> None:
    """The formula that tracing sees."""

    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _save(op, ctx, op.flatten(inputs))

    def backward(ctx: Any, *grads: Any) -> Any:
        args = _saved(op, ctx)
        return _with_list(op, op.backward(call_traced, grads, ctx.needs_input_grad, *args), args)

    torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=library)
