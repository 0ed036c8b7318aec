"""Schedulers for diffusers' pipelines: those of diffusers with our step and the Levenberg–Marquardt–Langevin direction.

    from marquardt.integrations.diffusers import LMLDPMSolverMultistepScheduler
    pipe.scheduler = LMLDPMSolverMultistepScheduler.from_config(pipe.scheduler.config, damping=1.0, kappa=0.1)

Each class is a subclass of the scheduler that it replaces: configuration, timesteps, noising, and everything else that
a pipeline asks for is diffusers' own; `step` is one call of marquardt. Without a correction (κ = 0, the default) the
results are those of the replaced scheduler but for rounding, with the same random numbers: its float32 tables are
taken, and noise is drawn by diffusers. `set_timesteps` forgets the last trajectory, and so does a step that is not the
next. A network that writes its outputs to one buffer must hand over copies: outputs are kept from step to step.
"""

try:
    from diffusers import SchedulerMixin  # a saved pipeline looks here for the way to load its scheduler
except ImportError as missing:
    raise ImportError(
        "marquardt.integrations.diffusers needs the package diffusers: pip install diffusers. The samplers of "
        "marquardt.samplers do without it."
    ) from missing

from .ddim import LMLDDIMScheduler
from .dpmsolver import LMLDPMSolverMultistepScheduler
from .flow import LMLFlowMatchEulerScheduler

__all__ = [
    "LMLDDIMScheduler",
    "LMLDPMSolverMultistepScheduler",
    "LMLFlowMatchEulerScheduler",
    "SchedulerMixin",
]

for _scheduler in (LMLDDIMScheduler, LMLDPMSolverMultistepScheduler, LMLFlowMatchEulerScheduler):
    _scheduler.__module__ = __name__  # what a saved pipeline writes down
