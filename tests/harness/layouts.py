"""Memory layouts, and arenas: buffers in which a tensor is surrounded by sentinels.

Every input of a layout test lies in an arena of NaN, so an element read between or beside those of the tensor shows
up in the result; every `out` lies in an arena of a sentinel value that must survive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

Tensor = torch.Tensor
_GUARD = 128  # elements before and after: two vector registers of the widest kind, and more


def _order(rank: int) -> list[int]:
    return list(range(rank))


def _channels_last(rank: int) -> list[int]:
    return _order(rank) if rank < 3 else [0, *range(2, rank), 1]


# name -> (memory order of the dimensions, slowest first; {dimension: step}; {dimension: padding}; offset)
LAYOUTS = {
    "contiguous": lambda rank: (_order(rank), {}, {}, 0),
    "misaligned": lambda rank: (_order(rank), {}, {}, 1),
    "gaps": lambda rank: (_order(rank), {rank - 1: 2}, {}, 0),
    "cropped": lambda rank: (_order(rank), {}, dict.fromkeys(range(1, rank), 1), 3),
    "transposed": lambda rank: ([*range(rank - 2), rank - 1, rank - 2][-rank:], {}, {}, 0),
    "reversed": lambda rank: (_order(rank)[::-1], {}, {}, 0),
    "channels_last": lambda rank: (_channels_last(rank), {}, {}, 0),
    "channels_last-misaligned": lambda rank: (_channels_last(rank), {}, {}, 1),
    "batch-sliced": lambda rank: (_order(rank), {0: 2}, {}, 0),
    "batch-padded": lambda rank: (_order(rank), {}, {min(1, rank - 1): 1}, 0),
    "expanded-batch": None,
    "expanded-inside": None,
    "expanded-most": None,
}
WRITABLE = tuple(name for name, make in LAYOUTS.items() if make is not None)


@dataclass
class Arena:
    """A tensor inside a larger buffer."""

    tensor: Tensor
    buffer: Tensor
    fill: float

    def intact(self) -> bool:
        """Whether every element of the buffer outside the tensor still holds the fill value."""
        outside = torch.ones_like(self.buffer, dtype=torch.bool)
        inside = outside.as_strided(self.tensor.shape, self.tensor.stride(), self.tensor.storage_offset())
        inside.fill_(False)
        left = self.buffer[outside]
        return bool((left.isnan() if self.fill != self.fill else left == self.fill).all())


def arena(values: Tensor, layout: str = "contiguous", fill: float = float("nan")) -> Arena:
    """`values` in the given layout. Expanded layouts repeat the first slice of the dimensions they share."""
    rank = values.dim()
    if layout.startswith("expanded"):
        kept = values
        longest = max(range(rank), key=lambda d: values.shape[d]) if rank else 0
        inside = [min(1, rank - 1)]
        others = [d for d in range(rank) if d != longest]
        shared = {"expanded-batch": [0], "expanded-inside": inside, "expanded-most": others}[layout]
        for d in shared:
            kept = kept.narrow(d, 0, min(1, kept.shape[d]))
        inner = arena(kept, "contiguous", fill)
        return Arena(inner.tensor.expand(values.shape), inner.buffer, fill)
    order, step, pad, offset = LAYOUTS[layout](rank)
    strides, extent = [0] * rank, 1
    for d in reversed(order):
        strides[d] = extent * step.get(d, 1)
        extent = strides[d] * (values.shape[d] + pad.get(d, 0))
    buffer = torch.full(
        (2 * _GUARD + max(extent, 1) + offset,), fill, dtype=values.dtype, device=values.device
    )
    tensor = buffer.as_strided(values.shape, strides, _GUARD + offset)
    tensor.copy_(values)
    return Arena(tensor, buffer, fill)


def promised_strides(t: Tensor) -> tuple[int, ...]:
    """Strides of an output like `t`: its own if it is dense and does not overlap itself, else contiguous ones."""
    expected = 1
    for size, stride in sorted(
        ((n, s) for n, s in zip(t.shape, t.stride(), strict=True) if n != 1), key=lambda x: x[1]
    ):
        if stride != expected:
            return torch.empty(t.shape, device="meta").stride()
        expected *= size
    return t.stride()


def same_strides(a: Tensor, strides: Sequence[int]) -> bool:
    """Strides of dimensions of size 1 mean nothing."""
    return (
        all(n == 1 or x == y for n, x, y in zip(a.shape, a.stride(), strides, strict=True)) or a.numel() == 0
    )
