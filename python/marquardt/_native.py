"""Finds and loads the native library, which registers the operators `torch.ops.marquardt.*`."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pathlib
from collections.abc import Callable

import torch

_PATH = pathlib.Path(__file__).resolve().parent / "libmarquardt.so"
_ERROR: str | None = None


def library_path() -> pathlib.Path:
    """Where the native library lies (it need not exist: see `why_not`)."""
    return pathlib.Path(os.environ.get("MARQUARDT_LIBRARY", _PATH))


def load() -> None:
    """Load the library once; a failure is kept and reported by `why_not`."""
    global _ERROR
    path = library_path()
    if not path.is_file():
        _ERROR = f"the native library is not built (no {path.name} beside the package): run `pip install .`"
        return
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        _ERROR = f"the native library does not load with torch {torch.__version__}: {error}"


def why_not() -> str | None:
    """None if the native operators are there, else the reason."""
    return _ERROR


@functools.cache
def handle() -> ctypes.CDLL | None:
    """The loaded library for plain C calls, None without one."""
    return None if _ERROR is not None else ctypes.CDLL(str(library_path()))


def build_info() -> dict[str, object]:
    """How the library was built: compiler, flags, CUDA architectures, and the instruction set in use."""
    library = handle()
    if library is None:
        return {}
    library.marquardt_build_info.restype = ctypes.c_char_p
    return json.loads(library.marquardt_build_info().decode())


def emulated() -> bool:
    """Whether the CPU plays a GPU: CPU tensors run through the CUDA kernels (a build for tests)."""
    return "emulated" in str(build_info().get("isa", ""))


def plan_of(call: Callable[[], object]) -> str | None:
    """How the CUDA kernels would run `call`, in words; nothing is launched, results hold anything.

    None where no CUDA kernel was asked, or the build has none.
    """
    library = handle()
    if library is None or not hasattr(library, "marquardt_plan_begin"):
        return None
    library.marquardt_plan_end.restype = ctypes.c_char_p
    library.marquardt_plan_begin()
    try:
        call()
    finally:
        text = library.marquardt_plan_end().decode()
    return text or None


load()
