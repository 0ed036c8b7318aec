"""The times this machine cannot beat, as contestants of the same interleaved rounds.

Triad. A tuned streaming kernel that reads every input of the row once and writes its outputs once, over
the same buffers, with all threads: the better of streaming and cached stores. It is what an op without Gram
cannot beat, and what an op with a Gram pays for its first-touch bytes.

Traffic. An op with a Gram must see its inputs twice, since the coefficients of the output depend on the
whole sample. Its bytes move at two levels of the memory hierarchy, and the two-level traffic model is

    t = first-touch bytes / bandwidth of the level where the batch lives
      + second-sweep bytes / bandwidth of the level where one sample lives.

For a batch [B, D] of items of s bytes, lm_direction touches eps, prev and out once (3·B·D·s bytes: the first
term is therefore the triad's time on the row's own buffers, one call included) and sweeps over eps and prev
again while the sample is still near (2·B·D·s bytes). The second bandwidth is that of a pure read over a
working set of one sample's size: 2·D·s bytes for each thread when every thread owns a sample (B ≥ threads), a
share of that for each when a sample is split over threads. It is read many times over within one call, so no
call cost is in it. Both are measured with all threads, in the same interleaved rounds as the op.

Per cent of model = model time / measured time: at 100 % the kernel moves its bytes as fast as the machine
can, each at the nearest level where it can be.

Without the native kernels, or on another device, torch.add over as many bytes stands for the triad and
torch.sum for the read sweep; such a floor is marked as a substitute and no goal is judged by it. On a GPU the floor is
a copy kernel over as many bytes as the row moves (ceiling.py), from buffers that the L2 cache has forgotten.
"""

from __future__ import annotations

import math
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .row import Call, Floor

SWEEP_BYTES = 64 << 20  # one call of the read sweep moves about this much


@dataclass(frozen=True)
class Cache:
    level: int
    size: int  # bytes
    cores: int  # how many share one


def caches() -> list[Cache]:
    """The data caches of core 0, nearest first; empty where the system does not tell."""
    found = []
    for index in sorted(pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size, shared = (
                (index / name).read_text().strip() for name in ("type", "level", "size", "shared_cpu_list")
            )
        except OSError:
            continue
        if kind != "Instruction":
            found.append(Cache(int(level), _bytes(size), _count(shared)))
    return sorted(found, key=lambda cache: cache.level)


def _bytes(text: str) -> int:
    """'48K' -> 49152"""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
    return int(text[:-1]) * unit if unit else int(text)


def _count(cpu_list: str) -> int:
    """'0-3,8' -> 5"""
    spans = [part.split("-") for part in cpu_list.split(",") if part]
    return sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def level(total: int, threads: int, known: Sequence[Cache] | None = None) -> str:
    """Where a working set of `total` bytes, split evenly over threads, lives: 'L1', 'L2', ..., 'memory'."""
    for cache in caches() if known is None else known:
        share = math.ceil(total * min(cache.cores, threads) / threads)
        if share <= cache.size:
            return f"L{cache.level}"
    return "memory"


def _native(name: str, device: torch.device) -> Callable[..., object] | None:
    return getattr(torch.ops.marquardt, name, None) if device.type == "cpu" else None


def _words(t: Tensor) -> Tensor:
    """The same bytes as float32 (all the floor kernels know), flat. t: contiguous, a multiple of 4 bytes."""
    return t.detach().reshape(-1).view(torch.float32)


def triad(inputs: Sequence[Tensor], *outs: Tensor) -> Floor:
    """The streaming floor of an op that reads `inputs` and writes `outs`, one or two. Tensors: contiguous, of one size.

    It writes into `outs` themselves, so that its buffers lie where the op's do.
    """
    kernel = _native("_stream_floor", outs[0].device)
    if kernel is None:
        total = (len(inputs) + len(outs)) * outs[0].numel() * outs[0].element_size()
        a, b, c = (torch.ones(max(1, total // 12), device=outs[0].device) for _ in range(3))
        calls: dict[str, Call] = {"torch.add as triad": lambda: torch.add(a, b, out=c)}
        how = "torch.add over as many bytes"
    else:
        words, targets = [_words(t) for t in inputs], [_words(t) for t in outs]
        calls = {
            "triad, streaming stores": lambda: kernel(words, targets, True),
            "triad, cached stores": lambda: kernel(words, targets, False),
        }
        how = f"tuned streaming kernel, {len(inputs)} in, {len(outs)} out, the better of two kinds of stores"
    return Floor("triad", calls, lambda t: min(t[name] for name in calls), how, substitute=kernel is None)


def copy(traffic: int, device: torch.device) -> Floor:
    """A copy kernel over as many bytes as the row moves, on a GPU: the better of torch's and Triton's."""
    from . import ceiling

    calls = ceiling.kernels(*ceiling.pair(traffic, str(device)))
    return Floor("copy", calls, lambda t: min(t[name] for name in calls), "copy kernel over as many bytes")


def noise(count: int) -> Floor:
    """Drawing as many normals and keeping none: Philox and Box–Muller alone."""
    kernel = getattr(torch.ops.marquardt, "_noise_floor", None)
    if kernel is None:
        buffer = torch.empty(count)
        calls: dict[str, Call] = {"normal_": lambda: buffer.normal_()}
    else:
        calls = {"Philox and Box–Muller": lambda: kernel(count, 7)}
    how = "normals drawn into the first cache"
    return Floor("noise", calls, lambda t: min(t[name] for name in calls), how, substitute=kernel is None)


def sample_words(batch: int, sample_bytes: int, threads: int) -> int:
    """float32 words of one stream in the read sweep: one sample per thread, or one split over them."""
    return max(1, min(batch, threads) * sample_bytes // 4)


def traffic(first: Floor, inputs: Sequence[Tensor], out: Tensor) -> Floor:
    """The two-level model of an op that sweeps over `inputs` twice; `first` is its triad. All [B, ...]."""
    batch, sample_bytes = out.shape[0], out[0].numel() * out.element_size()
    threads = torch.get_num_threads()
    streams = [torch.ones(sample_words(batch, sample_bytes, threads)) for _ in inputs]
    set_bytes = sum(4 * s.numel() for s in streams)
    second_bytes = len(inputs) * batch * sample_bytes
    kernel = _native("_read_floor", out.device)
    repeats = 1 if kernel is None else max(1, SWEEP_BYTES // set_bytes)

    def sweep() -> object:
        return [s.sum() for s in streams] if kernel is None else kernel(streams, repeats, 1)

    def seconds(t: dict[str, float]) -> float:
        bandwidth = set_bytes * repeats / t["read sweep"]
        return first.seconds(t) + second_bytes / bandwidth

    how = f"batch in {level((len(inputs) + 1) * batch * sample_bytes, threads)}"
    how += f", sample in {level(set_bytes, threads)}"
    how += "; torch.sum as read sweep" if kernel is None else ""
    substitute = first.substitute or kernel is None
    return Floor("traffic", {**first.contestants, "read sweep": sweep}, seconds, how, substitute)
