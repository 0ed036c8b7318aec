"""Prints the number of tests by kind; a test counts for every kind that it is marked with."""

import contextlib
import io
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent


class Kinds:
    """Counts the marks of what pytest collects."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.count: Counter = Counter()

    def pytest_configure(self, config) -> None:
        self.names = [line.split(":")[0] for line in config.getini("markers")]

    def pytest_collection_finish(self, session) -> None:
        for item in session.items:
            self.count["all"] += 1
            self.count.update({mark.name for mark in item.iter_markers()} & set(self.names))


def count(arguments: list[str]) -> Counter:
    kinds, said = Kinds(), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(["--collect-only", "-q", *arguments], plugins=[kinds])
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        sys.exit(said.getvalue())
    return kinds.count


def main() -> None:
    if sys.argv[1:] == [
        "--triton"
    ]:  # the interpreter is chosen before Triton is imported: a process of its own
        counts = count([str(TESTS / "triton")])
    else:
        counts = count([str(TESTS), f"--ignore={TESTS / 'triton'}"])
    width = max(map(len, counts), default=0)
    for name, number in sorted(counts.items(), key=lambda pair: (pair[0] != "all", -pair[1])):
        print(f"{name:{width}} {number:6d}")
    if len(sys.argv) == 1 and (TESTS / "triton").is_dir():
        print("\ntests/triton, through the interpreter", flush=True)
        sys.exit(
            subprocess.run(
                [sys.executable, __file__, "--triton"], env={**os.environ, "TRITON_INTERPRET": "1"}
            ).returncode
        )


if __name__ == "__main__":
    main()
