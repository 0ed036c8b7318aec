"""Definition of the damped low-rank Hessian ops, in plain differentiable PyTorch."""

from __future__ import annotations

from typing import Any

import torch

from . import frame

Tensor = torch.Tensor

KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2

_vjp: Any = torch.func.vjp


def lm_coefficients(mode: int, n: Tensor, e: Tensor, R: Tensor, coef: Tensor) -> tuple[Tensor, Tensor]:
    """(c0, c1) of `c0·ε + c1·r`, all [B]; n = ⟨ε,ε⟩, e = ⟨ε,r⟩, R = ⟨r,r⟩ with r = p − ε; coef [B, 1 or 2].

    Pt − Et is formed as κR + e, never as a difference of the two: at correlation 0.999999 that difference would
    lose six digits. Branches are taken by `where` with harmless values put in first, so that no derivative of the
    branch not taken leaks a NaN.
    """
    one, zero = torch.ones_like(n), torch.zeros_like(n)
    G = (n * R - e * e).clamp_min(0.0)
    empty = n == 0
    if mode == EXTRAPOLATE:
        gamma = coef[:, 0]
        identity = (gamma == 0) & ~_needs_grad(coef)
        safe_n = torch.where(empty, one, n)
        scale = torch.rsqrt(1 + gamma * gamma * G / (safe_n * safe_n))
        c0, c1 = scale * (1 + gamma * e / safe_n), -gamma * scale
        c1 = torch.where(empty | identity, zero, c1)
        return torch.where(empty, zero, torch.where(identity, one, c0)), c1

    damping, kappa = coef[:, 0], coef[:, 1]
    Et = n + kappa * e
    difference = kappa * R + e  # Pt − Et
    m = n + 2 * kappa * e + kappa * kappa * R
    a, b = damping + kappa * difference, kappa * Et  # d = a·ε − b·r
    dd = damping * damping * n + kappa * kappa * G * (2 * damping + m)  # ⟨d, d⟩
    degenerate = dd == 0  # λ = 0 and prev ∥ eps: u = 0, and the direction is eps
    if mode == PLAIN:
        total = torch.where(degenerate | empty, one, damping + m)
        none = degenerate | empty
        return torch.where(none, zero, a / total), torch.where(none, zero, -b / total)

    identity = (degenerate | ((kappa == 0) & ~_needs_grad(coef))) & ~empty
    usable = ~(identity | empty)
    scale = torch.sqrt(torch.where(usable, n, one)) * torch.rsqrt(torch.where(usable, dd, one))
    c0 = torch.where(empty, zero, torch.where(identity, one, scale * a))
    c1 = torch.where(usable, -scale * b, zero)
    return c0, c1


def _needs_grad(coef: Tensor) -> Tensor:
    """Whether a derivative to the scalars is asked: then κ = 0 is a point like any other."""
    asked = coef.requires_grad and torch.is_grad_enabled()
    if not torch.compiler.is_compiling():
        asked = asked or torch._C._functorch.is_functorch_wrapped_tensor(coef)
    return torch.full((), asked, dtype=torch.bool, device=coef.device)


