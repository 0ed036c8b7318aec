"""What the numbers were measured on, and how to measure them again."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import pathlib
import platform
import re
import subprocess
from typing import Any

import torch

import marquardt
from marquardt import _native

from . import floors

ROOT = pathlib.Path(__file__).resolve().parents[1]


def _read(path: str) -> str:
    try:
        return pathlib.Path(path).read_text()
    except OSError:
        return ""


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB")):
        if count >= unit:
            return f"{count / unit:g} {name}"
    return f"{count / 1024:g} KiB"


def cpu_model() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", _read("/proc/cpuinfo"), re.M)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def commit() -> str:
    """Short hash, with + for local changes; 'unknown' outside a repository."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def versions() -> dict[str, str]:
    return {
        "marquardt": marquardt.__version__,
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "pytest-benchmark": version("pytest-benchmark"),
    }


@functools.cache
def describe() -> dict[str, Any]:
    """Once per run; the load is that of the start."""
    cached = [
        f"L{c.level} {_size(c.size)}" + (f" shared by {c.cores}" if c.cores > 1 else "")
        for c in floors.caches()
    ]
    governor = _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").strip()
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "caches": cached,
        "isa": torch.backends.cpu.get_cpu_capability(),
        "backends": list(marquardt.backends.available()),
        "build": _native.build_info(),
        "governor": governor or "unknown",
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "commit": commit(),
        "versions": versions(),
    }


def line() -> str:
    m = describe()
    parts = [
        f"{m['cpu']}, {m['cores']} cores, {m['isa']}",
        ", ".join(m["caches"]) or "caches unknown",
        f"threads {m['threads']}",
        f"governor {m['governor']}",
        f"load {m['load']}",
        f"backends {' '.join(m['backends'])}",
        *([f"gpu {m['gpu']}"] if m["gpu"] != "none" else []),
        ", ".join(f"{name} {value}" for name, value in m["versions"].items()),
        f"commit {m['commit']}",
    ]
    return "; ".join(parts)
