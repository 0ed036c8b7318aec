"""affine_step, the generic engine and the registered operators against float64 formulas."""

import pytest
import torch
from test_triton_frame import BF16, F16, F32, F64, KEEP_NORM, LAYOUTS, PAIRS, PLAIN, close, coef_of, data

# --- affine_step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state,model", PAIRS)
@pytest.mark.parametrize("count", [1, 3, 8])
def test_affine(kernels, launches, state, model, count):
    per_sample = launches == "split"
    terms = [data(3, 301, dtype=state)] + [data(3, 301, dtype=model, seed=j) for j in range(1, count)]
    coef = torch.linspace(-1.0, 0.7, 3 * count, dtype=F64).reshape(3, count)
    given = coef if per_sample else coef[1]
    rows = coef if per_sample else coef[1].expand(3, -1)
    out = kernels.frame.affine_step(terms, given, None, 1)
    close(out, sum(rows[:, j : j + 1] * t.double() for j, t in enumerate(terms)), state)


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (5, 3), (1, 4097), (3, 2, 3, 5)])
def test_affine_noise_and_backward(kernels, launches, shape):
    """The noise is what a step with coefficient 0 for the terms writes; its inner product is a gradient."""
    x, y, grad = data(*shape), data(*shape, dtype=BF16, seed=1), data(*shape, seed=2)
    seed = torch.tensor([11, 13])
    coef = torch.tensor([0.5, -2.0, 0.3], dtype=F64)
    xi = kernels.frame.affine_step([x * 0], torch.tensor([0.0, 1.0], dtype=F64), seed, 1).double()
    out = kernels.frame.affine_step([x, y], coef, seed, 1)
    close(out, 0.5 * x.double() - 2 * y.double() + 0.3 * xi, F32)
    (d_x, d_y), d_coef = kernels.frame.affine_step_backward(grad, [x, y], coef, seed, True, True, 1)
    assert torch.equal(d_x, 0.5 * grad) and torch.equal(d_y, (-2 * grad).to(BF16))
    exact = [(grad.double() * t.double()).flatten(1).sum(1) for t in (x, y, xi)]
    assert d_coef.shape == (shape[0], 3)
    size = grad.double().flatten(1).norm(dim=1) * x[0].numel() ** 0.5 if shape[0] else 1.0
    assert all(((d_coef[:, j] - e).abs() <= 1e-6 * size).all() for j, e in enumerate(exact))
    assert kernels.frame.affine_step_backward(grad, [x, y], coef, seed, False, False, 1)[1].shape == (0,)
    assert kernels.frame.affine_step_backward(grad, [x, y], coef, seed, False, True, 1)[0] == []


@pytest.mark.parametrize("first", LAYOUTS)
def test_affine_layouts(kernels, first):
    x, y = LAYOUTS[first](data(3, 4, 5, 6)), data(3, 4, 5, 6, seed=1)
    coef = torch.tensor([0.5, -2.0], dtype=F64)
    close(kernels.frame.affine_step([x, y], coef, None, 1), 0.5 * x.double() - 2 * y.double(), F32)
    close(kernels.frame.affine_step([y, x], coef, None, 1), 0.5 * y.double() - 2 * x.double(), F32)


def test_bfloat16_rounds_to_nearest_even(kernels):
    """Halfway cases, the largest value, infinities, NaN and denormals: torch's own rounding, bit by bit."""
    patterns = [
        0x3F808000,
        0x3F818000,
        0x3F808001,
        0x3F807FFF,
        0x7F7FFFFF,
        0x7F800000,
        0xFF800000,
        0x7FC00001,
    ]
    patterns += [0x7FFFFFFF, 0x00000001, 0x00008000, 0x80018000, 0x80000000, 0]
    x = torch.tensor([p - 2**32 if p >= 2**31 else p for p in patterns], dtype=torch.int32).view(F32)
    grad = x.reshape(1, -1)
    zeros = torch.zeros(1, len(patterns), dtype=BF16)
    (_, d), _ = kernels.frame.affine_step_backward(
        grad, [grad, zeros], torch.ones(2, dtype=F64), None, True, False, 1
    )
    expected = grad.to(BF16)
    same = d.view(torch.int16) == expected.view(torch.int16)
    assert (same | (d.isnan() & expected.isnan())).all()


# --- the generic engine --------------------------------------------------------------------------------------------


def generic_rows(streams, prologue, clamp, xi, ones):
    vectors = [t.double().flatten(1) for t in streams]
    vectors += [torch.ones_like(vectors[0])] if ones else []
    vectors += [xi.double().flatten(1)] if xi is not None else []
    rows = torch.stack(vectors, 1)
    if prologue is not None:
        rows = prologue @ rows
    if clamp is not None:
        rows = torch.minimum(torch.maximum(rows, clamp[:, :1]), clamp[:, 1:])
    return rows


