"""Statistics of the noise that is drawn inside the kernels, through the public functions.

That the words are Philox and the normals Box–Muller, `test_langevin.py` says; here it is whether that is good noise:
its moments, its distribution and tails, and that nothing is common to elements, samples, steps and seeds.

All seeds are fixed, so a result never changes. Bounds are 5 standard errors (a right generator misses with 6e-7), and 6
where hundreds of numbers are looked at together (2e-9 each, some 1e-8 for products of squares, which are skewed): with
one seed in a thousand something in this file would fail.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

import marquardt as mq
from harness import Target

pytestmark = pytest.mark.accuracy
f32, f64 = torch.float32, torch.float64
Tensor = torch.Tensor


def by_affine_step(shape, device, **keywords) -> Tensor:
    return mq.affine_step([torch.zeros(shape, device=device)], [0.0], noise_scale=1.0, **keywords)


def by_langevin_step(shape, device, **keywords) -> Tensor:
    zero = torch.zeros(shape, device=device)
    return mq.langevin_step(zero, zero, step=0.5, **keywords)  # √(2·½·1) = 1


def by_ddim_step(shape, device, **keywords) -> Tensor:
    """ᾱ = ¼ to ½ at η = 1: s² = (½/¾)·½ = ⅓."""
    zero = torch.zeros(shape, device=device)
    return mq.lml_ddim_step(zero, zero, alpha_bar=0.25, alpha_bar_next=0.5, eta=1.0, **keywords)[0] * 3**0.5


def by_flow_step(shape, device, **keywords) -> Tensor:
    zero = torch.zeros(shape, device=device)
    return mq.lml_flow_step(zero, zero, sigma=1.0, sigma_next=0.5, stochastic=True, **keywords)[0] * 2


WAYS = {f.__name__: f for f in (by_affine_step, by_langevin_step, by_ddim_step, by_flow_step)}


def count_of(target: Target, log2: int) -> int:
    """The definition draws slowly, and has the words of the kernels anyway."""
    return 1 << (13 if target.backend == "reference" else log2)


@pytest.fixture
def kernels_only(request):
    if request.node.callspec.params["target"].backend == "reference":
        pytest.skip("the definition draws slowly, and has the words of the kernels anyway")


@functools.lru_cache(maxsize=8)
def drawn(target: Target, way: str, shape: tuple[int, ...], seed: tuple[int, int]) -> Tensor:
    with target():
        return WAYS[way](shape, target.device, seed=torch.tensor(seed, device=target.device)).double()


def correlation(a: Tensor, b: Tensor) -> float:
    """Of two draws of mean 0 and variance 1, in standard errors of independent ones."""
    return float((a * b).mean()) * a.numel() ** 0.5


def poisson(found: int, mean: float) -> float:
    """How likely a count at least as far out as `found` is, on its side."""
    logs = [k * math.log(mean) - mean - math.lgamma(k + 1) for k in range(int(mean + 40 * mean**0.5) + 40)]
    terms = [math.exp(x) for x in logs]
    return min(sum(terms[: found + 1]), sum(terms[found:]))


def squares(z: Tensor) -> Tensor:
    """z² brought to mean 0 and variance 1."""
    return (z * z - 1) / 2**0.5


@pytest.mark.parametrize("way", WAYS)
class TestDistribution:
    seed = (20240607, 3)

    def lanes(self, target: Target, way: str, log2: int) -> dict[str, Tensor]:
        """All elements, and those of each place in a block of four: a wrong sine shows in a quarter of them."""
        z = drawn(target, way, (4, count_of(target, log2) // 4), self.seed).flatten()
        return {"all": z, **{f"{j} mod 4": z[j::4] for j in range(4)}}

    def test_moments(self, target: Target, way: str):
        """E zᵏ, k = 1 … 4, whose variances are 1, 2, 15, 96."""
        for name, z in self.lanes(target, way, 21).items():
            power = torch.ones_like(z)
            for mean, variance in ((0, 1), (1, 2), (0, 15), (3, 96)):
                power = power * z
                error = (float(power.mean()) - mean) / (variance / z.numel()) ** 0.5
                assert abs(error) < 5, f"{name}: moment {mean} off by {error:.1f} standard errors"

    def test_kolmogorov_smirnov(self, target: Target, way: str):
        """√n·sup|F_n − Φ| < 2.7: 2·exp(−2·2.7²) = 1e-6."""
        for name, z in self.lanes(target, way, 19).items():
            cdf = torch.special.ndtr(z.sort().values)
            steps = torch.arange(len(z) + 1, dtype=f64, device=z.device) / len(z)
            gap = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
            assert gap * len(z) ** 0.5 < 2.7, name

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 8])
    def test_pairs_are_uniform(self, target: Target, way: str, lag: int):
        """χ² of (Φ(z_i), Φ(z_i+lag)) over 16 × 16 cells; 255 degrees of freedom, as a normal by Wilson and Hilferty."""
        z = self.lanes(target, way, 20)["all"]
        cell = (torch.special.ndtr(z) * 16).long().clamp(0, 15)
        blocks = cell[: len(cell) // (2 * lag) * 2 * lag].view(-1, 2, lag)  # every element in one pair
        found = torch.bincount((blocks[:, 0] * 16 + blocks[:, 1]).flatten(), minlength=256).double()
        mean = float(found.sum()) / 256
        chi = float(((found - mean) ** 2).sum()) / mean
        normal = ((chi / 255) ** (1 / 3) - (1 - 2 / (9 * 255))) / (2 / (9 * 255)) ** 0.5
        assert abs(normal) < 5, f"χ² = {chi:.0f}"


@pytest.mark.usefixtures("kernels_only")
class TestTails:
    def test_frequencies(self, target: Target):
        """|z| beyond 4 and 5, on either side: 2100 and 19 of 2²⁶, as Poisson has it. u ≥ 2⁻³³ ends them at 6.8."""
        rounds, count = 16, 1 << 22
        above = dict.fromkeys((4.0, 5.0, -4.0, -5.0), 0)
        for j in range(rounds):
            with target():
                z = by_affine_step(
                    (1, count), target.device, seed=torch.tensor([j, 77], device=target.device)
                )
            assert float(z.abs().max()) <= math.sqrt(66 * math.log(2)) + 1e-6
            for edge in above:
                above[edge] += int((z > edge).sum() if edge > 0 else (z < edge).sum())
        for edge, found in above.items():
            mean = rounds * count * 0.5 * math.erfc(abs(edge) / 2**0.5)
            assert poisson(found, mean) > 1e-7, f"{found} beyond {edge}, {mean:.1f} expected"

    def test_nothing_is_infinite(self, target: Target):
        """u is never 0, and the same normal hardly ever comes twice in a row."""
        z = drawn(target, "by_affine_step", (1, count_of(target, 22)), (5, 5))
        assert bool(z.isfinite().all())
        assert int((z[0, 1:] == z[0, :-1]).sum()) <= 2


@pytest.mark.usefixtures("kernels_only")
class TestIndependence:
    """Correlations of z and of z² (Box–Muller's pairs share a radius) at 5 or 6 standard errors."""

    @pytest.mark.parametrize("lag", [*range(1, 9), *(4 * k for k in (3, 4, 8, 16, 64, 512, 1024, 4096))])
    def test_neighbours(self, target: Target, lag: int):
        z = drawn(target, "by_affine_step", (1, count_of(target, 21)), (31, 41)).flatten()
        q = squares(z)
        for a, b in ((z, z), (q, q), (z, q)):
            assert abs(correlation(a[:-lag], b[lag:])) < 5

    def many(self, rows: Tensor, what: str, bound: float = 6) -> None:
        """[n, D]: no two rows have anything in common."""
        for t in (rows, squares(rows)):
            common = (t @ t.T / t.shape[1] ** 0.5).fill_diagonal_(0)
            assert float(common.abs().max()) < bound, what

    def test_chunks(self, target: Target):
        """The 2048-element chunks of the engine, and of its rows: none is drawn twice."""
        for size in (512, 2048):
            z = drawn(target, "by_affine_step", (1, count_of(target, 20)), (1002, 2002))
            self.many(
                z.view(-1, size), "chunks", bound=12
            )  # a million pairs of few elements; a copy has 22 or more

    @pytest.mark.parametrize("way", WAYS)
    def test_steps(self, target: Target, way: str):
        """Seeds drawn one after another from a generator, as in a chain."""
        generator = torch.Generator().manual_seed(2)
        with target():
            steps = [
                WAYS[way]((1, count_of(target, 14)), target.device, generator=generator)[0] for _ in range(32)
            ]
        self.many(torch.stack(steps).double(), "steps")
        self.many(torch.stack(steps).double().roll(1, dims=1)[::2], "steps")

    def test_default_generator(self, target: Target):
        torch.manual_seed(3)
        with target():
            steps = [by_langevin_step((1, count_of(target, 14)), target.device)[0] for _ in range(32)]
        self.many(torch.stack(steps).double(), "steps")

    def test_samples(self, target: Target):
        """Rows of a batch: of one seed, of neighbouring seeds, of a list of generators, of one seed all the same."""
        shape = (32, count_of(target, 14))
        with target():
            self.many(by_affine_step(shape, target.device, seed=9).double(), "one seed")
            near = torch.tensor([[100 + b, 7] for b in range(32)], device=target.device)
            self.many(by_affine_step(shape, target.device, seed=near).double(), "neighbouring keys")
            self.many(
                by_affine_step(shape, target.device, seed=near.flip(1)).double(), "neighbouring streams"
            )
            generators = [torch.Generator().manual_seed(b) for b in range(32)]
            self.many(by_affine_step(shape, target.device, generator=generators).double(), "generators")
            same = torch.tensor([[3, 4]] * 32, device=target.device)
            equal = by_affine_step((2, 50), target.device, seed=same[:2])
            assert torch.equal(equal[0], equal[1])

    @pytest.mark.parametrize("word", [0, 1], ids=["key", "stream"])
    def test_seeds_that_differ_in_one_bit(self, target: Target, word: int):
        base = [0x0123456789ABCDEF, 0x0FEDCBA987654321]
        seeds = [base]
        for bit in range(64):
            other = list(base)
            other[word] ^= 1 << bit
            other[word] -= 2**64 if other[word] >= 2**63 else 0
            seeds.append(other)
        with target():
            rows = by_affine_step(
                (65, count_of(target, 14)), target.device, seed=torch.tensor(seeds, device=target.device)
            )
        self.many(rows.double(), "one bit")

    @pytest.mark.parametrize("step", [(0, 1), (1, 0), (1, 1), (0, 1 << 32), (1 << 32, 0)], ids=str)
    def test_neighbouring_seeds_are_not_shifted_copies(self, target: Target, step):
        """Cross-correlation at every shift: the noise of one seed is nowhere in that of the next."""
        count = count_of(target, 18)
        a = drawn(target, "by_affine_step", (1, count), (1000, 2000)).flatten()
        b = drawn(target, "by_affine_step", (1, count), (1000 + step[0], 2000 + step[1])).flatten()
        for x, y in ((a, b), (squares(a), squares(b))):
            common = torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(y).conj(), n=count) / count**0.5
            assert float(common.abs().max()) < 7.5  # of 2^18 shifts: 2^18·6e-14 = 2e-8

    def test_no_shift_within_one_draw(self, target: Target):
        """The same of one draw with itself: no period, no repeated block."""
        count = count_of(target, 20)
        z = drawn(target, "by_affine_step", (1, count), (1001, 2001)).flatten()
        common = torch.fft.irfft(torch.fft.rfft(z).abs() ** 2, n=count) / count**0.5
        assert float(common[1:].abs().max()) < 7.5


class TestScale:
    def test_every_way_draws_the_same(self, target: Target):
        """One seed means one noise, whichever function draws it."""
        seed = torch.tensor([17, 18], device=target.device)
        exact = mq.reference.normal(seed, (3, 2049)).numpy()
        for name, way in WAYS.items():
            with target():
                z = way((3, 2049), target.device, seed=seed).cpu().numpy()
            np.testing.assert_allclose(z, exact, rtol=1e-6, atol=1e-6, err_msg=name)

    def test_per_sample(self, target: Target):
        """Scales per sample multiply the same noise."""
        seed = torch.tensor([19, 20], device=target.device)
        scale = torch.tensor([1.0, 0.0, -2.0, 1e3], device=target.device)
        with target():
            z = by_affine_step((4, 300), target.device, seed=seed)
            scaled = mq.affine_step([torch.zeros_like(z)], [0.0], noise_scale=scale, seed=seed)
        torch.testing.assert_close(scaled, scale[:, None] * z, rtol=1e-6, atol=0)
