"""The definition of every op in plain PyTorch: any device, any dtype, differentiable.

`marquardt.reference.<op>` takes the same arguments as `marquardt.<op>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import scalars
from ..layout import batch_and_size
from ..noise import draw_seed
from . import gauss_newton, hessian, langevin, lowrank
from .gauss_newton import softmax_head_hvp
from .noise import normal
from .steps import langevin_step, lml_ddim_step, lml_dpm_step, lml_flow_step, underdamped_langevin_step
from .threshold import dynamic_threshold

__all__ = [
    "affine_step",
    "damped_gram_solve",
    "dynamic_threshold",
    "langevin_step",
    "lm_direction",
    "lml_ddim_step",
    "lml_dpm_step",
    "lml_flow_step",
    "lowrank_inv_sqrt",
    "lowrank_logdet",
    "lowrank_matvec",
    "lowrank_solve",
    "lowrank_update",
    "normal",
    "softmax_head_hvp",
    "underdamped_langevin_step",
]

Tensor = torch.Tensor


def _into(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result)


def lm_direction(
    eps: Tensor,
    prev: Tensor | None = None,
    *,
    damping: Any = None,
    kappa: Any = None,
    extrapolation: Any = None,
    keep_norm: bool = True,
    batch_dims: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`marquardt.lm_direction` as a formula."""
    if extrapolation is None:
        mode = hessian.KEEP_NORM if keep_norm else hessian.PLAIN
        names: tuple[str, ...] = ("damping", "kappa")
        values = [0.0 if v is None else v for v in (damping, kappa)]
    else:
        mode, names, values = hessian.EXTRAPOLATE, ("extrapolation",), [extrapolation]
    coef = scalars.pack("lm_direction", names, values, eps, batch_dims)
    return _into(hessian.lm_direction(eps, prev, coef, mode, batch_dims), out)


def affine_step(
    terms: Sequence[Tensor],
    coefficients: Sequence[Any],
    *,
    noise_scale: Any = 0.0,
    noise: Tensor | None = None,
    generator: Any = None,
    seed: Any = None,
    batch_dims: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    """`marquardt.affine_step` as a formula."""
    terms, values, drawn = list(terms), list(coefficients), None
    if noise is not None:
        terms.append(noise)
        values.append(noise_scale)
    elif seed is not None or generator is not None or isinstance(noise_scale, Tensor) or noise_scale != 0:
        drawn = draw_seed("affine_step", terms[0], generator, seed, batch_dims)
        values.append(noise_scale)
    names = [f"coefficients[{j}]" for j in range(len(values))]
    coef = scalars.pack("affine_step", names, values, terms[0], batch_dims)
    return _into(langevin.affine_step(terms, coef, drawn, batch_dims), out)


def _lowrank(
    variant: int, v: Tensor, U: Tensor, s: Any, damping: Any, check: bool, batch_dims: int
) -> tuple[Tensor, Tensor]:
    k = U.shape[0] if lowrank.is_shared(U, v, batch_dims) else U.shape[batch_dims]
    coef = scalars.with_weights(lowrank.NAMES[variant], ("damping",), (damping,), s, k, v, batch_dims)
    return lowrank.apply(v, U, coef, variant, check, batch_dims)


def _with_info(value: Tensor, info: Tensor, return_info: bool, batch_dims: int) -> Any:
    info = info.reshape(info.shape[: -1 if batch_dims else -2]).to(torch.int32)
    return (value, info) if return_info else value


def lowrank_matvec(v: Tensor, U: Tensor, s: Any = None, *, damping: Any, batch_dims: int = 1) -> Tensor:
    """`marquardt.lowrank_matvec` as a formula."""
    return _lowrank(lowrank.MATVEC, v, U, s, damping, False, batch_dims)[0]


def lowrank_solve(
    g: Tensor,
    U: Tensor,
    s: Any = None,
    *,
    damping: Any,
    keep_norm: bool = False,
    check: bool = True,
    return_info: bool = False,
    batch_dims: int = 1,
) -> Any:
    """`marquardt.lowrank_solve` as a formula."""
    out, info = _lowrank(lowrank.SOLVE, g, U, s, damping, check, batch_dims)
    if keep_norm:
        batch, size = batch_and_size(g, batch_dims)
        square = [(lowrank.wide(t, batch, size) ** 2).sum(1, keepdim=True) for t in (out, g)]
        empty = square[0] == 0
        ratio = torch.where(empty, 0.0, square[1] / torch.where(empty, 1.0, square[0])).sqrt()
        out = lowrank.frame.store(lowrank.wide(out, batch, size) * ratio, g)
    return _with_info(out, info, return_info, batch_dims)


def lowrank_inv_sqrt(
    z: Tensor,
    U: Tensor,
    s: Any = None,
    *,
    damping: Any,
    check: bool = True,
    return_info: bool = False,
    batch_dims: int = 1,
) -> Any:
    """`marquardt.lowrank_inv_sqrt` as a formula."""
    out, info = _lowrank(lowrank.INV_SQRT, z, U, s, damping, check, batch_dims)
    return _with_info(out, info, return_info, batch_dims)


def lowrank_logdet(
    U: Tensor,
    s: Any = None,
    *,
    damping: Any,
    shared: bool = False,
    check: bool = True,
    return_info: bool = False,
    batch_dims: int = 1,
) -> Any:
    """`marquardt.lowrank_logdet` as a formula."""
    batch_dims = 0 if shared else batch_dims
    row = U.new_empty((*U.shape[:batch_dims], *U.shape[batch_dims + 1 :]))
    k = U.shape[batch_dims]
    coef = scalars.with_weights("lowrank_logdet", ("damping",), (damping,), s, k, row, batch_dims)
    found = lowrank.logdet(U, coef, check, batch_dims)
    value = found[:, 0] if batch_dims else found[0, 0]
    return _with_info(value, found[:, 1:], return_info, batch_dims)


def lowrank_update(
    U: Tensor,
    s: Any,
    v: Tensor,
    *,
    decay: Any,
    weight: Any = 1.0,
    rank: int | None = None,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    """`marquardt.lowrank_update` as a formula."""
    k = U.shape[0] if lowrank.is_shared(U, v, batch_dims) else U.shape[batch_dims]
    names, numbers = ("decay", "weight"), (decay, weight)
    coef = scalars.with_weights("lowrank_update", names, numbers, s, k, v, batch_dims)
    rows, found = lowrank.update(v, U, coef, k if rank is None else rank, batch_dims)
    return rows, found if batch_dims else found[0]


def damped_gram_solve(g: Tensor, x: Tensor, *, damping: Any) -> Tensor:
    """`marquardt.damped_gram_solve` as a formula."""
    number = damping if isinstance(damping, Tensor) else torch.tensor(float(damping), dtype=torch.float64)
    return gauss_newton.damped_gram_solve(g, x, number)[0]
