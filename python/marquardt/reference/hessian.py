"""Definition of the damped low-rank Hessian ops, in plain differentiable PyTorch."""

from __future__ import annotations

import torch

from . import frame

Tensor = torch.Tensor

KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2


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
    if mode == PLAIN:
        total = damping + m
        none = total == 0
        safe = torch.where(none, one, total)
        return torch.where(none, zero, a / safe), torch.where(none, zero, -b / safe)

    dd = damping * damping * n + kappa * kappa * G * (2 * damping + m)
    degenerate = dd == 0
    identity = (degenerate | ((kappa == 0) & ~_needs_grad(coef))) & ~empty
    usable = ~(identity | empty)
    scale = torch.sqrt(torch.where(usable, n, one)) * torch.rsqrt(torch.where(usable, dd, one))
    c0 = torch.where(empty, zero, torch.where(identity, one, scale * a))
    c1 = torch.where(usable, -scale * b, zero)
    return c0, c1


def _needs_grad(coef: Tensor) -> Tensor:
    """Whether a derivative to the scalars is asked: then κ = 0 is a point like any other."""
    asked = coef.requires_grad or torch._C._functorch.is_functorch_wrapped_tensor(coef)
    return torch.tensor(asked, device=coef.device)


def lm_direction(eps: Tensor, prev: Tensor | None, coef: Tensor, mode: int, batch_dims: int) -> Tensor:
    """LM direction in residual form: c0·ε + c1·(p − ε), per sample."""
    x = frame.flatten(eps, batch_dims)  # [B, D]
    coef = frame.scalars(coef, x.shape[0], x.device)
    if prev is None:
        r = torch.zeros_like(x)
        if mode != EXTRAPOLATE:
            coef = torch.stack([coef[:, 0], torch.zeros_like(coef[:, 0])], dim=1)
        elif not coef.requires_grad:
            coef = torch.zeros_like(coef)
    else:
        unread = (coef[:, -1] == 0) & ~_needs_grad(coef)  # κ = 0: prev may hold anything
        p = frame.flatten(prev, batch_dims).to(x.dtype)
        r = torch.where(unread[:, None], torch.zeros_like(x), p - x)
    c0, c1 = lm_coefficients(mode, frame.dot(x, x), frame.dot(x, r), frame.dot(r, r), coef)
    out = c0.to(x.dtype)[:, None] * x + c1.to(x.dtype)[:, None] * r
    return frame.store(out, eps)


def lm_direction_backward(
    grad: Tensor, eps: Tensor, prev: Tensor, coef: Tensor, mode: int, batch_dims: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Vector–Jacobian product of `lm_direction`: (d_eps, d_prev, d_coef [B, m])."""
    batch = eps.shape[0] if batch_dims else 1
    rows = frame.scalars(coef, batch, eps.device)
    _, pullback = torch.func.vjp(lambda e, p, c: lm_direction(e, p, c, mode, batch_dims), eps, prev, rows)
    d_eps, d_prev, d_coef = pullback(grad.to(eps.dtype))
    return frame.store(d_eps, eps, eps.dtype), frame.store(d_prev, eps, prev.dtype), d_coef


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
    """Jacobian–vector product of `lm_direction`."""
    batch = eps.shape[0] if batch_dims else 1
    rows, rows_t = (frame.scalars(c, batch, eps.device).clone() for c in (coef, coef_t))
    _, tangent = torch.func.jvp(
        lambda e, p, c: lm_direction(e, p, c, mode, batch_dims), (eps, prev, rows), (eps_t, prev_t, rows_t)
    )
    return tangent
