"""The declaration of an op: all that the tests know about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from .compare import rows
from .layouts import LAYOUTS, WRITABLE
from .targets import INTERPRETED, Target, targets

Tensor = torch.Tensor
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# (state, model): the first tensor, and all others.
PAIRS = ((f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f16, f16), (f64, f64))


@dataclass(frozen=True, eq=False)
class Case:
    """Inputs of one kind: how to make the tensors (float64), and the scalars and keywords that go with them."""

    name: str
    tensors: Callable[[torch.Generator, Sequence[int]], Sequence[Tensor | None]]
    scalars: Mapping[str, float]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    smooth: bool = True  # the closed-form derivative holds here, to the scalars too
    numeric: bool = True  # finite differences of step 1e-6 are meaningful
    stated: bool = True  # inside the range for which norm-wise bounds are stated
    identity: bool = False  # the result has the bits of the first tensor

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Refusal:
    """A call that must raise: how to spoil good arguments, the exception, and words its message must hold."""

    name: str
    error: type[Exception]
    words: tuple[str, ...]
    scalars: Mapping[str, Any] = field(default_factory=dict)  # replaces scalars; a value None drops one
    keywords: Mapping[str, Any] = field(default_factory=dict)
    tensors: Callable[[list[Tensor]], list[Any]] | None = None

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, eq=False)
class Op:
    """One op. Oracles work on [B, D] longdouble rows and [B] scalars:

    value(rows, scalars, keywords, shape, batch_dims) -> [B, D]
    vjp(..., grad) -> (gradients of the rows, {scalar: [B]}, {scalar: [B] size that its error is judged by})
    jvp(..., rows_t, scalars_t) -> [B, D]
    """

    name: str
    function: Callable
    reference: Callable
    cases: tuple[Case, ...]
    value: Callable
    vjp: Callable
    jvp: Callable | None = None
    # (function, tensors, scalars, **keywords) -> tensor: how the arguments are passed
    call: Callable = lambda function, tensors, scalars, **keywords: function(*tensors, **scalars, **keywords)
    argument: Callable[[int], str] = "argument{}".format  # the name of tensor j in messages
    sweep: Callable[[bool], list[tuple]] | None = None  # full -> rows (size, case) for large accuracy checks
    samples: Callable[[], list[tuple[str, tuple]]] | None = None  # (operator, arguments) for opcheck
    refusals: tuple[Refusal, ...] = ()
    # (rows, scalars, keywords, shape, batch_dims, dtype) -> [B, D]: error that comes on top of the formula's
    slack: Callable | None = None
    pairs: tuple[tuple[torch.dtype, torch.dtype], ...] = PAIRS
    value_bound: float = 2e-7  # float32, norm-wise per sample
    gradient_bound: float = 3e-7

    def inputs(
        self, case: Case, shape: Sequence[int], pair=(f32, f32), device="cpu", seed=0
    ) -> list[Tensor | None]:
        """Fresh contiguous tensors of the case in the dtypes of `pair`."""
        made = case.tensors(torch.Generator().manual_seed(seed), shape)
        return [None if t is None else t.to(pair[min(j, 1)]).to(device) for j, t in enumerate(made)]

    def run(self, target: Target, case: Case, tensors, scalars=None, **keywords) -> Tensor:
        """The public function on a backend."""
        with target():
            return self.apply(self.function, case, tensors, scalars, **keywords)

    def define(self, case: Case, tensors, scalars=None, **keywords) -> Tensor:
        """Our reference formula in the same dtype, on the CPU."""
        tensors = [None if t is None else t.cpu() for t in tensors]
        return self.apply(self.reference, case, tensors, scalars, **keywords)

    def apply(self, function: Callable, case: Case, tensors, scalars=None, **keywords) -> Tensor:
        scalars = dict(case.scalars if scalars is None else scalars)
        merged = {**case.keywords, **keywords}
        device = next(t.device for t in tensors if t is not None)
        merged = {k: v.to(device) if isinstance(v, Tensor) and k == "seed" else v for k, v in merged.items()}
        return self.call(function, list(tensors), scalars, **merged)

    def _oracle_arguments(self, case, tensors, scalars, batch_dims, **keywords):
        flat = [None if t is None else rows(t, batch_dims) for t in tensors]
        batch = flat[0].shape[0]
        given = dict(case.scalars if scalars is None else scalars)
        wide = {
            k: np.broadcast_to(
                np.asarray(v.detach().cpu() if isinstance(v, Tensor) else v, np.longdouble), (batch,)
            )
            for k, v in given.items()
        }
        return flat, wide, {**case.keywords, **keywords}, tuple(tensors[0].shape), batch_dims

    def expected(self, case: Case, tensors, scalars=None, batch_dims=1, **keywords) -> np.ndarray:
        """The oracle's value, in the shape of the first tensor."""
        arguments = self._oracle_arguments(case, tensors, scalars, batch_dims, **keywords)
        return self.value(*arguments).reshape(tensors[0].shape)

    def extra(self, case: Case, tensors, scalars=None, batch_dims=1, **keywords):
        """Error allowed beside that of the formula, e.g. what a few ulp of noise contribute."""
        if self.slack is None:
            return 0.0
        arguments = self._oracle_arguments(case, tensors, scalars, batch_dims, **keywords)
        return self.slack(*arguments, tensors[0].dtype)

    def expected_vjp(self, case: Case, tensors, grad, scalars=None, batch_dims=1, **keywords):
        arguments = self._oracle_arguments(case, tensors, scalars, batch_dims, **keywords)
        d_rows, d_scalars, sizes = self.vjp(*arguments, rows(grad, batch_dims))
        return [d.reshape(tensors[0].shape) for d in d_rows], d_scalars, sizes

    def expected_jvp(self, case: Case, tensors, tensors_t, scalars_t, scalars=None, batch_dims=1, **keywords):
        arguments = self._oracle_arguments(case, tensors, scalars, batch_dims, **keywords)
        flat_t = [None if t is None else rows(t, batch_dims) for t in tensors_t]
        wide_t = {k: np.asarray(float(v), np.longdouble) for k, v in scalars_t.items()}
        return self.jvp(*arguments, flat_t, wide_t).reshape(tensors[0].shape)

    def bound(self, case: Case, derivative: bool = False) -> float | None:
        """The norm-wise float32 bound of a case, if one is stated."""
        if not case.stated:
            return None
        return self.gradient_bound if derivative else self.value_bound

    @property
    def main(self) -> Case:
        """The case for tests that need only one."""
        return self.cases[0]


