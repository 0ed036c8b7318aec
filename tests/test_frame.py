"""The frame engine itself: Gram and apply, with prologue, clamp and virtual rows."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import cases
import marquardt  # noqa: F401  (registers the operators)
import oracle
from harness import arena, assert_within, native_only, same_bits
from harness.compare import rows

f32, f64 = torch.float32, torch.float64
COUNTS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 16)
DTYPES = (f32, f64, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _native():
    native_only()


def streams(count: int, shape=(3, 5, 7), dtype=f32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    base = cases.gaussian(generator, shape)
    # neighbouring vectors are nearly parallel, as outputs of neighbouring steps are
    return [(base + 0.1 * j * cases.gaussian(generator, shape)).to(dtype) for j in range(count)]


def gram(tensors, prologue=None, clamp=None, seed=None, ones=False, exact=False, batch_dims=1):
    return torch.ops.marquardt._frame_gram(tensors, prologue, clamp, seed, ones, exact, batch_dims)


def apply(tensors, C, prologue=None, clamp=None, seed=None, ones=False, batch_dims=1):
    return torch.ops.marquardt._frame_apply(tensors, C, prologue, clamp, seed, ones, batch_dims)


def expected_rows(tensors, prologue=None, clamp=None, seed=None, ones=False, batch_dims=1):
    noise = None
    if seed is not None:
        batch = tensors[0].shape[0] if batch_dims else 1
        noise = oracle.noise_like(tuple(tensors[0].shape), seed.numpy(), batch_dims).reshape(batch, -1)
    L, bounds = (None if t is None else t.numpy() for t in (prologue, clamp))
    return oracle.frame_rows([rows(t, batch_dims) for t in tensors], L, bounds, ones, noise)


def unit(dtype: torch.dtype) -> float:
    """One rounding of the compute type."""
    return torch.finfo(f64 if dtype == f64 else f32).eps


def check_gram(found, expected_vectors, dtype, steps=1.0):
    """Each entry within a few roundings of ‖row_i‖‖row_j‖."""
    expected = oracle.frame_gram(expected_vectors)
    norms = np.sqrt(oracle.dot(expected_vectors, expected_vectors))
    assert_within(found, expected, 4 * steps * unit(dtype) * norms[:, :, None] * norms[:, None, :], "gram")
    assert same_bits(found, found.transpose(1, 2).contiguous()), "a Gram matrix is symmetric"


def check_apply(found, expected_vectors, C, dtype, steps=1.0, store=True):
    """Each output within a few roundings of Σ|c_i||row_i|."""
    C = C.numpy()
    sizes = oracle.frame_apply(np.abs(expected_vectors), np.abs(C))
    for out, expected, size in zip(found, oracle.frame_apply(expected_vectors, C), sizes, strict=True):
        own = torch.finfo(dtype).eps / 2 * np.abs(expected) if store else 0
        assert_within(rows(out), expected, 4 * steps * unit(dtype) * size + own + 1e-12, "apply")


@pytest.mark.accuracy
class TestEngine:
    @pytest.mark.parametrize("count", COUNTS)
    def test_gram(self, count: int):
        for dtype in DTYPES:
            tensors = streams(count, dtype=dtype)
            found = gram(tensors)
            assert found.shape == (3, count, count) and found.dtype == f64
            check_gram(found, expected_rows(tensors), dtype)

    @pytest.mark.parametrize("count", COUNTS)
    def test_exact_gram(self, count: int):
        """Products in float64: what a solve needs."""
        for dtype in DTYPES:
            tensors = streams(count, (2, 3000), dtype)
            check_gram(gram(tensors, exact=True), expected_rows(tensors), f64, steps=4.0)

    @pytest.mark.parametrize("count", COUNTS)
    def test_apply(self, count: int):
        generator = torch.Generator().manual_seed(1)
        for dtype, outputs, per_sample in itertools.product(DTYPES, (1, 2, count + 1), (False, True)):
            tensors = streams(count, dtype=dtype)
            C = torch.randn((*((3,) if per_sample else ()), outputs, count), dtype=f64, generator=generator)
            found = apply(tensors, C)
            assert len(found) == outputs
            assert all(t.dtype == dtype and t.shape == tensors[0].shape for t in found)
            check_apply(found, expected_rows(tensors), C, dtype, steps=count)

    @pytest.mark.parametrize("per_sample", [False, True], ids=["shared", "per-sample"])
    @pytest.mark.parametrize("clamped", [False, True], ids=["free", "clamped"])
    @pytest.mark.parametrize(("ones", "noisy"), list(itertools.product([False, True], repeat=2)), ids=str)
    def test_prologue(self, per_sample: bool, clamped: bool, ones: bool, noisy: bool):
        """Rows are linear in the vectors, virtual ones among them, and may be clamped one by one."""
        generator = torch.Generator().manual_seed(2)
        seed = torch.tensor([3, 4]) if noisy else None
        for dtype, (inputs, k) in itertools.product((f32, f64), ((2, 2), (3, 2), (2, 4), (7, 5))):
            tensors = streams(inputs, dtype=dtype)
            vectors = inputs + ones + noisy
            L = torch.randn((*((3,) if per_sample else ()), k, vectors), dtype=f64, generator=generator)
            clamp = None
            if clamped:
                clamp = torch.tensor([[-0.5, 0.5], *[[-float("inf"), float("inf")]] * (k - 1)], dtype=f64)
            expected = expected_rows(tensors, L, clamp, seed, ones)
            # normals may be 4 ulp of float32 off
            found_type = f32 if noisy else dtype
            check_gram(gram(tensors, L, clamp, seed, ones), expected, found_type, steps=8.0 * vectors)
            C = torch.randn(2, k, dtype=f64, generator=generator)
            size = oracle.frame_apply(
                np.abs(expected_rows(tensors, L.abs(), None, seed, ones)), np.abs(C.numpy())
            )
            for out, e, s in zip(
                apply(tensors, C, L, clamp, seed, ones),
                oracle.frame_apply(expected, C.numpy()),
                size,
                strict=True,
            ):
                margin = 8 * vectors * unit(found_type) * (np.abs(s) + 10)
                assert_within(rows(out), e, margin, "apply")

    def test_residual_prologue_keeps_digits(self):
        """‖p − ε‖² of nearly equal vectors: the prologue subtracts before it multiplies."""
        generator = torch.Generator().manual_seed(3)
        eps, prev = (t.to(f32) for t in cases.correlated(generator, (2, 4000), 0.99999999))
        L = torch.tensor([[1.0, 0.0], [-1.0, 1.0]], dtype=f64)
        found = gram([eps, prev], L)[:, 1, 1]
        exact = ((prev.double() - eps.double()) ** 2).sum(1)
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=0)

    def test_most_vectors(self):
        """18 vectors in, 17 out: the bounds of the engine."""
        tensors = streams(16)
        seed = torch.tensor([1, 2])
        expected = expected_rows(tensors, seed=seed, ones=True)
        found = gram(tensors, seed=seed, ones=True)
        assert found.shape == (3, 18, 18)
        check_gram(found, expected, f32, steps=4.0)
        C = torch.randn(17, 18, dtype=f64, generator=torch.Generator().manual_seed(4))
        check_apply(apply(tensors, C, seed=seed, ones=True), expected, C, f32, steps=40.0)
        with pytest.raises((ValueError, RuntimeError)):
            gram(streams(19))
        with pytest.raises((ValueError, RuntimeError)):
            apply(tensors, torch.ones(18, 16, dtype=f64))

    @pytest.mark.parametrize(
        "layout", ["contiguous", "misaligned", "gaps", "reversed", "channels_last", "batch-sliced"]
    )
    def test_layouts(self, layout: str):
        plain = streams(3, (3, 4, 5, 6))
        arenas = [arena(t, layout) for t in plain]
        tensors = [a.tensor for a in arenas]
        check_gram(gram(tensors), expected_rows(plain), f32)
        C = torch.tensor([[1.0, -2.0, 0.5]], dtype=f64)
        check_apply(apply(tensors, C), expected_rows(plain), C, f32, steps=3.0)
        mixed = [tensors[0], plain[1], tensors[2]]
        check_gram(gram(mixed), expected_rows(plain), f32)

    def test_sizes(self):
        for size in (0, 1, 2, 15, 16, 17, 2047, 2048, 2049, 5000):
            tensors = streams(3, (2, size))
            check_gram(gram(tensors), expected_rows(tensors), f32)
            C = torch.ones(2, 3, dtype=f64)
            check_apply(apply(tensors, C), expected_rows(tensors), C, f32, steps=3.0)
        assert gram(streams(2, (0, 5))).shape == (0, 2, 2)
        single = streams(2, (60,))
        found = gram(single, batch_dims=0)
        assert found.shape == (1, 2, 2)
        check_gram(found, expected_rows(single, batch_dims=0), f32)

    @pytest.mark.determinism
    def test_bits_do_not_depend_on_batch_and_threads(self):
        tensors = streams(4, (5, 30001))
        C = torch.randn(3, 4, dtype=f64, generator=torch.Generator().manual_seed(5))
        whole, outputs = gram(tensors), apply(tensors, C)
        for b in range(5):
            part = [t[b : b + 1].clone() for t in tensors]
            assert same_bits(gram(part)[0], whole[b])
            assert all(same_bits(o[0], w[b]) for o, w in zip(apply(part, C), outputs, strict=True))
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            assert same_bits(gram(tensors), whole)
        finally:
            torch.set_num_threads(before)

    def test_noise_in_the_frame(self):
        """The noise row is that of affine_step: one source for all ops."""
        tensors, seed = streams(1, (2, 500)), torch.tensor([7, 8])
        (found,) = apply(tensors, torch.tensor([[0.0, 1.0]], dtype=f64), seed=seed)
        expected = oracle.noise_like((2, 500), (7, 8))
        assert_within(found, expected, 4 * np.spacing(np.abs(expected).astype(np.float32)), "noise")
