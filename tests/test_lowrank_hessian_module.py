"""LowRankHessian: the state over the functions of the family, batched for samplers and unbatched for optimisers."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import cases_lowrank as cases
import marquardt as mq
import oracle_lowrank as oracle
from harness import Target, native_only, same_bits
from harness.compare import rows, wide
from lowrank_ops import per_sample

f32, f64 = torch.float32, torch.float64
FORMS = pytest.mark.parametrize("batch_dims", [1, 0], ids=["batched", "unbatched"])
DAMPING, DECAY = 0.3, 0.9
SAMPLE = (4, 5, 6)


def hessian(rank: int = 3, batch_dims: int = 1, **options):
    return mq.LowRankHessian(rank, **{"damping": DAMPING, "decay": DECAY, **options}, batch_dims=batch_dims)


def vectors(count: int, batch_dims: int, target: Target, dtype=f32):
    """Different in each sample, so that a mixed-up state shows."""
    shape = (2, *SAMPLE) if batch_dims else SAMPLE
    generator = torch.Generator().manual_seed(0)
    return [(cases.gaussian(generator, shape) / 11).to(dtype).to(target.device) for _ in range(count)]


def filled(count: int, target: Target, batch_dims: int = 1, rank: int = 3, **options):
    H = hessian(rank, batch_dims, **options)
    for v in vectors(count, batch_dims, target):
        H.update(v)
    return H


@pytest.mark.accuracy
class TestState:
    @FORMS
    def test_follows_the_function(self, target: Target, batch_dims: int):
        """Each update is lowrank_update with the module's rank, decay and weight, in the bits of the state."""
        H = hessian(3, batch_dims, weight=1.5)
        steps = vectors(5, batch_dims, target)
        shape = steps[0].shape
        U = steps[0].new_zeros((*shape[:batch_dims], 0, *SAMPLE))
        s = torch.zeros((*shape[:batch_dims], 0), dtype=f64, device=target.device)
        for v in steps:
            kept = v.clone()
            H.update(v)
            assert same_bits(v, kept)
            U, s = mq.lowrank_update(U, s, v, decay=DECAY, weight=1.5, rank=3, batch_dims=batch_dims)
            # the state may still be growing: rows beyond it are zero
            n = H.s.shape[-1]
            assert n <= 3 and H.U.shape[batch_dims] == n
            torch.testing.assert_close(H.s, s[..., :n], rtol=1e-12, atol=1e-15)
            torch.testing.assert_close(H.U, U.narrow(batch_dims, 0, n), rtol=1e-6, atol=1e-6)
            assert not s[..., n:].any()

    @FORMS
    @pytest.mark.parametrize("count", [0, 1, 2, 3, 7])
    def test_methods(self, target: Target, count: int, batch_dims: int):
        H = filled(count, target, batch_dims)
        g = vectors(9, batch_dims, target)[-1]
        if count:
            arrays = per_sample(g, H.U, H.s, DAMPING, batch_dims)
        else:  # H = λI
            shape = (len(g) if batch_dims else 1, 0, int(np.prod(SAMPLE)))
            arrays = per_sample(g.reshape(shape[0], -1), g.new_zeros(shape), g.new_zeros(shape[:2]), DAMPING)
        for name, variant in (
            ("matvec", oracle.MATVEC),
            ("solve", oracle.SOLVE),
            ("inv_sqrt", oracle.INV_SQRT),
        ):
            out = getattr(H, name)(g)
            assert out.shape == g.shape and out.dtype == g.dtype
            expected = oracle.apply(variant, *arrays)
            gap = oracle.norm(rows(out, batch_dims) - expected)
            assert np.all(gap <= 2e-7 * oracle.norm(expected)), name
        kept = H.solve(g, keep_norm=True)
        torch.testing.assert_close(kept.norm(), g.norm(), rtol=1e-6, atol=0)
        out, info = H.solve(g, check=False, return_info=True)
        assert same_bits(out, H.solve(g)) and info.dtype == torch.int32 and not info.any()
        if count:
            exact = oracle.logdet(*arrays[1:])
            found = np.atleast_1d(wide(H.logdet()))
            assert H.logdet().shape == ((2,) if batch_dims else ())
            assert np.all(np.abs(found - exact) <= 1e-6 * np.abs(exact))
            _, U, s, _ = arrays
            trace = DAMPING * U.shape[2] + (s * (U * U).sum(-1)).sum(-1)
            assert H.trace().shape == ((2,) if batch_dims else ())
            assert np.all(np.abs(np.atleast_1d(wide(H.trace())) - trace) <= 1e-6 * trace)

    def test_buffers_and_no_parameters(self, target: Target):
        H = filled(2, target)
        assert dict(H.named_buffers()).keys() == {"U", "s"} and not list(H.parameters())
        assert H.U.dtype == f32 and H.s.dtype == f64
        assert not H.U.requires_grad and not H.s.requires_grad

    def test_update_keeps_no_graph(self, target: Target):
        """v of a training step requires grad; the state does not."""
        H = hessian()
        v = vectors(1, 1, target)[0].requires_grad_()
        H.update(v)
        assert not H.U.requires_grad and not H.s.requires_grad
        H.solve(v).sum().backward()
        assert v.grad is not None

    def test_rows_are_orthonormal_after_many(self, target: Target):
        H = hessian(4, 0)
        for v in cases.chain("drift", 100, 90):
            H.update(v.to(target.device))
        U = wide(H.U)
        assert np.abs(U @ U.T - np.eye(4)).max() <= 1e-6

    def test_gradient_to_the_argument(self, target: Target):
        H = filled(4, target)
        g = vectors(1, 1, target)[0]
        for name in ("matvec", "solve", "inv_sqrt"):
            leaf = g.clone().requires_grad_()
            out = getattr(H, name)(leaf)
            (found,) = torch.autograd.grad(out, leaf, g)  # the matrix is symmetric
            torch.testing.assert_close(found, getattr(H, name)(g), rtol=1e-5, atol=1e-6)


