"""The checker itself: every kind of fault, planted in a small kernel, is reported; a good kernel is not."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable

import pytest

import cuda_static
import nvcc
import promises
import static_checks

Compile = Callable[..., list[cuda_static.Kernel]]

GOOD = """
struct Arguments { const float4* x; float4* y; long long size; };
__global__ void __launch_bounds__(256) copy(const __grid_constant__ Arguments a) {
  for (long long i = blockIdx.x * 256ll + threadIdx.x; i < a.size; i += gridDim.x * 256ll) a.y[i] = a.x[i];
}
"""
SPILL = """
__global__ void __launch_bounds__(1024, 2) spill(const float4* x, float4* y) {  // 32 registers a thread
  float4 v[24];
  #pragma unroll
  for (int i = 0; i < 24; ++i) v[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
  #pragma unroll
  for (int i = 0; i < 24; ++i) y[i * 1024 + threadIdx.x] = v[(i * 7 + 3) % 24];
}
"""
LOCAL = """
__global__ void __launch_bounds__(256) local(float* y, int steps) {
  float v[64];
  for (int i = 0; i < 64; ++i) v[i] = y[i];
  for (int i = 0; i < steps; ++i) v[7 * i % 64] += v[i % 63];  // run-time indices put the array into memory
  for (int i = 0; i < 64; ++i) y[64 * threadIdx.x + i] = v[i];
}
"""
NARROW = """
__global__ void __launch_bounds__(256) narrow(const float* x, float* y, int size) {
  for (int i = threadIdx.x; i < size; i += 256) y[i] = x[i];
}
"""
MIXED = """
__global__ void __launch_bounds__(256) mixed(const float4* x, const float* scale, float4* y, int size) {
  #pragma unroll 1
  for (int i = threadIdx.x; i < size; i += 256) {
    float4 v = x[i];
    v.x *= scale[i];
    y[i] = v;
  }
}
"""
HUNGRY = """
extern __shared__ double buffer[];
__global__ void __launch_bounds__(256) hungry(const float4* x, float4* y, double* s) {
  __shared__ double fixed[1024];
  fixed[threadIdx.x] = buffer[threadIdx.x] * s[threadIdx.x];
  __syncthreads();
  s[threadIdx.x] = fixed[255 - threadIdx.x];
  y[threadIdx.x] = x[threadIdx.x];
}
"""


def problems(kernels: list[cuda_static.Kernel], tmp_path: pathlib.Path, promise: str = "") -> list[str]:
    (tmp_path / "planted.cuh").write_text(f"// promise: {promise}\n" if promise else "")
    return static_checks.problems(kernels, promises.read([tmp_path / "planted.cuh"], tmp_path))


def test_a_good_kernel_passes(compiled: Compile, tmp_path: pathlib.Path) -> None:
    kernels = compiled(GOOD, *cuda_static.TARGETS)
    assert [k.target for k in kernels] == list(cuda_static.TARGETS) and {k.bound for k in kernels} == {256}
    assert problems(kernels, tmp_path, "copy threads=256 ctas>=8 registers<=32 wide=LDG.128,STG.128") == []
    table = static_checks.table(kernels, promises.read([tmp_path / "planted.cuh"], tmp_path), markdown=True)
    assert len(table.splitlines()) == 5 and "LDG.128, STG.128" in table and "100 %" in table


@pytest.mark.parametrize(
    ("source", "promise", "words"),
    [
        (SPILL, "spill threads=1024 ctas>=1 wide=LDG.128", ["spills: ", " STL in the code", " LDL in the code"]),
        (LOCAL, "local threads=256 ctas>=1 wide=-", ["stack frame of 256 bytes", " STL in the code"]),
        (NARROW, "narrow threads=256 ctas>=1 wide=LDG.128|LDGSTS.128,STG.128",
         ["no LDG.128 or LDGSTS.128 in the code", "no STG.128 in the code"]),
        (MIXED, "mixed threads=256 ctas>=1 wide=LDG.128,STG.128", ["global access of 32 bits, 64 is the least"]),
        (GOOD, "", ["no promise beside its definition"]),
        (GOOD, "copy ctas>=1 wide=-", ["planted.cuh:1: copy on sm_90 promises no threads"]),
        (GOOD, "copy threads=128 ctas>=8 wide=LDG.128", ["compiled for 256 threads, 128 are promised"]),
        (GOOD, "copy threads=256 ctas>=8 registers<=8 wide=-", ["registers, at most 8 are promised"]),
        (GOOD, "copy threads=256 ctas>=9 wide=-", ["8 CTAs a multiprocessor", "limit: warps), 9 are promised"]),
        (GOOD, "copy threads=256 ctas>=1 wide=- none=STG.128 has=HMMA.16816",
         [" STG.128 in the code", "no HMMA.16816 in the code"]),
        (HUNGRY, "hungry threads=256 shared=220K ctas>=1 wide=LDG.128",
         ["233472 bytes of shared memory, 232448 is the most", "0 CTAs a multiprocessor"]),
        (GOOD, "copy<float> threads=256 ctas>=1 wide=-", ["planted.cuh:1: copy<float>: promised, but there is no"]),
    ],
    ids=["spill", "local", "narrow", "mixed", "no promise", "half a promise", "threads", "registers", "occupancy",
         "classes", "shared", "stale"],
)  # fmt: skip
def test_a_planted_fault_is_reported(
    source: str, promise: str, words: list[str], compiled: Compile, tmp_path: pathlib.Path
) -> None:
    found = "\n".join(problems(compiled(source), tmp_path, promise))
    assert all(word in found for word in words), found or "nothing was reported"


def test_a_mixed_loop_may_be_promised(compiled: Compile, tmp_path: pathlib.Path) -> None:
    assert problems(compiled(MIXED), tmp_path, "mixed threads=256 ctas>=1 wide=LDG.128 narrow=32") == []


def test_warnings_are_errors(compiled: Compile) -> None:
    with pytest.raises(cuda_static.CompileError, match="never referenced|was declared but"):
        compiled(GOOD.replace("for (", "int unused = 3; for ("))


@pytest.mark.full
def test_the_spare_environment_compiles(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no nvcc: the compiler from the package index, in a folder of its own."""
    folders = os.environ["PATH"].split(os.pathsep)
    without = [place for place in folders if not (pathlib.Path(place) / "nvcc").exists()]
    reader = nvcc.find_tool("cuobjdump") or pytest.skip("no cuobjdump")
    monkeypatch.setenv("PATH", os.pathsep.join(without))
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(nvcc, "_places", list)
    monkeypatch.setattr(nvcc, "SPARE", tmp_path / "nvcc")
    monkeypatch.setattr(cuda_static, "CACHE", tmp_path / "cache")
    assert nvcc.find() == ""
    try:
        compiler = nvcc.install()
    except nvcc.NoCompiler as problem:
        pytest.skip(str(problem))
    assert compiler.startswith(str(tmp_path))
    (tmp_path / "planted.cu").write_text(GOOD)
    (kernel,) = cuda_static.compile_one(tmp_path / "planted.cu", "sm_100", compiler, reader)
    assert kernel.count("LDG.128") and kernel.bound == 256


def test_without_a_compiler_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    monkeypatch.setattr(nvcc, "find", lambda: "")
    monkeypatch.setattr(nvcc, "SPARE", tmp_path / "nvcc")
    monkeypatch.setattr(nvcc, "PACKAGES", ("no-such-compiler-anywhere",))
    with pytest.raises(nvcc.NoCompiler, match="pip cannot fetch no-such-compiler-anywhere"):
        cuda_static.kernels()
    assert not (tmp_path / "nvcc").exists()


def test_the_cache_follows_the_headers(compiled: Compile, tmp_path: pathlib.Path) -> None:
    header = tmp_path / "size.h"
    source = (
        '#include "size.h"\n__global__ void __launch_bounds__(SIZE) f(float* x) { x[threadIdx.x] = 1; }\n'
    )
    seen = []
    for size in (64, 64, 128):
        header.write_text(f"#define SIZE {size}\n")
        os.utime(header, (1e9, 1e9))  # what is written while nvcc runs is not kept
        (kernel,) = compiled(source)
        (mark,) = cuda_static.CACHE.glob("planted-sm_90-*.json")
        seen.append((kernel.bound, mark.stat().st_mtime_ns))
    (first, second, third) = seen
    assert first == second  # nothing was compiled
    assert (first[0], third[0]) == (64, 128)


def test_the_command_prints_the_table_and_fails(
    compiled: Compile, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "planted.cu").write_text(GOOD)
    code = cuda_static.main(["--sources", str(tmp_path / "planted.cu"), "--targets", "sm_90", "--markdown"])
    shown = capsys.readouterr()
    assert code == 1 and "no promise beside its definition" in shown.err
    assert shown.out.startswith("| kernel | target |") and "| copy | sm_90 |" in shown.out
