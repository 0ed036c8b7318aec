"""What a frame call must give: the longdouble oracle, our reference formula in the same dtype, and how far off it is.

The rule is that of the harness: within twice the error of the reference formula in the same dtype, plus 2 ulp. Where
samples are so small that one draw says nothing about that error, its a-priori bound stands in for it: `count + 2`
roundings of Σ|c_j||row_j|.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from frame_calls import Frame, Result, f32, f64
from frame_cases import HEADS
from frame_step_oracle import Step

import oracle
from harness.compare import assert_within, check, relative_error, rows, ulp
from marquardt.reference import frame as reference_frame
from marquardt.reference import hessian, langevin, lml
from marquardt.reference import lowrank as reference_lowrank

Tensor = torch.Tensor
LD = np.longdouble

VALUE_BOUND, GRADIENT_BOUND, STEP_BOUND = (
    2e-7,
    3e-7,
    5e-7,
)  # norm-wise, per sample, float32, in the stated range


@dataclass
class Wanted:
    """Expected outputs [B, D], the reference formula's, and errors that come on top of those of the formula."""

    outputs: list[np.ndarray]
    reference: list[Tensor]
    apriori: list[np.ndarray]  # the formula's error bound, for samples too small to measure it
    slack: list[np.ndarray]  # what a few ulp of noise, and float64 scalar products, contribute
    scalars: np.ndarray | None = None
    scalars_allowed: np.ndarray | None = None


def unit(frame: Frame) -> LD:
    """Half an ulp of the compute type at 1."""
    return LD(torch.finfo(frame.compute).eps) / 2


def noise(frame: Frame) -> np.ndarray | None:
    if frame.seed is None:
        return None
    if frame.batch * frame.size == 0:
        return np.zeros((frame.batch, frame.size))
    return oracle.noise_like((frame.batch, frame.size), frame.seed.numpy())


def normal_ulps(xi: np.ndarray) -> np.ndarray:
    """4 ulp of float32 normals."""
    return 4 * np.spacing(np.abs(xi).astype(np.float32)).astype(LD)


def vectors_of(frame: Frame) -> list[np.ndarray]:
    made = [rows(t) for t in frame.streams]
    if frame.ones:
        made.append(np.ones_like(made[0]))
    xi = noise(frame)
    return made if xi is None else [*made, oracle.wide(xi)]


def rows_of(frame: Frame) -> tuple[np.ndarray, np.ndarray]:
    """[B, k, D]: the rows, and how far rounding (and noise) may take them from what they should be."""
    vectors = np.stack(vectors_of(frame), 1)
    off = np.zeros_like(vectors)
    xi = noise(frame)
    if xi is not None:
        off[:, -1] = normal_ulps(xi)
    if frame.prologue is not None:
        L = np.abs(oracle.wide(frame.prologue.numpy()))
        L = np.broadcast_to(L, (frame.batch, *L.shape[-2:]))
        size = np.einsum("bij,bjd->bid", L, np.abs(vectors) + off)
        off = np.einsum("bij,bjd->bid", L, off) + (vectors.shape[1] + 2) * unit(frame) * size
    made = oracle.frame_rows(
        [rows(t) for t in frame.streams],
        None if frame.prologue is None else frame.prologue.numpy(),
        None if frame.clamp is None else frame.clamp.numpy(),
        frame.ones,
        xi,
    )
    for j in range(frame.pairs):
        made[:, 2 * j + 1] = made[:, 2 * j + 1] - made[:, 2 * j]
        off[:, 2 * j + 1] += unit(frame) * np.abs(made[:, 2 * j + 1])
    return made, off


def matrix_of(frame: Frame) -> np.ndarray:
    """[B, m, k]: C where the caller gives it."""
    p = oracle.wide(frame.parameter_rows().numpy())
    if frame.op == "given":
        return p[:, : len(frame.outputs) * frame.rows].reshape(frame.batch, len(frame.outputs), frame.rows)
    if frame.op == "affine":
        return p[:, None, :]
    made = np.zeros((frame.batch, len(frame.outputs), frame.rows), LD)  # affine_backward
    made[:, :, 0] = p[:, : len(frame.outputs)]
    return made


def product_bound(made: np.ndarray, off: np.ndarray, i: int, j: int) -> np.ndarray:
    """[B]: how far ⟨row_i, row_j⟩ may be off when products and sums are float64."""
    a, b = (np.abs(made[:, r]) + off[:, r] for r in (i, j))
    summed = (made.shape[2] + 2) * LD(2.0**-53) * oracle.dot(a, b)
    return summed + oracle.dot(a, off[:, j]) + oracle.dot(off[:, i], b)


