"""Where noise comes from: a seed drawn by the torch generator, so that `torch.manual_seed` governs it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import torch

from . import errors

Tensor = torch.Tensor
Generator: TypeAlias = torch.Generator | Sequence[torch.Generator] | None
_HIGHEST = 2**63 - 1


def draw_seed(op: str, x: Tensor, generator: Generator, seed: Tensor | int | None, batch_dims: int) -> Tensor:
    """int64 [2] on the device of `x`; [B, 2] for a list of generators (one stream of noise per sample)."""
    if seed is not None:
        if generator is not None:
            raise errors.value(op, "seed", "come without generator", "both")
        if isinstance(seed, Tensor):
            return seed.contiguous()
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise errors.kind(op, "seed", "be an int or an int64 tensor", type(seed).__name__)
        if not -(2**63) <= seed < 2**63:
            raise errors.value(op, "seed", "fit 64 bits", seed)
        if x.device.type == "cpu":
            return torch.tensor([seed, 0], dtype=torch.int64)
        made = torch.full((2,), seed, dtype=torch.int64, device=x.device)  # a copy from the host would wait
        made.narrow(0, 1, 1).zero_()
        return made
    if generator is None:
        return torch.randint(_HIGHEST, (2,), device=x.device)
    if isinstance(generator, torch.Generator):
        return _draw(x, generator)
    generators = list(generator)
    if batch_dims != 1 or len(generators) != x.shape[0]:
        rule = f"be one generator or a list of {x.shape[0] if batch_dims else 1}"
        raise errors.value(op, "generator", rule, f"a list of {len(generators)}")
    return torch.stack([_draw(x, g) for g in generators])


def one_source(op: str, noise: Tensor | None, generator: Generator, seed: Tensor | int | None) -> None:
    """Noise that is given comes from nowhere else."""
    if noise is None:
        return
    for name, given in (("generator", generator), ("seed", seed)):
        if given is not None:
            raise errors.value(op, "noise", f"come without {name}", "both")


def _draw(x: Tensor, generator: torch.Generator) -> Tensor:
    """A CPU generator serves CUDA data as in diffusers: drawn on the host, then copied."""
    if not isinstance(generator, torch.Generator):
        raise errors.kind("noise", "generator", "be a torch.Generator", type(generator).__name__)
    return torch.randint(_HIGHEST, (2,), device=generator.device, generator=generator).to(x.device)
