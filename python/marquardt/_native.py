"""Finds and loads the native library, which registers the operators `torch.ops.marquardt.*`."""

from __future__ import annotations

import ctypes
import json
import os
import pathlib

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


def build_info() -> dict[str, object]:
    """How the library was built: compiler, flags, CUDA architectures, and the instruction set in use."""
    if _ERROR is not None:
        return {}
    library = ctypes.CDLL(str(library_path()))
    library.marquardt_build_info.restype = ctypes.c_char_p
    return json.loads(library.marquardt_build_info().decode())


load()
