"""How a row is measured.

1. Gate. Every output of ours is compared with a float64 reference, norm-wise and per sample. A wrong
   result raises WrongResult and is never timed. Peers have their own, looser tolerance (see peers.py):
   beyond it they are timed, since that is what people run, and reported as inexact.
2. Warm-up. Every contestant (ours, the peers, the floors) is called until its time is up; this also finds
   how often to call it so that one timing lasts at least `Settings.min_time`.
3. Interleaved rounds. Each round times every contestant once, in an order that rotates from round to round,
   so that a change of clock speed or a noisy neighbour meets all of them alike. Before each timing comes one
   untimed call of the same contestant: it is measured with its own buffers in the caches, as in a loop, and
   not with those of the contestant before it. The garbage collector is off meanwhile.
4. Medians. A time is the median over the rounds, its spread the interquartile range over the median. Ratios
   are ratios of medians of the same rounds.

CPU timings are perf_counter_ns around a loop; the cost of the empty loop is measured and subtracted, or it
would flatter the call cost. CUDA timings are events around calls, or around replays of a CUDA graph of them, that
walk over several sets of buffers, so that no call finds its inputs in the L2 cache (cuda.py).
"""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from . import cuda
from .row import Call, Contest, Goal, Row

OURS = "marquardt"


class WrongResult(AssertionError):
    """The subject's result is not the reference's: there is nothing to time."""


@dataclass(frozen=True)
class Settings:
    min_rounds: int = 15
    max_rounds: int = 101
    row_time: float = 2.0  # seconds of rounds per row, unless min_rounds take longer
    min_time: float = 1e-3  # seconds of one timing
    warm_up: float = 0.05  # seconds per contestant


QUICK = Settings()
GPU = Settings(min_rounds=11, max_rounds=51, row_time=0.7)  # of a quick run: a device is steadier
FULL = Settings(min_rounds=31, max_rounds=301, row_time=6.0, min_time=4e-3, warm_up=0.3)


@dataclass(frozen=True)
class Result:
    row: Row
    samples: dict[str, list[float]]  # seconds per call, one per round
    error: float  # ours, norm-wise, of the worst sample
    tolerance: float
    peer_errors: dict[str, float | None]  # None: not comparable by value
    inexact: frozenset[str]
    floors: dict[str, float]  # seconds
    floor_notes: dict[str, str]
    substitutes: frozenset[str]
    repeats: dict[str, int]
    timing: str = "loop"  # on the CPU; on a GPU "events" around a loop, or "graph": replays of a CUDA graph
    buffer_sets: int = 1

    def median(self, name: str = OURS) -> float:
        return statistics.median(self.samples[name])

    def spread(self, name: str = OURS) -> float:
        """Interquartile range over median."""
        if len(self.samples[name]) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.samples[name], n=4, method="inclusive")
        return (high - low) / self.median(name)

    def value(self, goal: Goal) -> float:
        theirs = self.floors[goal.against] if goal.against in self.floors else self.median(goal.against)
        return self.median() / theirs if goal.slower else theirs / self.median()

    def can_judge(self, goal: Goal) -> bool:
        """A peer may be left out of a quick run; a substitute is no floor to judge by."""
        return goal.against not in self.substitutes and (
            goal.against in self.floors or goal.against in self.samples
        )