@pytest.mark.accuracy
class TestStateDict:
    @FORMS
    @pytest.mark.parametrize("count", [0, 1, 5])
    def test_round_trip(self, target: Target, count: int, batch_dims: int):
        H = filled(count, target, batch_dims)
        g = vectors(9, batch_dims, target)[-1]
        fresh = hessian(3, batch_dims)
        fresh.load_state_dict(copy.deepcopy(H.state_dict()))
        assert same_bits(fresh.solve(g), H.solve(g))
        for module in (H, fresh):
            module.update(g)
        assert same_bits(fresh.U, H.U) and same_bits(fresh.s, H.s)

    def test_through_a_file_and_inside_a_module(self, target: Target, tmp_path):
        holder = torch.nn.Module()
        holder.inner = filled(4, target)
        torch.save(holder.state_dict(), tmp_path / "state.pt")
        fresh = torch.nn.Module()
        fresh.inner = hessian()
        fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        g = vectors(1, 1, target)[0]
        assert same_bits(fresh.inner.inv_sqrt(g).cpu(), holder.inner.inv_sqrt(g).cpu())

    def test_over_another_state(self, target: Target):
        """A loaded state replaces one of another size, an empty one too."""
        H, other = filled(4, target), hessian()
        other.update(torch.ones(5, 7, device=target.device))
        other.load_state_dict(H.state_dict())
        assert same_bits(other.U, H.U)
        other.load_state_dict(hessian().state_dict())
        g = torch.ones(2, 9, device=target.device)
        torch.testing.assert_close(other.matvec(g), DAMPING * g)

    def test_state_is_a_copy(self, target: Target):
        H = filled(2, target)
        fresh = hessian()
        fresh.load_state_dict(H.state_dict())
        before = H.U.clone()
        fresh.update(vectors(3, 1, target)[-1])
        assert same_bits(H.U, before)

    def test_deepcopy(self, target: Target):
        H = filled(2, target)
        twin = copy.deepcopy(H)
        twin.update(vectors(3, 1, target)[-1])
        assert not same_bits(twin.s, H.s)


