"""Small calls that touch every variant and tail of the CUDA kernels, each compared with the definition.

compute-sanitizer and Nsight Compute watch this program: `python -m bench.gpu_kit.shapes`. With `--large` it makes the
one call whose traffic is counted, and prints the bytes that have to move; with `--sizes` calls from a small latent up.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import Any

import torch
from torch import Tensor

import marquardt as mq
from marquardt import reference

from .. import peers, protocol

SHAPES = ((1, 1), (3, 7), (2, 3, 5, 7), (2, 4, 32, 32), (5, 2049), (1, 4, 64, 64), (2, 70001), (1, 300000))
PAIRS = (
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float64, torch.float64),
)
FEW = ((3, 7), (2, 4, 32, 32), (5, 2049), (1, 4, 64, 64))
LARGE = (16, 16, 256, 256)
SIZES = ((1, 4, 64, 64), (16, 4, 64, 64), (8, 4, 128, 128), (64, 4, 128, 128), LARGE)


def worst(got: list[Tensor], want: list[Tensor], dtype: torch.dtype) -> float:
    """Error over what the dtype allows: above 1 is wrong."""
    unit = {torch.float32: 1e-6, torch.float64: 1e-12}.get(dtype, 2e-2)
    return protocol.worst([t.cpu() for t in got], [t.cpu() for t in want]) / unit


def lm(shape: tuple[int, ...], state: torch.dtype, model: torch.dtype, device: str) -> float:
    """Forward and backward of lm_direction."""
    eps, prev = peers.correlated_pair(shape, torch.float32, "cpu")
    eps, prev = eps.to(device, state), prev.to(device, model)
    wide = [eps.double().cpu().requires_grad_(), prev.double().cpu().requires_grad_()]
    near = [eps.clone().requires_grad_(), prev.clone().requires_grad_()]
    out = mq.lm_direction(*near, damping=0.05, kappa=0.3)
    exact = reference.lm_direction(*wide, damping=0.05, kappa=0.3)
    if out[0].numel() == 1:  # the norm of one number leaves nothing to differentiate but rounding
        return worst([out], [exact.detach()], state)
    grad = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).reshape(shape)
    made = torch.autograd.grad(out, near, grad.to(device, state))
    want = torch.autograd.grad(exact, wide, grad)
    narrow = state if state.itemsize < model.itemsize else model
    return max(worst([out], [exact.detach()], state), 0.1 * worst(list(made), list(want), narrow))


def affine(shape: tuple[int, ...], dtype: torch.dtype, terms: int, device: str) -> float:
    xs = [
        torch.randn(shape, generator=torch.Generator().manual_seed(k)).to(device, dtype) for k in range(terms)
    ]
    coefficients = [0.9, -0.3, 0.7, 0.11, -0.05, 0.6, 0.21, -0.4][:terms]
    seed = torch.tensor([5, 7], device=device)
    out = mq.affine_step(xs, coefficients, noise_scale=0.5, seed=seed)
    want = reference.affine_step(
        [x.double().cpu() for x in xs], coefficients, noise_scale=0.5, seed=seed.cpu()
    )
    return worst([out], [want], dtype)


def lowrank(shape: tuple[int, ...], k: int, dtype: torch.dtype, device: str) -> float:
    """Every op of the family, forward and backward, with an s of both signs where H allows it."""
    generator = torch.Generator().manual_seed(k)
    v = torch.randn(shape, generator=generator).to(dtype)
    U = torch.randn((shape[0], k, *shape[1:]), generator=generator).to(dtype)
    s = torch.linspace(1.0, 0.3, k, dtype=torch.float64).expand(shape[0], k).clone()
    damping = 0.7 * float(U.double().square().sum())
    s[:, -1] = -0.1

    def run(where: str, kind: torch.dtype, family: Any) -> list[Tensor]:
        leaves = [t.to(where, kind).requires_grad_() for t in (v, U)] + [s.to(where).requires_grad_()]
        found: list[Tensor] = []
        for name in ("lowrank_matvec", "lowrank_solve", "lowrank_inv_sqrt"):
            out = getattr(family, name)(
                *leaves, damping=damping, **({} if "mat" in name else {"check": False})
            )
            found += [out.detach(), *torch.autograd.grad(out, leaves, torch.ones_like(out))[:2]]
        logdet = family.lowrank_logdet(*leaves[1:], damping=damping, check=False)
        found += [logdet.detach(), *torch.autograd.grad(logdet.sum(), leaves[1:])[:1]]
        with torch.no_grad():
            rows, weights = family.lowrank_update(leaves[1], s.to(where).abs(), leaves[0], decay=0.9)
        return [
            *found,
            weights,
            (weights.sqrt().reshape(*weights.shape, *[1] * (len(shape) - 1)) * rows).square(),
        ]

    return 0.1 * worst(run(device, dtype, mq), run("cpu", torch.float64, reference), dtype)


RANKS = (1, 4, 16)


def small(device: str, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> int:
    bad = 0
    for shape in shapes:
        errors = {f"lm {s} {m}": lm(shape, s, m, device) for s, m in PAIRS}
        errors |= {f"affine {k}": affine(shape, torch.float32, k, device) for k in (1, 3, 8)}
        if math.prod(shape[1:]) > max(RANKS):
            errors |= {f"lowrank {k}": lowrank(shape, k, torch.float32, device) for k in RANKS}
        for name, found in errors.items():
            if not found <= 1:
                bad += 1
                print(f"WRONG {name} {shape}: {found:.2g} times what is allowed")
    print(f"{len(shapes)} shapes, {bad} wrong")
    return bad


def large(device: str) -> None:
    """lm_direction alone, on buffers larger than the cache."""
    eps, prev = peers.correlated_pair(LARGE, torch.float32, device)
    out = torch.empty_like(eps)
    mq.lm_direction(eps, prev, damping=0.005, kappa=0.3, out=out)
    print(f"bytes read at least: {2 * eps.nbytes}, written: {out.nbytes}")


def sizes(device: str) -> None:
    """lm_direction and affine_step of three terms, every size once after one call that loads the kernels."""
    for dtype in (torch.float32, torch.bfloat16):
        for shape in (SIZES[0], *SIZES) if dtype is torch.float32 else SIZES[2:4]:
            eps, prev = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(eps)
            mq.lm_direction(eps, prev, damping=0.005, kappa=0.3, out=out)
            if shape != SIZES[0]:
                mq.affine_step([eps, prev, eps], [0.9, -0.3, 0.7], out=out)
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--few", action="store_true", help="small shapes alone")
    parser.add_argument("--sizes", action="store_true")
    options = parser.parse_args(arguments)
    if options.sizes:
        sizes(options.device)
        return 0
    if options.large:
        large(options.device)
        return 0
    return 1 if small(options.device, FEW if options.few else SHAPES) else 0


if __name__ == "__main__":
    sys.exit(main())
