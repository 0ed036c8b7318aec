"""Fast fused ops for second-order diffusion sampling and prompt-tuned models.

Every op has one meaning (`marquardt.reference`), several backends (`marquardt.explain` says which one runs) and
gradients of every kind. See the README for a first example.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import backends, reference
from .backends import Explanation, explain, use_backend
from .dynamics import langevin_step, underdamped_langevin_step
from .gauss_newton import damped_gram_solve, softmax_head_hvp
from .hessian import lm_direction
from .langevin import affine_step
from .lml import lml_ddim_step, lml_flow_step
from .lml_dpm import lml_dpm_step
from .lowrank import lowrank_inv_sqrt, lowrank_logdet, lowrank_matvec, lowrank_solve, lowrank_update
from .lowrank_hessian import LowRankHessian, update_damping
from .threshold import dynamic_threshold

if TYPE_CHECKING:
    from . import samplers

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "LowRankHessian",
    "__version__",
    "affine_step",
    "backends",
    "damped_gram_solve",
    "dynamic_threshold",
    "explain",
    "langevin_step",
    "lm_direction",
    "lml_ddim_step",
    "lml_dpm_step",
    "lml_flow_step",
    "lowrank_inv_sqrt",
    "lowrank_logdet",
    "lowrank_matvec",
    "lowrank_solve",
    "lowrank_update",
    "reference",
    "samplers",
    "softmax_head_hvp",
    "underdamped_langevin_step",
    "update_damping",
    "use_backend",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`marquardt.samplers` is imported when it is first asked for: ops alone do not wait for it."""
        if name == "samplers":
            import importlib

            return importlib.import_module(".samplers", __name__)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
