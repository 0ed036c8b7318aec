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
from marquardt.reference import lml as reference
from marquardt.reference import noise as reference_noise

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


KEEP_NORM, EXTRAPOLATE, SNR = 0, 2, 3
DIRECTION, STATE_DIRECTION, CONVERTED, DOUBLED, GUIDED = 1, 2, 4, 8, 16
#       λ    κ    w    A              D              A_ξ  D_ξ  A_y  D_y   bound Y
STEP = (3.0, 0.4, 0.75, 0.9, 0.5, 0.1, 0.2, 1.0, -0.35, 0.5, 0.25, 0.4, -0.3, 0.7, 0.6, 0.1, -0.4)


def step(sample, outputs, prev, coef, seed=None, variant=KEEP_NORM, wanted=0, clipped=False):
    return ops._lm_step(sample, outputs, prev, coef, seed, variant, wanted, clipped, 1)


def defined(*arguments, **keywords):
    """The same by the definition."""
    variant, wanted, clipped = (keywords.get(k, 0) for k in ("variant", "wanted", "clipped"))
    sample, outputs, prev, coef = arguments
    return reference.lm_step(
        sample, outputs, prev, coef, keywords.get("seed"), variant, wanted, bool(clipped), 1
    )


def close(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        eps = 2.0**-22 if a.dtype in (torch.float32, f64) else torch.finfo(a.dtype).eps  # noise is float32
        torch.testing.assert_close(a.double(), b.double(), rtol=eps, atol=8 * eps)


def step_tensors(dtype=torch.float32, model=torch.bfloat16):
    x, prev = make(dtype=dtype)
    return x, [x.flip(0).to(model), (0.5 * x.flip(1)).to(model)], prev.to(model)


@pytest.mark.parametrize("wanted", range(32))
def test_steps_give_what_is_wanted(wanted: int):
    """x' once or twice, the direction in one dtype or the other, y; guided or not."""
    if wanted & 3 == 3:
        return
    x, outputs, prev = step_tensors()
    seed, coef = torch.tensor([5, -7]), torch.tensor(STEP, dtype=f64)
    arguments = {"seed": seed, "wanted": wanted, "clipped": True}
    found = step(x, outputs, prev, coef, **arguments)
    close(found, defined(x, outputs, prev, coef, **arguments))
    if wanted & DOUBLED:
        assert same_bits(found[0][:3], found[0][3:])
        assert same_bits(
            found[0][:3], step(x, outputs, prev, coef, **{**arguments, "wanted": wanted & GUIDED})[0]
        )
    if wanted & STATE_DIRECTION:
        assert found[1].dtype == x.dtype


@pytest.mark.parametrize(
    "pair", [(torch.float32,) * 2, (torch.float32, torch.float16), (torch.bfloat16,) * 2, (f64,) * 2]
)
@pytest.mark.parametrize("variant", [KEEP_NORM, EXTRAPOLATE, SNR])
def test_steps_of_tables(variant: int, pair):
    """A table on the device, dense or not, gives the bits of the numbers in the launch; where κ = 0 prev is unread."""
    x, outputs, prev = step_tensors(*pair)
    rule = {KEEP_NORM: (3.0, 0.4), EXTRAPOLATE: (0.7, 0.0), SNR: (0.1, 1.0)}[variant]
    gate = {KEEP_NORM: 1, EXTRAPOLATE: 0, SNR: 3}[variant]  # in SNR: of the sample, whose numbers are 0 then
    table = torch.tensor([(*rule, *STEP[2:9])] * 3, dtype=f64)
    table[1, gate] = 0.0
    if variant == SNR:
        table[1, gate + 3] = 0.0
    bad = (x.clone(), prev.clone())
    bad[variant != SNR][1] = float("nan")
    arguments = {"variant": variant, "wanted": STATE_DIRECTION}
    found = step(bad[0], outputs, bad[1], table, **arguments)
    close(found, defined(bad[0], outputs, bad[1], table, **arguments))
    assert all(bool(t.isfinite().all()) for t in found)
    wide = torch.zeros(3, 25, dtype=f64)
    wide[:, 3:21:2] = table
    for other in (table.t().contiguous().t(), wide[:, 3:21:2]):
        again = step(bad[0], outputs, bad[1], other, **arguments)
        assert all(same_bits(a, b) for a, b in zip(found, again, strict=True))
    for b in range(3):
        one = step(bad[0][b, None], [t[b, None] for t in outputs], bad[1][b, None], table[b], **arguments)
        for whole, alone in zip(found, one, strict=True):
            assert same_bits(whole[b], alone[0]), b


def test_steps_whose_noise_is_drawn_or_given():
    """In SNR the noise is p, whoever made it; a seed per sample counts within each."""
    x, outputs, _ = step_tensors()
    coef = torch.tensor((0.1, 1.0, *STEP[2:9]), dtype=f64)
    for seed in (torch.tensor([3, 9]), torch.tensor([[3, 9], [4, 9], [5, 2**40]])):
        drawn = step(x, outputs, None, coef, seed=seed, variant=SNR, wanted=DOUBLED)
        close(drawn, defined(x, outputs, None, coef, seed=seed, variant=SNR, wanted=DOUBLED))
        given = reference_noise.normal(seed, tuple(x.shape), torch.float32, 1)
        close(drawn, step(x, outputs, given, coef, variant=SNR, wanted=DOUBLED))


def test_steps_without_prev_and_of_other_layouts():
    x, outputs, prev = step_tensors()
    coef = torch.tensor((*STEP[:1], 0.0, *STEP[2:9]), dtype=f64)
    poison = torch.full_like(prev, float("nan"))
    alone = step(x, outputs, None, coef)
    assert all(same_bits(a, b) for a, b in zip(alone, step(x, outputs, poison, coef), strict=True))
    close(alone, defined(x, outputs, None, coef))
    coef = torch.tensor(STEP[:9], dtype=f64)
    last = torch.channels_last
    for wanted in (0, DOUBLED, DOUBLED + DIRECTION):
        moved = [t.contiguous(memory_format=last) for t in (x, *outputs, prev)]
        found = step(moved[0], moved[1:3], moved[3], coef, wanted=wanted)
        assert found[0].is_contiguous(memory_format=last)
        mixed = step(moved[0], outputs, prev.mT.contiguous().mT, coef, wanted=wanted)
        plain = step(x, outputs, prev, coef, wanted=wanted)
        for a, b, c in zip(found, mixed, plain, strict=True):
            assert same_bits(a, b)
            torch.testing.assert_close(a, c, rtol=1e-6 if a.dtype == x.dtype else 1e-2, atol=1e-6)


def test_steps_have_plans():
    x, outputs, prev = step_tensors()
    plans = {}
    for name, kappa, wanted in (("bent", 0.4, 0), ("straight", 0.0, 0), ("doubled", 0.4, DOUBLED)):
        coef = torch.tensor((3.0, kappa, *STEP[2:9]), dtype=f64)
        plans[name] = _native.plan_of(lambda c=coef, w=wanted: step(x, outputs, prev, c, wanted=w))
    assert (
        plans["bent"].startswith("held") and "general" in plans["bent"] and plans["doubled"] == plans["bent"]
    )
    assert plans["straight"].startswith("one_sweep")
    table = torch.tensor([(3.0, 0.0, *STEP[2:9])] * 3, dtype=f64)
    assert _native.plan_of(lambda: step(x, outputs, prev, table)) == plans["bent"]  # nobody looks at it


def test_thresholds_have_plans():
    """Both kernels of a call, in words; `out` shows that they did not run."""
    x = torch.full((3, 5000), 7.0)
    said = plan(mq.dynamic_threshold, x, ratio=0.5, maximum=3.0)
    assert said == "select: 1 CTA x 512 threads a sample; rescale: 2 CTAs x 256 threads a sample"
    assert plan(mq.dynamic_threshold, x[:0]) == "nothing to do; nothing to do"
    out = torch.full_like(x, -5.0)
    assert _native.plan_of(lambda: mq.dynamic_threshold(x, ratio=0.5, maximum=3.0, out=out)) == said
    assert bool((out == -5.0).all())
    mq.dynamic_threshold(x, ratio=0.5, maximum=3.0, out=out)
    assert bool((out == 1.0).all())


def test_nothing_to_do():
    """Calls of no samples, and samples of no elements."""
    for shape in ((0, 5), (3, 0)):
        eps = torch.empty(shape)
        assert mq.lm_direction(eps, eps, damping=0.1, kappa=0.3).shape == shape
        assert mq.affine_step([eps], [2.0]).shape == shape
        moved = step(eps, [eps], eps, torch.tensor(STEP[:7], dtype=f64), wanted=DOUBLED + DIRECTION)
        assert [t.shape for t in moved] == [(2 * shape[0], shape[1]), shape, (shape[0], 0)]
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
