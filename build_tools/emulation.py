"""Builds the CUDA kernels for the CPU (csrc/emulation): `python build_tools/emulation.py [TARGET ...]`.

The build directory stays, so only what changed is compiled again. Targets are those of csrc/emulation/CMakeLists.txt.
Environment variables: CXX (GCC 11 or newer), MARQUARDT_WERROR=1, MAX_JOBS.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))

import native  # noqa: E402  (neighbours of this file, not installed modules)
import torch_dir  # noqa: E402

DIRECTORY = ROOT / "build" / "emulation"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX") or ".so"
SANITIZERS = {"asan": "address,undefined", "tsan": "thread"}
_OPTIONS = {  # a found fault must show in the exit status; other limits are those of the machine
    "asan": {
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0:exitcode=66",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1:exitcode=66",
    },
    "tsan": {"TSAN_OPTIONS": "exitcode=66"},
}


class Missing(Exception):
    """What the emulation needs is not on this machine; the message says what."""


def compiler() -> str:
    named = os.environ.get("CXX")
    path = shutil.which(named) if named else shutil.which("g++") or shutil.which("c++")
    if not path:
        raise Missing(f"no C++ compiler ({named or 'g++'}) was found")
    return path


def python_includes() -> list[str]:
    """Where the headers of Python and pybind11 lie."""
    include = sysconfig.get_paths()["include"]
    if not Path(include, "Python.h").is_file():
        raise Missing(f"the headers of Python are missing ({include}/Python.h)")
    if importlib.util.find_spec("pybind11") is None:
        raise Missing("pybind11 is missing: pip install pybind11")
    import pybind11

    return [include, pybind11.get_include()]


def _torch() -> list[str]:
    try:
        found = torch_dir.find()
    except torch_dir.TorchNotFound:
        return []  # then there is no target that needs it
    return [f"-DMARQUARDT_TORCH_DIR={found}"]


def _configure(cxx: str, cmake: str, ninja: str) -> None:
    try:
        python = [f"-DMARQUARDT_PYTHON_INCLUDES={';'.join(python_includes())}"]
        python.append(f"-DMARQUARDT_PYTHON_SUFFIX={SUFFIX}")
    except Missing:
        python = ["-DMARQUARDT_PYTHON_SUFFIX="]
    werror = "ON" if os.environ.get("MARQUARDT_WERROR") == "1" else "OFF"
    command = [
        cmake, "-S", str(ROOT / "csrc" / "emulation"), "-B", str(DIRECTORY), "-G", "Ninja", "--log-level=NOTICE",
        f"-DCMAKE_CXX_COMPILER={cxx}", f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DCMAKE_BUILD_TYPE=",
        f"-DMARQUARDT_WERROR={werror}", f"-DMARQUARDT_VERSION={native.project_version()}", *python, *_torch(),
    ]  # fmt: skip
    mark = DIRECTORY / "configured.txt"  # by which arguments; Ninja itself sees when a CMake file changes
    text = "\n".join(command)
    strict = text.replace(
        "MARQUARDT_WERROR=OFF", "MARQUARDT_WERROR=ON"
    )  # serves who does not ask for it as well
    if mark.is_file() and mark.read_text() in (text, strict):
        return
    shutil.rmtree(DIRECTORY, ignore_errors=True)  # another compiler, or a moved tree
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    mark.write_text(text)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """One build at a time: two Ninjas in one directory spoil it."""
    DIRECTORY.parent.mkdir(exist_ok=True)
    with open(DIRECTORY.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def build(targets: Sequence[str] = ()) -> Path:
    """Builds targets, by default all; returns the directory in which they lie."""
    if sys.platform != "linux":
        raise Missing("the emulated machine needs Linux (futexes)")
    cxx, cmake, ninja = compiler(), native.find_cmake(), native.find_ninja()
    if not cmake or not ninja:
        raise Missing(
            "CMake {}.{} and Ninja are needed: pip install cmake ninja".format(*native.CMAKE_MINIMUM)
        )
    with _alone():
        _configure(cxx, cmake, ninja)
        wanted = list(targets) or all_targets()
        command = [ninja, "-C", str(DIRECTORY), f"-j{native.jobs()}", *wanted]
        made = subprocess.run(command, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{made.stdout}{made.stderr}")
    return DIRECTORY


def all_targets() -> list[str]:
    """Programs, modules and libraries, without object libraries."""
    listed = subprocess.run(
        [native.find_ninja(), "-C", str(DIRECTORY), "-t", "targets", "all"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    linked = [line.split(":")[0] for line in listed.splitlines() if "_LINKER__" in line]
    return [name for name in linked if "/" not in name]


def module(name: str) -> Path:
    """The Python module of that name, built."""
    python_includes()
    return build([name]) / f"{name}{SUFFIX}"


@functools.cache
def prefix(variant: str) -> tuple[str, ...]:
    """What to put before a program of this variant; raises Missing where its sanitizer does not work."""
    if variant not in SANITIZERS:
        return ()
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder, "empty.cpp"), Path(folder, "empty")
        source.write_text("int main() { return 0; }\n")
        command = [compiler(), f"-fsanitize={SANITIZERS[variant]}", str(source), "-o", str(program)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode:
            raise Missing(f"the compiler has no -fsanitize={SANITIZERS[variant]}")
        # ThreadSanitizer needs its part of the address space, which a kernel that draws addresses widely may take.
        for words in ((), ("setarch", "--addr-no-randomize")):
            if words and not shutil.which(words[0]):
                continue
            if subprocess.run([*words, str(program)], capture_output=True).returncode == 0:
                return words
    raise Missing(f"programs with -fsanitize={SANITIZERS[variant]} do not run on this machine")


def environment(variant: str) -> dict[str, str]:
    """For programs of this variant: the process's own, and what the sanitizer is told."""
    return {**os.environ, **_OPTIONS.get(variant, {})}


@functools.cache
def program(name: str, variant: str) -> Path:
    """The program of that name and variant, built once a process."""
    return build([f"{name}_{variant}"]) / f"{name}_{variant}"


def run(name: str, variant: str, *words: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Runs a program; exit status 66 says that a sanitizer found a fault."""
    command = [*prefix(variant), str(program(name, variant)), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment(variant), timeout=timeout)


def main() -> int:
    try:
        directory = build(sys.argv[1:])
    except (Missing, RuntimeError) as problem:
        print(problem, file=sys.stderr)
        return 1
    for name in sys.argv[1:] or all_targets():
        for path in sorted(directory.glob(f"{name}*")):
            if path.is_file():
                print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
