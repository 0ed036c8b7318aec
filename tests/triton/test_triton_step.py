"""lm_step, the step behind the samplers, against its definition in float64: numbers, terms, tails, strides, dtypes."""

import pytest
import torch
from test_triton_frame import BF16, F16, F32, F64, LAYOUTS, data

KEEP_NORM, EXTRAPOLATE, SNR = 0, 2, 3
VARIANTS = [KEEP_NORM, EXTRAPOLATE, SNR]
DIRECTION, STATE_DIRECTION, CONVERTED, DOUBLED, GUIDED = 1, 2, 4, 8, 16
PAIRS = [(F32, F32), (F32, BF16), (BF16, BF16), (F16, F16), (F64, F64)]
SEED, SEEDS = torch.tensor([11, 2**35]), torch.tensor([[11, 2**35], [-3, 5]])
NAN = float("nan")

lml = pytest.importorskip("marquardt.reference.lml")


class Step:
    """The arguments of a call: `sources` tensors, with prev (given noise in SNR) where no seed takes its place."""

    def __init__(
        self, sources, variant=KEEP_NORM, *, shape=(2, 601), state=F32, model=None, prev=True, seed=None,
        clipped=False, wanted=0, batch_dims=1, rows=None,
    ):  # fmt: skip
        model = model or state
        self.sample = data(*shape, dtype=state)
        self.outputs = [data(*shape, dtype=model, seed=j) for j in range(1, sources)]
        drawn = variant == SNR and seed is not None
        self.prev = data(*shape, dtype=model, seed=9) if prev and not drawn else None
        self.at = lml.Columns(sources, seed is not None and variant != SNR, clipped)
        self.seed, self.variant, self.wanted, self.clipped = seed, variant, wanted, clipped
        self.batch_dims = batch_dims
        coef = torch.cos(torch.arange(self.at.total, dtype=F64) + sources)  # of both signs, of size one
        coef[:2] = torch.tensor([0.7, 0.4])
        if clipped:
            coef[self.at.y + 2] = 0.8
        spread = torch.linspace(1.0, 1.3, rows or 1, dtype=F64)[:, None]
        self.coef = coef if rows is None else spread * coef

    def arguments(self, wide=False):
        def tensor(t):
            return None if t is None else t.double() if wide else t

        return (
            tensor(self.sample), [tensor(t) for t in self.outputs], tensor(self.prev), self.coef, self.seed,
            self.variant, self.wanted, self.clipped, self.batch_dims,
        )  # fmt: skip

    def exact(self):
        return lml.lm_step(*self.arguments(wide=True))

    def types(self):
        model = self.outputs[0].dtype if self.outputs else self.sample.dtype
        return self.sample.dtype, self.sample.dtype if self.wanted & STATE_DIRECTION else model, model

    def check(self, kernels):
        """The results, each in its type and within a few roundings of the definition in float64."""
        found = kernels.frame.lm_step(*self.arguments())
        drawn = 0.0 if self.seed is None else 4 * 2.0**-23  # of normals up to 4, in float64 too
        for name, f, e, dtype in zip(("x'", "direction", "y"), found, self.exact(), self.types()):
            assert f.shape == e.shape and (f.dtype == dtype or f.numel() == 0), name
            near(f, e, drawn, name)
        return found


