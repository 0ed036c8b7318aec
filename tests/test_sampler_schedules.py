"""Noise schedules, timesteps and orders: closed forms, and the numbers of diffusers where it is installed."""

import doctest
import importlib
import math

import pytest
import torch

from marquardt.samplers import LMLDPMSolver, LMLFlowEuler, schedules
from sampler_runs import run

pytestmark = pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # diffusers, from numpy


def test_betas_in_closed_form():
    linear = schedules.make_betas("", 1000, start=1e-4, end=0.02, schedule="linear")
    assert (
        linear[0] == 1e-4 and linear[-1] == 0.02 and linear[500] == pytest.approx(1e-4 + 0.0199 * 500 / 999)
    )
    scaled = schedules.make_betas("", 1000, start=0.00085, end=0.012, schedule="scaled_linear")
    middle = (math.sqrt(0.00085) + math.sqrt(0.012)) / 2
    assert (math.sqrt(scaled[499]) + math.sqrt(scaled[500])) / 2 == pytest.approx(middle, rel=1e-12)
    cosine = schedules.cumulative_alphas(
        schedules.make_betas("", 1000, start=0, end=0, schedule="squaredcos_cap_v2")
    )
    want = [math.cos((k / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2 for k in (0, 1, 400)]
    assert cosine[399] == pytest.approx(want[2] / want[0], rel=1e-12)  # the product telescopes
    assert cosine[0] == pytest.approx(want[1] / want[0], rel=1e-15)


def test_cumulative_product_is_float64():
    betas = schedules.make_betas("", 1000, start=1e-4, end=0.02, schedule="linear")
    logs = math.fsum(math.log1p(-beta) for beta in betas)
    assert schedules.cumulative_alphas(betas)[-1] == pytest.approx(math.exp(logs), rel=1e-13)


def test_zero_terminal_snr_ends_at_zero_and_keeps_the_first():
    betas = schedules.make_betas("", 100, start=1e-3, end=0.05, schedule="linear")
    plain, zero = schedules.cumulative_alphas(betas), schedules.cumulative_alphas(betas, zero_snr=True)
    assert zero[-1] == 0 and zero[0] == pytest.approx(plain[0], rel=1e-14)
    steps = [(math.sqrt(a) - math.sqrt(b)) for a, b in zip(zero, zero[1:])]
    old = [(math.sqrt(a) - math.sqrt(b)) for a, b in zip(plain, plain[1:])]
    assert max(abs(s / o - steps[0] / old[0]) for s, o in zip(steps, old)) < 1e-10  # one stretch for all


def test_timesteps_by_hand():
    assert schedules.ddim_timesteps("", 4, 1000, "leading", 1) == [751, 501, 251, 1]
    assert schedules.ddim_timesteps("", 4, 1000, "trailing", 0) == [999, 749, 499, 249]
    assert schedules.ddim_timesteps("", 4, 1000, "linspace", 0) == [999, 666, 333, 0]
    assert schedules.dpm_timesteps("", 4, 1000, "linspace", 0, 1000) == [999, 749, 500, 250]
    assert schedules.dpm_timesteps("", 4, 1000, "leading", 1, 1000) == [801, 601, 401, 201]


def test_spread_levels():
    karras = schedules.karras_sigmas(0.1, 10.0, 5)
    assert karras[0] == pytest.approx(10) and karras[-1] == pytest.approx(0.1)
    roots = [sigma ** (1 / 7) for sigma in karras]
    assert all(a - b == pytest.approx(roots[0] - roots[1]) for a, b in zip(roots, roots[1:]))
    exponential = schedules.exponential_sigmas(0.1, 10.0, 3)
    assert exponential == pytest.approx([10.0, 1.0, 0.1])


def test_a_level_finds_its_timestep():
    sampler = LMLDPMSolver()
    table = [schedules.vp_sigma(alpha) for alpha in sampler.alphas_cumprod]
    for t in (0, 1, 500, 998, 999):
        assert schedules.sigma_timestep(table[t], table) == pytest.approx(t, abs=1e-9)
    between = math.sqrt(table[500] * table[501])
    assert schedules.sigma_timestep(between, table) == pytest.approx(500.5)
    assert schedules.sigma_timestep(1e9, table) == 999 and schedules.sigma_timestep(0.0, table) == 0


def test_lambda_cut_of_a_cosine_schedule():
    sampler = LMLDPMSolver(beta_schedule="squaredcos_cap_v2", lambda_min_clipped=-5.1)
    sampler.set_timesteps(10)
    first = int(sampler.timesteps[0])
    lambdas = [schedules.half_log_snr(a**0.5, (1 - a) ** 0.5) for a in sampler.alphas_cumprod]
    assert lambdas[first] >= -5.1 > lambdas[first + 1]


def test_flow_shift():
    sampler = LMLFlowEuler(shift=3.0)
    sampler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert sampler.sigmas.tolist() == pytest.approx([1.0, 0.9, 0.75, 0.5, 0.0], rel=1e-15)
    assert sampler.timesteps.tolist() == pytest.approx([1000.0, 900.0, 750.0, 500.0])
    moved = LMLFlowEuler(use_dynamic_shifting=True)
    moved.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25], mu=math.log(3.0))  # e^μ = 3
    assert moved.sigmas.tolist() == pytest.approx(sampler.sigmas.tolist(), rel=1e-12)
    with pytest.raises(ValueError, match="LMLFlowEuler.set_timesteps: mu must be given"):
        moved.set_timesteps(4)
    ending = LMLFlowEuler(shift_terminal=0.1)
    ending.set_timesteps(5)
    assert ending.sigmas[-2].item() == pytest.approx(0.1) and ending.sigmas[-1] == 0


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("offset", [0, 1])
def test_timesteps_are_those_of_diffusers(spacing, offset):
    diffusers = pytest.importorskip("diffusers")
    ddim = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    dpm = diffusers.DPMSolverMultistepScheduler(timestep_spacing=spacing, steps_offset=offset)
    for steps in (*range(1, 60), 100, 288, 304, 336, 400):
        ddim.set_timesteps(steps)
        assert ddim.timesteps.tolist() == schedules.ddim_timesteps("", steps, 1000, spacing, offset), steps
        if steps > 1 or spacing != "trailing":
            dpm.set_timesteps(steps)
            got = schedules.dpm_timesteps("", steps, 1000, spacing, offset, 1000)
            assert dpm.timesteps.tolist() == got, steps


