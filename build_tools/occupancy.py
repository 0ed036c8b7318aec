"""How many CTAs of a kernel one multiprocessor holds at once: the rules of NVIDIA's occupancy calculator.

A CTA takes warp slots, registers (allocated per warp in units of 256, in one of four partitions of the SM) and shared
memory (1 KiB of it reserved by the system, in units of 128 bytes). The scarcest of them decides.
"""

from __future__ import annotations

from dataclasses import dataclass

WARP = 32
PARTITIONS = 4  # of a multiprocessor; each has a quarter of its registers
REGISTERS = 65536  # of a multiprocessor, and the most that one CTA may have
REGISTER_UNIT = 256
SHARED_UNIT, SHARED_RESERVED = 128, 1024
MAX_REGISTERS, MAX_THREADS = 255, 1024  # of a thread, of a CTA


@dataclass(frozen=True)
class Chip:
    warps: int  # of a multiprocessor
    ctas: int
    shared: int  # bytes of a multiprocessor; a CTA gets 1 KiB less

    @property
    def shared_per_cta(self) -> int:
        return self.shared - SHARED_RESERVED


CHIPS = {
    "sm_80": Chip(warps=64, ctas=32, shared=164 << 10),
    "sm_90": Chip(warps=64, ctas=32, shared=228 << 10),
    "sm_100": Chip(warps=64, ctas=32, shared=228 << 10),
}


@dataclass(frozen=True)
class Occupancy:
    ctas: int
    warps: int
    of: int  # warp slots of the multiprocessor
    limit: str  # what stops one CTA more

    @property
    def fraction(self) -> float:
        return self.warps / self.of


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def occupancy(target: str, threads: int, registers: int, shared: int = 0) -> Occupancy:
    """Of CTAs with `threads` threads, `registers` a thread and `shared` bytes, static and dynamic together."""
    chip = CHIPS[target]
    if not 1 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be 1 to {MAX_THREADS}, got {threads}")
    warps = -(-threads // WARP)
    per_warp = _up(registers * WARP, REGISTER_UNIT)
    # A launch is checked as if its warps were spread evenly over the partitions.
    launches = registers <= MAX_REGISTERS and per_warp * _up(warps, PARTITIONS) <= REGISTERS
    held = PARTITIONS * (REGISTERS // PARTITIONS // per_warp) if per_warp else chip.warps
    bounds = {
        "warps": chip.warps // warps,
        "registers": held // warps if launches else 0,
        "shared memory": chip.shared // _up(shared + SHARED_RESERVED, SHARED_UNIT),
        "CTAs": chip.ctas,
    }
    limit = min(bounds, key=lambda name: bounds[name])
    return Occupancy(bounds[limit], bounds[limit] * warps, chip.warps, limit)
