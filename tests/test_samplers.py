"""Steps of the samplers against the published formulas, written out here in float64, and their options."""

import math

import pytest
import torch

from marquardt.lml_coefficients import PREDICTIONS
from marquardt.samplers import LMLDDIM, LMLDPMSolver, LMLFlowEuler, schedules
from sampler_runs import ALL, LM, SHAPE, close, every, network, normal, published_lm, run

# ---- steps against the published formulas ------------------------------------------------------------


def ddim_by_hand(sampler, kind, eta=0.0, lm=None, clip=None, threshold=None, noise=None, steps=6):
    """Published DDIM with its correction, float64."""
    sampler.set_timesteps(steps)
    x, prev, states = normal("x"), None, []
    for i, t in enumerate(sampler.timesteps.tolist()):
        out = network(x, t)
        alpha_bar = sampler.alphas_cumprod[t]
        after = t - 1000 // steps
        next_bar = sampler.alphas_cumprod[after] if after >= 0 else 1.0
        a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        if kind == "epsilon":
            x0, eps = (x - s * out) / a, out
        elif kind == "sample":
            x0, eps = out, (x - a * out) / s
        else:
            x0, eps = a * x - s * out, a * out + s * x
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        if threshold is not None:
            limit = torch.quantile(x0.abs().flatten(1), threshold[0], dim=1).clamp(1, threshold[1])
            limit = limit.view(-1, 1, 1, 1)
            x0 = x0.clamp(-limit, limit) / limit
        deviation = eta * math.sqrt((1 - next_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_bar))
        direction = eps if lm is None else published_lm(eps, prev, **lm)
        x = math.sqrt(next_bar) * x0 + math.sqrt(1 - next_bar - deviation**2) * direction
        x = x if noise is None else x + deviation * noise(i)
        prev = eps
        states.append(x)
    return states


@pytest.mark.accuracy
@pytest.mark.parametrize("lm", [None, LM], ids=["plain", "lm"])
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_ddim_is_the_published_formula(kind, lm):
    sampler = LMLDDIM(clip_sample=False, prediction_type=kind, **(lm or {}))
    close(run(sampler), ddim_by_hand(sampler, kind, lm=lm))


@pytest.mark.accuracy
def test_ddim_with_clamp_and_noise():
    def noise(i):
        return normal("noise", i)

    sampler = LMLDDIM(clip_sample_range=0.7, **LM)
    want = ddim_by_hand(sampler, "epsilon", eta=0.8, lm=LM, clip=0.7, noise=noise)
    close(run(sampler, eta=0.8, noise=noise), want)


@pytest.mark.accuracy
def test_ddim_with_the_eps_of_the_clamped_x0():
    sampler = LMLDDIM(clip_sample_range=0.7)
    sampler.set_timesteps(6)
    x, alpha_bar = normal("x"), sampler.alphas_cumprod[int(sampler.timesteps[2])]
    a, s = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    out = network(x, 0)
    x0 = ((x - s * out) / a).clamp(-0.7, 0.7)
    next_bar = sampler.alphas_cumprod[int(sampler.timesteps[2]) - 166]
    want = math.sqrt(next_bar) * x0 + math.sqrt(1 - next_bar) * (x - a * x0) / s
    close([sampler.step(out, sampler.timesteps[2], x, use_clipped_model_output=True)], [want])


@pytest.mark.accuracy
def test_ddim_with_thresholding():
    sampler = LMLDDIM(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=2.0)
    close(run(sampler), ddim_by_hand(sampler, "epsilon", threshold=(0.9, 2.0)))


