"""The operator behind the sampler steps: every way through its kernels against the definition, bits, tracing."""

from __future__ import annotations

import math

import pytest
import torch

import cases
from harness import INTERPRETED, native_only, same_bits
from marquardt import backends
from marquardt.reference.lml import CONVERTED, DIRECTION, DOUBLED, GUIDED, STATE_DIRECTION, Columns
from marquardt.step import EXTRAPOLATE, KEEP_NORM, SNR, STEP

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
PAIRS = ((f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f16, f16), (f64, f64))
pytestmark = pytest.mark.skipif(INTERPRETED, reason="tests/triton has its own")

# A, D by source, the sample first: each (terms, terms in the direction) that has a kernel of its own, and others
TERMS = {
    "1-1": ([0.0], [1.0]),
    "2-1": ([0.9, 0.0], [0.0, 1.0]),
    "2-2": ([0.9, -0.2], [0.4, 1.1]),
    "3-1": ([0.9, 0.3, -0.4], [0.0, 1.0, 0.0]),
    "3-2": ([0.9, -0.5, 0.3], [0.0, 3.0, -2.0]),
    "3-3": ([0.9, -0.5, 0.3], [0.3, 3.0, -2.0]),
    "4-2": ([0.9, -0.5, 0.3, 0.2], [0.0, 3.0, -2.0, 0.0]),
    "4-3": ([0.9, 0.0, 0.0, 0.0], [0.0, 1.2, -0.7, 0.3]),
    "5-3": ([0.9, 0.0, 0.0, 0.0, 0.5], [0.0, 1.2, -0.7, 0.3, 0.0]),
    "5-4": ([0.9, 0.0, 0.0, 0.0, 0.0], [0.0, 1.2, -0.7, 0.3, -0.1]),
    "6-6": ([0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 1.2, -0.7, 0.3, 0.2, -0.3]),
    "4-1 apart": ([0.9, 0.4, -0.2, 0.0], [0.0, 0.0, 0.0, 1.0]),
    "3-1 base": ([0.9, 0.0, 0.3], [0.0, 0.0, 1.5]),
    "6-0": ([0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [0.0] * 6),
}


def numbers(a, d, rule=(0.5, 0.3), weight=0.8, noise=None, y=None):
    """`coef` of a step; `y` is (A_y, D_y, bound, Y…)."""
    return torch.tensor([*rule, weight, *a, *d, *(noise or ()), *(y or ())], dtype=f64)


def tensors(shape, outputs, pair=(f32, f32), seed=0):
    """(sample, outputs, prev); prev is near the last output."""
    generator = torch.Generator().manual_seed(seed)
    made = [cases.gaussian(generator, shape) for _ in range(outputs + 2)]
    last = made[outputs] if outputs else made[0]
    prev = 0.9 * last + 0.4 * made[-1]
    return made[0].to(pair[0]), [t.to(pair[1]) for t in made[1 : outputs + 1]], prev.to(pair[1])


def definition(*args):
    """The same in float64, and rounded like the outputs of the call."""
    sample, outputs, prev, *rest = args
    wide = STEP.reference(
        sample.double(), [t.double() for t in outputs], None if prev is None else prev.double(), *rest
    )
    return wide


def assert_near(found, expected, dtype_bound=3e-7, drawn=False):
    """Norm-wise per tensor, and half a unit of a narrower type on top; drawn normals are float32's, within 4 ulp."""
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        if b.numel() == 0:
            continue
        rounding = 0.0 if a.dtype in (f32, f64) else torch.finfo(a.dtype).eps / 2
        bound = (3e-7 if drawn else 1e-13) if a.dtype == f64 else dtype_bound + rounding
        error = (a.double() - b.double()).norm() / b.double().norm()
        assert error <= bound, (a.dtype, float(error), bound)


@pytest.mark.accuracy
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("name", TERMS)
def test_terms(name: str, pair):
    """Each number of terms, with and without a direction of before, two results of it, and x' twice."""
    a, d = TERMS[name]
    for size in (7, 300, 2 * 2048 + 17):
        # λ about ‖e‖²: a step orthogonal to e would magnify the rounding of a guided e
        for mode, rule in ((KEEP_NORM, (4.0 * size, 0.3)), (EXTRAPOLATE, (0.4, 0.0))):
            for wanted in (
                0,
                STATE_DIRECTION | DOUBLED,
                *((GUIDED, GUIDED | DIRECTION) if len(a) > 2 else ()),
            ):
                for has_prev in (True, False):
                    sample, outputs, prev = tensors((3, size), len(a) - 1, pair, seed=size)
                    args = (
                        sample,
                        outputs,
                        prev if has_prev else None,
                        numbers(a, d, rule),
                        None,
                        mode,
                        wanted,
                    )
                    found = STEP.plain(*args, False, 1)
                    expected = definition(*args, False, 1)
                    keep = slice(0, 1) if name == "6-0" else slice(None)  # a direction of 0 has no norm
                    assert_near(found[keep], expected[keep])


@pytest.mark.accuracy
@pytest.mark.parametrize("pair", PAIRS, ids=str)
@pytest.mark.parametrize("drawn", [False, True])
def test_clipped_row(pair, drawn: bool):
    """y is bounded, counts in x' and in the direction, and comes back."""
    a, d, y = [0.0, 0.0, 0.2], [0.7, 0.0, 0.0], [0.6, -0.5, 0.8, 1.3, -0.6, 0.1]
    noise, seed = ([0.3, 0.0], torch.tensor([5, 9])) if drawn else (None, None)
    for wanted in (0, DIRECTION | CONVERTED, CONVERTED | DOUBLED, GUIDED | CONVERTED):
        sample, outputs, prev = tensors((2, 5000), 2, pair)
        args = (sample, outputs, prev, numbers(a, d, noise=noise, y=y), seed, KEEP_NORM, wanted, True, 1)
        found = STEP.plain(*args)
        assert_near(found, definition(*args), drawn=drawn)
        assert found[2].numel() == 0 or found[2].abs().max() <= 0.8 + 0.01


@pytest.mark.accuracy
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_signal_to_noise(pair):
    """x + h·s + √(2hT)·ξ with h = 2(r‖ξ‖/‖s‖)², noise given or drawn."""
    sample, outputs, noise = tensors((3, 4100), 1, pair)
    coef = numbers([1.0, 0.0], [0.0, 1.0], (0.16, 0.7), 1.0)
    given = (sample, outputs, noise, coef, None, SNR, 0, False, 1)
    assert_near(STEP.plain(*given), definition(*given))
    drawn = (sample, outputs, None, coef, torch.tensor([1, 2]), SNR, 0, False, 1)
    assert_near(STEP.plain(*drawn), definition(*drawn), 6e-7, drawn=True)
    outputs[0][1] = 0  # no direction, no step
    assert same_bits(STEP.plain(*given)[0][1], sample[1])


@pytest.mark.accuracy
@pytest.mark.parametrize("guided", [0, GUIDED])
@pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
@pytest.mark.parametrize("apart", [1e-3, 0.1, 0.3])
@pytest.mark.parametrize("size", [37, 4096, 70001])
def test_small_damping(size: int, apart: float, multiple: float, guided: int):
    """The step is nearly orthogonal to r and would magnify the rounding of e a thousandfold: sums are double.

    Near p = e the multiple of r is large, near p = 3e those of e and of r, which then cancel.
    """
    generator = torch.Generator().manual_seed(5)
    sample, first, second = (torch.randn(3, size, generator=generator) for _ in range(3))
    a, d = [0.9, -0.5, 0.3], [0.0, 0.7, 0.4]
    e = d[1] * (first - second if guided else first) + d[2] * second
    prev = multiple * (e + apart * torch.randn(3, size, generator=generator))
    for y in (None, [0.2, 0.6, math.inf, 0.3, 0.8, -0.4]):
        coef = numbers(a, d, (1e-3, 0.1), y=y)
        args = (
            sample,
            [first, second],
            prev if y is None else prev + 0.3 * multiple * sample,
            coef,
            None,
            KEEP_NORM,
        )
        wanted = guided | STATE_DIRECTION | DOUBLED
        assert_near(STEP.plain(*args, wanted, y is not None, 1), definition(*args, wanted, y is not None, 1))


@pytest.mark.accuracy
def test_nearly_parallel():
    """The determinant is lost to float32 products: they are taken again in double."""
    generator = torch.Generator().manual_seed(3)
    m = torch.randn(2, 9000, generator=generator)
    prev = m + 1e-4 * torch.randn(2, 9000, generator=generator)
    for a, d in (([0.9, 0.0], [0.0, 1.0]), ([0.9, 0.0, 0.0], [0.0, 2.0, -1.0])):
        outputs = [m, m + 1e-5 * torch.randn(2, 9000, generator=generator)][: len(a) - 1]
        args = (
            torch.randn(2, 9000, generator=generator),
            outputs,
            prev,
            numbers(a, d, (0.01, 0.5)),
            None,
            0,
            0,
        )
        assert_near(STEP.plain(*args, False, 1), definition(*args, False, 1))


@pytest.mark.accuracy
@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_zero_leaves_a_tensor_unread(shared: bool, clipped: bool):
    """Per number: NaN behind a 0 does not matter; behind anything else it does."""
    y = [0.4, 0.3, 0.9, 0.0, 1.0, 0.0] if clipped else None
    coef = numbers([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], y=y)
    coef = coef if shared else coef.expand(3, -1)
    sample, outputs, prev = tensors((3, 2500), 2)
    clean = STEP.plain(sample, outputs, prev, coef, None, KEEP_NORM, 0, clipped, 1)[0]
    spoilt = STEP.plain(
        sample, [outputs[0], torch.full_like(sample, torch.nan)], prev, coef, None, 0, 0, clipped, 1
    )[0]
    assert same_bits(clean, spoilt)
    outputs[0][1, 77] = torch.nan
    hurt = STEP.plain(sample, outputs, prev, coef, None, KEEP_NORM, 0, clipped, 1)[0]
    assert hurt[1].isnan().any()
    assert same_bits(hurt[[0, 2]], clean[[0, 2]])


@pytest.mark.accuracy
def test_kappa_and_weight_of_zero_leave_prev_unread():
    sample, outputs, prev = tensors((4, 3000), 1)
    prev[1:] = torch.nan
    rows = numbers([0.9, -0.3], [0.0, 1.0]).repeat(4, 1)
    rows[1, 1] = 0.0  # κ
    rows[2, 2] = 0.0  # w
    found = STEP.plain(sample, outputs, prev, rows, None, KEEP_NORM, DIRECTION, False, 1)
    assert not found[0][:3].isnan().any()
    assert found[0][3].isnan().all()
    assert same_bits(found[1], outputs[0])
    plain = STEP.plain(sample, outputs, None, rows, None, KEEP_NORM, 0, False, 1)[0]
    assert same_bits(found[0][1:3], plain[1:3])


@pytest.mark.accuracy
def test_direction_may_be_spoilt_where_the_step_is_not():
    """x' = x with w = 0 and A = (1, 0); the direction, which is asked for, holds the NaN."""
    sample, outputs, _ = tensors((2, 2049), 1)
    outputs[0][0, 5] = torch.nan
    coef = numbers([1.0, 0.0], [0.0, 2.0], weight=0.0)
    new, direction, _ = STEP.plain(sample, outputs, None, coef, None, KEEP_NORM, DIRECTION, False, 1)
    assert same_bits(new, sample)
    assert direction[0].isnan().sum() == 1


@pytest.mark.accuracy
def test_signs_of_zero_are_kept():
    sample, outputs, prev = tensors((2, 40), 1)
    outputs[0][:, ::3] = -0.0
    direction = STEP.plain(
        sample, outputs, prev, numbers([0.9, 0.0], [0.0, 1.0]), None, 0, DIRECTION, False, 1
    )[1]
    assert same_bits(direction, outputs[0])


def variants():
    """Arguments behind the tensors, one for each way through the kernels."""
    plain, guided = numbers(*TERMS["2-1"]), numbers(*TERMS["3-2"])
    many, y = numbers(*TERMS["6-6"]), [0.4, 0.3, 0.9, 0.2, 1.0, 0.0]
    bounded = numbers([0.3, 0.0, 0.1], [0.0, 1.0, 0.0], y=y)
    noisy = numbers(*TERMS["2-1"], noise=[0.3, 0.1])
    return [
        ("plain", 1, (plain, None, KEEP_NORM, 0, False)),
        ("two", 2, (guided, None, EXTRAPOLATE, DIRECTION, False)),
        ("orthogonal", 2, (numbers(*TERMS["3-2"], (1e-3, 0.1)), None, KEEP_NORM, DIRECTION, False)),
        ("guided", 2, (guided, None, EXTRAPOLATE, DIRECTION | GUIDED, False)),
        ("many", 5, (many, None, KEEP_NORM, STATE_DIRECTION, False)),
        ("bounded", 2, (bounded, None, KEEP_NORM, DIRECTION | CONVERTED, True)),
        (
            "noisy",
            1,
            (noisy, torch.stack([torch.arange(6), torch.arange(6) + 9], 1), KEEP_NORM, DIRECTION, False),
        ),
    ]


def _rows(arguments, batch):
    coef, seed, *rest = arguments
    return (coef, None if seed is None else seed[batch].contiguous(), *rest)


@pytest.mark.determinism
@pytest.mark.parametrize("variant", variants(), ids=lambda v: v[0])
@pytest.mark.parametrize("size", [100, 2048, 5000, 70001])
def test_bits_do_not_depend_on_batch_or_threads(variant, size: int):
    _, count, arguments = variant
    batch = 6
    sample, outputs, prev = tensors((batch, size), count, (f32, bf16))
    everyone = torch.arange(batch)
    whole = STEP.plain(sample, outputs, prev, *_rows(arguments, everyone), 1)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for rows in (everyone, everyone.flip(0), everyone[3:4], everyone[:5]):
                part = [sample[rows], [t[rows] for t in outputs], prev[rows]]
                for a, b in zip(whole, STEP.plain(*part, *_rows(arguments, rows), 1), strict=True):
                    assert same_bits(a[rows], b)
    finally:
        torch.set_num_threads(before)


@pytest.mark.strides
@pytest.mark.parametrize("variant", variants(), ids=lambda v: v[0])
def test_layouts(variant):
    """channels_last, transposed, sliced and expanded inputs: the values of contiguous ones, the strides promised."""
    _, count, arguments = variant
    sample, outputs, prev = tensors((6, 8, 5, 7), count)
    expected = STEP.plain(sample, outputs, prev, *arguments, 1)
    changes = {
        "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
        "transposed": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
        "sliced": lambda t: torch.stack([t, t], -1)[..., 0],
        "batch inside": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    }
    for change in changes.values():
        for which in range(3):
            x, ms, p = sample, list(outputs), prev
            if which == 0:
                x = change(x)
            elif which == 1:
                ms[-1] = change(ms[-1])
            else:
                p = change(p)
            for wanted in (arguments[3], arguments[3] | DOUBLED):
                args = (x, ms, p, arguments[0], arguments[1], arguments[2], wanted, arguments[4], 1)
                found, fake = STEP.plain(*args), STEP.fake(*args)
                for a, b, f in zip(found, expected, fake, strict=True):
                    assert a.stride() == f.stride() and a.shape == f.shape and a.dtype == f.dtype
                    whole = torch.cat([b, b]) if a.shape[0] == 2 * b.shape[0] else b
                    assert a.numel() == 0 or (a - whole).norm() <= 2e-7 * whole.norm()


@pytest.mark.strides
def test_empty():
    for shape in ((0, 4), (3, 0), (0, 3, 0)):
        sample, outputs, prev = torch.zeros(shape), [torch.zeros(shape)], torch.zeros(shape)
        found = STEP.plain(
            sample, outputs, prev, numbers(*TERMS["2-1"]), None, 0, STATE_DIRECTION | DOUBLED, False, 1
        )
        assert found[0].shape == (2 * shape[0], *shape[1:]) and found[1].shape == shape
    single = STEP.plain(torch.ones(5), [torch.ones(5)], None, numbers(*TERMS["2-1"]), None, 0, 0, False, 0)
    assert single[0].shape == (5,) and single[1].shape == (0,)


def samples():
    made = []
    for name, count, (coef, seed, mode, wanted, clipped) in variants():
        for pair in ((f32, f32), (f32, bf16)):
            made.append((name, (*tensors((6, 11), count, pair), coef, seed, mode, wanted, clipped, 1)))
    name, count, (coef, seed, mode, wanted, clipped) = variants()[0]
    sample, outputs, prev = tensors((2, 3, 4), count)
    leaves = (sample.requires_grad_(), [t.requires_grad_() for t in outputs], prev.requires_grad_())
    made.append(("leaves", (*leaves, coef.clone().requires_grad_(), seed, mode, wanted, clipped, 1)))
    made.append(("rows", (*tensors((2, 3, 4), count), coef.repeat(2, 1), seed, mode, DOUBLED, clipped, 1)))
    made.append(("empty", (*tensors((0, 3), count), coef, seed, mode, wanted, clipped, 1)))
    made.append(("unbatched", (*tensors((3, 4), count), coef, seed, mode, wanted, clipped, 0)))
    snr = numbers([1.0, 0.0], [0.0, 1.0], (0.16, 1.0), 1.0)
    made.append(("snr", (*tensors((2, 9), 1)[:2], None, snr, torch.tensor([3, 4]), SNR, 0, False, 1)))
    return made


@pytest.mark.opcheck
@pytest.mark.parametrize("sample", samples(), ids=lambda s: s[0])
@pytest.mark.parametrize("raw", [False, True])
def test_opcheck(sample, raw: bool):
    native_only()
    _, arguments = sample
    if raw and any(isinstance(a, torch.Tensor) and a.requires_grad for a in arguments):
        pytest.skip("the raw operator has no gradients")
    operator = getattr(torch.ops.marquardt, "_lm_step" if raw else "lm_step").default
    found = torch.library.opcheck(operator, arguments, raise_exception=True)
    assert set(found.values()) == {"SUCCESS"}, found


@pytest.mark.errors
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outputs": [torch.ones(2, 3)] * 6}, ("outputs", "at most 5", "6")),
        ({"variant": 1}, ("variant", "1")),
        ({"wanted": 3}, ("wanted", "3")),
        ({"wanted": GUIDED}, ("outputs", "two", "1")),
        ({"wanted": CONVERTED}, ("wanted", "clipped")),
        ({"wanted": DOUBLED, "batch_dims": 0}, ("doubled", "batch_dims")),
        ({"variant": SNR, "prev": None}, ("snr", "neither")),
        ({"coef": torch.ones(6, dtype=f64)}, ("coef", "[7]", "[6]")),
        ({"coef": torch.tensor([-1.0, 0.3, 1, 1, 1, 1, 1], dtype=f64)}, ("damping", "-1")),
        ({"coef": torch.tensor([1.0, math.inf, 1, 1, 1, 1, 1], dtype=f64)}, ("kappa", "inf")),
        ({"prev": torch.ones(2, 4)}, ("prev", "shape", "[2, 4]")),
        ({"outputs": [torch.ones(2, 3, dtype=f64)]}, ("outputs[0]", "pairs", "float64")),
        ({"outputs": [torch.ones(2, 3, dtype=bf16)], "prev": torch.ones(2, 3).half()}, ("prev", "model's", "float16")),
    ],
)  # fmt: skip
def test_refusals(change, words):
    """The same words from the native checks and from those in Python."""
    given = {
        "sample": torch.ones(2, 3), "outputs": [torch.ones(2, 3)], "prev": torch.ones(2, 3),
        "coef": numbers(*TERMS["2-1"]), "seed": None, "variant": 0, "wanted": 0, "clipped": False, "batch_dims": 1,
    }  # fmt: skip
    given.update(change)
    messages = []
    for backend in ("cpu", "reference"):
        with backends.use_backend(backend), pytest.raises((ValueError, TypeError)) as found:
            STEP.plain(*given.values())
        messages.append((type(found.value), str(found.value)))
    for kind, message in messages:
        assert message.startswith("lm_step: ") and all(w in message for w in words), (kind, message)
    assert messages[0][0] is messages[1][0]


def test_columns():
    """The definition and the kernels agree on how many numbers a step has."""
    for sources in (1, 3, 6):
        for noisy in (False, True):
            for clipped in (False, True):
                at = Columns(sources, noisy, clipped)
                expected = 3 + 2 * sources + 2 * noisy + (3 + sources) * clipped
                assert at.total == expected
