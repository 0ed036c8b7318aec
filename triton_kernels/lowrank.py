"""Entry points of the low-rank Hessian H = λI + U diag(s) Uᵀ, with the schemas of `marquardt::lowrank_*`.

    rows (stack.py: Gram in float64)  →  k × k stage (small.py)  →  C · rows (stack.py: sums in float64)

Products, solves, determinants and their derivatives are launches alone: nothing waits for the device, and a CUDA graph
can capture them. H^(−1/2), its derivatives and the update take their eigenvectors from torch.linalg (spectrum.py).

`basis` is [B, k, *sample], or [k, *sample] shared by the batch; `coef` [m] on the CPU or [B, m] beside the data.
Arguments are taken as checked by the public functions.
"""

from __future__ import annotations

import torch

from . import launch, small, spectrum, stack
from .layout import Layout
from .stack import Rows

Tensor = torch.Tensor

MATVEC, SOLVE, INV_SQRT = 0, 1, 2
NAMES = ("lowrank_matvec", "lowrank_solve", "lowrank_inv_sqrt")


def _raise_if_indefinite(op: str, info: Tensor) -> None:
    """`check=True`: on the CPU, where looking costs nothing."""
    if info.device.type == "cpu":
        from marquardt.reference import lowrank as reference

        reference.raise_if_indefinite(op, info)


def _coefficients(rows: Rows, coef: Tensor, op: int) -> tuple[Tensor, Tensor]:
    """(coefficients, numbers) of an op that has its k × k stage in small.py."""
    heads_alone = op in (small.MATVEC.value, small.MATVEC_VJP.value)
    gram = stack.gram(rows, heads_alone)
    return small.small(op, gram, small.table_of(coef, gram.device), rows.layout.size, rows.k)


def _spectral(rows: Rows, coef: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(gram, numbers [B, m], info) for the eigenproblems of H^(−1/2)."""
    gram = stack.gram(rows)
    table = small.table_of(coef, gram.device)
    heads = len(rows.heads)
    alone = gram[:, heads - 1 :, heads - 1 :].contiguous()  # one head and U
    info = small.small(small.INFO.value, alone, table, rows.layout.size, rows.k)[1]
    return gram, table.expand(gram.shape[0], -1), info


@launch.entry
def lowrank_apply(
    v: Tensor, basis: Tensor, coef: Tensor, variant: int, check: bool, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """(H v, H⁻¹ v or H^(−1/2) v, info [B, 1] float64); a sample whose H is not positive definite is NaN."""
    launch.check_device("lowrank_apply", [v])
    layout = Layout.of(v, batch_dims)
    rows = Rows.of(layout, [v], basis)
    if variant == INV_SQRT:
        matrix, info = spectrum.inv_sqrt(*_spectral(rows, coef))
    else:
        op = small.SOLVE.value if variant == SOLVE else small.MATVEC.value
        matrix, info = _coefficients(rows, coef, op)
    if check and variant != MATVEC and layout.size > 0:
        _raise_if_indefinite(NAMES[variant], info)
    out = layout.empty(v)
    stack.apply(rows, matrix, out, layout.size, 0)
    return layout.finish(out), info


@launch.entry
def lowrank_vjp(
    grad: Tensor, v: Tensor, basis: Tensor, coef: Tensor, variant: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """(d_basis [B, k, *sample] per sample, d_coef [B, 1 + k] float64) of ⟨grad, f(H) v⟩."""
    launch.check_device("lowrank_vjp", [grad])
    layout = Layout.of_stack(grad, batch_dims)
    rows = Rows.of(layout, [grad, v], basis)
    if variant == INV_SQRT:
        matrix, d_coef = spectrum.inv_sqrt_vjp(*_spectral(rows, coef))
    else:
        op = small.SOLVE_VJP.value if variant == SOLVE else small.MATVEC_VJP.value
        matrix, d_coef = _coefficients(rows, coef, op)
    if variant == MATVEC:
        rows = rows.heads_alone()
    return _stack(rows, matrix, basis.dtype), d_coef


@launch.entry
def lowrank_logdet(basis: Tensor, coef: Tensor, check: bool, batch_dims: int) -> Tensor:
    """(log det H, info), [B, 2] float64."""
    launch.check_device("lowrank_logdet", [basis])
    rows = Rows.of(Layout.of_stack(basis.select(batch_dims, 0), batch_dims), [], basis)
    found = _coefficients(rows, coef, small.LOGDET.value)[1]
    if check:
        _raise_if_indefinite("lowrank_logdet", found[:, 1:])
    return found


@launch.entry
def lowrank_logdet_vjp(basis: Tensor, coef: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """(d_basis, d_coef [B, 1 + k]) of grad·log det H, with coef = (damping, s…, grad)."""
    launch.check_device("lowrank_logdet_vjp", [basis])
    rows = Rows.of(Layout.of_stack(basis.select(batch_dims, 0), batch_dims), [], basis)
    matrix, d_coef = _coefficients(rows, coef, small.LOGDET_VJP.value)
    return _stack(rows, matrix, basis.dtype), d_coef


@launch.entry
def lowrank_update(
    v: Tensor, basis: Tensor, coef: Tensor, rank: int, batch_dims: int
) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` factors of decay·U diag(s) Uᵀ + weight·v vᵀ: rows [B, rank, *sample], s [B, rank] float64."""
    launch.check_device("lowrank_update", [v])
    rows = Rows.of(Layout.of_stack(v, batch_dims), [v], basis)
    gram = stack.gram(rows)
    table = small.table_of(coef, gram.device)
    matrix, found = spectrum.update(gram, table.expand(gram.shape[0], -1), rank)
    return _stack(rows, matrix, v.dtype), found


def _stack(rows: Rows, matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """C·rows as a new stack."""
    count = matrix.shape[1]
    out = rows.layout.empty_stack(count, dtype, matrix.device)
    stack.apply(rows, matrix, out, count * rows.layout.size, rows.layout.size)
    return out
