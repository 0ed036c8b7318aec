"""The schedulers for diffusers: configuration, corrected images, state from step to step, dtypes, imports."""

from __future__ import annotations

import copy
import inspect
import math
import subprocess
import sys

import pytest
import torch

from diffusers_runs import LM, PAIRS, SHAPE, apart, diffusers, every, quiet, sample, start, velocity
from marquardt.integrations.diffusers import (
    LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler,
    LMLFlowMatchEulerScheduler,
)
from marquardt.samplers import LMLDDIM, LMLDPMSolver, LMLFlowEuler

DDIMScheduler = diffusers.DDIMScheduler
DPMSolverMultistepScheduler = diffusers.DPMSolverMultistepScheduler


@pytest.fixture(autouse=True)
def calm():
    with quiet():
        yield


# ---- configuration -----------------------------------------------------------------------------------


@every
def test_the_configuration_of_the_stock_scheduler_is_taken(pair, tmp_path):
    stock, ours = pair
    options = {"num_train_timesteps": 500}
    given = ours.from_config(stock(**options).config, freeze=0.25, **LM)
    assert given.config.num_train_timesteps == 500 and len(given) == 500
    assert {name: given.config[name] for name in ("damping", "kappa", "extrapolation", "freeze")} == {
        "extrapolation": None,
        "freeze": 0.25,
        **LM,
    }
    given.save_pretrained(tmp_path)
    loaded = ours.from_pretrained(tmp_path)
    assert {k: v for k, v in loaded.config.items() if not k.startswith("_")} == {
        k: v for k, v in given.config.items() if not k.startswith("_")
    }
    assert torch.equal(sample(loaded, steps=4), sample(given, steps=4))
    back = stock.from_config(given.config)  # and the way back
    assert type(back) is stock and back.config.num_train_timesteps == 500


def test_another_stock_scheduler_may_be_replaced():
    euler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear"
    )
    ours = LMLDPMSolverMultistepScheduler.from_config(euler.config, **LM)
    assert ours.config.beta_schedule == "scaled_linear" and torch.isfinite(sample(ours)).all()
    assert {type(s) for s in ours.compatibles} == {type(s) for s in DPMSolverMultistepScheduler().compatibles}


@every
def test_what_pipelines_inspect(pair):
    stock, ours = pair
    assert issubclass(ours, stock) and ours.order == stock.order and ours._compatibles == stock._compatibles
    for method in ("set_timesteps", "step"):
        theirs, mine = (list(inspect.signature(getattr(c, method)).parameters) for c in pair)
        assert theirs == mine
    keys = set(inspect.signature(stock.__init__).parameters)
    assert keys < set(inspect.signature(ours.__init__).parameters)
    scheduler = ours()
    scheduler.set_timesteps(4)
    x = start()
    if hasattr(scheduler, "scale_model_input"):
        assert scheduler.scale_model_input(x, scheduler.timesteps[0]) is x
    if hasattr(scheduler, "init_noise_sigma"):
        assert scheduler.init_noise_sigma == 1.0
    t = scheduler.timesteps[0]
    assert len(scheduler.step(velocity(x, t), t, x, return_dict=False)) == (
        2 if "DDIM" in ours.__name__ else 1
    )


@pytest.mark.parametrize("name", ["ddim", "dpm"])
def test_noising_is_the_stock_one(name):
    stock, ours = (kind() for kind in PAIRS[name])
    for scheduler in (stock, ours):
        scheduler.set_timesteps(10)
    x, noise, t = start(), start(seed=2), stock.timesteps[3:5]
    assert torch.equal(stock.add_noise(x, noise, t), ours.add_noise(x, noise, t))


@pytest.mark.errors
@every
def test_bad_numbers(pair):
    name = pair[1].__name__
    with pytest.raises(ValueError, match=f"{name}: damping must come with kappa, got None"):
        pair[1](kappa=0.1)
    with pytest.raises(TypeError, match=f"{name}: kappa must be a number or None, got a tensor"):
        pair[1](damping=1.0, kappa=torch.tensor(0.1))
    with pytest.raises(ValueError, match="third_order must be one of 'published', 'exact'"):
        LMLDPMSolverMultistepScheduler(third_order="taylor")


