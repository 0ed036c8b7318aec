"""softmax_head_hvp and damped_gram_solve as they are called: tracing, layouts, bits, memory, refusals, a GPU."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import marquardt as mq
from gauss_newton_data import (
    DTYPES,
    FEW_CLASSES,
    compute,
    error,
    f32,
    f64,
    head,
    head_oracle,
    layer,
    leaves,
    name,
    rounding,
    solve,
    solve_oracle,
)
from harness import same_bits
from harness.compare import ulp, wide
from marquardt import products
from marquardt.gauss_newton import damped_gram_solve, softmax_head_hvp
from marquardt.reference import gauss_newton as reference


@pytest.mark.opcheck
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_opcheck(dtype):
    for grads in (False, True):
        g, x = (t.requires_grad_(grads) for t in layer(30, 5, 3, dtype))
        torch.library.opcheck(products.gram_pair, (g, x))
        x, p, G = (t.requires_grad_(grads) for t in head(30, 5, 3, dtype))
        torch.library.opcheck(products.softmax_head_hvp, (x, p, G))
    torch.library.opcheck(products.gram_pair, layer(0, 5, 3, dtype))
    torch.library.opcheck(
        products.softmax_head_hvp, (x.detach().T.contiguous().T, p.detach()[:, :5], G.detach())
    )


@pytest.mark.compile
class TestTracing:
    @pytest.mark.parametrize(
        "dynamic", [pytest.param(False, marks=pytest.mark.full), True], ids=["static", "dynamic"]
    )
    def test_compile(self, dynamic):
        fast_solve = torch.compile(solve, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        fast_head = torch.compile(softmax_head_hvp, fullgraph=True, dynamic=dynamic, backend="aot_eager")
        for rows in (40, 50, 3):
            for function, fast, arguments in (
                (solve, fast_solve, [*layer(rows, 5, 2, f64), torch.tensor(0.3, dtype=f64)]),
                (softmax_head_hvp, fast_head, head(rows, 5, 3, f64)),
            ):
                plain, traced = leaves(*arguments), leaves(*arguments)
                out, expected = fast(*traced), function(*plain)
                torch.testing.assert_close(out, expected)
                for f, e in zip(
                    torch.autograd.grad(out.sum(), traced),
                    torch.autograd.grad(expected.sum(), plain),
                    strict=True,
                ):
                    torch.testing.assert_close(f, e)

    @pytest.mark.full
    def test_inductor(self):
        arguments = [*layer(40, 5, 2), torch.tensor(0.3, dtype=f64)]
        torch.testing.assert_close(torch.compile(solve, fullgraph=True)(*arguments), solve(*arguments))
        arguments = head(40, 5, 3)
        torch.testing.assert_close(
            torch.compile(softmax_head_hvp, fullgraph=True)(*arguments), softmax_head_hvp(*arguments)
        )

    def test_one_graph_for_all_dampings(self):
        graphs = []

        def count(graph, inputs):
            graphs.append(graph)
            return graph.forward

        fast = torch.compile(solve, fullgraph=True, backend=count)
        g, x = layer(20, 4, 2)
        for k in range(10):
            damping = torch.tensor(0.1 + k, dtype=f64)
            torch.testing.assert_close(fast(g, x, damping), solve(g, x, damping))
        assert len(graphs) == 1


# --- layouts and bits -------------------------------------------------------------------------------------


def layouts(t):
    """The same values, lying otherwise."""
    wide_rows = t.new_full((t.shape[0], t.shape[1] + 3), float("nan"))
    wide_rows[:, 1:-2] = t
    spread = t.new_full((2 * t.shape[0], 3 * t.shape[1]), float("nan"))
    spread[::2, ::3] = t
    shifted = t.new_full((t.numel() + 1,), float("nan"))
    shifted[1:] = t.flatten()
    return {
        "transposed": t.T.contiguous().T,
        "sliced": wide_rows[:, 1:-2],
        "spread": spread[::2, ::3],
        "misaligned": shifted[1:].view(t.shape),
        "reversed-twice": t.flip(0).flip(0),
    }


@pytest.mark.strides
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
class TestLayouts:
    """Neighbours are NaN, so that a read beyond a row shows."""

    def test_solve(self, dtype):
        g, x = layer(700, 19, 5, dtype)
        want = damped_gram_solve(g, x, damping=0.1)
        for kind, t in layouts(x).items():
            assert same_bits(damped_gram_solve(g, t, damping=0.1), want), kind
        for kind, t in layouts(g).items():
            assert same_bits(damped_gram_solve(t, x, damping=0.1), want), kind
        one = x[:1].expand(700, 19)
        copied = damped_gram_solve(g, one.contiguous(), damping=0.1)
        assert same_bits(damped_gram_solve(g, one, damping=0.1), copied)

    @pytest.mark.parametrize("shape", [(300, 21, 6), (300, 5, 6), (300, 16, 32)], ids=name)
    def test_head(self, shape, dtype):
        """Values agree; torch's products may take another way through another layout, those of few classes may not."""
        arguments = head(*shape, dtype)
        want = softmax_head_hvp(*arguments)
        for j in range(3):
            for kind, t in layouts(arguments[j]).items():
                given = [*arguments[:j], t, *arguments[j + 1 :]]
                found = softmax_head_hvp(*given)
                assert error(found, wide(want)) <= 4 * compute(dtype) + 2 * rounding(dtype), (j, kind)
                assert shape[1] > FEW_CLASSES or same_bits(found, want), (j, kind)


