"""Frames to run: every op, as a function of a few choices and the seed of its data."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from frame_calls import Frame, bf16, f16, f32, f64

import cases

Tensor = torch.Tensor
KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2
PAIRS = ((f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f16, f16), (f64, f64))


def coefficients(mode: int) -> list[float]:
    """Values at which every term of the formulas counts."""
    return [0.7] if mode == EXTRAPOLATE else [3.0, 0.4]


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _correlated(generator, shape, rho, pair) -> list[Tensor]:
    eps, prev = cases.correlated(generator, shape, rho)
    return [eps.to(pair[0]), prev.to(pair[1])]


def _coef(values: Sequence[float], batch: int, per_sample: bool) -> Tensor:
    coef = torch.tensor(list(values), dtype=f64)
    if not per_sample:
        return coef
    return coef * torch.linspace(0.5, 1.5, max(batch, 1), dtype=f64)[:batch, None]


def lm(
    shape, mode=KEEP_NORM, pair=(f32, f32), values=None, rho=0.9, per_sample=False, prev=True, seed=0
) -> Frame:
    eps, other = _correlated(_generator(seed), shape, rho, pair)
    coef = _coef(coefficients(mode) if values is None else values, shape[0], per_sample)
    if prev:
        return Frame("lm_direction", (eps, other), (pair[0],), coef, mode=mode, pairs=1, gram="full")
    coef[..., -1] = 0.0
    return Frame(
        "lm_direction", (eps,), (pair[0],), coef, mode=mode, gram="full" if mode == PLAIN else "none"
    )


def lm_backward(
    shape, mode=KEEP_NORM, pair=(f32, f32), values=None, rho=0.9, per_sample=False, seed=0
) -> Frame:
    generator = _generator(seed)
    eps, prev = _correlated(generator, shape, rho, pair)
    grad = cases.gaussian(generator, shape).to(pair[0])
    coef = _coef(coefficients(mode) if values is None else values, shape[0], per_sample)
    return Frame(
        "lm_direction_backward", (eps, prev, grad), pair, coef, mode=mode, pairs=1, gram="full",
        scalars=coef.shape[-1],
    )  # fmt: skip


def lm_jvp(shape, mode=KEEP_NORM, pair=(f32, f32), values=None, rho=0.9, per_sample=False, seed=0) -> Frame:
    generator = _generator(seed)
    tensors = _correlated(generator, shape, rho, pair) + _correlated(generator, shape, 0.3, pair)
    values = coefficients(mode) if values is None else values
    coef = _coef([*values, *(0.5 + i for i in range(len(values)))], shape[0], per_sample)
    return Frame("lm_direction_jvp", tuple(tensors), pair[:1], coef, mode=mode, pairs=2, gram="full")


def _seeds(noisy: bool | str, batch: int) -> Tensor | None:
    if not noisy:
        return None
    if noisy == "per-sample":
        return torch.tensor([[11 + b, 2**40 - b] for b in range(batch)], dtype=torch.int64).reshape(batch, 2)
    return torch.tensor([-5, 7], dtype=torch.int64)


def affine(shape, terms=2, pair=(f32, f32), noisy: bool | str = False, per_sample=False, seed=0) -> Frame:
    generator = _generator(seed)
    streams = [cases.gaussian(generator, shape).to(pair[min(j, 1)]) for j in range(terms)]
    seeds = _seeds(noisy, shape[0])
    values = [0.7 - 0.4 * j for j in range(terms)] + ([0.6] if seeds is not None else [])
    return Frame("affine", tuple(streams), pair[:1], _coef(values, shape[0], per_sample), seed=seeds)


def affine_backward(
    shape,
    terms=2,
    pair=(f32, f32),
    noisy: bool | str = False,
    per_sample=False,
    d_terms=True,
    d_coef=True,
    seed=0,
) -> Frame:
    """Rows (grad, terms, noise)."""
    generator = _generator(seed)
    dtypes = [pair[min(j, 1)] for j in range(terms)]
    streams = [cases.gaussian(generator, shape).to(dtype) for dtype in (pair[0], *dtypes)]
    seeds = _seeds(noisy, shape[0])
    columns = terms + (seeds is not None)
    coef = _coef([0.7 - 0.4 * j for j in range(columns)], shape[0], per_sample)
    return Frame(
        "affine_backward",
        tuple(streams if d_coef else streams[:1]),
        tuple(dtypes) if d_terms else (),
        coef,
        gram="first" if d_coef else "none",
        scalars=columns if d_coef else 0,
        seed=seeds if d_coef else None,
    )


def given(
    shape, vectors=3, outputs=2, pair=(f32, f32), gram=True, ones=False, noisy: bool | str = False, prologue=0,
    per_sample=False, clamped=False, pairs=0, seed=0,
) -> Frame:  # fmt: skip
    """The engine itself: a matrix, and the Gram; `prologue` is the number of rows it makes, 0 for none."""
    generator = _generator(seed)
    base = cases.gaussian(generator, shape)
    made = [base + 0.3 * j * cases.gaussian(generator, shape) for j in range(vectors)]
    streams = tuple(t.to(pair[min(j, 1)]) for j, t in enumerate(made))
    seeds = _seeds(noisy, shape[0])
    n = vectors + ones + (seeds is not None)
    k = prologue or n
    batch = (shape[0],) if per_sample else ()
    L = torch.randn((*batch, k, n), generator=generator, dtype=f64) if prologue else None
    C = (
        torch.randn((*batch, outputs, k), generator=generator, dtype=f64)
        if outputs
        else torch.zeros(1, dtype=f64)
    )
    clamp = None
    if clamped:
        inf = float("inf")
        clamp = torch.tensor([[-0.5, 0.5], *[[-inf, inf]] * (k - 1)], dtype=f64)
        if k > 1:
            clamp[-1] = torch.tensor([0.25, inf])
    return Frame(
        "given", streams, pair[:1] * outputs, C, pairs=pairs, gram="full" if gram else "none",
        scalars=k * k if gram else 0, ones=ones, seed=seeds, prologue=L, clamp=clamp,
    )  # fmt: skip


SNR = 3  # a variant of `step`, beside KEEP_NORM and EXTRAPOLATE


def step(
    shape, variant=KEEP_NORM, pair=(f32, f32), models=1, prev=True, noisy: bool | str = False, clipped=False,
    guided=False, doubled=False, direction: bool | str = False, converted=False, per_sample=False, changes=None,
    rho=0.9, seed=0,
) -> Frame:  # fmt: skip
    """A step of a sampler on (sample, outputs, prev); the noise of SNR is drawn if `noisy`, else given as prev.

    `direction` is True or "state", in whose dtype it then is; `changes` are numbers by their place, one or one each:
    {1: 0.0} or {1: [0.4, 0.0, 0.4]}.
    """
    generator, sources = _generator(seed), 1 + models
    streams = [cases.gaussian(generator, shape).to(pair[min(j, 1)]) for j in range(sources)]
    a, d = [0.9 - 0.4 * j for j in range(sources)], [0.2, 1.0, -0.35, 0.25, -0.15, 0.1][:sources]
    rule = {KEEP_NORM: [3.0, 0.4], EXTRAPOLATE: [0.7, 0.0], SNR: [0.1, 1.0]}[variant]
    values = [*rule, 0.75, *a, *d]
    seeds = _seeds(noisy, shape[0])
    if seeds is not None and variant != SNR:
        values += [0.5, 0.25]
    if clipped:
        values += [0.4, -0.3, 0.7, *(0.6 - 0.5 * j for j in range(sources))]
    if prev and not (variant == SNR and noisy):
        other = cases.gaussian(generator, shape)
        if variant != SNR:
            s = [t.double() for t in streams]
            if guided:
                s[1] = s[1] - s[2]
            e = sum(c * t for c, t in zip(d, s, strict=True))
            other = rho * e + (1 - rho**2) ** 0.5 * other
        streams.append(other.to(pair[min(models, 1)]))
    coef = _coef(values, shape[0], per_sample or any(isinstance(c, list) for c in (changes or {}).values()))
    for place, value in (changes or {}).items():
        coef[..., place] = torch.tensor(value, dtype=f64)
    outputs = [pair[0]] * (1 + doubled)
    if direction:
        outputs.append(pair[0] if direction == "state" else pair[min(models, 1)])
    if converted:
        outputs.append(pair[min(models, 1)])
    return Frame(
        "lm_step", tuple(streams), tuple(outputs), coef, mode=variant,
        gram="full" if variant == SNR or prev else "none", seed=seeds, sources=sources, clipped=clipped,
        guided=guided, step_outputs=1 + doubled, step_direction=bool(direction), step_converted=converted,
    )  # fmt: skip


def whole_step(shape, variant=KEEP_NORM, pair=(f32, f32), **more) -> Frame:
    """A step that has all there is."""
    wanted = {
        "noisy": True,
        "clipped": True,
        "guided": True,
        "doubled": True,
        "direction": True,
        "converted": True,
    }
    return step(shape, variant, pair, **{"models": 2, **wanted, **more})


MATVEC, SOLVE, INV_SQRT = 0, 1, 2
HEADS = {"lowrank": 1, "lowrank_vjp": 2, "lowrank_logdet": 0, "lowrank_logdet_vjp": 0, "lowrank_update": 1}


def lowrank(op: str, shape, k: int, mode=0, dtype=f32, seed=0) -> Frame:
    """An op of the damped low-rank Hessian on rows (heads, u_1 … u_k): the last two are equal, s has both signs."""
    generator, batch = _generator(seed), shape[0]
    heads = [cases.gaussian(generator, shape).to(dtype) for _ in range(HEADS[op])]
    rows = [cases.gaussian(generator, shape).to(dtype) for _ in range(k)]
    rows[-1] = rows[-min(k, 2)].clone()
    s = torch.linspace(1.0, 0.4, k, dtype=f64).repeat(batch, 1)
    if op != "lowrank_update" and k > 2:
        s[:, 1] = -0.02
    damping = 0.2 * (rows[0].double() ** 2).sum(1, keepdim=True) + 1.0
    numbers = {"lowrank_update": [torch.full_like(damping, 0.9), torch.full_like(damping, 0.7), s]}.get(
        op, [damping, s, *([torch.full_like(damping, 0.6)] if op == "lowrank_logdet_vjp" else [])]
    )
    counts = {"lowrank": (1, 1), "lowrank_logdet": (0, 2), "lowrank_update": (k, k)}
    outputs, scalars = counts.get(op, (k, 1 + k))
    gram = "first" if op == "lowrank" and mode == MATVEC else "full"
    gram = "two" if op == "lowrank_vjp" and mode == MATVEC else gram
    return Frame(
        op,
        (*heads, *rows),
        (dtype,) * outputs,
        torch.cat(numbers, dim=1),
        mode=mode,
        gram=gram,
        scalars=scalars,
    )


# Plans by hand: every variant, few threads, so that small samples have several tiles.
HELD = tuple({"variant": "held", "threads": 32, "cluster": c} for c in (1, 2, 3, 8)) + (
    {"variant": "held", "threads": 128, "cluster": 4},
)
TWO_SWEEPS = (
    {"variant": "two_sweeps", "threads": 32, "splits": 1},
    {"variant": "two_sweeps", "threads": 64, "splits": 3},
    {"variant": "two_sweeps", "threads": 128, "splits": 8},
)
ONE_SWEEP = (
    {"variant": "one_sweep", "threads": 32, "splits": 1},
    {"variant": "one_sweep", "threads": 64, "splits": 3},
    {"variant": "one_sweep", "threads": 128, "splits": 8},
)


def plans(frame: Frame) -> tuple[dict, ...]:
    """The plan that the heuristic makes, and all by hand that can run the call."""
    return ({}, *(ONE_SWEEP if frame.gram == "none" else HELD + TWO_SWEEPS))