def near(found, exact, drawn=0.0, name=""):
    if found.numel() == 0:
        return
    dtype, found = found.dtype, found.double()
    assert torch.equal(found.isnan(), exact.isnan()), f"{name}: NaN"
    found, exact = found.nan_to_num(), exact.nan_to_num()
    base = 1e-12 if dtype == F64 else 1e-6
    half_place = {F32: 0.0, F64: 0.0, BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    bound = (base + 2 * drawn) * exact.abs().max() + half_place * exact.abs() * (1 + 1e-3) + 1e-45
    excess = ((found - exact).abs() - bound).max()
    assert excess <= 0, f"{name}: off by {(found - exact).abs().max():.3g}, scale {exact.abs().max():.3g}"


# --- values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sources", range(1, 7))
def test_values(kernels, launches, sources, variant):
    """Every number of sources, with whatever else a step may have."""
    split = launches == "split"
    clipped = (sources + split) % 2 == 0
    seed = None if (sources + variant + split) % 3 else (SEED, SEEDS)[split]
    wanted = (DIRECTION, STATE_DIRECTION)[split] + DOUBLED * (sources % 2) + CONVERTED * clipped
    wanted += GUIDED * (sources > 2 and sources % 2 == variant % 2)
    rows = 2 if (sources + variant) % 2 else None
    step = Step(sources, variant, seed=seed, clipped=clipped, wanted=wanted, rows=rows)
    new, *_ = step.check(kernels)
    if wanted & DOUBLED:
        assert len(new) == 4 and torch.equal(new[:2], new[2:])


@pytest.mark.parametrize("variant", [KEEP_NORM, SNR])
@pytest.mark.parametrize("state,model", PAIRS)
def test_dtypes(kernels, launches, state, model, variant):
    direction = STATE_DIRECTION if (variant == SNR) == (launches == "split") else DIRECTION
    Step(3, variant, state=state, model=model, clipped=True, wanted=direction + CONVERTED).check(kernels)


@pytest.mark.parametrize("seed", [None, SEED, SEEDS], ids=["none", "seed", "seeds"])
@pytest.mark.parametrize("rows", [None, 2])
def test_without_prev(kernels, seed, rows):
    """Σ (A_j + w·D_j)·s_j; what the batch shares is walked as one long sample."""
    for wanted in (0, DIRECTION + CONVERTED + DOUBLED):
        step = Step(2, prev=False, shape=(2, 257), seed=seed, rows=rows, clipped=True, wanted=wanted)
        if not wanted:  # source 1 counts through y alone, and that for x' alone
            step.coef[..., [step.at.a.start + 1, step.at.d.start + 1, step.at.y + 1]] = 0.0
        step.check(kernels)


def test_one_long_sample_gives_the_same_bits(kernels):
    """Shared numbers and numbers per sample that are alike; strided samples are walked one by one."""
    step = Step(2, prev=False, shape=(3, 4, 65), seed=SEED, wanted=DIRECTION + DOUBLED)
    whole = kernels.frame.lm_step(*step.arguments())
    step.coef = step.coef.expand(3, -1)
    apart = kernels.frame.lm_step(*step.arguments())
    step.coef, step.outputs = step.coef[0], [torch.cat([t, t], dim=1)[:, :4] for t in step.outputs]
    sliced = kernels.frame.lm_step(*step.arguments())
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(whole, apart, sliced))


@pytest.mark.parametrize("size", [1, 3, 127, 128, 129, 255, 257, 511, 512, 513, 1025])
def test_block_borders(kernels, launches, size):
    for batch_dims in (0, 1):
        seed = SEED if size % 2 and size < 200 else None
        wanted = STATE_DIRECTION + CONVERTED + (DOUBLED if batch_dims else 0)
        Step(2, shape=(2, size)[1 - batch_dims :], seed=seed, clipped=True, wanted=wanted,
             batch_dims=batch_dims).check(kernels)  # fmt: skip


@pytest.mark.parametrize("shape", [(0, 5), (2, 0), (0, 3, 4)])
def test_nothing_to_do(kernels, shape):
    made = kernels.frame.lm_step(*Step(2, shape=shape, wanted=DIRECTION + DOUBLED).arguments())
    assert [tuple(t.shape) for t in made] == [(2 * shape[0], *shape[1:]), shape, (shape[0], 0)]


def test_bitwise_repeatable_in_any_batch(kernels, launches):
    step = Step(3, shape=(2, 1101), wanted=DIRECTION)
    whole = kernels.frame.lm_step(*step.arguments())
    assert all(torch.equal(a, b) for a, b in zip(whole, kernels.frame.lm_step(*step.arguments())))
    step.sample, step.prev, step.outputs = step.sample[1:], step.prev[1:], [t[1:] for t in step.outputs]
    assert torch.equal(whole[0][1:], kernels.frame.lm_step(*step.arguments())[0])


