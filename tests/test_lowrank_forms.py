"""Forms of the arguments of the low-rank family: shared or per sample, layouts, refusals, `check` and `info`."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import cases_lowrank as cases
import oracle_lowrank as oracle
from harness import LAYOUTS, Target, arena, native_only, same_bits
from harness.compare import norm_error, rows
from harness.layouts import promised_strides, same_strides
from lowrank_ops import FIRST, INV_SQRT, MATVEC, NAMES, SOLVE, apply, per_sample

f32, f64 = torch.float32, torch.float64
VARIANTS = pytest.mark.parametrize("variant", [MATVEC, SOLVE, INV_SQRT], ids=NAMES)
DEFINITE = pytest.mark.parametrize("variant", [SOLVE, INV_SQRT], ids=NAMES[1:])
SHAPE = (3, 4, 5, 6)


def make(target: Target, shape=SHAPE, k: int = 3, dtype=f32, seed: int = 0, batch_dims: int = 1):
    """(v, U, s [k])"""
    generator = torch.Generator().manual_seed(seed)
    v, U = cases.problem("gaussian", k, "near")(generator, shape, batch_dims)
    s = torch.linspace(0.5, 1.5, k, dtype=f64)
    return v.to(dtype).to(target.device), U.to(dtype).to(target.device), s.to(target.device)


def right(variant: int, out, v, U, s, damping, batch_dims: int = 1) -> None:
    expected = oracle.apply(variant, *per_sample(v, U, s, damping, batch_dims))
    assert norm_error(out, expected.reshape(v.shape), batch_dims).max(initial=0) <= 2e-7


@pytest.mark.accuracy
class TestShared:
    @VARIANTS
    def test_shared_equals_repeated(self, target: Target, variant: int):
        """U [k, *sample], s [k] and one damping are U, s and damping repeated for each sample."""
        v, U, s = make(target)
        one, batch = U[1], len(v)
        lam = torch.full((batch,), 0.3, dtype=f64, device=target.device)
        plain = apply(
            target, variant, v, one.expand(batch, *one.shape).contiguous(), s.expand(batch, -1), damping=lam
        )
        right(variant, plain, v, one, s, 0.3)
        several = s.expand(batch, -1)
        for basis in (one, one.expand(batch, *one.shape)):
            for weights, damping in (
                (s, 0.3), (s.to(f32), lam), (several, torch.tensor(0.3, dtype=f64)), (several, lam),
                (several.contiguous().to(f32), 0.3),
            ):  # fmt: skip
                out = apply(target, variant, v, basis, weights, damping=damping)
                if target.steady:
                    assert same_bits(out, plain)
                else:
                    right(variant, out, v, one, s, 0.3)

    @VARIANTS
    def test_everything_differs(self, target: Target, variant: int):
        v, U, _ = make(target)
        s = torch.rand(3, 3, dtype=f64, generator=torch.Generator().manual_seed(1)).to(target.device)
        lam = torch.tensor([0.1, 1.0, 7.0], dtype=f64, device=target.device)
        right(variant, apply(target, variant, v, U, s, damping=lam), v, U, s, lam)

    @VARIANTS
    def test_no_s_is_ones(self, target: Target, variant: int):
        v, U, s = make(target)
        out = apply(target, variant, v, U, damping=0.2)
        assert same_bits(out, apply(target, variant, v, U, torch.ones_like(s), damping=0.2))

    @VARIANTS
    def test_gradients_of_what_is_shared(self, target: Target, variant: int):
        """They are sums over the batch, in the shape and dtype of what was given."""
        v, U, s = make(target, dtype=f64)
        wide = [
            U[0].expand(3, *U.shape[1:]).clone(),
            s.expand(3, -1).clone(),
            torch.full((3,), 0.4, dtype=f64),
        ]
        narrow = [U[0].clone(), s.clone(), torch.tensor(0.4, dtype=f64)]
        found = []
        for given in (wide, narrow):
            basis, weights, damping = (t.to(target.device).requires_grad_() for t in given)
            out = apply(target, variant, v, basis, weights, damping=damping)
            found.append(torch.autograd.grad((out * v.cos()).sum(), (basis, weights, damping)))
        for each, total, given in zip(*found, narrow, strict=True):
            assert total.shape == given.shape
            torch.testing.assert_close(each.sum(0), total, rtol=1e-11, atol=1e-11)
        weights = s.to(f32).requires_grad_()
        apply(target, variant, v.float(), U.float(), weights, damping=0.4).sum().backward()
        assert weights.grad.dtype == f32

    @VARIANTS
    def test_unbatched(self, target: Target, variant: int):
        v, U, s = make(target)
        single = apply(target, variant, v[0], U[0], s, damping=0.3, batch_dims=0)
        right(variant, single, v[0], U[0], s, 0.3, 0)
        if target.steady:
            assert same_bits(single, apply(target, variant, v, U, s, damping=0.3)[0])

    @VARIANTS
    def test_empty(self, target: Target, variant: int):
        """No samples, no elements, no rows."""
        for shape in ((0, 4), (3, 0), (0, 0), (0, 2, 3)):
            v = torch.zeros(shape, device=target.device, requires_grad=True)
            for k in (0, 2):
                U = torch.zeros(shape[0], k, *shape[1:], device=target.device, requires_grad=True)
                out = apply(target, variant, v, U, damping=0.5)
                assert out.shape == v.shape and out.dtype == v.dtype
                d_v, d_U = torch.autograd.grad(out.sum(), (v, U), allow_unused=True)
                assert d_v.shape == v.shape and (d_U is None or d_U.shape == U.shape)

    @VARIANTS
    def test_vmap_over_U_alone(self, target: Target, variant: int):
        v, U, s = make(target, (2, 5), dtype=f64)
        stack = torch.stack([U, 1.5 * U, U.flip(1)])
        for dims, given in ((0, stack), (2, stack.movedim(0, 2))):
            found = torch.func.vmap(lambda u: apply(target, variant, v, u, s, damping=0.4), in_dims=dims)(
                given
            )
            for f, u in zip(found, stack, strict=True):
                torch.testing.assert_close(
                    f, apply(target, variant, v, u, s, damping=0.4), rtol=1e-11, atol=1e-12
                )
        shared = torch.func.vmap(lambda u: apply(target, variant, v, u, s, damping=0.4))(stack[:, 0])
        torch.testing.assert_close(
            shared[1], apply(target, variant, v, stack[1, 0], s, damping=0.4), rtol=1e-11, atol=1e-12
        )


@pytest.mark.strides
class TestLayouts:
    """v and U each in any layout: NaN lies between and beside their elements, and must not be read."""

    @VARIANTS
    @pytest.mark.parametrize("which", ["v", "U", "both"])
    @pytest.mark.parametrize("layout", list(LAYOUTS))
    def test_layout(self, target: Target, layout: str, which: str, variant: int):
        v, U, s = make(target)
        first = arena(v, layout if which != "U" else "contiguous")
        basis = arena(U, layout if which != "v" else "contiguous")
        out = apply(target, variant, first.tensor, basis.tensor, s, damping=0.3)
        right(variant, out, first.tensor, basis.tensor, s, 0.3)
        assert same_strides(out, promised_strides(first.tensor))
        assert first.intact() and basis.intact()

    @VARIANTS
    def test_channels_last_sample(self, target: Target, variant: int):
        """Each row of U in the layout of v, as torch.stack of channels_last tensors gives it, and mixed ones."""
        v, U, s = make(target)
        last = v.contiguous(memory_format=torch.channels_last)
        inner = U.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)  # [B, k, H, W, C] in memory
        plain = apply(target, variant, v, U, s, damping=0.3)
        for first in (v, last):
            for basis in (U, inner, inner[1]):
                out = apply(target, variant, first, basis, s, damping=0.3)
                assert out.stride() == first.stride()
                right(variant, out, first, basis, s, 0.3)
                if basis.dim() == 5:
                    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)

    @VARIANTS
    def test_s_of_any_layout(self, target: Target, variant: int):
        v, U, _ = make(target)
        s = torch.rand(3, 3, dtype=f64, generator=torch.Generator().manual_seed(1)).to(target.device)
        lam = torch.tensor([0.1, 1.0, 7.0], dtype=f64, device=target.device)
        plain = apply(target, variant, v, U, s, damping=lam)
        for weights in (s.T.contiguous().T, arena(s, "gaps").tensor, s.repeat(1, 2)[:, :3]):
            assert same_bits(apply(target, variant, v, U, weights, damping=arena(lam, "gaps").tensor), plain)

    @VARIANTS
    def test_ragged_and_misaligned(self, target: Target, variant: int):
        for size in (1, 2, 3, 5, 7, 9, 15, 17, 31, 33, 63, 65, 127, 129, 2047, 2048, 2049, 4097):
            v, U, s = make(target, (2, size))
            first, basis = arena(v, "misaligned"), arena(U, "misaligned")
            out = apply(target, variant, first.tensor, basis.tensor, s, damping=0.3)
            right(variant, out, v, U, s, 0.3)


@pytest.mark.errors
class TestIndefinite:
    """H that is not positive definite: an error on the CPU in eager mode, else NaN and `info` in that sample alone."""

    def _bad(self, target: Target, dtype=f32):
        """Sample 1 of three has an eigenvalue −0.5."""
        v, U, _ = make(target, (3, 40), 2, dtype)
        U = (U / U.norm(dim=2, keepdim=True)).contiguous()
        s = torch.tensor([[1.0, 0.5], [-1.5, 0.0], [-0.4, -0.4]], dtype=f64, device=target.device)
        return v, U, s

    @DEFINITE
    def test_error_names_the_sample(self, target: Target, variant: int):
        v, U, s = self._bad(target)
        if target.device != "cpu":
            assert bool(apply(target, variant, v, U, s, damping=1.0)[1].isnan().all())
            return
        with pytest.raises(ValueError) as raised:
            apply(target, variant, v, U, s, damping=1.0)
        for word in (NAMES[variant], "positive definite", "sample 1"):
            assert word in str(raised.value)
        with pytest.raises(ValueError, match="positive definite"):
            apply(target, variant, v[1], U[1], s[1], damping=1.0, batch_dims=0)

    @DEFINITE
    @pytest.mark.parametrize("dtype", [f32, f64, torch.bfloat16], ids=str)
    def test_nan_and_info(self, target: Target, variant: int, dtype):
        v, U, s = self._bad(target, dtype)
        out, info = apply(target, variant, v, U, s, damping=1.0, check=False, return_info=True)
        assert info.dtype == torch.int32 and info.shape == (3,) and info.device == v.device
        assert int(info[1]) > 0 and int(info[0]) == int(info[2]) == 0
        assert bool(out[1].isnan().all()) and not bool(out[[0, 2]].isnan().any())
        good = s.clone()
        good[1] = 1.0
        clean = apply(target, variant, v, U, good, damping=1.0)
        assert same_bits(out[[0, 2]], clean[[0, 2]])
        assert same_bits(apply(target, variant, v, U, s, damping=1.0, check=False), out)
        _, none = apply(target, variant, v, U, good, damping=1.0, return_info=True)
        assert not bool(none.any())

    @DEFINITE
    def test_gradients_stay_alone(self, target: Target, variant: int):
        v, U, s = self._bad(target)
        leaves = [t.clone().requires_grad_() for t in (v, U, s)]
        apply(target, variant, *leaves, damping=1.0, check=False).sum().backward()
        for leaf in leaves:
            assert bool(leaf.grad[[0, 2]].isfinite().all())

    @DEFINITE
    def test_singular_is_not_definite(self, target: Target, variant: int):
        """λ + s‖u‖² = 0 in exact numbers."""
        U = torch.zeros(1, 1, 8, device=target.device)
        U[0, 0, 0] = 2.0
        s = torch.tensor([-0.25], dtype=f64, device=target.device)
        v = torch.ones(1, 8, device=target.device)
        out, info = apply(target, variant, v, U, s, damping=1.0, check=False, return_info=True)
        assert int(info[0]) > 0 and bool(out.isnan().all())

    def test_negative_but_cancelled(self, target: Target):
        """Negative s on a row that a duplicate makes up for: H is definite though its Gram matrix is singular."""
        v, U, _ = make(target, (2, 40), 2)
        U[:, 1] = U[:, 0]
        s = torch.tensor([-50.0, 51.0], dtype=f64, device=target.device)
        for variant in (MATVEC, SOLVE, INV_SQRT):
            right(variant, apply(target, variant, v, U, s, damping=0.5), v, U, s, 0.5)

    @VARIANTS
    @pytest.mark.parametrize("poison", [math.nan, math.inf], ids=["nan", "inf"])
    def test_bad_numbers_stay_in_their_sample(self, target: Target, variant: int, poison: float):
        """In v or in U: no error, NaN there (wherever the number reaches), not a bit elsewhere."""
        v, U, s = make(target, (3, 40))
        clean = apply(target, variant, v, U, s, damping=0.5)
        for j in range(2):
            given = [v.clone(), U.clone()]
            given[j][1].view(-1)[2] = poison
            out = apply(target, variant, *given, s, damping=0.5)
            assert same_bits(out[[0, 2]], clean[[0, 2]])
            if math.isnan(poison):
                assert bool(out[1].isnan().all())
            else:
                assert not bool(out[1].isfinite().all())

    @VARIANTS
    def test_bad_s(self, target: Target, variant: int):
        """NaN in the s of one sample is data, as an update of bad data leaves it; shared NaN, and Inf, are refused."""
        v, U, s = make(target, (3, 40))
        s = s.expand(3, -1).contiguous()
        bad = s.clone()
        bad[1, 0] = math.nan
        out = apply(target, variant, v, U, bad, damping=0.5)
        assert bool(out[1].isnan().all())
        assert same_bits(out[[0, 2]], apply(target, variant, v, U, s, damping=0.5)[[0, 2]])
        if target.device == "cpu":
            for refused in (bad[1], torch.where(bad.isnan(), math.inf, bad)):
                with pytest.raises(ValueError, match=r"\bs\b.*(nan|inf)"):
                    apply(target, variant, v, U, refused, damping=0.5)

    @DEFINITE
    def test_no_error_in_a_trace(self, target: Target, variant: int):
        native_only()
        torch._dynamo.reset()
        v, U, s = self._bad(target)

        def step(v, U, s):
            return apply(target, variant, v, U, s, damping=1.0)

        with target():
            out = torch.compile(step, fullgraph=True, backend="aot_eager")(v, U, s)
        assert bool(out[1].isnan().all()) and not bool(out[[0, 2]].isnan().any())
        mapped = torch.func.vmap(lambda s: apply(target, variant, v, U, s, damping=1.0))(s[None])
        assert bool(mapped[0, 1].isnan().all())


REFUSALS = {
    # name: (change of the arguments, exception, words)
    "U-text": (lambda v, U, s, o: (v, "text", s, o), TypeError, ("U", "str")),
    "U-int": (lambda v, U, s, o: (v, U.long(), s, o), TypeError, ("U", "int64")),
    "U-sparse": (lambda v, U, s, o: (v, U.to_sparse(), s, o), TypeError, ("U", "sparse")),
    "U-float64": (lambda v, U, s, o: (v, U.double(), s, o), TypeError, ("U", "float64", "float32")),
    "U-wider": (lambda v, U, s, o: (v.bfloat16(), U, s, o), TypeError, ("U", "float32", "bfloat16")),
    "U-meta": (lambda v, U, s, o: (v, U.to("meta"), s, o), ValueError, ("U", "meta")),
    "U-sample": (lambda v, U, s, o: (v, U[..., :-1], s, o), ValueError, ("U", "[3, 3, 4, 5]", "[3, 4, 6]")),
    "U-batch": (lambda v, U, s, o: (v, U[:2], s, o), ValueError, ("U", "[2, 3, 4, 6]", "[3, 4, 6]")),
    "U-dims": (lambda v, U, s, o: (v, U[0, 0, 0], s, o), ValueError, ("U", "[6]")),
    "U-seventeen": (lambda v, U, s, o: (v, U[:, :1].expand(3, 17, 4, 6), None, o), ValueError, ("U", "16", "17")),
    "v-list": (lambda v, U, s, o: ([1.0], U, s, o), TypeError, ("list",)),
    "v-int": (lambda v, U, s, o: (v.int(), U, s, o), TypeError, ("int32",)),
    "s-number": (lambda v, U, s, o: (v, U, 2.0, o), TypeError, ("s", "float")),
    "s-int": (lambda v, U, s, o: (v, U, s.long(), o), TypeError, ("s", "int64")),
    "s-short": (lambda v, U, s, o: (v, U, s[:2], o), ValueError, ("s", "[2]")),
    "s-batch": (lambda v, U, s, o: (v, U, s.expand(2, 3), o), ValueError, ("s", "[2, 3]")),
    "s-meta": (lambda v, U, s, o: (v, U, s.to("meta"), o), ValueError, ("s", "meta")),
    "damping-negative": (lambda v, U, s, o: (v, U, s, {"damping": -0.5}), ValueError, ("damping", "-0.5")),
    "damping-nan": (lambda v, U, s, o: (v, U, s, {"damping": math.nan}), ValueError, ("damping", "nan")),
    "damping-inf": (lambda v, U, s, o: (v, U, s, {"damping": math.inf}), ValueError, ("damping", "inf")),
    "damping-0-dim": (lambda v, U, s, o: (v, U, s, {"damping": torch.tensor(-2.0)}), ValueError, ("damping", "-2")),
    "damping-batch": (lambda v, U, s, o: (v, U, s, {"damping": torch.ones(2)}), ValueError, ("damping", "[2]")),
    "damping-text": (lambda v, U, s, o: (v, U, s, {"damping": "x"}), TypeError, ("damping",)),
    "batch_dims": (lambda v, U, s, o: (v, U, s, {**o, "batch_dims": 2}), ValueError, ("batch_dims", "2")),
}  # fmt: skip


@pytest.mark.errors
class TestRefusals:
    @VARIANTS
    @pytest.mark.parametrize("name", list(REFUSALS))
    def test_declared(self, target: Target, variant: int, name: str):
        change, error, words = REFUSALS[name]
        *given, options = change(*make(target, (3, 4, 6)), {"damping": 0.5})
        with pytest.raises(error) as raised:
            apply(target, variant, *given, **options)
        message = str(raised.value)
        for word in (NAMES[variant], *words):
            assert word in message, f"{word!r} is missing in: {message}"

    @VARIANTS
    def test_zero_damping(self, target: Target, variant: int):
        """λ = 0 is a product like any other, but no inverse is promised."""
        v, U, s = make(target)
        if variant == MATVEC:
            right(variant, apply(target, variant, v, U, s, damping=0.0), v, U, s, 0.0)
            return
        with pytest.raises(ValueError, match="damping"):
            apply(target, variant, v, U, s, damping=0.0)

    def test_first_argument_is_named(self, target: Target):
        for variant in (MATVEC, SOLVE, INV_SQRT):
            with pytest.raises(TypeError, match=rf"\b{FIRST[variant]}\b"):
                apply(target, variant, 3.0, torch.ones(1, 1, 4), damping=1.0)


@pytest.mark.determinism
class TestSixteen:
    """k = 16 over batch size, position and thread count; the suite has smaller ones."""

    @VARIANTS
    def test_bits(self, target: Target, variant: int):
        if not target.steady:
            pytest.skip("the reference reduces whole batches")
        v, U, s = make(target, (3, 9001), 16)
        whole = apply(target, variant, v, U, s, damping=0.1)
        for b in range(3):
            assert same_bits(apply(target, variant, v[b : b + 1], U[b : b + 1], s, damping=0.1)[0], whole[b])
        before = torch.get_num_threads()
        try:
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                assert same_bits(apply(target, variant, v, U, s, damping=0.1), whole)
        finally:
            torch.set_num_threads(before)

    def test_keep_norm_keeps_it(self, target: Target):
        v, U, s = make(target, (3, 9001), 16)
        v[1] = 0
        out = apply(target, SOLVE, v, U, s, damping=1e-3, keep_norm=True)
        assert bool((out[1] == 0).all())
        found, given = (oracle.norm(rows(t)) for t in (out, v))
        assert np.abs(found - given).max() <= 2e-7 * given.max()
