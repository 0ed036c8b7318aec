"""lm_direction, its gradient and tangent against float64 formulas: dtypes, shapes, strides, tails, special cases."""

import pytest
import torch

KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
PAIRS = [(F32, F32), (F32, BF16), (F32, F16), (BF16, BF16), (F16, F16), (F64, F64)]


def data(*shape, dtype=F32, seed=0, scale=1.0):
    gen = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=gen, dtype=F64)).to(dtype)


def coef_of(mode, batch=None):
    """Shared scalars, or one row per sample."""
    row = torch.tensor([0.7] if mode == EXTRAPOLATE else [3.0, 0.4], dtype=F64)
    if batch is None:
        return row
    return row * torch.linspace(0.5, 1.5, batch, dtype=F64)[:, None]


def direction(eps, prev, coef, mode, batch_dims=1):
    """The definition in float64: the formula of the abstract, the norm put back (no special cases)."""
    x = eps.double().reshape((eps.shape[0], -1) if batch_dims else (1, -1))
    p = prev.double().reshape(x.shape)
    c = coef if coef.dim() == 2 else coef.expand(x.shape[0], -1)
    n = (x * x).sum(1, keepdim=True)
    if mode == EXTRAPOLATE:
        gamma = c[:, :1]
        d = (1 - gamma * (x * (x - p)).sum(1, keepdim=True) / n) * x + gamma * (x - p)
    else:
        damping, kappa = c[:, :1], c[:, 1:]
        y = kappa * p + (1 - kappa) * x
        d = x - y * (x * y).sum(1, keepdim=True) / (damping + (y * y).sum(1, keepdim=True))
    if mode != PLAIN:
        d = d * torch.sqrt(n / (d * d).sum(1, keepdim=True))
    return d.reshape(eps.shape)


def close(found, exact, dtype, factor=1.0):
    """Within a few float32 roundings of the sample's scale, and half a place of the output type."""
    assert found.dtype == dtype
    if found.numel() == 0:
        return
    found, exact = found.double(), exact.double()
    assert torch.isfinite(found).all()
    base = 2e-15 if dtype == F64 else 4e-7 * factor
    half_place = {F32: 0.0, F64: 0.0, BF16: 2.0**-8, F16: 2.0**-11}[dtype]
    bound = (
        base * exact.abs().max() + half_place * exact.abs() * (1 + 1e-3) + (2.0**-25 if dtype == F16 else 0)
    )
    excess = ((found - exact).abs() - bound).max()
    assert excess <= 0, f"off by {(found - exact).abs().max():.3g}, scale {exact.abs().max():.3g}"


# --- lm_direction --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
@pytest.mark.parametrize("state,model", PAIRS)
def test_direction_dtypes(kernels, launches, state, model, mode):
    eps, prev = data(3, 1000, dtype=state), data(3, 1000, dtype=model, seed=1)
    out = kernels.frame.lm_direction(eps, prev, coef_of(mode), mode, 1)
    close(out, direction(eps, prev, coef_of(mode), mode), state)


@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (5, 3), (2, 0), (1, 4097), (2, 3, 5, 7), (3, 2, 3, 4, 5)])
@pytest.mark.parametrize("per_sample", [False, True])
def test_direction_shapes(kernels, launches, shape, per_sample):
    eps, prev = data(*shape), data(*shape, seed=1)
    coef = coef_of(KEEP_NORM, shape[0] if per_sample else None)
    out = kernels.frame.lm_direction(eps, prev, coef, KEEP_NORM, 1)
    assert out.shape == eps.shape and out is not eps
    if out.numel() and out.shape[1:].numel() > 1:
        close(out, direction(eps, prev, coef, KEEP_NORM), F32)
    elif out.numel():  # one element: direction and norm leave the sign
        close(out.abs(), eps.abs(), F32)


def test_direction_unbatched(kernels, launches):
    eps, prev = data(6, 50), data(6, 50, seed=1)
    out = kernels.frame.lm_direction(eps, prev, coef_of(PLAIN), PLAIN, 0)
    close(out, direction(eps, prev, coef_of(PLAIN), PLAIN, 0), F32)
    back = kernels.frame.lm_direction_backward(eps, eps, prev, coef_of(PLAIN), PLAIN, 0)
    assert back[2].shape == (1, 2)


LAYOUTS = {
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "sliced": lambda t: torch.cat([t, t, t])[::3],
    "inner_sliced": lambda t: torch.cat([t, t], dim=3)[..., : t.shape[3]],
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded_inner": lambda t: t[..., :1].expand(t.shape),
    "batch_inside": lambda t: t.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "offset": lambda t: torch.cat([t.flatten(), t.flatten()])[1 : 1 + t.numel()].reshape(t.shape),
}