# ---- with a correction -------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("lm", [LM, {"extrapolation": 0.3}], ids=str)
def test_the_correction_changes_the_image(pair, lm):
    stock, ours = pair
    plain, bent = sample(stock()), sample(ours.from_config(stock().config, **lm))
    assert torch.isfinite(bent).all() and apart(bent, plain) > 1e-3


@pytest.mark.accuracy
@pytest.mark.parametrize(
    "scheduler, sampler",
    [
        (LMLDDIMScheduler(clip_sample=False, **LM), LMLDDIM(clip_sample=False, **LM)),
        (LMLDPMSolverMultistepScheduler(solver_order=3, **LM), LMLDPMSolver(solver_order=3, **LM)),
        (
            LMLDPMSolverMultistepScheduler(solver_order=3, third_order="exact", apply_to="direction", **LM),
            LMLDPMSolver(solver_order=3, third_order="exact", apply_to="direction", **LM),
        ),
        (LMLFlowMatchEulerScheduler(freeze=0.3, **LM), LMLFlowEuler(freeze=0.3, **LM)),
    ],
    ids=["ddim", "dpm", "dpm-exact", "flow"],
)
def test_schedulers_and_samplers_agree(scheduler, sampler):
    """Float32 and float64 tables apart they are one."""
    sampler.set_timesteps(8)
    x = start()
    for t in sampler.timesteps:
        x = sampler.step(velocity(x, t), t, x)
    assert apart(sample(scheduler), x) < 2e-4


def test_x0_is_computed_when_somebody_looks(monkeypatch):
    """It costs a memory pass of its own, and pipelines do not ask for it."""
    scheduler = LMLDDIMScheduler(**LM)
    scheduler.set_timesteps(3)
    x, calls = start(), []
    original = scheduler._lml_original
    monkeypatch.setattr(scheduler, "_lml_original", lambda *a: calls.append(1) or original(*a))
    t = scheduler.timesteps[0]
    output, pair = (scheduler.step(x, t, x, return_dict=kind) for kind in (True, False))
    assert output.prev_sample is output[0] is output["prev_sample"] and torch.equal(pair[0], output[0])
    assert not calls
    before, predicted = pair
    assert torch.equal(predicted, output.pred_original_sample) and torch.equal(predicted, output[1])
    assert (
        torch.equal(predicted, pair[1]) and torch.equal(output.to_tuple()[1], predicted) and len(calls) == 2
    )


# ---- state -------------------------------------------------------------------------------------------


@every
def test_nothing_leaks_into_the_next_call(pair):
    scheduler = pair[1](**LM)
    fresh = sample(scheduler)
    x = torch.full(SHAPE, math.nan)
    scheduler.set_timesteps(8)
    scheduler.step(x, scheduler.timesteps[0], x)
    assert torch.equal(sample(scheduler), fresh)
    assert sample(scheduler, x=start((1, 3, 4, 4))).shape == (1, 3, 4, 4)


@every
def test_nothing_leaks_into_a_start_where_the_last_call_stopped(pair):
    scheduler, x = pair[1](**LM), start()

    def last_steps():
        scheduler.set_timesteps(4)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(1)
        t = scheduler.timesteps[1]
        return scheduler.step(velocity(x, t), t, x).prev_sample

    fresh = last_steps()
    scheduler.set_timesteps(4)
    scheduler.step(start(seed=2), scheduler.timesteps[0], x)
    assert torch.equal(last_steps(), fresh)


def test_of_equal_timesteps_the_second_is_the_start_as_in_diffusers():
    stock = DPMSolverMultistepScheduler(use_karras_sigmas=True)
    ours = LMLDPMSolverMultistepScheduler.from_config(stock.config)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(200)
    values = stock.timesteps.tolist()
    twice = next(i for i in range(199) if values[i] == values[i + 1])
    x = start()
    for t in (stock.timesteps[twice], stock.timesteps[3]):
        for scheduler in (stock, ours):
            scheduler._step_index = None
            scheduler.step(x, scheduler.timesteps[values.index(int(t))], x)
        assert stock.step_index == ours.step_index


