"""A pytest plugin that writes every outcome as it comes: what ran is known even when the time limit strikes.

`-p bench.gpu_kit.recorder` with MARQUARDT_RECORD=<file>; one JSON line for every test that failed, and counts. With
MARQUARDT_SHARD=k/n this process takes every n-th test, from the k-th on. What a process before it began, as the record
says, is left out: so a suite goes on behind a test that ended the process.
"""

from __future__ import annotations

import json
import os
import pathlib
from collections import Counter
from typing import Any

import pytest

SHOWN = 2000  # characters of a failure


def _write(record: dict[str, Any]) -> None:
    with pathlib.Path(os.environ["MARQUARDT_RECORD"]).open("a") as file:
        file.write(json.dumps(record) + "\n")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(items: list[Any]) -> None:
    k, n = (int(word) for word in os.environ.get("MARQUARDT_SHARD", "0/1").split("/"))
    begun = set(started(pathlib.Path(os.environ["MARQUARDT_RECORD"])))
    items[:] = [item for item in items[k::n] if item.nodeid not in begun]


def pytest_runtest_logstart(nodeid: str) -> None:
    _write({"started": nodeid})


def pytest_collection_finish(session: Any) -> None:
    _write({"collected": len(session.items)})


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        record = {"test": report.nodeid, "outcome": "error" if _broke(report) else report.outcome}
        if report.failed:
            record["why"] = str(report.longrepr)[-SHOWN:]
        elif report.skipped and isinstance(report.longrepr, tuple):
            record["why"] = str(report.longrepr[2])
        _write(record)


def pytest_collectreport(report: Any) -> None:
    if report.failed:
        _write({"test": report.nodeid, "outcome": "error", "why": str(report.longrepr)[-SHOWN:]})


def _broke(report: Any) -> bool:
    return bool(report.failed and report.when != "call")


def read(path: pathlib.Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue  # cut off
    return records


def started(path: pathlib.Path) -> list[str]:
    """The tests that were begun, in their order."""
    return [record["started"] for record in read(path) if "started" in record]


def died(path: pathlib.Path, why: str) -> str:
    """Records that the last test which was begun took the process along; its name."""
    name = (started(path) or ["before the first test"])[-1]
    with path.open("a") as file:
        file.write("\n" + json.dumps({"test": name, "outcome": "error", "why": why[:SHOWN]}) + "\n")
    return name


def summary(*paths: pathlib.Path, most: int = 40) -> dict[str, Any]:
    """Counts and failures of records; readable while they are still being written."""
    files = [read(path) for path in paths]
    records = [record for file in files for record in file]
    outcomes = Counter(r["outcome"] for r in records if "outcome" in r)
    bad = [r for r in records if r.get("outcome") in ("failed", "error")]
    skips = Counter(r.get("why", "") for r in records if r.get("outcome") == "skipped")
    return {
        "collected": sum(next((r["collected"] for r in file if "collected" in r), 0) for file in files),
        **{name: outcomes[name] for name in ("passed", "failed", "error", "skipped")},
        "skip_reasons": dict(skips.most_common(10)),
        "failures": bad[:most],
    }
