"""Small calls for the runs under sanitizers: every kernel and every way through it, few threads, few launches."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from frame_calls import A100, Frame, Place, bf16, f16, f32, f64, write_case
from frame_cases import (
    EXTRAPOLATE,
    INV_SQRT,
    MATVEC,
    PLAIN,
    SNR,
    SOLVE,
    affine,
    affine_backward,
    given,
    lm,
    lm_backward,
    lm_jvp,
    lowrank,
    step,
    whole_step,
)
from frame_oracle import margins

ODD = [Place(1, 2), Place(3, 1), Place(2)]  # nothing begins where a vector access may


def held(threads: int, cluster: int, **more) -> dict:
    return {"variant": "held", "threads": threads, "cluster": cluster, **more}


def two_sweeps(threads: int, splits: int, **more) -> dict:
    return {"variant": "two_sweeps", "threads": threads, "splits": splits, **more}


def one_sweep(threads: int, splits: int, **more) -> dict:
    return {"variant": "one_sweep", "threads": threads, "splits": splits, **more}


def some_zero_kappa(frame: Frame) -> Frame:
    return dataclasses.replace(frame, parameters=torch.tensor([[2.0, 0.4], [2.0, 0.0]], dtype=f64))


def small_cases() -> dict[str, tuple[Frame, dict]]:
    """Name → (frame, plan). At most 64 threads × 8 CTAs work together; 9 tiles of 32 threads pass through a ring."""
    return {
        "held-1": (lm((2, 301)), held(32, 1)),
        "held-1-plain-odd": (lm((2, 301), PLAIN, (f32, bf16)).placed(ODD, ODD), held(64, 1)),
        "held-2-backward": (lm_backward((2, 301), pair=(f32, f16)), held(64, 2)),
        "held-3-in-place": (dataclasses.replace(lm((2, 517), pair=(bf16, bf16)), in_place=0), held(32, 3)),
        "held-4-tangent": (lm_jvp((2, 130), EXTRAPOLATE, (f64, f64)), held(32, 4)),
        "held-8-tail": (lm((1, 1025)).placed([Place(1)], [Place(2)]), held(32, 8)),
        "held-8-idle": (lm_backward((1, 3)), held(32, 8)),
        "held-2-zero-kappa": (some_zero_kappa(lm_backward((2, 200))), held(32, 2)),
        "held-2-given": (given((2, 261), 5, 3, noisy="per-sample", prologue=4, clamped=True), held(64, 2)),
        "held-2-largest": (given((1, 133), 16, 17, ones=True, noisy=True), held(64, 2)),
        "held-4-blocks": (given((1, 1030), 7, 2), held(32, 4)),
        "held-2-scalars": (affine_backward((2, 131), 3, noisy=True), held(64, 2)),
        "held-1-matvec": (lowrank("lowrank", (2, 131), 5, MATVEC), held(32, 1)),
        "held-2-solve": (lowrank("lowrank", (2, 133), 6, SOLVE), held(64, 2)),
        "held-1-root": (lowrank("lowrank", (2, 99), 4, INV_SQRT), held(32, 1)),
        "held-1-solve-vjp": (lowrank("lowrank_vjp", (1, 70), 4, SOLVE), held(32, 1)),
        "two-2-root-vjp": (lowrank("lowrank_vjp", (1, 259), 5, INV_SQRT), two_sweeps(32, 2)),
        "two-2-matvec-vjp": (lowrank("lowrank_vjp", (1, 259), 3, MATVEC), two_sweeps(64, 2)),
        "held-2-logdet": (lowrank("lowrank_logdet", (2, 131), 5), held(32, 2)),
        "held-1-logdet-vjp": (lowrank("lowrank_logdet_vjp", (1, 65), 4), held(32, 1)),
        "held-2-update": (lowrank("lowrank_update", (2, 133), 5), held(64, 2)),
        "held-1-one-element": (lowrank("lowrank", (2, 1), 4, INV_SQRT), held(32, 1)),
        "two-1-ring": (lm((1, 9 * 128 - 1)), two_sweeps(32, 1)),
        "two-3-backward": (lm_backward((2, 701), pair=(f16, f16)).placed(ODD, ODD), two_sweeps(64, 3)),
        "two-2-in-place": (dataclasses.replace(lm((2, 301), pair=(f32, f32)), in_place=1), two_sweeps(32, 2)),
        "two-8-blocks": (given((1, 2100), 9, 2, noisy=True), two_sweeps(32, 8)),
        "two-1-blocks-ring": (given((1, 9 * 128 + 5), 18, 1), two_sweeps(64, 1)),
        "two-2-launches": (lm((3, 150), per_sample=True), two_sweeps(32, 2, group=2)),
        "two-2-scalars": (affine_backward((2, 131), 4, (f32, bf16), d_terms=False), two_sweeps(32, 2)),
        "two-3-double": (lm_jvp((1, 333), pair=(f64, f64)), two_sweeps(32, 3)),
        "one-1-ring": (affine((1, 9 * 128 + 3), 3), one_sweep(32, 1)),
        "one-3-noise-odd": (affine((2, 301), 2, (f32, bf16), noisy=True).placed(ODD, ODD), one_sweep(64, 3)),
        "one-2-in-place": (
            dataclasses.replace(affine((2, 517), 2, noisy=True), in_place=0),
            one_sweep(32, 2),
        ),
        "one-2-backward": (affine_backward((2, 301), 4, (f64, f64), d_coef=False), one_sweep(32, 2)),
        "one-8-general": (
            given(
                (2, 700), 2, 3, gram=False, ones=True, noisy=True, prologue=5, clamped=True, per_sample=True
            ),
            one_sweep(32, 8),
        ),
        "held-2-aligned": (lm((2, 304)), held(32, 2)),
        "held-1-aligned-backward": (lm_backward((2, 136), pair=(bf16, bf16)), held(32, 1)),
        "two-1-aligned-ring": (lm((1, 9 * 128 + 4)), two_sweeps(32, 1)),
        "two-2-aligned-backward": (lm_backward((2, 9 * 64 + 2), pair=(f64, f64)), two_sweeps(32, 2)),
        "one-1-aligned-ring": (affine((1, 9 * 256 + 8), 3, (bf16, f16)), one_sweep(32, 1)),
        "held-1-step": (whole_step((2, 261), pair=(f32, bf16), changes={1: [0.4, 0.0]}), held(64, 1)),
        "held-3-step-odd": (step((2, 301), EXTRAPOLATE, (f64, f64), models=5).placed(ODD, ODD), held(32, 3)),
        "two-2-step": (whole_step((1, 9 * 128 + 3), noisy="per-sample"), two_sweeps(32, 2)),
        "two-1-step-snr": (step((2, 150), SNR, (f16, f16), noisy=True), two_sweeps(64, 1)),
        "one-2-step": (whole_step((2, 301), prev=False, per_sample=True), one_sweep(32, 2)),
        "default": (lm((2, 515), per_sample=True), {}),
        "default-sm_80": (lm_backward((1, 515)), A100),
        "empty": (lm_backward((2, 0)), {}),
        "one-element": (lm((3, 1), per_sample=True), {}),
    }


def write_small_cases(folder: Path, fields: list[str], names: tuple[str, ...] = ()) -> None:
    for name, (frame, plan) in small_cases().items():
        if name in names or not names:
            write_case(folder / name, frame, fields, margins(frame), **plan)
