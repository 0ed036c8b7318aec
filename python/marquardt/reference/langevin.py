"""Definition of the Langevin steps, in plain differentiable PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from . import frame
from .noise import normal

Tensor = torch.Tensor


def affine_step(terms: Sequence[Tensor], coef: Tensor, seed: Tensor | None, batch_dims: int) -> Tensor:
    """Σ_j c_j·term_j + c_noise·ξ(seed), per sample; coef [m] or [B, m]."""
    x = frame.flatten(terms[0], batch_dims)
    c = frame.scalars(coef, x.shape[0], x.device).to(x.dtype)  # [B, m]
    out = c[:, :1] * x
    for j, term in enumerate(terms[1:], 1):
        out = out + c[:, j : j + 1] * frame.flatten(term, batch_dims)
    if seed is not None:
        xi = normal(seed, tuple(terms[0].shape), x.dtype, batch_dims).reshape(x.shape)
        out = out + c[:, -1:] * xi
    return frame.store(out, terms[0])


def affine_step_backward(
    grad: Tensor,
    terms: Sequence[Tensor],
    coef: Tensor,
    seed: Tensor | None,
    want_terms: bool,
    want_coef: bool,
    batch_dims: int,
) -> tuple[list[Tensor], Tensor]:
    """(d_terms, d_coef [B, m]): c_j·grad, and ⟨grad, term_j⟩ with ⟨grad, ξ⟩ last."""
    g = frame.flatten(grad, batch_dims)
    c = frame.scalars(coef, g.shape[0], g.device)
    d_terms: list[Tensor] = []
    if want_terms:
        d_terms = [
            frame.store(c[:, j : j + 1].to(g.dtype) * g, terms[0], term.dtype) for j, term in enumerate(terms)
        ]
    if not want_coef:
        return d_terms, c.new_empty(0)
    columns = [frame.dot(g, frame.flatten(t, batch_dims)) for t in terms]
    if seed is not None:
        xi = normal(seed, tuple(terms[0].shape), g.dtype, batch_dims).reshape(g.shape)
        columns.append(frame.dot(g, xi))
    return d_terms, torch.stack(columns, dim=1)
