"""The examples do what they claim, in a small setting."""

import importlib.util
import pathlib
from types import SimpleNamespace

import pytest
import torch

import marquardt as mq

EXAMPLES = pathlib.Path(__file__).resolve().parents[1] / "examples"
pytestmark = pytest.mark.accuracy


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def example():
    return load("second_order_langevin")


@pytest.fixture(scope="module")
def runs(example):
    """(curvatures, what each sampler did): 16 chains, condition number 100, three stiff directions."""
    found = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        curvatures = torch.cat([torch.linspace(1, 1.5, 13), torch.logspace(1.5, 2, 3)])
        P, score, axes = example.gaussian(curvatures)
        for name, learn in (("plain", False), ("low-rank H", True)):
            states, H, h = example.sample(score, torch.randn(16, 16), 600, 4000, learn=learn, rank=4)
            z = axes(states)
            rho = example.autocorrelation(z)
            dense = torch.eye(16, dtype=torch.float64).expand(16, -1, -1)
            if learn:
                dense = dense + (H.U.double().mT * H.s[:, None, :]) @ H.U.double()
            spectrum = torch.linalg.eigvals(torch.linalg.solve(dense, P.double().expand(16, -1, -1))).real
            found[name] = SimpleNamespace(
                z=z, rho=rho, ess=example.ess_per_step(rho), h=h.double(), spectrum=spectrum, learnt=H.U
            )
    return curvatures, found


class TestSecondOrderLangevin:
    """`spectrum` is that of H⁻¹P per chain; what is expected of a chain is the theory of a linear recursion."""

    def test_plain_learns_nothing(self, runs):
        _, found = runs
        assert found["plain"].learnt is None and found["low-rank H"].learnt is not None

    def test_frozen_after_the_warm_up(self, example, monkeypatch):
        updates, update = [], mq.LowRankHessian.update
        monkeypatch.setattr(
            mq.LowRankHessian, "update", lambda self, v: (updates.append(v), update(self, v))[1]
        )
        _, H, _ = example.sample(lambda x: -4 * x, torch.randn(2, 3), 5, 7, learn=True, rank=2)
        assert len(updates) == 5 and H.U.shape == (2, 2, 3)

    @pytest.mark.parametrize("name", ["plain", "low-rank H"])
    def test_half_of_the_largest_stable_step(self, runs, name):
        """A Rayleigh quotient is at most λmax, and here close to it."""
        run = runs[1][name]
        share = run.h * run.spectrum.max(1).values
        assert share.min() > 0.999 and share.max() < 1.2

    def test_the_learnt_curvature_stays_below_the_true_one(self, runs):
        spectrum = runs[1]["low-rank H"].spectrum
        assert spectrum.min() > 0.99
        assert spectrum.max() < 1.6  # was 100

    def test_effective_samples_per_step(self, runs):
        curvatures, found = runs
        plain, learnt = found["plain"], found["low-rank H"]
        ratio = plain.ess / (plain.h.mean() * curvatures / 2)
        assert 0.8 < ratio.median() < 1.25
        floor = (learnt.h * learnt.spectrum.min(1).values / 2).mean()
        assert 0.9 < learnt.ess.min() / floor < 1.2
        assert learnt.ess.min() > 30 * plain.ess.min()

    @pytest.mark.parametrize("name", ["plain", "low-rank H"])
    def test_covariance_within_monte_carlo_error(self, example, runs, name):
        run = runs[1][name]
        scores = example.covariance_scores(run.z, run.rho)
        assert scores.square().mean().sqrt() < 1.3
        assert scores.abs().max() < 5

    def test_covariance_of_the_preconditioned_chain(self, runs):
        flat = runs[1]["low-rank H"].z.flatten(0, 1)
        assert (flat.T @ flat / len(flat) - torch.eye(16)).abs().max() < 0.04

    def test_picture(self, example, runs, tmp_path):
        pytest.importorskip("matplotlib")
        curvatures, found = runs
        kept = {name: (run.rho, run.ess) for name, run in found.items()}
        example.draw(curvatures, kept, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000


class TestMixture:
    """LML on DDIM and on DPM-Solver where the exact flow is known."""

    @pytest.fixture(scope="class")
    def mixture(self):
        return load("lml_mixture")

    @pytest.fixture(scope="class")
    def found(self, mixture):
        """{sampler: errors at 5 and 10 steps}, 8 Gaussians in 16 dimensions."""
        generator = torch.Generator().manual_seed(3)
        means = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        noise = torch.randn(256, 16, generator=generator, dtype=torch.float64)
        return mixture.errors(mixture.Mixture(means, 0.3), noise, [5, 10], fine=499)

    def test_the_model_is_the_score_of_the_mixture(self, mixture):
        means = torch.tensor([[0.5, -1.0, 0.3], [1.5, 0.2, 0.0]], dtype=torch.float64)
        x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
        alpha_bar, width = 0.6, 0.4
        variance = alpha_bar * width**2 + 1 - alpha_bar
        away = (x[:, None] - alpha_bar**0.5 * means).square().sum(2)
        density = torch.logsumexp(-away / (2 * variance), 1).sum()
        (score,) = torch.autograd.grad(density, x)
        eps = mixture.Mixture(means, width).eps(x.detach(), alpha_bar)
        assert torch.allclose(eps, -((1 - alpha_bar) ** 0.5) * score, rtol=1e-12)

    def test_dpm_of_order_one_is_ddim(self, mixture):
        alpha_bars = mixture.schedule()[torch.tensor([999, 600, 300, 0])].tolist()
        model = mixture.Mixture(torch.ones(2, 5, dtype=torch.float64), 0.5)
        x = torch.randn(3, 5, dtype=torch.float64)
        a, b = mixture.ddim(model, x, alpha_bars), mixture.dpm(model, x, alpha_bars)
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-12)

    def test_which_way_each_sampler_goes(self, found):
        """LML-DPM gains on DDIM with γ > 0; LML-DDIM loses, and gains with γ < 0."""
        plain = found["DDIM"]
        for i in range(2):
            assert found["LML-DPM, γ = 0.5"][i] < 0.95 * plain[i]
            assert found["LML-DDIM, γ = 0.3"][i] > plain[i] > found["LML-DDIM, γ = −0.3"][i]

    def test_picture(self, mixture, found, tmp_path):
        pytest.importorskip("matplotlib")
        mixture.draw([5, 10], found, tmp_path / "picture.png")
        assert (tmp_path / "picture.png").stat().st_size > 10_000