def outputs(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def error(got: Tensor, want: Tensor) -> float:
    """max over samples b of |got_b − want_b| / |want_b|, both [B, ...]; inf for another shape or a NaN."""
    if got.shape != want.shape:
        return math.inf
    if want.numel() == 0:
        return 0.0
    got, want = got.detach().double(), want.detach().double()
    rows = want.shape[0] if want.dim() else 1
    distance = (got - want).reshape(rows, -1).norm(dim=1)
    size = want.reshape(rows, -1).norm(dim=1)
    relative = torch.where(size > 0, distance / size, distance)
    return math.inf if not bool(torch.isfinite(relative).all()) else float(relative.max())


def worst(got: Sequence[Tensor], want: Sequence[Tensor]) -> float:
    if len(got) != len(want):
        return math.inf
    return max((error(g, w) for g, w in zip(got, want, strict=True)), default=0.0)


def gate(contest: Contest, dtype: torch.dtype) -> tuple[float, dict[str, float | None], frozenset[str]]:
    """Ours, the peers' errors, and which peers are inexact; WrongResult if ours is wrong."""
    want = [t.detach() for t in contest.oracle()]
    if any(t.dtype is not torch.float64 for t in want):
        raise TypeError("the oracle of a benchmark row computes in float64")
    got = outputs(contest.subject())
    due = [dtype] * (len(got) - contest.numbers) + [torch.float64] * contest.numbers
    if [t.dtype for t in got] != due:
        raise WrongResult(f"the result is {[str(t.dtype) for t in got]}, not {dtype}")
    ours = worst(got, want)
    if not ours <= contest.tolerance:
        raise WrongResult(
            f"relative error {ours:.2g} against float64, allowed {contest.tolerance:.2g}: not timed"
        )
    errors: dict[str, float | None] = {}
    inexact = set()
    for name, peer in contest.peers.items():
        if peer.tolerance is None:
            peer.call()
            errors[name] = None
            continue
        errors[name] = found = worst(outputs(peer.call()), want)
        if not found <= peer.tolerance:
            inexact.add(name)
    return ours, errors, frozenset(inexact)


def _nothing() -> None:
    return None


def loop_seconds(calls: Sequence[Call], repeats: int) -> float:
    """Wall time of `repeats` calls on the CPU."""
    call = calls[0]
    times = itertools.repeat(None, repeats)
    start = time.perf_counter_ns()
    for _ in times:
        call()
    return (time.perf_counter_ns() - start) * 1e-9


def empty_call_seconds(samples: int = 15, repeats: int = 5000) -> float:
    """What one turn of the loop costs by itself."""
    return statistics.median(loop_seconds([_nothing], repeats) for _ in range(samples)) / repeats


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def warm_up(
    calls: Sequence[Call], seconds: Callable[[Sequence[Call], int], float], settings: Settings
) -> int:
    """Call until warm; returns how many calls make one timing of at least min_time."""
    end = time.perf_counter() + settings.warm_up
    repeats = 1
    while True:
        taken = max(seconds(calls, repeats), 1e-9)
        if taken < settings.min_time:
            # Never more than tenfold at once: the first calls are slow and their time says little.
            repeats = min(math.ceil(1.1 * repeats * settings.min_time / taken), 10 * repeats)
        elif time.perf_counter() >= end:
            return max(1, math.ceil(repeats * settings.min_time / taken))


def interleave(
    contestants: Mapping[str, Sequence[Call]],
    settings: Settings,
    seconds: Callable[[Sequence[Call], int], float] = loop_seconds,
    overhead: float = 0.0,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds per call of every contestant, one sample per round, and the calls per timing."""
    names = list(contestants)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with no_garbage_collection():
        repeats = {name: warm_up(contestants[name], seconds, settings) for name in names}
        end = time.perf_counter() + settings.row_time
        for k in range(settings.max_rounds):
            if k >= settings.min_rounds and time.perf_counter() >= end:
                break
            first = k % len(names)
            for name in names[first:] + names[:first]:
                calls = contestants[name]
                calls[-1]()  # its own buffers into the caches, see the module's docstring
                taken = seconds(calls, repeats[name]) / repeats[name]
                samples[name].append(max(taken - overhead, 1e-10))
    return samples, repeats


def buffer_sets(row: Row) -> int:
    """One on a CPU; on a GPU so many that the L2 cache does not hold them."""
    return 1 if row.device == "cpu" else cuda.buffer_sets(row)


def contestants_of(contests: Sequence[Contest]) -> dict[str, list[Call]]:
    """Everything that is timed, by name, one call per buffer set."""
    found: dict[str, list[Call]] = {OURS: [c.subject for c in contests]}
    for name in contests[0].peers:
        found[name] = [c.peers[name].call for c in contests]
    for k, floor in enumerate(contests[0].floors):
        for name in floor.contestants:
            found[name] = [c.floors[k].contestants[name] for c in contests]
    return found


def check(row: Row) -> None:
    """The gate alone."""
    gate(row.build(), row.dtype)


def measure(row: Row, settings: Settings = QUICK) -> Result:
    """Gate, then time. Compiled peers start from an empty cache, so each sees one shape, as a constant."""
    torch.compiler.reset()
    contests = [row.build() for _ in range(buffer_sets(row))]
    ours, peer_errors, inexact = gate(contests[0], row.dtype)
    contestants, timing, seconds, overhead = contestants_of(contests), "loop", loop_seconds, 0.0
    if row.device == "cpu":
        overhead = empty_call_seconds()
    elif cuda.launch_bound(row):
        contestants, timing, seconds = cuda.captured(contestants), "graph", cuda.replay_seconds
    else:
        timing, seconds = "events", cuda.event_seconds
    samples, repeats = interleave(contestants, settings, seconds, overhead)
    medians = {name: statistics.median(values) for name, values in samples.items()}
    floors = contests[0].floors
    return Result(
        row=row,
        samples=samples,
        error=ours,
        tolerance=contests[0].tolerance,
        peer_errors=peer_errors,
        inexact=inexact,
        floors={floor.name: floor.seconds(medians) for floor in floors},
        floor_notes={floor.name: floor.how for floor in floors},
        substitutes=frozenset(floor.name for floor in floors if floor.substitute),
        repeats=repeats,
        timing=timing,
        buffer_sets=len(contests),
    )
