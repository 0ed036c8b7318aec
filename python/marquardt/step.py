"""The operator behind the steps of samplers: x' = a + w·LM(e; p), with a and e sums of the tensors that a step has.

`reference/lml.py` is its definition. The public functions (`lml.py`, `langevin.py`) only work out the numbers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from . import checks, declare, errors, scalars
from .declare import Op
from .hessian import BACKWARD as LM_BACKWARD
from .langevin import AFFINE
from .layout import empty_output, empty_twice
from .noise import Generator, draw_seed
from .reference import lml as reference
from .reference.lml import (
    CONVERTED,
    DIRECTION,
    DOUBLED,
    EXTRAPOLATE,
    GUIDED,
    KEEP_NORM,
    SNR,
    STATE_DIRECTION,
    Columns,
)
from .scalars import Scalar

Tensor = torch.Tensor

MAX_OUTPUTS = 5  # of a model, their history and a given noise together

_is_compiling = torch.compiler.is_compiling
_dispatch_modes = torch._C._len_torch_dispatch_stack
_functorch_active = torch._C._are_functorch_transforms_active


def _check_form(
    outputs: Any, prev: Any, seed: Any, variant: int, wanted: int, clipped: bool, batch_dims: int
) -> None:
    op = "lm_step"
    if len(outputs) > MAX_OUTPUTS:
        raise errors.value(op, "outputs", f"hold at most {MAX_OUTPUTS} tensors", len(outputs))
    if variant not in (KEEP_NORM, EXTRAPOLATE, SNR):
        raise errors.value(op, "variant", "be 0, 2 or 3", variant)
    if not 0 <= wanted <= 31 or wanted & 3 == 3:
        raise errors.value(op, "wanted", "be a sum of 1 or 2, 4, 8 and 16", wanted)
    if wanted & GUIDED and len(outputs) < 2:
        raise errors.value(op, "outputs", "hold two tensors of a guided model", len(outputs))
    if wanted & CONVERTED and not clipped:
        raise errors.value(op, "wanted", "ask for y of a clipped step alone", wanted)
    if wanted & DOUBLED and batch_dims != 1:
        raise errors.value(op, "doubled", "come with batch_dims=1", batch_dims)
    if variant == SNR and (prev is None) == (seed is None):
        raise errors.value(op, "snr", "come with noise or a seed", "neither" if prev is None else "both")


def _check_scalars(coef: Tensor, variant: int) -> None:
    op = "lm_step"
    for row in checks.host_values(coef):
        if variant == EXTRAPOLATE:
            if not math.isfinite(row[0]):
                raise errors.value(op, "extrapolation", "be finite", row[0])
            continue
        names = ("snr", "temperature") if variant == SNR else ("damping", "kappa")
        if not 0.0 <= row[0] < math.inf:
            raise errors.value(op, names[0], "be finite and >= 0", row[0])
        if not math.isfinite(row[1]) or (variant == SNR and row[1] < 0.0):
            raise errors.value(op, names[1], "be finite and >= 0" if variant == SNR else "be finite", row[1])


def check_step(
    sample: Any, outputs: Sequence[Any], prev: Any, coef: Any, seed: Any, variant: int, wanted: int, clipped: bool,
    batch_dims: int,
) -> None:  # fmt: skip
    """What `lm_step` takes."""
    op = "lm_step"
    _check_form(outputs, prev, seed, variant, wanted, clipped, batch_dims)
    checks.floating(op, "sample", sample)
    checks.batched(op, "sample", sample, batch_dims)
    models: list[torch.dtype] = []
    named = [*((f"outputs[{j}]", t) for j, t in enumerate(outputs)), ("prev", prev)]
    for name, t in named:
        if t is None and name == "prev":
            continue
        checks.like(op, name, t, "sample", sample)
        if t.dtype != sample.dtype and t.dtype not in models:
            models.append(t.dtype)
            if len(models) > 1:
                rule = f"have the state's dtype ({checks.name(sample.dtype)}) or the model's ({checks.name(models[0])})"
                raise errors.kind(op, name, rule, checks.name(t.dtype))
    checks.seed(op, seed, sample, batch_dims)
    columns = Columns(1 + len(outputs), seed is not None and variant != SNR, clipped).total
    checks.coefficients(op, coef, columns, sample, batch_dims)
    _check_scalars(coef, variant)


def _fake(
    sample: Tensor, outputs: Sequence[Tensor], prev: Any, coef: Any, seed: Any, variant: int, wanted: int,
    clipped: bool, batch_dims: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    nothing = [sample.new_empty((*sample.shape[:batch_dims], 0)) for _ in range(2)]
    new = empty_twice(sample) if wanted & DOUBLED else empty_output(sample)
    model = outputs[0].dtype if outputs else sample.dtype
    direction, converted = nothing
    if wanted & (DIRECTION | STATE_DIRECTION):
        direction = empty_output(sample, sample.dtype if wanted & STATE_DIRECTION else model)
    if wanted & CONVERTED:
        converted = empty_output(sample, model)
    return new, direction, converted


def _sum(call: Any, terms: Sequence[Tensor], columns: Sequence[Tensor], batch_dims: int) -> Tensor:
    """Σ_j column_j·term_j, each column one of `coef`; a term with a 0 is left unread, as in the step itself."""
    nil = torch.zeros_like(columns[0])
    coef = torch.stack([nil, nil, nil, *columns, *[nil] * len(terms)], dim=-1)
    made: Tensor = call(STEP, terms[0], list(terms[1:]), None, coef, None, KEEP_NORM, 0, False, batch_dims)[0]
    return made


def _backward(
    call: Any, grads: Sequence[Any], needs: Any, sample: Tensor, outputs: Sequence[Tensor], prev: Tensor | None,
    coef: Tensor, seed: Any, variant: int, wanted: int, clipped: bool, batch_dims: int,
) -> tuple[Any, ...]:  # fmt: skip
    """Sums of the gradients and that of the direction, each a pass; else the derivative of the definition: for clipped
    steps, the signal-to-noise rule, and gradients to the numbers."""
    args = (sample, outputs, prev, coef, seed, variant, wanted, clipped, batch_dims)
    if clipped or variant == SNR or needs[3]:
        return declare.backward_of_reference(STEP, call, grads, needs, *args)
    new, direction = grads[0], grads[1] if wanted & (DIRECTION | STATE_DIRECTION) else None
    if new is None and direction is None:
        return (None,) * len(args)
    at = Columns(1 + len(outputs), seed is not None, False)
    column = [coef[..., i] for i in range(at.d.stop)]
    on_a, on_d, weight = column[at.a], column[at.d], column[2]
    new = torch.zeros_like(sample) if new is None else new
    if wanted & DOUBLED:
        new = new[: sample.shape[0]] + new[sample.shape[0] :]

    bent, d_prev = new, None  # what reaches the direction, before its weight
    if prev is not None:
        e = call(
            STEP,
            sample,
            outputs,
            None,
            coef,
            seed,
            variant,
            wanted & GUIDED | STATE_DIRECTION,
            False,
            batch_dims,
        )[1]
        rule = coef[..., :1] if variant == EXTRAPOLATE else coef[..., :2]
        bent, d_prev, _ = call(LM_BACKWARD, new, e, prev, rule, variant, batch_dims)
        d_prev = _sum(call, [d_prev], [weight], batch_dims).to(prev.dtype) if needs[2] else None
    terms = [new, bent] if direction is None else [new, bent, direction.to(new.dtype)]
    sources = []
    for a, d in zip(on_a, on_d, strict=True):
        columns = [a, weight * d] if direction is None else [a, weight * d, d]
        sources.append(_sum(call, terms, columns, batch_dims))
    if wanted & GUIDED:  # the first output stands for a residual against the second
        sources[2] = sources[2] - sources[1]
    d_outputs = [d.to(t.dtype) for d, t in zip(sources[1:], outputs, strict=True)]
    return sources[0], d_outputs, d_prev, *(None,) * 6


STEP = Op(
    "lm_step(Tensor sample, Tensor[] outputs, Tensor? prev, Tensor coef, Tensor? seed, int variant, int wanted,"
    " bool clipped, int batch_dims) -> (Tensor, Tensor, Tensor)",
    reference=reference.lm_step,
    fake=_fake,
    check=check_step,
    backward=_backward,
    public=(
        "lml_ddim_step",
        "lml_dpm_step",
        "lml_flow_step",
        "langevin_step",
        "underdamped_langevin_step",
    ),
)


# --- known steps -----------------------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """What is left of a step when its numbers are known: a sampler walks the same schedule over and over."""

    coef: Tensor
    variant: int
    wanted: int
    clipped: bool
    takes_prev: bool
    names: Mapping[str, str]
    plain: Tensor | None  # one number a tensor, where the step is their sum and nothing more

    def run(
        self,
        op: str,
        sample: Tensor,
        outputs: list[Tensor],
        prev: Tensor | None,
        doubled: bool,
        batch_dims: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The step with these tensors; of what is not wanted, anything."""
        if self.plain is not None and not doubled:  # half the price of a call, and the same bits
            try:
                if prev is None or _is_idle(prev, outputs[0]):
                    new: Tensor = AFFINE.call([sample, *outputs], self.plain, None, batch_dims)
                    return new, new, new
            except (TypeError, ValueError, AttributeError):
                pass  # the step itself has the words for it
        wanted = self.wanted | DOUBLED if doubled else self.wanted
        prev = prev if self.takes_prev else None
        return called(
            op,
            self.names,
            sample,
            outputs,
            prev,
            self.coef,
            None,
            self.variant,
            wanted,
            self.clipped,
            batch_dims,
        )


