"""The steps of samplers by their definitions: the same numbers, and plain PyTorch for what is done with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

NAMES = (
    "langevin_step",
    "lml_ddim_step",
    "lml_dpm_step",
    "lml_flow_step",
    "underdamped_langevin_step",
)


def _defined(name: str) -> Callable[..., Any]:
    """`marquardt.<name>`, whose numbers come from the same formulas in float64, on the backend "reference"."""

    def call(*args: Any, **keywords: Any) -> Any:
        import marquardt

        with marquardt.use_backend("reference"):
            return getattr(marquardt, name)(*args, **keywords)

    call.__name__ = call.__qualname__ = name
    call.__doc__ = f"`marquardt.{name}` as a formula."
    return call


langevin_step, lml_ddim_step, lml_dpm_step, lml_flow_step, underdamped_langevin_step = map(_defined, NAMES)
