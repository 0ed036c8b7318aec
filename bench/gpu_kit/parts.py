"""What each part does with the machine."""

from __future__ import annotations

import csv
import io
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from . import build, pack, recorder
from .runner import ROOT, Context, Part, Ran, Skip

Result = tuple[bool, dict[str, Any]]

KERNELS = ("csrc", "cmake", "CMakeLists.txt", "build_tools")
PACKAGE = (*KERNELS, "python/marquardt", "triton_kernels")

GPU_FIELDS = (
    "name", "driver_version", "compute_cap", "memory.total", "pstate", "temperature.gpu", "power.limit",
    "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "ecc.mode.current",
)  # fmt: skip
TOOLS = ("nvcc", "g++", "cmake", "ninja", "compute-sanitizer", "ncu", "cuobjdump")
VERSIONS = """
import importlib.metadata as m, json
names = ("torch", "triton", "numpy", "pytest", "pytest-benchmark", "setuptools")
def of(name):
    try: return m.version(name)
    except m.PackageNotFoundError: return "none"
print(json.dumps({name: of(name) for name in names}))
"""


def commit() -> str:
    """Short hash with + for local changes, 'unknown' outside a repository."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("MARQUARDT_COMMIT", "unknown")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def parse_json(text: str) -> Any:
    """The last line of a program's output as JSON, {} if it is none."""
    try:
        return json.loads(last_line(text))
    except ValueError:
        return {}


def arch_of(compute_cap: str) -> str:
    """ "9.0" -> "90"; the first GPU counts."""
    found = re.search(r"(\d+)\.(\d+)", compute_cap)
    if not found:
        raise Skip(f"nvidia-smi names no compute capability: {compute_cap!r}")
    return found[1] + found[2]


# --- machine ------------------------------------------------------------------------------------------------


def machine(context: Context) -> Result:
    smi = context.run("nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader,nounits")
    rows = list(csv.reader(io.StringIO(smi.output), skipinitialspace=True)) if smi.good else []
    gpus = [dict(zip(GPU_FIELDS, row, strict=False)) for row in rows if len(row) == len(GPU_FIELDS)]
    compiler = context.run("nvcc", "--version") if shutil.which("nvcc") else Ran(1, "", 0.0)
    versions = context.python("-c", VERSIONS)
    return smi.good or context.dry, {
        "gpus": gpus,
        "nvcc": last_line(compiler.output),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": parse_json(versions.output),
        "tools": {name: bool(shutil.which(name)) for name in TOOLS},
    }


def gpu_arch(context: Context) -> str:
    if context.dry:
        return "90"
    asked = context.run("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    if not asked.good:
        raise Skip("nvidia-smi finds no GPU")
    return arch_of(asked.output)


def build_library(context: Context) -> Result:
    return build.build(context, gpu_arch(context), commit())


# --- tests --------------------------------------------------------------------------------------------------

# name -> (files, -k expression); a test's id holds its target, "cuda-cuda" or "cuda-triton".
SUITES = {
    "cuda": (("tests/test_cuda.py",), ""),
    "hessian-cuda": (("tests/test_hessian.py",), "cuda-cuda"),
    "hessian-triton": (("tests/test_hessian.py",), "cuda-triton"),
    "langevin-cuda": (("tests/test_langevin.py",), "cuda-cuda"),
    "langevin-triton": (("tests/test_langevin.py",), "cuda-triton"),
}


def run_suite(context: Context, name: str) -> dict[str, Any]:
    files, chosen = SUITES[name]
    there = [file for file in files if (context.root / file).is_file()]
    if not there:
        return {"absent": True}
    record = context.state / f"record-{name}.jsonl"
    record.unlink(missing_ok=True)
    words = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "bench.gpu_kit.recorder", "-p", "no:cacheprovider"]
    words += ["-m", "not full", *(["-k", chosen] if chosen else []), *there]
    ran = context.python(*words, MARQUARDT_TEST_DEVICE="cuda", MARQUARDT_RECORD=str(record))
    return {"exit": ran.code, "late": ran.late, "seconds": round(ran.seconds, 1), **recorder.summary(record)}


def tests(context: Context) -> Result:
    """All suites side by side: the work is compiling and comparing on the host."""
    needs_module(context, "pytest")
    with ThreadPoolExecutor(len(SUITES)) as pool:
        found = dict(zip(SUITES, pool.map(lambda name: run_suite(context, name), SUITES), strict=True))
    ran = [suite for suite in found.values() if not suite.get("absent")]
    well = all(suite["exit"] == 0 and (suite["passed"] or context.dry) for suite in ran)
    total = {key: sum(suite[key] for suite in ran) for key in ("passed", "failed", "error", "skipped")}
    return bool(ran) and well, {"total": total, "suites": found}


def needs_module(context: Context, name: str) -> None:
    """Unpacks the carried wheels; skips the part if the module is still missing."""
    site = context.state / "wheels"
    if context.wheels is not None and context.wheels.is_dir() and not context.dry:
        pack.unpack(context.wheels, site)
    build.make_site(context)
    if not context.python("-c", f"import {name}").good:
        raise Skip(f"{name} is not installed: carry the wheels of --pack and name their folder with --wheels")


# --- sanitizer and counters ---------------------------------------------------------------------------------

