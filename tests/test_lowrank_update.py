"""lowrank_update: the best factors of decay·U diag(s) Uᵀ + weight·v vᵀ, once and a thousand times."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cases_lowrank as cases
import marquardt as mq
import oracle_lowrank as oracle
from harness import Target, arena, native_only, same_bits
from harness.compare import wide

f32, f64 = torch.float32, torch.float64
FLOOR = 1e-6


def update(target: Target, U, s, v, **options):
    with target():
        return mq.lowrank_update(U, s, v, **{"decay": 0.9, **options})


def arrays(*tensors):
    """Rows [n, D], and s or v flat, for the oracle."""
    return [wide(t).reshape(*t.shape[:1], -1) if t.dim() > 1 else wide(t) for t in tensors]


def judge(U, s, v, found_U, found_s, decay, weight=1.0, rank=None, dtype=f32) -> None:
    """One sample, U [k, D]: form, order, orthogonality, signs, and the matrix to 1e-6 of the eigenproblem."""
    k = U.shape[0]
    rank = k if rank is None else rank
    assert found_U.shape == (rank, *U.shape[1:]) and found_s.shape == (rank,)
    assert found_U.dtype == v.dtype and found_s.dtype == f64
    v = wide(v).reshape(-1)
    U, rows = wide(U).reshape(k, len(v)), wide(found_U).reshape(rank, len(v))
    values = wide(found_s)
    spectrum = oracle.updated(U, wide(s), v, decay, weight)
    best, basis = spectrum.values[:rank], spectrum.rows[:rank]
    size = oracle.norm(np.append(spectrum.values, 0))
    rounding = {f32: 1.0, f64: 1e-6}.get(dtype, float(torch.finfo(dtype).eps) / FLOOR)
    floor = FLOOR * rounding

    assert np.all(values >= 0) and np.all(np.diff(values) <= 0)
    zero = values == 0
    assert not rows[zero].any(), "where s' = 0 the row is zero"
    largest = values.max(initial=0)
    assert np.all(values[~zero] >= 0.99e-12 * largest)
    expected = np.zeros(rank, oracle.LD)
    expected[: len(best)] = np.where(best > 1e-12 * max(best.max(initial=0), 0), best, 0)
    assert np.all(np.abs(values - expected) <= floor * max(expected.max(initial=0), 1e-300)), "s'"
    if values[~zero].size and values[~zero].min() >= 1e-10 * largest:
        kept = rows[~zero]
        assert np.abs(kept @ kept.T - np.eye(len(kept))).max(initial=0) <= floor, "orthonormal rows"
    # Where eigenvalues at the cut coincide the best factors are not unique, but how much they leave out is.
    left = oracle.distance(rows, values, np.concatenate([v[None], U]), np.append(weight, decay * wide(s)))
    least = oracle.norm(np.append(spectrum.values[rank:], 0))
    assert left <= least + floor * size, "the best approximation"
    following = np.append(spectrum.values, 0)[len(best)]
    gap = (best[-1] - following) / size if len(best) and size > 0 else 0
    if gap > 1e-2:
        assert oracle.distance(rows, values, basis, expected[: len(best)]) <= floor / min(gap, 1) * size
        for i, row in enumerate(rows[: len(best)]):
            clear = np.abs(np.delete(spectrum.values, i) - best[i]).min(initial=size) > 1e-2 * best[0]
            if clear and values[i] > 1e-6 * largest:
                sign(spectrum, i, row)


def sign(spectrum, i: int, row: np.ndarray) -> None:
    """The coefficient of largest magnitude is positive, where one is clearly the largest."""
    c = spectrum.coefficients[i]
    order = np.argsort(-np.abs(c))
    if len(c) > 1 and np.abs(c[order[1]]) > 0.99 * np.abs(c[order[0]]):
        return
    positive = spectrum.rows[i] * np.sign(c[order[0]])
    assert (positive @ row) > 0, f"the sign of row {i}"


def start(kind: str, k: int, size: int, dtype=f32, seed=0):
    """(U [k, D], s [k], v [D])"""
    v, U = cases.problem(kind, k, condition=1e4)(torch.Generator().manual_seed(seed), (size,), 0)
    s = torch.linspace(2.0, 0.5, k, dtype=f64)
    return U.to(dtype), s, (v / size**0.5).to(dtype)


@pytest.mark.accuracy
class TestValue:
    @pytest.mark.parametrize("kind", ["gaussian", "orthonormal", "conditioned", "duplicates"])
    @pytest.mark.parametrize("k", [0, 1, 2, 4, 5, 15, 16])
    def test_one_update(self, target: Target, k: int, kind: str):
        for size in (1, 7, 252):
            U, s, v = start(kind, k, size)
            for rank in {max(k - 1, 1), k, min(k + 1, 16), min(k + 3, 16)} - {0}:
                given = (t.to(target.device) for t in (U, s, v))
                found = update(target, *given, decay=0.7, weight=1.5, rank=rank, batch_dims=0)
                judge(U, s, v, *(t.cpu() for t in found), 0.7, 1.5, rank)

    @pytest.mark.parametrize("dtype", [f64, torch.bfloat16, torch.float16], ids=str)
    def test_dtypes(self, target: Target, dtype):
        U, s, v = start("gaussian", 4, 300, dtype)
        found = update(target, *(t.to(target.device) for t in (U, s, v)), batch_dims=0)
        judge(U, s, v, *(t.cpu() for t in found), 0.9, dtype=dtype)

    @pytest.mark.parametrize("model", [torch.bfloat16, torch.float16], ids=str)
    def test_narrow_basis(self, target: Target, model):
        """The state's dtype wins: rows as orthonormal as float32 has them."""
        U, s, v = start("gaussian", 4, 300)
        U = U.to(model)
        found = update(target, *(t.to(target.device) for t in (U, s, v)), batch_dims=0)
        judge(U, s, v, *(t.cpu() for t in found), 0.9)

    def test_batched_shared_and_scalars(self, target: Target):
        """[B] decay and weight, U and s shared by the batch or not: each sample is its own problem."""
        made = [start("gaussian", 3, 60, seed=b) for b in range(3)]
        U, s, v = (torch.stack(column).view(3, *column[0].shape) for column in zip(*made, strict=True))
        decay, weight = (torch.tensor(x, dtype=f64) for x in ([0.9, 0.0, 1.0], [1.0, 2.0, 0.0]))
        shape = (4, 5, 3)
        given = [t.to(target.device) for t in (U.view(3, 3, *shape), s, v.view(3, *shape), decay, weight)]
        found_U, found_s = update(target, *given[:3], decay=given[3], weight=given[4])
        assert found_U.shape == (3, 3, *shape) and found_s.shape == (3, 3)
        for b in range(3):
            one = found_U[b].reshape(3, 60).cpu(), found_s[b].cpu()
            judge(U[b], s[b], v[b], *one, float(decay[b]), float(weight[b]))
        shared_U, shared_s = update(
            target, given[0][0], given[1][0], given[2], decay=given[3], weight=given[4]
        )
        assert shared_U.shape == (3, 3, *shape)
        for b in range(3):
            one = shared_U[b].reshape(3, 60).cpu(), shared_s[b].cpu()
            judge(U[0], s[0], v[b], *one, float(decay[b]), float(weight[b]))

    def test_zero(self, target: Target):
        """Nothing in, nothing out: zero rows, s' = 0, no NaN."""
        U, s, v = torch.zeros(2, 3, 8), torch.ones(2, 3, dtype=f64), torch.zeros(2, 8)
        found_U, found_s = update(target, *(t.to(target.device) for t in (U, s, v)))
        assert not found_U.any() and not found_s.any()
        found_U, found_s = update(
            target, U.to(target.device), 0 * s.to(target.device), v.to(target.device) + 1
        )
        torch.testing.assert_close(found_s[:, 0].cpu(), torch.full((2,), 8.0, dtype=f64), rtol=1e-14, atol=0)
        assert not found_s[:, 1:].any() and not found_U[:, 1:].any()
        torch.testing.assert_close(found_U[:, 0].cpu(), torch.full((2, 8), 8**-0.5))

    def test_empty(self, target: Target):
        U, s = torch.zeros(0, 2, 5, device=target.device), torch.zeros(0, 2, dtype=f64, device=target.device)
        found_U, found_s = update(target, U, s, torch.zeros(0, 5, device=target.device), rank=3)
        assert found_U.shape == (0, 3, 5) and found_s.shape == (0, 3)

    def test_tiny_and_huge(self, target: Target):
        """Scale is carried by s' alone."""
        for scale in (1e-15, 1e12):
            U, s, v = start("gaussian", 3, 100)
            v, s = v * scale, s * scale**2
            found = update(target, *(t.to(target.device) for t in (U, s, v)), batch_dims=0)
            judge(U, s, v, *(t.cpu() for t in found), 0.9)

    def test_nan_stays_alone(self, target: Target):
        made = [start("gaussian", 3, 60, seed=b) for b in range(3)]
        U, s, v = (torch.stack(column).to(target.device) for column in zip(*made, strict=True))
        clean = update(target, U, s, v)
        for j in range(2):
            spoiled = [U.clone(), v.clone()]
            spoiled[j][1].view(-1)[7] = math.nan
            found_U, found_s = update(target, spoiled[0], s, spoiled[1])
            for b in (0, 2):
                assert same_bits(found_U[b], clean[0][b]) and same_bits(found_s[b], clean[1][b])
            assert bool(found_s[1].isnan().any()) and bool(found_U[1].isnan().any())