@pytest.fixture
def two_chunks(kernels, monkeypatch):
    """Two chunks for samples of 65 to 128 elements: the interpreter is slow with 18 vectors."""
    monkeypatch.setattr(
        kernels.launch, "choose", lambda size, *_, **__: kernels.launch.FrameConfig(64, 1, 64, -(-size // 64))
    )


@pytest.mark.parametrize(
    "count,rows,outputs,per_sample",
    [
        pytest.param(16, 18, 17, False, marks=pytest.mark.full),
        (1, 2, 1, True),
        (4, 7, 3, True),
    ],
)
def test_generic_engine(kernels, two_chunks, count, rows, outputs, per_sample):
    shape = (2, 3, 37)
    streams = [data(*shape, seed=j, dtype=BF16 if j % 3 == 2 else F32) for j in range(count)]
    seed = torch.tensor([5, 6])
    xi = kernels.frame.affine_step([streams[0] * 0], torch.tensor([0.0, 1.0], dtype=F64), seed, 1)
    many = (2,) if per_sample else ()
    prologue = data(*many, rows, count + 2, dtype=F64, seed=50) / count**0.5
    clamp = torch.tensor([[-float("inf"), float("inf")]] * rows, dtype=F64)
    clamp[0] = torch.tensor([0.25, 0.5])  # 0 is not inside: a tail must not count
    matrix = data(*many, outputs, rows, dtype=F64, seed=51)
    exact = generic_rows(streams, prologue, clamp, xi, True)
    gram = kernels.frame.frame_gram(streams, prologue, clamp, seed, True, False, 1)
    reference = exact @ exact.transpose(1, 2)
    norms = reference.diagonal(dim1=1, dim2=2).sqrt()
    assert ((gram - reference).abs() <= 1e-6 * norms[:, :, None] * norms[:, None, :]).all()
    assert torch.equal(gram, gram.transpose(1, 2))
    found = kernels.frame.frame_apply(streams, matrix, prologue, clamp, seed, True, 1)
    assert len(found) == outputs
    for o, f in enumerate(found):
        close(f.flatten(1), (matrix @ exact)[:, o], F32, 4)


@pytest.mark.full
def test_generic_gram_without_prologue(kernels, two_chunks):
    streams = [data(2, 111, seed=j) for j in range(18)]
    streams[4] = streams[3] * (1 + 1e-4) + 1e-5 * data(2, 111, seed=40)
    streams[17] = torch.full_like(streams[17], float("nan"))
    rows = generic_rows(streams, None, None, None, False)[:, :17]
    reference = rows @ rows.transpose(1, 2)
    gram = kernels.frame.frame_gram(streams, None, None, None, False, False, 1)
    assert (gram[:, :17, :17] - reference).abs().max() <= 1e-6 * reference.abs().max()
    assert gram[:, 17].isnan().all() and gram[:, :, 17].isnan().all()
    exact = kernels.frame.frame_gram(streams[:5], None, None, None, False, True, 1)
    assert (exact - reference[:, :5, :5]).abs().max() <= 1e-14 * reference.abs().max()
    for dtype in (F64, F16):
        some = [s.to(dtype) for s in streams[:3]]
        rows = generic_rows(some, None, None, None, True)
        reference = rows @ rows.transpose(1, 2)
        gram = kernels.frame.frame_gram(some, None, None, None, True, False, 1)
        assert (gram - reference).abs().max() <= (1e-14 if dtype == F64 else 1e-6) * reference.abs().max()


# --- operators -----------------------------------------------------------------------------------------------------


def test_operators_and_fakes(kernels):
    """`marquardt_triton::*` returns what the entry points do, and its fakes tell shapes, types and strides."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernels.register()
    kernels.register()
    ops = torch.ops.marquardt_triton
    eps = data(2, 3, 4, 5).to(memory_format=torch.channels_last)
    prev, coef, seed = data(2, 3, 4, 5, dtype=BF16), coef_of(KEEP_NORM), torch.tensor([1, 2])
    calls = [
        (ops.lm_direction, (eps, prev, coef, 0, 1)),
        (ops.lm_direction, (eps[:, 1:], None, coef, 1, 1)),
        (ops.lm_direction_backward, (eps, eps, prev, coef, 0, 1)),
        (ops.lm_direction_jvp, (eps, prev, coef, eps, prev, coef, 0, 1)),
        (ops.affine_step, ([eps, prev], torch.ones(3, dtype=F64), seed, 1)),
        (ops.affine_step_backward, (eps, [eps, prev], torch.ones(3, dtype=F64), seed, True, True, 1)),
        (ops.affine_step_backward, (eps, [eps, prev], torch.ones(3, dtype=F64), seed, False, False, 1)),
        (ops.frame_gram, ([eps, prev], None, None, seed, True, False, 1)),
        (ops.frame_apply, ([eps, prev], torch.ones(3, 2, dtype=F64), None, None, None, False, 1)),
        (ops.frame_map, (2, 0, torch.ones(3, 5, dtype=F64), torch.ones(3, 2, dtype=F64))),
    ]

    def flat(result):
        if isinstance(result, torch.Tensor):
            return [result]
        return [t for r in result for t in flat(r)]

    for op, args in calls:
        real = flat(op(*args))
        with FakeTensorMode() as mode:
            fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, args)
            told = flat(op(*fakes))
        seen = [(t.shape, t.dtype, t.stride(), t.device) for t in real]
        assert seen == [(t.shape, t.dtype, t.stride(), t.device) for t in told], op


def test_refuses_other_devices(kernels):
    with pytest.raises(NotImplementedError, match="lm_direction: Triton kernels need CUDA"):
        kernels.frame.lm_direction(torch.empty(2, 3, device="meta"), None, coef_of(PLAIN), PLAIN, 1)


def test_available(kernels, monkeypatch):
    assert kernels.available() == (True, "")
    monkeypatch.delenv("TRITON_INTERPRET")
    fits, reason = kernels.available()
    assert fits == torch.cuda.is_available() and (fits or "CUDA" in reason)
