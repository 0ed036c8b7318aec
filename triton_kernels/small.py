"""The k × k stage of the low-rank Hessian H = λI + U diag(s) Uᵀ: from Gram entries to coefficients, in float64.

One program a sample, matrices of K × K (k rounded up) in registers, entries picked by masks. With T = √|s| and J the
signs of s, A = λJ + T G T is factorised as L D Lᵀ, rows of positive s first: then H is positive definite exactly if
every pivot has the sign of its s. The formulas are those of csrc/frame/lowrank_maps.h.

    op           rows              numbers in           coefficients [outputs, rows]    numbers out
    MATVEC       v, U              λ, s                 H v                             info
    SOLVE        v, U              λ, s                 H⁻¹ v                           info
    INFO         v, U              λ, s                 –                               info
    MATVEC_VJP   grad, v           λ, s                 d u_1 … d u_k                   d λ, d s
    SOLVE_VJP    grad, v, U        λ, s                 d u_1 … d u_k                   d λ, d s
    LOGDET       U                 λ, s                 –                               log det H, info
    LOGDET_VJP   U                 λ, s, grad           d u_1 … d u_k                   d λ, d s

info: 0; j + 1 where row j of U breaks H; −1 for a damping that is not positive. NaN is no error: it spoils its sample.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import launch
from .rows import scalars

Tensor = torch.Tensor

MATVEC = tl.constexpr(0)
SOLVE = tl.constexpr(1)
INFO = tl.constexpr(2)
MATVEC_VJP = tl.constexpr(3)
SOLVE_VJP = tl.constexpr(4)
LOGDET = tl.constexpr(5)
LOGDET_VJP = tl.constexpr(6)

HEADS = {0: 1, 1: 1, 2: 1, 3: 2, 4: 2, 5: 0, 6: 0}


@triton.jit
def order_of(s, k, K: tl.constexpr):
    """[K] int32: at which step row i is eliminated. Rows of positive s come first; K for what is not there."""
    r = tl.arange(0, K)
    negative = tl.where(s < 0, 1, 0)
    before = (negative[None, :] < negative[:, None]) | (
        (negative[None, :] == negative[:, None]) & (r[None, :] < r[:, None])
    )
    place = tl.sum(tl.where(before & (r[None, :] < k), 1, 0), axis=1)
    return tl.where(r < k, place, K)


@triton.jit
def solved(A, X, sign, place, k, K: tl.constexpr):
    """(A⁻¹ X, pivots [K], the first row + 1 whose pivot has the wrong sign or is NaN, else 0).

    `here` is true at row j alone, so that a sum picks what belongs to j.
    """
    r = tl.arange(0, K)
    L = tl.zeros_like(A)
    D = tl.zeros_like(sign)
    failed = tl.full((), 0, tl.int32)
    for step in range(k):
        here = place == step
        later = (place > step) & (r < k)
        column = tl.sum(tl.where(here[None, :], A, 0.0), axis=1)
        d = tl.sum(tl.where(here, column, 0.0))
        inverse = 1.0 / d
        A = (
            A - column[:, None] * column[None, :] * inverse
        )  # what is eliminated already is not looked at again
        low = tl.where(later, column * inverse, 0.0)
        x = tl.sum(tl.where(here[:, None], X, 0.0), axis=0)
        X = X - low[:, None] * x[None, :]
        L = tl.where(here[None, :], low[:, None], L)
        D = tl.where(here, d, D)
        wrong = tl.sum(tl.where(here & ((d * sign > 0) == 0), r + 1, 0))
        failed = tl.where(failed == 0, wrong, failed)
    for back in range(k):
        here = place == k - 1 - back
        low = tl.sum(tl.where(here[None, :], L, 0.0), axis=1)
        x = tl.sum(tl.where(here[:, None], X, 0.0), axis=0) / tl.sum(tl.where(here, D, 0.0))
        x = x - tl.sum(low[:, None] * X, axis=0)
        X = tl.where(here[:, None], x[None, :], X)
    return X, D, failed


@triton.jit
def small_matrix(G, damping, s, K: tl.constexpr):
    """(A = λJ + T G T, T, J) as [K, K], [K], [K]."""
    r = tl.arange(0, K)
    t = tl.sqrt(tl.abs(s))
    sign = tl.where(s < 0, -1.0, 1.0).to(tl.float64)
    diagonal = tl.where(r[:, None] == r[None, :], (damping * sign)[:, None], 0.0)
    return t[:, None] * G * t[None, :] + diagonal, t, sign


@triton.jit
def info_of(failed, G, damping, s):
    """info as float64: a failed factorisation may have met NaN or infinity instead of an indefinite H."""
    spread = tl.sum(tl.sum(G - G, axis=1)) + tl.sum(s - s) + (damping - damping)
    info = tl.where(damping > 0, failed, -1).to(tl.float64)
    return tl.where(spread == 0, info, 0.0)


@triton.jit
def solve_value(G, p, damping, s, place, k, K: tl.constexpr):
    """(coefficients of U in H⁻¹ v, failed) from p_j = ⟨u_j, v⟩."""
    A, t, sign = small_matrix(G, damping, s, K)
    X, D, failed = solved(A, (t * p)[:, None], sign, place, k, K)
    return -(t * tl.sum(X, axis=1)) / damping, failed


@triton.jit
def on_solution(B, x, p, t, sign, G, damping):
    """⟨u_j, H⁻¹ y⟩ [K] from B = A⁻¹ T p, x = T B, p_j = ⟨u_j, y⟩; without cancellation where s_j is not 0."""
    direct = (p - tl.sum(G * x[None, :], axis=1)) / damping
    return tl.where(t > 0, sign * B / tl.where(t > 0, t, 1.0), direct)


@triton.jit
def solve_gradient(G, p, q, across, damping, s, place, k, K: tl.constexpr):
    """With w = H⁻¹ grad = (grad − Σ x_i u_i)/λ, y = H⁻¹ v = (v − Σ y_i u_i)/λ: (x, y, ⟨u,w⟩, ⟨u,y⟩, d λ, failed).

    p = ⟨u, grad⟩, q = ⟨u, v⟩, across = ⟨grad, v⟩.
    """
    A, t, sign = small_matrix(G, damping, s, K)
    both = tl.arange(0, 2)[None, :]
    X, D, failed = solved(A, t[:, None] * tl.where(both == 0, p[:, None], q[:, None]), sign, place, k, K)
    b = tl.sum(tl.where(both == 0, X, 0.0), axis=1)
    c = tl.sum(tl.where(both == 1, X, 0.0), axis=1)
    x = t * b
    y = t * c
    on_w = on_solution(b, x, p, t, sign, G, damping)
    on_y = on_solution(c, y, q, t, sign, G, damping)
    d_damping = -((across - tl.sum(x * q)) / damping - tl.sum(s * on_w * on_y)) / damping
    return x, y, on_w, on_y, d_damping, failed


@triton.jit
def logdet_value(G, damping, s, place, size, k, K: tl.constexpr):
    """(log det H, failed): (D − k) log λ + Σ log |d_i|."""
    A, t, sign = small_matrix(G, damping, s, K)
    X, D, failed = solved(A, t[:, None], sign, place, k, K)
    ratio = tl.where(tl.arange(0, K) < k, tl.abs(D) / damping, 1.0)
    return size.to(tl.float64) * tl.log(damping) + tl.sum(tl.log(ratio)), failed


@triton.jit
def logdet_gradient(G, damping, s, grad, place, size, k, K: tl.constexpr):
    """(d U over U [K, K], d s [K], d λ, failed), from K = A⁻¹ and H⁻¹ u_j = (u_j − U T K T G e_j)/λ."""
    r = tl.arange(0, K)
    A, t, sign = small_matrix(G, damping, s, K)
    TG = t[:, None] * G
    equal = r[:, None] == r[None, :]
    identity = tl.where(equal, 1.0, 0.0).to(tl.float64)
    inverse, D, failed = solved(A, identity, sign, place, k, K)
    Z, D, failed = solved(A, TG, sign, place, k, K)
    taken = tl.sum(TG * Z, axis=0)
    own = tl.sum(tl.where(equal, G, 0.0), axis=0)
    # K is symmetric; the column of the output is where its row is stored.
    C = 2.0 * grad * t[:, None] * t[None, :] * inverse
    diagonal = tl.sum(tl.where(equal, inverse, 0.0), axis=1)
    trace = tl.sum(tl.where(r < k, sign * diagonal, 0.0))
    d_damping = grad * ((size - k).to(tl.float64) / damping + trace)
    return C, grad * (own - taken) / damping, d_damping, failed


@triton.jit(do_not_specialize=["size", "k"])
def small_kernel(
    gram, table, table_row, table_column, matrix, numbers, size, k, OP: tl.constexpr, K: tl.constexpr
):
    """Coefficients and numbers of one sample; `gram` [B, columns, n] and `matrix` [B, outputs, n] are contiguous."""
    sample = tl.program_id(0).to(tl.int64)
    nan = float("nan")
    r = tl.arange(0, K)
    inside = r < k
    both = inside[:, None] & inside[None, :]
    given = table + sample * table_row
    damping = tl.load(given)
    s = tl.load(given + (1 + r) * table_column, mask=inside, other=0.0)
    place = order_of(s, k, K)

    if OP == MATVEC:
        line = sample * (1 + k)
        c = s * tl.load(gram + line + 1 + r, mask=inside, other=0.0)
        tl.store(matrix + line, damping)
        tl.store(matrix + line + 1 + r, c, mask=inside)
        tl.store(numbers + sample, 0.0)
    elif OP == MATVEC_VJP:
        n = 2 + k
        table_of = gram + sample * 2 * n
        on_grad = tl.load(table_of + 2 + r, mask=inside, other=0.0)
        on_v = tl.load(table_of + n + 2 + r, mask=inside, other=0.0)
        tl.store(matrix + (sample * k + r) * 2, s * on_v, mask=inside)
        tl.store(matrix + (sample * k + r) * 2 + 1, s * on_grad, mask=inside)
        tl.store(numbers + sample * (1 + k), tl.load(table_of + 1))
        tl.store(numbers + sample * (1 + k) + 1 + r, on_grad * on_v, mask=inside)
    elif OP == SOLVE or OP == INFO:
        n = 1 + k
        table_of = gram + sample * n * n
        G = tl.load(table_of + (1 + r[:, None]) * n + 1 + r[None, :], mask=both, other=0.0)
        p = tl.load(table_of + 1 + r, mask=inside, other=0.0)
        c, failed = solve_value(G, p, damping, s, place, k, K)
        if OP == SOLVE:
            good = (failed == 0) & (damping > 0)
            tl.store(matrix + sample * n, tl.where(good, 1.0 / damping, nan))
            tl.store(matrix + sample * n + 1 + r, tl.where(good, c, nan), mask=inside)
        tl.store(numbers + sample, info_of(failed, G, damping, s))
    elif OP == SOLVE_VJP:
        n = 2 + k
        table_of = gram + sample * n * n
        G = tl.load(table_of + (2 + r[:, None]) * n + 2 + r[None, :], mask=both, other=0.0)
        p = tl.load(table_of + 2 + r, mask=inside, other=0.0)
        q = tl.load(table_of + n + 2 + r, mask=inside, other=0.0)
        x, y, on_w, on_y, d_damping, failed = solve_gradient(
            G, p, q, tl.load(table_of + 1), damping, s, place, k, K
        )
        good = (failed == 0) & (damping > 0)
        factor = s / damping
        C = factor[:, None] * (on_y[:, None] * x[None, :] + on_w[:, None] * y[None, :])
        line = matrix + (sample * k + r) * n
        tl.store(line, tl.where(good, -factor * on_y, nan), mask=inside)
        tl.store(line + 1, tl.where(good, -factor * on_w, nan), mask=inside)
        tl.store(line[:, None] + 2 + r[None, :], tl.where(good, C, nan), mask=both)
        tl.store(numbers + sample * (1 + k), tl.where(good, d_damping, nan))
        tl.store(numbers + sample * (1 + k) + 1 + r, tl.where(good, -on_w * on_y, nan), mask=inside)
    else:
        G = tl.load(gram + (sample * k + r[:, None]) * k + r[None, :], mask=both, other=0.0)
        if OP == LOGDET:
            value, failed = logdet_value(G, damping, s, place, size, k, K)
            good = (failed == 0) & (damping > 0)
            tl.store(numbers + sample * 2, tl.where(good, value, nan))
            tl.store(numbers + sample * 2 + 1, info_of(failed, G, damping, s))
        else:
            grad = tl.load(given + (1 + k) * table_column)
            C, d_s, d_damping, failed = logdet_gradient(G, damping, s, grad, place, size, k, K)
            good = (failed == 0) & (damping > 0)
            line = matrix + (sample * k + r[:, None]) * k + r[None, :]
            tl.store(line, tl.where(good, C, nan), mask=both)
            tl.store(numbers + sample * (1 + k), tl.where(good, d_damping, nan))
            tl.store(numbers + sample * (1 + k) + 1 + r, tl.where(good, d_s, nan), mask=inside)


HOST_NUMBERS = 18
_NAMES = [f"k{j}" for j in range(HOST_NUMBERS)]


@triton.jit(do_not_specialize=_NAMES)
def table_kernel(
    out,
    k0: tl.int64, k1: tl.int64, k2: tl.int64, k3: tl.int64, k4: tl.int64, k5: tl.int64,
    k6: tl.int64, k7: tl.int64, k8: tl.int64, k9: tl.int64, k10: tl.int64, k11: tl.int64,
    k12: tl.int64, k13: tl.int64, k14: tl.int64, k15: tl.int64, k16: tl.int64, k17: tl.int64,
    COUNT: tl.constexpr,
):  # fmt: skip
    """out[j] = the float64 whose bits kj holds."""
    bits = (k0, k1, k2, k3, k4, k5, k6, k7, k8, k9, k10, k11, k12, k13, k14, k15, k16, k17)
    values = scalars(None, 0, 0, 0, bits, COUNT)
    for j in tl.static_range(COUNT):
        tl.store(out + j, values[j])


def table_of(coef: Tensor, device: torch.device) -> Tensor:
    """The numbers of a call beside the data, [1, m] or [B, m] float64.

    Those of the host travel as arguments of a kernel: nothing waits, and a captured graph keeps them.
    """
    if coef.dim() == 2:
        return launch.to_device(coef, device)
    if coef.device.type != "cpu" or coef.shape[0] > HOST_NUMBERS:
        return launch.to_device(coef, device)[None]
    out = torch.empty((1, coef.shape[0]), dtype=torch.float64, device=device)
    patterns = [launch.bits(x) for x in coef.tolist()]
    with launch.on(device):
        table_kernel[(1,)](
            out, *patterns, *[0] * (HOST_NUMBERS - len(patterns)), COUNT=len(patterns), num_warps=1
        )
    return out


def small(op: int, gram: Tensor, table: Tensor, size: int, k: int) -> tuple[Tensor, Tensor]:
    """(coefficients [B, outputs, n], numbers [B, m]) of an op, float64, from the Gram [B, columns, n]."""
    batch, device = gram.shape[0], gram.device
    outputs = {SOLVE.value: 1, MATVEC.value: 1, INFO.value: 0, LOGDET.value: 0}.get(op, k)
    numbers = {SOLVE.value: 1, MATVEC.value: 1, INFO.value: 1, LOGDET.value: 2}.get(op, 1 + k)
    n = 2 if op == MATVEC_VJP.value else gram.shape[2]
    matrix = torch.empty((batch, outputs, n), dtype=torch.float64, device=device)
    found = torch.empty((batch, numbers), dtype=torch.float64, device=device)
    if batch > 0:
        row = table.stride(0) if table.shape[0] > 1 else 0
        with launch.on(device):
            small_kernel[(batch,)](
                gram, table, row, table.stride(1), matrix, found, size, k,
                OP=op, K=max(4, launch.power_of_two(k)), num_warps=2 if k > 8 else 1,
            )  # fmt: skip
    return matrix, found
