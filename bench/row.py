"""What is measured: a row of the benchmark, as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], Any]


@dataclass(frozen=True)
class Goal:
    """A number the row has to reach against one peer or floor.

    Against a peer the value is peer / ours (times faster), against a floor floor / ours (a fraction).
    With `slower` it is ours / theirs, and the bound is the most that is allowed: a cost, not a gain.
    """

    against: str
    bound: float
    slower: bool = False

    def met(self, value: float) -> bool:
        return value <= self.bound if self.slower else value >= self.bound

    def __str__(self) -> str:
        return f"{self.against} {'<=' if self.slower else '>='} {self.bound:g}"


@dataclass(frozen=True)
class Peer:
    """Another way to the same result. `tolerance` None: not comparable by value (it draws its own noise).

    A peer beyond its tolerance is timed all the same and reported as inexact, since that is what people
    run; a wrong result of ours is never timed.
    """

    call: Call
    tolerance: float | None


@dataclass(frozen=True)
class Floor:
    """A time that the machine allows: contestants timed in the same rounds, and what follows from them.

    Contestants of one name are shared by the floors of a row. `how` says what was measured; `substitute`
    that it was not the tuned kernel, so the percentage is only an indication.
    """

    name: str
    contestants: dict[str, Call]
    seconds: Callable[[dict[str, float]], float]
    how: str
    substitute: bool = False


@dataclass(frozen=True)
class Contest:
    """One set of buffers and everything that works on them.

    subject returns a tensor or several, oracle the same in float64 (first dimension: samples).
    """

    subject: Call
    oracle: Callable[[], Sequence[Tensor]]
    tolerance: float
    peers: dict[str, Peer] = field(default_factory=dict)
    floors: tuple[Floor, ...] = ()
    numbers: int = 0  # of the last outputs are numbers per sample, float64 whatever the row's dtype


@dataclass(frozen=True)
class Row:
    """`build` allocates and returns a fresh contest; nothing is allocated before the row runs.

    traffic: bytes that have to move at least (each input read once, each output written once).
    flops:   arithmetic of the fused form.
    """

    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    build: Callable[[], Contest]
    traffic: int
    flops: int
    variant: str = ""
    device: str = "cpu"
    goals: tuple[Goal, ...] = ()

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def id(self) -> str:
        parts = [self.op, "x".join(map(str, self.shape)), self.dtype_name, self.variant]
        if self.device != "cpu":
            parts.append(self.device)
        return "-".join(part.replace(" ", "_") for part in parts if part)
