"""Shared by the tests of the low-rank family: the ops as the harness sees them, and calls of one form.

The harness knows tensors of one shape and scalars. U [B, k, *sample] goes through it as k tensors and s as k scalars,
which `call` joins; what is special about U and s themselves has its own tests.
"""

from __future__ import annotations

import numpy as np
import torch

import cases_lowrank as cases
import marquardt as mq
import oracle_lowrank as oracle
from harness import Op, Target
from harness.compare import rows

Tensor = torch.Tensor
f32, f64 = torch.float32, torch.float64
MATVEC, SOLVE, INV_SQRT = oracle.MATVEC, oracle.SOLVE, oracle.INV_SQRT
NAMES = ("lowrank_matvec", "lowrank_solve", "lowrank_inv_sqrt")
FIRST = ("v", "g", "z")  # what the first argument of each is called


def joined(values: list, like: Tensor):
    """s from its entries: numbers or 0-dim tensors make [k], tensors [B] make [B, k]; None without entries."""
    if not values:
        return None
    if not any(isinstance(x, Tensor) for x in values):
        return torch.tensor([float(x) for x in values], dtype=f64, device=like.device)
    tensors = [x.to(like.device) if isinstance(x, Tensor) else torch.tensor(x, dtype=f64) for x in values]
    tensors = [t if t.is_floating_point() else t.to(f64) for t in tensors]
    return torch.stack(torch.broadcast_tensors(*tensors), dim=-1)


def call(function, tensors, scalars, **keywords):
    v, *us = tensors
    batch_dims = keywords.get("batch_dims", 1)
    none = (*v.shape[:batch_dims], 0, *v.shape[batch_dims:])
    U = torch.stack(us, dim=batch_dims) if us else v.new_empty(none)
    s = joined([x for name, x in scalars.items() if name != "damping"], v)
    return function(v, U, s, damping=scalars["damping"], **keywords)


def _arrays(flat, scalars):
    """(v, U, s, damping) for the oracle from what the harness passes."""
    v, *us = flat
    U = np.stack(us, axis=1) if us else np.zeros((v.shape[0], 0, v.shape[1]), np.longdouble)
    s = [x for name, x in scalars.items() if name != "damping"]
    s = np.stack([np.broadcast_to(x, v.shape[:1]) for x in s], axis=1) if s else np.zeros(U.shape[:2])
    return v, U, s, np.broadcast_to(scalars["damping"], v.shape[:1])


def _value(variant):
    return lambda flat, scalars, keywords, shape, batch_dims: oracle.apply(
        variant, *_arrays(flat, scalars), keywords.get("keep_norm", False)
    )


def _vjp(variant):
    def vjp(flat, scalars, keywords, shape, batch_dims, grad):
        d_v, d_U, d_s, d_damping, size_s, size = oracle.apply_vjp(
            variant, *_arrays(flat, scalars), grad, keywords.get("keep_norm", False)
        )
        names = list(scalars)
        d = {"damping": d_damping, **{n: d_s[:, j] for j, n in enumerate(names[1:])}}
        sizes = {"damping": size, **{n: size_s[:, j] for j, n in enumerate(names[1:])}}
        return [d_v, *d_U.swapaxes(0, 1)], d, sizes

    return vjp


def _jvp(variant):
    def jvp(flat, scalars, keywords, shape, batch_dims, flat_t, scalars_t):
        given, moved = _arrays(flat, scalars), _arrays(flat_t, scalars_t)
        return oracle.apply_jvp(variant, *given, *moved, keywords.get("keep_norm", False))

    return jvp


def rounding_of(variant: int, v, U, s, damping, dtype: torch.dtype) -> np.ndarray:
    """What summing the rows in the compute type costs, [B, D]."""
    eps = torch.finfo(f64 if dtype == f64 else f32).eps
    found = oracle.sum_rounding(variant, v, U, s, damping, eps)
    return np.where(np.isnan(found), 0, found)


