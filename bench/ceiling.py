"""The bandwidth that a copy reaches on this GPU: what every memory-bound kernel is measured against.

Bytes are those read and written. Three ways to copy: the driver's device-to-device copy, torch's elementwise kernel,
and a Triton kernel; `kernels` are the two that an op can be compared with under graph replay.
`python -m bench.ceiling` prints them as JSON.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import pathlib
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import cuda
from .row import Call

SIZES = tuple(1 << k for k in (24, 26, 28, 30, 32))  # bytes moved
BLOCK, WARPS = 2048, 8


@functools.cache
def triton_copy() -> Callable[[Tensor, Tensor], None] | None:
    """copy(x, y) by a Triton kernel, None without Triton."""
    if importlib.util.find_spec("triton") is None:
        return None
    from .copy_triton import copy_kernel

    def copy(x: Tensor, y: Tensor) -> None:
        n = x.numel()
        copy_kernel[(-(-n // BLOCK),)](x, y, n, BLOCK=BLOCK, num_warps=WARPS)

    return copy


def kernels(x: Tensor, y: Tensor) -> dict[str, Call]:
    """Ways to write x into y by a kernel. Flat float32 tensors of one size."""
    found: dict[str, Call] = {"copy, torch": lambda: torch.neg(x, out=y)}
    if (copy := triton_copy()) is not None:
        found["copy, Triton"] = lambda: copy(x, y)
    return found


def pair(traffic: int, device: str) -> tuple[Tensor, Tensor]:
    """Two buffers whose copy moves `traffic` bytes."""
    words = max(4, traffic // 8)
    return torch.ones(words, device=device), torch.empty(words, device=device)


def gbps(traffic: int, device: str = "cuda", rounds: int = 9) -> dict[str, float]:
    """GB/s of each way to copy, cold, median of `rounds`."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    pairs = [pair(traffic, device) for _ in range(cuda.sets(traffic, cache))]
    ways: dict[str, list[Call]] = {"device copy": [lambda x=x, y=y: y.copy_(x) for x, y in pairs]}  # type: ignore[misc]
    for name in kernels(*pairs[0]):
        ways[name] = [kernels(x, y)[name] for x, y in pairs]
    found = {}
    for name, calls in ways.items():
        replay = cuda.Replay(calls)
        replay()
        seconds = statistics.median(cuda.replay_seconds([replay], 1) for _ in range(rounds))
        found[name] = traffic / seconds * 1e-9
    return found


@functools.cache
def measured(device: str = "cuda") -> dict[str, Any]:
    """{"gbps": the best of the largest sizes, "by_size": {bytes: {way: GB/s}}}, once per process; what an earlier
    process printed is taken from the file that MARQUARDT_BENCH_CEILING names."""
    if earlier := os.environ.get("MARQUARDT_BENCH_CEILING"):
        return dict(json.loads(pathlib.Path(earlier).read_text()))
    free, _ = torch.cuda.mem_get_info()
    sizes = [size for size in SIZES if size * (2 + cuda.COLD) < free]
    by_size = {str(size): gbps(size, device) for size in sizes}
    torch.cuda.empty_cache()
    return {"gbps": max(max(ways.values()) for ways in list(by_size.values())[-2:]), "by_size": by_size}


if __name__ == "__main__":
    print(json.dumps(measured(), indent=1))
