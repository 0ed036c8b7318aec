"""Steps of samplers and Langevin dynamics, one memory pass each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, errors, scalars
from .declare import Op
from .layout import batch_and_size, empty_output
from .noise import Generator, draw_seed, one_source
from .reference import langevin as reference
from .scalars import Scalar

Tensor = torch.Tensor

MAX_TERMS = 8


def _fake_backward(
    grad: Tensor,
    terms: list[Tensor],
    coef: Any,
    seed: Any,
    want_terms: bool,
    want_coef: bool,
    batch_dims: int,
) -> Any:
    batch, _ = batch_and_size(terms[0], batch_dims)
    columns = len(terms) + (seed is not None)
    d_coef = grad.new_empty((batch, columns) if want_coef else (0,), dtype=torch.float64)
    return [empty_output(terms[0], t.dtype) for t in terms] if want_terms else [], d_coef


def _backward(
    call: Any, grads: Sequence[Any], needs: Any, terms: list[Tensor], coef: Tensor, seed: Any, batch_dims: int
) -> tuple[Any, ...]:
    (grad,) = grads
    if grad is None:
        return None, None, None, None
    want_terms = any(needs[0]) if isinstance(needs[0], (list, tuple)) else bool(needs[0])
    want_coef = bool(needs[1])
    d_terms, d_coef = call(BACKWARD, grad, terms, coef, seed, want_terms, want_coef, batch_dims)
    if want_coef:
        d_coef = d_coef if coef.dim() == 2 else d_coef.sum(0).to(coef.device)
    return d_terms or None, d_coef if want_coef else None, None, None


def _jvp(
    call: Any, tangents: Sequence[Any], terms: list[Tensor], coef: Tensor, seed: Any, batch_dims: int
) -> Tensor:
    terms_t, coef_t = tangents[:2]
    moved = [torch.zeros_like(t) if dt is None else dt for t, dt in zip(terms, terms_t, strict=True)]
    out = call(AFFINE, moved, coef[..., : len(terms)], None, batch_dims)
    return out if coef_t is None else out + call(AFFINE, terms, coef_t, seed, batch_dims)


AFFINE = Op(
    "affine_step(Tensor[] terms, Tensor coef, Tensor? seed, int batch_dims) -> Tensor",
    reference=reference.affine_step,
    fake=lambda terms, coef, seed, batch_dims: empty_output(terms[0]),
    check=checks.affine_step,
    backward=_backward,
    jvp=_jvp,
    out=True,
)
BACKWARD = Op(
    "affine_step_backward(Tensor grad, Tensor[] terms, Tensor coef, Tensor? seed, bool want_terms, bool want_coef,"
    " int batch_dims) -> (Tensor[], Tensor)",
    reference=reference.affine_step_backward,
    fake=_fake_backward,
    check=checks.affine_step_backward,
    returns_scalars=True,
)


def affine_step(
    terms: Sequence[Tensor],
    coefficients: Sequence[Scalar],
    *,
    noise_scale: Scalar = 0.0,
    noise: Tensor | None = None,
    generator: Generator = None,
    seed: Tensor | int | None = None,
    batch_dims: int = 1,
    out: Tensor | None = None,
) -> Tensor:
    r"""A weighted sum of tensors, and noise, in one memory pass: the step of most samplers.

        out = Σ_j coefficients[j] · terms[j] + noise_scale · ξ,   ξ ~ N(0, I)

    The noise is drawn inside the kernel and never stored; backward draws it again from the same seed.

    Args:
        terms: up to 8 tensors [B, *sample]; the first is the state and gives the result its dtype and layout, the
            others have its dtype or one narrower dtype of the model.
        coefficients: one per term: number, 0-dim tensor or [B], all differentiable.
        noise_scale: number, 0-dim tensor or [B].
        noise: ξ given instead of drawn, like `terms[0]`.
        generator: as in `torch.randn`; a list of B generators gives each sample a stream of its own, so that a
            batch may be split without changing it.
        seed: an int, or the int64 tensor [2] or [B, 2] that the kernel reads.
        out: where to write; may be one of the terms.

    Returns:
        Tensor like `terms[0]`.

    >>> import torch, marquardt as mq
    >>> x, eps = torch.full((2, 3), 1.0), torch.full((2, 3), 0.5)
    >>> mq.affine_step([x, eps], [0.5, torch.tensor([1.0, -1.0])])
    tensor([[1., 1., 1.],
            [0., 0., 0.]])
    """
    if isinstance(terms, torch.Tensor):
        raise errors.kind("affine_step", "terms", "be a list of tensors", "a tensor")
    terms, values = list(terms), list(coefficients)
    if not 0 < len(terms) == len(values) <= MAX_TERMS:
        _wrong_count(terms, values)
    drawn = None
    noisy = type(noise_scale) is not float or noise_scale != 0.0  # zero as a tensor is not looked into
    if noisy or noise is not None or seed is not None or generator is not None:
        drawn = _add_noise(terms, values, noise_scale, noise, generator, seed, batch_dims)
    for v in values:
        if type(v) is not float:
            coef = _coef(terms, values, len(values) > len(coefficients), batch_dims)
            break
    else:
        coef = scalars.of_floats(tuple(values))  # type: ignore[arg-type]
    if out is None:
        return AFFINE.call(terms, coef, drawn, batch_dims)
    return AFFINE.to_out(out, terms, coef, drawn, batch_dims)


def _add_noise(
    terms: list[Tensor],
    values: list[Scalar],
    scale: Scalar,
    noise: Tensor | None,
    generator: Generator,
    seed: Tensor | int | None,
    batch_dims: int,
) -> Tensor | None:
    """Appends the noise and its scale: as one more term if it is given, else as a seed, which is returned."""
    one_source("affine_step", noise, generator, seed)
    if noise is not None:
        terms.append(noise)
        values.append(scale)
        return None
    if (
        seed is None
        and generator is None
        and not isinstance(scale, (torch.Tensor, torch.SymFloat))
        and scale == 0
    ):
        return None
    checks.floating("affine_step", "terms[0]", terms[0])
    checks.batched("affine_step", "terms[0]", terms[0], batch_dims)
    values.append(scale)
    return draw_seed("affine_step", terms[0], generator, seed, batch_dims)


def _coef(terms: list[Tensor], values: list[Scalar], noisy: bool, batch_dims: int) -> Tensor:
    checks.floating("affine_step", "terms[0]", terms[0])
    checks.batched("affine_step", "terms[0]", terms[0], batch_dims)
    names = [f"coefficients[{j}]" for j in range(len(values))]
    if noisy:
        names[-1] = "noise_scale"
    return scalars.pack("affine_step", names, values, terms[0], batch_dims)


def _wrong_count(terms: list[Tensor], values: list[Scalar]) -> None:
    if not 1 <= len(terms) <= MAX_TERMS:
        raise errors.value("affine_step", "terms", f"hold 1 to {MAX_TERMS} tensors", len(terms))
    raise errors.value("affine_step", "coefficients", f"hold one per term ({len(terms)})", len(values))
