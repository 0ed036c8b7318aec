"""What only a call on a GPU does on its way to the kernels: tables of numbers on the device, plans, workspaces.

Not collected by itself: test_torch_library.py runs it with the emulated torch library, in which the CPU is the device.
"""

from __future__ import annotations

import os

import pytest
import torch

import marquardt as mq
from harness import same_bits
from marquardt import _native

f64 = torch.float64
ops = torch.ops.marquardt


def make(shape=(3, 4, 10, 10), dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    eps = torch.randn(shape, generator=generator, dtype=f64)
    return eps.to(dtype), (0.9 * eps + 0.3 * torch.randn(shape, generator=generator, dtype=f64)).to(dtype)


def plan(*arguments, **keywords) -> str:
    return mq.explain(*arguments, **keywords).plan


def test_the_library_is_the_emulated_one():
    assert _native.emulated() and "emulated" in str(_native.build_info()["isa"])


def test_a_number_per_sample_is_a_number():
    """The table on the device gives the bits of the numbers in the launch."""
    eps, prev = make()
    kappa = torch.tensor([0.0, 0.3, -0.2], dtype=f64)
    found = mq.lm_direction(eps, prev, damping=0.1, kappa=kappa)
    for b in range(3):
        one = mq.lm_direction(eps[b : b + 1], prev[b : b + 1], damping=0.1, kappa=float(kappa[b]))
        assert same_bits(found[b], one[0])
    assert same_bits(found[0], eps[0])


def test_tables_that_lie_otherwise_are_copied():
    eps, prev = make()
    table = torch.tensor([[0.1, 0.3], [0.2, 0.4], [0.0, 0.5]], dtype=f64)
    expected = ops._lm_direction(eps, prev, table, 0, 1)
    wide = torch.zeros(3, 5, dtype=f64)
    wide[:, 1:4:2] = table
    for other in (table.t().contiguous().t(), wide[:, 1:4:2]):
        assert not other.is_contiguous()
        assert same_bits(ops._lm_direction(eps, prev, other, 0, 1), expected)


@pytest.mark.parametrize("mode", [0, 1])
def test_tangents_of_host_and_device(mode: int):
    """Each of coef and coef_t may be shared or per sample."""
    eps, prev = make(dtype=f64)
    eps_t, prev_t = prev.flip(0), 0.5 * eps
    coef, coef_t = torch.tensor([0.1, 0.3], dtype=f64), torch.tensor([0.7, -0.4], dtype=f64)
    expected = ops._lm_direction_jvp(eps, prev, coef, eps_t, prev_t, coef_t, mode, 1)
    for a in (coef, coef.expand(3, 2), coef.expand(3, 2).contiguous()):
        for b in (coef_t, coef_t.expand(3, 2), coef_t.expand(3, 2).contiguous()):
            assert same_bits(ops._lm_direction_jvp(eps, prev, a, eps_t, prev_t, b, mode, 1), expected)


def test_without_prev_kappa_is_zero():
    """Whatever the table says: it is copied, and its column of κ becomes 0."""
    eps, _ = make()
    table = torch.tensor([[0.1, 0.3], [2.0, float("nan")], [0.0, 0.5]], dtype=f64)
    table[1, 1] = 7.0
    before = table.clone()
    assert same_bits(ops._lm_direction(eps, None, table, 0, 1), eps)
    plain = ops._lm_direction(eps, None, table, 1, 1)
    n = eps.double().flatten(1).square().sum(1)
    expected = eps * (table[:, 0] / (table[:, 0] + n))[:, None, None, None]
    torch.testing.assert_close(plain, expected.float(), rtol=1e-6, atol=0)
    assert same_bits(table, before), "the caller's table was written"


def test_matrices_of_host_and_device():
    streams = list(make())
    c = torch.tensor([[1.0, -2.0], [0.5, 0.25], [0.0, 1.0]], dtype=f64)
    expected = ops._frame_apply(streams, c, None, None, None, False, 1)
    for other in (c.expand(3, 3, 2), c.expand(3, 3, 2).contiguous(), c.t().contiguous().t()):
        found = ops._frame_apply(streams, other, None, None, None, False, 1)
        assert all(same_bits(a, b) for a, b in zip(found, expected, strict=True))
    L = torch.tensor([[1.0, 0.5], [-1.0, 1.0]], dtype=f64)
    gram = ops._frame_gram(streams, L, None, None, False, False, 1)
    for other in (L.expand(3, 2, 2), L.expand(3, 2, 2).contiguous()):
        assert same_bits(ops._frame_gram(streams, other, None, None, False, False, 1), gram)


def test_nothing_to_do():
    """Calls of no samples, and samples of no elements."""
    for shape in ((0, 5), (3, 0)):
        eps = torch.empty(shape)
        assert mq.lm_direction(eps, eps, damping=0.1, kappa=0.3).shape == shape
        assert mq.affine_step([eps], [2.0]).shape == shape
    assert plan(mq.affine_step, [torch.empty(0, 5)], [2.0]) == "nothing to do"


def test_explain_has_the_plan():
    """The launch in words, of the very call: what the kernel stages see decides."""
    small, large = make(), make((8, 1 << 16))
    found = mq.explain(mq.lm_direction, *small, damping=0.1, kappa=0.3)
    assert found.plan in str(found)
    lines = {
        "small": plan(mq.lm_direction, *small, damping=0.1, kappa=0.3),
        "large": plan(mq.lm_direction, *large, damping=0.1, kappa=0.3),
        "step": plan(mq.affine_step, list(small), [0.5, 1.0]),
        "alone": plan("lm_direction", small[0]),
    }
    assert lines["small"].startswith("held: 1 CTAs")
    clusters = os.environ.get("MARQUARDT_EMULATED_GPU") != "sm_80"
    assert ("cluster" in lines["large"]) == clusters
    assert lines["large"].startswith("held" if clusters else "two_sweeps")
    assert lines["step"].startswith("one_sweep") and lines["alone"].startswith("one_sweep")


def test_explain_computes_nothing():
    """Neither outputs nor generators change, and later calls run."""
    eps, prev = make()
    out, own = torch.full_like(eps, 7.0), torch.Generator().manual_seed(3)
    states = torch.get_rng_state(), own.get_state()
    step = {"noise_scale": 0.5, "out": out}
    lines = [
        plan(mq.affine_step, [eps, prev], [0.5, 1.0], **step),
        plan(mq.affine_step, [eps, prev], [0.5, 1.0], generator=own, **step),
        plan(mq.affine_step, [eps, prev], [0.5, 1.0], generator=[own] * 3, **step),
        plan(mq.affine_step, terms=[eps, prev], coefficients=[0.5, 1.0], **step),
    ]
    assert all(lines) and bool((out == 7).all())
    assert lines[0] != lines[2], "a stream of noise per sample is another call"
    assert torch.equal(torch.get_rng_state(), states[0]) and torch.equal(own.get_state(), states[1])
    mq.affine_step([eps, prev], [0.5, 1.0], out=out)
    torch.testing.assert_close(out, 0.5 * eps + prev)


def test_plans_launch_nothing():
    """Outputs of a planned call stay as they were allocated: NaN, while tests run."""
    eps, prev = make((2, 1000))
    made = []
    assert _native.plan_of(lambda: made.append(mq.lm_direction(eps, prev, damping=0.1, kappa=0.3)))
    assert bool(made[0].isnan().all())
    assert _native.plan_of(lambda: None) is None


def test_explain_says_what_is_wrong():
    eps, prev = make()
    with pytest.raises(ValueError, match="prev must have the shape of eps"):
        mq.explain(mq.lm_direction, eps, prev[:, :3], damping=0.1, kappa=0.3)
    assert bool(mq.lm_direction(eps, prev, damping=0.1, kappa=0.3).isfinite().all())
