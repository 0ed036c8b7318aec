"""Strides, sizes and `out=`: the same numbers from any layout, into any layout, and nothing beside them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from .compare import assert_within, check, rows, same_bits
from .declare import Case, Op
from .layouts import arena, promised_strides, same_strides
from .targets import Target, kind
from .values import differentiable, gradients, pair_of, reference_gradients, upstream, usual_error

f32 = torch.float32
SHAPES = ((3, 4, 5, 6), (2, 3, 2, 4, 5), (2, 7, 6), (2, 1, 5, 1), (1, 4, 3, 5))
SENTINEL = 777.0
# (shape, batch_dims): one element, none, one sample, packed tokens, single rows
SIZES = (
    ((4, 1), 1),
    ((4,), 1),
    ((3, 1, 1, 1), 1),
    ((3, 0, 4), 1),
    ((3, 0), 1),
    ((0, 4, 5), 1),
    ((0,), 1),
    ((0, 0), 1),
    ((1, 300), 1),
    ((4, 5, 6), 0),
    ((7,), 0),
    ((1,), 0),
    ((0,), 0),
    ((), 0),
    ((2, 77, 64), 1),
)
# (one and two elements are parallel or nearly so: `test_size` looks at them)
# D around the widths of registers, of unrolled loops and of the 2048-element chunk.
TAILS = (3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 2047, 2048, 2049, 4095, 4097, 6151)


def placed(op: Op, tensors, layout: str, which: str):
    """Arenas for the tensors: the layout on the first, on the others, or on all; the rest contiguous."""
    chosen = {"first": lambda j: j == 0, "others": lambda j: j > 0, "all": lambda j: True}[which]
    return [
        None if t is None else arena(t, layout if chosen(j) else "contiguous") for j, t in enumerate(tensors)
    ]


@kind("strides")
class Strides:
    op: Op

    def _check(self, target: Target, case: Case, tensors, out, batch_dims=1):
        op, keywords = self.op, {} if batch_dims == 1 else {"batch_dims": batch_dims}
        plain = [None if t is None else t.contiguous() for t in tensors]
        expected, own = op.expected(case, plain, batch_dims=batch_dims), op.define(case, plain, **keywords)
        usual = usual_error(op, case, (3, 7), pair_of(plain), "value")[0]
        check(
            out,
            expected,
            own,
            None,
            batch_dims,
            slack=op.extra(case, plain, batch_dims=batch_dims),
            usual=usual,
        )

    @pytest.mark.parametrize("which", ["first", "others", "all"])
    def test_layout(self, target: Target, layout: str, which: str):
        case = self.op.main
        for shape in SHAPES:
            for pair in ((f32, f32), (f32, torch.bfloat16)):
                arenas = placed(self.op, self.op.inputs(case, shape, pair, target.device), layout, which)
                tensors = [None if a is None else a.tensor for a in arenas]
                out = self.op.run(target, case, tensors)
                self._check(target, case, tensors, out)
                promised = promised_strides(tensors[0])
                assert same_strides(out, promised), (shape, tensors[0].stride(), out.stride(), promised)
                storages = {t.untyped_storage().data_ptr() for t in tensors if t is not None}
                assert out.untyped_storage().data_ptr() not in storages
                assert all(a is None or a.intact() for a in arenas)

    def test_every_case_strided(self, target: Target, case: Case, layout: str):
        arenas = placed(self.op, self.op.inputs(case, (3, 4, 5, 6), device=target.device), layout, "all")
        tensors = [None if a is None else a.tensor for a in arenas]
        self._check(target, case, tensors, self.op.run(target, case, tensors))

    def test_gradient_layout(self, target: Target, layout: str):
        """Inputs and upstream gradients of any layout, stride-0 ones from `.sum().backward()` among them."""
        op, case = self.op, self.op.main
        plain = op.inputs(case, (3, 4, 5, 6), device=target.device)
        for grad_layout, input_layout in ((layout, "contiguous"), ("contiguous", layout), (layout, layout)):
            arenas = placed(op, plain, input_layout, "all")
            leaves = [None if a is None else a.tensor.requires_grad_() for a in arenas]
            numbers = {
                k: torch.tensor(float(v), dtype=torch.float64, requires_grad=True)
                for k, v in case.scalars.items()
            }
            out = op.run(target, case, leaves, numbers)
            grad = arena(upstream(out), grad_layout).tensor
            found, _ = gradients(out, leaves, numbers, grad)
            still = [None if t is None else t.detach().contiguous() for t in leaves]
            own, _, _ = reference_gradients(op, case, still, grad)
            usual = usual_error(op, case, (3, 7), (f32, f32), "gradient")
            expected, _, _ = op.expected_vjp(case, still, grad)
            for j, t in enumerate(leaves):
                if t is not None:
                    check(
                        found[j],
                        expected[j],
                        own[j],
                        None,
                        usual=usual[j],
                        what=f"gradient of {op.argument(j)}",
                    )

    def test_out(self, target: Target, writable: str):
        """`out` of any layout receives the result of the plain call and returns itself; its surroundings survive."""
        case = self.op.main
        for input_layout in ("contiguous", "channels_last", "gaps"):
            for shape in SHAPES:
                tensors = self.op.inputs(case, shape, device=target.device)
                tensors = [None if t is None else arena(t, input_layout).tensor for t in tensors]
                place = arena(torch.full_like(tensors[0], SENTINEL), writable, SENTINEL)
                strides = place.tensor.stride()
                returned = self.op.run(target, case, tensors, out=place.tensor)
                assert returned is place.tensor or returned.data_ptr() == place.tensor.data_ptr()
                assert place.tensor.stride() == strides and returned.stride() == strides
                self._check(target, case, tensors, place.tensor)
                assert place.intact()

    def test_in_place(self, target: Target, case: Case, writable: str):
        """`out` may be one of the inputs."""
        for j in range(len(self.op.inputs(case, (2, 3)))):
            tensors = self.op.inputs(case, (3, 4, 5, 6), device=target.device)
            if tensors[j] is None:
                continue
            fresh = self.op.run(target, case, tensors)
            arenas = placed(self.op, tensors, writable, "all")
            given = [None if a is None else a.tensor for a in arenas]
            strided = self.op.run(target, case, given)
            out = self.op.run(target, case, given, out=given[j])
            assert out.data_ptr() == given[j].data_ptr()
            assert same_bits(out, strided), self.op.argument(j)
            torch.testing.assert_close(out, fresh, rtol=1e-5, atol=1e-5)
            assert all(a is None or a.intact() for a in arenas)

    @pytest.mark.parametrize(("shape", "batch_dims"), SIZES, ids=str)
    def test_size(self, target: Target, case: Case, shape, batch_dims: int):
        tensors = self.op.inputs(case, shape, device=target.device)
        keywords = {"batch_dims": batch_dims}
        out = self.op.run(target, case, tensors, **keywords)
        assert out.shape == torch.Size(shape) and out is not tensors[0]
        if out.numel() and math.prod(shape[batch_dims:]) == 1:
            self._one_element(target, case, tensors, out, keywords)
        else:
            self._check(target, case, tensors, out, batch_dims)
        leaves, numbers = differentiable(tensors, case.scalars if case.smooth else {})
        out = self.op.run(target, case, leaves, {**case.scalars, **numbers}, **keywords)
        found, scalars = gradients(out, leaves, numbers, upstream(out))
        for t, d in zip(leaves, found, strict=True):
            assert t is None or d is None or (d.shape == t.shape and bool(d.isfinite().all()))
        assert all(d is None or d.shape == () for d in scalars.values())

    def _one_element(self, target: Target, case: Case, tensors, out, keywords):
        """D = 1: all vectors are parallel, which no float32 Gram can tell exactly; float64 shows the formula."""
        batch_dims = keywords["batch_dims"]
        wide = [None if t is None else t.double() for t in tensors]
        expected = rows(self.op.expected(case, tensors, batch_dims=batch_dims), batch_dims)
        size = np.abs(expected) + np.abs(rows(tensors[0], batch_dims))
        extra = self.op.extra(case, tensors, batch_dims=batch_dims)
        assert_within(rows(out, batch_dims), expected, 1e-3 * size + extra)
        exact = self.op.run(target, case, wide, **keywords)
        assert_within(rows(exact, batch_dims), expected, 1e-9 * size + extra)

    def test_tails(self, target: Target, pair):
        """Ragged sample sizes, inputs and output between sentinels."""
        case = self.op.main
        for size in TAILS:
            arenas = placed(
                self.op, self.op.inputs(case, (2, size), pair, target.device), "misaligned", "all"
            )
            tensors = [None if a is None else a.tensor for a in arenas]
            place = arena(torch.full_like(tensors[0], SENTINEL), "misaligned", SENTINEL)
            self.op.run(target, case, tensors, out=place.tensor)
            self._check(target, case, tensors, place.tensor)
            assert place.intact(), f"a store left the tensor at D = {size}"

    def test_two_layouts_of_size_one(self, target: Target):
        """A tensor with a dimension of size 1 is contiguous and channels_last at once."""
        case = self.op.main
        for shape in ((2, 1, 4, 5), (2, 5, 1, 1), (1, 1, 3, 4)):
            tensors = self.op.inputs(case, shape, device=target.device)
            last = [None if t is None else t.contiguous(memory_format=torch.channels_last) for t in tensors]
            odd = [None if t is None else t.as_strided(t.shape, _unusual(t)) for t in tensors]
            for variant in (last, odd):
                self._check(target, case, variant, self.op.run(target, case, variant))


def _unusual(t: torch.Tensor) -> tuple[int, ...]:
    """The strides of `t` with nonsense where they do not matter."""
    return tuple(9999 if n == 1 else s for n, s in zip(t.shape, t.stride(), strict=True))
