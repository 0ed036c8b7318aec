"""CUDA kernels on the CPU: builds what the tests of this folder run, once a session and only what is asked for."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))

import emulation as emulated  # noqa: E402


def _module(name: str):
    try:
        path = emulated.module(name)
    except emulated.Missing as problem:
        pytest.skip(str(problem))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulation():
    """The frame engine's kernels on numpy arrays."""
    return _module("_emulation")


@pytest.fixture(scope="session")
def machine():
    """Small kernels that test the emulated machine."""
    return _module("_machine")


@pytest.fixture(scope="session")
def program():
    """program(name, variant, *words) runs a stand-alone program: plain, or under asan or tsan."""

    def run(name: str, variant: str, *words: str, timeout: float = 300):
        try:
            return emulated.run(name, variant, *words, timeout=timeout)
        except emulated.Missing as problem:
            pytest.skip(str(problem))

    return run
