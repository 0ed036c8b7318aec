"""The definition of the Fisher moments against autograd of the mixture's log-density, and the algebra of its states."""

from __future__ import annotations

import math

import pytest
import torch

from marquardt.reference import moments as ref

pytestmark = pytest.mark.accuracy

f64 = torch.float64
B, N, D, R = 3, 40, 7, 2


@pytest.fixture
def case():
    """Rows with near duplicates, queries between them: posteriors of several rows."""
    generator = torch.Generator().manual_seed(3)
    data = torch.randn(N, D, dtype=f64, generator=generator)
    data[20:] = data[:20] + 0.3 * torch.randn(20, D, dtype=f64, generator=generator)
    alpha, sigma = torch.tensor([0.9, 0.5, 1.0], dtype=f64), torch.tensor([0.4, 0.8, 0.3], dtype=f64)
    x = alpha[:, None] * data[:B] + 0.5 * sigma[:, None] * torch.randn(B, D, dtype=f64, generator=generator)
    v = torch.randn(B, R, D, dtype=f64, generator=generator)
    weights = 0.5 * torch.randn(N, dtype=f64, generator=generator)
    return x, data, alpha, sigma, v, weights


def log_density(x, data, alpha, sigma, log_weights=None):
    """Of one query, straight from the mixture of Gaussians."""
    components = torch.distributions.MultivariateNormal(
        alpha * data, covariance_matrix=sigma.square() * torch.eye(data.shape[1], dtype=f64)
    )
    prior = torch.zeros(len(data), dtype=f64) if log_weights is None else log_weights
    mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(logits=prior), components)
    return mixture.log_prob(x)


@pytest.mark.parametrize("weighted", [False, True])
def test_against_the_hessian_of_the_mixture(case, weighted: bool):
    x, data, alpha, sigma, v, weights = case
    weights = weights if weighted else None
    density, mean, variance, mvp = ref.moments(x, data, alpha, sigma, v=v, log_weights=weights)
    score = ref.score(x, mean, alpha, sigma)
    trace, product = ref.fisher_trace(D, variance, alpha, sigma), ref.fisher_mvp(v, mvp, alpha, sigma)
    for b in range(B):

        def of(q, b=b):
            return log_density(q, data, alpha[b], sigma[b], weights)

        fisher = -torch.autograd.functional.hessian(of, x[b])
        torch.testing.assert_close(density[b], of(x[b]))
        torch.testing.assert_close(score[b], torch.autograd.functional.jacobian(of, x[b]))
        torch.testing.assert_close(trace[b], fisher.trace())
        torch.testing.assert_close(product[b], v[b] @ fisher)
    assert (variance > 1e-3).all()  # a posterior of one row would prove nothing


@pytest.mark.parametrize("block", [1, 7, 39])
def test_blocks_merge_to_the_whole(case, block: int):
    x, data, alpha, sigma, v, weights = case
    whole = ref.moments(x, data, alpha, sigma, v=v, log_weights=weights)
    for one, other in zip(
        whole, ref.moments(x, data, alpha, sigma, v=v, log_weights=weights, block=block), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rows_that_are_not_seen_are_not_read(case):
    """A mask, a range and a weight of 0 each leave rows out, whatever these hold."""
    x, data, alpha, sigma, v, weights = case
    mask = torch.ones(B, N, dtype=torch.bool)
    mask[1, 5:9] = False
    rows = torch.tensor([[0, N], [3, N], [0, 31]])
    weights[2] = -math.inf
    spoiled = data.clone()
    spoiled[2] = math.nan  # nobody sees it
    spoiled[6] = math.nan  # query 1 does not
    found = ref.moments(x, spoiled, alpha, sigma, v=v, log_weights=weights, mask=mask, rows=rows)
    for b in range(B):
        keep = [i for i in range(*rows[b].tolist()) if mask[b, i] and i != 2]
        alone = ref.moments(
            x[b : b + 1],
            data[keep],
            alpha[b : b + 1],
            sigma[b : b + 1],
            v=v[b : b + 1],
            log_weights=weights[keep],
        )
        for f, e in zip(found, alone, strict=True):
            if b == 1:
                torch.testing.assert_close(f[b], e[0])
            else:
                assert f[b].isnan().all()
    with pytest.raises(ValueError, match="query 1 may see no row"):
        ref.moments(x, data, alpha, sigma, rows=torch.tensor([[0, 2], [4, 4], [0, 1]]))


def test_images_as_stored(case):
    x, _, alpha, sigma, v, _ = case
    generator = torch.Generator().manual_seed(4)
    data = torch.randint(0, 256, (N, D), dtype=torch.uint8, generator=generator)
    found = ref.moments(x, data, alpha, sigma, v=v, scale=2 / 255, shift=-1.0)
    for f, e in zip(found, ref.moments(x, data.double() * (2 / 255) - 1, alpha, sigma, v=v), strict=True):
        torch.testing.assert_close(f, e)


def test_far_from_all_rows(case):
    """exp of every logit is 0 there: the sum must be taken relative to the largest."""
    x, data, alpha, sigma, _, _ = case
    density, mean, variance, _ = ref.moments(x + 1e3, data, alpha, sigma)
    assert torch.isfinite(density).all() and torch.isfinite(mean).all() and (variance >= 0).all()


def test_derivatives(case):
    """Of mean, log-density and score twice, of trace and product once; to x, v, α, σ and the weights."""
    x, data, alpha, sigma, v, weights = case
    leaves = [t.clone().requires_grad_() for t in (x[:1], alpha[:1], sigma[:1], v[:1], weights)]

    def outputs(x, alpha, sigma, v, weights):
        return ref.moments(x, data, alpha, sigma, v=v, log_weights=weights)

    assert torch.autograd.gradcheck(outputs, leaves)
    assert torch.autograd.gradgradcheck(lambda *a: outputs(*a)[:2], leaves)
