"""What each part does with the machine."""

from __future__ import annotations

import contextlib
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
COMPILERS = ("nvcc", "g++", "cmake")
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
    """What MARQUARDT_COMMIT says, else the short hash with + for local changes, 'unknown' outside a repository."""
    if named := os.environ.get("MARQUARDT_COMMIT"):
        return named

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


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
    tools = {name: bool(shutil.which(name)) for name in TOOLS}
    said = {name: context.run(name, "--version") if tools[name] else Ran(1, "", 0.0) for name in COMPILERS}
    versions = context.python("-c", VERSIONS)
    return smi.good or context.dry, {
        "gpus": gpus,
        "nvcc": last_line(said["nvcc"].output),
        "g++": first_line(said["g++"].output),
        "cmake": first_line(said["cmake"].output),
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": parse_json(versions.output),
        "tools": tools,
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

# name -> (files, -k expression, processes); a test's id holds its target, "cuda-cuda" or "cuda-triton".
LOWRANK = tuple(
    f"tests/test_lowrank{name}.py" for name in ("", "_forms", "_logdet", "_update", "_hessian_module")
)
SUITES = {
    "cuda": (
        ("tests/test_cuda.py", "tests/test_gauss_newton.py", "tests/test_gauss_newton_calls.py"),
        "Cuda or cuda",
        1,
    ),
    "lowrank-cuda": (LOWRANK, "cuda-cuda", 7),
    "hessian-cuda": (("tests/test_hessian.py",), "cuda-cuda", 2),
    "langevin-cuda": (("tests/test_langevin.py",), "cuda-cuda", 2),
    "lowrank-triton": (LOWRANK, "cuda-triton", 4),
    "hessian-triton": (("tests/test_hessian.py",), "cuda-triton", 3),
    "langevin-triton": (("tests/test_langevin.py",), "cuda-triton", 5),
}
WITHOUT_BUILD = tuple(name for name in SUITES if name.endswith("-triton"))


def record_of(context: Context, name: str, shard: int) -> pathlib.Path:
    return context.state / f"record-{name}-{shard}.jsonl"


def run_suite(context: Context, name: str, shard: int) -> Ran | None:
    """A share of a suite's tests; None if there is no such suite here."""
    files, chosen, shards = SUITES[name]
    there = [file for file in files if (context.root / file).is_file()]
    if not there:
        return None
    record = record_of(context, name, shard)
    for old in (record, record.with_suffix(".stack")):
        old.unlink(missing_ok=True)
    words = ["-m", "pytest", "-q", "-o", "addopts=", "-p", "bench.gpu_kit.recorder", "-p", "no:cacheprovider"]
    words += ["-m", "not full", *(["-k", chosen] if chosen else []), *there]
    threads = max(1, len(os.sched_getaffinity(0)) // sum(suite[2] for suite in SUITES.values()))
    environment = {
        "MARQUARDT_TEST_DEVICE": "cuda",
        "MARQUARDT_RECORD": str(record),
        "MARQUARDT_SHARD": f"{shard}/{shards}",
        "OMP_NUM_THREADS": str(threads),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # others' plugins
    }
    worst = ran = context.python(*words, **environment)
    for death in range(MOST_DEATHS):
        if ran.code >= 0 or ran.late:
            break
        worst = ran
        fatal = ran.output.find("Fatal Python error")
        name = recorder.died(record, f"signal {-ran.code}\n{ran.output[max(fatal, 0) :]}")
        if death == 0 and "::" in name:
            backtrace(context, name, record)
        ran = context.python(*words, **environment)
    return worst if ran.good else ran


MOST_DEATHS = 10  # of a suite's process; each costs a start


def backtrace(context: Context, test: str, record: pathlib.Path) -> None:
    """The stack of a test that ends its process, into the log and beside the record."""
    debugger = shutil.which("cuda-gdb") or shutil.which("gdb")
    if debugger is None:
        return
    words = [debugger, "--batch", "-ex", "run", "-ex", "bt 30", "-ex", "info sharedlibrary", "--args"]
    words += [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", test]
    ran = context.run(*words, timeout=45, MARQUARDT_TEST_DEVICE="cuda", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1")
    record.with_suffix(".stack").write_text(ran.output[-20000:])


def suite_result(context: Context, name: str, ran: Sequence[Ran | None]) -> dict[str, Any]:
    there = [one for one in ran if one is not None]
    if not there:
        return {"absent": True}
    summary = recorder.summary(*(record_of(context, name, k) for k in range(len(ran))))
    worst = next((one for one in there if not one.good), there[0])
    stacks = [
        s for k in range(len(ran)) if (s := record_of(context, name, k).with_suffix(".stack")).is_file()
    ]
    return {
        "exit": worst.code,
        "late": any(one.late for one in there),
        "seconds": round(max(one.seconds for one in there), 1),
        **summary,
        **({"stack": stacks[0].read_text()[:6000]} if stacks else {}),
        **({"tail": worst.tail} if not worst.good and not summary["failures"] else {}),
    }


def tests(context: Context) -> Result:
    """All suites side by side: the work is compiling and comparing on the host. Without a build, Triton's alone."""
    if context.missing:
        gpu_arch(context)  # nothing was built because there is no GPU
    needs_module(context, "pytest")
    chosen = WITHOUT_BUILD if context.missing else tuple(SUITES)
    shards = [(name, shard) for name in chosen for shard in range(SUITES[name][2])]
    with ThreadPoolExecutor(len(shards)) as pool:
        ran = dict(zip(shards, pool.map(lambda shard: run_suite(context, *shard), shards), strict=True))
    found = {
        name: suite_result(context, name, [ran[shard] for shard in shards if shard[0] == name])
        for name in chosen
    }
    there = [suite for suite in found.values() if not suite.get("absent")]
    well = all(suite["exit"] == 0 and (suite["passed"] or context.dry) for suite in there)
    total = {key: sum(suite[key] for suite in there) for key in ("passed", "failed", "error", "skipped")}
    result = {"reason": partly(context), "total": total, "suites": found}
    return bool(there) and well and not context.missing, result


def partly(context: Context) -> str:
    return f"in part, without {', '.join(context.missing)}" if context.missing else ""


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
    program = ["-m", "bench.gpu_kit.shapes", *(["--few"] if tool == "racecheck" else [])]  # it is the slowest
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
# Why a warp did not issue, in cycles for every instruction that was issued.
STALLS = ("barrier", "branch_resolve", "dispatch_stall", "lg_throttle", "long_scoreboard", "math_pipe_throttle",
          "membar", "mio_throttle", "no_instruction", "short_scoreboard", "sleeping", "wait")  # fmt: skip
DETAILS = (
    "gpu__time_duration.sum",
    "sm__cycles_elapsed.max",
    "launch__grid_size",
    "launch__block_size",
    "launch__registers_per_thread",
    "launch__shared_mem_per_block_dynamic",
    "launch__waves_per_multiprocessor",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "lts__t_sectors_op_read.sum",
    "lts__t_sectors_op_write.sum",
    "smsp__inst_executed.sum",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "sm__inst_executed_pipe_fp64.sum",
    "sm__inst_executed_pipe_fp64.avg.pct_of_peak_sustained_active",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    *(f"smsp__average_warps_issue_stalled_{name}_per_issue_active.ratio" for name in STALLS),
)


def count(context: Context, metrics: str, cache: str, *program: str) -> Ran:
    """The program under Nsight Compute, which must leave the clocks alone."""
    tool = ["ncu", "--cache-control", cache, "--clock-control", "none", "--csv", "--print-units", "base"]
    tool += ["--metrics", metrics, "--kernel-name", "regex:frame_"]
    return watched(context, tool, ["-m", "bench.gpu_kit.shapes", *program])


def counters(context: Context) -> Result:
    """Device-memory traffic of one large call, kernel by kernel, against the bytes that have to move; then what the
    multiprocessors did in calls of several sizes."""
    if not context.dry and shutil.which("ncu") is None:
        raise Skip("ncu is not on PATH")
    build.make_site(context)
    # ncu would empty the caches before every kernel, and hide what the second sweep finds in L2.
    ran = count(context, METRICS, "none", "--large")
    kernels = parse_counters(ran.output)
    due = re.search(r"read at least: (\d+), written: (\d+)", ran.output)
    result: dict[str, Any] = {"kernels": kernels, "tail": "" if kernels else ran.tail}
    if due and kernels:
        read = sum(k.get("dram__bytes_read.sum", 0.0) for k in kernels)
        result |= {"read": read, "read_due": int(due[1]), "reads_of_the_input": round(read / int(due[1]), 3)}
    if context.dry or context.left > LEAST_DETAILS:
        detailed = count(context, ",".join(DETAILS), "all", "--sizes")
        result["details"] = parse_counters(detailed.output)
        result["tail"] = result["tail"] or ("" if result["details"] else detailed.tail)
    return context.dry or bool(kernels), result


LEAST_DETAILS = 8.0  # seconds


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
            with contextlib.suppress(ValueError):  # "n/a"
                launch[row["Metric Name"]] = float(row["Metric Value"].replace(",", ""))
    return list(launches.values())


# --- benchmarks ---------------------------------------------------------------------------------------------

START, MARGIN = 10.0, 15.0  # seconds: until the first row starts; of the last row, and of writing


def benchmarks(context: Context) -> Result:
    """The ceiling, for which nothing has to be built; then rows start until the time is nearly up. Each row is written
    as it is measured, so that what was measured stays when the time is up in spite of that."""
    if context.missing:
        gpu_arch(context)
    ceiling = context.python("-m", "bench.ceiling", timeout=60)
    path, lines, ceilings = (
        context.state / f"bench-{name}" for name in ("rows.json", "rows.jsonl", "ceiling.json")
    )
    for old in (path, lines):
        old.unlink(missing_ok=True)
    result = {"ceiling": parse_whole(ceiling.output), "rows": [], "not_measured": [], "tail": ceiling.tail}
    if not context.dry:
        ceilings.write_text(json.dumps(result["ceiling"]))
    if context.missing:
        return False, {"reason": partly(context), **result}
    needs_module(context, "pytest_benchmark")
    deadline = max(1.0, context.left - START - MARGIN)
    ran = context.python(
        *("-m", "bench", "--device", "cuda", "--json", path, "--deadline", f"{deadline:.0f}"),
        MARQUARDT_BENCH_ROWS=str(lines),
        MARQUARDT_BENCH_CEILING=str(ceilings) if result["ceiling"] else "",
        MARQUARDT_COMMIT=commit(),
    )
    rows = read_rows(path, lines)
    unmeasured = re.findall(r"out of time, not measured: (.*)", ran.output)
    return context.dry or (ran.good and bool(rows)), {
        **result,
        "rows": rows,
        "not_measured": unmeasured[0].split() if unmeasured else [],
        "tail": ran.tail,
    }


def parse_whole(text: str) -> Any:
    try:
        return json.loads(text[text.index("{") :])
    except ValueError:
        return {}


def read_rows(path: pathlib.Path, lines: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a benchmark JSON, without pytest-benchmark's own statistics; and those that were only written down
    as they came: wrong results, and all of them if the time was up before the JSON."""
    try:
        rows = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    except (OSError, ValueError, KeyError):
        rows = []
    have = {row["id"] for row in rows}
    return rows + [row for row in read_lines(lines) if row["id"] not in have]


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The rows of a file that has one to a line; the last may be cut off."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


# What matters most comes first. Time that a part leaves goes to those after it.
PARTS = (
    Part("machine", 0.02, (), machine),
    Part("build", 0.18, KERNELS, build_library),
    Part("tests", 0.36, (*PACKAGE, "tests", "bench/gpu_kit"), tests, wants=("build",)),
    Part("bench", 0.30, (*PACKAGE, "bench"), benchmarks, wants=("build",)),
    Part("sanitizer", 0.10, (*PACKAGE, "bench/gpu_kit"), sanitizer, needs=("build",)),
    Part("counters", 0.04, (*PACKAGE, "bench/gpu_kit"), counters, needs=("build",)),
)
