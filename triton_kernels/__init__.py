"""The Triton backend: one file per idea, nothing imports Triton until a kernel is asked for.

philox    the noise: Philox words and normals
maps      the scalar maps of the ops, in float64 scalars
rows      blocks of a sample's vectors: loads, residuals, dot products, stores
kernels   the heavy stages with up to ten vectors in registers: Gram, apply
generic   the same stages for any matrix: up to 18 vectors in, 17 out, prologue, clamp
step      the step of samplers, with its kernels; step_terms: its rows, made in registers from up to six sources
stack     Gram and apply over a stack of rows, in float64
small     the k × k stage of the low-rank Hessian: signed LDLᵀ, products, solves, determinants
spectrum  its eigenproblems, by torch.linalg: inverse roots, the update
lowrank   the entry points of the low-rank Hessian
layout    which memory order a call walks, and which inputs it has to copy
launch    block sizes, splits, and the passing of float64 scalars
frame     the entry points
library   `marquardt_triton::<op>`
"""

from __future__ import annotations

import importlib.util
import os
from typing import Any


def available() -> tuple[bool, str]:
    """(whether Triton kernels can run in this process, why not)."""
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    if os.environ.get("TRITON_INTERPRET") == "1":
        return True, ""
    import torch

    if not torch.cuda.is_available():
        return False, "no CUDA device is visible (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    return True, ""


# Operators that have no kernel here: selection wants histograms in shared memory.
WITHOUT = frozenset({"threshold_apply", "threshold_scale"})

_EIGEN = (
    "Triton launches around a k x k eigenproblem of torch.linalg.eigh, which waits for the device: "
    "no CUDA graph can capture it"
)


def plan(op: str) -> str | None:
    """What `marquardt.explain` says of how an op runs here; None where it is Triton launches alone."""
    return _EIGEN if op in ("lowrank_inv_sqrt", "lowrank_update") else None


def register() -> None:
    """Define `torch.ops.marquardt_triton.*`; the second call does nothing."""
    from .library import register as define

    define()


# What torch.compiler.assume_constant_result sets, which would import Dynamo: tracing calls `register` as it is, and
# does not look into the definition of the operators.
register._dynamo_marked_constant = True  # type: ignore[attr-defined]


def traced(name: str) -> Any:
    """The operator `marquardt_triton::<name>` for a traced program; defines the operators if they are not yet."""
    import torch

    register()
    return getattr(torch.ops.marquardt_triton, name).default