def _frame(eps: Tensor, prev: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    """Rows ε and r = p − ε, [B, D] in the compute type."""
    x = frame.flatten(eps, batch_dims)
    return x, frame.flatten(prev, batch_dims).to(x.dtype) - x


def _dots(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n = ⟨ε,ε⟩, e = ⟨ε,r⟩, R = ⟨r,r⟩, each [B]."""
    return frame.dot(x, x), frame.dot(x, r), frame.dot(r, r)


def _combine(coefficients: list[Tensor], rows: list[Tensor]) -> Tensor:
    """Σ c_j·row_j, [B, D]; the coefficients [B] are rounded to the compute type first."""
    out = coefficients[0].to(rows[0].dtype)[:, None] * rows[0]
    for c, row in zip(coefficients[1:], rows[1:], strict=True):
        out = out + c.to(row.dtype)[:, None] * row
    return out


def lm_direction(eps: Tensor, prev: Tensor | None, coef: Tensor, mode: int, batch_dims: int) -> Tensor:
    """LM direction in residual form: c0·ε + c1·(p − ε), per sample."""
    x, r = _frame(eps, eps if prev is None else prev, batch_dims)
    coef = frame.scalars(coef, x.shape[0], x.device)
    if prev is None:  # nothing to mix: κ (or γ) is 0
        coef = torch.cat([coef[:, :-1], torch.zeros_like(coef[:, -1:])], dim=1)
    unread = (coef[:, -1] == 0) & ~_needs_grad(coef)  # prev may hold anything
    r = torch.where(unread[:, None], torch.zeros_like(x), r)
    c0, c1 = lm_coefficients(mode, *_dots(x, r), coef)
    out = _combine([c0, c1], [x, r])
    if mode != PLAIN:
        out = torch.where(unread[:, None], x, out)  # the sign of −0 too
    return frame.store(out, eps)


def lm_direction_backward(
    grad: Tensor, eps: Tensor, prev: Tensor, coef: Tensor, mode: int, batch_dims: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector–Jacobian product of `lm_direction`: (d_eps, d_prev, d_coef [B, m]).

    With F = c0⟨g,ε⟩ + c1⟨g,r⟩ as a function of the scalars, r̄ = c1 g + F_e ε + 2F_R r = d_prev and
    d_eps = c0 g + 2F_n ε + F_e r − r̄. The rows' coefficients are joined before they meet the vectors: c0·g and
    c1·g are large where their difference is small.
    """
    x, r = _frame(eps, prev, batch_dims)
    g = frame.flatten(grad, batch_dims).to(x.dtype)
    coef = frame.scalars(coef, x.shape[0], x.device).clone()
    # κ = 0: the identity, or λ/(λ+n) ε without renormalisation; prev may hold anything.
    unread = coef[:, -1] == 0
    identity = unread if mode != PLAIN else torch.zeros_like(unread)

    def derivatives(r: Tensor) -> Any:
        """(c0, c1), (F_n, F_e, F_R, F_coef)"""
        values, pullback = _vjp(lambda *inputs: lm_coefficients(mode, *inputs), *_dots(x, r), coef)
        return values, pullback((frame.dot(g, x), frame.dot(g, r)))

    d_kappa = derivatives(r)[1][3][:, -1]  # the only one that looks at prev also at κ = 0
    r = torch.where(unread[:, None], torch.zeros_like(r), r)
    (c0, c1), (F_n, F_e, F_R, d_coef) = derivatives(r)
    d_coef = torch.cat([d_coef[:, :-1], torch.where(unread, d_kappa, d_coef[:, -1])[:, None]], dim=1)

    x = torch.where(identity[:, None], torch.zeros_like(x), x)
    zero, kept = torch.zeros_like(c0), (frame.dot(*_pair(eps, batch_dims)) != 0).to(c0.dtype)

    def pick(value: Tensor, at_zero: Tensor, at_identity: Tensor) -> Tensor:
        return torch.where(identity, at_identity, torch.where(unread, at_zero, value))

    on_eps = [pick(2 * F_n - F_e, 2 * F_n, zero), pick(F_e - 2 * F_R, zero, zero), pick(c0 - c1, c0, kept)]
    on_prev = [torch.where(unread, zero, c) for c in (F_e, 2 * F_R, c1)]
    d_eps = _combine(on_eps, [x, r, g])
    d_prev = torch.where(unread[:, None], torch.zeros_like(g), _combine(on_prev, [x, r, g]))
    return frame.store(d_eps, eps, eps.dtype), frame.store(d_prev, eps, prev.dtype), d_coef


def _pair(t: Tensor, batch_dims: int) -> tuple[Tensor, Tensor]:
    flat = frame.flatten(t, batch_dims)
    return flat, flat


def lm_direction_jvp(
    eps: Tensor,
    prev: Tensor,
    coef: Tensor,
    eps_t: Tensor,
    prev_t: Tensor,
    coef_t: Tensor,
    mode: int,
    batch_dims: int,
) -> Tensor:
    """Jacobian–vector product of `lm_direction`: c0 ε' + c1 r' + c0' ε + c1' r."""
    (x, r), (x_t, r_t) = _frame(eps, prev, batch_dims), _frame(eps_t, prev_t, batch_dims)
    coef, coef_t = (frame.scalars(c, x.shape[0], x.device).clone() for c in (coef, coef_t))
    unread = (coef[:, -1] == 0) & (coef_t[:, -1] == 0)
    r, r_t = (torch.where(unread[:, None], torch.zeros_like(t), t) for t in (r, r_t))
    n, e, R = _dots(x, r)
    moved = (2 * frame.dot(x, x_t), frame.dot(x_t, r) + frame.dot(x, r_t), 2 * frame.dot(r, r_t), coef_t)

    # The derivative along `moved` from two backward products: forward mode may be in use around us.
    (c0, c1), pullback = _vjp(lambda *inputs: lm_coefficients(mode, *inputs), n, e, R, coef)
    _, along = _vjp(pullback, (torch.zeros_like(c0), torch.zeros_like(c1)))
    ((c0_t, c1_t),) = along(moved)

    if mode != PLAIN:
        c0, c0_t = torch.where(unread & (n != 0), torch.ones_like(c0), c0), torch.where(unread, 0 * n, c0_t)
    c1, c1_t = torch.where(unread, torch.zeros_like(c1), c1), torch.where(unread, torch.zeros_like(c1), c1_t)
    return frame.store(_combine([c0, c1, c0_t, c1_t], [x_t, r_t, x, r]), eps)
