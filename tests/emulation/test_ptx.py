"""The functions of core/ptx.h: values on the emulated machine, and that nvcc assembles each of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))

import nvcc  # noqa: E402

pytestmark = pytest.mark.emulation

BF16, F16, TF32 = range(3)
DTYPES = {BF16: torch.bfloat16, F16: torch.float16}


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16)


class TestMatrixProduct:
    """Whole products: every element of every fragment must be where the instruction has it."""

    M, N, K = 48, 40, 64

    def run(self, machine, a, b, kind, way=0, **at):
        found = np.full((self.M, self.N), np.nan, np.float32)
        tiles = self.M // 16 * (self.N // 8)
        numbers = [self.N, self.K, kind, way]
        machine.run("product", [a, b, found], numbers, grid=tiles, shared=1024, **at)
        return found

    def operands(self, seed=0):
        rng = np.random.default_rng(seed)
        return rng.standard_normal((self.M, self.K)), rng.standard_normal((self.K, self.N))

    @pytest.mark.parametrize("way", range(3), ids=["x4 and x2.trans", "x1 and x1.trans", "x4.trans and x2"])
    @pytest.mark.parametrize("kind", [BF16, F16], ids=["bf16", "f16"])
    @pytest.mark.parametrize("mode", ["fibers", "threads"])
    def test_halves(self, machine, kind, way, mode):
        a, b = (torch.from_numpy(x).to(DTYPES[kind]).contiguous() for x in self.operands())
        exact = a.double().numpy() @ b.double().numpy()
        found = self.run(machine, bits_of(a), bits_of(b), kind, way, mode=mode, seed=way)
        steps = self.K // 16  # each rounds once, to float
        size = np.abs(a.double().numpy()) @ np.abs(b.double().numpy())
        assert (np.abs(found - exact) <= steps * 2.0**-24 * size).all()

    def test_each_element_of_a_fragment(self, machine):
        """One 1 in A, one in B: the product has one 1, or none."""
        for row, k, column in [(0, 0, 0), (9, 13, 5), (15, 15, 7), (8, 7, 6), (7, 8, 1), (31, 40, 33)]:
            for other in (k, (k + 1) % self.K):
                a = torch.zeros(self.M, self.K, dtype=torch.bfloat16)
                b = torch.zeros(self.K, self.N, dtype=torch.bfloat16)
                a[row, k] = b[other, column] = 1
                found = self.run(machine, bits_of(a), bits_of(b), BF16)
                assert found.sum() == found[row, column] == float(k == other)

    def test_tf32_cuts(self, machine):
        """The last 13 bits of a float are not read; rounding is the caller's."""
        a, b = (x.astype(np.float32) for x in self.operands(1))
        found = self.run(machine, a.view(np.uint32), b.view(np.uint32), TF32)
        cut = [
            (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64) for x in (a, b)
        ]
        size = np.abs(cut[0]) @ np.abs(cut[1])
        assert (np.abs(found - cut[0] @ cut[1]) <= self.K // 8 * 2.0**-24 * size).all()
        assert np.abs(found - a.astype(np.float64) @ b.astype(np.float64)).max() > 1e-4  # it does matter

    def test_accumulates_in_float(self, machine):
        """2^24 + 1 is not a float: sums of an instruction are rounded, but only once."""
        a, b = np.zeros((self.M, self.K), np.float32), np.ones((self.K, self.N), np.float32)
        a[:, 0], a[:, 1], a[:, 2], a[:, 8:10] = 2.0**24, 1, 1, 1
        found = self.run(machine, a.view(np.uint32), b.view(np.uint32), TF32)
        assert (found == 2.0**24 + 4).all()


SPECIAL = [
    0.0,
    -0.0,
    np.inf,
    -np.inf,
    np.nan,
    1.0,
    65504.0,
    65519.9,
    65520.0,
    2.0**-24,
    2.0**-25,
    6e-8,
    3.4e38,
    1e-40,
]


def test_packs(machine):
    """Rounded to nearest even as PyTorch does; a NaN is 0x7fff, as on the GPU."""
    rng = np.random.default_rng(0)
    any_bits = rng.integers(0, 2**32, 4096, dtype=np.uint64).astype(np.uint32).view(np.float32)
    halfway = (rng.integers(0, 2**15, 1024) * 2 + 1).astype(np.float32) * 2.0**-10
    x = np.concatenate([np.array(SPECIAL * 2, np.float32), any_bits, halfway])
    x = x[: len(x) // 64 * 64]
    words, back = np.zeros((len(x) // 2, 3), np.uint32), np.zeros((len(x) // 2, 4), np.float32)
    machine.run("packs", [x, words, back], grid=len(x) // 64, block=32)
    for kind, column in ((BF16, 0), (F16, 1)):
        half = torch.from_numpy(x).to(DTYPES[kind])
        expected = np.where(np.isnan(x), 0x7FFF, bits_of(half)).astype(np.uint16)
        assert (words[:, column].copy().view(np.uint16) == expected).all()
        values = half.float().numpy()
        found = back[:, 2 * column : 2 * column + 2].reshape(-1)
        assert np.array_equal(found, values, equal_nan=True)
        assert (np.signbit(found) == np.signbit(values))[~np.isnan(x)].all()


def test_tf32_rounds_to_nearest(machine):
    x = np.float32(
        [1.0, 1.0 + 2.0**-11, 1.0 + 2.0**-12, -1.0 - 2.0**-11, 1.0 + 3 * 2.0**-11, np.inf, -np.inf, np.nan]
    )
    pairs, words = np.repeat(x, 8).reshape(-1, 2), np.zeros((32, 3), np.uint32)
    machine.run("packs", [pairs, words, np.zeros((32, 4), np.float32)], block=32)
    up = 1.0 + 2.0**-10
    expected = np.float32([1.0, up, 1.0, -up, 1.0 + 2.0**-9, np.inf, -np.inf, np.nan])
    assert np.array_equal(words[::4, 2].copy().view(np.float32), expected, equal_nan=True)


def test_moves(machine):
    x = np.random.default_rng(0).integers(0, 256, 24 * 64, dtype=np.uint8)
    found = np.zeros_like(x)
    machine.run("moves", [x, found], grid=2, block=32)
    assert (found == x).all()


@pytest.mark.parametrize("seed", [0, 1])
def test_copies_are_late(machine, seed):
    """What was in shared memory is gone at once, what comes is there at the wait for its group and not before."""
    block = 32
    x = np.arange(7 * block, dtype=np.uint32)
    found = np.zeros((4, 7 * block), np.uint32)
    machine.run("copies", [x, found], block=block, shared=7 * 4 * block, seed=seed)
    groups = np.repeat([0, 1, 1, 2, 2, 2, 2], block)
    for waits in range(4):
        expected = np.where(groups < waits, x, np.uint32(0xFFFFFFFF))
        assert (found[waits] == expected).all()


@pytest.mark.parametrize("size", [1, 4])
def test_cluster(machine, size):
    found = np.zeros((8, 32))
    machine.run("cluster", [found], grid=8, block=32, cluster=size, shared=16 * 32)
    before = (np.arange(8) % size - 1) % size
    assert (found == (6.0 + before)[:, None]).all()


@pytest.mark.parametrize("chip", ["80", "90", "100"])
def test_nvcc_assembles(chip, tmp_path):
    """The file of these checks, and the headers that kernels include, for every chip and without a warning."""
    compiler = nvcc.find()
    if not compiler:
        pytest.skip("no nvcc")
    source = ROOT / "csrc" / "emulation" / "checks_ptx.cu"
    command = [
        compiler, "-std=c++20", "-O3", "--expt-relaxed-constexpr", "--Werror=all-warnings", "-Xcompiler=-Wall",
        f"-I{ROOT / 'csrc'}", f"-gencode=arch=compute_{chip},code=sm_{chip}", "-cubin", "-o",
        str(tmp_path / "checks.cubin"), str(source),
    ]  # fmt: skip
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
