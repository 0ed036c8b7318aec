"""A damped low-rank Hessian H = λI + U diag(s) Uᵀ per sample, never formed: products, solves, roots, determinants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import checks, errors, scalars
from .declare import Op
from .langevin import affine_step
from .layout import batch_and_size, empty_output
from .reference import lowrank as reference
from .scalars import Scalar

Tensor = torch.Tensor

MATVEC, SOLVE, INV_SQRT = reference.MATVEC, reference.SOLVE, reference.INV_SQRT
_ARGUMENT = ("v", "g", "z")  # how the ops call the vector they work on


def _empty_stack(v: Tensor, count: int, dtype: torch.dtype, batch_dims: int) -> Tensor:
    """A new stack [B, count, *sample] whose samples lie like those of `v`."""
    shape, strides = reference.stack_strides(v, count, batch_dims)
    return torch.empty_strided(shape, strides, dtype=dtype, device=v.device)


def _numbers(v: Tensor, columns: int, batch_dims: int) -> Tensor:
    return v.new_empty((batch_and_size(v, batch_dims)[0], columns), dtype=torch.float64)


def _to_basis(d_basis: Tensor, basis: Tensor) -> Tensor:
    """The gradient of a stack from its gradient per sample: the batch may share it."""
    return d_basis if d_basis.dim() == basis.dim() else d_basis.sum(0)


def _to_coef(d_coef: Tensor, coef: Tensor) -> Tensor:
    return d_coef if coef.dim() == 2 else d_coef.sum(0).to(coef.device)


def _backward(
    call: Any, grads: Sequence[Any], needs: Any, v: Tensor, basis: Tensor, coef: Tensor, variant: int,
    check: bool, batch_dims: int,
) -> tuple[Any, ...]:  # fmt: skip
    grad = grads[0]
    if grad is None:
        return (None,) * 6
    d_v = call(APPLY, grad, basis, coef, variant, False, batch_dims)[0] if needs[0] else None
    d_basis = d_coef = None
    if needs[1] or needs[2]:
        d_basis, d_coef = call(VJP, grad, v, basis, coef, variant, batch_dims)
        d_basis, d_coef = _to_basis(d_basis, basis), _to_coef(d_coef, coef)
    return d_v, d_basis, d_coef, None, None, None


def _logdet_backward(
    call: Any, grads: Sequence[Any], needs: Any, basis: Tensor, coef: Tensor, check: bool, batch_dims: int
) -> tuple[Any, ...]:
    (grad,) = grads
    if grad is None:
        return None, None, None, None
    rows = coef if coef.dim() == 2 else coef.to(grad.device).expand(grad.shape[0], -1)
    d_basis, d_coef = call(LOGDET_VJP, basis, torch.cat([rows, grad[:, :1]], dim=1), batch_dims)
    return d_basis, _to_coef(d_coef, coef), None, None


def _no_derivative(*_: Any) -> Any:
    raise NotImplementedError(
        "lowrank_update: the result is not differentiable (its rows are eigenvectors, whose sign and order jump); "
        "detach the inputs or call it under torch.no_grad()"
    )


APPLY = Op(
    "lowrank_apply(Tensor v, Tensor basis, Tensor coef, int variant, bool check, int batch_dims)"
    " -> (Tensor, Tensor)",
    reference=reference.apply,
    fake=lambda v, basis, coef, variant, check, batch_dims: (empty_output(v), _numbers(v, 1, batch_dims)),
    check=checks.lowrank_apply,
    backward=_backward,
    returns_scalars=True,
    public=reference.NAMES,
)
VJP = Op(
    "lowrank_vjp(Tensor grad, Tensor v, Tensor basis, Tensor coef, int variant, int batch_dims)"
    " -> (Tensor, Tensor)",
    reference=reference.vjp,
    fake=lambda grad, v, basis, coef, variant, batch_dims: (
        _empty_stack(grad, checks.rank_of(grad, basis, batch_dims), basis.dtype, batch_dims),
        _numbers(grad, coef.shape[-1], batch_dims),
    ),
    check=checks.lowrank_vjp,
    returns_scalars=True,
)
LOGDET = Op(
    "lowrank_logdet(Tensor basis, Tensor coef, bool check, int batch_dims) -> Tensor",
    reference=reference.logdet,
    fake=lambda basis, coef, check, batch_dims: basis.new_empty(
        (basis.shape[0] if batch_dims else 1, 2), dtype=torch.float64
    ),
    check=checks.lowrank_logdet,
    backward=_logdet_backward,
    returns_scalars=True,
)
LOGDET_VJP = Op(
    "lowrank_logdet_vjp(Tensor basis, Tensor coef, int batch_dims) -> (Tensor, Tensor)",
    reference=reference.logdet_vjp,
    fake=lambda basis, coef, batch_dims: (
        _empty_stack(basis.select(batch_dims, 0), basis.shape[batch_dims], basis.dtype, batch_dims),
        basis.new_empty((basis.shape[0] if batch_dims else 1, coef.shape[-1] - 1), dtype=torch.float64),
    ),
    check=checks.lowrank_logdet_vjp,
    returns_scalars=True,
)
UPDATE = Op(
    "lowrank_update(Tensor v, Tensor basis, Tensor coef, int rank, int batch_dims) -> (Tensor, Tensor)",
    reference=reference.update,
    fake=lambda v, basis, coef, rank, batch_dims: (
        _empty_stack(v, rank, v.dtype, batch_dims),
        _numbers(v, rank, batch_dims),
    ),
    check=checks.lowrank_update,
    backward=_no_derivative,
    jvp=_no_derivative,
    returns_scalars=True,
)


# --- arguments -----------------------------------------------------------------------------------------------


def _apply(
    variant: int, v: Tensor, U: Tensor, s: Tensor | None, damping: Scalar, check: bool, batch_dims: int
) -> tuple[Tensor, Tensor]:
    op, argument = reference.NAMES[variant], _ARGUMENT[variant]
    checks.floating(op, argument, v)
    checks.batched(op, argument, v, batch_dims)
    k = checks.stack(op, U, argument, v, batch_dims)
    checks.host_number(op, "damping", damping, positive=variant != MATVEC)
    coef = scalars.with_weights(op, ("damping",), (damping,), s, k, v, batch_dims)
    check = check and _raises()
    made: tuple[Tensor, Tensor] = APPLY.call(v, U, coef, variant, check, batch_dims)
    return made


def _raises() -> bool:
    """Whether `check` counts: traced programs and transformed functions do not raise."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def _info(info: Tensor, batch_dims: int) -> Tensor:
    """int32 [B], or 0-dim in an unbatched call."""
    return info.reshape(info.shape[: -1 if batch_dims else -2]).to(torch.int32)