def _slack(variant):
    def slack(flat, scalars, keywords, shape, batch_dims, dtype):
        v, U, s, damping = _arrays(flat, scalars)
        if not v.size:
            return 0.0
        rounding = rounding_of(variant, v, U, s, damping, dtype)
        if keywords.get("keep_norm"):
            x, n = (oracle.norm(t) for t in (oracle.apply(variant, v, U, s, damping), v))
            rounding = rounding * (n / np.where(x > 0, x, 1))[:, None]
        return rounding

    return slack


def samples(variant: int):
    """Arguments of lowrank_apply and lowrank_vjp for opcheck."""
    generator = torch.Generator().manual_seed(0)

    def make(shape, k=2, state=f32, model=f32, shared=False, batch_dims=1):
        v, U = cases.problem("gaussian", k)(generator, shape, batch_dims)
        return v.to(state), (U[0] if shared else U).to(model)

    def coef(*shape):
        return torch.rand(*shape, dtype=f64, generator=generator) + 0.5

    bf16, f16 = torch.bfloat16, torch.float16
    made = [
        ("lowrank_apply", (*make((2, 3, 5), 2, *pair), coef(3), variant, True, 1))
        for pair in ((f32, f32), (f32, bf16), (f16, f16), (f64, f64))
    ]
    v, U = (t.requires_grad_() for t in make((2, 3, 4)))
    strided = make((2, 3, 4, 6))
    made += [
        ("lowrank_apply", (v, U, coef(3).requires_grad_(), variant, True, 1)),
        ("lowrank_apply", (v, U, coef(2, 3).requires_grad_(), variant, False, 1)),
        ("lowrank_apply", (*make((2, 3, 4), 3, shared=True), coef(2, 4), variant, True, 1)),
        ("lowrank_apply", (strided[0].transpose(1, 2), strided[1].transpose(2, 3), coef(3), variant, True, 1)),
        ("lowrank_apply", (*make((0, 3)), coef(3), variant, True, 1)),
        ("lowrank_apply", (*make((3, 4), batch_dims=0), coef(3), variant, True, 0)),
        ("lowrank_vjp", (make((2, 3, 4))[0], *make((2, 3, 4)), coef(3), variant, 1)),
        ("lowrank_vjp", (make((2, 3))[0], *make((2, 3), 3, shared=True), coef(2, 4), variant, 1)),
        ("lowrank_vjp", (make((3, 4))[0], *make((3, 4), batch_dims=0), coef(3), variant, 0)),
    ]  # fmt: skip
    return made


def op_of(variant: int, keep_norm: bool = False) -> Op:
    return Op(
        name=NAMES[variant],
        function=getattr(mq, NAMES[variant]),
        reference=getattr(mq.reference, NAMES[variant]),
        cases=cases.harness_cases(variant, keep_norm),
        value=_value(variant),
        vjp=_vjp(variant),
        jvp=_jvp(variant),
        call=call,
        argument=lambda j: FIRST[variant] if j == 0 else "U",
        samples=None if keep_norm else lambda: samples(variant),
        slack=_slack(variant),
    )


def apply(target: Target, variant: int, v, U, s=None, **options):
    """The public function on a backend."""
    with target():
        return getattr(mq, NAMES[variant])(v, U, s, **options)


def per_sample(v: Tensor, U: Tensor, s, damping, batch_dims: int = 1):
    """(v [B, D], U [B, k, D], s [B, k], damping [B]) for the oracle, from any form of the arguments."""
    flat = rows(v, batch_dims)
    batch = len(flat)
    shared = U.dim() == v.dim() - batch_dims + 1
    k = U.shape[0 if shared else 1]
    wide = U.detach().cpu().to(f64).numpy().astype(np.longdouble)
    wide = wide.reshape(1 if shared else batch, k, flat.shape[1])
    given = np.ones(k) if s is None else s.detach().cpu().to(f64).numpy()
    lam = damping.detach().cpu().to(f64).numpy() if isinstance(damping, Tensor) else damping
    return (
        flat, np.broadcast_to(wide, (batch, k, flat.shape[1])),
        np.broadcast_to(given, (batch, k)).astype(np.longdouble),
        np.broadcast_to(np.asarray(lam, np.longdouble), (batch,)),
    )  # fmt: skip
