"""Refusals of the step functions: the exception, the words of its message (op, argument, value), nothing written."""

from __future__ import annotations

import math

import pytest
import torch

import marquardt as mq
from harness import Target, same_bits
from step_calls import bf16, f16, f32, f64

pytestmark = pytest.mark.errors
SHAPE = (4, 3, 6)
NAN = math.nan


def good(dtype=f32, shape=SHAPE, seed=0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# The arguments of a right call, by function: positional ones by name first, then keywords.
TABLE = {"lambdas": [1.0, 0.5, 0.1], "alphas": [0.9, 0.8, 0.7], "sigmas": [0.4, 0.6, 0.7]}
RIGHT: dict[str, tuple[dict, dict]] = {
    "lml_ddim_step": (
        {"sample": good(), "model_output": good(), "prev_eps": good()},
        {"alpha_bar": 0.5, "alpha_bar_next": 0.7, "damping": 0.1, "kappa": 0.2},
    ),
    "lml_dpm_step": (
        {"sample": good(), "outputs": [good(), good()], "prev_increment": good()},
        {**TABLE, "order": 2, "damping": 0.1, "kappa": 0.2},
    ),
    "lml_flow_step": (
        {"sample": good(), "velocity": good(), "prev_velocity": good()},
        {"dt": -0.1, "damping": 0.1, "kappa": 0.2},
    ),
    "langevin_step": ({"x": good(), "score": good()}, {"step": 0.1}),
    "underdamped_langevin_step": (
        {"x": good(), "v": good(), "score": good()}, {"step": 0.1, "friction": 1.0}
    ),
}  # fmt: skip
LML = tuple(RIGHT)[:3]
STATE = {name: next(iter(args)) for name, (args, _) in RIGHT.items()}
MODEL = dict(zip(RIGHT, ("model_output", "outputs", "velocity", "score", "score"), strict=True))


def every_tensor(thing) -> list[torch.Tensor]:
    if isinstance(thing, torch.Tensor):
        return [thing]
    things = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    return [t for part in things for t in every_tensor(part)]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) if a.element_size() == 1 else same_bits(a, b)


def shown(thing) -> str:
    if isinstance(thing, torch.Tensor):
        return (
            f"{str(thing.dtype).removeprefix('torch.')}{list(thing.shape)}"
            if thing.dim()
            else f"0-dim {thing}"
        )
    if isinstance(thing, (list, tuple)):
        return "(" + " ".join(map(shown, thing)) + ")"
    if isinstance(thing, torch.Generator):  # whose text holds an address: ids are the same in every process
        return "generator"
    return "none" if thing is ... else str(thing)


def refused(target: Target, function: str, changes: dict, error, words=()) -> None:
    """A right call with some arguments replaced (a value `...` leaves one out) must raise."""
    args, keywords = ({k: changes.get(k, v) for k, v in part.items()} for part in RIGHT[function])
    keywords.update({k: v for k, v in changes.items() if k not in args})
    keywords = {k: v for k, v in keywords.items() if v is not ...}
    dense = [
        t for t in every_tensor([args, keywords]) if t.layout == torch.strided and t.device.type != "meta"
    ]
    before = [t.detach().clone() for t in dense]
    with target(), pytest.raises(error) as raised:
        getattr(mq, function)(*args.values(), **keywords)
    message = str(raised.value)
    names = () if "lowrank_solve" in words else (function,)  # the part of a step that a user calls himself
    for word in (*names, *words):
        assert str(word) in message, f"{word!r} is missing in: {message}"
    assert len(message) < 1500, "a C++ backtrace is in the message"
    assert all(same(t, b) for t, b in zip(dense, before, strict=True))


def test_right_calls_are_taken(target: Target):
    for function, (args, keywords) in RIGHT.items():
        with target():
            getattr(mq, function)(*args.values(), **keywords)


def rows_of(table: dict) -> list:
    """(function, changes, exception, words), flat, with an id each."""
    made = []
    for functions, entries in table.items():
        for function in functions.split():
            for changes, error, words in entries:
                name = "-".join((function, *(f"{k}={shown(v)}" for k, v in changes.items())))
                made.append(pytest.param(function, changes, error, words, id=name))
    return made


