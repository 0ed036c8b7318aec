"""Entry points of the frame engine, T ↦ C(T Tᵀ)·T per sample, with the schemas of `marquardt::*`.

Those of the low-rank Hessian are in lowrank.py, that of the steps of samplers in step.py.

`coef` is float64: [m] on the CPU, shared by the batch, or [B, m] beside the data. Samples lie behind the first
`batch_dims` (0 or 1) dimensions. Arguments are taken as checked by the public functions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl

from . import launch, maps
from .generic import frame_apply, frame_gram
from .kernels import apply_kernel, gram_kernel, merge_kernel
from .launch import FrameConfig, Scalars
from .layout import Layout
from .lowrank import lowrank_apply, lowrank_logdet, lowrank_logdet_vjp, lowrank_update, lowrank_vjp
from .step import lm_step

Tensor = torch.Tensor

__all__ = [
    "affine_step",
    "affine_step_backward",
    "frame_apply",
    "frame_gram",
    "frame_map",
    "lm_direction",
    "lm_direction_backward",
    "lm_direction_jvp",
    "lm_step",
    "lowrank_apply",
    "lowrank_logdet",
    "lowrank_logdet_vjp",
    "lowrank_update",
    "lowrank_vjp",
]

AFFINE, FORWARD, BACKWARD, JVP = (
    maps.AFFINE.value,
    maps.LM_FORWARD.value,
    maps.LM_BACKWARD.value,
    maps.LM_JVP.value,
)
KEEP_NORM, PLAIN, EXTRAPOLATE = (maps.KEEP_NORM.value, maps.PLAIN.value, maps.EXTRAPOLATE.value)

# Dot products that each map takes, as pairs of rows (see maps.coefficients).
GRAM_ENTRIES = {
    AFFINE: (),
    FORWARD: (0, 0, 0, 1, 1, 1),
    BACKWARD: (0, 0, 0, 1, 1, 1, 0, 2, 1, 2),
    JVP: (0, 0, 0, 1, 1, 1, 0, 2, 1, 2, 0, 3, 1, 3),
}

# The Gram of lm_direction has float64 products: they cannot leave the range, nor lose a determinant of nearly
# parallel vectors, and two conversions an element hide behind the memory.
PRODUCTS = tl.float64


def _gram(
    layout: Layout,
    config: FrameConfig,
    streams: Sequence[Tensor],
    scalars: Scalars,
    seed: Tensor | None,
    op: int,
    mode: int,
    entries: tuple[int, ...],
    pairs: int,
    products: tl.dtype,
) -> Tensor:
    """Partial sums [B, splits, entries] float64."""
    tensors, strides = layout.streams(streams)
    seed, seed_row, flags = launch.noise(seed, layout)
    shape = (layout.batch, config.splits, len(entries) // 2)
    partials = torch.empty(shape, dtype=torch.float64, device=tensors[0].device)
    with launch.on(tensors[0].device):
        gram_kernel[(layout.batch * config.splits,)](
            tensors, strides, seed, seed_row, partials, layout.size, config.chunk, config.splits,
            *scalars.arguments,
            SCALARS=scalars.count, OP=op, MODE=mode, ENTRIES=entries, PAIRS=pairs, **flags,
            CTYPE=launch.compute_type(tensors[0]), PTYPE=products, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip
    return partials


def _apply(
    layout: Layout,
    config: FrameConfig,
    streams: Sequence[Tensor],
    outputs: Sequence[Tensor],
    scalars: Scalars,
    seed: Tensor | None = None,
    op: int = AFFINE,
    mode: int = 0,
    pairs: int = 0,
    extra: Tensor | None = None,
    partials: Tensor | None = None,
) -> None:
    """Write the outputs, and the per-sample scalars `extra` [B, m]; without `partials` the kernel takes the Gram."""
    tensors, strides = layout.streams(streams)
    seed, seed_row, flags = launch.noise(seed, layout)
    with launch.on(tensors[0].device):
        apply_kernel[(layout.batch * config.splits,)](
            tensors, strides, tuple(outputs), extra, seed, seed_row, partials, layout.size, config.chunk,
            config.splits, *scalars.arguments,
            SCALARS=scalars.count, OP=op, MODE=mode, ENTRIES=GRAM_ENTRIES[op], PAIRS=pairs,
            EXTRA=0 if extra is None else extra.shape[1], FUSED=partials is None, SPLITS=config.splits_padded,
            SKIP=op != AFFINE, WIDENS=op == FORWARD, **flags, CTYPE=launch.compute_type(tensors[0]), PTYPE=PRODUCTS,
            EMULATED=launch.emulated(), WARPS=config.num_warps, BLOCK=config.block, num_warps=config.num_warps,
        )  # fmt: skip


def _run(
    layout: Layout,
    streams: Sequence[Tensor],
    outputs: Sequence[Tensor],
    coef: Tensor,
    op: int,
    mode: int,
    pairs: int,
    extra: Tensor | None = None,
) -> None:
    """Gram, map and apply: one launch while a sample is one chunk, else two."""
    layout_streams = [layout.stream(t)[0] for t in streams]
    device = streams[0].device
    double = streams[0].dtype == torch.float64
    config = launch.choose(layout.size, len(streams) + len(outputs), gram=True, double=double)
    scalars = Scalars.of(coef, device)
    partials = None
    if config.splits > 1:
        partials = _gram(
            layout, config, layout_streams, scalars, None, op, mode, GRAM_ENTRIES[op], pairs, PRODUCTS
        )
    _apply(layout, config, layout_streams, outputs, scalars, None, op, mode, pairs, extra, partials)


def _copy(eps: Tensor, layout: Layout) -> Tensor:
    """eps' bits in a new tensor."""
    return torch.empty_strided(layout.shape, layout.outer, dtype=eps.dtype, device=eps.device).copy_(eps)