@every
@pytest.mark.errors
def test_a_trajectory_keeps_its_shape(pair):
    scheduler = pair[1](**LM)
    scheduler.set_timesteps(4)
    x, t = start(), scheduler.timesteps
    scheduler.step(x, t[0], x)
    with pytest.raises(
        ValueError, match=rf"{pair[1].__name__}.step: sample must keep the shape .*got \[1, 3, 8, 8\]"
    ):
        scheduler.step(x[:1], t[1], x[:1])


def test_ddim_takes_any_timestep_as_a_new_start():
    """The stock scheduler has no state, so users may jump."""
    stock, plain, bent = DDIMScheduler(), LMLDDIMScheduler(), LMLDDIMScheduler(**LM)
    for scheduler in (stock, plain, bent):
        scheduler.set_timesteps(10)
    x = start()
    for t in (500, torch.tensor(123), 700, 600):
        want = stock.step(velocity(x, t), t, x).prev_sample
        assert apart(plain.step(velocity(x, t), t, x).prev_sample, want) < 1e-6
        got = bent.step(velocity(x, t), t, x).prev_sample
        assert (apart(got, want) > 1e-6) == (t == 600)  # only 600 follows its predecessor


@pytest.mark.parametrize("name", ["dpm", "flow"])
def test_image_to_image(name):
    """A trajectory that starts in the middle, found by its timestep or told by set_begin_index."""
    stock, ours = PAIRS[name][0](), PAIRS[name][1]()
    images = []
    for scheduler, told in ((stock, True), (ours, True), (ours, False)):
        scheduler.set_timesteps(10)
        x, late = start(), scheduler.timesteps[4:]
        if told:
            scheduler.set_begin_index(4)
        for t in late:
            x = scheduler.step(velocity(x, t), t, x).prev_sample
        assert scheduler.step_index == 10
        images.append(x)
    assert apart(images[1], images[0]) < 1e-5 and torch.equal(images[1], images[2])


@every
def test_state_travels_in_the_dictionary(pair):
    """Pipelines that denoise several views at once copy `__dict__` to and fro."""
    scheduler, views = pair[1](**LM), [start(seed=1), start(seed=2)]
    want = [sample(scheduler, x=x, steps=5) for x in views]
    scheduler.set_timesteps(5)
    states = [copy.deepcopy(scheduler.__dict__) for _ in views]
    for i in range(5):
        for k in range(2):
            scheduler.__dict__.update(states[k])
            t = scheduler.timesteps[i]
            views[k] = scheduler.step(velocity(views[k], t), t, views[k]).prev_sample
            states[k] = copy.deepcopy(scheduler.__dict__)
    assert all(map(torch.equal, views, want))


@every
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_dtypes(pair, dtypes):
    """Results have the stock scheduler's dtype, and lie as near the float32 image as it does."""
    exact = sample(pair[0]())
    results = []
    for kind in pair:
        scheduler = kind()
        scheduler.set_timesteps(8)
        x = start(dtype=dtypes[0])
        for t in scheduler.timesteps:
            x = scheduler.step(velocity(x.float(), t).to(dtypes[1]), t, x).prev_sample
        results.append(x)
    assert results[0].dtype == results[1].dtype
    assert apart(results[1], exact) < max(2 * apart(results[0], exact), 0.02)


@pytest.mark.errors
def test_the_end_of_a_trajectory():
    for name in ("dpm", "flow"):
        scheduler = PAIRS[name][1]()
        x = sample(scheduler, steps=3)
        with pytest.raises(ValueError, match="timestep must be one of 3 of a trajectory"):
            scheduler.step(x, scheduler.timesteps[-1], x)
    flow = LMLFlowMatchEulerScheduler()
    flow.set_timesteps(3)
    with pytest.raises(ValueError, match="timestep must be one of timesteps, not an index, got 0"):
        flow.step(x, 0, x)
    with pytest.raises(
        ValueError, match="LMLDDIMScheduler.step: timesteps must be made by set_timesteps first"
    ):
        LMLDDIMScheduler().step(x, 0, x)


# ---- imports -----------------------------------------------------------------------------------------


def test_marquardt_does_not_import_diffusers():
    program = "import sys, marquardt, marquardt.samplers; assert 'diffusers' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_diffusers_the_import_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    for name in [name for name in sys.modules if name.startswith("marquardt.integrations")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ImportError, match="pip install diffusers"):
        import marquardt.integrations.diffusers  # noqa: F401