# --- noise ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [KEEP_NORM, SNR])
@pytest.mark.parametrize("seed", [SEED, SEEDS], ids=["seed", "seeds"])
@pytest.mark.parametrize("dtype", [F32, F64])
def test_normals(kernels, launches, seed, variant, dtype):
    """Element by element: the normals of the index in the call, or in the sample, within 4 ulp of float32."""
    step = Step(1, variant, shape=(2, 6, 23), state=dtype, prev=False, seed=seed)
    step.coef = torch.zeros_like(step.coef)
    if variant == SNR:  # e = 1: h = 2ξ̄², x' = h + ξ·√(2h)
        step.sample = torch.ones_like(step.sample)
        step.coef[[0, 1, step.at.d.start]] = torch.tensor([0.5, 1.0, 1.0], dtype=F64)
    else:
        step.coef[step.at.noise] = 1.0
    found, exact = kernels.frame.lm_step(*step.arguments())[0].double(), step.exact()[0]
    terms = exact.abs() + (2.0 if variant == SNR else 2.0**-8)
    assert ((found - exact).abs() <= 4 * 2.0**-23 * terms).all()


@pytest.mark.parametrize("seed", [None, SEED], ids=["given", "drawn"])
def test_snr_without_direction(kernels, launches, seed):
    """e = 0: no step, and a temperature of 0 needs no noise beside."""
    step = Step(2, SNR, seed=seed, wanted=DIRECTION)
    step.outputs[0][1] = 0
    step.coef[step.at.d] = torch.tensor([0.0, 1.0])
    new, e, _ = step.check(kernels)
    assert not e[1].any() and torch.equal(new[1], step.sample[1] * step.coef[3].float())
    step.coef[1] = 0.0
    step.check(kernels)


# --- what is not read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [KEEP_NORM, EXTRAPOLATE])
def test_prev_that_does_not_count(kernels, launches, variant):
    """NaN in prev where κ (γ) or w is 0; NaN in κ is a number."""
    step = Step(3, variant, shape=(5, 300), rows=5, wanted=DIRECTION)
    gate = 0 if variant == EXTRAPOLATE else 1
    step.coef[1, gate] = step.coef[3, 2] = 0.0
    step.coef[4, gate] = NAN
    step.prev[[1, 3]] = NAN
    new, e, _ = step.check(kernels)
    assert torch.isfinite(new[:4]).all() and new[4].isnan().all() and torch.isfinite(e).all()
    step.coef = step.coef[1]
    step.prev[:] = NAN
    assert torch.isfinite(step.check(kernels)[0]).all()


@pytest.mark.parametrize("rows", [None, 2])
def test_guided(kernels, launches, rows):
    """s_1 stands for s_1 − s_2: digits that large multiples of nearly equal outputs would lose, and what is read."""
    step = Step(3, rows=rows, clipped=True, wanted=GUIDED + DIRECTION + CONVERTED)
    step.outputs[0] = (step.outputs[1].double() * (1 + 1e-6)).float()
    step.coef[..., [step.at.d.start + 1, step.at.y + 4]] *= 1e5
    step.check(kernels)
    uses = [step.at.a, step.at.d, slice(step.at.y + 3, None)]
    for use in uses:  # s_1 alone, and in sample 0 (or none of the numbers) neither
        step.coef[..., use][..., 2] = 0.0
    step.check(kernels)
    if rows:
        for use in uses:
            step.coef[0, use][1] = 0.0
        step.outputs[0][0] = step.outputs[1][0] = NAN
    found = step.check(kernels)
    assert all(torch.isfinite(t).all() for t in found)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("form", ["shared", "per-sample"])
