"""Trajectories of the samplers on a small field, for their tests."""

import zlib

import pytest
import torch

from marquardt.samplers import LMLDDIM, LMLDPMSolver, LMLFlowEuler

SHAPE = (2, 3, 4, 4)
LM = {"damping": 5.0, "kappa": 0.1}
ALL = {
    "ddim": lambda **kw: LMLDDIM(clip_sample=False, **kw),
    "dpm": lambda **kw: LMLDPMSolver(solver_order=3, **kw),
    "flow": lambda **kw: LMLFlowEuler(**kw),
}
every = pytest.mark.parametrize("make", ALL.values(), ids=ALL)


def normal(*seed, shape=SHAPE, dtype=torch.float64):
    """Repeatable noise [*shape]."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))
    return torch.randn(shape, generator=generator, dtype=dtype)


def network(x, t):
    """A smooth nonlinear field, in place of a network."""
    mixed = x.flip(1) * 0.4 + x.roll(1, -1) * 0.3
    return torch.tanh(mixed + 0.0005 * float(t))


def run(sampler, steps=6, x=None, **step):
    """States of a trajectory; `step` holds arguments, or functions of the index that make them."""
    sampler.set_timesteps(steps)
    x, states = normal("x") if x is None else x, []
    for i, t in enumerate(sampler.timesteps):
        given = {name: value(i) if callable(value) else value for name, value in step.items()}
        x = sampler.step(network(x, t), t, x, **given)
        states.append(x)
    return states


def published_lm(eps, prev, damping, kappa):
    """The published direction [B, *sample] in float64: Sherman–Morrison, then the norm of eps."""
    if prev is None:
        return eps
    dims = tuple(range(1, eps.dim()))
    mix = kappa * prev + (1 - kappa) * eps
    u = eps - mix * (eps * mix).sum(dims, True) / (damping + mix.square().sum(dims, True))
    return u * eps.square().sum(dims, True).sqrt() / u.square().sum(dims, True).sqrt()


def close(got, want, bound=1e-11):
    for a, b in zip(got, want, strict=True):
        assert a.dtype == b.dtype and torch.isfinite(b).all()
        assert ((a - b).norm() / b.norm()).item() < bound
