"""Fixtures and hooks that every test shares: kinds and their count, poisoned outputs, suites."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib

import pytest
import torch

import harness


def pytest_configure(config: pytest.Config) -> None:
    # A process that a test starts is no worker of pytest-xdist: pytest-benchmark would measure nothing in it.
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    for name in harness.KINDS:
        config.addinivalue_line("markers", f"{name}: one kind of test of the harness")
    config.addinivalue_line("markers", "full: slow; runs only with --full, or FULL=1 in the environment")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="also run the tests marked full")


def pytest_ignore_collect(collection_path: pathlib.Path, config: pytest.Config) -> bool | None:
    """tests/triton wants a process of its own: runs of other kinds of tests leave it out."""
    other = any(kind in (config.getoption("-m") or "") for kind in ("emulation", "static"))
    return True if other and collection_path.name == "triton" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    op = getattr(metafunc.cls, "op", None)
    if isinstance(op, harness.Op):
        harness.parametrize(metafunc, op)
    elif "target" in metafunc.fixturenames:
        metafunc.parametrize("target", harness.targets(), ids=str)


# Tests that take seconds a case, of which there are many: a plain run takes the first case of each, on a kernel; the
# formulas themselves, and the other cases, are for FULL=1.
FIRST_CASE = {
    "test_dynamic_batch_is_one_graph",
    "test_dynamic_shapes",
    "test_fullgraph",
    "test_gradgradcheck",
    "test_no_error_in_a_trace",
    "test_one_graph",
    "test_ten_steps_are_one_graph",
    "test_twenty_coefficients_are_one_graph",
    "test_values_and_gradients",
}
# Of these, and of the classes of traces (…Traced), all cases, but on the kernels alone.
KERNELS_ONLY = {"test_gradcheck", "test_langevin", "test_underdamped", "test_each_argument_alone"}


def mark_as_full(items: list[pytest.Item]) -> None:
    """Marks what a plain run leaves out of the tests above."""
    seen: set[str] = set()
    for item in items:
        name = getattr(item, "originalname", None)
        if name not in FIRST_CASE | KERNELS_ONLY and "Traced" not in item.nodeid:
            continue
        target = getattr(item, "callspec", None) and item.callspec.params.get("target")
        function = item.nodeid.split("[")[0]
        if (target is not None and target.backend == "reference") or (
            name in FIRST_CASE and function in seen
        ):
            item.add_marker(pytest.mark.full)
        else:
            seen.add(function)


@pytest.hookimpl(tryfirst=True)  # before -m looks at the markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_as_full(items)
    full = config.getoption("--full") or os.environ.get("FULL") == "1"
    asked = "full" in (config.getoption("-m") or "")
    for item in items:
        if harness.INTERPRETED:
            item.add_marker(pytest.mark.interpreter)
        if item.get_closest_marker("full") and not (full or asked):
            item.add_marker(pytest.mark.skip(reason="slow: run with --full"))
    # The longest first, so that the others run beside it.
    items.sort(key=lambda item: item.get_closest_marker("packaging") is None)


@pytest.fixture(autouse=True)
def same_draws():
    """Whatever a test draws from the default generator (gradgradcheck does) is the same in every process and order."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def backend_of_target(request):
    """A test with a target runs on its backend from end to end, backward passes included."""
    target = getattr(request.node, "callspec", None) and request.node.callspec.params.get("target")
    with target() if target else contextlib.nullcontext():
        yield


@pytest.fixture(autouse=True)
def poisoned_outputs():
    """New outputs of the native kernels start as NaN, so an element that is never written shows."""
    if not hasattr(torch.ops.marquardt, "_set_poison"):
        yield
        return
    torch.ops.marquardt._set_poison(True)
    yield
    torch.ops.marquardt._set_poison(False)


def pytest_terminal_summary(terminalreporter, exitstatus, config) -> None:
    """How many tests of each kind ran, and how they ended."""
    counts: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)
    for outcome in ("passed", "failed", "skipped", "error"):
        for report in terminalreporter.stats.get(outcome, ()):
            for name in harness.KINDS:
                if name in getattr(report, "keywords", {}):
                    counts[name][outcome] += 1
    if counts:
        terminalreporter.section("tests by kind")
        for name in harness.KINDS:
            if counts[name]:
                line = ", ".join(f"{number} {outcome}" for outcome, number in counts[name].items())
                terminalreporter.write_line(f"{name:12} {line}")
