"""Static proof: what nvcc makes of the kernels, read without a GPU. Everything in this folder is marked `static`."""

from __future__ import annotations

import os
import pathlib
import sys
from collections.abc import Callable

import pytest

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1] / "build_tools"))  # where cuda_static and its neighbours lie

import cuda_static  # noqa: E402
import nvcc  # noqa: E402


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.static)


@pytest.fixture(scope="session")
def compiler() -> str:
    """nvcc of the machine, or of the spare environment that is made where there is none."""
    try:
        path = nvcc.find_or_install()
    except nvcc.NoCompiler as problem:
        pytest.skip(f"nothing is compiled: {problem}")
    if not nvcc.find_tool("cuobjdump"):
        pytest.skip("machine code cannot be read: no cuobjdump beside nvcc, on PATH or in Triton's package")
    return path


@pytest.fixture(scope="session")
def kernels(compiler: str) -> list[cuda_static.Kernel]:
    """Every kernel of the library for every target."""
    return cuda_static.kernels()


@pytest.fixture
def compiled(
    compiler: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[cuda_static.Kernel]]:
    """compiled(text, *targets): the kernels of a source text."""
    monkeypatch.setattr(cuda_static, "CACHE", tmp_path / "cache")

    def run(text: str, *targets: str) -> list[cuda_static.Kernel]:
        source = tmp_path / "planted.cu"
        source.write_text(text)
        os.utime(source, (1e9, 1e9))  # long before it is compiled
        return cuda_static.kernels(targets or ("sm_90",), [source])

    return run