# --- public --------------------------------------------------------------------------------------------------


def lowrank_matvec(
    v: Tensor, U: Tensor, s: Tensor | None = None, *, damping: Scalar, batch_dims: int = 1
) -> Tensor:
    r"""H v for the damped low-rank Hessian H = λI + U diag(s) Uᵀ, in two passes over U and v.

        out = λ v + Σ_j s_j ⟨u_j, v⟩ u_j

    Args:
        v: [B, *sample] (or [*sample] with `batch_dims=0`).
        U: k ≤ 16 rows u_j, [B, k, *sample], or [k, *sample] shared by the batch; of the dtype of `v` or a narrower one.
        s: [B, k] or [k], any sign; None: ones.
        damping: λ ≥ 0: number, 0-dim tensor or [B].

    Returns:
        Tensor like `v`. Differentiable in everything, to any order.

    >>> import torch, marquardt as mq
    >>> v, U = torch.tensor([[1.0, 2.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> mq.lowrank_matvec(v, U, torch.tensor([3.0]), damping=0.5)
    tensor([[3.5000, 1.0000]])
    """
    return _apply(MATVEC, v, U, s, damping, False, batch_dims)[0]


def lowrank_solve(
    g: Tensor,
    U: Tensor,
    s: Tensor | None = None,
    *,
    damping: Scalar,
    keep_norm: bool = False,
    check: bool = True,
    return_info: bool = False,
    batch_dims: int = 1,
) -> Any:
    r"""H⁻¹ g for H = λI + U diag(s) Uᵀ: a damped Newton step through a k × k system.

        out = (g − U a)/λ,   (λ diag(s)⁻¹ + U Uᵀ) a = U g        (Woodbury; rows of U are vectors)

    The rows of U need be neither orthogonal nor independent, s_j may be 0, or negative while H stays positive
    definite. Scalar products, the small system and sums that cancel are double: the result is within 2e-7 of the
    exact solution for float32 data also where g lies in the span of U and λ ≪ ‖U‖², down to λ = 1e-6 ‖U‖²; below that
    digits are lost in proportion.

    Args:
        g: [B, *sample] (or [*sample] with `batch_dims=0`).
        U: k ≤ 16 rows, [B, k, *sample], or [k, *sample] shared by the batch.
        s: [B, k] or [k]; None: ones.
        damping: λ > 0: number, 0-dim tensor or [B].
        keep_norm: rescale each sample to the norm of `g`.
        check: on the CPU raise where H is not positive definite; else such a sample is NaN.
        return_info: also return int32 [B]: 0, or j + 1 where row j of U breaks H, −1 where λ is not positive.

    Returns:
        Tensor like `g`, or (it, info). Differentiable in everything.

    >>> import torch, marquardt as mq
    >>> g, U = torch.tensor([[4.0, 2.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> mq.lowrank_solve(g, U, torch.tensor([3.0]), damping=1.0)
    tensor([[1., 2.]])
    """
    if keep_norm:  # in float32 at least: the derivative of a norm loses what 16 bits leave of the solution
        checks.floating("lowrank_solve", "g", g)
        checks.batched("lowrank_solve", "g", g, batch_dims)
        checks.stack("lowrank_solve", U, "g", g, batch_dims)  # before the dtype changes
        wide = g if g.dtype == torch.float64 else g.float()
        out, info = _apply(SOLVE, wide, U, s, damping, check, batch_dims)
        out = _with_norm_of(out, wide, batch_dims).to(g.dtype)
    else:
        out, info = _apply(SOLVE, g, U, s, damping, check, batch_dims)
    return (out, _info(info, batch_dims)) if return_info else out


