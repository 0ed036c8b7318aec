"""Finds the installed torch without importing it.

The native library needs torch's headers and nothing of its Python side. An import costs seconds, and inside
an isolated build environment the torch that matters is hidden from the running process, so its place is asked
for from outside.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

MINIMUM = (2, 11)

_FIND = (
    "import sys; sys.path.pop(0); import importlib.util as u; s = u.find_spec('torch');"
    " print(s.submodule_search_locations[0] if s and s.submodule_search_locations else '')"
)

_ADVICE = """
marquardt is compiled against the torch that is already installed; it never downloads one.
Install torch {minimum} or newer first, then repeat the command:
    pip install 'torch>={minimum}'
There, for CPUs only, the index named on PyTorch's install page has a much smaller one.
If torch is installed, this build cannot see it: repeat it without an environment of its own,
    pip install . --no-build-isolation
    uv pip install . --no-build-isolation
    python -m build --no-isolation
or set MARQUARDT_TORCH_DIR=<the directory that holds torch/__init__.py>.
"""


class TorchNotFound(Exception):
    """No usable torch; the message says what to install."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason + "\n" + _ADVICE.format(minimum=".".join(map(str, MINIMUM))))


def _seen_by(python: Path) -> str:
    # -E drops the PYTHONPATH that hides the outer packages; -I would drop the user's site directory too.
    if not python.is_file():
        return ""
    answer = subprocess.run([str(python), "-E", "-c", _FIND], capture_output=True, text=True, cwd=os.sep)
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _candidates():
    if "MARQUARDT_TORCH_DIR" in os.environ:  # an explicit choice is the only candidate
        yield os.environ["MARQUARDT_TORCH_DIR"]
        return
    spec = importlib.util.find_spec("torch")  # no isolation, or a build environment that was given torch
    if spec and spec.submodule_search_locations:
        yield spec.submodule_search_locations[0]
    yield _seen_by(Path(sys.executable))  # pip's isolated environment runs the outer interpreter
    if os.environ.get("VIRTUAL_ENV"):
        yield _seen_by(Path(os.environ["VIRTUAL_ENV"], "bin", "python"))


def version(torch_dir: Path) -> str:
    """The version written in torch/version.py, for example "2.13.0+cpu"."""
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", (torch_dir / "version.py").read_text())
    return match.group(1) if match else "0"


def find() -> Path:
    """Directory of the installed torch package; raises TorchNotFound."""
    directory = next(
        (Path(place) for place in _candidates() if place and Path(place, "version.py").is_file()), None
    )
    if directory is None:
        raise TorchNotFound(f"marquardt: no torch was found for {sys.executable}.")
    found = version(directory)
    if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < MINIMUM:
        raise TorchNotFound(f"marquardt: torch {found} in {directory} is too old.")
    if not (directory / "include" / "torch" / "csrc" / "stable" / "library.h").is_file():
        raise TorchNotFound(f"marquardt: torch {found} in {directory} was installed without its C++ headers.")
    return directory
