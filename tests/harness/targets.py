"""Where tests run: every backend on the CPU, and on a GPU if there is one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Target:
    """A device and the backend forced on it."""

    device: str
    backend: str

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        import marquardt

        # on CPU tensors "auto" is "cpu", and only "auto" takes the short way to the kernels
        with marquardt.use_backend("auto" if self.backend == "cpu" else self.backend):
            yield

    @property
    def steady(self) -> bool:
        """Whether bits do not depend on batch size, position in the batch and thread count."""
        return self.backend != "reference"

    def __str__(self) -> str:
        return f"{self.device}-{self.backend}"


def targets() -> list[Target]:
    """One process knows Triton either through its interpreter or not at all.

    MARQUARDT_TEST_DEVICE=cuda leaves the CPU out, and refuses to run without a GPU.
    """
    if INTERPRETED:
        return [Target("cpu", "triton")]
    only = os.environ.get("MARQUARDT_TEST_DEVICE", "")
    if only not in ("", "cpu", "cuda") or (only == "cuda" and not torch.cuda.is_available()):
        raise pytest.UsageError(f"MARQUARDT_TEST_DEVICE={only}: torch finds no such device")
    forced = os.environ.get("MARQUARDT_BACKEND", "auto")
    names = ["cpu", "reference"] if forced == "auto" else [forced]
    found = [Target("cpu", name) for name in names if name in ("cpu", "reference")]
    if torch.cuda.is_available():
        from marquardt.backends import available

        on_gpu = [n for n in available("cuda") if n in ("cuda", "triton", "reference")]
        found += [Target("cuda", name) for name in on_gpu if forced in ("auto", name)]
    return [target for target in found if only in ("", target.device)]


def native_only() -> None:
    """Skips what needs the native operators in a run that does without them."""
    if INTERPRETED:
        pytest.skip("the Triton interpreter cannot be traced")
    if os.environ.get("MARQUARDT_BACKEND", "auto") not in ("auto", "cpu", "cuda"):
        pytest.skip("MARQUARDT_BACKEND chooses a backend without native operators")


def kind(name: str):
    """Class decorator: gives every test of a kind its marker."""

    def mark(cls):
        for attribute, function in list(vars(cls).items()):
            if attribute.startswith("test_"):
                setattr(cls, attribute, getattr(pytest.mark, name)(function))
        return cls

    return mark