def _with_norm_of(x: Tensor, g: Tensor, batch_dims: int) -> Tensor:
    """x·‖g‖/‖x‖ per sample; 0 stays 0. Norms are taken of the rounded x: that of the formula may cancel."""
    wide = reference.frame.scalar_dtype(x.device)
    of_x, of_g = (t.to(wide).square().reshape(batch_and_size(t, batch_dims)).sum(1) for t in (x, g))  # [B]
    ratio = torch.where(of_x == 0, 0.0, of_g / torch.where(of_x == 0, 1.0, of_x)).sqrt()
    return affine_step([x], [ratio if batch_dims else ratio[0]], batch_dims=batch_dims)


def lowrank_inv_sqrt(
    z: Tensor,
    U: Tensor,
    s: Tensor | None = None,
    *,
    damping: Scalar,
    check: bool = True,
    return_info: bool = False,
    batch_dims: int = 1,
) -> Any:
    r"""H^(−1/2) z, the symmetric root, for H = λI + U diag(s) Uᵀ: preconditioned noise.

        out = z/√λ + Σ_i (μ_i^(−1/2) − λ^(−1/2)) ⟨q_i, z⟩ q_i

    with the eigenpairs (μ_i, q_i) of H on the span of U, from a k × k eigenproblem. If z ~ N(0, I) the result has the
    covariance H⁻¹, which is what a Langevin step preconditioned by H⁻¹ needs. Arguments as in `lowrank_solve`; repeated
    eigenvalues and dependent rows are like any other, for derivatives too.

    >>> import torch, marquardt as mq
    >>> z, U = torch.tensor([[4.0, 2.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> mq.lowrank_inv_sqrt(z, U, torch.tensor([3.0]), damping=1.0)
    tensor([[2., 2.]])
    """
    out, info = _apply(INV_SQRT, z, U, s, damping, check, batch_dims)
    return (out, _info(info, batch_dims)) if return_info else out