@launch.entry
def lm_direction(eps: Tensor, prev: Tensor | None, coef: Tensor, mode: int, batch_dims: int) -> Tensor:
    """LM direction per sample; mode 0 KEEP_NORM (λ, κ), 1 PLAIN (λ, κ), 2 EXTRAPOLATE (γ,)."""
    launch.check_device("lm_direction", [eps])
    layout = Layout.of(eps, batch_dims)
    gate = 0 if mode == EXTRAPOLATE else 1
    host = coef.dim() == 1 and coef.device.type == "cpu"
    if mode != PLAIN and (prev is None or (host and float(coef[gate]) == 0)):
        return _copy(eps, layout)
    if prev is None:
        prev = eps
        coef = torch.stack([coef[..., 0], torch.zeros_like(coef[..., 0])], dim=-1)
    out = layout.empty(eps)
    if out.numel() > 0:
        _run(layout, [eps, prev], [out], coef, FORWARD, mode, pairs=1)
    return layout.finish(out)


@launch.entry
def lm_direction_backward(
    grad: Tensor, eps: Tensor, prev: Tensor, coef: Tensor, mode: int, batch_dims: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(d_eps, d_prev, d_coef [B, m] float64 per sample); both tensors in the layout that eps asks for."""
    launch.check_device("lm_direction_backward", [eps])
    layout = Layout.of(eps, batch_dims)
    d_eps, d_prev = layout.empty(eps), layout.empty(prev)
    d_coef = torch.zeros((layout.batch, coef.shape[-1]), dtype=torch.float64, device=eps.device)
    if d_eps.numel() > 0:
        _run(layout, [eps, prev, grad], [d_eps, d_prev], coef, BACKWARD, mode, pairs=1, extra=d_coef)
    return layout.finish(d_eps), layout.finish(d_prev), d_coef


@launch.entry
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
    """Tangent of lm_direction along (eps_t, prev_t, coef_t)."""
    launch.check_device("lm_direction_jvp", [eps])
    layout = Layout.of(eps, batch_dims)
    if coef.dim() == 1 and coef_t.dim() == 1 and coef.device == coef_t.device:
        both = torch.cat([coef, coef_t])
    else:
        tables = [launch.to_device(c, eps.device) for c in (coef, coef_t)]
        both = torch.cat([c.expand(layout.batch, c.shape[-1]) for c in tables], dim=1)
    out = layout.empty(eps)
    if out.numel() > 0:
        _run(layout, [eps, prev, eps_t, prev_t], [out], both, JVP, mode, pairs=2)
    return layout.finish(out)


@launch.entry
def affine_step(terms: Sequence[Tensor], coef: Tensor, seed: Tensor | None, batch_dims: int) -> Tensor:
    """Σ_j c_j·term_j + c_noise·ξ(seed) in type and layout of the first term; c_noise is coef's last column."""
    launch.check_device("affine_step", terms)
    layout = Layout.of(terms[0], batch_dims, row_major=seed is not None)
    out = layout.empty(terms[0])
    if out.numel() > 0:
        _affine(layout, [layout.stream(t)[0] for t in terms], [out], coef, seed)
    return layout.finish(out)


def _affine(
    layout: Layout, streams: Sequence[Tensor], outputs: Sequence[Tensor], coef: Tensor, seed: Tensor | None
) -> None:
    """Apply `coef` row by row; what the whole batch shares is walked as one long sample."""
    shared = coef.dim() == 1 and (seed is None or seed.dim() == 1)
    dense = all(layout.stream(t)[1] == layout.size for t in streams)
    if shared and dense and layout.batch > 1:
        count = layout.batch * layout.size
        streams = [t.as_strided((count,), (1,)) for t in streams]
        outputs = [t.as_strided((count,), (1,)) for t in outputs]
        layout = Layout((count,), 0, 1, count, (1,), (1,))
    double = streams[0].dtype == torch.float64
    vectors = len(streams) + len(outputs) + (2 if seed is not None else 0)
    span = launch.span(layout, launch.noise(seed, layout)[2])
    config = launch.choose(span, vectors, gram=False, double=double)
    _apply(layout, config, streams, outputs, Scalars.of(coef, streams[0].device), seed)


@launch.entry
def affine_step_backward(
    grad: Tensor,
    terms: Sequence[Tensor],
    coef: Tensor,
    seed: Tensor | None,
    want_terms: bool,
    want_coef: bool,
    batch_dims: int,
) -> tuple[list[Tensor], Tensor]:
    """(d_terms[j] = c_j·grad, d_coef [B, m] = ⟨grad, term_j⟩ and last ⟨grad, ξ⟩); empty where not wanted."""
    launch.check_device("affine_step_backward", [grad])
    layout = Layout.of(terms[0], batch_dims, row_major=seed is not None and want_coef)
    grad = layout.stream(grad)[0]
    d_terms: list[Tensor] = []
    if want_terms:
        d_terms = [layout.empty(t) for t in terms]
        if grad.numel() > 0:
            _affine(layout, [grad], d_terms, coef[..., : len(terms)], None)
        d_terms = [layout.finish(d) for d in d_terms]
    if not want_coef:
        return d_terms, torch.zeros(0, dtype=torch.float64, device=grad.device)

    rows = 1 + len(terms) + (1 if seed is not None else 0)
    d_coef = torch.zeros((layout.batch, rows - 1), dtype=torch.float64, device=grad.device)
    if grad.numel() > 0:
        entries = tuple(i for j in range(1, rows) for i in (0, j))
        span = launch.span(layout, launch.noise(seed, layout)[2])
        config = launch.choose(span, rows + len(terms), gram=True, double=grad.dtype == torch.float64)
        no_scalars = Scalars(0, None, 0, 0, (0,) * launch.HOST_SCALARS)
        partials = _gram(
            layout, config, [grad, *terms], no_scalars, seed, AFFINE, 0, entries, 0, launch.compute_type(grad)
        )
        _merge(partials, d_coef)
    return d_terms, d_coef


def _merge(partials: Tensor, out: Tensor) -> None:
    """out[b] = Σ_split partials[b, split], in a fixed order."""
    batch, splits, columns = partials.shape
    with launch.on(out.device):
        merge_kernel[(batch, -(-columns // 16))](
            partials, out, splits, columns, SPLITS=1 << (splits - 1).bit_length(), WIDTH=16
        )


def frame_map(op: int, mode: int, gram: Tensor, coef: Tensor) -> Tensor:
    """The scalar maps alone: gram [B, g], coef [B, m] float64 -> [B, columns] float64 on gram's device.

    op 1: (n, e, R) -> (c0, c1);  op 2: (n, e, R, ⟨g,ε⟩, ⟨g,r⟩) -> d_eps rows, d_prev rows over (ε, r, g), d_coef;
    op 3: (n, e, R, ṅ, ė, Ṙ), coef (coef, coef_t) -> coefficients of (ε, r, ε_t, r_t).
    """
    device = gram.device if gram.device.type == "cuda" or launch.emulated() else torch.device("cuda")
    table = launch.to_device(gram, device).contiguous()
    values = launch.to_device(coef, device).contiguous()
    columns = {FORWARD: 2, BACKWARD: 6 + coef.shape[1], JVP: 4}[op]
    out = torch.empty((gram.shape[0], columns), dtype=torch.float64, device=device)
    if out.numel() > 0:
        with launch.on(device):
            maps.map_kernel[(gram.shape[0],)](
                table,
                values,
                out,
                G=gram.shape[1],
                M=coef.shape[1],
                OUT=columns,
                OP=op,
                MODE=mode,
                num_warps=1,
            )
    return out.to(gram.device)