def _linear(frame: Frame) -> Wanted:
    """Ops whose C is given: `given`, `affine`, `affine_backward`."""
    made, off = rows_of(frame)
    C = matrix_of(frame)
    outputs = oracle.frame_apply(made, C) if frame.outputs else []
    sizes = oracle.frame_apply(np.abs(made) + off, np.abs(C)) if frame.outputs else []
    moved = oracle.frame_apply(off, np.abs(C)) if frame.outputs else []
    rounding = (frame.rows + 2) * unit(frame)
    apriori = [2 * (rounding * s + m) for s, m in zip(sizes, moved, strict=True)]
    noisy = moved if frame.seed is not None else [np.zeros_like(m) for m in moved]
    wanted = Wanted(outputs, _linear_reference(frame), apriori, noisy)
    k = frame.rows
    if frame.scalars and frame.op == "given":
        G = oracle.frame_gram(made)
        allowed = np.stack(
            [np.stack([product_bound(made, off, i, j) for j in range(k)], -1) for i in range(k)], -2
        )
        wanted.scalars, wanted.scalars_allowed = G.reshape(-1, k * k), allowed.reshape(-1, k * k)
    elif frame.scalars:
        wanted.scalars = np.stack([oracle.dot(made[:, 0], made[:, j]) for j in range(1, k)], -1)
        wanted.scalars_allowed = np.stack([product_bound(made, off, 0, j) for j in range(1, k)], -1)
    return wanted


def _linear_reference(frame: Frame) -> list[Tensor]:
    p = frame.parameters
    streams = list(frame.streams)
    if not frame.outputs:
        return []
    if frame.op == "affine":
        return [langevin.affine_step(streams, p, frame.seed, 1)]
    if frame.op == "affine_backward":
        c = frame.parameter_rows()
        g = reference_frame.flatten(streams[0], 1)
        return [(c[:, i : i + 1].to(g.dtype) * g).to(d) for i, d in enumerate(frame.outputs)]
    if frame.pairs:
        wide = [t.to(frame.compute) for t in streams]
        for j in range(frame.pairs):
            wide[2 * j + 1] = wide[2 * j + 1] - wide[2 * j]
        streams = wide
    made = reference_frame.frame_apply(streams, p, frame.prologue, frame.clamp, frame.seed, frame.ones, 1)
    return [t.to(d) for t, d in zip(made, frame.outputs, strict=True)]


def _apriori(frame: Frame, columns, vectors) -> np.ndarray:
    """[B, D]: 2·(count + 2) roundings of Σ|c_j||v_j|; 0 where a special case has no such coefficients."""
    size = sum(np.abs(c)[:, None] * np.abs(v) for c, v in zip(columns, vectors, strict=True))
    return np.nan_to_num(2 * (len(vectors) + 2) * unit(frame) * size)


@dataclass
class _Lm:
    """An lm call taken apart: rows ε and r [B, D], scalars [B], and the tensors they come from."""

    frame: Frame

    def __post_init__(self) -> None:
        frame = self.frame
        self.mode, self.m = frame.mode, 1 if frame.mode == oracle.EXTRAPOLATE else 2
        self.coef = frame.parameter_rows()[:, : self.m]
        self.tangents = frame.parameter_rows()[:, self.m :]
        self.given = [oracle.wide(c.numpy()) for c in self.coef.T]
        self.eps, self.prev = frame.streams[0], frame.streams[1] if len(frame.streams) > 1 else None
        self.e = rows(self.eps)
        self.p = None if self.prev is None else rows(self.prev)
        if self.p is None:
            self.given[-1] = np.zeros_like(self.given[-1])
        r = np.zeros_like(self.e) if self.p is None else self.p - self.e
        self.r = np.where((self.given[-1] == 0)[:, None], 0, r) if frame.op == "lm_direction" else r
        self.gram = oracle.dot(self.e, self.e), oracle.dot(self.e, self.r), oracle.dot(self.r, self.r)

    def duals(self):
        return oracle.lm_map(self.mode, *oracle.Dual.variables(*self.gram, *self.given))


def _lm(frame: Frame) -> Wanted:
    take = {"lm_direction": _value, "lm_direction_jvp": _tangent, "lm_direction_backward": _gradient}
    with np.errstate(all="ignore"):
        return take[frame.op](frame, _Lm(frame))