@pytest.mark.errors
class TestRefusals:
    def test_another_shape_dtype_or_batch(self, target: Target):
        H = filled(2, target)
        good = vectors(1, 1, target)[0]
        before = H.U.clone(), H.s.clone()
        for v, word in ((good[:, :2], "shape"), (good[:1], "shape"), (good.double(), "dtype")):
            for method in (H.update, H.solve, H.matvec, H.inv_sqrt):
                if v.dtype == f64 and method != H.update:
                    continue
                with pytest.raises((ValueError, TypeError)):
                    method(v)
            with pytest.raises((ValueError, TypeError)) as raised:
                H.update(v)
            assert "reset" in str(raised.value) and "LowRankHessian" in str(raised.value), word
        assert same_bits(H.U, before[0]) and same_bits(H.s, before[1])

    def test_reset(self, target: Target):
        H = filled(3, target)
        H.reset()
        g = torch.ones(5, 7, device=target.device, dtype=f64)
        torch.testing.assert_close(H.solve(g), g / DAMPING)
        H.update(g)
        assert H.U.dtype == f64 and H.s.shape[0] == 5
        fresh = hessian()
        fresh.update(g)
        assert same_bits(fresh.U, H.U) and same_bits(fresh.s, H.s)

    @pytest.mark.parametrize(
        ("rank", "options", "word"),
        [
            (0, {}, "rank"), (17, {}, "rank"), (3, {"damping": -1.0}, "damping"), (3, {"damping": 0.0}, "damping"),
            (3, {"decay": -0.1}, "decay"), (3, {"weight": -1.0}, "weight"), (3, {"batch_dims": 2}, "batch_dims"),
        ],
    )  # fmt: skip
    def test_bad_settings(self, rank: int, options, word: str):
        """At the latest when they are used."""
        with pytest.raises(ValueError, match=word):
            H = mq.LowRankHessian(rank, **{"damping": 1.0, "decay": 0.9, **options})
            H.update(torch.ones(2, 5))
            H.solve(torch.ones(2, 5))


@pytest.mark.compile
class TestTraced:
    @FORMS
    @pytest.mark.parametrize("method", ["solve", "inv_sqrt", "matvec"])
    def test_fullgraph(self, target: Target, method: str, batch_dims: int):
        native_only()
        torch._dynamo.reset()
        H = filled(4, target, batch_dims)
        g = vectors(9, batch_dims, target)[-1]
        compiled = torch.compile(lambda g: getattr(H, method)(g), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(g), getattr(H, method)(g), rtol=2e-6, atol=2e-6)
        H.update(g)  # the compiled function sees the new state
        torch.testing.assert_close(compiled(g), getattr(H, method)(g), rtol=2e-6, atol=2e-6)

    def test_before_the_first_update(self, target: Target):
        native_only()
        torch._dynamo.reset()
        H, g = hessian(), vectors(1, 1, target)[0]
        compiled = torch.compile(lambda g: H.solve(g), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(g), g / DAMPING)


@pytest.mark.dtypes
@pytest.mark.parametrize("dtype", [f64, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(target: Target, dtype):
    """The state takes the dtype of v, s stays float64."""
    H = hessian()
    for v in vectors(4, 1, target, dtype):
        H.update(v)
    assert H.U.dtype == dtype and H.s.dtype == f64
    g = vectors(1, 1, target, dtype)[0]
    assert H.solve(g).dtype == dtype


@pytest.mark.dtypes
def test_moves_with_the_module(target: Target):
    """.to(device) keeps the numbers."""
    H = filled(3, target)
    g = vectors(1, 1, target)[0]
    before = H.solve(g)
    assert same_bits(H.to(target.device).solve(g), before)