SANITIZERS = ("memcheck", "racecheck", "synccheck")
OURS = "marquardt"  # in the mangled name of every kernel of the library
FOUND_BY_SANITIZER = 9


def sanitize(context: Context, tool: str) -> dict[str, Any]:
    """One tool over the small shapes; over every kernel where this release does not know the filter."""
    program = ["-m", "bench.gpu_kit.shapes"]
    options = ["--tool", tool, "--error-exitcode", FOUND_BY_SANITIZER]
    filtered = True
    ran = watched(context, ["compute-sanitizer", *options, "--kernel-regex", f"kns={OURS}"], program)
    if (
        not context.dry
        and "ERROR SUMMARY" not in ran.output
        and "RACECHECK SUMMARY" not in ran.output
        and not ran.late
    ):
        filtered = False
        ran = watched(context, ["compute-sanitizer", *options], program)
    summary = [line for line in ran.output.splitlines() if "SUMMARY" in line]
    return {
        "clean": context.dry or (ran.good and bool(summary)),
        "late": ran.late,
        "seconds": round(ran.seconds, 1),
        "filtered": filtered,
        "summary": summary,
        "tail": "" if ran.good else ran.tail,
    }


def watched(context: Context, tool: Sequence[Any], program: Sequence[str]) -> Ran:
    return context.run(
        *tool, sys.executable, *program, MARQUARDT_BACKEND="cuda", PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )


def sanitizer(context: Context) -> Result:
    if not context.dry and shutil.which("compute-sanitizer") is None:
        raise Skip("compute-sanitizer is not on PATH")
    build.make_site(context)
    with ThreadPoolExecutor(len(SANITIZERS)) as pool:
        found = dict(zip(SANITIZERS, pool.map(lambda tool: sanitize(context, tool), SANITIZERS), strict=True))
    return all(tool["clean"] for tool in found.values()), found


METRICS = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"


def counters(context: Context) -> Result:
    """Device-memory traffic of one large call, kernel by kernel, against the bytes that have to move."""
    if not context.dry and shutil.which("ncu") is None:
        raise Skip("ncu is not on PATH")
    build.make_site(context)
    # ncu would empty the caches before every kernel, and hide what the second sweep finds in L2.
    tool = [
        "ncu",
        "--cache-control",
        "none",
        "--clock-control",
        "none",
        "--csv",
        "--print-units",
        "base",
        "--metrics",
        METRICS,
    ]
    ran = watched(
        context, [*tool, "--kernel-name", "regex:frame_"], ["-m", "bench.gpu_kit.shapes", "--large"]
    )
    kernels = parse_counters(ran.output)
    due = re.search(r"read at least: (\d+), written: (\d+)", ran.output)
    result: dict[str, Any] = {"kernels": kernels, "tail": "" if kernels else ran.tail}
    if due and kernels:
        read = sum(k.get("dram__bytes_read.sum", 0.0) for k in kernels)
        result |= {"read": read, "read_due": int(due[1]), "reads_of_the_input": round(read / int(due[1]), 3)}
    return context.dry or bool(kernels), result


def parse_counters(output: str) -> list[dict[str, Any]]:
    """One dictionary per kernel launch from ncu's CSV, which has a line for every metric."""
    lines = output.splitlines()
    start = next((k for k, line in enumerate(lines) if line.startswith('"ID"')), None)
    if start is None:
        return []
    launches: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name") and row.get("Metric Value"):
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"]})
            launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(launches.values())


# --- benchmarks ---------------------------------------------------------------------------------------------

MARGIN = 20.0  # seconds that the last row may take, and the writing


def benchmarks(context: Context) -> Result:
    """The ceiling is measured before the first row; rows start until the time is nearly up."""
    needs_module(context, "pytest_benchmark")
    path = context.state / "bench-rows.json"
    path.unlink(missing_ok=True)
    deadline = max(1.0, context.left - MARGIN)
    ceiling = context.python("-m", "bench.ceiling", timeout=60)
    ran = context.python("-m", "bench", "--device", "cuda", "--json", path, "--deadline", f"{deadline:.0f}")
    rows = read_rows(path)
    unmeasured = re.findall(r"out of time, not measured: (.*)", ran.output)
    return context.dry or (ran.good and bool(rows)), {
        "ceiling": parse_whole(ceiling.output),
        "rows": rows,
        "not_measured": unmeasured[0].split() if unmeasured else [],
        "tail": ran.tail,
    }


def parse_whole(text: str) -> Any:
    try:
        return json.loads(text[text.index("{") :])
    except ValueError:
        return {}


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a benchmark JSON, without pytest-benchmark's own statistics."""
    try:
        return [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    except (OSError, ValueError, KeyError):
        return []


PARTS = (
    Part("machine", 10, (), machine),
    Part("build", 100, KERNELS, build_library),
    Part("tests", 110, (*PACKAGE, "tests", "bench/gpu_kit"), tests, needs=("build",)),
    Part("sanitizer", 55, (*PACKAGE, "bench/gpu_kit"), sanitizer, needs=("build",)),
    Part("counters", 20, (*PACKAGE, "bench/gpu_kit"), counters, needs=("build",)),
    Part("bench", 185, (*PACKAGE, "bench"), benchmarks, needs=("build",)),
)
