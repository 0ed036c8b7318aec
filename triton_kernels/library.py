"""`torch.ops.marquardt_triton.*`: the entry points as operators with fakes, for traced programs.

Operators have no derivative of their own: the public functions differentiate.
"""

from __future__ import annotations

from typing import Any

import torch

from . import layout, step

Tensor = torch.Tensor
NAMESPACE = "marquardt_triton"

SCHEMAS = (
    "lm_direction(Tensor eps, Tensor? prev, Tensor coef, int mode, int batch_dims) -> Tensor",
    "lm_direction_backward(Tensor grad, Tensor eps, Tensor prev, Tensor coef, int mode, int batch_dims)"
    " -> (Tensor, Tensor, Tensor)",
    "lm_direction_jvp(Tensor eps, Tensor prev, Tensor coef, Tensor eps_t, Tensor prev_t, Tensor coef_t, int mode,"
    " int batch_dims) -> Tensor",
    "lm_step(Tensor sample, Tensor[] outputs, Tensor? prev, Tensor coef, Tensor? seed, int variant, int wanted,"
    " bool clipped, int batch_dims) -> (Tensor, Tensor, Tensor)",
    "affine_step(Tensor[] terms, Tensor coef, Tensor? seed, int batch_dims) -> Tensor",
    "affine_step_backward(Tensor grad, Tensor[] terms, Tensor coef, Tensor? seed, bool want_terms, bool want_coef,"
    " int batch_dims) -> (Tensor[], Tensor)",
    "frame_gram(Tensor[] streams, Tensor? prologue, Tensor? clamp, Tensor? seed, bool ones, bool exact,"
    " int batch_dims) -> Tensor",
    "frame_apply(Tensor[] streams, Tensor matrix, Tensor? prologue, Tensor? clamp, Tensor? seed, bool ones,"
    " int batch_dims) -> Tensor[]",
    "frame_map(int op, int mode, Tensor gram, Tensor coef) -> Tensor",
    "lowrank_apply(Tensor v, Tensor basis, Tensor coef, int variant, bool check, int batch_dims) -> (Tensor, Tensor)",
    "lowrank_vjp(Tensor grad, Tensor v, Tensor basis, Tensor coef, int variant, int batch_dims) -> (Tensor, Tensor)",
    "lowrank_logdet(Tensor basis, Tensor coef, bool check, int batch_dims) -> Tensor",
    "lowrank_logdet_vjp(Tensor basis, Tensor coef, int batch_dims) -> (Tensor, Tensor)",
    "lowrank_update(Tensor v, Tensor basis, Tensor coef, int rank, int batch_dims) -> (Tensor, Tensor)",
)

_libraries: list[torch.library.Library] = []


def _like(first: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A fake output in the layout that `first` asks for."""
    return torch.empty_strided(
        first.shape, layout.output_strides(first), dtype=dtype or first.dtype, device=first.device
    )


def _scalars(first: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float64, device=first.device)


def _batch(first: Tensor, batch_dims: int) -> int:
    return first.shape[0] if batch_dims else 1


def _fake_step(
    sample: Tensor, outputs: Any, prev: Tensor | None, coef: Tensor, seed: Tensor | None, variant: int, wanted: int,
    clipped: bool, batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    model = outputs[0].dtype if outputs else sample.dtype
    new = _like(sample)
    if wanted & step.DOUBLED:
        shape = (2 * sample.shape[0], *sample.shape[1:])
        new = sample.new_empty_strided(shape, layout.twice_strides(sample))
    direction, converted = (sample.new_empty((*sample.shape[:batch_dims], 0)) for _ in range(2))
    if wanted & (step.DIRECTION | step.STATE_DIRECTION):
        direction = _like(sample, sample.dtype if wanted & step.STATE_DIRECTION else model)
    if wanted & step.CONVERTED:
        converted = _like(sample, model)
    return new, direction, converted


def _fake_affine_backward(
    grad: Tensor,
    terms: Any,
    coef: Tensor,
    seed: Tensor | None,
    want_terms: bool,
    want_coef: bool,
    batch_dims: int,
) -> tuple[list[Tensor], Tensor]:
    d_terms = [_like(terms[0], t.dtype) for t in terms] if want_terms else []
    if not want_coef:
        return d_terms, _scalars(grad, 0)
    return d_terms, _scalars(grad, _batch(terms[0], batch_dims), len(terms) + (seed is not None))


def _fake_gram(
    streams: Any, prologue: Tensor | None, clamp: Tensor | None, seed: Tensor | None, ones: bool, exact: bool,
    batch_dims: int,
) -> Tensor:  # fmt: skip
    k = len(streams) + int(ones) + (seed is not None) if prologue is None else prologue.shape[-2]
    return _scalars(streams[0], _batch(streams[0], batch_dims), k, k)


def _stack(first: Tensor, count: int, dtype: torch.dtype, batch_dims: int) -> Tensor:
    shape, strides = layout.stack_strides(first, count, batch_dims)
    return torch.empty_strided(shape, strides, dtype=dtype, device=first.device)


def _fake_lowrank_vjp(
    grad: Tensor, v: Tensor, basis: Tensor, coef: Tensor, variant: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    rank = basis.shape[basis.dim() - (grad.dim() - batch_dims) - 1]
    numbers = _scalars(grad, _batch(grad, batch_dims), coef.shape[-1])
    return _stack(grad, rank, basis.dtype, batch_dims), numbers


def _fake_logdet_vjp(basis: Tensor, coef: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    rows = _stack(basis.select(batch_dims, 0), basis.shape[batch_dims], basis.dtype, batch_dims)
    return rows, _scalars(basis, _batch(basis, batch_dims), coef.shape[-1] - 1)


FAKES = {
    "lm_direction": lambda eps, prev, coef, mode, batch_dims: _like(eps),
    "lm_direction_backward": lambda grad, eps, prev, coef, mode, batch_dims: (
        _like(eps),
        _like(eps, prev.dtype),
        _scalars(eps, _batch(eps, batch_dims), coef.shape[-1]),
    ),
    "lm_direction_jvp": lambda eps, *rest: _like(eps),
    "lm_step": _fake_step,
    "affine_step": lambda terms, coef, seed, batch_dims: _like(terms[0]),
    "affine_step_backward": _fake_affine_backward,
    "frame_gram": _fake_gram,
    "frame_apply": lambda streams, matrix, *rest: [_like(streams[0]) for _ in range(matrix.shape[-2])],
    "frame_map": lambda op, mode, gram, coef: gram.new_empty(
        (gram.shape[0], {1: 2, 2: 6 + coef.shape[1], 3: 4}[op])
    ),
    "lowrank_apply": lambda v, basis, coef, variant, check, batch_dims: (
        _like(v),
        _scalars(v, _batch(v, batch_dims), 1),
    ),
    "lowrank_vjp": _fake_lowrank_vjp,
    "lowrank_logdet": lambda basis, coef, check, batch_dims: _scalars(basis, _batch(basis, batch_dims), 2),
    "lowrank_logdet_vjp": _fake_logdet_vjp,
    "lowrank_update": lambda v, basis, coef, rank, batch_dims: (
        _stack(v, rank, v.dtype, batch_dims),
        _scalars(v, _batch(v, batch_dims), rank),
    ),
}


def register() -> None:
    """Define the operators once per process."""
    if _libraries:
        return
    from . import frame

    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    _libraries.append(library)
    for schema in SCHEMAS:
        name = schema.partition("(")[0]
        library.define(schema)
        library.impl(name, getattr(frame, name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", FAKES[name], lib=library)