V, T = ValueError, TypeError
uncond = good(seed=1)
_LML = "lml_ddim_step lml_dpm_step lml_flow_step"
_ALL = " ".join(RIGHT)
REFUSALS = {
    _LML: [
        ({"damping": -1.0}, V, ("damping", "-1")),
        ({"damping": math.inf}, V, ("damping", "inf")),
        ({"damping": torch.tensor(-2.0)}, V, ("damping", "-2")),
        ({"damping": torch.tensor([1.0, -3.0, 1.0, 1.0])}, V, ("damping", "-3")),
        ({"kappa": NAN}, V, ("kappa", "nan")),
        ({"extrapolation": 0.3}, V, ("extrapolation", "damping")),
        ({"extrapolation": 0.3, "damping": ...}, V, ("extrapolation", "kappa")),
        ({"extrapolation": NAN, "damping": ..., "kappa": ...}, V, ("extrapolation", "nan")),
        ({"damping": ...}, V, ("damping",)),
        ({"damping": "text"}, T, ("damping", "str")),
        ({"kappa": torch.ones(3)}, V, ("kappa", "[3]")),
        ({"kappa": torch.ones(4), "batch_dims": 0}, V, ("kappa", "[4]")),
        ({"doubled": True, "batch_dims": 0}, V, ("doubled", "batch_dims")),
    ],
    "lml_ddim_step lml_flow_step": [
        ({"guidance": uncond}, T, ("guidance",)),
        ({"guidance": 2.0}, T, ("guidance", "float")),
        ({"guidance": (uncond,)}, (T, V), ("guidance",)),
        ({"guidance": (uncond, 2.0, 3.0)}, (T, V), ("guidance",)),
        ({"guidance": (2.0, uncond)}, T, ("guidance",)),
        ({"guidance": (uncond, "text")}, T, ("guidance", "str")),
        ({"guidance": (uncond, torch.ones(3))}, V, ("guidance", "[3]")),
        ({"guidance": (good(shape=(4, 3, 5)), 2.0)}, V, ("guidance", "[4, 3, 5]")),
        ({"guidance": (good(f64), 2.0)}, T, ("guidance", "float64")),
        ({"active": torch.ones(3, dtype=torch.bool)}, V, ("active", "[3]")),
        ({"active": torch.ones(4, 1, dtype=torch.bool)}, V, ("active", "[4, 1]")),
        ({"active": torch.ones(4)}, T, ("active", "float32")),
        ({"active": torch.ones(4, dtype=torch.int64)}, T, ("active", "int64")),
        ({"active": [True, True, False, False]}, T, ("active", "list")),
    ],
    "lml_ddim_step": [
        ({"alpha_bar": 1.5}, V, ("alpha_bar", "1.5")),
        ({"alpha_bar": -0.1}, V, ("alpha_bar", "-0.1")),
        ({"alpha_bar": NAN}, V, ("alpha_bar", "nan")),
        ({"alpha_bar_next": 1.25}, V, ("alpha_bar_next", "1.25")),
        ({"alpha_bar_next": torch.tensor(-0.5)}, V, ("alpha_bar_next", "-0.5")),
        ({"alpha_bar": torch.tensor([0.5, 0.5, 1.75, 0.5])}, V, ("alpha_bar", "1.75")),
        ({"alpha_bar": torch.ones(5)}, V, ("alpha_bar", "[5]")),
        ({"alpha_bar": "text"}, T, ("alpha_bar", "str")),
        ({"alpha_bar": True}, T, ("alpha_bar", "bool")),
        ({"prediction_type": "eps"}, V, ("prediction_type", "eps", "epsilon", "sample", "v_prediction")),
        ({"prediction_type": None}, V, ("prediction_type", "None")),
        ({"eta": -0.5}, V, ("eta", "-0.5")),
        ({"eta": NAN}, V, ("eta", "nan")),
        ({"prev_eps": good(shape=(4, 3, 5))}, V, ("prev_eps", "[4, 3, 5]", "[4, 3, 6]")),
        ({"model_output": good(bf16), "prev_eps": good(f16)}, T, ("prev_eps", "float16", "bfloat16")),
        ({"eta": 1.0, "noise": good(shape=(4, 3, 5))}, V, ("noise", "[4, 3, 5]")),
        ({"eta": 1.0, "noise": torch.ones(SHAPE, dtype=torch.int64)}, T, ("noise", "int64")),
        ({"eta": 1.0, "noise": good(), "seed": 1}, V, ("noise", "seed")),
        ({"eta": 1.0, "noise": good(), "generator": torch.Generator()}, V, ("noise", "generator")),
    ],
    "lml_ddim_step lml_dpm_step": [
        ({"clip": 1.0, "threshold": (0.9, 1.0), "prediction_type": "epsilon"}, V, ("clip", "threshold")),
        ({"clip": -1.0, "prediction_type": "epsilon"}, V, ("clip", "-1.0")),
        ({"clip": NAN, "prediction_type": "epsilon"}, V, ("clip", "nan")),
        ({"threshold": 0.9, "prediction_type": "epsilon"}, T, ("threshold", "float")),
        ({"threshold": (0.9,), "prediction_type": "epsilon"}, (T, V), ("threshold",)),
        ({"threshold": (1.5, 2.0), "prediction_type": "epsilon"}, V, ("threshold", "1.5")),
        ({"threshold": (0.9, 0.5), "prediction_type": "epsilon"}, V, ("threshold", "0.5")),
    ],
    "lml_dpm_step": [
        ({"order": 0}, V, ("order", "0")),
        ({"order": 4}, V, ("order", "4")),
        ({"order": 1.5}, (T, V), ("order", "1.5")),
        ({"order": "2"}, (T, V), ("order",)),
        ({"outputs": [good()]}, V, ("outputs", "2", "1")),
        ({"outputs": []}, V, ("outputs", "0")),
        ({"outputs": good()}, V, ("outputs", "2")),
        ({"outputs": [good(), 3.0]}, T, ("outputs[1]", "float")),
        ({"outputs": [good(bf16), good(f16)]}, T, ("outputs[1]", "bfloat16", "float16")),
        ({"outputs": [good(), good(shape=(4, 3, 5))]}, V, ("outputs[1]", "[4, 3, 5]", "[4, 3, 6]")),
        ({"lambdas": [1.0, 0.5]}, V, ("lambdas", "3", "2")),
        ({"alphas": [1.0]}, V, ("alphas", "3", "1")),
        ({"sigmas": []}, V, ("sigmas", "3", "0")),
        ({"sigmas": torch.ones(2)}, V, ("sigmas", "3", "2")),
        ({"lambdas": 0.5}, T, ("lambdas", "float")),
        ({"lambdas": [1.0, "text", 0.1]}, T, ("lambdas", "str")),
        ({"lambdas": [1.0, torch.ones(3), 0.1]}, V, ("lambdas", "[3]")),
        ({"algorithm": "dpm"}, V, ("algorithm", "dpm", "dpmsolver++", "sde-dpmsolver")),
        ({"solver_type": "euler"}, V, ("solver_type", "euler", "midpoint", "heun")),
        ({"third_order": "best"}, V, ("third_order", "best", "published", "exact")),
        ({"apply_to": "eps"}, V, ("apply_to", "eps", "increment", "direction")),
        ({"prediction_type": "x0"}, V, ("prediction_type", "x0", "epsilon")),
        ({"guidance": (uncond, 2.0)}, V, ("guidance", "prediction_type")),
        (
            {
                "algorithm": "sde-dpmsolver", "order": 3, "outputs": [good()] * 3,
                **{k: [*v, 0.05] for k, v in TABLE.items()},
            }, V, ("order", "3", "sde-dpmsolver"),
        ),
        ({"prev_increment": good(bf16)}, T, ("prev_increment", "bfloat16", "float32")),
        ({"prev_increment": good(shape=(4, 18))}, V, ("prev_increment", "[4, 18]", "[4, 3, 6]")),
        ({"algorithm": "sde-dpmsolver++", "noise": good(), "seed": 1}, V, ("noise", "seed")),
    ],
    "lml_flow_step": [
        ({"dt": ...}, V, ("dt", "sigma")),
        ({"dt": ..., "sigma": 0.5}, V, ("sigma_next",)),
        ({"dt": ..., "sigma_next": 0.5}, V, ("sigma",)),
        ({"sigma": 0.5, "sigma_next": 0.4}, V, ("dt", "sigma")),
        ({"stochastic": True}, V, ("stochastic", "sigma")),
        ({"dt": "text"}, T, ("dt", "str")),
        ({"prev_velocity": good(shape=(4, 3, 5))}, V, ("prev_velocity", "[4, 3, 5]", "[4, 3, 6]")),
        ({"velocity": good(bf16), "prev_velocity": good(f16)}, T, ("prev_velocity", "float16", "bfloat16")),
        (
            {"dt": ..., "sigma": 0.5, "sigma_next": 0.4, "stochastic": True, "noise": good(), "seed": 1}, V,
            ("noise", "seed"),
        ),
    ],
    "langevin_step": [
        ({"snr": 0.1}, V, ("step", "snr")),
        ({"step": ...}, V, ("step", "snr")),
        ({"step": ..., "snr": -0.1}, V, ("snr", "-0.1")),
        ({"step": ..., "snr": 0.1, "hessian": (good(shape=(2, 3, 6)), None, 1.0)}, V, ("snr", "hessian")),
        ({"hessian": good()}, T, ("hessian",)),
        ({"hessian": (good(shape=(2, 3, 6)), None)}, (T, V), ("hessian",)),
        ({"hessian": (good(shape=(2, 3, 5)), None, 1.0)}, V, ("lowrank_solve", "[2, 3, 5]")),
        ({"hessian": (good(shape=(2, 3, 6)), None, -1.0)}, V, ("lowrank_solve", "damping", "-1.0")),
    ],
    "underdamped_langevin_step": [
        ({"scheme": "verlet"}, V, ("scheme", "verlet", "baoab", "obabo", "euler")),
        ({"friction": -1.0}, V, ("friction", "-1.0")),
        ({"friction": torch.ones(3)}, V, ("friction", "[3]")),
        ({"v": good(shape=(4, 3, 5))}, V, ("v", "[4, 3, 5]", "[4, 3, 6]")),
        ({"v": good(bf16)}, T, ("v", "bfloat16", "float32")),
    ],
    "langevin_step underdamped_langevin_step": [
        ({"step": -0.5}, V, ("step", "-0.5")),
        ({"step": NAN}, V, ("step", "nan")),
        ({"step": torch.tensor([0.1, -0.25, 0.1, 0.1])}, V, ("step", "-0.25")),
        ({"step": torch.ones(3)}, V, ("step", "[3]")),
        ({"temperature": -2.0}, V, ("temperature", "-2.0")),
        ({"temperature": "text"}, T, ("temperature", "str")),
        ({"noise": good(shape=(4, 3, 5))}, V, ("noise", "[4, 3, 5]")),
        ({"noise": good(), "seed": 1}, V, ("noise", "seed")),
        ({"seed": 1, "generator": torch.Generator()}, V, ("seed", "generator")),
        ({"seed": 1.5}, T, ("seed", "float")),
        ({"generator": [torch.Generator()] * 3}, V, ("generator", "3")),
    ],
    _ALL: [({"batch_dims": 2}, V, ("batch_dims", "2")), ({"batch_dims": -1}, V, ("batch_dims", "-1"))],
}  # fmt: skip