def dpm_increment(algorithm, order, solver, third, at, outputs):
    """(multiple of x, increment, noise) from the published table; `at` holds (alpha, sigma, lambda), target first."""
    (alpha, sigma, lam), (alpha0, sigma0, lam0) = at[:2]
    h = lam - lam0
    d0, d1, d2 = outputs[0], None, None
    if order > 1:
        r0 = (lam0 - at[2][2]) / h
        d1 = (outputs[0] - outputs[1]) / r0
    if order > 2:
        r1 = (at[2][2] - at[3][2]) / h
        older = (outputs[1] - outputs[2]) / r1
        d2 = (d1 - older) / (r0 + r1) * (2 if third == "exact" else 1)
        d1 = d1 + r0 / (r0 + r1) * (d1 - older)
    e, heat = math.expm1(-h if "++" in algorithm else h), 0.0
    if algorithm == "dpmsolver":
        keep, w0 = alpha / alpha0, -sigma * e
        w1, w2 = -sigma * (e / h - 1), -sigma * ((e - h) / h**2 - 0.5)
    elif algorithm == "dpmsolver++":
        keep, w0 = sigma / sigma0, -alpha * e
        w1, w2 = alpha * (e / h + 1), -alpha * ((e + h) / h**2 - 0.5)
    elif algorithm == "sde-dpmsolver":
        keep, w0, w1, w2 = alpha / alpha0, -2 * sigma * e, -2 * sigma * (e / h - 1), math.nan
        heat = sigma * math.sqrt(math.expm1(2 * h))
    else:
        e2 = -math.expm1(-2 * h)
        keep, w0, w1 = sigma / sigma0 * math.exp(-h), alpha * e2, alpha * (e2 / (-2 * h) + 1)
        w2 = alpha * ((e2 - 2 * h) / (2 * h) ** 2 - 0.5)
        heat = sigma * math.sqrt(e2)
    if order == 2 and solver == "midpoint":
        w1 = w0 / 2
    increment = w0 * d0
    increment = increment if order < 2 else increment + w1 * d1
    return keep, increment if order < 3 else increment + w2 * d2, heat


def dpm_by_hand(sampler, options, lm=None, noise=None, steps=6):
    """Published DPM-Solver multistep with its correction, float64, down to the level of timestep 0."""
    algorithm, order = options["algorithm_type"], options["solver_order"]
    sampler.set_timesteps(steps)
    times = [*sampler.timesteps.tolist(), 0]
    bars = [sampler.alphas_cumprod[t] for t in times]
    points = [(a**0.5, (1 - a) ** 0.5, math.log(a**0.5) - math.log((1 - a) ** 0.5)) for a in bars]
    x, history, prev, states = normal("x"), [], None, []
    for i in range(steps):
        out, (alpha, sigma, _) = network(x, times[i]), points[i]
        history = [(x - sigma * out) / alpha if "++" in algorithm else out, *history][:3]
        now = min(order, i + 1, steps - i)  # short runs end in lower orders
        at = [points[i + 1], *(points[i - age] for age in range(now))]
        keep, increment, heat = dpm_increment(
            algorithm,
            now,
            options.get("solver_type", "midpoint"),
            options.get("third_order", ""),
            at,
            history,
        )
        direction = increment if lm is None else published_lm(increment, prev, **lm)
        x = keep * x + direction
        x = x if noise is None else x + heat * noise(i)
        prev = increment
        states.append(x)
    return states


DPM = [
    {"algorithm_type": algorithm, "solver_order": order, "solver_type": solver}
    for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    for order, solver in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
    if (algorithm, order) != ("sde-dpmsolver", 3)
]


@pytest.mark.accuracy
@pytest.mark.parametrize("options", DPM, ids=lambda o: "-".join(map(str, o.values())))
def test_dpm_is_the_published_formula(options):
    def noise(i):
        return normal("noise", i)

    sampler = LMLDPMSolver(final_sigmas_type="sigma_min", **options)
    given = {"noise": noise} if options["algorithm_type"].startswith("sde") else {}
    close(run(sampler, **given), dpm_by_hand(sampler, options, **given), 1e-10)


@pytest.mark.accuracy
@pytest.mark.parametrize("options", [o for o in DPM if o["algorithm_type"].startswith("dpm")], ids=str)
def test_dpm_with_its_correction(options):
    sampler = LMLDPMSolver(final_sigmas_type="sigma_min", **options, **LM)
    close(run(sampler), dpm_by_hand(sampler, options, lm=LM), 1e-10)


@pytest.mark.accuracy
def test_third_order_exact_doubles_the_curvature():
    options = {"algorithm_type": "dpmsolver++", "solver_order": 3, "third_order": "exact"}
    sampler = LMLDPMSolver(final_sigmas_type="sigma_min", **options)
    exact = run(sampler)
    close(exact, dpm_by_hand(sampler, options), 1e-10)
    published = run(LMLDPMSolver(final_sigmas_type="sigma_min", algorithm_type="dpmsolver++", solver_order=3))
    assert torch.equal(exact[1], published[1]) and not torch.allclose(exact[2], published[2], rtol=1e-6)