@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", ["plain", "channels_last", "expanded"])
def test_direction_layouts(kernels, first, second):
    eps, prev = LAYOUTS[first](data(3, 4, 5, 6)), data(3, 4, 5, 6, seed=1)
    prev = LAYOUTS.get(second, lambda t: t)(prev)
    out = kernels.frame.lm_direction(eps, prev, coef_of(KEEP_NORM), KEEP_NORM, 1)
    close(out, direction(eps, prev, coef_of(KEEP_NORM), KEEP_NORM), F32)
    dense = first in ("channels_last", "batch_inside", "offset")
    assert out.stride() == (eps.stride() if dense else eps.contiguous().stride())


def test_no_copy_of_slices_and_expanded_batches(kernels, monkeypatch):
    """Batch strides are the kernel's business."""
    eps, prev = data(4, 3, 5)[::2], data(1, 3, 5).expand(2, 3, 5)
    layout = kernels.layout.Layout.of(eps, 1)
    for t, stride in ((eps, 30), (prev, 0)):
        stream, step = layout.stream(t)
        assert stream is t and step == stride


@pytest.mark.parametrize("mode", [KEEP_NORM, EXTRAPOLATE])
def test_identity_keeps_bits_and_reads_nothing(kernels, launches, mode):
    eps = data(3, 300)
    eps[0, :4] = torch.tensor([-0.0, 1e-42, 3e38, -1e-30])
    eps[2] = -0.0  # a norm of 0 too
    prev = torch.full_like(eps, float("nan"))
    zero = torch.zeros(1 if mode == EXTRAPOLATE else 2, dtype=F64)
    if mode == KEEP_NORM:
        zero[0] = 2.0
    for coef in (zero, zero.expand(3, -1)):
        for p in (prev, None):
            out = kernels.frame.lm_direction(eps, p, coef, mode, 1)
            assert (
                torch.equal(out.view(torch.int32), eps.view(torch.int32)) and out.data_ptr() != eps.data_ptr()
            )


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
def test_one_sample_without_kappa_among_others(kernels, launches, mode):
    """NaN in prev of the sample whose κ is 0 reaches neither value nor gradient nor tangent."""
    eps, prev, grad = data(3, 300), data(3, 300, seed=1), data(3, 300, seed=2)
    coef = coef_of(mode, 3)
    coef[1, -1] = 0.0
    clean = prev.clone()
    prev[1] = float("nan")
    out = kernels.frame.lm_direction(eps, prev, coef, mode, 1)
    close(out, direction(eps, clean, coef, mode), F32)
    d_eps, d_prev, d_coef = kernels.frame.lm_direction_backward(grad, eps, prev, coef, mode, 1)
    exact = torch.autograd.functional.vjp(
        lambda e: direction(e, clean, coef, mode), eps.double(), grad.double()
    )[1]
    close(d_eps, exact, F32, 2)
    assert not d_prev[1].any() and torch.isfinite(d_prev).all() and torch.isfinite(d_coef[[0, 2]]).all()
    if mode != PLAIN:
        assert torch.equal(out[1], eps[1]) and torch.equal(d_eps[1], grad[1])
    still = torch.zeros_like(coef)
    tangent = kernels.frame.lm_direction_jvp(eps, prev, coef, grad, prev, still, mode, 1)
    assert torch.isfinite(tangent[1]).all()
    if mode != PLAIN:
        assert torch.equal(tangent[1], grad[1])


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
def test_zero_eps(kernels, launches, mode):
    eps, prev = data(2, 300), data(2, 300, seed=1)
    eps[1] = 0
    out = kernels.frame.lm_direction(eps, prev, coef_of(mode), mode, 1)
    assert not out[1].any() and out[0].any()
    d_eps, d_prev, d_coef = kernels.frame.lm_direction_backward(prev, eps, prev, coef_of(mode), mode, 1)
    assert not d_eps[1].any() and not d_prev[1].any() and not d_coef[1].any() and d_eps[0].any()


def test_no_damping_and_parallel(kernels, launches):
    eps, grad = data(2, 300), data(2, 300, seed=2)
    coef = torch.tensor([0.0, 0.3], dtype=F64)
    assert torch.equal(kernels.frame.lm_direction(eps, 2 * eps, coef, KEEP_NORM, 1), eps)
    d_eps, d_prev, d_coef = kernels.frame.lm_direction_backward(grad, eps, 2 * eps, coef, KEEP_NORM, 1)
    assert torch.equal(d_eps, grad) and not d_prev.any() and not d_coef.any()


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_out_of_range(kernels, launches, scale):
    eps, prev = data(2, 500, scale=scale), data(2, 500, seed=1, scale=scale)
    coef = torch.tensor([3.0 * scale * scale, 0.4], dtype=F64)
    close(kernels.frame.lm_direction(eps, prev, coef, KEEP_NORM, 1) / scale,
          direction(eps, prev, coef, KEEP_NORM) / scale, F32)  # fmt: skip


