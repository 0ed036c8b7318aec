"""`python -m bench`: run the suites, show progress, print the table, write the JSON."""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from typing import Any, TextIO

from . import machine, plugin, table

HERE = pathlib.Path(__file__).resolve().parent
LATEST = HERE / "results" / "latest.json"


class Progress:
    """A pytest plugin: one line that is rewritten on a terminal, one line per row elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.terminal = stream.isatty()
        self.total = self.done = 0
        self.start = time.monotonic()
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self.rows: list[table.Info] = []

    def pytest_collection_finish(self, session: Any) -> None:
        self.total, self.start = len(session.items), time.monotonic()
        self.rows = session.config.stash[plugin.RESULTS]  # filled while the rows run

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._show(_row_name(nodeid))

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.skipped:
            self.skipped.append(_row_name(report.nodeid))
        if report.failed:
            self.failures.append(f"{_row_name(report.nodeid)}: {_reason(report)}")
        if report.when == "teardown":
            self.done += 1

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed:
            self.failures.append(str(report.longrepr))

    def close(self) -> None:
        if self.terminal:
            self.stream.write("\r\x1b[K")
            self.stream.flush()

    def _show(self, name: str) -> None:
        passed = time.monotonic() - self.start
        clock = f"{int(passed) // 60}:{int(passed) % 60:02d}"
        if self.terminal:
            filled = 30 * self.done // max(self.total, 1)
            bar = "#" * filled + "." * (30 - filled)
            self.stream.write(f"\r\x1b[K[{bar}] {self.done}/{self.total} {clock} {name}"[: _width() + 4])
        else:
            self.stream.write(f"[{self.done + 1}/{self.total}] {clock} {name}\n")
        self.stream.flush()


def _width() -> int:
    try:
        return max(os.get_terminal_size(2).columns, 60)
    except OSError:
        return 100


def _row_name(nodeid: str) -> str:
    return nodeid.partition("[")[2].rstrip("]") or nodeid


def _reason(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    return crash.message if crash is not None else str(report.longrepr)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("suites", nargs="*", type=pathlib.Path, help="suite files (default: all)")
    parser.add_argument("--full", action="store_true", help="more rows, all compiled peers, longer rounds")
    parser.add_argument("--ops", nargs="+", default=[], help="only these ops")
    parser.add_argument("--dtype", nargs="+", default=[], help="only these dtypes")
    parser.add_argument("--rows", nargs="+", default=[], help="only the rows of these ids (see the JSON)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--deadline", type=float, default=0, help="seconds after which no row is started")
    parser.add_argument("--json", type=pathlib.Path, default=LATEST, help="where the numbers go")
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--show", type=pathlib.Path, help="print the table of an earlier JSON, run nothing")
    return parser.parse_args(arguments)


def show(path: pathlib.Path, as_markdown: bool) -> None:
    rows = [entry["extra_info"] for entry in json.loads(path.read_text())["benchmarks"]]
    made = table.markdown if as_markdown else table.plain
    print(made(rows, rows[0]["machine"] if rows else "none"))


def pytest_arguments(options: argparse.Namespace) -> list[str]:
    """Our own reporter instead of pytest's, and none of the options meant for the tests."""
    chosen = options.suites or plugin.suites(HERE)
    arguments = ["-p", "no:terminal", "-p", "no:cacheprovider", "--noconftest", "-p", "bench.plugin"]
    arguments += ["-o", "addopts=", "--rootdir", str(HERE.parent), "--benchmark-quiet", "--benchmark-only"]
    arguments += [f"--benchmark-json={options.json}", f"--bench-device={options.device}"]
    arguments += [f"--bench-deadline={options.deadline}"]
    arguments += [f"--bench-threads={options.threads}"] + (["--bench-full"] if options.full else [])
    for name in ("ops", "dtype", "rows"):
        arguments.append(f"--bench-{name}={','.join(getattr(options, name))}")
    return [*arguments, *map(str, chosen)]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.show:
        show(options.show, options.markdown)
        return 0
    if not plugin.has_pytest_benchmark():
        print("bench needs pytest-benchmark: pip install pytest-benchmark", file=sys.stderr)
        return 1
    import pytest
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench: --device cuda, but torch finds no CUDA device", file=sys.stderr)
        return 1
    options.json.parent.mkdir(parents=True, exist_ok=True)
    # pytest redirects file descriptor 2 while a row runs; the progress line keeps its own copy.
    progress = Progress(os.fdopen(os.dup(2), "w"))
    start = time.monotonic()
    code = pytest.main(pytest_arguments(options), plugins=[progress])
    progress.close()
    if progress.rows:
        print((table.markdown if options.markdown else table.plain)(progress.rows, machine.line()))
    if progress.skipped:
        print(f"out of time, not measured: {' '.join(progress.skipped)}", file=sys.stderr)
    for failure in progress.failures:
        print(f"FAILED {failure}", file=sys.stderr)
    if not progress.rows and not progress.failures:
        print("bench: no row matches", file=sys.stderr)
        return 1
    print(f"{time.monotonic() - start:.0f} s; numbers in {os.path.relpath(options.json)}", file=sys.stderr)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
