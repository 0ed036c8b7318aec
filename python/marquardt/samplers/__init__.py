"""Samplers with the Levenberg–Marquardt–Langevin direction, without any other library.

    sampler.set_timesteps(20, device)
    for t in sampler.timesteps:
        x = sampler.step(network(x, t), t, x)

A sampler holds one trajectory at a time: `set_timesteps` and `reset` forget it. All coefficients are Python numbers
made by `set_timesteps`, so that a step is one call of a kernel that waits for nothing and can be captured in a CUDA
graph (the first timestep as a number, an element of `timesteps`, or None after `set_begin_index`). For diffusers'
pipelines there are schedulers in `marquardt.integrations.diffusers`.
"""

from .ddim import LMLDDIM
from .dpmsolver import LMLDPMSolver
from .flow import LMLFlowEuler

__all__ = ["LMLDDIM", "LMLDPMSolver", "LMLFlowEuler"]