def test_float16_with_squares_beyond_its_range(kernels, launches):
    eps, prev = data(2, 3000, dtype=F16, scale=20), data(2, 3000, dtype=F16, seed=1, scale=20)
    assert (eps.double() ** 2).sum(1).min() > 65504
    close(kernels.frame.lm_direction(eps, prev, coef_of(KEEP_NORM), KEEP_NORM, 1),
          direction(eps, prev, coef_of(KEEP_NORM), KEEP_NORM), F16)  # fmt: skip


@pytest.mark.parametrize("rho", [0.999, 0.999999])
def test_correlation_to_one(kernels, launches, rho):
    """Residual form: 4e-7 where the plain formula in float32 is off by 1e-2."""
    eps, other = data(2, 4097), data(2, 4097, seed=1)
    prev = rho * eps + (1 - rho * rho) ** 0.5 * other
    coef = torch.tensor([0.01, 0.5], dtype=F64)
    close(
        kernels.frame.lm_direction(eps, prev, coef, KEEP_NORM, 1), direction(eps, prev, coef, KEEP_NORM), F32
    )


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN])
@pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
def test_small_damping(kernels, launches, multiple, mode):
    """p nearly parallel to ε: large multiples of both cancel, in float64."""
    eps = data(2, 2049)
    prev = multiple * (eps + 1e-3 * data(2, 2049, seed=1))
    coef = torch.tensor([1e-3, 0.1], dtype=F64)
    found = kernels.frame.lm_direction(eps, prev, coef, mode, 1)
    exact = direction(eps, prev, coef, mode)
    assert ((found.double() - exact).norm(dim=1) <= 3e-7 * exact.norm(dim=1)).all()


@pytest.mark.parametrize("mode", [KEEP_NORM, PLAIN, EXTRAPOLATE])
@pytest.mark.parametrize(
    "state,model", [PAIRS[1], *(pytest.param(*p, marks=pytest.mark.full) for p in PAIRS if p != PAIRS[1])]
)
def test_backward_and_jvp(kernels, launches, state, model, mode):
    per_sample = launches == "split"
    eps, prev = data(3, 700, dtype=state), data(3, 700, dtype=model, seed=1)
    grad, moved = data(3, 700, dtype=state, seed=2), data(3, 700, dtype=model, seed=3)
    coef = coef_of(mode, 3)
    given = coef if per_sample else coef[1]
    rows = coef if per_sample else coef[1].expand(3, -1)
    exact = torch.autograd.functional.vjp(
        lambda e, p, c: direction(e, p, c, mode), (eps.double(), prev.double(), rows.clone()), grad.double()
    )[1]
    found = kernels.frame.lm_direction_backward(grad, eps, prev, given, mode, 1)
    for f, e, dtype in zip(found[:2], exact[:2], (state, model)):
        close(f, e, dtype, 2)
    magnitude = exact[2].abs().max(0).values + 1e-3
    assert ((found[2] - exact[2]).abs() <= 1e-6 * magnitude).all()

    rows_t = 0.3 * rows
    tangent = torch.func.jvp(
        lambda e, p, c: direction(e, p, c, mode),
        (eps.double(), prev.double(), rows.clone()), (grad.double(), moved.double(), rows_t.clone()),
    )[1]  # fmt: skip
    close(
        kernels.frame.lm_direction_jvp(eps, prev, given, grad, moved, 0.3 * given, mode, 1), tangent, state, 2
    )


def test_expanded_gradient(kernels, launches):
    """`.sum().backward()` sends a gradient of stride 0."""
    eps, prev = data(2, 3, 40), data(2, 3, 40, seed=1)
    grad = torch.ones(()).expand(2, 3, 40)
    a = kernels.frame.lm_direction_backward(grad, eps, prev, coef_of(PLAIN), PLAIN, 1)
    b = kernels.frame.lm_direction_backward(grad.contiguous(), eps, prev, coef_of(PLAIN), PLAIN, 1)
    assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_bitwise_repeatable_in_any_batch(kernels, launches):
    eps, prev = data(5, 3001), data(5, 3001, seed=1)
    whole = kernels.frame.lm_direction(eps, prev, coef_of(KEEP_NORM), KEEP_NORM, 1)
    assert torch.equal(whole, kernels.frame.lm_direction(eps, prev, coef_of(KEEP_NORM), KEEP_NORM, 1))
    assert torch.equal(
        whole[3:], kernels.frame.lm_direction(eps[3:], prev[3:], coef_of(KEEP_NORM), KEEP_NORM, 1)
    )


def test_launches_depend_on_the_sample_alone(kernels):
    for size in (1, 100, 4096, 16384, 16385, 10**6, 2**33):
        config = kernels.launch.choose(size, 4, True, False)
        assert config.chunk % config.block == 0 and config.splits <= 256
        assert (config.splits - 1) * config.chunk < size <= config.splits * config.chunk
        assert "block" in str(config)
