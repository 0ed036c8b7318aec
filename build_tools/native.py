"""Builds libmarquardt.so with CMake and Ninja: `python build_tools/native.py` puts it beside the sources.

The build directory stays, so only what changed is compiled again. Environment variables:
    MARQUARDT_CUDA=0|1       forbid or force the CUDA kernels (default: built when nvcc is found)
    MARQUARDT_CUDA_ARCHS     architectures as CMake writes them, e.g. "90-real 100-real 100-virtual"
    MARQUARDT_WERROR=1       warnings are errors (development)
    MARQUARDT_LINEINFO=1     source lines in the CUDA kernels, for profilers
    MAX_JOBS                 parallel compilations (default: from cores and free memory)
    CXX, CUDACXX             the compilers
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))

import torch_dir  # noqa: E402  (a neighbour of this file, not an installed module)

LIBRARY = "libmarquardt.so"
CMAKE_MINIMUM = (3, 24)
GIB_PER_JOB = 2.0  # the stable-ABI headers need about 0.7 GiB a file, nvcc's device passes more


class BuildError(Exception):
    """The build cannot start; the message says what is missing."""


def project_version() -> str:
    """The version, written once in the package."""
    text = (ROOT / "python" / "marquardt" / "__init__.py").read_text()
    return re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE).group(1)


def find_tool(*names: str) -> str:
    """Path of a build tool: beside the running interpreter (pinned), else on PATH; "" if there is none."""
    beside = str(Path(sys.executable).parent)
    return next(
        (path for name in names for path in (shutil.which(name, path=beside), shutil.which(name)) if path), ""
    )


def find_cmake() -> str:
    """Path of a CMake that is new enough, or ""."""
    path = find_tool("cmake")
    if not path:
        return ""
    text = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    match = re.search(r"(\d+)\.(\d+)", text)
    return path if match and (int(match[1]), int(match[2])) >= CMAKE_MINIMUM else ""


def find_ninja() -> str:
    """Path of Ninja, or ""."""
    return find_tool("ninja", "ninja-build")


def free_gib() -> float:
    """Memory that new processes may take: free on the machine, and within the limit of the container."""
    amounts = []
    try:
        meminfo = Path("/proc/meminfo").read_text()
        amounts.append(int(re.search(r"MemAvailable:\s+(\d+)", meminfo)[1]) / 2**20)
        amounts.append(int(Path("/sys/fs/cgroup/memory.max").read_text()) / 2**30)
    except (OSError, TypeError, ValueError):
        pass  # another system, or no limit ("max")
    return min(amounts, default=4.0)


def jobs() -> int:
    """Parallel compilations: MAX_JOBS, else as many as cores and free memory allow."""
    if os.environ.get("MAX_JOBS"):
        return max(1, int(os.environ["MAX_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(free_gib() / GIB_PER_JOB)))


def _switch(name: str, default: str) -> str:
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise BuildError(f"{name} must be 0 or 1, got {value!r}")
    return {"": default, "0": "OFF", "1": "ON"}[value]


def _fresh_directory(directory: Path) -> None:
    """Drops a build directory that CMake cannot reuse: of a moved source tree, or of another compiler."""
    compilers = {name: os.environ.get(name, "") for name in ("CXX", "CUDACXX", "CUDAHOSTCXX", "CXXFLAGS")}
    identity = json.dumps({"source": str(ROOT), **compilers})
    mark = directory / "identity.json"
    if directory.exists() and (not mark.is_file() or mark.read_text() != identity):
        shutil.rmtree(directory)
    directory.mkdir(parents=True, exist_ok=True)
    mark.write_text(identity)


def build(destination: Path) -> Path:
    """Configures, compiles, and copies the library into `destination`; returns its path there."""
    torch = torch_dir.find()
    cmake, ninja = find_cmake(), find_ninja()
    if not cmake:
        raise BuildError(
            "marquardt: CMake {}.{} or newer is missing: pip install cmake".format(*CMAKE_MINIMUM)
        )
    if not ninja:
        raise BuildError("marquardt: Ninja is missing: pip install ninja")

    directory = ROOT / "build" / "cmake"
    _fresh_directory(directory)
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": ninja,
        "MARQUARDT_VERSION": project_version(),
        "MARQUARDT_TORCH_DIR": torch,
        "MARQUARDT_TORCH_VERSION": torch_dir.version(torch),
        "MARQUARDT_CUDA": _switch("MARQUARDT_CUDA", "AUTO"),
        "MARQUARDT_CUDA_ARCHS": os.environ.get("MARQUARDT_CUDA_ARCHS", ""),
        "MARQUARDT_WERROR": _switch("MARQUARDT_WERROR", "OFF"),
        "MARQUARDT_LINEINFO": _switch("MARQUARDT_LINEINFO", "OFF"),
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(directory), "-G", "Ninja", "--log-level=NOTICE"]
    subprocess.run(configure + [f"-D{name}={value}" for name, value in options.items()], check=True)
    subprocess.run([ninja, "-C", str(directory), f"-j{jobs()}"], check=True)

    source, target = directory / LIBRARY, destination / LIBRARY
    if not target.is_file() or target.read_bytes() != source.read_bytes():
        destination.mkdir(parents=True, exist_ok=True)
        temporary = target.with_suffix(f".{os.getpid()}")
        shutil.copy2(source, temporary)
        os.replace(temporary, target)  # a process that has the old one loaded keeps it
    return target


def main() -> int:
    try:
        print(build(ROOT / "python" / "marquardt").relative_to(ROOT))
    except (BuildError, torch_dir.TorchNotFound) as problem:
        print(problem, file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as failure:
        return failure.returncode  # CMake or the compiler has said why
    return 0


if __name__ == "__main__":
    sys.exit(main())