def test_the_direction_is_free_of_the_step_size():
    """What is kept for a network that says x0 = 1 is 1 in every step, where an increment has the step's size."""
    kept = {}
    for apply_to in ("direction", "increment"):
        sampler = LMLDPMSolver(prediction_type="sample", apply_to=apply_to, **LM)
        sampler.set_timesteps(5)
        x, kept[apply_to] = normal("x"), []
        for _ in range(5):
            x = sampler.step(torch.ones_like(x), None, x)
            kept[apply_to].append(sampler.prev_increment)
    for direction in kept["direction"]:
        torch.testing.assert_close(direction, torch.ones_like(direction), rtol=1e-12, atol=0)
    sizes = [increment.mean().item() for increment in kept["increment"]]
    assert sizes[-1] == pytest.approx(1) and sizes[0] < 0.1


def test_sde_is_corrected_only_when_asked():
    plain, asked = (
        {"algorithm_type": "sde-dpmsolver++", "lm_on_sde": asked, **LM} for asked in (False, True)
    )
    uncorrected = run(LMLDPMSolver(algorithm_type="sde-dpmsolver++"), seed=3)
    assert torch.equal(run(LMLDPMSolver(**plain), seed=3)[-1], uncorrected[-1])
    assert not torch.allclose(run(LMLDPMSolver(**asked), seed=3)[-1], uncorrected[-1], rtol=1e-6)


@pytest.mark.accuracy
@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("lm", [None, LM], ids=["plain", "lm"])
def test_flow_is_the_published_formula(lm, stochastic):
    def noise(i):
        return normal("noise", i)

    sampler = LMLFlowEuler(shift=2.0, stochastic_sampling=stochastic, **(lm or {}))
    sampler.set_timesteps(6)
    levels, times = sampler.sigmas.tolist(), sampler.timesteps
    x, prev, want = normal("x"), None, []
    for i in range(6):
        velocity = network(x, times[i])
        direction = velocity if lm is None else published_lm(velocity, prev, **lm)
        if stochastic:
            x = (1 - levels[i + 1]) * (x - levels[i] * direction) + levels[i + 1] * noise(i)
        else:
            x = x + (levels[i + 1] - levels[i]) * direction
        prev = velocity
        want.append(x)
    close(run(sampler, **({"noise": noise} if stochastic else {})), want)


# ---- what the correction does ----------------------------------------------------------------------


@every
def test_kappa_zero_is_the_plain_sampler_bit_for_bit(make):
    plain = run(make())
    for off in (
        {"damping": 1.0},
        {"damping": 1.0, "kappa": 0.0},
        {"extrapolation": 0},
        {**LM, "freeze": 1.0},
    ):
        sampler = make(**off)
        assert all(map(torch.equal, run(sampler), plain))


@every
@pytest.mark.parametrize("lm", [LM, {"extrapolation": 0.3}], ids=str)
def test_the_correction_acts_from_the_second_step_on(make, lm):
    plain, corrected = run(make()), run(make(**lm))
    assert torch.equal(plain[0], corrected[0]) and torch.isfinite(corrected[-1]).all()
    assert not torch.allclose(plain[1], corrected[1], rtol=1e-6)


@every
def test_freeze_leaves_the_noisy_end_alone(make):
    plain, corrected = run(make()), run(make(freeze=0.5, **LM))
    sampler = make(freeze=0.5, **LM)
    sampler.set_timesteps(6)
    frozen = sum(t >= 500 for t in sampler.timesteps.tolist())
    assert 1 < frozen < 6
    assert all(map(torch.equal, plain[:frozen], corrected[:frozen]))
    assert not torch.allclose(plain[frozen], corrected[frozen], rtol=1e-6)  # its previous ε is known already


@every
def test_numbers_may_be_tensors(make):
    one = run(make(damping=torch.tensor([5.0, 5.0]), kappa=torch.tensor(0.1)))
    close(one, run(make(**LM)), 1e-6)  # 0.1 is a float32 here
    per_sample = run(make(damping=5.0, kappa=torch.tensor([0.0, 0.1])))
    assert torch.equal(per_sample[-1][0], run(make())[-1][0])


@every
def test_gradients_reach_the_first_sample(make):
    x = normal("x").requires_grad_()
    run(make(**LM), steps=3, x=x)[-1].sum().backward()
    assert x.grad.isfinite().all() and x.grad.abs().sum() > 0


# ---- options of a step -----------------------------------------------------------------------------