def _value(frame: Frame, x: _Lm) -> Wanted:
    out = oracle.lm_direction(x.e, x.p, x.mode, *x.given)
    reference = hessian.lm_direction(x.eps, x.prev, x.coef, x.mode, 1)
    c0, c1 = oracle.lm_map(x.mode, *x.gram, *x.given)
    same, zero = oracle.lm_special(x.mode, *x.gram, *x.given)
    columns = np.where(zero, 0, np.where(same, 1, c0)), np.where(zero | same, 0, c1)
    slack = np.zeros_like(x.e)
    if frame.compute == f64 and x.p is not None:  # its sums have no wider type to live in
        slack = oracle.lm_rounding(x.e, x.e + x.r, x.mode, x.given, torch.finfo(f64).eps)
    return Wanted([out], [reference], [_apriori(frame, columns, [x.e, x.r])], [slack])


def _tangent(frame: Frame, x: _Lm) -> Wanted:
    e_t, p_t = (rows(t) for t in frame.streams[2:])
    moved = [oracle.wide(c.numpy()) for c in x.tangents.T]
    out = oracle.lm_direction_jvp(x.e, x.p, x.mode, x.given, e_t, p_t, moved)
    eps_t, prev_t = frame.streams[2:]
    reference = hessian.lm_direction_jvp(x.eps, x.prev, x.coef, eps_t, prev_t, x.tangents, x.mode, 1)
    c, r_t = x.duals(), p_t - e_t
    along = (
        2 * oracle.dot(x.e, e_t),
        oracle.dot(e_t, x.r) + oracle.dot(x.e, r_t),
        2 * oracle.dot(x.r, r_t),
        *moved,
    )
    moves = [sum(d * t for d, t in zip(k.d, along, strict=True)) for k in c]
    apriori = _apriori(frame, [c[0].v, c[1].v, *moves], [e_t, r_t, x.e, x.r])
    return Wanted([out], [reference], [apriori], [np.zeros_like(x.e)])


def _gradient(frame: Frame, x: _Lm) -> Wanted:
    g = rows(frame.streams[2])
    d_eps, d_prev, d_coef, sizes = oracle.lm_direction_vjp(x.e, x.p, x.mode, x.given, g)
    found = hessian.lm_direction_backward(frame.streams[2], x.eps, x.prev, x.coef, x.mode, 1)
    c0, c1 = x.duals()
    F = c0.d * oracle.dot(g, x.e) + c1.d * oracle.dot(g, x.r)
    columns = (2 * F[0] - F[1], F[1] - 2 * F[2], c0.v - c1.v), (F[1], 2 * F[2], c1.v)
    apriori = [_apriori(frame, c, [x.e, x.r, g]) for c in columns]
    wanted = Wanted([d_eps, d_prev], list(found[:2]), apriori, [np.zeros_like(x.e)] * 2)
    wanted.scalars = np.stack(d_coef, -1)
    bound = GRADIENT_BOUND if frame.compute == f32 else 1e-12
    own = np.abs(found[2].numpy() - wanted.scalars)
    wanted.scalars_allowed = np.nan_to_num(bound * np.stack(sizes, -1)) + 2 * own  # a size is NaN where ε = 0
    return wanted


@functools.lru_cache(maxsize=32)
def _lowrank(frame: Frame) -> Wanted:
    """By the definition in float64, which has tests of its own against closed forms."""
    heads = HEADS[frame.op]
    vectors = [t.double() for t in frame.streams]
    v, basis, coef = vectors[:heads], torch.stack(vectors[heads:], dim=1), frame.parameters
    if frame.op == "lowrank":
        made, numbers = reference_lowrank.apply(v[0], basis, coef, frame.mode, False, 1)
        made = made[:, None]
    elif frame.op == "lowrank_vjp":
        made, numbers = reference_lowrank.vjp(*v, basis, coef, frame.mode, 1)
    elif frame.op == "lowrank_logdet":
        made, numbers = basis[:, :0], reference_lowrank.logdet(basis, coef, False, 1)
    elif frame.op == "lowrank_logdet_vjp":
        made, numbers = reference_lowrank.logdet_vjp(basis, coef, 1)
    else:
        made, numbers = reference_lowrank.update(v[0], basis, coef, basis.shape[1], 1)
    outputs = [rows(made[:, i]) for i in range(made.shape[1])]
    reference = [made[:, i].to(dtype) for i, dtype in enumerate(frame.outputs)]
    # Sums of float32 products where nothing cancels, else of double ones: the family's bound, norm-wise per sample.
    bound = VALUE_BOUND if frame.op == "lowrank" else 4 * GRADIENT_BOUND
    bound = bound if frame.compute == f32 else 1e-11
    size = [np.sqrt((e * e).sum(1, keepdims=True)) + LD(1e-30) for e in outputs]
    slack = [np.broadcast_to(LD(bound) * n, e.shape) for n, e in zip(size, outputs, strict=True)]
    nothing = [np.zeros_like(e) for e in outputs]
    scale = np.abs(numbers.numpy().astype(LD)).max(axis=1, keepdims=True)
    allowed = np.broadcast_to(LD(1e-10) * (scale + 1), numbers.shape)
    return Wanted(outputs, reference, nothing, slack, numbers.numpy(), allowed)


