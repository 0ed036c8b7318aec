"""Bitwise repeatability: over calls, batch size, position in the batch, threads and thread count."""

from __future__ import annotations

import threading

import pytest
import torch

from .compare import same_bits
from .declare import Case, Op
from .targets import INTERPRETED, Target, kind
from .values import differentiable, gradients, upstream

# D below, at and above the chunk of 2048 and its multiples, and one long enough to be split over threads
SIZES = (100, 5000) if INTERPRETED else (100, 2048, 5000, 70001)


def everything(op: Op, target: Target, case: Case, tensors, grad=None) -> list[torch.Tensor]:
    """The result and the gradients of the tensors."""
    leaves, _ = differentiable(tensors, {})
    out = op.run(target, case, leaves)
    found, _ = gradients(out, leaves, {}, upstream(out) if grad is None else grad)
    return [out.detach(), *(d for d in found if d is not None)]


@kind("determinism")
class Determinism:
    op: Op

    def test_again(self, target: Target, case: Case, pair):
        tensors = self.op.inputs(case, (3, 5000), pair, target.device)
        first = everything(self.op, target, case, tensors)
        for a, b in zip(first, everything(self.op, target, case, tensors), strict=True):
            assert same_bits(a, b)

    @pytest.mark.parametrize("size", SIZES)
    def test_batch_size_and_position(self, target: Target, case: Case, size: int):
        """Each sample alone, and the batch in another order, give the bits of the whole batch."""
        if not target.steady or "seed" in case.keywords:
            pytest.skip("the reference reduces whole batches; one seed counts through the batch")
        batch = 5 if size < 10000 else 3
        tensors = self.op.inputs(case, (batch, size), device=target.device)
        whole = everything(self.op, target, case, tensors)
        grad = upstream(whole[0])
        order = torch.randperm(batch, generator=torch.Generator().manual_seed(0))
        for rows in (order, *([b] for b in range(batch))):
            part = [None if t is None else t[rows].contiguous() for t in tensors]
            for a, b in zip(
                whole, everything(self.op, target, case, part, grad[rows].contiguous()), strict=True
            ):
                assert same_bits(a[rows], b)

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("batch", [1, 4])
    def test_thread_count(self, target: Target, case: Case, size: int, batch: int):
        if target.backend != "cpu":
            pytest.skip("threads of the CPU kernels")
        tensors = self.op.inputs(case, (batch, size), device=target.device)
        before = torch.get_num_threads()
        results = []
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                results.append(everything(self.op, target, case, tensors))
        finally:
            torch.set_num_threads(before)
        for other in results[1:]:
            for a, b in zip(results[0], other, strict=True):
                assert same_bits(a, b)

    def test_unbatched_is_a_batch_of_one(self, target: Target, case: Case):
        tensors = self.op.inputs(case, (1, 5000), device=target.device)
        single = [None if t is None else t[0] for t in tensors]
        assert same_bits(
            self.op.run(target, case, tensors)[0], self.op.run(target, case, single, batch_dims=0)
        )

    def test_concurrent_threads(self, target: Target, case: Case):
        """The op called from several Python threads at once."""
        if INTERPRETED:
            pytest.skip("the interpreter keeps global state")
        inputs = [self.op.inputs(case, (2, 3000), device=target.device, seed=s) for s in range(4)]
        expected = [everything(self.op, target, case, tensors) for tensors in inputs]
        faults: list[str] = []

        def work(i: int) -> None:
            try:
                for _ in range(3):
                    leaves, _ = differentiable(inputs[i], {})
                    out = self.op.apply(self.op.function, case, leaves)
                    found, _ = gradients(out, leaves, {}, upstream(out))
                    got = [out.detach(), *(d for d in found if d is not None)]
                    if not all(same_bits(a, b) for a, b in zip(expected[i], got, strict=True)):
                        faults.append(f"thread {i} got other bits")
            except Exception as error:
                faults.append(repr(error))

        with target():
            threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
        assert not faults, faults
