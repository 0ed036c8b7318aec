"""The damped low-rank Hessian family: lm_direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import cases
import marquardt as mq
import oracle
from harness import Case, Op, Suite, Target, assert_within, same_bits
from harness.declare import Refusal

f32, f64 = torch.float32, torch.float64
KEEP_NORM, PLAIN, EXTRAPOLATE = 0, 1, 2


def parameters(scalars, keywords):
    """(mode, coefficients in the order of `coef`)."""
    if "extrapolation" in scalars:
        return EXTRAPOLATE, [scalars["extrapolation"]]
    mode = KEEP_NORM if keywords.get("keep_norm", True) else PLAIN
    return mode, [scalars["damping"], scalars["kappa"]]


def without_prev(rows, mode, coef):
    """No prev is prev = eps with κ = 0."""
    if rows[1] is not None:
        return coef
    return [*coef[:-1], np.zeros_like(coef[-1])]


def value(rows, scalars, keywords, shape, batch_dims):
    mode, coef = parameters(scalars, keywords)
    return oracle.lm_direction(*rows, mode, *without_prev(rows, mode, coef))


def slack(rows, scalars, keywords, shape, batch_dims, dtype):
    """What one rounding of each scalar product costs in float64, whose sums have no wider type to live in."""
    mode, coef = parameters(scalars, keywords)
    if dtype != f64 or rows[1] is None:
        return 0.0
    return oracle.lm_rounding(*rows, mode, coef, torch.finfo(f64).eps)


def vjp(rows, scalars, keywords, shape, batch_dims, grad):
    mode, coef = parameters(scalars, keywords)
    d_eps, d_prev, d_coef, sizes = oracle.lm_direction_vjp(*rows, mode, without_prev(rows, mode, coef), grad)
    return [d_eps, d_prev], dict(zip(scalars, d_coef, strict=True)), dict(zip(scalars, sizes, strict=True))


def jvp(rows, scalars, keywords, shape, batch_dims, rows_t, scalars_t):
    mode, coef = parameters(scalars, keywords)
    return oracle.lm_direction_jvp(*rows, mode, coef, *rows_t, list(scalars_t.values()))


def sweep(full: bool):
    """(D, case) over the stated range: D, κ, λ and correlation."""
    return [
        (size, Case(f"k{kappa:g}-l{damping:g}-c{rho}", cases.pair(rho), {"damping": damping, "kappa": kappa}))
        for size, kappa, damping, rho in cases.lm_sweep(full)
    ]


def samples():
    """Arguments of the three operators for opcheck."""
    made = []
    generator = torch.Generator().manual_seed(0)

    def tensors(shape, count, state=f32, model=f32):
        return [cases.gaussian(generator, shape).to(model if j else state) for j in range(count)]

    shared, single = torch.tensor([0.1, 0.3], dtype=f64), torch.tensor([0.7], dtype=f64)
    per_sample = torch.tensor([[0.1, 0.3], [0.2, 0.0]], dtype=f64)
    for pair in ((f32, f32), (f32, torch.bfloat16), (torch.float16, torch.float16), (f64, f64)):
        made.append(("lm_direction", (*tensors((2, 3, 5), 2, *pair), shared, KEEP_NORM, 1)))
    eps, prev = tensors((2, 3, 4, 5), 2)
    made += [
        (
            "lm_direction",
            (eps.requires_grad_(), prev.requires_grad_(), shared.clone().requires_grad_(), KEEP_NORM, 1),
        ),
        ("lm_direction", (*tensors((2, 6), 2), per_sample.clone().requires_grad_(), PLAIN, 1)),
        (
            "lm_direction",
            (eps.detach().transpose(1, 2), prev.detach().transpose(1, 2), single, EXTRAPOLATE, 1),
        ),
        ("lm_direction", (eps.detach()[..., ::2], prev.detach()[..., ::2], shared, KEEP_NORM, 1)),
        ("lm_direction", (tensors((2, 3), 1)[0], None, shared, KEEP_NORM, 1)),
        ("lm_direction", (*tensors((0, 3), 2), shared, KEEP_NORM, 1)),
        ("lm_direction", (*tensors((3, 4), 2), shared, KEEP_NORM, 0)),
        ("lm_direction_backward", (*tensors((2, 3, 4), 3), shared, KEEP_NORM, 1)),
        ("lm_direction_backward", (*tensors((2, 3), 3, f64, f64), per_sample, PLAIN, 1)),
        ("lm_direction_backward", (*tensors((0, 3), 3), single, EXTRAPOLATE, 1)),
        ("lm_direction_jvp", (*tensors((2, 3), 2), shared, *tensors((2, 3), 2), shared, KEEP_NORM, 1)),
    ]
    return made


def refuse(name, error, *words, **how):
    return Refusal(name, error, words, **how)


REFUSALS = (
    refuse("negative-damping", ValueError, "damping", "-0.5", scalars={"damping": -0.5}),
    refuse("nan-damping", ValueError, "damping", "nan", scalars={"damping": float("nan")}),
    refuse("infinite-damping", ValueError, "damping", "inf", scalars={"damping": float("inf")}),
    refuse("nan-kappa", ValueError, "kappa", "nan", scalars={"kappa": float("nan")}),
    refuse("negative-damping-0-dim", ValueError, "damping", "-2", scalars={"damping": torch.tensor(-2.0)}),
    refuse("nan-kappa-0-dim", ValueError, "kappa", "nan", scalars={"kappa": torch.tensor(float("nan"))}),
    refuse("no-damping", ValueError, "damping", scalars={"damping": None}),
    refuse("no-kappa", ValueError, "kappa", scalars={"kappa": None}),
    refuse("both", ValueError, "extrapolation", "damping", keywords={"extrapolation": 0.5}),
    refuse(
        "extrapolation-kappa", ValueError, "extrapolation", "kappa",
        scalars={"damping": None}, keywords={"extrapolation": 0.5},
    ),
    refuse(
        "nan-extrapolation", ValueError, "extrapolation", "nan",
        scalars={"damping": None, "kappa": None, "extrapolation": float("nan")},
    ),
    refuse(
        "extrapolation-plain", ValueError, "extrapolation", "keep_norm",
        scalars={"damping": None, "kappa": None, "extrapolation": 0.5}, keywords={"keep_norm": False},
    ),
)  # fmt: skip

LM = Op(
    name="lm_direction",
    function=mq.lm_direction,
    reference=mq.reference.lm_direction,
    cases=cases.LM,
    value=value,
    vjp=vjp,
    jvp=jvp,
    slack=slack,
    argument=("eps", "prev").__getitem__,
    sweep=sweep,
    samples=samples,
    refusals=REFUSALS,
)


class TestLmDirection(Suite):
    op = LM


def make(shape=(3, 4, 9, 7), rho=0.9, dtype=f32, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [t.to(dtype).to(device) for t in cases.correlated(generator, shape, rho)]


@pytest.mark.accuracy
class TestOracle:
    """The judge is judged: its closed forms against the formulas as they are printed."""

    def test_published_formula(self):
        for size, kappa, damping, rho in cases.lm_sweep(False):
            eps, prev = (t.numpy().reshape(1, -1) for t in make((size,), rho))
            for mode, keep_norm in ((KEEP_NORM, True), (PLAIN, False)):
                printed = oracle.published_lm(eps, prev, damping, kappa, keep_norm)
                gap = oracle.lm_direction(eps, prev, mode, damping, kappa) - printed
                assert np.sqrt((gap**2).sum() / (printed**2).sum()) < 1e-8
        for gamma in (-1.5, 0.3, 2.0):
            eps, prev = (t.numpy().reshape(2, -1) for t in make((2, 500), 0.9))
            printed = oracle.published_extrapolation(eps, prev, gamma)
            assert np.abs(oracle.lm_direction(eps, prev, EXTRAPOLATE, gamma) - printed).max() < 1e-14

    def test_gradient_of_the_published_formula(self):
        eps, prev = (t.requires_grad_() for t in make((2, 40), 0.5, f64))
        damping, kappa = (torch.tensor(x, dtype=f64, requires_grad=True) for x in (3.0, 0.4))
        mix = kappa * prev + (1 - kappa) * eps
        u = eps - mix * (eps * mix).sum(1, True) / (damping + (mix * mix).sum(1, True))
        out = u * (eps.norm(dim=1, keepdim=True) / u.norm(dim=1, keepdim=True))
        grad = torch.randn(out.shape, dtype=f64, generator=torch.Generator().manual_seed(1))
        found = torch.autograd.grad(out, (eps, prev, damping, kappa), grad)
        arrays = [t.detach().numpy() for t in (eps, prev)]
        d_eps, d_prev, d_coef, _ = oracle.lm_direction_vjp(*arrays, KEEP_NORM, [3.0, 0.4], grad.numpy())
        for f, e in zip(found, (d_eps, d_prev, d_coef[0].sum(), d_coef[1].sum()), strict=True):
            assert np.abs(f.numpy() - e).max() < 1e-13

    def test_tangent_is_the_transpose(self):
        eps, prev = (t.numpy() for t in make((2, 40), 0.5, f64))
        grad, eps_t, prev_t = (
            t.numpy() for t in (*make((2, 40), 0.1, f64, 2), *make((2, 40), 0.1, f64, 3)[:1])
        )
        for mode, coef, coef_t in (
            (0, [1.0, 0.4], [0.3, -2.0]),
            (1, [1.0, 0.4], [0.3, -2.0]),
            (2, [0.6], [1.5]),
        ):
            tangent = oracle.lm_direction_jvp(eps, prev, mode, coef, eps_t, prev_t, coef_t)
            d_eps, d_prev, d_coef, _ = oracle.lm_direction_vjp(eps, prev, mode, coef, grad)
            back = (d_eps * eps_t).sum() + (d_prev * prev_t).sum()
            back += sum((d * t).sum() for d, t in zip(d_coef, coef_t, strict=True))
            assert abs((tangent * grad).sum() - back) < 1e-13


@pytest.mark.accuracy
@pytest.mark.parametrize("keep_norm", [True, False])
@pytest.mark.parametrize("multiple", [1.0, 3.0, -20.0])
@pytest.mark.parametrize("size", [37, 300, 2049, 300_000])
def test_nearly_parallel(target: Target, size: int, multiple: float, keep_norm: bool):
    """p near a multiple of ε, and little damping: the result is what two large multiples leave of each other."""
    if target.backend == "reference":
        pytest.skip("float32 sums, as the formula says")
    generator = torch.Generator().manual_seed(5)
    keywords = {"damping": 1e-3, "kappa": 0.1, "keep_norm": keep_norm}
    for apart in (1e-4, 1e-3, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0):  # none of them lies between two rules
        eps = torch.randn(2, size, generator=generator)
        prev = multiple * (eps + apart * torch.randn(2, size, generator=generator))
        with target():
            found = mq.lm_direction(eps.to(target.device), prev.to(target.device), **keywords).cpu().double()
        exact = mq.lm_direction(eps.double(), prev.double(), **keywords)
        assert ((found - exact).norm(dim=1) <= 2e-7 * exact.norm(dim=1)).all(), apart


@pytest.mark.accuracy
class TestSpecialValues:
    """κ = 0, no prev, ε = 0 and p parallel to ε have exact answers."""

    def call(self, target: Target, *tensors, **keywords):
        with target():
            return mq.lm_direction(*tensors, **keywords)

    def test_zero_kappa_does_not_read_prev(self, target: Target):
        eps, prev = make(device=target.device)
        for poison in (float("nan"), float("inf")):
            bad = torch.full_like(prev, poison)
            for scalars in (
                {"damping": 1.0, "kappa": 0.0},
                {"damping": 0.0, "kappa": 0.0},
                {"extrapolation": 0.0},
            ):
                assert same_bits(self.call(target, eps, bad, **scalars), eps)
            plain = self.call(target, eps, bad, damping=2.0, kappa=0.0, keep_norm=False)
            assert same_bits(plain, self.call(target, eps, damping=2.0, kappa=0.0, keep_norm=False))

    def test_zero_kappa_of_one_sample(self, target: Target):
        """Per-sample κ: where it is 0 prev may hold NaN, in value and gradient; the others are unchanged."""
        for scalars in ({"damping": 0.5, "kappa": [0.3, 0.0, 0.2]}, {"extrapolation": [0.3, 0.0, 0.2]}):
            for asked in (False, True):
                eps, prev = (t.requires_grad_() for t in make(device=target.device))
                bad = prev.detach().clone()
                bad[1] = float("nan")
                bad.requires_grad_()
                given = {
                    k: torch.tensor(v, dtype=f64, device=target.device) if isinstance(v, list) else v
                    for k, v in scalars.items()
                }
                name = next(k for k, v in given.items() if isinstance(v, torch.Tensor))
                if asked:
                    given[name].requires_grad_()
                whole, spoiled = (self.call(target, eps, p, **given) for p in (prev, bad))
                assert same_bits(whole.detach()[[0, 2]], spoiled.detach()[[0, 2]])
                g = torch.randn_like(whole)
                d_eps, d_prev = torch.autograd.grad(spoiled, (eps, bad), g)
                e_eps, e_prev = torch.autograd.grad(whole, (eps, prev), g)
                assert same_bits(d_eps[[0, 2]], e_eps[[0, 2]]) and same_bits(d_prev[[0, 2]], e_prev[[0, 2]])
                if not asked:
                    assert same_bits(spoiled.detach()[1], eps.detach()[1])
                    assert same_bits(d_eps[1], g[1]) and bool((d_prev[1] == 0).all())

    def test_gradient_to_kappa_at_zero(self, target: Target):
        """κ = 0 is a point like any other for the gradient of κ."""
        eps, prev = make(dtype=f64, device=target.device)
        for mode, name, other in (
            (KEEP_NORM, "kappa", {"damping": 2.0}),
            (PLAIN, "kappa", {"damping": 2.0, "keep_norm": False}),
            (EXTRAPOLATE, "extrapolation", {}),
        ):
            zero = torch.zeros((), dtype=f64, requires_grad=True)
            leaf = eps.clone().requires_grad_()
            out = self.call(target, leaf, prev, **{name: zero}, **other)
            g = torch.randn(out.shape, dtype=f64, generator=torch.Generator().manual_seed(3)).to(
                target.device
            )
            d_eps, d_zero = torch.autograd.grad(out, (leaf, zero), g)
            rows = [t.cpu().numpy().reshape(3, -1) for t in (eps, prev, g)]
            coef = [2.0, 0.0] if mode != EXTRAPOLATE else [0.0]
            e_eps, _, e_coef, _ = oracle.lm_direction_vjp(rows[0], rows[1], mode, coef, rows[2])
            assert_within(d_zero, e_coef[-1].sum(), 1e-12, f"gradient of {name}")
            assert_within(d_eps, e_eps.reshape(d_eps.shape), 1e-12, "gradient of eps")

    def test_eps_zero_in_one_sample(self, target: Target):
        """ε = 0: value 0 and, where ‖ε‖ has no derivative, gradient 0; in its sample alone."""
        for options in (
            {"damping": 1.0, "kappa": 0.3},
            {"damping": 0.0, "kappa": 0.3},
            {"damping": 1.0, "kappa": 0.3, "keep_norm": False},
            {"extrapolation": 0.4},
        ):
            eps, prev = make(device=target.device)
            eps[1] = 0
            scalars = {
                k: torch.tensor(v, dtype=f64, requires_grad=True)
                for k, v in options.items()
                if k != "keep_norm"
            }
            leaves = [t.clone().requires_grad_() for t in (eps, prev)]
            out = self.call(target, *leaves, **{**options, **scalars})
            assert bool((out[1] == 0).all()) and bool(out.isfinite().all())
            found = torch.autograd.grad(out, (*leaves, *scalars.values()), torch.ones_like(out))
            assert all(bool(d.isfinite().all()) for d in found)
            if "keep_norm" not in options:  # without rescaling the direction is smooth there
                assert all(bool((d[1] == 0).all()) for d in found[:2])

    def test_parallel_without_damping(self, target: Target):
        """λ = 0 with p a multiple of ε: eps itself; without rescaling, 0."""
        for factor in (1.0, 2.0, -0.5, 0.0):
            # small integers, so that every scalar product is exact and ⟨d,d⟩ is exactly 0
            eps = torch.tensor([[1.0, -2.0, 4.0, 0.0], [3.0, 1.0, 0.0, 2.0]], device=target.device)
            prev = factor * eps
            assert torch.equal(self.call(target, eps, prev, damping=0.0, kappa=0.5), eps)
            leaf = eps.clone().requires_grad_()
            out = self.call(target, leaf, prev, damping=0.0, kappa=0.5)
            g = torch.tensor([[1.0, 2.0, 3.0, 4.0]] * 2, device=target.device)
            assert torch.equal(torch.autograd.grad(out, leaf, g)[0], g)
            plain = self.call(target, eps, prev, damping=0.0, kappa=0.5, keep_norm=False)
            assert bool((plain == 0).all())

    def test_plain_limits(self, target: Target):
        """Without rescaling and without prev the direction shrinks by λ/(λ+n)."""
        eps, _ = make((3, 50), device=target.device)
        n = (eps.double() ** 2).sum(1, keepdim=True)
        for damping in (0.0, 0.5, 1e6):
            expected = (eps.double() * damping / (damping + n)).float()
            out = self.call(target, eps, damping=damping, keep_norm=False)
            torch.testing.assert_close(out, expected, rtol=3e-7, atol=0)

    def test_norm_is_kept(self, target: Target):
        for damping in (0.0, 1e-3, 10.0):
            eps, prev = make(device=target.device)
            out = self.call(target, eps, prev, damping=damping, kappa=0.4)
            norms = [t.double().flatten(1).norm(dim=1) for t in (out, eps)]
            torch.testing.assert_close(*norms, rtol=2e-7, atol=0)

    def test_large_norm_in_half_precision(self, target: Target):
        """‖eps‖² far above 65504, elements up to 6e4."""
        for dtype in (torch.float16, torch.bfloat16):
            eps, prev = (1e4 * t for t in make((2, 4, 40, 40), 0.5, f64))
            eps, prev = (t.to(dtype).to(target.device) for t in (eps, prev))
            out = self.call(target, eps, prev, damping=1e8, kappa=0.3)
            rows = [t.double().cpu().numpy().reshape(2, -1) for t in (eps, prev)]
            expected = oracle.lm_direction(*rows, KEEP_NORM, 1e8, 0.3).reshape(eps.shape)
            gap = oracle.wide(out.double().cpu()) - expected
            assert bool(out.isfinite().all())
            assert np.sqrt((gap**2).sum() / (expected**2).sum()) < torch.finfo(dtype).eps

    def test_tiny_eps(self, target: Target):
        """Samples whose squares underflow in float32: finite, and never longer than the input."""
        for scale in (1e-20, 1e-30, 1e-40):
            eps, prev = (t * scale for t in make((2, 300), device=target.device))
            out = self.call(target, eps, prev, damping=1.0, kappa=0.4)
            assert bool(out.isfinite().all())
            assert bool((out.double().norm(dim=1) <= eps.double().norm(dim=1) * 1.001).all())
