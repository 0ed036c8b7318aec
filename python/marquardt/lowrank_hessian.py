"""A low-rank Hessian with a memory: k vectors per sample that are kept up to date, and the rule for its damping."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from . import checks, errors
from .checks import MAX_RANK
from .layout import batch_and_size
from .lowrank import (
    lowrank_inv_sqrt,
    lowrank_logdet,
    lowrank_matvec,
    lowrank_solve,
    lowrank_update,
)
from .scalars import Scalar

Tensor = torch.Tensor


class LowRankHessian(torch.nn.Module):
    r"""H = λI + U diag(s) Uᵀ per sample, where U diag(s) Uᵀ is the best rank-k part of a decaying sum of v vᵀ.

    `update(v)` folds v in: U diag(s) Uᵀ ← best rank-`rank` part of decay·U diag(s) Uᵀ + weight·v vᵀ. Before the first
    update H is λI. A sampler keeps one H for each sample of the batch (`batch_dims=1`), an optimiser one in all
    (`batch_dims=0`). The state is two buffers, `U` [B, rank, *sample] and `s` [B, rank]; it belongs to one shape, dtype
    and device until `reset()`.

    Args:
        rank: rows kept, at most 16.
        damping: λ: number, 0-dim tensor or [B]; an attribute, to be changed as one likes (see `update_damping`). Under
            `torch.compile` make it a 0-dim tensor: a number that changes is another graph.
        decay: in [0, 1]: what is left of the past at each update; weight: of the new vector.

    >>> import torch, marquardt as mq
    >>> hessian = mq.LowRankHessian(2, damping=1.0, decay=0.9)
    >>> hessian.update(torch.tensor([[3.0, 0.0, 0.0]]))
    >>> hessian.solve(torch.tensor([[10.0, 2.0, 0.0]]))
    tensor([[1., 2., 0.]])
    """

    U: Tensor | None
    s: Tensor | None

    def __init__(
        self, rank: int, *, damping: Scalar, decay: Scalar, weight: Scalar = 1.0, batch_dims: int = 1
    ) -> None:
        super().__init__()
        if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
            raise errors.value("LowRankHessian", "rank", f"be a whole number from 1 to {MAX_RANK}", rank)
        if batch_dims not in (0, 1):
            raise errors.value("LowRankHessian", "batch_dims", "be 0 or 1", batch_dims)
        self.rank, self.batch_dims = rank, batch_dims
        self.damping, self.decay, self.weight = damping, decay, weight
        self.register_buffer("U", None)
        self.register_buffer("s", None)

    def extra_repr(self) -> str:
        """For `print`."""
        return f"rank={self.rank}, damping={self.damping}, decay={self.decay}, batch_dims={self.batch_dims}"

    def reset(self) -> None:
        """Forget everything: H = λI, for vectors of any shape."""
        self.U = self.s = None

    @torch.no_grad()
    def update(self, v: Tensor) -> None:
        """Fold `v` [B, *sample] in. Nothing is differentiated through it."""
        U, s = self._state("update", "v", v)
        self.U, self.s = lowrank_update(
            U, s, v.detach(), decay=self.decay, weight=self.weight, rank=self.rank, batch_dims=self.batch_dims
        )

    def solve(self, g: Tensor, **options: Any) -> Any:
        """H⁻¹ g; options as in `lowrank_solve`."""
        U, s = self._state("solve", "g", g)
        return lowrank_solve(g, U, s, damping=self.damping, batch_dims=self.batch_dims, **options)

    def inv_sqrt(self, z: Tensor, **options: Any) -> Any:
        """H^(−1/2) z; options as in `lowrank_inv_sqrt`."""
        U, s = self._state("inv_sqrt", "z", z)
        return lowrank_inv_sqrt(z, U, s, damping=self.damping, batch_dims=self.batch_dims, **options)

    def matvec(self, v: Tensor) -> Tensor:
        """H v."""
        U, s = self._state("matvec", "v", v)
        return lowrank_matvec(v, U, s, damping=self.damping, batch_dims=self.batch_dims)

    def logdet(self) -> Tensor:
        """log det H, float64 [B] or 0-dim."""
        U, s = self._kept("logdet")
        found: Tensor = lowrank_logdet(U, s, damping=self.damping, batch_dims=self.batch_dims)
        return found

    def trace(self) -> Tensor:
        """tr H = λ D + Σ_j s_j ‖u_j‖², float64 [B] or 0-dim."""
        U, s = self._kept("trace")
        squares = U.double().square().reshape(*s.shape, -1).sum(-1)
        size = batch_and_size(U.select(self.batch_dims, 0), self.batch_dims)[1]
        damping = self.damping
        damping = damping.to(s) if isinstance(damping, Tensor) else damping
        return damping * size + (s * squares).sum(-1)

    def _kept(self, call: str) -> tuple[Tensor, Tensor]:
        if self.U is None or self.s is None:
            raise RuntimeError(f"LowRankHessian.{call}: the size of a sample is not known before an update")
        return self.U, self.s

    def _state(self, call: str, argument: str, v: Tensor) -> tuple[Tensor, Tensor]:
        """U and s for vectors like `v`, with no rows before the first update."""
        op = f"LowRankHessian.{call}"
        checks.floating(op, argument, v)
        checks.batched(op, argument, v, self.batch_dims)
        if self.U is None or self.s is None:
            batch = v.shape[: self.batch_dims]
            return (
                v.new_empty((*batch, 0, *v.shape[self.batch_dims :])),
                torch.empty((*batch, 0), dtype=torch.float64, device=v.device),
            )
        like = (*self.U.shape[: self.batch_dims], *self.U.shape[self.batch_dims + 1 :])
        if tuple(v.shape) != like:
            rule = f"have the shape that H was built from ({list(like)}), or reset() be called"
            raise errors.value(op, argument, rule, list(v.shape))
        if v.device != self.U.device:
            raise errors.value(op, argument, f"be on the device of H ({self.U.device})", v.device)
        if call == "update" and v.dtype != self.U.dtype:
            rule = f"have the dtype of H ({checks.name(self.U.dtype)}), or reset() be called"
            raise errors.kind(op, argument, rule, checks.name(v.dtype))
        return self.U, self.s

    def _apply(self, fn: Any, recurse: bool = True) -> LowRankHessian:
        """A change of dtype is one of U: eigenvalues range over more than a narrow type holds."""
        s = self.s
        super()._apply(fn, recurse)
        if s is not None and self.s is not None and self.s.dtype != torch.float64:
            self.s = s.to(self.s.device)
        return self

    def _numbers(self) -> list[str]:
        return [name for name in ("damping", "decay", "weight") if name not in self._parameters]

    def get_extra_state(self) -> dict[str, Any]:
        """The numbers, for `state_dict`."""
        numbers = {name: getattr(self, name) for name in self._numbers()}
        return {
            k: v.detach() if isinstance(v, Tensor) else torch.tensor(v, dtype=torch.float64)
            for k, v in numbers.items()
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The numbers from a `state_dict`; a plain number stays one."""
        for name in self._numbers():
            if name not in state:
                continue
            value, old = state[name], getattr(self, name)
            if not isinstance(old, Tensor) and value.dim() == 0:
                setattr(self, name, value.item())
            else:
                setattr(
                    self,
                    name,
                    value.detach().clone().to(old.device if isinstance(old, Tensor) else value.device),
                )

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local: Any,
        strict: bool,
        missing: list[str],
        *rest: Any,
    ) -> None:
        """A state of any shape is taken, to the device of the present one; one without vectors empties this module."""
        kept = {name: state_dict.get(prefix + name) for name in ("U", "s")}
        device = None if self.U is None else self.U.device
        for name, tensor in kept.items():
            setattr(self, name, None if tensor is None else torch.empty_like(tensor, device=device))
        super()._load_from_state_dict(state_dict, prefix, local, strict, missing, *rest)
        if (kept["U"] is None) != (kept["s"] is None):
            missing.append(prefix + ("U" if kept["U"] is None else "s"))
            self.reset()


