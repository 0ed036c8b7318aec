"""Tensors that are more than memory: what the dispatcher resolves must be resolved before a kernel reads."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.two_tensor import TwoTensor

import marquardt as mq
from marquardt import scalars

pytestmark = pytest.mark.errors

CALLS = {
    "lm_direction": lambda a: mq.lm_direction(a, 0.5 * a.flip(-1), damping=0.1, kappa=0.2),
    "affine_step": lambda a: mq.affine_step([a, a], [0.25, 0.5]),
}


@pytest.fixture(params=CALLS, ids=list(CALLS))
def call(request):
    return CALLS[request.param]


def test_negated_views(call):
    x = torch.randn(3, 17)
    negated = torch._neg_view(x)
    assert negated.is_neg()
    torch.testing.assert_close(call(negated), call(-x), rtol=0, atol=0)


def test_imaginary_part_of_a_conjugate():
    z = torch.randn(2, 5, dtype=torch.complex64)
    torch.testing.assert_close(mq.affine_step([z.conj().imag], [1.0]), -z.imag, rtol=0, atol=0)


def test_zero_tensors():
    assert mq.affine_step([torch._efficientzerotensor((2, 8))], [1.0]).eq(0).all()


def test_fake_tensors(call):
    with FakeTensorMode():
        out = call(torch.randn(2, 3, 4))
    assert out.shape == (2, 3, 4)


def test_wrapper_subclasses(call):
    a, b = torch.randn(2, 9), torch.randn(2, 9)
    out = call(TwoTensor(a, b))
    torch.testing.assert_close(out.a, call(a), rtol=0, atol=0)
    torch.testing.assert_close(out.b, call(b), rtol=0, atol=0)


def test_make_fx_records_the_op(call):
    code = make_fx(call)(torch.randn(2, 8)).code
    assert "marquardt" in code


def test_out_counts_a_version():
    """A tensor saved for a backward and then overwritten must not give a silently wrong gradient."""
    w, x = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    loss = (w * x).sum()
    mq.affine_step([torch.randn(2, 8)], [2.0], out=x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_out_under_inference_mode():
    with torch.inference_mode():
        x, out = torch.randn(2, 8), torch.empty(2, 8)
        mq.affine_step([x], [2.0], out=out)
    torch.testing.assert_close(out, 2 * x)


def test_out_with_overlapping_samples():
    out = torch.zeros(7).as_strided((2, 4), (3, 1))
    for backend in ("auto", "reference"):
        with mq.use_backend(backend), pytest.raises(ValueError, match="out must have no repeated elements"):
            mq.affine_step([torch.ones(2, 4)], [1.0], out=out)


def test_out_beside_an_input():
    """Channel slices of one tensor share no memory."""
    both = torch.randn(2, 4, 3)
    expected = 2 * both[:, :2]
    for backend in ("auto", "reference"):
        with mq.use_backend(backend):
            mq.affine_step([both[:, :2]], [2.0], out=both[:, 2:])
        torch.testing.assert_close(both[:, 2:], expected)


def test_out_under_forward_mode_is_checked():
    with torch.autograd.forward_ad.dual_level(), pytest.raises(ValueError, match="out must have the shape"):
        mq.affine_step([torch.ones(2, 8)], [1.0], out=torch.zeros(3, 2, 8))


def test_out_with_gradients_is_refused_when_compiled():
    def step(x, out):
        return mq.affine_step([x], [2.0], out=out)

    compiled = torch.compile(step, backend="aot_eager")
    with pytest.raises(Exception, match="does not support automatic differentiation"):
        compiled(torch.ones(2, 3, requires_grad=True), torch.empty(2, 3))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("keep_norm", [True, False])
def test_unread_prev_reaches_no_derivative(backend, keep_norm):
    """κ = 0 for one sample, whose prev is NaN: nothing but the derivative of that κ may see it."""
    eps, prev = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
    prev[0] = torch.nan
    damping = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    kappa = torch.tensor([0.0, 0.3])
    with mq.use_backend(backend):
        out = mq.lm_direction(eps, prev, damping=damping, kappa=kappa, keep_norm=keep_norm)
        out.sin().sum().backward()
        _, tangent = torch.func.jvp(
            lambda e: mq.lm_direction(e, prev, damping=0.3, kappa=kappa, keep_norm=keep_norm),
            (eps.detach(),),
            (torch.ones(2, 8),),
        )
    assert damping.grad.isfinite() and eps.grad.isfinite().all() and tangent.isfinite().all()


def test_the_cache_of_scalars_holds_plain_tensors():
    numbers = (0.1234567, 0.7654321)
    torch.func.grad(lambda e: mq.lm_direction(e, e, damping=numbers[0], kappa=numbers[1]).sum())(
        torch.randn(2, 3)
    )
    kept = scalars._known.get(numbers)
    assert kept is None or not torch._C._functorch.is_functorch_wrapped_tensor(kept)


def test_a_tensor_is_no_list_of_terms():
    with pytest.raises(TypeError, match="terms must be a list of tensors"):
        mq.affine_step(torch.ones(2, 3), [1.0, 2.0])


def test_explain_shows_what_noise_copies():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert not mq.explain(mq.affine_step, [x], [1.0]).copies
    assert mq.explain(mq.affine_step, [x], [1.0], noise_scale=0.1).copies


def test_out_of_memory():
    """torch's own exception, with size and device, before anything runs; the next call works."""
    if mq.backends.forced() not in (None, "cpu"):
        pytest.skip("about the native kernels")
    huge = torch.ones(1).expand(1, 1 << 50)
    with pytest.raises(torch.OutOfMemoryError, match="4294967296 MiB could not be allocated on cpu"):
        mq.affine_step([huge], [2.0])
    assert mq.affine_step([torch.ones(1, 2)], [2.0]).eq(2).all()
