"""The occupancy rules against NVIDIA's own calculator: stored numbers, and its header where a toolkit has it."""

from __future__ import annotations

import itertools
import pathlib
import shutil
import subprocess

import pytest

import nvcc
from occupancy import CHIPS, occupancy

# (target, threads, registers, shared bytes) -> CTAs, from cuda_occupancy.h of CUDA 13.0.
KNOWN = {
    ("sm_80", 256, 32, 0): 8,
    ("sm_80", 256, 33, 0): 6,
    ("sm_80", 256, 64, 0): 4,
    ("sm_80", 256, 65, 0): 3,
    ("sm_80", 1024, 64, 0): 1,
    ("sm_80", 1024, 65, 0): 0,
    ("sm_80", 64, 16, 0): 32,
    ("sm_80", 128, 40, 48 << 10): 3,
    ("sm_90", 128, 40, 48 << 10): 4,
    ("sm_100", 128, 40, 48 << 10): 4,
    ("sm_80", 128, 40, 163 << 10): 1,
    ("sm_80", 128, 40, (163 << 10) + 1): 0,
    ("sm_90", 128, 40, 227 << 10): 1,
    ("sm_90", 128, 40, (227 << 10) + 1): 0,
    ("sm_90", 96, 168, 0): 4,
    ("sm_90", 32, 255, 0): 8,
}


@pytest.mark.parametrize("given", KNOWN, ids=str)
def test_known_values(given: tuple[str, int, int, int]) -> None:
    assert occupancy(*given).ctas == KNOWN[given]


def test_the_limit_is_named() -> None:
    assert occupancy("sm_90", 256, 96).limit == "registers"
    assert occupancy("sm_90", 1024, 16).limit == "warps"
    assert occupancy("sm_90", 32, 16).limit == "CTAs"
    assert occupancy("sm_90", 128, 16, 100 << 10).limit == "shared memory"
    half = occupancy("sm_90", 256, 64)
    assert (half.warps, half.of, half.fraction) == (32, 64, 0.5)


def test_a_cta_without_threads_is_refused() -> None:
    with pytest.raises(ValueError, match="threads must be 1 to 1024, got 0"):
        occupancy("sm_90", 0, 32)


CALCULATOR = """
#include <cstddef>
#include <climits>
#include <cstdio>
#include "cuda_occupancy.h"
int main() {
  int major, threads, registers, shared;
  while (scanf("%d %d %d %d", &major, &threads, &registers, &shared) == 4) {
    cudaOccDeviceProp chip;
    chip.computeMajor = major, chip.computeMinor = 0;
    chip.maxThreadsPerBlock = 1024, chip.maxThreadsPerMultiprocessor = 2048;
    chip.regsPerBlock = chip.regsPerMultiprocessor = 65536, chip.warpSize = 32;
    chip.sharedMemPerBlock = 48 << 10, chip.reservedSharedMemPerBlock = 1024;
    chip.sharedMemPerMultiprocessor = (major == 8 ? 164 : 228) << 10;
    chip.sharedMemPerBlockOptin = chip.sharedMemPerMultiprocessor - 1024, chip.numSms = 1;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
    kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = INT_MAX;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    const int code = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &chip, &kernel, &state, threads, shared);
    printf("%d\\n", code == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -code);
  }
}
"""


def test_nvidias_calculator_says_the_same(tmp_path: pathlib.Path) -> None:
    homes = [pathlib.Path(found).resolve().parents[1] for found in [nvcc.find()] if found]
    homes += pathlib.Path("/usr/local").glob("cuda*")
    include = next((h / "include" for h in homes if (h / "include" / "cuda_occupancy.h").is_file()), None)
    cxx = shutil.which("c++") or shutil.which("g++")
    if include is None or cxx is None:
        pytest.skip("cuda_occupancy.h of a CUDA toolkit, or a C++ compiler, is not here")
    source = tmp_path / "calculator.cpp"
    source.write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run([cxx, "-std=c++20", f"-isystem{include}", source, "-o", program], check=True)
    threads = (32, 64, 96, 128, 160, 256, 384, 512, 544, 768, 1024)
    registers = (16, 24, 32, 33, 40, 48, 63, 64, 72, 80, 96, 128, 168, 200, 255)
    shared = (0, 1, 1000, 16384, 48 << 10, 75000, 100 << 10, 163 << 10, (163 << 10) + 1, 227 << 10)
    asked = list(itertools.product(CHIPS, threads, registers, shared))
    lines = "".join(f"{t.removeprefix('sm_').removesuffix('0')} {a} {b} {c}\n" for t, a, b, c in asked)
    answer = subprocess.run([program], input=lines, capture_output=True, text=True, check=True).stdout.split()
    assert len(answer) == len(asked)
    wrong = [(q, int(n)) for q, n in zip(asked, answer) if occupancy(*q).ctas != int(n)]
    assert not wrong, wrong[:10]
