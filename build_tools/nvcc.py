"""Finds CUDA's compiler and disassembler, or puts the compiler into a spare environment: `python build_tools/nvcc.py`.

The spare environment is a folder under build/ with the compiler's packages from the package index; nothing else uses
it. The disassembler comes with the CUDA toolkit or with Triton.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPARE = ROOT / "build" / "nvcc"
RELEASE = "13.0"
PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-nvvm", "nvidia-cuda-cccl", "nvidia-cuda-runtime")


class NoCompiler(Exception):
    """No nvcc; the message says what was tried."""


def _places() -> list[Path]:
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    toolkits = [Path(home) for home in homes] + [Path("/usr/local/cuda")]
    toolkits += sorted(Path("/usr/local").glob("cuda-*"), reverse=True)
    return [toolkit / "bin" for toolkit in toolkits]


def _first(paths: list[Path | str | None]) -> str:
    return next((str(p) for p in paths if p and os.access(p, os.X_OK) and Path(p).is_file()), "")


def find() -> str:
    """Path of nvcc: CUDACXX, PATH, the toolkits of the machine, the spare environment; "" if there is none."""
    named = os.environ.get("CUDACXX")
    spare = sorted(SPARE.glob("nvidia/*/bin/nvcc"))
    found = [shutil.which(named) if named else None, shutil.which("nvcc")]
    return _first([*found, *(place / "nvcc" for place in _places()), *spare])


def find_tool(name: str) -> str:
    """Path of cuobjdump or another tool that reads machine code; "" if there is none."""
    spec = importlib.util.find_spec("triton")
    triton = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    beside = [Path(nvcc).resolve().parent / name for nvcc in [find()] if nvcc]
    return _first(
        [*beside, shutil.which(name), *(place / name for place in _places())]
        + [place / "backends" / "nvidia" / "bin" / name for place in triton]
    )


def install(timeout: float = 300) -> str:
    """Fills the spare environment from the package index; returns nvcc's path, or raises NoCompiler."""
    wanted = [f"{name}=={RELEASE}.*" for name in PACKAGES]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
    try:
        made = subprocess.run(
            [*command, "--target", str(SPARE), *wanted], capture_output=True, text=True, timeout=timeout
        )
    except subprocess.TimeoutExpired:
        raise NoCompiler(f"pip did not fetch {PACKAGES[0]} in {timeout:.0f} s") from None
    if made.returncode:
        shutil.rmtree(SPARE, ignore_errors=True)
        last = (made.stderr.strip() or made.stdout.strip() or "pip failed").splitlines()[-1]
        raise NoCompiler(f"pip cannot fetch {PACKAGES[0]}: {last}")
    for tool in SPARE.glob("nvidia/*/*bin/*"):  # wheels that were packed elsewhere may lack the bit
        tool.chmod(tool.stat().st_mode | 0o111)
    for tool in SPARE.glob("nvidia/*/nvvm/bin/*"):
        tool.chmod(tool.stat().st_mode | 0o111)
    if not (path := find()):
        raise NoCompiler(f"{PACKAGES[0]} {RELEASE} brought no nvcc")
    return path


def find_or_install() -> str:
    return find() or install()


@functools.cache
def identity(tool: str) -> str:
    """What a tool says of its version."""
    return subprocess.run([tool, "--version"], capture_output=True, text=True).stdout


def version(nvcc: str) -> str:
    """ "13.0", or "" for a compiler that does not answer."""
    return identity(nvcc).partition("release ")[2].partition(",")[0]


if __name__ == "__main__":
    try:
        print(find_or_install())
    except NoCompiler as problem:
        sys.exit(str(problem))