def _is_idle(prev: Any, output: Tensor) -> bool:
    """Whether a `prev` that does not count is one that the step would take, and nothing else asks for it."""
    return (
        type(prev) is Tensor
        and prev.shape == output.shape
        and prev.dtype is output.dtype
        and prev.device == output.device
        and not prev.requires_grad
        and not _functorch_active()
    )


_recipes: dict[tuple[Any, ...], Recipe] = {}
_MOST_RECIPES = 4096


def known(key: tuple[Any, ...], doubled: bool, sample: Any) -> Recipe | None:
    """The recipe under `key`, whose entries are plain numbers, names and None."""
    if (
        not isinstance(sample, Tensor)
        or _is_compiling()
        or (doubled and _functorch_active())
        or _dispatch_modes()
    ):
        return None
    return _recipes.get(key)


# --- building a step -------------------------------------------------------------------------------------------------


@dataclass
class Step:
    """The tensors of a step and their numbers, gathered by a public function."""

    op: str
    sample: Tensor
    batch_dims: int
    a: list[Scalar]  # of the sample, then of the outputs
    d: list[Scalar]
    outputs: list[Tensor] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # of the outputs, in messages
    prev: Tensor | None = None
    prev_name: str = "prev"
    variant: int = KEEP_NORM
    rule: tuple[Scalar, Scalar] = (0.0, 0.0)
    weight: Scalar = 1.0
    seed: Tensor | None = None
    noise: tuple[Scalar, Scalar] = (0.0, 0.0)
    y: tuple[Scalar, Scalar, Scalar] | None = None  # A_y, D_y, bound
    on_y: list[Scalar] = field(default_factory=lambda: [0.0])  # of the sample, then of the outputs
    active: Tensor | None = None
    name: str = "sample"
    guided: bool = False  # the first output is taken as its residual against the second
    key: tuple[Any, ...] | None = None  # under which its numbers may be kept

    def add(self, name: str, t: Tensor, a: Scalar, d: Scalar, y: Scalar = 0.0) -> None:
        """One more tensor."""
        self.outputs.append(t)
        self.names.append(name)
        self.a.append(a)
        self.d.append(d)
        self.on_y.append(y)

    def add_noise(
        self, a: Scalar, d: Scalar, noise: Tensor | None, generator: Generator, seed: Tensor | int | None
    ) -> None:
        """ξ: given, or drawn in the kernel."""
        if noise is not None:
            self.add("noise", noise, a, d)
            return
        checks.floating(self.op, self.name, self.sample)
        checks.batched(self.op, self.name, self.sample, self.batch_dims)
        self.seed = draw_seed(self.op, self.sample, generator, seed, self.batch_dims)
        self.noise = (a, d)

    def columns(self) -> list[Scalar]:
        """All numbers in the order of `Columns`."""
        a, weight, noise, y = list(self.a), self.weight, self.noise, self.y
        if self.active is not None:
            on = self.active.to(torch.float64)
            a = [on * a[0] + (1.0 - on), *(on * c for c in a[1:])]
            weight, noise = on * weight, (on * noise[0], on * noise[1])
            y = None if y is None else (on * y[0], y[1], y[2])
        values = [*self.rule, weight, *a, *self.d]
        if self.seed is not None and self.variant != SNR:
            values += noise
        if y is not None:
            values += [*y, *self.on_y]
        return values

    def run(self, wanted: int, doubled: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """The step itself; errors in the words of the public function."""
        if not isinstance(self.sample, Tensor):
            raise errors.kind(self.op, self.name, "be a tensor", type(self.sample).__name__)
        if self.guided:
            wanted |= GUIDED
        apart = doubled and _functorch_active()  # a mapped dimension stands before the doubled one
        if doubled and not apart:
            wanted |= DOUBLED
        values = self.columns()
        if all(type(v) is float for v in values):
            coef = scalars.of_floats(tuple(values))  # type: ignore[arg-type]
            self._keep(values, coef, wanted & ~DOUBLED)  # type: ignore[arg-type]
        else:
            checks.floating(self.op, self.name, self.sample)
            checks.batched(self.op, self.name, self.sample, self.batch_dims)
            coef = scalars.pack(self.op, self._names_of_columns(), values, self.sample, self.batch_dims)
        made = called(
            self.op, self.renamed(), self.sample, self.outputs, self.prev, coef, self.seed, self.variant, wanted,
            self.y is not None, self.batch_dims,
        )  # fmt: skip
        return (torch.cat([made[0], made[0]]), *made[1:]) if apart else made

    def _plain(self, values: list[float], wanted: int) -> Tensor | None:
        """A_j + w·D_j where the step is Σ (A_j + w·D_j) s_j: no direction of before that counts, no clamp, nothing else
        asked for. A number that is 0 leaves its tensor unread, which a plain sum does not.
        """
        counts = values[0 if self.variant == EXTRAPOLATE else 1] != 0 and values[2] != 0
        if (self.prev is not None and counts) or self.variant == SNR or self.y is not None or wanted:
            return None
        at = Columns(1 + len(self.outputs), False, False)
        sums = [a + values[2] * d for a, d in zip(values[at.a], values[at.d], strict=True)]
        return scalars.of_floats(tuple(sums)) if all(sums) else None

    def _keep(self, values: list[float], coef: Tensor, wanted: int) -> None:
        if self.key is None or self.seed is not None or _is_compiling() or _dispatch_modes():
            return
        if len(_recipes) >= _MOST_RECIPES:
            _recipes.clear()
        _recipes[self.key] = Recipe(
            coef, self.variant, wanted, self.y is not None, self.prev is not None, self.renamed(),
            self._plain(values, wanted),
        )  # fmt: skip

    def _names_of_columns(self) -> list[str]:
        names = ["damping", "kappa"]
        if self.variant == EXTRAPOLATE:
            names = ["extrapolation", "extrapolation"]
        elif self.variant == SNR:
            names = ["snr", "temperature"]
        total = Columns(
            1 + len(self.outputs), self.seed is not None and self.variant != SNR, self.y is not None
        ).total
        return names + ["coefficients"] * (total - 2)

    def renamed(self) -> Mapping[str, str]:
        """The arguments of `lm_step` as the caller knows them."""
        return {"prev": self.prev_name, "sample": self.name} | {
            f"outputs[{j}]": name for j, name in enumerate(self.names)
        }


def called(op: str, names: Mapping[str, str], *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`lm_step` with its errors renamed."""
    try:
        made: tuple[Tensor, Tensor, Tensor] = STEP.call(*args)
        return made
    except (TypeError, ValueError) as error:
        raise rename(error, STEP.name, op, names) from None


def rename(error: Exception, inner: str, op: str, names: Mapping[str, str]) -> Exception:
    """An error of the operator `inner` in the words of the function that called it."""
    message = str(error)
    if not message.startswith(f"{inner}: "):
        return error
    message = message.removeprefix(f"{inner}: ")
    for argument in sorted(names, key=len, reverse=True):
        message = re.sub(rf"(?<![\w.]){re.escape(argument)}(?![\w])", names[argument], message)
    return type(error)(f"{op}: {message}")


def lm_rule(
    op: str,
    prev: Tensor | None,
    prev_name: str,
    damping: Scalar | None,
    kappa: Scalar | None,
    extrapolation: Scalar | None,
) -> tuple[int, tuple[Scalar, Scalar], Tensor | None]:
    """Variant, its two numbers, and prev where it can count at all."""
    if extrapolation is not None:
        for name, given in (("damping", damping), ("kappa", kappa)):
            if given is not None:
                raise errors.value(op, "extrapolation", f"come without {name}", given)
        return EXTRAPOLATE, (extrapolation, 0.0), prev
    if (
        kappa is not None
        and damping is None
        and (prev is not None or isinstance(kappa, Tensor) or kappa != 0)
    ):
        raise errors.value(op, "damping", "be given where kappa is (or extrapolation instead)", None)
    if kappa is None:
        return KEEP_NORM, (0.0 if damping is None else damping, 0.0), None
    return KEEP_NORM, (0.0 if damping is None else damping, kappa), prev
