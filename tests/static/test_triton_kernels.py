"""The Triton kernels, compiled ahead of time for every target, by the same checks as the CUDA kernels."""

from __future__ import annotations

import importlib.util
import pathlib
import sys
from typing import Any

import pytest

import cuda_static
import nvcc
import promises
import static_checks

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent))
import triton_ahead

LINES = promises.read([pathlib.Path(triton_ahead.__file__)], cuda_static.ROOT)


def compiled(cases: list[str], capabilities: tuple[int, ...] = (90,)) -> list[dict[str, Any]]:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    if not nvcc.find_tool("cuobjdump"):
        pytest.skip("machine code cannot be read: no cuobjdump")
    found = triton_ahead.compiled(capabilities, cases, cuda_static.CACHE / "triton")
    for target in (f"sm_{capability}" for capability in capabilities):
        assert {r["kernel"]["arguments"] for r in found if r["kernel"]["target"] == target} == set(cases)
    return found


def check(found: list[dict[str, Any]]) -> None:
    kernels = [cuda_static.Kernel(**record["kernel"]) for record in found]
    wrong = static_checks.problems(kernels, LINES, stale=False)
    wrong += [
        f"{r['kernel']['name']}<{r['kernel']['arguments']}> {r['kernel']['target']}: the approximate logarithm"
        for r in found
        if r["approximate_log"]
    ]
    assert not wrong, "\n".join([f"{len(wrong)} broken promises", *wrong])


def test_kernels_keep_their_promises() -> None:
    check(compiled(triton_ahead.QUICK))


@pytest.mark.full
def test_every_variant_keeps_its_promises() -> None:
    found = compiled(triton_ahead.QUICK + triton_ahead.SLOW, triton_ahead.CAPABILITIES)
    check(found)
    names = {(r["kernel"]["name"], r["kernel"]["arguments"]) for r in found}
    assert promises.unused(LINES, names) == []


def test_a_broken_promise_is_reported() -> None:
    found = compiled(["ragged"])
    lines = [line for line in LINES if line.arguments != "ragged"]  # what holds for aligned samples alone
    kernels = [cuda_static.Kernel(**record["kernel"]) for record in found]
    wrong = "\n".join(static_checks.problems(kernels, lines, stale=False))
    assert "gram_kernel<ragged> sm_90 (triton_kernels): no LDG.128 in the code" in wrong
    assert "apply_kernel<ragged> sm_90 (triton_kernels): no STG.128 in the code" in wrong
    assert "are promised" in wrong  # its occupancy
