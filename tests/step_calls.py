"""Calls of the LML steps, and what the oracle makes of them: one row of options in, tensors and expectation out.

A row is a dict with one value per axis (`AXES_*`); `pairwise` picks few rows in which any two values meet.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

import cases
import marquardt as mq
import oracle
import oracle_steps as steps
from harness import PAIRS, Target
from harness.compare import norm_bound, rows
from harness.declare import dtype_name

Tensor = torch.Tensor
f16, bf16, f32, f64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
STATED = 5e-7  # float32, norm-wise per sample and step
SHAPES = ((3, 4, 9, 7), (2, 3, 2, 4, 5), (3, 77, 8))  # latents, video, packed tokens
PREDICTIONS = ("epsilon", "sample", "v_prediction")
ALGORITHMS = ("dpmsolver", "dpmsolver++", "sde-dpmsolver", "sde-dpmsolver++")
# what bends the direction; `some-zero` has κ = 0 in the first sample and NaN in its prev
BENDS = ("none", "damped", "extrapolated", "first-step", "zero-kappa", "some-zero")
SEED = (41, 2**35)

_COMMON = {
    "lm": BENDS,
    "form": ("number", "zero-dim", "per-sample"),
    "pair": PAIRS,
    "shape": SHAPES,
    "doubled": (False, True),
}
AXES_DDIM: dict[str, Sequence] = {
    **_COMMON,
    "prediction": PREDICTIONS,
    "noise": ("none", "seed", "seeds", "given"),
    "limit": ("none", "clip", "threshold"),
    "use_clipped": (False, True),
    "guidance": ("none", "number", "per-sample"),
    "active": (False, True),
}
AXES_DPM: dict[str, Sequence] = {
    **_COMMON,
    "form": ("number", "zero-dim", "per-sample", "table"),
    "algorithm": ALGORITHMS,
    "order": (1, 2, 3),
    "solver": ("midpoint", "heun"),
    "third": ("published", "exact"),
    "apply_to": ("increment", "direction"),
    "lm_on_sde": (False, True),
    "prediction": (None, *PREDICTIONS),
    "limit": ("none", "clip", "threshold"),
    "guidance": ("none", "number", "per-sample"),
    "noise": ("seed", "seeds", "given"),
}
AXES_FLOW: dict[str, Sequence] = {
    **_COMMON,
    "kind": ("dt", "sigmas", "stochastic"),
    "noise": ("seed", "seeds", "given"),
    "guidance": ("none", "number", "per-sample"),
    "active": (False, True),
}


def pairwise(axes: Mapping[str, Sequence], allowed: Callable[[dict], bool] = lambda row: True) -> list[dict]:
    """Few rows of the product of `axes` in which any two values meet: the best of some random ones, again and again."""
    chance, names = random.Random(1), list(axes)
    places = list(itertools.combinations(range(len(names)), 2))

    def draw() -> tuple[dict, set]:
        while True:
            at = [chance.randrange(len(axes[n])) for n in names]
            row = {n: axes[n][i] for n, i in zip(names, at, strict=True)}
            if allowed(row):
                return row, {(a, b, at[a], at[b]) for a, b in places}

    pool = [draw() for _ in range(800)]
    left = set().union(*(met for _, met in pool))
    found = []
    while left:
        row, met = max(pool, key=lambda entry: len(entry[1] & left))
        found.append(row)
        left -= met
    return found


def name_of(row: dict) -> str:
    names = {k: dtype_name(v) if k == "pair" else str(v) for k, v in row.items() if k != "shape"}
    return ".".join(k if v == "True" else v for k, v in names.items() if v not in ("False", "none", "None"))


def dpm_allowed(row: dict) -> bool:
    raw = row["prediction"] is not None
    return (raw or (row["limit"] == "none" and row["guidance"] == "none")) and (
        row["algorithm"] != "sde-dpmsolver" or row["order"] < 3
    )


def scalar(value: float, form: str, batch: int, device="cpu"):
    """A number, a 0-dim tensor, or [B] that falls by up to a tenth over the batch."""
    if form == "per-sample":
        return torch.linspace(1.0, 0.9, batch, dtype=f64, device=device) * value
    return torch.tensor(value, dtype=f64) if form == "zero-dim" else value


def numbers(c) -> np.ndarray | Any:
    """A scalar argument for the oracle."""
    return np.asarray(c.detach().cpu() if isinstance(c, Tensor) else c, np.longdouble)


@dataclass
class Call:
    """A call of a step, and what it should give: rows [B, D] and the error that drawn noise may add, [B]."""

    function: str
    args: list
    keywords: dict
    expected: tuple[np.ndarray, ...]
    slack: Any = 0.0

    def run(self, target: Target, **more):
        with target():
            return getattr(mq, self.function)(*self.args, **{**self.keywords, **more})


def close(found: Tensor, expected: np.ndarray, what: str, slack=0.0, batch_dims=1, stated=None) -> None:
    """‖found − expected‖ ≤ bound·‖expected‖ + slack in every sample; the bound is 1e-13 in float64, else `STATED`
    and half an ulp of a narrower result."""
    limit = stated or (1e-13 if found.dtype == f64 else norm_bound(found.dtype, STATED))
    gap, size = (np.sqrt((t * t).sum(-1)) for t in (rows(found, batch_dims) - expected, expected))
    small = np.sqrt(np.longdouble(expected.shape[1])) * torch.finfo(found.dtype).smallest_normal
    good = gap <= limit * size + slack + small * torch.finfo(found.dtype).eps
    assert np.all(good), (
        f"{what}: norm-wise error {np.asarray(gap / np.maximum(size, 1e-300), float)}, bound {limit:.3g}"
    )


class Maker:
    """Tensors and arguments of one row."""

    def __init__(self, row: dict, device="cpu", seed=0):
        self.row, self.device = row, device
        self.shape, (self.state, self.model) = row["shape"], row["pair"]
        self.batch = self.shape[0]
        self.generator = torch.Generator().manual_seed(seed)
        self.keywords: dict[str, Any] = {"doubled": True} if row["doubled"] else {}
        self.lm: tuple | None = None

    def tensor(self, dtype, spread=1.0) -> Tensor:
        return (spread * cases.gaussian(self.generator, self.shape)).to(dtype).to(self.device)

    def near(self, target_rows: np.ndarray, dtype) -> Tensor:
        """A previous direction at correlation 0.99 with the present one."""
        like = torch.from_numpy(target_rows.astype(np.float64)).reshape(self.shape)
        size = float((like**2).mean() ** 0.5) if like.numel() else 1.0
        return (like + 0.14 * size * cases.gaussian(self.generator, self.shape)).to(dtype).to(self.device)

    def number(self, value: float, form: str | None = None):
        return scalar(value, form or self.row["form"].replace("table", "number"), self.batch, self.device)

    def bend(self, now: np.ndarray, dtype):
        """The previous direction and the LM arguments; `now` is the direction that is bent, rows."""
        kind = self.row["lm"]
        if kind == "none":
            return None
        if kind == "extrapolated":
            self.keywords["extrapolation"] = gamma = self.number(0.4)
            self.lm = (oracle.EXTRAPOLATE, numbers(gamma))
            return self.near(now, dtype)
        damping, kappa = self.number(0.1), 0.0 if kind == "zero-kappa" else self.number(0.3)
        if kind == "some-zero":
            kappa = self.number(0.3, "per-sample").clone()
            kappa[0] = 0
        self.keywords.update(damping=damping, kappa=kappa)
        if kind == "first-step":
            return None
        prev = self.near(now, dtype)
        if kind != "zero-kappa":
            self.lm = (oracle.KEEP_NORM, numbers(damping), numbers(kappa))
        if kind in ("zero-kappa", "some-zero"):
            prev[0] = float("nan")
        return prev

    def guidance(self):
        """For the oracle; the keyword goes with the others."""
        if self.row["guidance"] == "none":
            return None
        uncond, scale = (
            self.tensor(self.model),
            self.number(2.5, self.row["guidance"].replace("number", "zero-dim")),
        )
        self.keywords["guidance"] = (uncond, scale)
        return rows(uncond), numbers(scale)

    def limit(self) -> dict:
        made = {"clip": {"clip": 0.8}, "threshold": {"threshold": (0.9, 1.5)}}.get(self.row["limit"], {})
        self.keywords.update(made)
        return made

    def active(self):
        if not self.row.get("active"):
            return None
        active = torch.arange(self.batch, device=self.device) % 2 == 0
        self.keywords["active"] = active
        return active.cpu().numpy()

    def noise(self) -> np.ndarray | None:
        """ξ as rows; what the call draws from its seed where it is not given."""
        kind = self.row["noise"]
        if kind == "none":
            return None
        if kind == "given":
            self.keywords["noise"] = given = self.tensor(self.state)
            return rows(given)
        seed = np.array([[*SEED]] * self.batch) + np.arange(self.batch)[:, None]
        seed = seed if kind == "seeds" else np.array(SEED)
        self.keywords["seed"] = torch.tensor(seed, device=self.device)
        return oracle.noise_like(self.shape, seed).reshape(self.batch, -1)

    def slack(self, scale, noise) -> Any:
        """Drawn normals may be off by 4 ulp of float32."""
        if noise is None or self.row["noise"] == "given":
            return 0.0
        return 4 * 2.0**-23 * np.abs(numbers(scale)) * np.sqrt((noise * noise).sum(-1))


def ddim_call(row: dict, device="cpu", seed=0, **options) -> Call:
    make = Maker(row, device, seed)
    x, output = make.tensor(make.state), make.tensor(make.model)
    a, a1 = make.number(0.35), make.number(0.52)
    eta = make.number(0.0 if row["noise"] == "none" else 0.6)
    if row["noise"] == "none":
        eta = 0.0
    limit, guidance, noise = make.limit(), make.guidance(), make.noise()
    more = {
        **limit, "guidance": guidance, "eta": numbers(eta), "prediction": row["prediction"],
        "use_clipped": row["use_clipped"], "alpha_bar": numbers(a), "alpha_bar_next": numbers(a1),
    }  # fmt: skip
    _, eps = steps.ddim_step(rows(x), rows(output), **more)
    prev = make.bend(eps, make.model)
    expected = steps.ddim_step(
        rows(x), rows(output), None if prev is None else rows(prev), lm=make.lm, noise=noise, active=make.active(),
        **more, **options,
    )  # fmt: skip
    keywords = {
        **make.keywords, "alpha_bar": a, "alpha_bar_next": a1, "eta": eta, "prediction_type": row["prediction"],
        "use_clipped_output": row["use_clipped"],
    }  # fmt: skip
    slack = make.slack(np.abs(numbers(eta)), noise)  # σ ≤ η
    return Call("lml_ddim_step", [x, output, prev], keywords, expected, slack)


TABLES = ("lambdas", "alphas", "sigmas")


def tables(alpha_bars: Sequence[Any]) -> dict[str, list]:
    """lambdas, alphas, sigmas of a variance-preserving schedule: numbers or tensors."""
    bars = [b if isinstance(b, Tensor) else torch.tensor(b, dtype=f64) for b in alpha_bars]
    made = {
        "lambdas": [(b.log() - (1 - b).log()) / 2 for b in bars],
        "alphas": [b.sqrt() for b in bars],
        "sigmas": [(1 - b).sqrt() for b in bars],
    }
    if any(isinstance(b, Tensor) for b in alpha_bars):
        return made
    return {k: [float(c) for c in v] for k, v in made.items()}


def dpm_call(row: dict, device="cpu", seed=0, **options) -> Call:
    make = Maker(row, device, seed)
    order, algorithm = row["order"], row["algorithm"]
    x, outputs = make.tensor(make.state), [make.tensor(make.model) for _ in range(order)]
    given = tables([make.number(b) for b in (0.6, 0.5, 0.38, 0.25)[: order + 1]])
    shared = {k: [numbers(c) for c in v] for k, v in given.items()}
    if row["form"] == "table":
        given = {k: torch.tensor(v, dtype=f64) for k, v in given.items()}
    shared.update(
        order=order, algorithm=algorithm, solver_type=row["solver"], third_order=row["third"],
        apply_to=row["apply_to"], lm_on_sde=row["lm_on_sde"], prediction=row["prediction"],
        **make.limit(), guidance=make.guidance(),
    )  # fmt: skip
    noise = make.noise() if algorithm.startswith("sde") else None
    flat = rows(x), [rows(m) for m in outputs]
    _, increment, _ = steps.dpm_step(*flat, **shared)
    prev = make.bend(increment, make.state)
    expected = steps.dpm_step(
        *flat, None if prev is None else rows(prev), lm=make.lm, noise=noise, **shared, **options
    )
    keywords = {
        **make.keywords, **given, "order": order, "algorithm": algorithm, "solver_type": row["solver"],
        "third_order": row["third"], "apply_to": row["apply_to"], "lm_on_sde": row["lm_on_sde"],
        "prediction_type": row["prediction"],
    }  # fmt: skip
    return Call("lml_dpm_step", [x, outputs, prev], keywords, expected, make.slack(1.0, noise))


def flow_call(row: dict, device="cpu", seed=0, **options) -> Call:
    make = Maker(row, device, seed)
    x, velocity = make.tensor(make.state), make.tensor(make.model)
    kind = row["kind"]
    given = {"dt": make.number(-0.11)} if kind == "dt" else {
        "sigma": make.number(0.7), "sigma_next": make.number(0.55)
    }  # fmt: skip
    if kind == "stochastic":
        given["stochastic"] = True
    guidance = make.guidance()
    noise = make.noise() if kind == "stochastic" else None
    more = {k: numbers(v) if k != "stochastic" else v for k, v in given.items()}
    prev = make.bend(steps.guided(rows(velocity), guidance), make.model)
    expected = steps.flow_step(
        rows(x), rows(velocity), None if prev is None else rows(prev), lm=make.lm, guidance=guidance, noise=noise,
        active=make.active(), **more, **options,
    )  # fmt: skip
    slack = make.slack(1.0, noise)
    return Call("lml_flow_step", [x, velocity, prev], {**make.keywords, **given}, expected, slack)


# One call of each step that uses most of what it has; tests change one thing at a time.
_USUAL = {"lm": "damped", "form": "number", "pair": (f32, bf16), "shape": (3, 4, 9, 7), "doubled": False}
USUAL: dict[str, dict] = {
    "ddim": {
        **_USUAL, "prediction": "epsilon", "noise": "none", "limit": "none", "use_clipped": False, "guidance": "none",
        "active": False,
    },
    "dpm": {
        **_USUAL, "algorithm": "dpmsolver++", "order": 2, "solver": "midpoint", "third": "published",
        "apply_to": "increment", "lm_on_sde": False, "prediction": None, "limit": "none", "guidance": "none",
        "noise": "seed",
    },
    "flow": {**_USUAL, "kind": "dt", "noise": "seed", "guidance": "none", "active": False},
}  # fmt: skip
NOISY: dict[str, dict] = {
    "ddim": {"noise": "seed"},
    "dpm": {"algorithm": "sde-dpmsolver++", "lm_on_sde": True},
    "flow": {"kind": "stochastic"},
}
STEPS = tuple(USUAL)


def usual(step: str, device="cpu", seed=0, **changes) -> Call:
    """The usual call of "ddim", "dpm" or "flow" with some options changed."""
    make = {"ddim": ddim_call, "dpm": dpm_call, "flow": flow_call}[step]
    return make({**USUAL[step], **changes}, device, seed)