@pytest.mark.parametrize(("function", "changes", "error", "words"), rows_of(REFUSALS))
def test_refused(target: Target, function: str, changes: dict, error, words):
    refused(target, function, changes, error, words)


@pytest.mark.parametrize("function", RIGHT)
class TestTensors:
    def test_state(self, target: Target, function: str):
        """The first tensor: no tensor, another kind of number, sparse, without a batch."""
        name = STATE[function]
        for thing in (3.0, [1.0], None, "text"):
            refused(target, function, {name: thing}, TypeError, (name, type(thing).__name__))
        for dtype in (torch.int64, torch.bool, torch.complex64):
            words = (name, str(dtype).removeprefix("torch."))
            refused(target, function, {name: torch.ones(SHAPE).to(dtype)}, TypeError, words)
        refused(target, function, {name: good().to_sparse()}, TypeError, (name, "sparse"))
        refused(target, function, {name: torch.tensor(1.0)}, ValueError)

    def test_model_output(self, target: Target, function: str):
        """What the network gave: shape, dtype, device."""
        name = MODEL[function]

        def changed(thing):
            return {name: [thing, good()] if name == "outputs" else thing}

        called = "outputs[0]" if name == "outputs" else name
        for thing in (3.0, "text"):
            refused(target, function, changed(thing), TypeError, (called, type(thing).__name__))
        for shape in ((4, 3, 5), (4, 3), (3, 3, 6), (1, 3, 6), (4, 18)):
            words = (called, str(list(shape)), str(list(SHAPE)))
            refused(target, function, changed(good(shape=shape)), ValueError, words)
        refused(target, function, changed(good(f64)), TypeError, (called, "float64", "float32"))
        refused(target, function, changed(good().long()), TypeError, (called, "int64"))
        refused(target, function, changed(good().to("meta")), ValueError, (called, "meta"))

    @pytest.mark.parametrize("state", [bf16, f16, f64], ids=str)
    def test_pairs(self, target: Target, function: str, state):
        """A state that is narrower than the model output, or of another kind, names both dtypes."""
        more = {"v": good(state)} if function.startswith("under") else {}
        words = (str(state).removeprefix("torch."), "float32")
        refused(target, function, {STATE[function]: good(state), **more}, TypeError, words)


