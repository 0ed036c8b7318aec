"""How a kernel is launched: block sizes and splits, float64 scalars, the device."""

from __future__ import annotations

import contextlib
import functools
import os
import struct
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from .layout import Layout

Tensor = torch.Tensor

# Largest sample that one program takes through Gram and apply in one launch.
FUSED_SIZE = 16384
# Most chunks of a sample: every apply program adds up that many partial sums.
MOST_SPLITS = 256
# Host scalars of the frame kernels (k0 ... k9).
HOST_SCALARS = 10


def emulated() -> bool:
    """Whether kernels run in Triton's interpreter."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class FrameConfig:
    """Launch of one call: each sample is walked in `splits` chunks of `chunk` elements, `block` at a time."""

    block: int
    num_warps: int
    chunk: int
    splits: int

    @property
    def splits_padded(self) -> int:
        """`splits` rounded up to a power of two."""
        return 1 << (self.splits - 1).bit_length()


def choose(size: int, vectors: int, gram: bool, double: bool) -> FrameConfig:
    """The launch for samples of `size` elements and `vectors` rows plus outputs.

    It depends on the sample alone, never on the batch, so that neither do the results. Without a Gram nothing has to
    be merged and every block is a program. A thread keeps all rows in registers, so the more there are the fewer
    elements of each it takes.
    """
    wide = vectors * (2 if double else 1)
    per_thread = 8 if wide <= 4 else 4 if wide <= 16 else 2
    num_warps = 8
    if gram and 2048 < size <= FUSED_SIZE:
        num_warps = 16
    block = 32 * num_warps * per_thread
    while block > 128 and block >= 2 * size:
        block //= 2
    num_warps = max(1, min(num_warps, block // (32 * per_thread)))
    if not gram:
        return FrameConfig(block, num_warps, block, max(1, -(-size // block)))
    blocks = max(1, -(-size // block))
    per_chunk = blocks if size <= FUSED_SIZE else -(-blocks // MOST_SPLITS)
    return FrameConfig(block, num_warps, per_chunk * block, -(-blocks // per_chunk))


def power_of_two(n: int) -> int:
    """`n` rounded up to a power of two, at least 1."""
    return 1 << max(n - 1, 0).bit_length()


def choose_stack(size: int, rows: int, gram: bool) -> FrameConfig:
    """The launch for two-dimensional blocks of `rows` (a power of two) × block elements, in float64.

    A Gram keeps four such blocks of sums, C·rows one. Samples are cut into chunks of 2048 elements or more: these
    kernels never take Gram and apply in one launch, so few samples may still fill the device.
    """
    block = min(512 if rows < 4 else 256, 2048 // rows) if gram else min(1024, 8192 // rows)
    while block > 32 and block >= 2 * size:
        block //= 2
    num_warps = max(1, min(8, rows * block // (128 if gram else 256)))
    blocks = max(1, -(-size // block))
    per_chunk = max(-(-2048 // block), -(-blocks // MOST_SPLITS)) if gram else 1
    return FrameConfig(block, num_warps, per_chunk * block, -(-blocks // per_chunk))


def bits(value: float) -> int:
    """The IEEE pattern of a float64 as a signed 64-bit integer: Triton would pass a Python float as float32."""
    pattern: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return pattern


@dataclass(frozen=True)
class Scalars:
    """The scalars of a call as kernel arguments: a device table [B, m], or host patterns."""

    count: int
    table: Tensor | None
    row: int
    column: int
    patterns: tuple[int, ...]

    @staticmethod
    def of(coef: Tensor, device: torch.device, most: int = HOST_SCALARS) -> Scalars:
        """[m] on the host is passed by value (no copy, no synchronisation), else the device table is read.

        A [B, m] table on the CPU belongs to data on the CPU (the interpreter). `most`: the values a kernel takes.
        """
        if coef.dim() == 1 and coef.device.type == "cpu" and coef.shape[0] <= most:
            values = coef.tolist()
            patterns = tuple(bits(v) for v in values) + (0,) * (most - len(values))
            return Scalars(len(values), None, 0, 0, patterns)
        table = to_device(coef, device)
        row = table.stride(0) if table.dim() == 2 else 0
        return Scalars(table.shape[-1], table, row, table.stride(-1), (0,) * most)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """table, table_row, table_column, k0, k1, ... of the kernels."""
        return (self.table, self.row, self.column, *self.patterns)


def to_device(t: Tensor, device: torch.device) -> Tensor:
    """`t` as float64 beside the data; from the host through pinned memory, without waiting."""
    t = t.to(torch.float64)
    if t.device == device:
        return t
    if device.type == "cuda" and t.device.type == "cpu":
        return t.pin_memory().to(device, non_blocking=True)
    return t.to(device)


def noise(seed: Tensor | None, layout: Layout) -> tuple[Tensor | None, int, dict[str, bool]]:
    """(seed, its batch stride, the compile-time flags of the noise row)."""
    if seed is None:
        return None, 0, {"NOISE": False, "SHARED_NOISE": False, "PHASE": False}
    seed = seed.contiguous()
    shared = seed.dim() == 1
    phase = shared and layout.batch > 1 and layout.size % 4 != 0
    return seed, 0 if shared else 2, {"NOISE": True, "SHARED_NOISE": shared, "PHASE": phase}


def span(layout: Layout, flags: dict[str, bool]) -> int:
    """Elements to walk per sample: three more where blocks start ahead of the sample."""
    return layout.size + (3 if flags["PHASE"] else 0)


def compute_type(first: Tensor) -> tl.dtype:
    """float64 for float64 data, else float32."""
    return tl.float64 if first.dtype == torch.float64 else tl.float32


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Launches go to the device of the data, not to the current one."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    return contextlib.nullcontext()


def entry(function: Callable[..., Any]) -> Callable[..., Any]:
    """An entry point for tensors as a caller of torch.func may hold them.

    A kernel asks for a tensor's memory, past torch's dispatcher. Wrappers of transforms that have ended are taken off
    here; a tensor of `torch.autograd.grad(is_grads_batched=True)` has no memory, and is refused in torch's words.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if not isinstance(value, Tensor):
            return value
        value = torch._C._functorch.unwrap_if_dead(value)
        if torch._C._functorch.is_legacy_batchedtensor(value):
            raise RuntimeError(f"Batching rule not implemented for the Triton kernel of {function.__name__}")
        return value

    @functools.wraps(function)
    def run(*arguments: Any, **keywords: Any) -> Any:
        return function(*map(plain, arguments), **{k: plain(v) for k, v in keywords.items()})

    return run


def check_device(op: str, tensors: Sequence[Tensor]) -> None:
    """CUDA tensors, or CPU tensors in the interpreter."""
    device = tensors[0].device
    if device.type != "cuda" and not (device.type == "cpu" and emulated()):
        raise NotImplementedError(
            f"{op}: Triton kernels need CUDA tensors, got {device} (or TRITON_INTERPRET=1)"
        )
