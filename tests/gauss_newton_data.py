"""Data and longdouble oracles for the tests of softmax_head_hvp and damped_gram_solve."""

from __future__ import annotations

import numpy as np
import torch

from harness.compare import LD, norm_error, wide
from marquardt.gauss_newton import damped_gram_solve

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (f32, f64, bf16, f16)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# (rows, columns of x, columns of g): one row, ragged vectors, several ranges of rows, b < i, nothing to the right
GRAM_SHAPES = [
    (1, 1, 1),
    (5, 3, 2),
    (300, 17, 5),
    (2100, 147, 64),
    (3000, 33, 0),
    (1300, 48, 35),
    (700, 96, 1),
]
FEW_CLASSES = 16  # up to so many, both products of softmax_head_hvp are the library's own on the CPU
# (rows, classes, features): few and many classes, ragged vectors and rows
HEAD_SHAPES = [
    (1, 2, 1),
    (7, 5, 3),
    (300, 130, 33),
    (2500, 10, 70),
    (65, 1500, 9),
    (523, 16, 64),
    (300, 17, 32),
]


def name(value) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def rounding(dtype: torch.dtype) -> float:
    """What storing a result costs, norm-wise."""
    return torch.finfo(dtype).eps / 2


def compute(dtype: torch.dtype) -> float:
    """The unit of the type that sums are kept in."""
    return torch.finfo(f64 if dtype is f64 else f32).eps


# --- data and oracles -------------------------------------------------------------------------------------


def layer(b, i, o, dtype=f32, *, decay=0.0, seed=0, device="cpu"):
    """(g [b, o], x [b, i]): outputs' gradients that depend on the inputs; x with singular values over 10^decay."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, i, generator=generator, dtype=f64)
    if decay:
        basis = torch.linalg.qr(torch.randn(i, i, generator=generator, dtype=f64))[0]
        x = x * torch.logspace(0, -decay, i, dtype=f64) @ basis
    g = x @ torch.randn(i, o, generator=generator, dtype=f64)
    g += 0.1 * torch.randn(b, o, generator=generator, dtype=f64)
    return g.to(device, dtype), x.to(device, dtype)


def head(n, c, d, dtype=f32, *, seed=0, device="cpu"):
    """(x [n, d], p [n, C], G [C, d])."""
    generator = torch.Generator().manual_seed(seed)
    x, logits, G = (torch.randn(*s, generator=generator, dtype=f64) for s in ((n, d), (n, c), (c, d)))
    return tuple(t.to(device, dtype) for t in (x, (2 * logits).softmax(1), G))


def cholesky_solve(a: np.ndarray, right: np.ndarray) -> np.ndarray:
    """a⁻¹ right, longdouble."""
    n = a.shape[0]
    low = np.zeros_like(a)
    for k in range(n):
        low[k, k] = np.sqrt(a[k, k] - (low[k, :k] ** 2).sum())
        low[k + 1 :, k] = (a[k + 1 :, k] - low[k + 1 :, :k] @ low[k, :k]) / low[k, k]
    y = right.copy()
    for k in range(n):
        y[k] = (y[k] - low[k, :k] @ y[:k]) / low[k, k]
    for k in reversed(range(n)):
        y[k] = (y[k] - low[k + 1 :, k] @ y[k + 1 :]) / low[k, k]
    return y


def solve_oracle(g, x, damping, *more) -> np.ndarray | list[np.ndarray]:
    """The formula as it is printed, in longdouble, never in its dual form; for several λ a list."""
    g, x = wide(g), wide(x)
    gram, cross, eye = x.T @ x / x.shape[0], x.T @ g, np.eye(x.shape[1], dtype=LD)
    found = [cholesky_solve(gram + LD(value) * eye, cross).T for value in (damping, *more)]
    return found if more else found[0]


def head_oracle(x, p, G) -> np.ndarray:
    """Sample by sample: Σ_n (diag(p) − p pᵀ) G x_n x_nᵀ / n, in longdouble."""
    x, p, G = wide(x), wide(p), wide(G)
    out = np.zeros(G.shape, LD)
    for xn, pn in zip(x, p, strict=True):
        z = G @ xn
        out += np.outer(pn * (z - pn @ z), xn) / x.shape[0]
    return out


def error(found, expected) -> float:
    """Norm-wise relative error of the whole matrix."""
    return float(norm_error(found[None], np.asarray(expected)[None])[0])


def solve(g, x, damping):
    return damped_gram_solve(g, x, damping=damping)


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]
