"""Gauss–Newton products and solves of linear layers: many rows, few columns."""

from __future__ import annotations

from typing import Any

import torch

from . import backends, checks, errors, products, scalars
from .reference import gauss_newton as reference
from .scalars import Scalar

Tensor = torch.Tensor

_functorch_active = torch._C._are_functorch_transforms_active
_forward_ad = torch.autograd.forward_ad


def softmax_head_hvp(x: Tensor, p: Tensor, G: Tensor) -> Tensor:
    r"""Hessian of the mean cross-entropy of a softmax head, times a direction G. The Hessian is never formed.

    For logits x Wᵀ with probabilities p = softmax(x Wᵀ), whatever the labels,

        z = x Gᵀ,   r = p ⊙ z − p · Σ_c (p ⊙ z),   out = rᵀ x / n

    which is the product of ∂²/∂W² of the mean loss with G, and the Gauss–Newton product of the head. On the CPU the
    logits are made a chunk of rows at a time, 8 MB a thread at most, and up to 16 classes x is read once; on a GPU it
    is two of the vendor's matrix products and the backward of a softmax between them. Sums run in an order that may
    depend on the number of threads, as those of `torch.mm` do (not up to 16 classes on the CPU).

    Args:
        x: [n, d], the features.
        p: [n, C], their softmax probabilities.
        G: [C, d], the direction.

    Returns:
        [C, d] in the dtype of the arguments, differentiable in all three. An empty batch gives 0.

    Used by Hessian-free and Gauss–Newton–CG optimisers of the last layer, influence functions and Laplace
    approximations of the head (Martens, "Deep learning via Hessian-free optimization", 2010; Schraudolph, "Fast
    curvature matrix-vector products", 2002).

    >>> import torch, marquardt as mq
    >>> x, G = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    >>> mq.softmax_head_hvp(x, torch.tensor([[0.5, 0.5]]), G)
    tensor([[ 0.2500,  0.5000],
            [-0.2500, -0.5000]])
    """
    op = "softmax_head_hvp"
    _matrix(op, "x", x)
    for name, t in (("p", p), ("G", G)):
        _matrix(op, name, t)
        _paired(op, name, t, "x", x)
    _rows(op, "p", p, x)
    if G.shape[0] != p.shape[1] or G.shape[1] != x.shape[1]:
        rule = f"have shape [classes, features] ([{p.shape[1]}, {x.shape[1]}])"
        raise errors.value(op, "G", rule, list(G.shape))
    if _by_definition(op, x):
        return reference.softmax_head_hvp(x, p, G)
    return products.softmax_head_hvp(x, p, G)


def damped_gram_solve(g: Tensor, x: Tensor, *, damping: Scalar) -> Tensor:
    r"""gᵀ x (xᵀx/b + λI)⁻¹: a gradient preconditioned by the damped second moment of its layer's inputs.

    x [b, i] are the inputs of a linear layer (patches, for a convolution), g [b, o] the gradients at its outputs.
    xᵀx and gᵀx come from one pass over the rows, with products in the dtype of the data and sums in float64; the
    i × i system is solved in float64 by Cholesky, without an inverse. Where b < i the equal gᵀ (xxᵀ/b + λI)⁻¹ x is
    taken instead, all in float64. So results stay accurate as λ → 0, where an explicit inverse in float32 does not.
    Memory beyond inputs and result does not grow with b (unless the elements of a row do not lie side by side: then
    that argument is copied). On the CPU results are equal bit for bit for any number of threads. On a GPU the pass
    is a composition over the vendor's batched matrix products; nothing waits for the device.

    Args:
        g: [b, o].
        x: [b, i], the dtype of g.
        damping: λ ≥ 0, a number or 0-dim tensor, differentiable. 0 needs xᵀx (xxᵀ where b < i) to be positive
            definite: else it is an error on the CPU, and where the host cannot know (a GPU, tracing, transforms)
            the result is NaN.

    Returns:
        [o, i] in the dtype of x, differentiable in all arguments. An empty batch gives 0.

    Used by layer-wise natural-gradient and Levenberg–Marquardt training: K-FAC's input factor (Martens & Grosse,
    2015), FOOF (Benzing, "Gradient descent on neurons and its link to approximate second-order optimization", 2022).

    >>> import torch, marquardt as mq
    >>> x, g = torch.tensor([[1.0], [3.0]]), torch.tensor([[2.0], [4.0]])
    >>> mq.damped_gram_solve(g, x, damping=2.0)  # 14 / (5 + 2)
    tensor([[2.]])
    """
    op = "damped_gram_solve"
    _matrix(op, "g", g)
    _matrix(op, "x", x)
    _paired(op, "g", g, "x", x)
    _rows(op, "g", g, x)
    coef = scalars.pack(op, ("damping",), (damping,), x, 0)
    for (value,) in checks.host_values(coef):
        if not 0.0 <= value < torch.inf:
            raise errors.value(op, "damping", "be finite and >= 0", value)
    scale = coef.reshape(())
    if _by_definition(op, x):
        found, info = reference.damped_gram_solve(g, x, scale)
    else:
        rows, columns = x.shape
        if rows < columns:
            found, info = reference.dual(g, x, scale)
        else:
            gram, cross = products.gram_pair(g, x)
            found, info = reference.primal(gram, cross, rows, scale)
        found = found.to(x.dtype)
    _check_definite(op, info, g, x, coef)
    return found


def _check_definite(op: str, info: Tensor, g: Tensor, x: Tensor, coef: Tensor) -> None:
    """On the CPU, where looking costs nothing: data without NaN or infinity must have given a definite system."""
    if torch.compiler.is_compiling() or type(info) is not Tensor or info.device.type != "cpu":
        return
    if _functorch_active() or torch._C._len_torch_dispatch_stack():
        return
    if int(info) and bool(x.detach().isfinite().all()):
        rule = "make xᵀx/b + λI positive definite (xxᵀ/b + λI where b < i)"
        raise errors.value(op, "damping", rule, float(coef.detach().reshape(())))


def _by_definition(op: str, x: Tensor) -> bool:
    """Whether the definition runs: it was asked for, or transforms are at work that it serves at every order."""
    forced = backends.forced()
    if forced in (None, "reference") or forced == x.device.type:
        compiling = torch.compiler.is_compiling()
        return forced == "reference" or (
            not compiling and (_functorch_active() or _forward_ad._current_level >= 0)
        )
    raise NotImplementedError(
        f"{op}: backend must be one that can run, got {forced!r} on {x.device}\n"
        "  cpu: CPU tensors; cuda: CUDA tensors, as matrix products of the vendor; reference: everything"
    )


def _matrix(op: str, argument: str, t: Any) -> None:
    checks.floating(op, argument, t)
    if t.dim() != 2:
        raise errors.value(op, argument, "have two dimensions", list(t.shape))


def _paired(op: str, argument: str, t: Tensor, first: str, like: Tensor) -> None:
    if t.dtype != like.dtype:
        rule = f"have the dtype of {first} ({checks.name(like.dtype)})"
        raise errors.kind(op, argument, rule, checks.name(t.dtype))
    if t.device != like.device:
        raise errors.value(op, argument, f"be on the device of {first} ({like.device})", t.device)


def _rows(op: str, argument: str, t: Tensor, x: Tensor) -> None:
    if t.shape[0] != x.shape[0]:
        raise errors.value(op, argument, f"have as many rows as x ({x.shape[0]})", list(t.shape))