@pytest.mark.parametrize("wanted", [0, STATE_DIRECTION + CONVERTED])
def test_zeros_leave_tensors_unread(kernels, launches, variant, form, wanted):
    """Source 2 counts for nothing, source 3 for e alone, source 4 for a alone, source 5 for y alone."""
    step = Step(
        6, variant, shape=(2, 333), clipped=True, wanted=wanted, rows=2 if form == "per-sample" else None
    )
    a, d, y = step.at.a.start, step.at.d.start, step.at.y + 3
    for j, used in ((2, ""), (3, "d"), (4, "a"), (5, "y")):
        for name, first in (("a", a), ("d", d), ("y", y)):
            if name not in used:
                step.coef[..., first + j] = 0.0
    step.outputs[1][:] = NAN
    if form == "per-sample":  # y is not looked at in sample 1, nor source 4, nor w·e
        step.coef[1, [2, step.at.y, step.at.y + 1, a + 4]] = 0.0
        step.outputs[3][1] = NAN
        if not wanted and variant != SNR:
            step.outputs[2][1] = step.outputs[4][1] = NAN
    new, e, _ = step.check(kernels)
    assert torch.isfinite(new).all() and torch.isfinite(e).all()


@pytest.mark.parametrize("use", ["a", "d", "y"])
def test_nan_of_one_use_does_not_reach_another(kernels, launches, use):
    """Source 1 is NaN and counts for one of x', e and y alone."""
    step = Step(2, shape=(2, 300), rows=2, clipped=True, wanted=DIRECTION + CONVERTED)
    first = {"a": step.at.a.start, "d": step.at.d.start, "y": step.at.y + 3}
    step.coef[:, [2, step.at.y, step.at.y + 1, *(first[u] + 1 for u in first if u != use)]] = 0.0
    step.outputs[0][:] = NAN
    for name, found in zip(first, step.check(kernels)):
        assert found.isnan().all() if name == use else torch.isfinite(found).all()


def test_clamp_keeps_nan_and_bounds(kernels, launches):
    step = Step(2, clipped=True, wanted=CONVERTED)
    step.outputs[0][0, 5] = NAN
    y = step.check(kernels)[2]
    assert y[0].isnan().sum() == 1 and y[1:].abs().max() == torch.tensor(0.8)
    step.coef[step.at.y + 2] = -0.3  # both bounds at once: the upper one
    assert (step.check(kernels)[2][1:] == torch.tensor(-0.3)).all()


@pytest.mark.parametrize("bad", [-1.0, NAN])
def test_bad_damping_spoils_its_sample(kernels, launches, bad):
    step = Step(2, shape=(3, 300), rows=3)
    step.coef[1, 0] = bad
    new = kernels.frame.lm_step(*step.arguments())[0]
    assert new[1].isnan().all() and torch.isfinite(new[[0, 2]]).all()


@pytest.mark.accuracy
@pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("guided", [0, GUIDED])
def test_small_damping(kernels, launches, guided, clipped, multiple):
    """The step is nearly orthogonal to r and shows what e and r = p − e were rounded by: their sums are float64."""
    step = Step(3, clipped=clipped, wanted=guided | STATE_DIRECTION | DOUBLED, shape=(2, 2049))
    step.coef[:3] = torch.tensor([1e-3, 0.1, 0.8])
    straight = step.exact()[1].float()
    step.prev = multiple * (straight + 1e-3 * data(2, 2049, seed=12))
    step.check(kernels)


def test_zero_direction_and_parallel_prev(kernels, launches):
    step = Step(2, wanted=DIRECTION)
    step.coef[step.at.d] = torch.tensor([0.0, 1.0])
    step.outputs[0][1] = 0
    step.check(kernels)
    step.coef[0] = 0.0
    step.prev = 2 * step.outputs[0]
    step.check(kernels)


# --- layouts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["plain", "channels_last", "expanded", "noisy"])
def test_layouts(kernels, first, second):
    from marquardt.step import STEP

    for wanted in (STATE_DIRECTION + CONVERTED, DIRECTION + DOUBLED):
        seed = SEED if second == "noisy" else None
        step = Step(2, shape=(3, 4, 5, 6), seed=seed, model=BF16, clipped=True, wanted=wanted)
        step.sample = LAYOUTS[first](step.sample)
        step.outputs = [LAYOUTS.get(second, lambda t: t)(t) for t in step.outputs]
        found = step.check(kernels)
        promised = STEP.fake(*step.arguments())
        assert [t.stride() for t in found] == [t.stride() for t in promised]


