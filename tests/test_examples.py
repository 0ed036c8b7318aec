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