NEEDED = {
    "lml_ddim_step": ("alpha_bar", "alpha_bar_next"),
    "lml_dpm_step": ("lambdas", "alphas", "sigmas", "order"),
    "underdamped_langevin_step": ("step", "friction"),
}


@pytest.mark.parametrize("function", NEEDED)
def test_needed_arguments(target: Target, function: str):
    """Python itself says which keyword is missing."""
    for name in NEEDED[function]:
        refused(target, function, {name: ...}, (TypeError, ValueError), (name,))


class TestOut:
    """`out` of langevin_step: refused before anything is written."""

    def refused(self, target: Target, out, error, words, **changes):
        kept = out.detach().clone()
        refused(target, "langevin_step", {"out": out, **changes}, error, words)
        assert same_bits(out.detach(), kept)

    def test_shape_and_dtype(self, target: Target):
        for shape in ((4, 3, 5), (4, 18), (1, 3, 6)):
            self.refused(target, torch.full(shape, 7.0), ValueError, ("out", str(list(shape))))
        for dtype in (f64, bf16, torch.int32):
            words = ("out", str(dtype).removeprefix("torch."))
            self.refused(target, torch.full(SHAPE, 7, dtype=dtype), TypeError, words)

    def test_overlap(self, target: Target):
        numel = math.prod(SHAPE)
        for name in ("x", "score", "noise"):
            buffer = torch.randn(2 * numel)
            part = buffer[:numel].view(SHAPE)
            self.refused(
                target, buffer[1 : numel + 1].view(SHAPE), ValueError, ("out", "overlap"), **{name: part}
            )

    def test_with_a_bad_argument(self, target: Target):
        out = torch.full(SHAPE, 7.0)
        self.refused(target, out, ValueError, ("step",), step=-1.0)
        self.refused(target, out, ValueError, ("score",), score=good(shape=(4, 3, 5)))
        self.refused(
            target, out, ValueError, ("lowrank_solve", "damping"), hessian=(good(shape=(2, 3, 6)), None, -1.0)
        )

    def test_grad(self, target: Target):
        for which in ("x", "score", "step"):
            out = torch.full(SHAPE, 7.0)
            given = torch.tensor(0.1) if which == "step" else good()
            changes = {"out": out, which: given.requires_grad_()}
            refused(target, "langevin_step", changes, (RuntimeError, ValueError), ("grad",))
            assert bool((out == 7).all())


@pytest.mark.parametrize("function", RIGHT)
@pytest.mark.parametrize("given", [None, "text", [1.0]], ids=str)
def test_state_that_is_no_tensor(target: Target, function: str, given):
    refused(target, function, {STATE[function]: given}, TypeError, (STATE[function], "tensor"))
