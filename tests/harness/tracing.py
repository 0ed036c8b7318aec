"""opcheck and torch.compile: what tracing sees is one well-behaved operator."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

from .compare import same_bits
from .declare import Case, Op
from .targets import Target, kind, native_only

f32, f64 = torch.float32, torch.float64
SHAPE = (2, 4, 5, 3)


@kind("opcheck")
class Opcheck:
    op: Op

    def test_opcheck(self, sample):
        native_only()
        name, arguments = sample
        operator = getattr(torch.ops.marquardt, name).default
        result = torch.library.opcheck(operator, arguments, raise_exception=True)
        assert set(result.values()) == {"SUCCESS"}, result


@kind("compile")
class Compile:
    op: Op

    @pytest.fixture(autouse=True)
    def _fresh(self, request):
        if request.node.get_closest_marker("compile"):
            native_only()
            torch._dynamo.reset()
        yield

    def _eager_and_compiled(self, case: Case, target: Target, tensors, **options):
        op = self.op

        def step(tensors, numbers):
            return op.apply(op.function, case, tensors, numbers)

        with target():
            compiled = torch.compile(step, fullgraph=True, **options)
        return step, compiled

    def _same(self, case: Case, target: Target, backend="aot_eager", shapes=(SHAPE,), **options):
        """Value and gradients of the compiled function equal those of the eager one, bit for bit."""
        op = self.op
        step, compiled = self._eager_and_compiled(case, target, None, backend=backend, **options)
        for shape in shapes:
            results = []
            for function in (step, compiled):
                tensors = op.inputs(case, shape, device=target.device)
                leaves = [None if t is None else t.requires_grad_() for t in tensors]
                numbers = {k: torch.tensor(float(v), dtype=f64) for k, v in case.scalars.items()}
                if case.smooth:
                    numbers = {k: v.requires_grad_() for k, v in numbers.items()}
                with target():
                    out = function(leaves, numbers)
                    wanted = [t for t in (*leaves, *numbers.values()) if t is not None and t.requires_grad]
                    found = torch.autograd.grad(out.sum(), wanted, allow_unused=True)
                results.append((out, *found))
            assert results[0][0].stride() == results[1][0].stride()
            for eager, traced in zip(*results, strict=True):
                if eager is None or traced is None:
                    assert eager is traced or not (eager if traced is None else traced).any()
                    continue
                assert eager.shape == traced.shape
                if target.backend == "reference" or backend == "inductor":
                    torch.testing.assert_close(traced, eager, rtol=2e-5, atol=2e-5)
                else:
                    assert same_bits(traced, eager)

    def test_fullgraph(self, target: Target, case: Case):
        self._same(case, target)

    def test_dynamic_shapes(self, target: Target):
        self._same(self.op.main, target, dynamic=True, shapes=(SHAPE, (3, 4, 6, 5), (5, 2, 7, 3)))

    def test_dynamic_batch_is_one_graph(self, target: Target):
        counter = CompileCounterWithBackend("aot_eager")
        op, case = self.op, self.op.main
        _, compiled = self._eager_and_compiled(case, target, None, backend=counter, dynamic=True)
        counts = []
        with target():
            for batch in (2, 3, 7, 12):
                tensors = op.inputs(case, (batch, 4, 5), device=target.device)
                compiled(tensors, {k: torch.tensor(v, dtype=f64) for k, v in case.scalars.items()})
                counts.append(counter.frame_count)
        assert counts[0] > 0 and len(set(counts)) == 1, f"compiled again: {counts}"

    def test_twenty_coefficients_are_one_graph(self, target: Target):
        counter = CompileCounter()
        op, case = self.op, self.op.main
        _, compiled = self._eager_and_compiled(case, target, None, backend=counter)
        tensors = op.inputs(case, SHAPE, device=target.device)
        for i in range(20):
            numbers = {k: v * (1 + 0.1 * i) for k, v in case.scalars.items()}
            with target():
                traced = compiled(tensors, {k: torch.tensor(v, dtype=f64) for k, v in numbers.items()})
                eager = op.apply(op.function, case, tensors, numbers)
            torch.testing.assert_close(traced, eager, rtol=2e-6, atol=2e-6)
        assert counter.frame_count == 1

    def test_no_grad(self, target: Target):
        op, case = self.op, self.op.main
        _, compiled = self._eager_and_compiled(case, target, None, backend="aot_eager")
        tensors = op.inputs(case, SHAPE, device=target.device)
        with target(), torch.no_grad():
            traced = compiled(tensors, dict(case.scalars))
            torch.testing.assert_close(traced, op.apply(op.function, case, tensors), rtol=2e-6, atol=2e-6)

    def test_out(self, target: Target):
        """`out=` is traced as a mutation of that tensor."""
        op, case = self.op, self.op.main
        tensors = op.inputs(case, SHAPE, device=target.device)

        def step(tensors, out):
            op.apply(op.function, case, tensors, out=out)
            return out * 2

        with target():
            out = torch.empty_like(tensors[0])
            doubled = torch.compile(step, fullgraph=True, backend="aot_eager")(tensors, out)
            expected = op.apply(op.function, case, tensors)
        torch.testing.assert_close(out, expected, rtol=2e-6, atol=2e-6)
        assert torch.equal(doubled, out * 2)

    def test_layouts(self, target: Target):
        """The fake kernel promises the strides that the real one gives."""
        op, case = self.op, self.op.main
        for change in (
            lambda t: t.contiguous(memory_format=torch.channels_last),
            lambda t: t.transpose(1, 2),
            lambda t: t[..., ::2],
            lambda t: t[:1].expand(3, *t.shape[1:]),
        ):
            torch._dynamo.reset()
            step, compiled = self._eager_and_compiled(case, target, None, backend="aot_eager")
            tensors = [
                change(t) if t is not None else None for t in op.inputs(case, SHAPE, device=target.device)
            ]
            with target():
                eager, traced = step(tensors, dict(case.scalars)), compiled(tensors, dict(case.scalars))
            assert eager.stride() == traced.stride()
            torch.testing.assert_close(traced, eager, rtol=2e-6, atol=2e-6)

    def test_export(self, target: Target):
        op, case = self.op, self.op.main
        tensors = tuple(op.inputs(case, SHAPE, device=target.device))

        class Step(torch.nn.Module):
            def forward(self, *tensors):
                return op.apply(op.function, case, tensors)

        with target():
            exported = torch.export.export(Step(), tensors)
            torch.testing.assert_close(exported.module()(*tensors), Step()(*tensors), rtol=2e-6, atol=2e-6)

    @pytest.mark.full
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
    def test_inductor(self, target: Target, dynamic: bool):
        self._same(self.op.main, target, backend="inductor", dynamic=dynamic)
