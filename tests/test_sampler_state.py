"""What a trajectory keeps and forgets, the order of its steps, noising, and arguments that are refused."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from marquardt.samplers import LMLDDIM, LMLDPMSolver, LMLFlowEuler, base, schedules
from sampler_runs import LM, SHAPE, every, network, normal, run

# ---- noising ---------------------------------------------------------------------------------------


def test_add_noise():
    clean, noise = normal("clean"), normal("noise")
    for sampler in (LMLDDIM(), LMLDPMSolver()):
        alpha = sampler.alphas_cumprod[300]
        want = alpha**0.5 * clean + (1 - alpha) ** 0.5 * noise
        for t in (300, torch.tensor([300]), torch.tensor([300, 300])):
            torch.testing.assert_close(sampler.add_noise(clean, noise, t), want, rtol=1e-12, atol=1e-12)
    for t in (250.0, torch.tensor([250.0])):
        got = LMLFlowEuler().add_noise(clean, noise, t)
        torch.testing.assert_close(got, 0.75 * clean + 0.25 * noise, rtol=1e-12, atol=1e-12)


def test_add_noise_with_spread_levels():
    sampler = LMLDPMSolver(use_exponential_sigmas=True)
    sampler.set_timesteps(8)
    clean, noise = normal("clean"), normal("noise")
    alpha, sigma = schedules.vp_scales(sampler.sigmas[3].item())
    for t in (int(sampler.timesteps[3]), sampler.timesteps[3:4].repeat(2)):
        got = sampler.add_noise(clean, noise, t)
        torch.testing.assert_close(got, alpha * clean + sigma * noise, rtol=1e-12, atol=1e-12)


# ---- state -----------------------------------------------------------------------------------------


@every
def test_nothing_leaks_into_the_next_trajectory(make):
    sampler = make(**LM)
    fresh = run(sampler)
    assert all(map(torch.equal, run(sampler), fresh))
    sampler.set_timesteps(6)
    poison = torch.full(SHAPE, math.nan, dtype=torch.float64)
    sampler.step(poison, None, normal("x"))
    assert all(map(torch.equal, run(sampler), fresh))  # set_timesteps forgets
    sampler.reset()
    x, t = normal("x"), sampler.timesteps[0]
    assert torch.equal(sampler.step(network(x, t), t, x), fresh[0])


@every
def test_reset_keeps_the_schedule_and_allows_another_shape(make):
    sampler = make(**LM)
    run(sampler, steps=3)
    sampler.reset()
    assert sampler.step_index is None and sampler.num_inference_steps == 3
    small = normal("x", shape=(1, 5), dtype=torch.float32)
    assert sampler.step(small, None, small).shape == (1, 5)


@every
@pytest.mark.errors
@pytest.mark.parametrize("lm", [{}, LM], ids=["plain", "lm"])
def test_a_trajectory_keeps_its_samples(make, lm):
    sampler = make(**lm)
    sampler.set_timesteps(4)
    x = normal("x")
    sampler.step(x, None, x)
    name = type(sampler).__name__
    wrong = {
        r"shape of its trajectory \(\[2, 3, 4, 4\].*got \[1, 3, 4, 4\]": x[:1],
        "dtype of its trajectory .float64.*got float32": x.float(),
        "device of its trajectory .cpu.*got meta": x.to("meta"),
    }
    for message, other in wrong.items():
        with pytest.raises(ValueError, match=f"{name}.step: sample must keep the {message}"):
            sampler.step(other, None, other)
    assert sampler.step_index == 1  # the refused steps do not count
    sampler.step(x, None, x)


@every
@pytest.mark.errors
def test_steps_come_in_order(make):
    sampler = make()
    x = normal("x")
    name = type(sampler).__name__
    with pytest.raises(ValueError, match=f"{name}.step: timesteps must be made by set_timesteps"):
        sampler.step(x, 1, x)
    sampler.set_timesteps(4)
    t = sampler.timesteps
    sampler.step(x, t[0], x)
    for wrong in (t[0], t[2], t[2].clone(), t[2].item()):
        with pytest.raises(
            ValueError, match=rf"{name}.step: timestep must be the next .*got {t[2].item()}|got"
        ):
            sampler.step(x, wrong, x)
    with pytest.raises(ValueError, match="timestep must be one of timesteps"):
        sampler.step(x, 12345, x)
    with pytest.raises(ValueError, match="timestep must be one number"):
        sampler.step(x, t[:2], x)
    for right in (t[1], t[2].clone(), t[3].item()):
        sampler.step(x, right, x)
    with pytest.raises(ValueError, match=r"not over \(4 steps done"):
        sampler.step(x, None, x)


@every
def test_a_trajectory_may_start_anywhere(make):
    sampler = make(**LM)
    sampler.set_timesteps(6)
    x, late = normal("x"), sampler.timesteps[3:]
    states = {}
    for first in ("element", "number", "copy", "index"):
        sampler.reset()
        y = x
        for i, t in enumerate(late):
            given = {"element": t, "number": t.item(), "copy": t.clone(), "index": None}[first]
            if first == "index" and i == 0:
                sampler.set_begin_index(3)
            y = sampler.step(network(y, t), given, y)
        states[first] = y
        sampler.set_timesteps(6)
        late = sampler.timesteps[3:]
    assert all(torch.equal(y, states["element"]) for y in states.values())
    with pytest.raises(ValueError, match="begin_index must be an index of timesteps"):
        sampler.set_begin_index(6)


def test_equal_timesteps_are_told_apart():
    sampler = LMLDPMSolver(use_karras_sigmas=True)
    sampler.set_timesteps(200)
    values = sampler.timesteps.tolist()
    twice = next(i for i in range(199) if values[i] == values[i + 1])
    x = normal("x")
    sampler.step(x, sampler.timesteps[twice + 1], x)
    assert sampler.step_index == twice + 2


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
            torch.ops.aten.equal,
        ), func
        return func(*args, **(kwargs or {}))


@every
def test_a_step_reads_no_tensor_on_the_host(make):
    sampler = make(**LM)
    sampler.set_timesteps(4)
    x = normal("x")
    with NoWaiting():
        for t in sampler.timesteps:  # elements, known by their address
            x = sampler.step(0.5 * x, t, x)


@every
def test_a_timestep_on_another_device_is_not_read(make):
    """A meta tensor has no value at all."""
    sampler = make()
    sampler.set_timesteps(3)
    x = normal("x")
    sampler.step(x, sampler.timesteps[0], x)
    sampler.step(x, torch.empty((), device="meta"), x)
    assert sampler.step_index == 2


def test_an_element_is_found_by_its_address():
    t = torch.arange(10)
    assert [base.place(t, t[i]) for i in (0, 4, 9)] == [0, 4, 9]
    assert base.place(t, t[3].clone()) is None and base.place(t, t[3].float()) is None
    assert (
        base.place(t[4:], t[6]) == 2 and base.place(t[4:], t[3]) is None and base.place(t[:0], t[0]) is None
    )


# ---- arguments -------------------------------------------------------------------------------------


@pytest.mark.errors
@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LMLDDIM(kappa=0.1), "LMLDDIM: damping must come with kappa, got None"),
        (lambda: LMLDDIM(damping=-1.0), "LMLDDIM: damping must be finite and >= 0, got -1.0"),
        (lambda: LMLDDIM(damping=1, kappa=math.nan), "LMLDDIM: kappa must be finite"),
        (
            lambda: LMLFlowEuler(extrapolation=0.1, kappa=0.1),
            "extrapolation must come without damping and kappa",
        ),
        (lambda: LMLDDIM(freeze=1.5), "freeze must lie between 0 and 1, got 1.5"),
        (
            lambda: LMLDDIM(beta_schedule="sigmoid"),
            "beta_schedule must be one of .*'scaled_linear'.*got 'sigmoid'",
        ),
        (
            lambda: LMLDDIM(trained_betas=[0.1]),
            r"trained_betas must hold num_train_timesteps \(1000\) numbers, got 1",
        ),
        (lambda: LMLDDIM(prediction_type="x"), "prediction_type must be one of"),
        (lambda: LMLDPMSolver(solver_order=4), "solver_order must be one of 1, 2, 3, got 4"),
        (
            lambda: LMLDPMSolver(solver_order=3, algorithm_type="sde-dpmsolver"),
            "solver_order must be 1 or 2 with",
        ),
        (
            lambda: LMLDPMSolver(algorithm_type="dpmsolver", final_sigmas_type="zero"),
            "final_sigmas_type must be one of 'sigma_min', got 'zero'",
        ),
        (lambda: LMLDPMSolver(apply_to="noise"), "apply_to must be one of 'increment', 'direction'"),
        (
            lambda: LMLDDIM().set_timesteps(0),
            "LMLDDIM.set_timesteps: num_inference_steps must be an int >= 1, got 0",
        ),
        (lambda: LMLDDIM().set_timesteps(2000), r"at most num_train_timesteps \(1000\), got 2000"),
        (lambda: LMLDDIM(steps_offset=1).set_timesteps(1000), "steps_offset must leave all timesteps below"),
        (lambda: LMLDPMSolver().set_timesteps(), "num_inference_steps must be given, or else timesteps"),
        (lambda: LMLDPMSolver().set_timesteps(timesteps=[1, 2]), "timesteps must descend"),
        (lambda: LMLDPMSolver().set_timesteps(timesteps=[1000]), "timesteps must lie between 0 and"),
        (
            lambda: LMLFlowEuler().set_timesteps(3, sigmas=[1.0]),
            "num_inference_steps must be the number of sigmas",
        ),
        (lambda: LMLFlowEuler().timesteps, "LMLFlowEuler.timesteps: timesteps must be made by set_timesteps"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.errors
def test_wrong_types():
    with pytest.raises(TypeError, match="LMLDDIM: damping must be a number or a tensor, got str"):
        LMLDDIM(damping="1")
    sampler = LMLDDIM()
    sampler.set_timesteps(2)
    with pytest.raises(TypeError, match="LMLDDIM.step: sample must be a tensor, got list"):
        sampler.step(normal("x"), None, [1.0])


@every
def test_what_a_pipeline_asks(make):
    sampler = make()
    sampler.set_timesteps(5)
    x = normal("x")
    assert sampler.scale_model_input(x, 3) is x and sampler.init_noise_sigma == 1.0 and sampler.order == 1
    assert len(sampler) == 1000 and len(sampler.timesteps) == 5 and len(sampler.sigmas) == 6
    assert sampler.step_index is None


def test_given_timesteps():
    sampler, same = LMLDPMSolver(), LMLDPMSolver()
    sampler.set_timesteps(4)
    same.set_timesteps(timesteps=[999, 749, 500, 250])
    assert torch.equal(sampler.timesteps, same.timesteps) and torch.equal(sampler.sigmas, same.sigmas)


def test_zero_terminal_snr_starts_from_noise_alone():
    for make in (LMLDDIM, LMLDPMSolver):
        sampler = make(
            rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing"
        )
        assert all(torch.isfinite(x).all() for x in run(sampler, steps=4))