def lowrank_logdet(
    U: Tensor,
    s: Tensor | None = None,
    *,
    damping: Scalar,
    shared: bool = False,
    check: bool = True,
    return_info: bool = False,
    batch_dims: int = 1,
) -> Any:
    r"""log det H for H = λI + U diag(s) Uᵀ, float64.

        log det H = D log λ + log det(I + diag(s) U Uᵀ/λ)

    Args:
        U: [B, k, *sample]; with `shared=True` (or `batch_dims=0`) one stack [k, *sample].
        s, damping, check, return_info: as in `lowrank_solve`. A shared stack takes scalars of one H.

    Returns:
        float64 [B], or 0-dim for one stack; or (it, info). Differentiable in everything.

    >>> import torch, marquardt as mq
    >>> U = torch.tensor([[[1.0, 0.0, 0.0]]])
    >>> mq.lowrank_logdet(U, torch.tensor([3.0]), damping=1.0).exp()
    tensor([4.], dtype=torch.float64)
    """
    op = "lowrank_logdet"
    batch_dims = 0 if shared else batch_dims
    k = checks.stack_alone(op, U, batch_dims)
    row = U.select(batch_dims, 0) if k else U.new_empty((*U.shape[:batch_dims], *U.shape[batch_dims + 1 :]))
    checks.host_number(op, "damping", damping, positive=True)
    coef = scalars.with_weights(op, ("damping",), (damping,), s, k, row, batch_dims)
    if k == 0:
        batch, size = batch_and_size(row, batch_dims)
        numbers = coef[:, 0] if coef.dim() == 2 else coef.to(U.device).expand(batch)
        checks.lowrank_scalars(op, coef, 0, True)
        good = ~(numbers <= 0)
        info = torch.where(good, 0.0, -1.0).to(numbers.dtype)
        found = torch.stack([torch.where(good, size * numbers.log(), float("nan")), info], dim=1)
    else:
        found = LOGDET.call(U, coef, check and _raises(), batch_dims)
    value, info = found[:, 0], found[:, 1:]
    value = value if batch_dims else value[0]
    return (value, _info(info, batch_dims)) if return_info else value


def lowrank_update(
    U: Tensor,
    s: Tensor | None,
    v: Tensor,
    *,
    decay: Scalar,
    weight: Scalar = 1.0,
    rank: int | None = None,
    batch_dims: int = 1,
) -> tuple[Tensor, Tensor]:
    r"""The best rank-`rank` factors of decay·U diag(s) Uᵀ + weight·v vᵀ, in two passes over U and v.

    The eigenpairs of that sum come from the (k+1) × (k+1) Gram matrix of the frame (v, u_1 … u_k). The new rows are
    orthonormal where s > 0 and s descends; what is below 1e-12 of the largest is a zero row with s = 0. The sign of a
    row is such that the largest of its coefficients in the frame is positive, so that results are repeatable.

    Args:
        U: [B, k, *sample], or [k, *sample] shared by the batch; k may be 0.
        s: [B, k] or [k], not negative; None: ones.
        v: [B, *sample] (or [*sample] with `batch_dims=0`).
        decay, weight: not negative: numbers, 0-dim tensors or [B].
        rank: rows of the result, at most 16; None: k.

    Returns:
        (U' [B, rank, *sample] like `v`, s' [B, rank] float64). Not differentiable: a backward pass raises.

    >>> import torch, marquardt as mq
    >>> U, s = mq.lowrank_update(torch.zeros(1, 0, 2), None, torch.tensor([[3.0, 4.0]]), decay=0.9, rank=1)
    >>> U, s
    (tensor([[[0.6000, 0.8000]]]), tensor([[25.]], dtype=torch.float64))
    """
    op = "lowrank_update"
    checks.floating(op, "v", v)
    checks.batched(op, "v", v, batch_dims)
    k = checks.stack(op, U, "v", v, batch_dims)
    rank = k if rank is None else rank
    if not isinstance(rank, (int, torch.SymInt)) or isinstance(rank, bool):
        raise errors.kind(op, "rank", "be a whole number", type(rank).__name__)
    for name, number in (("decay", decay), ("weight", weight)):
        checks.host_number(op, name, number, positive=False)
    coef = scalars.with_weights(op, ("decay", "weight"), (decay, weight), s, k, v, batch_dims)
    rows, found = UPDATE.call(v, U, coef, rank, batch_dims)
    return rows, found if batch_dims else found[0]