@pytest.mark.determinism
class TestBits:
    def runs(self, function):
        threads, found = torch.get_num_threads(), []
        try:
            for count in (1, 2, 3, 8):
                torch.set_num_threads(count)
                found.append(function())
        finally:
            torch.set_num_threads(threads)
        return found

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize(
        "shape", [(5000, 40, 9), (3000, 147, 64), (20000, 5, 3), (14_001, 147, 13)], ids=name
    )
    def test_gram_over_threads(self, shape, dtype):
        g, x = layer(*shape, dtype)
        first, *others = self.runs(lambda: products.gram_pair(g, x))
        for other in others:
            assert same_bits(first[0], other[0]) and same_bits(first[1], other[1])

    def test_solve_over_threads(self):
        """The i × i system is torch's: small enough for one thread here."""
        g, x = layer(5000, 40, 9)
        first, *others = self.runs(lambda: damped_gram_solve(g, x, damping=0.01))
        assert all(same_bits(first, other) for other in others)

    def test_repeated(self):
        g, x = layer(5000, 40, 9)
        arguments = head(3000, 50, 20)
        first = damped_gram_solve(g, x, damping=0.01), softmax_head_hvp(*arguments)
        for _ in range(5):
            assert same_bits(damped_gram_solve(g, x, damping=0.01), first[0])
            assert same_bits(softmax_head_hvp(*arguments), first[1])

    def test_head_over_threads(self):
        """Not bits, since torch's products do not promise them; to a unit or two of the sum."""
        arguments = head(3000, 50, 20)
        first, *others = self.runs(lambda: softmax_head_hvp(*arguments))
        for other in others:
            assert np.all(np.abs(wide(first) - wide(other)) <= 8 * ulp(np.abs(wide(first)).max(), f32))

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", [(3001, 10, 70), (5000, FEW_CLASSES, 16), (40, 3, 5)], ids=name)
    def test_head_of_few_classes_over_threads(self, shape, dtype):
        """Bits: both products are our own."""
        arguments = head(*shape, dtype)
        first, *others = self.runs(lambda: softmax_head_hvp(*arguments))
        assert all(same_bits(first, other) for other in others)


