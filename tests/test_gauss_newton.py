"""softmax_head_hvp and damped_gram_solve: values, derivatives, layouts, bits, memory, refusals."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch

import marquardt as mq
from harness import same_bits
from harness.compare import LD, norm_error, ulp, wide
from marquardt import products
from marquardt.gauss_newton import damped_gram_solve, softmax_head_hvp
from marquardt.reference import gauss_newton as reference

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (f32, f64, bf16, f16)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
# (rows, columns of x, columns of g): one row, ragged vectors, several ranges of rows, b < i, nothing to the right
GRAM_SHAPES = [
    (1, 1, 1),
    (5, 3, 2),
    (300, 17, 5),
    (2100, 147, 64),
    (3000, 33, 0),
    (1300, 48, 35),
    (700, 96, 1),
]
HEAD_SHAPES = [(1, 2, 1), (7, 5, 3), (300, 130, 33), (2500, 10, 70), (65, 1500, 9)]


def name(value) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


def rounding(dtype: torch.dtype) -> float:
    """What storing a result costs, norm-wise."""
    return torch.finfo(dtype).eps / 2


def compute(dtype: torch.dtype) -> float:
    """The unit of the type that sums are kept in."""
    return torch.finfo(f64 if dtype is f64 else f32).eps


# --- data and oracles -------------------------------------------------------------------------------------


def layer(b, i, o, dtype=f32, *, decay=0.0, seed=0, device="cpu"):
    """(g [b, o], x [b, i]): outputs' gradients that depend on the inputs; x with singular values over 10^decay."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(b, i, generator=generator, dtype=f64)
    if decay:
        basis = torch.linalg.qr(torch.randn(i, i, generator=generator, dtype=f64))[0]
        x = x * torch.logspace(0, -decay, i, dtype=f64) @ basis
    g = x @ torch.randn(i, o, generator=generator, dtype=f64)
    g += 0.1 * torch.randn(b, o, generator=generator, dtype=f64)
    return g.to(device, dtype), x.to(device, dtype)


def head(n, c, d, dtype=f32, *, seed=0, device="cpu"):
    """(x [n, d], p [n, C], G [C, d])."""
    generator = torch.Generator().manual_seed(seed)
    x, logits, G = (torch.randn(*s, generator=generator, dtype=f64) for s in ((n, d), (n, c), (c, d)))
    return tuple(t.to(device, dtype) for t in (x, (2 * logits).softmax(1), G))


def cholesky_solve(a: np.ndarray, right: np.ndarray) -> np.ndarray:
    """a⁻¹ right, longdouble."""
    n = a.shape[0]
    low = np.zeros_like(a)
    for k in range(n):
        low[k, k] = np.sqrt(a[k, k] - (low[k, :k] ** 2).sum())
        low[k + 1 :, k] = (a[k + 1 :, k] - low[k + 1 :, :k] @ low[k, :k]) / low[k, k]
    y = right.copy()
    for k in range(n):
        y[k] = (y[k] - low[k, :k] @ y[:k]) / low[k, k]
    for k in reversed(range(n)):
        y[k] = (y[k] - low[k + 1 :, k] @ y[k + 1 :]) / low[k, k]
    return y


def solve_oracle(g, x, damping, *more) -> np.ndarray | list[np.ndarray]:
    """The formula as it is printed, in longdouble, never in its dual form; for several λ a list."""
    g, x = wide(g), wide(x)
    gram, cross, eye = x.T @ x / x.shape[0], x.T @ g, np.eye(x.shape[1], dtype=LD)
    found = [cholesky_solve(gram + LD(value) * eye, cross).T for value in (damping, *more)]
    return found if more else found[0]


def head_oracle(x, p, G) -> np.ndarray:
    """Sample by sample: Σ_n (diag(p) − p pᵀ) G x_n x_nᵀ / n, in longdouble."""
    x, p, G = wide(x), wide(p), wide(G)
    out = np.zeros(G.shape, LD)
    for xn, pn in zip(x, p, strict=True):
        z = G @ xn
        out += np.outer(pn * (z - pn @ z), xn) / x.shape[0]
    return out