def update_damping(
    damping: Scalar,
    actual: Scalar,
    predicted: Scalar,
    *,
    low: float = 0.25,
    high: float = 0.75,
    down: float = 1 / 3,
    up: float = 2.0,
) -> Tensor:
    r"""Levenberg's and Marquardt's rule: trust the quadratic model more where it predicted well.

        ρ = actual/predicted;   λ·down where ρ > high,   λ·up unless ρ ≥ low,   else λ

    Both reductions may be given as reductions or as changes, their signs cancel. A ρ that is NaN (a failed step) raises
    the damping. Element by element, without a branch: it may run inside a captured graph.

    Args:
        damping, actual, predicted: numbers or tensors that broadcast, e.g. [B].

    Returns:
        The new damping, a tensor.

    >>> import torch, marquardt as mq
    >>> mq.update_damping(4.0, torch.tensor([0.9, 0.5, 0.1]), 1.0, down=0.5)
    tensor([2., 4., 8.], dtype=torch.float64)
    """
    given = [x for x in (damping, actual, predicted) if isinstance(x, Tensor)]
    device = given[0].device if given else torch.device("cpu")
    for name, value in (("low", low), ("high", high), ("down", down), ("up", up)):
        if not value > 0:
            raise errors.value("update_damping", name, "be > 0", value)
    if low > high:
        raise errors.value("update_damping", "low", f"be at most high ({high})", low)

    def tensor(x: Scalar) -> Tensor:
        return x if isinstance(x, Tensor) else torch.tensor(float(x), dtype=torch.float64, device=device)

    kept = tensor(damping)
    kept = kept if kept.is_floating_point() else kept.double()
    ratio = tensor(actual) / tensor(predicted)
    same = torch.ones_like(ratio, dtype=kept.dtype)
    return kept * torch.where(ratio > high, down * same, torch.where(ratio >= low, same, up * same))
