"""Triton kernels in the interpreter: this folder runs in its own process, under TRITON_INTERPRET=1."""

import importlib
import os
import sys

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    if "triton" in sys.modules:  # its own functions are already of the compiled kind
        raise pytest.UsageError("tests/triton: run in a process of its own with TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def kernels():
    """The package of kernels, installed or from the source tree."""
    pytest.importorskip("triton")
    try:
        from marquardt import triton_kernels
    except ImportError:
        import triton_kernels
    for name in ("frame", "generic", "launch", "layout", "library", "maps", "philox"):
        importlib.import_module(f"{triton_kernels.__name__}.{name}")
    return triton_kernels


SENTINEL, PAGE = 77.0, 4096


@pytest.fixture(autouse=True)
def guarded_outputs(kernels, monkeypatch):
    """Every output lies between two pages of sentinels and is full of NaN before the kernel writes.

    The interpreter does not notice a store out of bounds; the sentinels do, and NaN shows what was never written.
    """
    buffers = []

    def empty(layout, like):
        count = layout.batch * layout.size
        buffer = torch.full((count + 2 * PAGE,), SENTINEL, dtype=like.dtype)
        buffer[PAGE : PAGE + count] = float("nan")
        buffers.append((buffer, count))
        return buffer.as_strided(layout.shape, layout.inner, PAGE)

    monkeypatch.setattr(kernels.layout.Layout, "empty", empty)
    yield
    for buffer, count in buffers:
        assert (buffer[:PAGE] == SENTINEL).all() and (buffer[PAGE + count :] == SENTINEL).all()


@pytest.fixture(params=["fused", "split"])
def launches(request, kernels, monkeypatch):
    """One launch of one chunk, or two with small blocks and many chunks."""
    if request.param == "split":
        config = kernels.launch.FrameConfig

        def choose(size, vectors, gram, double):
            return config(256, 1, 512, -(-size // 512)) if gram else config(256, 1, 256, -(-size // 256))

        monkeypatch.setattr(kernels.launch, "choose", choose)
    return request.param