@pytest.mark.accuracy
class TestChain:
    """1000 updates, each a rounding of the rows: the state stays a good eigendecomposition."""

    @pytest.mark.parametrize("kind", ["drift", "subspace", "same", "spread"])
    @pytest.mark.parametrize("rank", [4, 16])
    def test_thousand(self, target: Target, kind: str, rank: int):
        # the definition has no state of its own to lose: a tenth shows the same
        steps = cases.chain(kind, 1000 if target.backend != "reference" else 100, 120)
        U, s = torch.zeros(0, 120, device=target.device), torch.zeros(0, dtype=f64, device=target.device)
        for i, v in enumerate(steps):
            before, weights = U, s
            U, s = update(target, U, s, v.to(target.device), decay=0.9, rank=rank, batch_dims=0)
            if i < 5 or i % 100 == 99:
                judge(*(t.cpu() for t in (before, weights)), v, U.cpu(), s.cpu(), 0.9, rank=rank)
        kept = wide(U)[(s > 0).cpu().numpy()]
        if float(s[s > 0].min()) >= 1e-10 * float(s.max()):
            assert np.abs(kept @ kept.T - np.eye(len(kept))).max() <= FLOOR
        if kind in ("subspace", "same"):  # nothing was truncated: the state is the whole weighted sum
            whole = np.zeros((120, 120), oracle.LD)
            for j, v in enumerate(reversed(steps[-400:])):  # 0.9⁴⁰⁰ = 5e-19
                whole += oracle.LD(0.9) ** j * np.outer(wide(v), wide(v))
            found = (wide(U).T * wide(s)) @ wide(U)
            gap = np.sqrt(((found - whole) ** 2).sum() / (whole**2).sum())
            assert gap <= FLOOR, f"{float(gap):.3g}"


