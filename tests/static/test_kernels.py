"""The kernels of the library, compiled for every target: resources, occupancy and machine code as promised."""

from __future__ import annotations

import pytest

import cuda_static
import promises
import static_checks

pytestmark = pytest.mark.full  # every kernel for every target: minutes of nvcc


@pytest.fixture(scope="module")
def lines() -> list[promises.Line]:
    return promises.read(cuda_static.promise_files(), cuda_static.ROOT)


def of(kernels: list[cuda_static.Kernel], chip: str) -> list[cuda_static.Kernel]:
    found = [kernel for kernel in kernels if kernel.target == chip]
    assert found, f"no kernel was compiled for {chip}"
    return found


def report(problems: list[str]) -> str:
    return "\n".join([f"{len(problems)} broken promises", *problems])


@pytest.mark.parametrize("chip", cuda_static.TARGETS)
@pytest.mark.parametrize("kind", ["memory", "occupancy", "code"])
def test_kernels_keep_their_promises(
    kind: str, chip: str, kernels: list[cuda_static.Kernel], lines: list[promises.Line]
) -> None:
    """memory: no spills, no local memory. occupancy: threads, registers, shared memory. code: access widths."""
    wrong = static_checks.problems(of(kernels, chip), lines, kind, stale=False)
    assert not wrong, report(wrong)


def test_every_kernel_promises_and_every_promise_has_a_kernel(
    kernels: list[cuda_static.Kernel], lines: list[promises.Line]
) -> None:
    wrong = static_checks.problems(kernels, lines, "promise")
    assert not wrong, report(wrong)


def test_every_target_has_the_same_kernels(kernels: list[cuda_static.Kernel]) -> None:
    names = [{kernel.label for kernel in of(kernels, chip)} for chip in cuda_static.TARGETS]
    assert all(found == names[0] for found in names)


def test_every_kernel_has_launch_bounds(kernels: list[cuda_static.Kernel]) -> None:
    assert not [kernel.label for kernel in kernels if kernel.bound == 0]
