"""Dynamic thresholding: an exact quantile per sample, then clamp and rescale."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from harness import LAYOUTS, Target, arena, same_bits
from harness.compare import rows
from harness.layouts import promised_strides, same_strides
from marquardt.reference.threshold import dynamic_threshold as reference
from marquardt.threshold import dynamic_threshold
from threshold_ops import DTYPES, LARGE, RATIOS, bf16, check_scale, check_value, f32, f64, normal, run, scale


@pytest.mark.accuracy
class TestScale:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(
        "shape", [(3, 1), (4, 2), (3, 4, 9, 7), (2, 513), (3, 3072), (1, 20000)], ids=str
    )
    def test_quantile(self, target: Target, dtype, shape):
        for ratio in RATIOS:
            check_scale(target, normal(shape, dtype), ratio)

    @pytest.mark.parametrize("size", [16, 511, 512, 513, 600, 8191, 8193, 20011])
    def test_every_place(self, target: Target, size):
        """Ratios that fall on an element, beside one, and between two."""
        x = normal((1, size))
        for k in {0, 1, 2, size // 3, size - 3, size - 2, size - 1}:
            for fraction in (0.0, 1e-9, 0.5):
                if k + fraction <= size - 1:
                    check_scale(target, x, (k + fraction) / (size - 1))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("size", [400, 12000])
    def test_ties(self, target: Target, dtype, size):
        """Few different magnitudes; one only; and a clipped sample, whose largest is everywhere."""
        x = normal((4, size), dtype, 3.0)
        x[0] = x[0].round()
        x[1] = -7.0
        x[2] = x[2].clamp(-2.5, 2.5)
        x[3, ::2] = 0.0
        for ratio in (0.0, 0.3, 0.5, 0.5 + 1 / size, 0.7, 0.995, 1.0):
            check_scale(target, x, ratio)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_extreme_numbers(self, target: Target, dtype):
        """Subnormal numbers, both zeros and the largest numbers are in their order."""
        info, x = torch.finfo(dtype), normal((2, 3000), dtype, 10.0)
        x[0, :1500] = info.smallest_normal / 4
        x[0, 1:1500:3] = -0.0
        x[0, 2:1500:3] = -info.smallest_normal
        x[1, ::3] = info.max
        x[1, 1::3] = -info.max / 2
        for ratio in (0.4, 0.6, 0.9, 1.0):
            check_scale(target, x, ratio, maximum=1e308)

    @pytest.mark.parametrize("size", [20000, 100000])
    def test_a_sample_that_misleads(self, target: Target, size):
        """Where the numbers that the search looks at first are unlike the others."""
        count = min(max(size // 64, 128), 4096)
        length = size // count
        mask = (1 << 64) - 1
        places = []
        for i in range(count):
            h = (i + 1) * 0x9E3779B97F4A7C15 & mask
            h = (h ^ h >> 32) * 0xD6E8FEB86659FD93 & mask
            places.append(i * length + ((h >> 40) * length >> 24))
        for low, high in ((2.0, 500.0), (500.0, 2.0)):
            x = normal((1, size), scale=0.1) + high
            x[0, places] = normal((count,), scale=0.1, seed=1) + low
            for ratio in (0.1, 0.5, 0.995):
                check_scale(target, x, ratio)

    @pytest.mark.parametrize("dtype", [f32, bf16], ids=str)
    def test_one_large_sample(self, target: Target, dtype):
        if target.backend == "reference" and dtype == bf16:
            pytest.skip("a sort, of which one is enough")
        x = normal((1, 3, 1000, 1000), dtype)
        for ratio in (0.5, 0.995):
            check_scale(target, x, ratio)

    def test_many_small_samples(self, target: Target):
        x = normal((5000, 7))
        for ratio in (0.3, 1.0):
            check_scale(target, x, ratio)

    def test_number_per_sample(self, target: Target):
        x = normal((3, 50))
        ratio, maximum = torch.tensor([0.2, 0.5, 1.0]), torch.tensor([LARGE, 20.0, 60.0], dtype=f64)
        found = scale(target, x, ratio.to(target.device), maximum.to(target.device))
        for b in range(3):
            one = scale(target, x[b : b + 1], float(ratio[b]), float(maximum[b]))
            assert same_bits(found[b], one[0])
        shared = scale(target, x, torch.tensor(0.5), 20.0)
        assert same_bits(shared[1], found[1])

    def test_as_torch_quantile(self, target: Target):
        """In float64, where torch counts positions as we do."""
        x = normal((3, 1001), f64)
        for ratio in (0.25, 0.3, 0.77, 0.995):
            expected = torch.quantile(x.abs(), ratio, dim=1)
            torch.testing.assert_close(scale(target, x, ratio)[:, 0], expected, rtol=1e-14, atol=0)


@pytest.mark.accuracy
class TestValue:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("maximum", [1.0, 1.5, 40.0, LARGE])
    def test_clamp_and_rescale(self, target: Target, dtype, maximum):
        for shape in ((4, 3, 9, 7), (2, 5000), (1, 70001)):
            out = check_value(target, normal(shape, dtype), ratio=0.8, maximum=maximum)
            assert float(out.abs().max()) == 1.0

    def test_defaults(self, target: Target):
        """ratio 0.995 and maximum 1: a clamp to ±1."""
        x = normal((2, 900), scale=0.7)
        assert torch.equal(run(target, x), x.clamp(-1, 1))
        assert same_bits(run(target, x, maximum=1), run(target, x, ratio=0.2))

    def test_as_published(self, target: Target):
        x = normal((4, 3, 32, 32), scale=2.0)
        flat = x.flatten(1)
        s = torch.quantile(flat.abs(), 0.995, dim=1).clamp(min=1, max=4.0).unsqueeze(1)
        expected = (torch.clamp(flat, -s, s) / s).reshape(x.shape)
        torch.testing.assert_close(run(target, x, maximum=4.0), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_as_defined(self, target: Target, dtype):
        """The kernels give the bits of the definition."""
        for shape, batch_dims in (((3, 4, 31), 1), ((1, 9001), 1), ((5, 700), 0)):
            x = normal(shape, dtype)
            for ratio, maximum in ((0.3, LARGE), (0.995, 70.0)):
                options = {"ratio": ratio, "maximum": maximum, "batch_dims": batch_dims}
                assert same_bits(run(target, x, **options), reference(x, **options))

    def test_unbatched(self, target: Target):
        for shape in ((5, 700), (9,), ()):
            check_value(target, normal(shape), batch_dims=0, ratio=0.6, maximum=LARGE)

    def test_nothing(self, target: Target):
        """No samples, and samples of no elements: s = 1."""
        for shape in ((0, 5), (0,), (3, 0, 2)):
            x = torch.empty(shape)
            assert run(target, x, ratio=0.5).shape == shape
            found = scale(target, x, 0.5)
            assert found.shape == (shape[0], 1) and bool((found == 1).all())
        assert scale(target, torch.empty(0), 0.5, batch_dims=0).tolist() == [[1.0]]

    def test_one_element(self, target: Target):
        x = torch.tensor([[3.0], [-3.0], [0.5], [-0.0]])
        assert run(target, x, maximum=2.0).flatten().tolist() == [1.0, -1.0, 0.5, 0.0]
        assert run(target, x, maximum=6.0).flatten().tolist() == [1.0, -1.0, 0.5, 0.0]
        assert math.copysign(1.0, float(run(target, x)[3])) == -1.0

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("maximum", [1.0, LARGE])
    def test_nan_stays_in_its_sample(self, target: Target, dtype, maximum):
        for size in (5, 700, 50001):
            x = normal((3, size), dtype)
            clean = run(target, x, ratio=0.5, maximum=maximum)
            x[1, size // 2] = -math.nan
            out = run(target, x, ratio=0.5, maximum=maximum)
            assert bool(out[1].isnan().all()) and same_bits(out[[0, 2]], clean[[0, 2]])

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_infinite_elements(self, target: Target, dtype):
        """They are larger than all others; where the quantile is infinite s is the maximum."""
        x = normal((2, 800), dtype)
        x[0, 3], x[0, 70] = math.inf, -math.inf
        x[1] = math.inf
        found = scale(target, x, 0.5)
        assert float(found[0]) == pytest.approx(float(np.sort(np.abs(rows(x))[0])[399:401].mean()))
        assert float(found[1]) == LARGE
        out = run(target, x, ratio=0.5, maximum=LARGE)
        assert (float(out[0, 3]), float(out[0, 70])) == (1.0, -1.0) and bool((out[1] == 1).all())
        assert float(scale(target, x, 1.0)[0]) == LARGE

    def test_out(self, target: Target):
        x = normal((3, 4, 70)).to(target.device)
        expected = run(target, x, ratio=0.7, maximum=9.0)
        with target():
            out = torch.full_like(x, 7.0)
            assert dynamic_threshold(x, ratio=0.7, maximum=9.0, out=out) is out
            assert torch.equal(out.cpu(), expected)
            wide = torch.full((3, 4, 140), 7.0, device=target.device)
            dynamic_threshold(x, ratio=0.7, maximum=9.0, out=wide[..., ::2])
            assert torch.equal(wide[..., ::2].cpu(), expected) and bool((wide[..., 1::2] == 7).all())
            assert dynamic_threshold(x, ratio=0.7, maximum=9.0, out=x) is x
            assert torch.equal(x.cpu(), expected)


@pytest.mark.strides
class TestLayouts:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
    def test_layout(self, target: Target, layout: str, dtype):
        place = arena(normal((3, 4, 9, 7), dtype).to(target.device), layout)
        with target():
            out = dynamic_threshold(place.tensor, ratio=0.6, maximum=30.0)
        plain = run(target, place.tensor.contiguous(), ratio=0.6, maximum=30.0)
        assert torch.equal(out.cpu(), plain) and place.intact()
        assert same_strides(out, promised_strides(place.tensor))

    def test_dense_orders_of_large_tensors(self, target: Target):
        x = normal((2, 3, 150, 110))
        expected = run(target, x, ratio=0.9, maximum=LARGE)
        for other in (x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().mT):
            assert not other.is_contiguous()
            assert same_bits(run(target, other, ratio=0.9, maximum=LARGE).contiguous(), expected)


@pytest.mark.determinism
class TestBits:
    @pytest.mark.parametrize("dtype", [f32, f64, bf16], ids=str)
    @pytest.mark.parametrize("shape", [(1, 300001), (3, 50001), (8, 30000), (400, 300)], ids=str)
    def test_threads_and_batches(self, target: Target, dtype, shape):
        if not target.steady:
            pytest.skip("the definition has no threads of its own")
        x, before = normal(shape, dtype), torch.get_num_threads()

        def both(t):
            return run(target, t, ratio=0.77, maximum=LARGE)

        whole = both(x)
        try:
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert same_bits(both(x), whole)
        finally:
            torch.set_num_threads(before)
        for b in {0, shape[0] // 2, shape[0] - 1}:
            assert same_bits(both(x[b : b + 1])[0], whole[b])

    def test_order_of_elements(self, target: Target):
        x = normal((1, 30000))
        mixed = x[:, torch.randperm(30000, generator=torch.Generator().manual_seed(3))]
        for ratio in (0.5, 0.995):
            assert same_bits(scale(target, mixed, ratio), scale(target, x, ratio))