@pytest.mark.errors
class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "error", "words"),
        [
            (lambda U, s, v: ((U, -s, v), {}), ValueError, ("s", "-")),
            (lambda U, s, v: ((U, s, v), {"decay": -0.5}), ValueError, ("decay", "-0.5")),
            (lambda U, s, v: ((U, s, v), {"decay": math.nan}), ValueError, ("decay", "nan")),
            (lambda U, s, v: ((U, s, v), {"weight": -1.0}), ValueError, ("weight", "-1")),
            (lambda U, s, v: ((U, s, v), {"rank": 17}), ValueError, ("rank", "17")),
            (lambda U, s, v: ((U, s, v), {"rank": -1}), ValueError, ("rank", "-1")),
            (lambda U, s, v: ((U, s[:1], v), {}), ValueError, ("s", "[1]")),
            (lambda U, s, v: ((U[..., 1:], s, v), {}), ValueError, ("U",)),
            (lambda U, s, v: ((U.double(), s, v), {}), TypeError, ("U", "float64", "float32")),
            (lambda U, s, v: ((U, s, v.int()), {}), TypeError, ("v", "int32")),
            (lambda U, s, v: ((U, s, v), {"batch_dims": 3}), ValueError, ("batch_dims", "3")),
        ],
    )  # fmt: skip
    def test_declared(self, target: Target, change, error, words):
        U, s, v = torch.ones(2, 3, 9), torch.ones(3), torch.ones(2, 9)
        given, options = change(*(t.to(target.device) for t in (U, s, v)))
        with pytest.raises(error) as raised:
            update(target, *given, **options)
        for word in ("lowrank_update", *words):
            assert word in str(raised.value), f"{word!r} is missing in: {raised.value}"

    def test_no_gradient(self, target: Target):
        """Calling it is fine; asking for the derivative is not."""
        for which in range(3):
            given = [t.to(target.device) for t in start("gaussian", 3, 30)]
            given[which].requires_grad_()
            found_U, found_s = update(target, *given, batch_dims=0)
            for out in (found_U, found_s):
                with pytest.raises((RuntimeError, NotImplementedError)) as raised:
                    out.sum().backward(retain_graph=True)
                assert "lowrank_update" in str(raised.value) and "differentiable" in str(raised.value)
            with torch.no_grad():
                assert not update(target, *given, batch_dims=0)[0].requires_grad


