"""The table of dtype pairs: what is taken, what is refused, and that autocast changes nothing."""

from __future__ import annotations

import itertools

import pytest
import torch

from .compare import same_bits
from .declare import Case, Op, dtype_name
from .targets import Target, kind
from .values import differentiable, gradients, upstream

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
SHAPE = (2, 3, 5)


@kind("dtypes")
class Dtypes:
    op: Op

    def _two(self) -> Case:
        """A case with at least two tensors."""
        return next(
            c
            for c in self.op.cases
            if len([t for t in c.tensors(torch.Generator(), (1, 1)) if t is not None]) > 1
        )

    def test_result_and_gradients(self, target: Target, case: Case, pair):
        """The result has the state's dtype, every gradient that of its argument."""
        tensors = self.op.inputs(case, SHAPE, pair, target.device)
        leaves, numbers = differentiable(tensors, case.scalars if case.smooth else {})
        out = self.op.run(target, case, leaves, {**case.scalars, **numbers})
        assert out.dtype == pair[0]
        found, scalars = gradients(out, leaves, numbers, upstream(out))
        for t, d in zip(leaves, found, strict=True):
            assert t is None or d is None or d.dtype == t.dtype
        assert all(d is None or d.dtype == torch.float64 for d in scalars.values())

    @pytest.mark.parametrize("mix", list(itertools.product(FLOATS, FLOATS)), ids=dtype_name)
    def test_table(self, target: Target, mix):
        op, case = self.op, self._two()
        tensors = op.inputs(case, SHAPE, mix, target.device)
        if mix in op.pairs:
            assert op.run(target, case, tensors).dtype == mix[0]
            return
        with pytest.raises(TypeError) as raised:
            op.run(target, case, tensors)
        for word in (op.name, op.argument(1), *(str(d).removeprefix("torch.") for d in mix)):
            assert word in str(raised.value), f"{word!r} is missing in {raised.value}"

    @pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast_casts_nothing(self, target: Target, case: Case, cast):
        tensors = self.op.inputs(case, SHAPE, device=target.device)
        outside = self.op.run(target, case, tensors)
        with torch.autocast(target.device, dtype=cast):
            inside = self.op.run(target, case, tensors)
            leaves, numbers = differentiable(tensors, {})
            trained = self.op.run(target, case, leaves, {**case.scalars, **numbers})
        assert same_bits(inside, outside) and same_bits(trained.detach(), outside)

    @pytest.mark.parametrize(
        "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32], ids=str
    )
    def test_scalars_of_any_dtype(self, target: Target, dtype):
        """0-dim and [B] scalars of other dtypes are read as float64."""
        op, case = self.op, self.op.main
        tensors = op.inputs(case, SHAPE, device=target.device)
        rounded = {k: torch.tensor(max(1.0, abs(v)), dtype=dtype) for k, v in case.scalars.items()}
        expected = op.run(target, case, tensors, {k: float(v) for k, v in rounded.items()})
        assert same_bits(op.run(target, case, tensors, rounded), expected)
        per_sample = {k: v.expand(SHAPE[0]).to(target.device) for k, v in rounded.items()}
        assert same_bits(op.run(target, case, tensors, per_sample), expected)

    def test_gradient_of_narrow_scalars(self, target: Target):
        """A float32 scalar that requires grad gets a float32 gradient."""
        op, case = self.op, self.op.main
        tensors = op.inputs(case, SHAPE, device=target.device)
        numbers = {
            k: torch.tensor(v, dtype=torch.float32, requires_grad=True) for k, v in case.scalars.items()
        }
        op.run(target, case, tensors, numbers).sum().backward()
        for name, number in numbers.items():
            assert number.grad is not None and number.grad.dtype == torch.float32, name
