"""A damped low-rank Hessian H = λI + U diag(s) Uᵀ per sample, never formed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, errors, scalars
from .declare import Op
from .layout import batch_and_size, empty_output
from .reference import hessian as reference
from .scalars import Scalar

Tensor = torch.Tensor

KEEP_NORM, PLAIN, EXTRAPOLATE = reference.KEEP_NORM, reference.PLAIN, reference.EXTRAPOLATE


def _sum_to(d_coef: Tensor, coef: Tensor) -> Tensor:
    """The gradient of `coef` from its per-sample gradient [B, m]."""
    return d_coef if coef.dim() == 2 else d_coef.sum(0).to(coef.device)


def _fake_backward(grad: Tensor, eps: Tensor, prev: Tensor, coef: Any, mode: int, batch_dims: int) -> Any:
    batch, _ = batch_and_size(eps, batch_dims)
    d_coef = eps.new_empty((batch, 1 if mode == EXTRAPOLATE else 2), dtype=torch.float64)
    return empty_output(eps), empty_output(eps, prev.dtype), d_coef


def _without_prev(coef: Tensor) -> Tensor:
    """κ = 0: what `coef` means where there is no prev."""
    return torch.cat([coef[..., :1], torch.zeros_like(coef[..., 1:])], dim=-1)


def _backward(
    call: Any,
    grads: Sequence[Any],
    needs: Any,
    eps: Tensor,
    prev: Tensor | None,
    coef: Tensor,
    mode: int,
    batch_dims: int,
) -> tuple[Any, ...]:
    (grad,) = grads
    if grad is None:
        return None, None, None, None, None
    if prev is None and mode != PLAIN:
        return grad, None, None, None, None  # the identity
    used = _without_prev(coef) if prev is None else coef
    d_eps, d_prev, d_coef = call(BACKWARD, grad, eps, eps if prev is None else prev, used, mode, batch_dims)
    d_coef = _sum_to(d_coef, coef) if needs[2] else None
    if prev is None:
        return d_eps, None, None if d_coef is None else _without_prev(d_coef), None, None
    return d_eps, d_prev, d_coef, None, None


def _jvp(
    call: Any,
    tangents: Sequence[Any],
    eps: Tensor,
    prev: Tensor | None,
    coef: Tensor,
    mode: int,
    batch_dims: int,
) -> Tensor:
    eps_t, prev_t, coef_t = tangents[:3]
    eps_t = torch.zeros_like(eps) if eps_t is None else eps_t
    coef_t = torch.zeros_like(coef) if coef_t is None else coef_t
    if prev is None:
        if mode != PLAIN:
            return eps_t.clone()
        prev, prev_t, coef, coef_t = eps, eps_t, _without_prev(coef), _without_prev(coef_t)
    prev_t = torch.zeros_like(prev) if prev_t is None else prev_t
    return call(JVP, eps, prev, coef, eps_t, prev_t, coef_t, mode, batch_dims)


LM = Op(
    "lm_direction(Tensor eps, Tensor? prev, Tensor coef, int variant, int batch_dims) -> Tensor",
    reference=reference.lm_direction,
    fake=lambda eps, prev, coef, mode, batch_dims: empty_output(eps),
    check=checks.lm_direction,
    backward=_backward,
    jvp=_jvp,
    out=True,
)
BACKWARD = Op(
    "lm_direction_backward(Tensor grad, Tensor eps, Tensor prev, Tensor coef, int variant, int batch_dims)"
    " -> (Tensor, Tensor, Tensor)",
    reference=reference.lm_direction_backward,
    fake=_fake_backward,
    check=checks.lm_direction_backward,
    returns_scalars=True,
)
JVP = Op(
    "lm_direction_jvp(Tensor eps, Tensor prev, Tensor coef, Tensor eps_t, Tensor prev_t, Tensor coef_t, int variant,"
    " int batch_dims) -> Tensor",
    reference=reference.lm_direction_jvp,
    fake=lambda eps, *rest: empty_output(eps),
    check=checks.lm_direction_jvp,
)


def lm_direction(
    eps: Tensor,
    prev: Tensor | None = None,
    *,
    damping: Scalar | None = None,
    kappa: Scalar | None = None,
    extrapolation: Scalar | None = None,
    keep_norm: bool = True,
    batch_dims: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    r"""Levenberg–Marquardt–Langevin direction: `eps` bent by a damped rank-one Hessian.

    With m = κ·prev + (1−κ)·eps, per sample,

        u = eps − m ⟨eps, m⟩ / (λ + ‖m‖²) = λ (λI + m mᵀ)⁻¹ eps
        out = u · ‖eps‖ / ‖u‖        (`keep_norm=False`: u itself)

    evaluated through the residual prev − eps, so that it is exact to rounding for every κ, λ and correlation. κ = 0
    or no `prev` gives `eps` back, bit for bit (with `keep_norm=False` λ/(λ + ‖eps‖²)·eps). With `extrapolation=γ`
    instead of damping and kappa it is the limit of small damping: ‖eps‖ d/‖d‖ with d = eps + γ (eps − prev) less
    its part along eps.

    Args:
        eps: [B, *sample] (or [*sample] with `batch_dims=0`), the current direction.
        prev: like `eps`, the previous direction; its dtype may be narrower.
        damping: λ ≥ 0; kappa: κ; extrapolation: γ. Numbers, 0-dim tensors or [B], all differentiable.
        keep_norm: rescale to the norm of `eps`.
        out: where to write; may be `eps` or `prev` itself.

    Returns:
        Tensor like `eps`.

    Paper: the LML diffusion sampler ("Unleashing High-Quality Image Generation in Diffusion Sampling Using
    Second-Order Levenberg-Marquardt-Langevin").

    >>> import torch, marquardt as mq
    >>> eps, prev = torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.5]])
    >>> mq.lm_direction(eps, prev, damping=1.0, kappa=0.5).norm()
    tensor(5.)
    """
    if extrapolation is None:
        mode = KEEP_NORM if keep_norm else PLAIN
        if type(damping) is float and type(kappa) is float:
            coef = scalars.of_floats((damping, kappa))
        else:
            coef = _damped_coef(eps, prev, damping, kappa, keep_norm, batch_dims)
    else:
        mode = EXTRAPOLATE
        coef = _extrapolation_coef(eps, damping, kappa, extrapolation, keep_norm, batch_dims)
    if out is None:
        return LM.call(eps, prev, coef, mode, batch_dims)
    return LM.to_out(out, eps, prev, coef, mode, batch_dims)


def _damped_coef(eps: Any, prev: Any, damping: Any, kappa: Any, keep_norm: bool, batch_dims: int) -> Tensor:
    if damping is None:
        if prev is not None or not keep_norm:
            raise errors.value("lm_direction", "damping", "be given (or extrapolation instead)", None)
        damping = 0.0
    if kappa is None:
        if prev is not None:
            raise errors.value("lm_direction", "kappa", "be given where prev is", None)
        kappa = 0.0
    checks.floating("lm_direction", "eps", eps)
    checks.batched("lm_direction", "eps", eps, batch_dims)
    return scalars.pack("lm_direction", ("damping", "kappa"), (damping, kappa), eps, batch_dims)


def _extrapolation_coef(
    eps: Any, damping: Any, kappa: Any, extrapolation: Any, keep_norm: bool, batch_dims: int
) -> Tensor:
    for name, given in (("damping", damping), ("kappa", kappa)):
        if given is not None:
            raise errors.value("lm_direction", "extrapolation", f"come without {name}", given)
    if not keep_norm:
        raise errors.value("lm_direction", "extrapolation", "come with keep_norm", keep_norm)
    checks.floating("lm_direction", "eps", eps)
    checks.batched("lm_direction", "eps", eps, batch_dims)
    return scalars.pack("lm_direction", ("extrapolation",), (extrapolation,), eps, batch_dims)