MEMORY = """
import ctypes, sys, threading, torch
from marquardt.gauss_newton import damped_gram_solve

class Info(ctypes.Structure):
    _fields_ = [(n, ctypes.c_size_t) for n in
                "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()]

mallinfo = ctypes.CDLL(None).mallinfo2
mallinfo.restype = Info
def used():
    now = mallinfo()
    return now.uordblks + now.hblkhd

torch.set_num_threads(2)
x, g = torch.empty(200_000, 147).normal_(), torch.empty(200_000, 64).normal_()
damped_gram_solve(g[:300], x[:300], damping=1e-3)  # what is made once
peak, before, done = 0, used(), False
def watch():
    global peak
    while not done:
        peak = max(peak, used())
watcher = threading.Thread(target=watch)
watcher.start()
out = damped_gram_solve(g, x, damping=1e-3)
done = True
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks glibc")
def test_memory_of_a_solve():
    """At most 1 MiB, the result included, with two threads: sampled while the call runs, as allocated by malloc."""
    from harness import native_only

    native_only()
    package = pathlib.Path(mq.__file__).parent.parent
    # Large blocks come from mmap alone, whatever was freed before, so that the count of the process holds all of them.
    given = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    path = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **given, "PYTHONPATH": path}
    made = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, env=environment)
    if "mallinfo2" in made.stderr:
        pytest.skip("the C library has no mallinfo2")
    assert made.returncode == 0, made.stderr
    # at least the two sets of sums: else the watcher saw nothing
    assert 300 << 10 < int(made.stdout) <= 1 << 20


# --- refusals ---------------------------------------------------------------------------------------------


def refused(error, words, function, *arguments, **keywords):
    with pytest.raises(error) as raised:
        function(*arguments, **keywords)
    for word in words:
        assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"


@pytest.mark.errors
class TestRefusals:
    def test_damping(self):
        g, x = layer(10, 3, 2)
        op = "damped_gram_solve: damping"
        for bad in (-0.5, float("nan"), float("inf"), torch.tensor(-2.0)):
            refused(ValueError, [op, "be finite and >= 0", str(float(bad))], solve, g, x, bad)
        refused(ValueError, [op, "0-dim", "[2]"], solve, g, x, torch.ones(2))
        refused(TypeError, [op, "str"], solve, g, x, "0.1")
        refused(TypeError, [op, "complex64"], solve, g, x, torch.tensor(1j))

    def test_singular(self):
        g, x = torch.ones(10, 2), torch.ones(10, 3)
        refused(ValueError, ["damped_gram_solve: damping", "positive definite", "got 0.0"], solve, g, x, 0.0)
        refused(ValueError, ["positive definite"], solve, g[:2], x[:2], 0)
        traced = torch.compile(solve, fullgraph=True, backend="aot_eager")(g, x, torch.tensor(0.0, dtype=f64))
        assert bool(traced.isnan().all())
        assert bool(solve(g, x, 1e-3).isfinite().all())

    def test_shapes(self):
        g, x = layer(10, 3, 2)
        refused(
            ValueError, ["damped_gram_solve: g", "as many rows as x (10)", "[9, 2]"], solve, g[:9], x, 1.0
        )
        refused(ValueError, ["damped_gram_solve: x", "two dimensions", "[10]"], solve, g, x[:, 0], 1.0)
        x, p, G = head(10, 4, 3)
        call = softmax_head_hvp
        refused(ValueError, ["softmax_head_hvp: p", "as many rows as x (10)", "[9, 4]"], call, x, p[:9], G)
        refused(ValueError, ["softmax_head_hvp: G", "([4, 3])", "[4, 2]"], call, x, p, G[:, :2])
        refused(ValueError, ["softmax_head_hvp: G", "([4, 3])", "[3, 3]"], call, x, p, G[:3])
        refused(ValueError, ["softmax_head_hvp: p", "two dimensions"], call, x, p[None], G)

    def test_types(self):
        g, x = layer(10, 3, 2)
        refused(
            TypeError, ["damped_gram_solve: g", "dtype of x (float32)", "float64"], solve, g.double(), x, 1.0
        )
        refused(TypeError, ["damped_gram_solve: x", "int64"], solve, g, x.long(), 1.0)
        refused(TypeError, ["damped_gram_solve: g", "be a tensor", "list"], solve, [1.0], x, 1.0)
        refused(TypeError, ["damped_gram_solve: x", "dense"], solve, g, x.to_sparse(), 1.0)
        x, p, G = head(10, 4, 3)
        refused(
            TypeError, ["softmax_head_hvp: G", "float32", "bfloat16"], softmax_head_hvp, x, p, G.bfloat16()
        )
        refused(
            ValueError,
            ["softmax_head_hvp: p", "device of x (cpu)", "meta"],
            softmax_head_hvp,
            x,
            p.to("meta"),
            G,
        )

    def test_operators(self):
        """The operators check for themselves: nobody else does for those who call them bare."""
        g, x = layer(10, 3, 2)
        for bad, words in (
            ((g[:9], x), ["gram_pair: g", "as many rows as x (10)", "[9, 2]"]),
            ((g.double(), x), ["gram_pair: g", "dtype of x (float32)", "float64"]),
            ((g[None], x), ["gram_pair: g", "two dimensions"]),
        ):
            refused(RuntimeError, words, products.gram_pair, *bad)
        x, p, G = head(10, 4, 3)
        refused(
            RuntimeError,
            ["softmax_head_hvp: G", "[4, 3]", "[4, 2]"],
            products.softmax_head_hvp,
            x,
            p,
            G[:, :2],
        )
        refused(RuntimeError, ["softmax_head_hvp: p", "rows"], products.softmax_head_hvp, x, p[:3], G)

    def test_backends(self):
        g, x = layer(10, 3, 2)
        for forced in ("triton", "cuda"):
            with mq.use_backend(forced):
                refused(NotImplementedError, ["damped_gram_solve", forced, "cpu"], solve, g, x, 1.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
class TestCuda:
    def test_nothing_waits(self):
        g, x = layer(3000, 20, 5, device="cuda")
        arguments = head(300, 20, 5, device="cuda")
        damping = torch.tensor(0.1, device="cuda")
        for _ in range(2):  # handles and workspaces are made in the first
            torch.cuda.set_sync_debug_mode("error" if _ else "default")
            try:
                found = (
                    solve(g, x, 0.1),
                    solve(g, x, damping),
                    softmax_head_hvp(*arguments),
                    solve(g[:9], x[:9], 0.1),
                )
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert (
            error(found[0], solve_oracle(g, x, 0.1)) < 1e-6
            and error(found[1], solve_oracle(g, x, 0.1)) < 1e-6
        )
        assert error(found[2], head_oracle(*arguments)) < 1e-6
        assert error(found[3], solve_oracle(g[:9], x[:9], 0.1)) < 1e-6

    def test_singular_is_nan(self):
        out = solve(torch.ones(10, 2, device="cuda"), torch.ones(10, 3, device="cuda"), 0.0)
        assert bool(out.isnan().all())


def test_definitions_take_leading_dimensions():
    """What vmap of the operators rests on."""
    g, x = layer(12, 4, 3, f64)
    stacked = [torch.stack([t, 3 * t]) for t in (g, x)]
    for one, many in zip(reference.gram_pair(3 * g, 3 * x), reference.gram_pair(*stacked), strict=True):
        torch.testing.assert_close(many[1], one)
