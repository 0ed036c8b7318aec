"""The definition of every op in plain PyTorch: any device, any dtype, differentiable.

`marquardt.reference.<op>` takes the same arguments as `marquardt.<op>`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .. import scalars
from ..noise import draw_seed
from . import hessian, langevin
from .noise import normal

__all__ = ["affine_step", "lm_direction", "normal"]

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
