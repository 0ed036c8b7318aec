"""Argument checks of the frame ops for everything that does not pass through C++ (tracing, Triton, reference).

The native library makes the same checks with the same words, where they cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from . import errors
from .layout import batch_and_size

Tensor = torch.Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
# (state, model): the state carries the precision of the trajectory, the model output may be narrower.
PAIRS = {
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
}
MAX_TERMS = 9  # eight terms and an explicit noise


def name(dtype: torch.dtype) -> str:
    """`float32` of `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def floating(op: str, argument: str, t: Any) -> None:
    """A dense floating tensor of a supported dtype."""
    if not isinstance(t, Tensor):
        raise errors.kind(op, argument, "be a tensor", type(t).__name__)
    if t.layout is not torch.strided:
        raise errors.kind(op, argument, "be a dense tensor", str(t.layout).removeprefix("torch."))
    if t.is_quantized:
        raise errors.kind(op, argument, "not be quantised", name(t.dtype))
    if t.dtype not in FLOATS:
        raise errors.kind(op, argument, "be float32, float64, bfloat16 or float16", name(t.dtype))


def like(op: str, argument: str, t: Any, first: str, state: Tensor) -> None:
    """Same shape and device as the state, and a dtype that pairs with it."""
    floating(op, argument, t)
    if t.shape != state.shape:
        raise errors.value(op, argument, f"have the shape of {first} ({list(state.shape)})", list(t.shape))
    if t.device != state.device:
        raise errors.value(op, argument, f"be on the device of {first} ({state.device})", t.device)
    if (state.dtype, t.dtype) not in PAIRS:
        rule = f"have a dtype that pairs with {first} ({name(state.dtype)})"
        raise errors.kind(op, argument, rule, name(t.dtype))


def one_of(op: str, argument: str, value: Any, allowed: Sequence[Any]) -> None:
    """Refuses what is not among `allowed`."""
    if value not in allowed:
        raise errors.value(op, argument, f"be one of {', '.join(map(repr, allowed))}", repr(value))


def batched(op: str, argument: str, t: Tensor, batch_dims: int) -> None:
    """One or no batch dimension, and a tensor that has it."""
    if batch_dims not in (0, 1):
        raise errors.value(op, "batch_dims", "be 0 or 1", batch_dims)
    if t.dim() < batch_dims:
        raise errors.value(op, argument, "have a batch dimension", list(t.shape))


def coefficients(op: str, coef: Any, columns: int, state: Tensor, batch_dims: int) -> None:
    """`coef` is [columns] on the CPU or [B, columns] beside the data, float64."""
    if coef.dtype is not torch.float64:
        raise errors.kind(op, "coef", "be float64", name(coef.dtype))
    batch, _ = batch_and_size(state, batch_dims)
    if tuple(coef.shape) not in ((columns,), (batch, columns)):
        raise errors.value(op, "coef", f"have shape [{columns}] or [{batch}, {columns}]", list(coef.shape))
    if coef.dim() == 1 and coef.device.type not in ("cpu", "meta"):
        raise errors.value(op, "coef", "be on the CPU when it is shared by the batch", coef.device)
    if coef.dim() == 2 and coef.device != state.device and state.device.type != "mps":  # which has no float64
        raise errors.value(op, "coef", f"be on the data's device ({state.device})", coef.device)


def host_values(coef: Any) -> list[list[float]]:
    """Rows of scalars that the host knows without a synchronisation, else []."""
    if coef.device.type != "cpu" or type(coef) is not Tensor or torch.compiler.is_compiling():
        return []
    rows = coef.detach()
    if torch._C._functorch.is_functorch_wrapped_tensor(rows):
        return []
    return rows.tolist() if rows.dim() == 2 else [rows.tolist()]


def lm_scalars(op: str, coef: Any, mode: int) -> None:
    """Damping is finite and not negative; kappa and extrapolation are finite."""
    for row in host_values(coef):
        if mode == 2:
            if not math.isfinite(row[0]):
                raise errors.value(op, "extrapolation", "be finite", row[0])
            continue
        if not 0.0 <= row[0] < math.inf:
            raise errors.value(op, "damping", "be finite and >= 0", row[0])
        if not math.isfinite(row[1]):
            raise errors.value(op, "kappa", "be finite", row[1])


def lm_direction(eps: Any, prev: Any, coef: Any, mode: int, batch_dims: int) -> None:
    """What `lm_direction` takes."""
    op = "lm_direction"
    floating(op, "eps", eps)
    batched(op, "eps", eps, batch_dims)
    if mode not in (0, 1, 2):
        raise errors.value(op, "variant", "be 0, 1 or 2", mode)
    if prev is not None:
        like(op, "prev", prev, "eps", eps)
    coefficients(op, coef, 1 if mode == 2 else 2, eps, batch_dims)
    lm_scalars(op, coef, mode)


def lm_direction_backward(grad: Any, eps: Any, prev: Any, coef: Any, mode: int, batch_dims: int) -> None:
    """What its vector–Jacobian product takes."""
    lm_direction(eps, prev, coef, mode, batch_dims)
    like("lm_direction_backward", "grad", grad, "eps", eps)


def lm_direction_jvp(
    eps: Any, prev: Any, coef: Any, eps_t: Any, prev_t: Any, coef_t: Any, mode: int, batch_dims: int
) -> None:
    """What its Jacobian–vector product takes."""
    lm_direction(eps, prev, coef, mode, batch_dims)
    like("lm_direction_jvp", "eps_t", eps_t, "eps", eps)
    like("lm_direction_jvp", "prev_t", prev_t, "eps", eps)
    coefficients("lm_direction_jvp", coef_t, 1 if mode == 2 else 2, eps, batch_dims)


def seed(op: str, seed: Tensor | None, state: Tensor, batch_dims: int) -> None:
    """int64 [2], or [B, 2] for one stream of noise per sample, beside the data."""
    if seed is None:
        return
    batch, _ = batch_and_size(state, batch_dims)
    if not isinstance(seed, Tensor) or seed.dtype is not torch.int64:
        got = name(seed.dtype) if isinstance(seed, Tensor) else type(seed).__name__
        raise errors.kind(op, "seed", "be an int64 tensor", got)
    if tuple(seed.shape) not in ((2,), (batch, 2)):
        raise errors.value(op, "seed", f"have shape [2] or [{batch}, 2]", list(seed.shape))
    if seed.device != state.device:
        raise errors.value(op, "seed", f"be on the data's device ({state.device})", seed.device)


def affine_step(terms: Sequence[Any], coef: Any, seed_: Tensor | None, batch_dims: int) -> None:
    """What `affine_step` takes."""
    op = "affine_step"
    if not 1 <= len(terms) <= MAX_TERMS:
        raise errors.value(op, "terms", f"hold 1 to {MAX_TERMS - 1} tensors", len(terms))
    floating(op, "terms[0]", terms[0])
    batched(op, "terms[0]", terms[0], batch_dims)
    model = terms[0].dtype
    for j, term in enumerate(terms[1:], 1):
        like(op, f"terms[{j}]", term, "terms[0]", terms[0])
        if term.dtype != terms[0].dtype:
            if model not in (terms[0].dtype, term.dtype):
                rule = f"have the state's dtype ({name(terms[0].dtype)}) or the model's ({name(model)})"
                raise errors.kind(op, f"terms[{j}]", rule, name(term.dtype))
            model = term.dtype
    coefficients(op, coef, len(terms) + (seed_ is not None), terms[0], batch_dims)
    seed(op, seed_, terms[0], batch_dims)


def affine_step_backward(
    grad: Any,
    terms: Sequence[Any],
    coef: Any,
    seed_: Tensor | None,
    want_terms: bool,
    want_coef: bool,
    batch_dims: int,
) -> None:
    """What its vector–Jacobian product takes."""
    affine_step(terms, coef, seed_, batch_dims)
    like("affine_step_backward", "grad", grad, "terms[0]", terms[0])


def out(op: str, out_: Any, first: str, state: Tensor, inputs: Sequence[Tensor | None]) -> None:
    """`out` has the state's shape, dtype and device; it may be an input itself, but not overlap one partly."""
    if not isinstance(out_, Tensor):
        raise errors.kind(op, "out", "be a tensor", type(out_).__name__)
    if out_.shape != state.shape:
        raise errors.value(op, "out", f"have the shape of {first} ({list(state.shape)})", list(out_.shape))
    if out_.dtype != state.dtype:
        raise errors.kind(op, "out", f"have the dtype of {first} ({name(state.dtype)})", name(out_.dtype))
    if out_.device != state.device:
        raise errors.value(op, "out", f"be on the device of {first} ({state.device})", out_.device)
    reach = 0
    for stride, size in sorted((t, s) for s, t in zip(out_.shape, out_.stride(), strict=True) if s > 1):
        if stride <= reach:
            raise errors.value(op, "out", "have no repeated elements", f"stride {stride}")
        reach += (size - 1) * stride
    for t in inputs:
        if t is not None and _partial_overlap(out_, t):
            raise errors.value(
                op, "out", "be an input itself or share no memory with one", "a partial overlap"
            )


def _span(t: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()


def _partial_overlap(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    if (
        torch.compiler.is_compiling()
        or a.device.type == "meta"
        or type(a) is not Tensor
        or type(b) is not Tensor
    ):
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(a) or torch._C._functorch.is_functorch_wrapped_tensor(
        b
    ):
        return False
    steps_a, steps_b = ([t for s, t in zip(x.shape, x.stride(), strict=True) if s > 1] for x in (a, b))
    same_steps = a.dtype == b.dtype and steps_a == steps_b
    if a.data_ptr() == b.data_ptr() and same_steps:
        return False
    first, second = _span(a), _span(b)
    if not (first[0] < second[1] and second[0] < first[1]):
        return False
    return not (same_steps and _interleaved(a, abs(first[0] - second[0])))


def _interleaved(t: Tensor, distance: int) -> bool:
    """Whether a view like `t`, `distance` bytes away, lies beside it as channel slices do."""
    dims = [(stride, size) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
    if not dims:
        return False
    outer = max(dims)[0] * t.element_size()
    length = (
        1 + sum((size - 1) * stride for stride, size in dims if stride != max(dims)[0])
    ) * t.element_size()
    return distance % outer >= length and outer - distance % outer >= length


# --- the low-rank Hessian ------------------------------------------------------------------------------------

MAX_RANK = 16
_VARIANTS = ("lowrank_matvec", "lowrank_solve", "lowrank_inv_sqrt")
_VECTORS = ("v", "g", "z")


def rank_of(v: Tensor, basis: Tensor, batch_dims: int) -> int:
    """k of a stack [B, k, *sample], or [k, *sample] shared by the batch of `v`."""
    return int(basis.shape[0]) if basis.dim() == v.dim() - batch_dims + 1 else int(basis.shape[batch_dims])


def stack(op: str, basis: Any, first: str, v: Tensor, batch_dims: int) -> int:
    """Rows of U that go with the vectors `v`; returns k."""
    floating(op, "U", basis)
    own = basis.dim() == v.dim() + 1 and basis.shape[:batch_dims] == v.shape[:batch_dims]
    own = own and basis.shape[batch_dims + 1 :] == v.shape[batch_dims:]
    shared = basis.dim() == v.dim() - batch_dims + 1 and basis.shape[1:] == v.shape[batch_dims:]
    if not own and not shared:
        rule = f"have shape [B, k, *sample] or [k, *sample], with {first} {list(v.shape)}"
        raise errors.value(op, "U", rule, list(basis.shape))
    k = rank_of(v, basis, batch_dims)
    if k > MAX_RANK:
        raise errors.value(op, "U", f"have at most {MAX_RANK} rows", k)
    if basis.device != v.device:
        raise errors.value(op, "U", f"be on the device of {first} ({v.device})", basis.device)
    if (v.dtype, basis.dtype) not in PAIRS:
        raise errors.kind(
            op, "U", f"have a dtype that pairs with {first} ({name(v.dtype)})", name(basis.dtype)
        )
    return k


def stack_alone(op: str, basis: Any, batch_dims: int) -> int:
    """A stack [B, k, *sample], or [k, *sample] with batch_dims=0; returns k."""
    floating(op, "U", basis)
    if batch_dims not in (0, 1):
        raise errors.value(op, "batch_dims", "be 0 or 1", batch_dims)
    if basis.dim() < batch_dims + 1:
        rule = "have shape [B, k, *sample]" if batch_dims else "have shape [k, *sample]"
        raise errors.value(op, "U", rule, list(basis.shape))
    k = int(basis.shape[batch_dims])
    if k > MAX_RANK:
        raise errors.value(op, "U", f"have at most {MAX_RANK} rows", k)
    return k


def host_number(op: str, argument: str, value: Any, positive: bool) -> None:
    """A number that the host knows, also where it will travel to the device with others: finite, and not negative."""
    if isinstance(value, Tensor):
        if value.dim() > 0 or value.device.type != "cpu" or not host_values(value.reshape(1)):
            return
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not 0.0 <= value < math.inf or (positive and value == 0.0):
            raise errors.value(op, argument, f"be finite and {'>' if positive else '>='} 0", value)


def lowrank_scalars(op: str, coef: Any, k: int, positive: bool) -> None:
    """Damping is finite and positive (for a product: not negative), s is finite."""
    for row in host_values(coef):
        if not 0.0 <= row[0] < math.inf or (positive and row[0] == 0.0):
            raise errors.value(op, "damping", f"be finite and {'>' if positive else '>='} 0", row[0])
        for x in row[1 : 1 + k]:
            if _bad_weight(coef, x):
                raise errors.value(op, "s", "be finite", x)


def _bad_weight(coef: Any, x: float) -> bool:
    """NaN that belongs to one sample of many is data, as an update of bad data leaves it."""
    return coef.dim() == 1 if math.isnan(x) else math.isinf(x)


def lowrank_apply(v: Any, basis: Any, coef: Any, variant: int, check: bool, batch_dims: int) -> None:
    """What a product, a solve and an inverse root take."""
    if variant not in (0, 1, 2):
        raise errors.value("lowrank_apply", "variant", "be 0, 1 or 2", variant)
    op, first = _VARIANTS[variant], _VECTORS[variant]
    floating(op, first, v)
    batched(op, first, v, batch_dims)
    k = stack(op, basis, first, v, batch_dims)
    coefficients(op, coef, 1 + k, v, batch_dims)
    lowrank_scalars(op, coef, k, variant != 0)


def lowrank_vjp(grad: Any, v: Any, basis: Any, coef: Any, variant: int, batch_dims: int) -> None:
    """What their vector–Jacobian product takes."""
    if variant not in (0, 1, 2):
        raise errors.value("lowrank_vjp", "variant", "be 0, 1 or 2", variant)
    op = _VARIANTS[variant]
    floating(op, "grad", grad)
    batched(op, "grad", grad, batch_dims)
    like(op, "v", v, "grad", grad)
    k = stack(op, basis, "grad", grad, batch_dims)
    coefficients(op, coef, 1 + k, grad, batch_dims)


def _stack_scalars(op: str, basis: Any, coef: Any, more: int, batch_dims: int) -> int:
    k = stack_alone(op, basis, batch_dims)
    if k == 0:
        raise errors.value(op, "U", "have at least one row", 0)
    coefficients(op, coef, more + k, basis.select(batch_dims, 0), batch_dims)
    return k


def lowrank_logdet(basis: Any, coef: Any, check: bool, batch_dims: int) -> None:
    """What the determinant takes."""
    op = "lowrank_logdet"
    k = _stack_scalars(op, basis, coef, 1, batch_dims)
    lowrank_scalars(op, coef, k, True)


def lowrank_logdet_vjp(basis: Any, coef: Any, batch_dims: int) -> None:
    """What its vector–Jacobian product takes."""
    _stack_scalars("lowrank_logdet", basis, coef, 2, batch_dims)


def lowrank_update(v: Any, basis: Any, coef: Any, rank: int, batch_dims: int) -> None:
    """What the update takes."""
    op = "lowrank_update"
    floating(op, "v", v)
    batched(op, "v", v, batch_dims)
    k = stack(op, basis, "v", v, batch_dims)
    if not 0 <= rank <= MAX_RANK:
        raise errors.value(op, "rank", f"be between 0 and {MAX_RANK}", rank)
    coefficients(op, coef, 2 + k, v, batch_dims)
    for row in host_values(coef):
        for j, x in enumerate(row):
            if (not math.isfinite(x) if j < 2 else _bad_weight(coef, x)) or x < 0.0:
                raise errors.value(op, ("decay", "weight", "s")[min(j, 2)], "be finite and >= 0", x)