def error(found, expected) -> float:
    """Norm-wise relative error of the whole matrix."""
    return float(norm_error(found[None], np.asarray(expected)[None])[0])


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.accuracy
class TestValues:
    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", GRAM_SHAPES, ids=name)
    def test_gram_pair(self, shape, dtype, device):
        """Every element within a few roundings of Σ|products|, chunk by chunk; in float64 products to the ulp."""
        b, i, o = shape
        g, x = layer(b, i, o, dtype, device=device)
        gram, cross = products.gram_pair(g, x)
        assert gram.shape == (i, i) and cross.shape == (o, i) and gram.dtype == cross.dtype == f64
        wg, wx = wide(g), wide(x)
        for found, left in ((gram, wx), (cross, wg)):
            # sums of 256 products (1024 on a GPU): roundings add up like a random walk, √256 · ½ unit, eight deviations
            allowed = 8 * 32 * compute(dtype) / 2 * (np.abs(left).T @ np.abs(wx)) / np.sqrt(b)
            allowed += 2 * compute(dtype) * np.abs(left).T @ np.abs(wx)
            assert np.all(np.abs(wide(found) - left.T @ wx) <= allowed)
        assert torch.equal(gram, gram.mT)

    @pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=name)
    def test_gram_pair_of_many_rows(self, dtype):
        """Beyond 2²⁷ products they are taken in float32; ragged chunks, ranges and vectors."""
        for b, i, o in ((14_001, 147, 13), (12_345, 100, 61), (9_000, 171, 16)):
            g, x = layer(b, i, o, dtype)
            gram, cross = products.gram_pair(g, x)
            wg, wx = g.double(), x.double()
            for found, left in ((gram, wx), (cross, wg)):
                assert bool((found - left.T @ wx).abs().max() > 0), "float32 products were meant here"
                # squares of few bits round to one side
                allowed = 4 * compute(f32) * (left.abs().T @ wx.abs())
                assert bool(((found - left.T @ wx).abs() <= allowed).all())
            assert torch.equal(gram, gram.mT)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", [s for s in GRAM_SHAPES if s[2]] + [(4, 9, 3), (40, 300, 7)], ids=name)
    def test_solve(self, shape, dtype, device):
        g, x = layer(*shape, dtype, device=device)
        found = damped_gram_solve(g, x, damping=0.1)
        assert found.dtype == dtype and found.is_contiguous() and found.shape == (shape[2], shape[1])
        # condition of the system at most (largest eigenvalue + 0.1) / 0.1; measured errors are 20 times smaller
        assert error(found, solve_oracle(g, x, 0.1)) <= rounding(dtype) + 8 * compute(dtype)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    @pytest.mark.parametrize("shape", HEAD_SHAPES, ids=name)
    def test_head(self, shape, dtype, device):
        """To 1e-6 in float32; a 16-bit result adds its rounding, on a GPU 16-bit logits add theirs."""
        n, c, d = shape
        x, p, G = head(n, c, d, dtype, device=device)
        found = softmax_head_hvp(x, p, G)
        assert found.dtype == dtype and found.shape == (c, d)
        allowed = 1e-14 if dtype is f64 else 1e-6 + (0 if dtype is f32 else torch.finfo(dtype).eps)
        if device != "cpu" and dtype in (f16, bf16):
            allowed *= 4
        assert error(found, head_oracle(x, p, G)) <= allowed

    def test_head_is_the_hessian(self):
        """Against autograd through the loss itself, with probabilities of the head."""
        x, _, G = head(40, 6, 5, f64)
        W = torch.randn(6, 5, dtype=f64, generator=torch.Generator().manual_seed(3))
        labels = torch.arange(40) % 6

        def loss(w):
            return torch.nn.functional.cross_entropy(x @ w.T, labels)

        _, expected = torch.autograd.functional.hvp(loss, W, G)
        torch.testing.assert_close(
            softmax_head_hvp(x, (x @ W.T).softmax(1), G), expected, rtol=1e-12, atol=1e-15
        )

    @pytest.mark.parametrize("size", [(500, 48, 0.2), (20_000, 128, 0.6)], ids=["double", "float32-products"])
    def test_more_accurate_than_the_inverse_as_damping_vanishes(self, size):
        """Condition 1e6 of the Gram: Cholesky of a Gram summed in float64 against a float32 inverse."""
        b, i, bound = size
        g, x = layer(b, i, 8, f32, decay=3)
        eye, dampings = torch.eye(i), (1.0, 1e-2, 1e-4, 1e-6, 1e-8, 0.0)
        for damping, want in zip(dampings, solve_oracle(g, x, *dampings), strict=True):
            inverse = g.T @ x @ torch.linalg.inv(x.T @ x / x.shape[0] + damping * eye)
            ours, theirs = error(damped_gram_solve(g, x, damping=damping), want), error(inverse, want)
            assert ours < bound * theirs, (damping, ours, theirs)

    def test_dual_needs_no_gram_of_the_columns(self):
        """b < i at λ → 0: the i × i system is singular, the dual one is not."""
        g, x = layer(20, 300, 4, f32)
        found = damped_gram_solve(g, x, damping=0.0)
        wg, wx = wide(g), wide(x)
        want = (cholesky_solve(wx @ wx.T / 20, wg).T) @ wx
        assert error(found, want) <= 1e-6
        assert error(damped_gram_solve(g, x, damping=1e-12), want) <= 1e-6

    def test_dual_and_primal_agree(self):
        """Both sides of b = i, by the same oracle, in float64."""
        for b in (29, 30, 31):
            g, x = layer(b, 30, 4, f64)
            assert error(damped_gram_solve(g, x, damping=0.05), solve_oracle(g, x, 0.05)) <= 1e-11

    def test_empty_batch(self):
        for dtype in DTYPES:
            g, x = layer(0, 5, 3, dtype)
            assert bool((damped_gram_solve(g, x, damping=0.1) == 0).all())
            out = softmax_head_hvp(*head(0, 4, 5, dtype))
            assert out.shape == (4, 5) and bool((out == 0).all())
        assert damped_gram_solve(torch.ones(3, 0), torch.ones(3, 2), damping=1.0).shape == (0, 2)
        assert damped_gram_solve(torch.ones(3, 2), torch.ones(3, 0), damping=1.0).shape == (2, 0)
        assert softmax_head_hvp(torch.ones(3, 0), torch.ones(3, 2), torch.ones(2, 0)).shape == (2, 0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_nan_in_nan_out(self, bad):
        """In the last row of a range, in columns of either argument; no error."""
        for rows in (3, 1500):
            g, x = layer(rows, 20, 3)
            for spoiled in (0, 1):
                tensors = [g.clone(), x.clone()]
                tensors[spoiled][-1, -1] = bad
                out = damped_gram_solve(*tensors, damping=0.1)
                assert bool(out.isnan().any()) or bool(out.isinf().any())
                assert spoiled == 0 or bool(out.isnan().all())
            arguments = [t.clone() for t in head(rows, 21, 5)]
            arguments[0][-1, -1] = bad
            assert bool(softmax_head_hvp(*arguments).isnan().any())

    def test_reference(self):
        g, x = layer(50, 6, 3)
        with mq.use_backend("reference"):
            forced = damped_gram_solve(g, x, damping=0.1), softmax_head_hvp(*head(50, 6, 3))
        assert error(forced[0], solve_oracle(g, x, 0.1)) < 1e-7
        assert error(forced[1], head_oracle(*head(50, 6, 3))) < 1e-6

    @pytest.mark.parametrize("dtype", DTYPES, ids=name)
    def test_compositions(self, dtype):
        """What a GPU runs, on CPU tensors."""
        g, x = layer(2500, 12, 5, dtype)
        for found, want in zip(products.compose_gram_pair(g, x), products.gram_pair(g, x), strict=True):
            torch.testing.assert_close(
                found, want, rtol=0, atol=float(16 * compute(dtype) * want.abs().max())
            )
        arguments = head(200, 12, 5, dtype)
        allowed = max(8 * rounding(dtype), 1e-14)
        assert error(products.compose_softmax_head_hvp(*arguments), head_oracle(*arguments)) <= allowed


# --- derivatives and tracing ------------------------------------------------------------------------------


def leaves(*tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def solve(g, x, damping):
    return damped_gram_solve(g, x, damping=damping)


@pytest.mark.gradcheck
class TestDerivatives:
    @pytest.mark.parametrize("rows", [3, 12], ids=["dual", "primal"])
    def test_solve(self, rows):
        arguments = leaves(*layer(rows, 5, 2, f64), torch.tensor(0.3, dtype=f64))
        assert torch.autograd.gradcheck(solve, arguments)
        assert torch.autograd.gradgradcheck(solve, arguments)
        assert torch.autograd.gradcheck(solve, arguments, check_forward_ad=True, check_backward_ad=False)

    def test_head(self):
        arguments = leaves(*head(9, 4, 3, f64))
        assert torch.autograd.gradcheck(softmax_head_hvp, arguments)
        assert torch.autograd.gradgradcheck(softmax_head_hvp, arguments)
        assert torch.autograd.gradcheck(
            softmax_head_hvp, arguments, check_forward_ad=True, check_backward_ad=False
        )

    @pytest.mark.parametrize("dtype", [f32, bf16, f16], ids=name)
    def test_narrow_gradients(self, dtype):
        """Gradients in the dtype of their argument, close to those of the definition in float64."""
        for function, arguments in (
            (solve, [*layer(400, 6, 3, dtype), torch.tensor(0.3, dtype=f64)]),
            (softmax_head_hvp, head(300, 6, 5, dtype)),
        ):
            given, exact = leaves(*arguments), leaves(*(t.double() for t in arguments))
            # weights, for the sum over classes is 0; large ones, for float16 has few small numbers
            out, wanted = function(*given), function(*exact)
            weights = 300 * torch.randn(out.shape, dtype=f64, generator=torch.Generator().manual_seed(7))
            found = torch.autograd.grad((out.double() * weights).sum(), given)
            expected = torch.autograd.grad((wanted * weights).sum(), exact)
            for f, e, t in zip(found, expected, arguments, strict=True):
                assert f.dtype == t.dtype and error(f, wide(e)) <= 4e-6 + 8 * rounding(dtype)

    def test_transforms(self):
        g, x = layer(20, 4, 3, f64)
        damping = torch.tensor([0.1, 0.5], dtype=f64)
        mapped = torch.func.vmap(solve, (None, None, 0))(g, x, damping)
        for found, value in zip(mapped, damping, strict=True):
            torch.testing.assert_close(found, solve(g, x, value))
        x, p, G = head(20, 4, 3, f64)
        both = torch.stack([G, 2 * G])
        for function in (softmax_head_hvp, products.softmax_head_hvp):
            mapped = torch.func.vmap(function, (None, None, 0))(x, p, both)
            torch.testing.assert_close(mapped[1], softmax_head_hvp(x, p, 2 * G))
        pairs = torch.func.vmap(products.gram_pair, (None, 1), (0, 0))(g, torch.stack([x, 2 * x], 1))
        torch.testing.assert_close(pairs[1][1], products.gram_pair(g, 2 * x)[1])
        gradient = torch.func.grad(lambda t: softmax_head_hvp(x, p, t).pow(2).sum())(G)
        (expected,) = torch.autograd.grad(softmax_head_hvp(x, p, leaf := leaves(G)[0]).pow(2).sum(), leaf)
        torch.testing.assert_close(gradient, expected)


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
    @pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
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

    def test_head(self, dtype):
        """Values agree; torch's products may take another way through another layout."""
        arguments = head(300, 21, 6, dtype)
        want = softmax_head_hvp(*arguments)
        for j in range(3):
            for kind, t in layouts(arguments[j]).items():
                given = [*arguments[:j], t, *arguments[j + 1 :]]
                found = softmax_head_hvp(*given)
                assert error(found, wide(want)) <= 4 * compute(dtype) + 2 * rounding(dtype), (j, kind)


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
