"""Trajectories of schedulers for diffusers on a small field, for their tests; skips them where diffusers is missing."""

from __future__ import annotations

import contextlib
import warnings

import pytest
import torch

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed (pip install diffusers)")

from diffusers import (  # noqa: E402
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)

from marquardt.integrations.diffusers import (  # noqa: E402
    LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler,
    LMLFlowMatchEulerScheduler,
)

LM = {"damping": 5.0, "kappa": 0.1}
SHAPE = (2, 3, 8, 8)
PAIRS = {
    "ddim": (DDIMScheduler, LMLDDIMScheduler),
    "dpm": (DPMSolverMultistepScheduler, LMLDPMSolverMultistepScheduler),
    "flow": (FlowMatchEulerDiscreteScheduler, LMLFlowMatchEulerScheduler),
}
every = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)


@contextlib.contextmanager
def quiet():
    """Without gradients, and without what diffusers says about the algorithms that it will drop."""
    diffusers.utils.logging.set_verbosity_error()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield


def start(shape=SHAPE, seed=1, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def velocity(x, t):
    """A small nonlinear field, in place of a transformer."""
    return torch.tanh(x.flip(1) * 0.6 + x.roll(1, -1) * 0.3 + 0.0005 * float(t))


def sample(scheduler, network=velocity, steps=8, x=None, setting=(), **options):
    """Image of a whole trajectory."""
    scheduler.set_timesteps(steps, **dict(setting))
    x = start() if x is None else x
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x, **options).prev_sample
    return x


def apart(a, b):
    """Relative distance of two tensors."""
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def follow(stock, ours, network=velocity, steps=8, setting=(), bound=4e-6, **options):
    """Both take each step from the stock scheduler's sample with the same noise; they differ by rounding alone.

    Distances are relative to the larger of the two samples of a step: where they cancel no digits can be expected.
    """
    for scheduler in (stock, ours):
        scheduler.set_timesteps(steps, **dict(setting))
    assert torch.equal(stock.timesteps, ours.timesteps)
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    x = start()
    for t in stock.timesteps:
        out = network(x, t)
        want, got = (
            scheduler.step(out, t, x, generator=generator, **options)
            for scheduler, generator in zip((stock, ours), generators)
        )
        new = want.prev_sample
        assert got.prev_sample.dtype == new.dtype and got.prev_sample.shape == new.shape
        scale = max(new.norm(), x.norm())
        assert ((got.prev_sample - new).norm() / scale).item() < bound, int(t)
        if hasattr(want, "pred_original_sample"):
            assert apart(got.pred_original_sample, want.pred_original_sample) < bound
        x = new
    return x