def dtype_name(pair) -> str:
    return "-".join(str(d).removeprefix("torch.") for d in pair)


def parametrize(metafunc: pytest.Metafunc, op: Op) -> None:
    """Fills the arguments of a suite's method from its op."""
    names = metafunc.fixturenames
    choices: dict[str, list] = {
        "target": targets(),
        "case": list(op.cases),
        "smooth": [c for c in op.cases if c.smooth],
        "numeric": [c for c in op.cases if c.smooth and c.numeric],
        "identity": [c for c in op.cases if c.identity],
        "pair": list(op.pairs),
        "layout": list(LAYOUTS),
        "writable": list(WRITABLE),
        "refusal": list(op.refusals),
    }
    for name, values in choices.items():
        if name in names:
            ids = dtype_name if name == "pair" else str
            metafunc.parametrize(name, values, ids=ids)
    if "sweep" in names and op.sweep is not None:
        quick = op.sweep(False)[:1] if INTERPRETED else op.sweep(False)
        rest = [row for row in op.sweep(True) if row not in quick]
        full = [pytest.param(row, marks=pytest.mark.full) for row in rest]
        metafunc.parametrize("sweep", quick + full, ids=lambda row: "-".join(map(str, row)))
    elif "sweep" in names:
        metafunc.parametrize("sweep", [])
    if "sample" in names:
        found = op.samples() if op.samples else []
        metafunc.parametrize("sample", found, ids=[f"{i}-{name}" for i, (name, _) in enumerate(found)])
