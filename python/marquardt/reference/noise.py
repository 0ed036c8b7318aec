"""The noise that every backend draws: Philox4x32-10 words, Box–Muller normals, indexed by element.

    key = seed[0];  counter = (⌊i/4⌋, seed[1]) as four 32-bit words;  i = row-major index of the element.
    u = (w₀ + ½)·2⁻³²  ∈ (0, 1],  v = w₁·2⁻³²,   z = √(−2 ln u) · (cos 2πv, sin 2πv)

Four words give four normals. Nothing is carried from one element to the next, so any part of the noise can be
drawn again, on any device, in any order.
"""

from __future__ import annotations

import math

import torch

Tensor = torch.Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _mulhilo(a: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32-bit words of a·x for 32-bit words kept in int64 (whose products would overflow)."""
    low, high = x & 0xFFFF, x >> 16
    p, q = a * low, a * high  # both below 2^48
    total = p + ((q & 0xFFFF) << 16)  # below 2^49
    return (q >> 16) + (total >> 32), total & _LOW


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32 on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _mulhilo(_MULTIPLIERS[0], c0)
        high1, low1 = _mulhilo(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def words(seed: Tensor, index: Tensor) -> Tensor:
    """The four 32-bit words (last dimension, in int64) of the counters of the elements `index` (int64)."""
    counter = index // 4
    low = counter & _LOW, counter >> 32 & _LOW
    high = (seed[..., 1] & _LOW).expand_as(index), (seed[..., 1] >> 32 & _LOW).expand_as(index)
    key = seed[..., 0] & _LOW, seed[..., 0] >> 32 & _LOW
    return torch.stack(philox((*low, *high), key), dim=-1)


def normal(
    seed: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32, batch_dims: int = 1
) -> Tensor:
    """Standard normals of `shape`; seed [2], or [B, 2] for one stream per sample (float32 normals, then `dtype`)."""
    count = math.prod(shape)
    index = torch.arange(count, device=seed.device)
    if seed.dim() == 2:
        size = math.prod(shape[batch_dims:])
        index = torch.arange(size, device=seed.device).expand(seed.shape[0], size)
        seed = seed[:, None, :]
    w = words(seed, index)  # [..., 4]
    which = index % 4
    pair = (which // 2 * 2)[..., None]
    u = torch.gather(w, -1, pair).squeeze(-1).to(torch.float32) * 2.0**-32 + 2.0**-33
    v = torch.gather(w, -1, pair + 1).squeeze(-1).to(torch.float32) * 2.0**-32
    radius, angle = torch.sqrt(-2.0 * torch.log(u.double())), 2.0 * math.pi * v.double()
    z = radius * torch.where(which % 2 == 0, torch.cos(angle), torch.sin(angle))
    return z.to(torch.float32).reshape(shape).to(dtype)