@pytest.mark.parametrize(
    "spread", [{}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}], ids=str
)
@pytest.mark.parametrize("schedule", schedules.BETA_SCHEDULES)
def test_levels_are_those_of_diffusers(schedule, spread):
    diffusers = pytest.importorskip("diffusers")
    options = {
        "beta_schedule": schedule,
        "final_sigmas_type": "sigma_min",
        "lambda_min_clipped": -5.1,
        **spread,
    }
    stock, ours = diffusers.DPMSolverMultistepScheduler(**options), LMLDPMSolver(**options)
    for steps in (2, 10, 37):
        stock.set_timesteps(steps)
        ours.set_timesteps(steps)
        # float32 tables round 1 − ᾱ; a level that falls on the border of two timesteps may go to the other one.
        torch.testing.assert_close(ours.sigmas, stock.sigmas.double(), rtol=3e-4, atol=0)
        assert (ours.timesteps - stock.timesteps).abs().max() <= (1 if spread else 0)


@pytest.mark.parametrize(
    "options",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"shift": 2.0, "shift_terminal": 0.1},
        {"invert_sigmas": True},
    ],
    ids=str,
)
def test_flow_levels_are_those_of_diffusers(options):
    diffusers = pytest.importorskip("diffusers")
    stock, ours = diffusers.FlowMatchEulerDiscreteScheduler(**options), LMLFlowEuler(**options)
    mu = {"mu": 0.8} if "use_dynamic_shifting" in options else {}
    for steps in (2, 10):
        stock.set_timesteps(steps, **mu)
        ours.set_timesteps(steps, **mu)
        torch.testing.assert_close(ours.sigmas, stock.sigmas.double(), rtol=0, atol=1e-7)
        torch.testing.assert_close(ours.timesteps, stock.timesteps, rtol=2e-7, atol=1e-4)


def test_orders_of_the_steps():
    def orders(number, **options):
        given = {"solver_order": 3, "lower_final": True, "first_order_final": False, **options}
        return [schedules.dpm_order(i, number, known=i, **given) for i in range(number)]

    assert orders(6) == [1, 2, 3, 3, 2, 1] and orders(1) == [1] and orders(2) == [1, 1]
    assert orders(15) == [1, 2] + [3] * 13  # long runs keep their order
    assert orders(6, lower_final=False) == [1, 2, 3, 3, 3, 3]
    assert orders(6, lower_final=False, first_order_final=True) == [1, 2, 3, 3, 3, 1]
    assert orders(5, solver_order=2) == [1, 2, 2, 2, 1] and orders(3, solver_order=1) == [1] * 3


def test_lower_orders_at_the_end_can_be_turned_off():
    options = {"solver_order": 2, "final_sigmas_type": "sigma_min"}
    low, high = (run(LMLDPMSolver(lower_order_final=low, **options)) for low in (True, False))
    assert torch.equal(low[-2], high[-2]) and not torch.allclose(low[-1], high[-1], rtol=1e-6)
    final = run(LMLDPMSolver(lower_order_final=False, euler_at_final=True, **options))
    assert torch.equal(final[-1], low[-1])


@pytest.mark.parametrize("module", ["ddim", "dpmsolver", "flow", "schedules"])
def test_examples_in_docstrings(module):
    result = doctest.testmod(importlib.import_module(f"marquardt.samplers.{module}"))
    assert result.attempted and not result.failed
