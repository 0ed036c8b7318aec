"""Steps whose numbers are known from a call before take a shorter way: to the same bits, errors and derivatives."""

from __future__ import annotations

import math

import pytest
import torch

import marquardt as mq
from harness import native_only
from harness.compare import same_bits
from marquardt import step as steps

f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DDIM = {"alpha_bar": 0.3, "alpha_bar_next": 0.4}
DPM = {"lambdas": [0.5, 0.2], "alphas": [0.85, 0.77], "sigmas": [0.52, 0.63], "order": 1}
OFF, ON = {"damping": 2.0, "kappa": 0.0}, {"damping": 2.0, "kappa": 0.3}


def ddim(x, g, p, u, **more):
    return mq.lml_ddim_step(x, g, p, **DDIM, **more)


def flow(x, g, p, u, **more):
    return mq.lml_flow_step(x, g, p, dt=-0.1, **more)


def dpm(x, g, p, u, **more):
    return mq.lml_dpm_step(x, [g], p, **DPM, **more)


CALLS = {
    "ddim": (ddim, OFF),
    "ddim-bent": (ddim, ON),
    "ddim-extrapolation-0": (ddim, {"extrapolation": 0.0}),
    "ddim-clipped": (ddim, {**OFF, "clip": 0.7}),
    "ddim-sample": (ddim, {**OFF, "prediction_type": "sample"}),
    "ddim-guided": (lambda x, g, p, u, **more: ddim(x, g, p, u, guidance=(u, 3.0), **more), ON),
    "ddim-doubled": (ddim, {**OFF, "doubled": True}),
    "flow": (flow, OFF),
    "flow-bent": (flow, ON),
    "dpm": (dpm, OFF),
    "dpm-bent": (dpm, ON),
}
PLAIN = ("ddim", "ddim-extrapolation-0", "flow")  # these are sums and nothing more


@pytest.fixture(autouse=True)
def forgotten():
    native_only()
    steps._recipes.clear()
    yield
    steps._recipes.clear()


@pytest.fixture(params=CALLS)
def call(request):
    function, more = CALLS[request.param]
    return lambda x, g, p, u: function(x, g, p, u, **more)


def tensors(shape, pair=(f32, f32), count=4):
    generator = torch.Generator().manual_seed(2)
    made = [torch.randn(shape, generator=generator) for _ in range(count)]
    return [t.to(pair[min(j, 1)]) for j, t in enumerate(made)]


def message(function, *args) -> tuple[type, str]:
    with pytest.raises((TypeError, ValueError)) as caught:
        function(*args)
    return caught.type, str(caught.value)


@pytest.mark.accuracy
@pytest.mark.parametrize("pair", [(f32, f32), (f32, bf16), (f32, f16), (bf16, bf16), (f64, f64)], ids=str)
@pytest.mark.parametrize("with_prev", [True, False], ids=["prev", ""])
def test_the_same_bits(call, pair, with_prev: bool):
    for shape in ((3, 1), (2, 7), (3, 4, 4, 8), (1, 70001)):
        x, g, p, u = tensors(shape, pair)
        p = p.to(pair[0]) if with_prev and _takes_state(call, x, g, p, u) else p
        args = (x, g, p if with_prev else None, u)
        first, later = call(*args), call(*args)
        assert all(same_bits(a, b) and a.stride() == b.stride() for a, b in zip(first, later, strict=True))


def _takes_state(call, x, g, p, u) -> bool:
    """Whether the direction of before is of the type of the state."""
    try:
        call(x, g, p, u)
    except TypeError:
        return True
    finally:
        steps._recipes.clear()
    return False


@pytest.mark.strides
@pytest.mark.parametrize("name", PLAIN)
def test_layouts(name: str):
    function, more = CALLS[name]
    for change in (
        lambda t: t.contiguous(memory_format=torch.channels_last),
        lambda t: t.transpose(1, 2),
        lambda t: t[..., ::2],
        lambda t: t[:1].expand(3, *t.shape[1:]),
    ):
        args = [change(t) for t in tensors((3, 4, 6, 8))]
        first, later = function(*args, **more), function(*args, **more)
        assert same_bits(first[0], later[0]) and first[0].stride() == later[0].stride()
    x, g, p, u = tensors((5, 6))
    first, later = (function(x, g, p, u, batch_dims=0, **more)[0] for _ in range(2))
    assert same_bits(first, later)


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_taken(name: str, monkeypatch):
    """The shorter way is one: the operator of steps is asked once."""
    function, more = CALLS[name]
    args, asked = tensors((2, 9)), []
    real = steps.STEP.call
    monkeypatch.setattr(steps.STEP, "call", lambda *a: asked.append(1) or real(*a))
    for _ in range(3):
        function(*args, **more)
    assert len(asked) == 1


@pytest.mark.errors
def test_the_same_errors(call):
    x, g, p, u = tensors((2, 9))
    bad = [
        (x[:, :8], g, p, u),
        (x, g[:, :8], p, u),
        (x, g, p[:, :8], u),
        (x, g.long(), p, u),
        (x, g, p.long(), u),
        (x, g, 3, u),
        (3, g, p, u),
        (x, None, p, u),
    ]
    for args in bad:
        steps._recipes.clear()
        before = message(call, *args)
        call(x, g, p, u)  # now it is known
        assert message(call, *args) == before


@pytest.mark.accuracy
def test_a_number_of_zero_leaves_its_tensor_unread():
    x, g, p, _ = tensors((2, 9))
    g[:] = math.nan
    for _ in range(2):
        assert same_bits(mq.lml_flow_step(x, g, p, dt=0.0, **OFF)[0], x)


@pytest.mark.gradcheck
@pytest.mark.parametrize("name", PLAIN)
def test_gradients_and_transforms(name: str):
    """A direction of before that does not count has the gradient 0 in both, and may be mapped over."""
    function, more = CALLS[name]
    results = []
    for _ in range(2):
        x, g, p, u = (t.requires_grad_() for t in tensors((2, 9), (f64, f64)))
        results.append(torch.autograd.grad(function(x, g, p, u, **more)[0].square().sum(), (x, g, p)))
    for first, later in zip(*results, strict=True):
        torch.testing.assert_close(first, later)
    assert not results[1][2].any()
    x, g, p, u = tensors((2, 9))
    many = torch.stack([p, p + 1, p + 2])
    for _ in range(2):
        mapped = torch.func.vmap(lambda q: function(x, g, q, u, **more)[0])(many)
        assert mapped.shape == (3, 2, 9) and same_bits(mapped[1], function(x, g, p + 1, u, **more)[0])
    _, tangent = torch.func.jvp(lambda t: function(t, g, p, u, **more)[0], (x,), (torch.ones_like(x),))
    step = function(torch.ones_like(x), torch.zeros_like(g), torch.zeros_like(p), u, **more)[0]
    torch.testing.assert_close(tangent, step)
