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
    for name in (
        "frame",
        "generic",
        "launch",
        "layout",
        "library",
        "lowrank",
        "maps",
        "philox",
        "small",
        "stack",
    ):
        importlib.import_module(f"{triton_kernels.__name__}.{name}")
    return triton_kernels


SENTINEL, PAGE = 77.0, 4096


@pytest.fixture(autouse=True)
def guarded_outputs(kernels, monkeypatch):
    """Every output lies between two pages of sentinels and is full of NaN before the kernel writes.

    The interpreter does not notice a store out of bounds; the sentinels do, and NaN shows what was never written.
    """
    buffers = []

    def guarded(count, dtype, shape, strides):
        buffer = torch.full((count + 2 * PAGE,), SENTINEL, dtype=dtype)
        buffer[PAGE : PAGE + count] = float("nan")
        buffers.append((buffer, count))
        return buffer.as_strided(shape, strides, PAGE)

    def empty(layout, like):
        return guarded(layout.batch * layout.size, like.dtype, layout.shape, layout.inner)

    def empty_stack(layout, count, dtype, device):
        like = torch.empty_strided(layout.shape, layout.inner, dtype=dtype)
        strides = kernels.layout.stack_strides(like, count, layout.batch_dims)
        return guarded(layout.batch * count * layout.size, dtype, *strides)

    monkeypatch.setattr(kernels.layout.Layout, "empty", empty)
    monkeypatch.setattr(kernels.layout.Layout, "empty_stack", empty_stack)
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
