"""Timing on a GPU: buffers that the L2 cache has forgotten, CUDA graphs where launches would be what is timed.

Rotation. A contestant walks over so many sets of buffers that together they are `COLD` times the L2 cache; when a set
comes round again none of it is left there, as in a sampler where a network ran in between.

Replay. A launch costs the host several microseconds, more than a small kernel runs. So rows of little traffic are
captured into a CUDA graph, one node or more for every set, and its replays are timed: what is left is what the device
does. What a captured call returns is kept, so that every call of a peer writes memory of its own, as ours does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .row import Call, Row

COLD = 2.5
MOST_SETS = 1024
GRAPH_TRAFFIC = 256 << 20  # bytes; above, a call runs longer than it takes to launch
GRAPH_CALLS = 16  # at least, so that the replay's own start does not count


def sets(traffic: int, cache: int) -> int:
    """Sets of buffers for a row that moves `traffic` bytes, on a device with an L2 cache of `cache` bytes."""
    return max(2, min(MOST_SETS, math.ceil(COLD * cache / max(traffic, 1))))


def buffer_sets(row: Row) -> int:
    return sets(row.traffic, torch.cuda.get_device_properties(row.device).L2_cache_size)


def launch_bound(row: Row) -> bool:
    return row.traffic < GRAPH_TRAFFIC


def walk(calls: Sequence[Call]) -> list[Call]:
    """Every call at least once, in rounds, `GRAPH_CALLS` or more."""
    return list(calls) * math.ceil(GRAPH_CALLS / len(calls))


class Replay:
    """The calls as one CUDA graph."""

    def __init__(self, calls: Sequence[Call]) -> None:
        calls = walk(calls)
        self.count = len(calls)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for call in calls[:3]:  # what is made at the first call cannot be made while capturing
                call()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.kept: list[Any] = [call() for call in calls]

    def __call__(self) -> None:
        self.graph.replay()


def captured(
    contestants: Mapping[str, Sequence[Call]], capture: Callable[[Sequence[Call]], Replay] = Replay
) -> dict[str, list[Call]]:
    """Each contestant as a graph."""
    return {name: [capture(calls)] for name, calls in contestants.items()}


def event_seconds(calls: Sequence[Call], repeats: int) -> float:
    """Device time of `repeats` calls that walk over the buffer sets. A short sleep on the device lets the
    host run ahead, so that launches queue up and the device is never found waiting for the host."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000)
    start.record()
    for k in range(repeats):
        calls[k % len(calls)]()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3


def replay_seconds(calls: Sequence[Call], repeats: int) -> float:
    """The same for graphs: seconds of `repeats` calls, from as many replays as hold them."""
    (replay,) = calls
    count = getattr(replay, "count", 1)
    replays = math.ceil(repeats / count)
    return event_seconds(calls, replays) * repeats / (replays * count)