@pytest.mark.determinism
class TestBits:
    def test_batch_position_threads(self, target: Target):
        if not target.steady:
            pytest.skip("the reference reduces whole batches")
        made = [start("gaussian", 4, 9001, seed=b) for b in range(3)]
        U, s, v = (torch.stack(column).to(target.device) for column in zip(*made, strict=True))
        whole = update(target, U, s, v, rank=5)
        before = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                again = update(target, U, s, v, rank=5)
                assert all(same_bits(a, b) for a, b in zip(again, whole, strict=True))
        finally:
            torch.set_num_threads(before)
        for b in range(3):
            alone = update(target, U[b], s[b], v[b], rank=5, batch_dims=0)
            assert all(same_bits(a, w[b]) for a, w in zip(alone, whole, strict=True))

    def test_sign_is_repeatable(self, target: Target):
        """The negated v is the same matrix with coefficients of v negated: rows differ by sign at most."""
        U, s, v = (t.to(target.device) for t in start("gaussian", 4, 300))
        (a, s_a), (b, s_b) = (update(target, U, s, x, batch_dims=0) for x in (v, -v))
        torch.testing.assert_close(s_a, s_b, rtol=1e-12, atol=0)
        torch.testing.assert_close((a * b).sum(1).abs(), torch.ones_like(a[:, 0]), rtol=1e-5, atol=1e-5)


@pytest.mark.strides
@pytest.mark.parametrize(
    "layout", ["misaligned", "gaps", "cropped", "transposed", "reversed", "channels_last"]
)
def test_layout(target: Target, layout: str):
    v, U = cases.problem("gaussian", 3)(torch.Generator().manual_seed(0), (2, 4, 5, 6), 1)
    v, U = (v / 11).float().to(target.device), U.float().to(target.device)
    s = torch.tensor([1.0, 0.5, 0.25], dtype=f64, device=target.device)
    for which in ("v", "U", "both"):
        first = arena(v, layout if which != "U" else "contiguous")
        basis = arena(U, layout if which != "v" else "contiguous")
        found_U, found_s = update(target, basis.tensor, s, first.tensor)
        for b in range(2):
            one = found_U[b].reshape(3, 120).cpu(), found_s[b].cpu()
            judge(U[b].reshape(3, 120).cpu(), s.cpu(), v[b].reshape(120).cpu(), *one, 0.9)
        assert first.intact() and basis.intact()


@pytest.mark.opcheck
def test_opcheck():
    native_only()
    operator = torch.ops.marquardt.lowrank_update.default
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    for arguments in (
        (randn(2, 3, 4), randn(2, 2, 3, 4), torch.tensor([0.9, 1.0, 2.0, 1.0], dtype=f64), 2, 1),
        (randn(2, 12), randn(2, 2, 12), torch.rand(2, 4, dtype=f64, generator=generator), 3, 1),
        (randn(2, 12), randn(3, 12), torch.rand(5, dtype=f64, generator=generator), 2, 1),
        (randn(12), randn(2, 12), torch.rand(4, dtype=f64, generator=generator), 3, 0),
        (randn(0, 12), randn(0, 1, 12), torch.rand(3, dtype=f64, generator=generator), 4, 1),
    ):
        # no autograd registration test: the operator refuses derivatives
        utils = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        result = torch.library.opcheck(operator, arguments, test_utils=utils, raise_exception=True)
        assert set(result.values()) == {"SUCCESS"}, result


@pytest.mark.compile
def test_compile(target: Target):
    native_only()
    torch._dynamo.reset()
    given = [t.to(target.device) for t in start("gaussian", 3, 30)]

    def step(U, s, v):
        return update(target, U, s, v, rank=4, batch_dims=0)

    eager, traced = step(*given), torch.compile(step, fullgraph=True, backend="aot_eager")(*given)
    for a, b in zip(eager, traced, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-6, atol=1e-6)
