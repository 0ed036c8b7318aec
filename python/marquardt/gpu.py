"""On which GPUs and drivers the CUDA kernels of this build run, and why not on others.

The library holds machine code (SASS) for some architectures, which runs on chips of the same major version and the
same or a later minor one, and PTX, from which the driver makes machine code for any later chip. Its CUDA runtime is
linked in, and wants a driver of its own major version or a later one.
"""

from __future__ import annotations

import ctypes
import functools
import re
from dataclasses import dataclass

import torch

from . import _native

_LARGE_LAUNCHES = 12010  # older drivers take no launch that carries more than 4 KiB


@dataclass(frozen=True)
class Architecture:
    """One entry of the list that CMake got: `90-real`, `90a-real`, `100f-virtual`, or `90`, which is both."""

    major: int
    minor: int
    suffix: str  # "a": this very chip; "f": its family; "": no restriction
    sass: bool
    ptx: bool

    @property
    def name(self) -> str:
        """`sm_90`, or `compute_90` where there is only PTX."""
        return f"{'sm' if self.sass else 'compute'}_{self.major}{self.minor}{self.suffix}"

    def runs_on(self, chip: tuple[int, int]) -> bool:
        """Whether the machine code serves the chip."""
        if self.suffix == "a":
            return self.sass and chip == (self.major, self.minor)
        return self.sass and chip[0] == self.major and chip[1] >= self.minor

    def compiles_for(self, chip: tuple[int, int]) -> bool:
        """Whether the driver can make machine code for the chip from the PTX."""
        if self.suffix == "a":
            return self.ptx and chip == (self.major, self.minor)
        if self.suffix == "f":
            return self.ptx and chip[0] == self.major and chip[1] >= self.minor
        return self.ptx and chip >= (self.major, self.minor)


def architectures(text: str) -> list[Architecture]:
    """`80-real 90-real 100-virtual` as architectures; "none" is an empty list."""
    found = []
    for number, suffix, kind in re.findall(r"(\d+)([af]?)(-real|-virtual|)(?:\s|$)", text):
        found.append(
            Architecture(int(number[:-1]), int(number[-1]), suffix, kind != "-virtual", kind != "-real")
        )
    return found


def why_not_architecture(built: list[Architecture], chip: tuple[int, int]) -> str | None:
    """None if the build has code for the chip, else what it has."""
    if any(a.runs_on(chip) or a.compiles_for(chip) for a in built):
        return None
    names = [a.name for a in built if a.sass] or [a.name for a in built]
    return f"built for {', '.join(names)}; this GPU is sm_{chip[0]}{chip[1]}"


def why_not_driver(runtime: int, driver: int, from_ptx: bool = False) -> str | None:
    """None if a driver serves the runtime, both as 1000·major + 10·minor.

    Machine code needs the runtime's major version; PTX (`from_ptx`) needs the very version that wrote it.
    """
    if driver <= 0:
        return "no CUDA driver is installed"
    needed = runtime if from_ptx else max(runtime // 1000 * 1000, _LARGE_LAUNCHES)
    if driver >= needed:
        return None
    return f"driver supports CUDA {version(driver)}, the kernels need {version(needed)}"


def version(number: int) -> str:
    """`12.4` of 12040."""
    return f"{number // 1000}.{number % 1000 // 10}"


@functools.cache
def versions() -> tuple[int, int] | None:
    """(runtime of the kernels, newest CUDA that the driver serves or 0); None for a build without CUDA kernels."""
    library = _native.handle()
    if library is None or not hasattr(library, "marquardt_cuda_versions"):
        return None
    runtime, driver = ctypes.c_int(0), ctypes.c_int(0)
    library.marquardt_cuda_versions(ctypes.byref(runtime), ctypes.byref(driver))
    return runtime.value, driver.value


def why_not(device: torch.device) -> str | None:
    """None if the CUDA kernels of this build can run on a CUDA device, else the reason."""
    found = versions()
    if found is None:
        return "the native library was built without CUDA kernels"
    reason = why_not_driver(*found)
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    built = architectures(str(_native.build_info().get("cuda", "none")))
    chip = torch.cuda.get_device_capability(device)
    reason = why_not_architecture(built, chip)
    if reason is None and not any(a.runs_on(chip) for a in built):
        reason = why_not_driver(*found, from_ptx=True)
    return reason