def test_operator_and_fake(kernels):
    """`marquardt_triton::lm_step` returns what the entry point does, and its fake tells shapes, types and strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernels.register()
    op = torch.ops.marquardt_triton.lm_step
    for wanted in (0, DIRECTION, STATE_DIRECTION + CONVERTED + DOUBLED):
        for sources, batch_dims in ((1, 1), (2, 1), (2, 0)):
            step = Step(
                sources, shape=(2, 3, 4, 5), model=BF16, clipped=True, wanted=wanted, batch_dims=batch_dims
            )
            step.wanted &= ~(0 if batch_dims else DOUBLED)
            step.sample = LAYOUTS["channels_last"](step.sample)
            real = op(*step.arguments())
            assert all(torch.equal(a, b) for a, b in zip(real, kernels.frame.lm_step(*step.arguments())))
            with FakeTensorMode() as mode:
                fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, step.arguments())
                told = op(*fakes)
            seen = [(t.shape, t.dtype, t.stride(), t.device) for t in real]
            assert seen == [(t.shape, t.dtype, t.stride(), t.device) for t in told]


# --- the public functions ------------------------------------------------------------------------------------------


def sampler_calls(dtype):
    """name -> a call of a public function."""
    import marquardt as mq

    x, m, p, u = (data(2, 3, 50, dtype=dtype, seed=j) for j in range(4))
    weights = torch.tensor([0.2, 0.3], dtype=F64)
    bent = {"damping": 0.2, "kappa": 0.4}
    ddim = {"alpha_bar": 0.5, "alpha_bar_next": 0.7}
    tables = {"lambdas": [-0.4, 0.1, 0.9], "alphas": [0.6, 0.74, 0.9], "sigmas": [0.8, 0.67, 0.43]}
    return {
        "ddim": lambda: mq.lml_ddim_step(x, m, p, **ddim, **bent, clip=0.9, guidance=(u, 2.0)),
        "ddim-v": lambda: mq.lml_ddim_step(
            x, m, p, **ddim, extrapolation=weights, prediction_type="v_prediction", eta=0.4, seed=SEED, doubled=True
        ),
        "ddim-plain": lambda: mq.lml_ddim_step(x, m, **ddim),
        "dpm": lambda: mq.lml_dpm_step(x, [m, u], p, **tables, order=2, algorithm="dpmsolver++", **bent),
        "dpm-sde": lambda: mq.lml_dpm_step(
            x, [m, u], p, **tables, order=2, algorithm="sde-dpmsolver++", lm_on_sde=True, noise=u, **bent
        ),
        "flow": lambda: mq.lml_flow_step(x, m, p, dt=-0.1, damping=weights, kappa=0.3),
        "flow-noise": lambda: mq.lml_flow_step(
            x, m, p, sigma=0.7, sigma_next=0.5, stochastic=True, seed=SEED, **bent,
            active=torch.tensor([True, False]),
        ),
        "underdamped": lambda: mq.underdamped_langevin_step(x, p, m, step=0.1, friction=0.7, noise=u),
        "underdamped-seed": lambda: mq.underdamped_langevin_step(x, p, m, step=0.1, friction=0.7, seed=SEED),
        "langevin": lambda: mq.langevin_step(x, m, snr=0.16, noise=u),
        "langevin-seed": lambda: mq.langevin_step(x, m, snr=weights, temperature=0.7, seed=SEED),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", sampler_calls(F32))
def test_public_functions(kernels, name, dtype):
    """The samplers' steps on this backend are those of the native kernels, up to rounding."""
    import marquardt as mq

    if "cpu" not in mq.backends.available("cpu"):
        pytest.skip("the native library is not built")
    call = sampler_calls(dtype)[name]
    with mq.use_backend("cpu"):
        native = call()
    with mq.use_backend("triton"):
        found = call()
    drawn = 4 * 2.0**-23 if "seed" in name or name in ("ddim-v", "flow-noise") else 0.0
    for f, e in zip(
        found if isinstance(found, tuple) else (found,), native if isinstance(native, tuple) else (native,)
    ):
        assert f.dtype == e.dtype and f.stride() == e.stride()
        near(f, e.double(), drawn, name)
