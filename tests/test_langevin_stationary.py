"""What Langevin chains settle at on a Gaussian, against the closed form of each scheme.

Simulated chains are judged by five standard errors; seeds are fixed, a right generator misses with 6e-7 of all seeds.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import marquardt as mq
import oracle_steps as steps
from harness import Target

pytestmark = pytest.mark.accuracy
f64 = torch.float64
SCHEMES = ("baoab", "obabo", "euler")


def samples(target: Target) -> int:
    """The definition draws slowly."""
    return 1 << (12 if target.backend == "reference" else 18)


class TestStationary:
    """What the chains settle at on a Gaussian of precision k, in closed form."""

    def linear(self, target: Target, scheme: str, h: float, gamma: float, k: float, T: float, **end):
        def step(x, v, z):
            x, v, z = (torch.tensor(t, dtype=f64, device=target.device) for t in (x, v, z))
            with target():
                return [
                    t.cpu()
                    for t in mq.underdamped_langevin_step(
                        x, v, -k * x, step=h, friction=gamma, temperature=T, scheme=scheme, noise=z, **end
                    )
                ]

        return steps.linear_form(step)

    @pytest.mark.parametrize(
        ("h", "gamma", "k", "T"), [(0.5, 1.0, 1.0, 1.0), (0.9, 0.2, 1.7, 0.4), (0.1, 5.0, 3.0, 2.0)]
    )
    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_underdamped(self, target: Target, scheme: str, h: float, gamma: float, k: float, T: float):
        """Σ = MΣMᵀ + bbᵀ with the M and b that the function itself shows; then the last half kick."""
        M, b = self.linear(target, scheme, h, gamma, k, T)
        S = steps.stationary(M, b)
        q = 1 - h * h * k / 4
        if scheme == "euler":
            V = 2 * T / (2 - gamma * h - h * h * k / 2)
            expected = np.array([[V * (2 - gamma * h) / (2 * k), h * V / 2], [h * V / 2, V]])
            np.testing.assert_allclose(S, expected, rtol=1e-11)
            return
        last, none = self.linear(target, scheme, h, gamma, k, T, finish=True)
        assert not np.any(none)
        end = last @ S @ last.T
        x, v = {"baoab": (T / k, T * q), "obabo": (T / (k * q), T)}[scheme]
        np.testing.assert_allclose(end, np.diag([x, v]), rtol=1e-10, atol=1e-11)
        assert abs(S[0, 0] - x) < 1e-10

    @pytest.mark.parametrize("scheme", ["baoab", "obabo"])
    def test_start_keeps_it(self, target: Target, scheme: str):
        """A chain that begins with `start` in the law at its ends is in its law from the first step on."""
        h, gamma, k, T = 0.7, 1.1, 1.3, 0.8
        M, b = self.linear(target, scheme, h, gamma, k, T)
        last, _ = self.linear(target, scheme, h, gamma, k, T, finish=True)
        first, kick = self.linear(target, scheme, h, gamma, k, T, start=True)
        S = steps.stationary(M, b)
        begun = first @ (last @ S @ last.T) @ first.T + np.outer(kick, kick)
        np.testing.assert_allclose(begun, S, rtol=1e-10, atol=1e-11)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_chain(self, target: Target, scheme: str):
        """A run with drawn noise ends there, to five of its standard errors."""
        h, gamma, count = 0.5, 1.0, samples(target)
        x, v = torch.zeros(1, count, device=target.device), torch.zeros(1, count, device=target.device)
        torch.manual_seed(11)
        with target():
            for i in range(40):
                start = {"start": True} if i == 0 and scheme != "euler" else {}
                x, v = mq.underdamped_langevin_step(x, v, -x, step=h, friction=gamma, scheme=scheme, **start)
            if scheme != "euler":
                x, v = mq.underdamped_langevin_step(
                    x, v, -x, step=h, friction=gamma, scheme=scheme, finish=True
                )
        exact = {"baoab": (1.0, 0.9375), "obabo": (1 / 0.9375, 1.0), "euler": (12 / 11, 16 / 11)}[scheme]
        for t, var in zip((x, v), exact, strict=True):
            assert abs(float(t.double().square().mean()) - var) < 5 * var * (2 / count) ** 0.5

    def test_a_stale_score_would_show(self, target: Target):
        """The same chain with the score of the step before is far from 1: what the tests above can tell."""
        h, gamma, c = 0.5, 1.0, math.exp(-0.5)
        n = math.sqrt(1 - c * c)
        # state (x, v, score)
        M = np.array([[1, h / 2 * (1 + c), h * h / 2 * (1 + c)], [0, c, c * h], [-1, 0, 0]])
        S = steps.stationary(M, [h / 2 * n, n, 0.0])
        assert S[0, 0] > 1.3
        M, b = self.linear(target, "baoab", h, gamma, 1.0, 1.0)
        assert abs(steps.stationary(M, b)[0, 0] - 1) < 1e-12

    def test_overdamped(self, target: Target):
        """x' = (1 − h)x + √(2h)ξ settles at 1/(1 − h/2)."""
        h, count = 0.5, samples(target)
        x = torch.zeros(1, count, device=target.device)
        torch.manual_seed(12)
        with target():
            for _ in range(30):
                x = mq.langevin_step(x, -x, step=h)
        var = 1 / (1 - h / 2)
        assert abs(float(x.double().square().mean()) - var) < 5 * var * (2 / count) ** 0.5