@every
def test_guidance_is_the_guided_output(make):
    free, joined = make(**LM), make(**LM)
    free.set_timesteps(4)
    joined.set_timesteps(4)
    x = y = normal("x")
    for t in free.timesteps:
        conditional, unconditional = network(x, t), network(x.neg(), t)
        x = joined.step(conditional, t, x, guidance=(unconditional, 3.0))
        y = free.step(unconditional + 3.0 * (conditional - unconditional), t, y)
    close([x], [y], 1e-10)


@every
def test_doubled_is_the_next_input_of_a_doubled_network(make):
    single, double = make(), make()
    single.set_timesteps(4)
    double.set_timesteps(4)
    x, t = normal("x"), single.timesteps[0]
    once, twice = single.step(network(x, t), t, x), double.step(network(x, t), t, x, doubled=True)
    assert torch.equal(twice, torch.cat([once, once]))
    double.step(network(once, 0), None, twice[:2])  # half of it goes on


def test_the_learned_variance_is_left_out():
    for make in (ALL["ddim"], ALL["dpm"]):
        plain, learned = make(**LM), make(variance_type="learned", **LM)
        plain.set_timesteps(3)
        learned.set_timesteps(3)
        x = y = normal("x")
        for t in plain.timesteps:
            mean = network(x, t)
            x = plain.step(mean, t, x)
            y = learned.step(torch.cat([mean, torch.full_like(mean, math.nan)], 1), t, y)
        assert torch.equal(x, y)


def test_inactive_samples_stay():
    for make in (ALL["ddim"], ALL["flow"]):
        sampler = make()
        sampler.set_timesteps(3)
        x = normal("x")
        new = sampler.step(network(x, 0), None, x, active=torch.tensor([True, False]))
        assert torch.equal(new[1], x[1]) and not torch.equal(new[0], x[0])


@pytest.mark.determinism
def test_an_int_seeds_the_whole_trajectory():
    sampler = LMLDDIM(clip_sample=False)
    first, again, other = (run(sampler, eta=1.0, seed=seed) for seed in (7, 7, 8))
    assert all(map(torch.equal, first, again)) and not torch.equal(first[-1], other[-1])


def test_noise_from_a_generator_is_repeatable():
    sampler = LMLDPMSolver(algorithm_type="sde-dpmsolver++")
    a, b = (run(sampler, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, a, b)) and not torch.equal(a[-1], run(sampler)[-1])


def test_equal_seeds_draw_other_noise_in_each_step():
    sampler = LMLFlowEuler(stochastic_sampling=True)
    sampler.set_timesteps(sigmas=[1.0, 0.5, 0.25])
    zero = torch.zeros(SHAPE)
    first, second = (sampler.step(zero, None, zero, seed=7) for _ in range(2))
    assert not torch.allclose(first / 0.5, second / 0.25, atol=1e-3)


@every
@pytest.mark.parametrize("pair", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.bfloat16)], ids=str)
def test_narrow_networks(make, pair):
    sampler, exact = make(**LM), run(make(**LM))
    sampler.set_timesteps(6)
    x = normal("x").to(pair[0])
    for t in sampler.timesteps:
        x = sampler.step(network(x, t).to(pair[1]), t, x)
    assert x.dtype == pair[0] and ((x.double() - exact[-1]).norm() / exact[-1].norm()).item() < 0.1


@pytest.mark.parametrize("spread", ["use_karras_sigmas", "use_exponential_sigmas"])
@pytest.mark.parametrize("algorithm, order", [("dpmsolver", 3), ("sde-dpmsolver", 2)])
def test_levels_that_reach_the_end_a_step_early(algorithm, order, spread):
    options = {"algorithm_type": algorithm, "solver_order": order, spread: True}
    sampler = LMLDPMSolver(lower_order_final=False, **options)
    states = run(sampler, steps=5)
    assert sampler.sigmas[-1] == sampler.sigmas[-2]
    assert torch.equal(states[-1], states[-2]) and states[-1] is not states[-2]
    assert torch.isfinite(states[-1]).all()


def test_final_level_zero_returns_the_prediction():
    sampler = LMLDPMSolver(solver_order=3, lower_order_final=False)
    sampler.set_timesteps(20)
    x = normal("x")
    for t in sampler.timesteps[:-1]:
        x = sampler.step(network(x, t), t, x)
    t, (alpha, sigma) = sampler.timesteps[-1], schedules.vp_scales(sampler.sigmas[-2].item())
    out = network(x, t)
    close([sampler.step(out, t, x)], [(x - sigma * out) / alpha], 1e-10)
