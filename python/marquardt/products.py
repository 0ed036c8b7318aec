"""The operators of the lowrank engine: `marquardt::gram_pair` and `marquardt::softmax_head_hvp`.

On CPU tensors they are kernels of the native library, which stream the rows once. Elsewhere they are compositions
over the vendor's matrix products, the best there is for these shapes on a GPU; nothing in them waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .reference import gauss_newton as reference

Tensor = torch.Tensor

_library = torch.library.Library("marquardt", "FRAGMENT")
_HALF = (torch.bfloat16, torch.float16)

# Rows whose products are summed in the compute type before they join sums in float64.
PRODUCT_ROWS = 1024
_MOST_PIECES, _PIECE_NUMBERS = 64, 1 << 24


def wide(t: Tensor) -> Tensor:
    """16-bit floats as float32."""
    return t.float() if t.dtype in _HALF else t


def full_precision(t: Tensor) -> Any:
    """No autocast: these ops take the dtype they are given."""
    return torch.autocast(t.device.type, enabled=False)


# --- gram_pair --------------------------------------------------------------------------------------------


def compose_gram_pair(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """xᵀx and gᵀx, products of `PRODUCT_ROWS` rows each in the compute type, their sums in float64."""
    rows, i, o = x.shape[0], x.shape[1], g.shape[1]
    gram, cross = (x.new_zeros(shape, dtype=torch.float64) for shape in ((i, i), (o, i)))
    pieces = min(max(_PIECE_NUMBERS // max(i * (i + o), 1), 1), _MOST_PIECES)
    with full_precision(x):
        for begin in range(0, rows, pieces * PRODUCT_ROWS):
            xs, gs = (wide(t[begin : begin + pieces * PRODUCT_ROWS]) for t in (x, g))
            whole = xs.shape[0] // PRODUCT_ROWS * PRODUCT_ROWS
            for a, b in ((xs[:whole], gs[:whole]), (xs[whole:], gs[whole:])):
                if a.shape[0]:
                    size = min(a.shape[0], PRODUCT_ROWS)
                    a, b = a.unflatten(0, (-1, size)), b.unflatten(0, (-1, size))  # [pieces, rows, i or o]
                    gram += torch.bmm(a.mT, a).sum(0, dtype=torch.float64)
                    cross += torch.bmm(b.mT, a).sum(0, dtype=torch.float64)
    return torch.tril(gram) + torch.tril(
        gram, -1
    ).mT, cross  # a library's product need not be symmetric to the bit


def _fake_gram_pair(g: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    i, o = x.shape[1], g.shape[1]
    return x.new_empty((i, i), dtype=torch.float64), x.new_empty((o, i), dtype=torch.float64)


def _gram_pair_backward(ctx: Any, d_gram: Tensor, d_cross: Tensor) -> tuple[Tensor | None, Tensor | None]:
    g, x = ctx.saved_tensors
    with full_precision(x):
        grads = reference.gram_pair_backward(d_gram, d_cross, wide(g), wide(x), tuple(ctx.needs_input_grad))
    return _like(grads[0], g), _like(grads[1], x)


# --- softmax_head_hvp -------------------------------------------------------------------------------------


def compose_softmax_head_hvp(x: Tensor, p: Tensor, G: Tensor) -> Tensor:
    """Two products and, between them, the backward of a softmax, which is the same map."""
    out = x.new_zeros(G.shape)
    if not x.shape[0]:
        return out
    with full_precision(x):
        r = torch.ops.aten._softmax_backward_data(torch.mm(x, G.mT), p, 1, p.dtype)  # [n, C]
        # The mean is taken inside the product, before a 16-bit result is rounded (or overflows).
        return torch.addmm(out, r.mT, x, beta=0, alpha=1 / x.shape[0])


def _softmax_head_hvp_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    x, p, G = ctx.saved_tensors
    want_x, want_p, want_G = ctx.needs_input_grad
    with full_precision(x):
        wants = (want_x, want_p)
        d_x, d_p = reference.softmax_head_hvp_backward(wide(grad), wide(x), wide(p), wide(G), wants)
    # The map is its own transpose in G.
    d_G = torch.ops.marquardt.softmax_head_hvp(x, p, grad) if want_G else None
    return _like(d_x, x), _like(d_p, p), d_G


def _like(grad: Tensor | None, t: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(t.dtype)


# --- registration -----------------------------------------------------------------------------------------


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _mapped(function: Callable[..., Any]) -> Callable[..., Any]:
    """A vmap rule from a definition that takes leading dimensions; 16-bit floats pass through float32."""

    def rule(info: Any, dims: tuple[int | None, ...], *tensors: Tensor) -> tuple[Any, Any]:
        moved = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(tensors, dims, strict=True)
        ]
        found = function(*(wide(t) for t in moved))
        if isinstance(found, tuple):
            return found, tuple(0 for _ in found)
        return found.to(tensors[0].dtype), 0

    return rule


def _register(
    schema: str,
    compose: Callable[..., Any],
    fake: Callable[..., Any],
    backward: Callable[..., Any],
    definition: Callable[..., Any],
) -> None:
    name = schema.partition("(")[0]
    qualified = f"marquardt::{name}"
    if not torch._C._dispatch_has_kernel(qualified):  # no native library, or one without this engine
        _library.define(schema)
    _library.impl(name, compose, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    torch.library.register_autograd(qualified, backward, setup_context=_save, lib=_library)
    torch.library.register_vmap(qualified, _mapped(definition), lib=_library)


_register(
    "gram_pair(Tensor g, Tensor x) -> (Tensor, Tensor)",
    compose_gram_pair,
    _fake_gram_pair,
    _gram_pair_backward,
    reference.gram_pair,
)
_register(
    "softmax_head_hvp(Tensor x, Tensor p, Tensor G) -> Tensor",
    compose_softmax_head_hvp,
    lambda x, p, G: x.new_empty(G.shape),
    _softmax_head_hvp_backward,
    reference.softmax_head_hvp,
)

gram_pair = torch.ops.marquardt.gram_pair.default
softmax_head_hvp = torch.ops.marquardt.softmax_head_hvp.default
