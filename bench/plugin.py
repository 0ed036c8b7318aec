"""How a row becomes a pytest-benchmark test.

pytest-benchmark times one function at a time; fair ratios need all contestants in the same rounds. So
`protocol.measure` does the timing, and its samples of our op are handed to pytest-benchmark through two of
its documented doors: the `timer` of the benchmark marker and `benchmark.pedantic`. The timer is a clock that
stands still except when the replayed "call" advances it by the next sample. pytest-benchmark's statistics,
JSON, `--benchmark-compare` and histograms are then those of the interleaved samples; everything else (peers,
floors, goals, machine) is in extra_info. `--benchmark-disable` runs the correctness gate alone.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
import os
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from . import ceiling, machine, protocol, table
from .row import Row

PATTERN = "bench_*.py"
RESULTS: pytest.StashKey[list[table.Info]] = pytest.StashKey()
START: pytest.StashKey[float] = pytest.StashKey()


class ReplayClock:
    """A timer for pytest-benchmark that shows the samples it is given."""

    def __init__(self) -> None:
        self.now = 0.0
        self._samples: Iterator[float] = iter(())

    def read(self) -> float:
        return self.now

    def rewind(self) -> None:
        self.now = 0.0

    def advance(self) -> None:
        self.now += next(self._samples)

    def replay(self, benchmark: Any, samples: Sequence[float]) -> None:
        self._samples = iter(samples)
        benchmark.pedantic(self.advance, setup=self.rewind, rounds=len(samples))


def repro(row: Row, config: pytest.Config) -> str:
    """The command that measures this row again."""
    words = ["python -m bench", f"--rows {row.id}", f"--threads {torch.get_num_threads()}"]
    words += [f"--device {row.device}"] if row.device != "cpu" else []
    return " ".join([*words, *(["--full"] if config.getoption("bench_full", False) else [])])


def describe(row: Row) -> table.Info:
    return {
        "id": row.id,
        "op": row.op,
        "variant": row.variant,
        "shape": list(row.shape),
        "dtype": row.dtype_name,
        "device": row.device,
        "bytes": row.traffic,
        "flops": row.flops,
    }


def info(result: protocol.Result, command: str) -> table.Info:
    """Everything about a measured row, as JSON."""
    row, median = result.row, result.median()
    peers = {
        name: {
            "median": result.median(name),
            "spread": result.spread(name),
            "ratio": result.median(name) / median,
            "error": error,
            "exact": None if error is None else name not in result.inexact,
        }
        for name, error in result.peer_errors.items()
    }
    floors = {
        name: {
            "seconds": seconds,
            "fraction": seconds / median,
            "how": result.floor_notes[name],
            "substitute": name in result.substitutes,
        }
        for name, seconds in result.floors.items()
    }
    goals = []
    for goal in row.goals:
        value = result.value(goal) if result.can_judge(goal) else None
        met = None if value is None else goal.met(value)
        common = {"against": goal.against, "bound": goal.bound, "slower": goal.slower, "text": str(goal)}
        goals.append({**common, "value": value, "met": met})
    return {
        **describe(row),
        "median": median,
        "spread": result.spread(),
        "rounds": len(result.samples[protocol.OURS]),
        "repeats": result.repeats,
        "timing": result.timing,
        "buffer_sets": result.buffer_sets,
        "ceiling": None if row.device == "cpu" else ceiling.measured()["gbps"],
        "gbps": row.traffic / median * 1e-9,
        "gflops": row.flops / median * 1e-9,
        "gate": {"error": result.error, "tolerance": result.tolerance},
        "peers": peers,
        "floors": floors,
        "contestants": {name: result.median(name) for name in result.samples},
        "goals": goals,
        "machine": machine.line(),
        "commit": machine.describe()["commit"],
        "versions": machine.versions(),
        "repro": command,
    }


def keep(found: table.Info, config: pytest.Config) -> None:
    """For the table, and in the file that MARQUARDT_BENCH_ROWS names, where it survives the end of the process."""
    config.stash[RESULTS].append(found)
    if path := os.environ.get("MARQUARDT_BENCH_ROWS"):
        with pathlib.Path(path).open("a") as file:
            file.write(json.dumps(found) + "\n")


# --- pytest hooks -----------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("marquardt benchmarks")
    group.addoption("--bench-full", action="store_true", help="more rows, all compiled peers, longer rounds")
    group.addoption("--bench-ops", default="", help="comma-separated ops")
    group.addoption("--bench-dtype", default="", help="comma-separated dtypes")
    group.addoption("--bench-rows", default="", help="comma-separated row ids")
    group.addoption("--bench-device", default="cpu", choices=["cpu", "cuda"])
    group.addoption("--bench-deadline", type=float, default=0, help="seconds after which rows are skipped")
    group.addoption("--bench-threads", type=int, default=0, help="CPU threads (default: torch's own choice)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RESULTS] = []
    config.stash[START] = time.monotonic()
    if named := os.environ.get("MARQUARDT_COMMIT"):  # of sources that lie outside their repository
        machine.describe()["commit"] = named
    threads = config.getoption("bench_threads", 0)
    if threads:
        torch.set_num_threads(threads)


def pytest_collect_file(file_path: pathlib.Path, parent: pytest.Collector) -> pytest.Module | None:
    """`pytest bench` finds the suites whatever python_files says; a file named on the command line is found
    by pytest itself, and so is one that python_files matches."""
    known = parent.config.getini("python_files")
    if not fnmatch.fnmatch(file_path.name, PATTERN) or parent.session.isinitpath(file_path):
        return None
    if any(fnmatch.fnmatch(file_path.name, pattern) for pattern in known):
        return None
    return pytest.Module.from_parent(parent, path=file_path)


def wanted(row: Row, config: pytest.Config) -> bool:
    for option, value in (("bench_ops", row.op), ("bench_dtype", row.dtype_name), ("bench_rows", row.id)):
        chosen = [word for word in config.getoption(option, "").split(",") if word]
        if chosen and value not in chosen:
            return False
    return True


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measure" in metafunc.fixturenames and "row" in metafunc.fixturenames:
        config = metafunc.config
        device = config.getoption("bench_device", "cpu")
        full = config.getoption("bench_full", False)
        rows: list[Row] = list(metafunc.module.rows(device, full))
        if (
            config.getoption("bench_rows", "") and not full
        ):  # a row asked for by name may be one of the full run
            have = {row.id for row in rows}
            rows += [row for row in metafunc.module.rows(device, True) if row.id not in have]
        rows = [row for row in rows if wanted(row, config)]
        metafunc.parametrize("row", rows, ids=[row.id for row in rows])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "measure" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.benchmark(timer=CLOCK.read))
            item.add_marker(pytest.mark.filterwarnings("default"))  # compilers warn; that is no failed row


CLOCK = ReplayClock()


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Row], None]:
    """Gate and time a row, and leave its samples and numbers with pytest-benchmark."""
    config = request.config

    def run(row: Row) -> None:
        benchmark.group = row.op
        deadline = config.getoption("bench_deadline", 0)
        if deadline and time.monotonic() - config.stash[START] > deadline:
            pytest.skip(f"out of time: rows start within {deadline:g} s")
        if row.device != "cpu" and benchmark.enabled:
            ceiling.measured()  # before the first row
        if not benchmark.enabled:
            protocol.check(row)
            benchmark.pedantic(lambda: None)
            return
        quick = protocol.QUICK if row.device == "cpu" else protocol.GPU
        settings = protocol.FULL if config.getoption("bench_full", False) else quick
        try:
            result = protocol.measure(row, settings)
        except protocol.WrongResult as wrong:
            empty: dict[str, Any] = {"goals": [], "peers": {}, "floors": {}}
            keep({**describe(row), **empty, "failure": str(wrong)}, config)
            benchmark.pedantic(lambda: None)
            benchmark.has_error = True  # keeps the row out of pytest-benchmark's statistics
            raise
        found = info(result, repro(row, config))
        benchmark.extra_info.update(found)
        keep(found, config)
        CLOCK.replay(benchmark, result.samples[protocol.OURS])

    return run


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.pop("node", None)  # a host's name says nothing about its speed
    passing = ("load", "commit")  # what changes from run to run is no other machine
    machine_info["marquardt"] = {k: v for k, v in machine.describe().items() if k not in passing}


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash[RESULTS]
    if rows:
        terminalreporter.write_line("")
        terminalreporter.write_line(table.plain(rows, machine.line()))


def suites(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(folder.glob(PATTERN))


def has_pytest_benchmark() -> bool:
    return importlib.util.find_spec("pytest_benchmark") is not None