@functools.lru_cache(maxsize=32)
def _step(frame: Frame) -> Wanted:
    with np.errstate(all="ignore"):
        xi = noise(frame)
        step = Step(frame, unit(frame), xi, None if xi is None else normal_ulps(xi))
    made = [step.x] * frame.step_outputs
    flags = lml.DIRECTION if frame.step_direction else 0
    if frame.step_direction:
        made.append(step.e)
        if frame.outputs[frame.step_outputs] == frame.streams[0].dtype:
            flags = lml.STATE_DIRECTION
    if frame.step_converted:
        made.append(step.y)
        flags |= lml.CONVERTED
    flags |= lml.GUIDED if frame.guided else 0
    sample, *outputs = frame.streams[: frame.sources]
    prev = frame.streams[-1] if len(frame.streams) > frame.sources else None
    new, *rest = lml.lm_step(
        sample, outputs, prev, frame.parameters, frame.seed, frame.mode, flags, frame.clipped, 1
    )
    wanted = [frame.step_direction, frame.step_converted]
    reference = [new] * frame.step_outputs + [t for t, on in zip(rest, wanted, strict=True) if on]
    # What the mean error of a few draws says nothing about: scalar products of float64 numbers, and noise.
    return Wanted([t.v for t in made], reference, [2 * t.off for t in made], [t.noise for t in made])


def wanted(frame: Frame) -> Wanted:
    if frame.op == "lm_step":
        return _step(frame)
    if frame.op in HEADS:
        return _lowrank(frame)
    return _lm(frame) if frame.op.startswith("lm") else _linear(frame)


Draw = Callable[[int], Frame]


@functools.cache
def usual_errors(draw: Draw) -> tuple[float, ...]:
    """Largest error of the reference formula over a few draws, relative to the largest element of its sample."""
    errors = []
    for seed in range(100, 104):
        right = wanted(draw(seed))
        errors.append([relative_error(r, e) for r, e in zip(right.reference, right.outputs, strict=True)])
    return tuple(max(column) for column in zip(*errors, strict=True))


def judge(frame: Frame, result: Result, draw: Draw | None = None, stated: bool = False) -> None:
    """With `draw`, the measured error of the reference formula decides; without, its a-priori bound."""
    right = wanted(frame)
    bound = None
    if stated:
        bound = VALUE_BOUND if frame.op in ("lm_direction", "affine") else GRADIENT_BOUND
        bound = STEP_BOUND if frame.op == "lm_step" else bound
    usual = usual_errors(draw) if draw is not None else (0.0,) * len(right.outputs)
    text = result.plan["text"]
    for i, out in enumerate(result.outputs):
        assert out.dtype == frame.outputs[i]
        slack = right.slack[i] + (0 if draw is not None else right.apriori[i])
        check(
            out,
            right.outputs[i],
            right.reference[i],
            bound,
            slack=slack,
            usual=usual[i],
            what=f"output {i}, {text}",
        )
    if frame.scalars:
        assert_within(result.scalars, right.scalars, right.scalars_allowed, f"scalars, {text}")


def margins(frame: Frame) -> list[tuple[np.ndarray, np.ndarray]]:
    """(expected, allowed) of every output and the scalars, for a judge that knows no formula."""
    right = wanted(frame)
    made = []
    for i, dtype in enumerate(frame.outputs):
        e = right.outputs[i]
        own = np.abs(rows(right.reference[i]) - e).max(axis=1, keepdims=True, initial=0)
        made.append((e, 2 * own + 3 * ulp(e, dtype) + right.slack[i] + right.apriori[i]))
    if frame.scalars:
        made.append((right.scalars, right.scalars_allowed))
    return made
