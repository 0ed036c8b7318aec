"""Refusals: the right exception, a message that names op, argument and value, and an `out` left as it was."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from .declare import Case, Op, Refusal
from .targets import INTERPRETED, Target, kind

SHAPE = (4, 3, 6)
f32 = torch.float32


@kind("errors")
class Errors:
    op: Op

    def _case(self) -> Case:
        """A case with two tensors or more."""
        return next(
            c for c in self.op.cases if len(c.tensors(torch.Generator(), (1, 1))) > 1 and not c.keywords
        )

    def _refused(self, target: Target, error, words, tensors, scalars=None, case=None, out="new", **keywords):
        op, case = self.op, case or self._case()
        if isinstance(out, str):
            first = next(iter(tensors), None)
            good = isinstance(first, torch.Tensor) and first.layout == torch.strided and first.dtype == f32
            out = torch.full_like(first, 7.0, device=target.device) if good else None
        kept = None if out is None or not isinstance(out, torch.Tensor) else out.clone()
        merged = {**case.keywords, **keywords}
        if out is not None:
            merged["out"] = out
        scalars = dict(case.scalars if scalars is None else scalars)
        with target(), pytest.raises(error) as raised:
            op.call(op.function, list(tensors), scalars, **merged)
        message = str(raised.value)
        for word in (op.name, *words):
            assert word in message, f"{word!r} is missing in: {message}"
        assert "\n" not in message.strip() or len(message) < 1500, "a C++ backtrace is in the message"
        if kept is not None:
            assert torch.equal(out.isnan(), kept.isnan()) and torch.equal(out.nan_to_num(), kept.nan_to_num())

    def _good(self, target: Target):
        return self.op.inputs(self._case(), SHAPE, device=target.device)

    def test_declared(self, target: Target, refusal: Refusal):
        """The op's own rules."""
        case = self._case()
        scalars = {k: v for k, v in {**case.scalars, **refusal.scalars}.items() if v is not None}
        tensors = self._good(target)
        if refusal.tensors is not None:
            tensors = refusal.tensors(tensors)
        self._refused(target, refusal.error, refusal.words, tensors, scalars, **refusal.keywords)

    @pytest.mark.parametrize("j", [0, 1])
    def test_not_a_tensor(self, target: Target, j: int):
        for thing in (3.0, [1.0, 2.0], np.ones(SHAPE, dtype=np.float32), "text"):
            tensors = self._good(target)
            tensors[j] = thing
            self._refused(target, TypeError, (self.op.argument(j), type(thing).__name__), tensors, out=None)

    @pytest.mark.parametrize("j", [0, 1])
    @pytest.mark.parametrize(
        "dtype", [torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64], ids=str
    )
    def test_kind_of_number(self, target: Target, j: int, dtype):
        tensors = self._good(target)
        tensors[j] = torch.ones(SHAPE, device=target.device).to(dtype)
        words = (self.op.argument(j), str(dtype).removeprefix("torch."))
        self._refused(target, TypeError, words, tensors)

    @pytest.mark.parametrize("j", [0, 1])
    def test_sparse_and_quantised(self, target: Target, j: int):
        tensors = self._good(target)
        for make in (lambda t: t.to_sparse(), lambda t: t.reshape(SHAPE[0], -1).to_sparse_csr()):
            tensors[j] = make(self._good(target)[j])
            self._refused(target, TypeError, (self.op.argument(j), "sparse"), tensors)
        if target.device == "cpu":
            tensors[j] = torch.quantize_per_tensor(torch.ones(SHAPE), 0.1, 0, torch.quint8)
            self._refused(target, TypeError, (self.op.argument(j),), tensors)

    def test_shape(self, target: Target):
        for shape in ((4, 3, 5), (4, 3), (3, 3, 6), (1, 3, 6), (4, 3, 6, 1), (4, 18)):
            tensors = self._good(target)
            tensors[1] = torch.ones(shape, device=target.device)
            words = (self.op.argument(1), self.op.argument(0), str(list(shape)), str(list(SHAPE)))
            self._refused(target, ValueError, words, tensors)

    def test_device(self, target: Target):
        for j in (0, 1):
            tensors = self._good(target)
            tensors[j] = tensors[j].to("meta")
            # with a first tensor elsewhere it is the second that does not fit
            self._refused(target, (ValueError, NotImplementedError), ("meta",), tensors, out=None)
        tensors = self._good(target)
        tensors[1] = tensors[1].to("meta")
        self._refused(target, ValueError, (self.op.argument(1), "meta", target.device), tensors)

    def test_parameters_of_another_batch(self, target: Target):
        for name in self._case().scalars:
            for shape in ((3,), (1,), (5,), (4, 1), (4, 3), (0,)):
                scalars = {**self._case().scalars, name: torch.ones(shape, device=target.device)}
                words = (self.scalar_name(name), str(list(shape)))
                self._refused(target, ValueError, words, self._good(target), scalars)

    def test_parameters_per_sample_without_a_batch(self, target: Target):
        name = next(iter(self._case().scalars))
        scalars = {**self._case().scalars, name: torch.ones(4, device=target.device)}
        words = (self.scalar_name(name), "[4]")
        self._refused(target, ValueError, words, self._good(target), scalars, batch_dims=0)

    def test_parameters_of_another_kind(self, target: Target):
        for name in self._case().scalars:
            for thing in ("text", [1.0], torch.tensor(1j), True, object()):
                scalars = {**self._case().scalars, name: thing}
                self._refused(target, TypeError, (self.scalar_name(name),), self._good(target), scalars)

    def scalar_name(self, name: str) -> str:
        """How a scalar is called in messages; ops that take a list name its place."""
        return f"coefficients[{name[1:]}]" if name[0] == "c" and name[1:].isdigit() else name

    @pytest.mark.parametrize("batch_dims", [2, -1, 7])
    def test_batch_dims(self, target: Target, batch_dims: int):
        self._refused(
            target, ValueError, ("batch_dims", str(batch_dims)), self._good(target), batch_dims=batch_dims
        )

    def test_no_batch_dimension(self, target: Target):
        tensors = [torch.tensor(1.0, device=target.device) for _ in self._good(target)]
        self._refused(target, ValueError, (self.op.argument(0), "batch"), tensors)

    def test_out_shape_and_dtype(self, target: Target):
        tensors = self._good(target)
        for shape in ((4, 3, 5), (4, 18), (1, 3, 6), (0,)):
            out = torch.full(shape, 7.0, device=target.device)
            self._refused(target, ValueError, ("out", str(list(shape))), tensors, out=out)
        for dtype in (torch.float64, torch.bfloat16, torch.int32):
            out = torch.full(SHAPE, 7, dtype=dtype, device=target.device)
            self._refused(target, TypeError, ("out", str(dtype).removeprefix("torch.")), tensors, out=out)
        out = torch.empty(SHAPE, device="meta")
        with target(), pytest.raises(ValueError, match="out"):
            self.op.apply(self.op.function, self._case(), tensors, out=out)
        with target(), pytest.raises(TypeError, match="out"):
            self.op.apply(self.op.function, self._case(), tensors, out=[1.0])

    def test_out_overlap(self, target: Target):
        """`out` that shares some memory with an input, but is not that input."""
        numel = math.prod(SHAPE)
        for j in range(len(self._good(target))):
            for shift in (1, 6, numel - 1):
                buffer = torch.randn(2 * numel, device=target.device)
                tensors = self._good(target)
                tensors[j] = buffer[:numel].view(SHAPE)
                words = ("out", "overlap")
                self._refused(
                    target, ValueError, words, tensors, out=buffer[shift : shift + numel].view(SHAPE)
                )
            square = torch.randn(4, 6, 6, device=target.device)
            tensors = [torch.randn_like(square) for _ in tensors]
            tensors[j] = square
            self._refused(target, ValueError, ("out", "overlap"), tensors, out=square.transpose(1, 2))

    def test_out_beside_an_input(self, target: Target):
        """Two halves of one buffer, and interleaved columns, share no memory: allowed."""
        tensors = self._good(target)
        numel = math.prod(SHAPE)
        buffer = torch.randn(2 * numel, device=target.device)
        expected = self.op.run(target, self._case(), [buffer[:numel].view(SHAPE), *tensors[1:]])
        out = buffer[numel:].view(SHAPE)
        self.op.run(target, self._case(), [buffer[:numel].view(SHAPE), *tensors[1:]], out=out)
        assert torch.equal(out, expected)

    def test_out_that_repeats_memory(self, target: Target):
        out = torch.full((1, 3, 6), 7.0, device=target.device).expand(SHAPE)
        self._refused(target, (ValueError, RuntimeError), ("out",), self._good(target), out=out)

    def test_out_with_grad(self, target: Target):
        """As torch does: `out=` and a gradient do not go together."""
        for which in ("input", "out", "scalar"):
            tensors, scalars = self._good(target), dict(self._case().scalars)
            out = torch.full(SHAPE, 7.0, device=target.device)
            if which == "input":
                tensors[1].requires_grad_()
            elif which == "out":
                out.requires_grad_()
            else:
                name = next(iter(scalars))
                scalars[name] = torch.tensor(scalars[name], requires_grad=True)
            with target(), pytest.raises((RuntimeError, ValueError), match="grad"):
                self.op.apply(self.op.function, self._case(), tensors, scalars, out=out)
            assert bool((out == 7).all())
            with torch.no_grad():
                self.op.run(target, self._case(), tensors, scalars, out=out)
            assert not bool((out == 7).any())

    def test_forced_backend_that_cannot_run(self, target: Target):
        import marquardt

        impossible = "cpu" if target.device == "cuda" else "cuda"
        tensors = self._good(target)
        out = torch.full(SHAPE, 7.0, device=target.device)
        with marquardt.use_backend(impossible), pytest.raises(NotImplementedError) as raised:
            self.op.apply(self.op.function, self._case(), tensors, out=out)
        for word in (self.op.name, *(("cuda", "triton", "cpu", "reference") if not INTERPRETED else ())):
            assert word in str(raised.value)
        assert bool((out == 7).all())
