"""The schedulers for diffusers without a correction: the steps and images of the real ones, in real pipelines."""

from __future__ import annotations

import itertools

import pytest
import torch

from diffusers_runs import LM, PAIRS, apart, diffusers, follow, quiet, sample, start, velocity
from marquardt.integrations.diffusers import (
    LMLDDIMScheduler,
    LMLDPMSolverMultistepScheduler,
    LMLFlowMatchEulerScheduler,
)

DDIMScheduler = diffusers.DDIMScheduler
DPMSolverMultistepScheduler = diffusers.DPMSolverMultistepScheduler
FlowMatchEulerDiscreteScheduler = diffusers.FlowMatchEulerDiscreteScheduler


@pytest.fixture(autouse=True)
def calm():
    with quiet():
        yield


@pytest.fixture(scope="module")
def unet():
    """A tiny network with random weights; one thread, since threads that wait for each other make it a hundred
    times slower on a busy machine.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield diffusers.UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    ).eval()
    torch.set_num_threads(threads)


# ---- without a correction: the stock scheduler -------------------------------------------------------


@pytest.mark.accuracy
@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(
    "bounds",
    [{"clip_sample": False}, {"clip_sample_range": 0.7}, {"thresholding": True, "sample_max_value": 2.0}],
    ids=["free", "clamped", "thresholded"],
)
def test_ddim_steps(kind, bounds):
    stock = DDIMScheduler(prediction_type=kind, timestep_spacing="trailing", **bounds)
    ours = LMLDDIMScheduler.from_config(stock.config)
    for eta, again in itertools.product((0.0, 0.7), (False, True)):
        follow(stock, ours, eta=eta, use_clipped_model_output=again)


DPM = [
    (algorithm, order, solver)
    for algorithm in ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
    for order, solver in ((1, "midpoint"), (2, "midpoint"), (2, "heun"), (3, "midpoint"))
    if (algorithm, order) != ("sde-dpmsolver", 3)
]


@pytest.mark.accuracy
@pytest.mark.parametrize("algorithm, order, solver", DPM)
def test_dpm_steps(algorithm, order, solver):
    final = "zero" if algorithm.endswith("++") else "sigma_min"
    spreads = ({}, {"use_karras_sigmas": True}, {"use_lu_lambdas": True}, {"euler_at_final": True})
    for kind, spread in itertools.product(("epsilon", "sample", "v_prediction"), spreads):
        stock = DPMSolverMultistepScheduler(
            algorithm_type=algorithm,
            solver_order=order,
            solver_type=solver,
            prediction_type=kind,
            final_sigmas_type=final,
            beta_schedule="scaled_linear",
            **spread,
        )
        ours = LMLDPMSolverMultistepScheduler.from_config(stock.config)
        for steps in (8, 16):
            if steps == 8 or not (spread and final == "sigma_min"):  # there the stock's last step is 0/0
                follow(stock, ours, steps=steps)


@pytest.mark.accuracy
def test_dpm_ends_with_euler():
    """Beside a final level above 0, where the flag decides alone."""
    stock = DPMSolverMultistepScheduler(euler_at_final=True, final_sigmas_type="sigma_min", solver_order=3)
    follow(stock, LMLDPMSolverMultistepScheduler.from_config(stock.config), steps=16)


@pytest.mark.accuracy
@pytest.mark.parametrize("algorithm", ["dpmsolver", "dpmsolver++"])
def test_dpm_thresholding(algorithm):
    stock = DPMSolverMultistepScheduler(
        algorithm_type=algorithm, thresholding=True, sample_max_value=2.0, final_sigmas_type="sigma_min"
    )
    follow(stock, LMLDPMSolverMultistepScheduler.from_config(stock.config))


@pytest.mark.accuracy
def test_dpm_on_flow_levels():
    stock = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0
    )
    follow(stock, LMLDPMSolverMultistepScheduler.from_config(stock.config))


def test_dpm_learned_variance():
    stock = DPMSolverMultistepScheduler(variance_type="learned")
    ours = LMLDPMSolverMultistepScheduler.from_config(stock.config)
    follow(stock, ours, network=lambda x, t: torch.cat([velocity(x, t), x], 1))


@pytest.mark.accuracy
@pytest.mark.parametrize(
    "options, setting",
    [
        ({"shift": 3.0}, {}),
        ({"use_dynamic_shifting": True}, {"mu": 0.8}),
        ({"stochastic_sampling": True}, {}),
        ({"invert_sigmas": True}, {}),
        ({"use_karras_sigmas": True}, {}),
    ],
    ids=str,
)
def test_flow_steps(options, setting):
    stock = FlowMatchEulerDiscreteScheduler(**options)
    follow(stock, LMLFlowMatchEulerScheduler.from_config(stock.config), setting=setting)


def test_flow_steps_per_token():
    stock = FlowMatchEulerDiscreteScheduler()
    ours = LMLFlowMatchEulerScheduler.from_config(stock.config)
    x, tokens = start((2, 5, 4)), torch.tensor([[900.0, 700.0, 500.0, 300.0, 100.0]] * 2)
    for scheduler in (stock, ours):
        scheduler.set_timesteps(6)
    for t in stock.timesteps[:2]:
        want, got = (s.step(velocity(x, t), t, x, per_token_timesteps=tokens)[0] for s in (stock, ours))
        assert torch.equal(want, got) and ours.step_index == stock.step_index
    bent = LMLFlowMatchEulerScheduler.from_config(stock.config, **LM)
    bent.set_timesteps(6)
    first, second = (
        bent.step(velocity(x, t), t, x, per_token_timesteps=tokens)[0] for t in bent.timesteps[:2]
    )
    assert torch.isfinite(first).all() and not torch.allclose(second, want)


# ---- real networks and pipelines ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "pair, options, step",
    [
        ("ddim", {}, {}),
        ("ddim", {"clip_sample": False}, {"eta": 1.0}),
        ("dpm", {"solver_order": 2}, {}),
        ("dpm", {"solver_order": 3}, {}),
        ("dpm", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, {}),
        ("dpm", {"algorithm_type": "sde-dpmsolver++"}, {}),
    ],
    ids=str,
)
def test_images_of_a_unet(unet, pair, options, step):
    """The whole trajectory through a network, with equal random numbers."""
    stock = PAIRS[pair][0](**options)
    ours = PAIRS[pair][1].from_config(stock.config)
    images = [
        sample(s, lambda x, t: unet(x, t).sample, generator=torch.Generator().manual_seed(3), **step)
        for s in (stock, ours)
    ]
    assert apart(images[1], images[0]) < 1e-4  # rounding, carried through eight networks


@pytest.mark.parametrize("eta", [0.0, 0.5])
def test_ddim_pipeline(unet, eta):
    pipe = diffusers.DDIMPipeline(unet, DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)

    def images():
        return torch.from_numpy(
            pipe(2, torch.Generator().manual_seed(4), eta, 6, output_type="np", return_dict=False)[0]
        )

    stock = images()
    pipe.scheduler = LMLDDIMScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(images(), stock, rtol=0, atol=2e-5)
    pipe.scheduler = LMLDDIMScheduler.from_config(pipe.scheduler.config, **LM)
    first, second = images(), images()
    assert torch.equal(first, second)  # nothing of the first run is left
    assert torch.isfinite(first).all() and not torch.allclose(first, stock, atol=1e-3)


def test_a_saved_pipeline_names_a_class_that_can_be_imported(unet, tmp_path):
    pipe = diffusers.DDPMPipeline(unet, LMLDDIMScheduler(**LM))
    pipe.save_pretrained(tmp_path)
    loaded = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert type(loaded.scheduler) is LMLDDIMScheduler
    assert loaded.scheduler.config.kappa == LM["kappa"]
