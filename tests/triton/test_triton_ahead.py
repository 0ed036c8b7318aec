"""Ahead-of-time builds: every kernel variant compiles for each architecture, without spills, and vectorised.

The real entry points run on CPU tensors in a process without the interpreter, on a driver that only names an
architecture; each launch stops behind the compiler. So the specialisations (divisibility, alignment) are those of
real calls. Run as a script it prints one JSON line per kernel:  python test_triton_ahead.py <capability> <case>...
"""

import json
import os
import re
import subprocess
import sys

import pytest

D = 3 * 16384
ARCHITECTURES = (80, 90, 100)
QUICK = ["direction-0", "affine-3"]
SLOW = [
    "direction-1",
    "direction-2",
    "backward-0",
    "backward-1",
    "backward-2",
    "jvp-0",
    "jvp-1",
    "jvp-2",
    "affine-8",
    "affine-noise",
    "affine-backward",
    "fused",
    "ragged",
    "table",
    "bfloat16",
    "float64",
    "gram-8",
    "gram-plain",
    "gram-18",
    "apply-18",
    "map",
]


def calls(frame, torch):
    """name -> a call of an entry point; two launches each where there is a Gram."""

    def data(count, size=D, dtype=torch.float32):
        return [torch.zeros(2, size, dtype=dtype) for _ in range(count)]

    def coef(count):
        return torch.linspace(0.5, 0.9, count, dtype=torch.float64)

    seed = torch.zeros(2, dtype=torch.int64)
    table = {}
    for mode in range(3):
        c = coef(1 if mode == 2 else 2)
        table[f"direction-{mode}"] = lambda mode=mode, c=c: frame.lm_direction(*data(2), c, mode, 1)
        table[f"backward-{mode}"] = lambda mode=mode, c=c: frame.lm_direction_backward(*data(3), c, mode, 1)
        table[f"jvp-{mode}"] = lambda mode=mode, c=c: frame.lm_direction_jvp(
            *data(2), c, *data(2), c, mode, 1
        )
    table["fused"] = lambda: frame.lm_direction(*data(2, 4096), coef(2), 0, 1)
    table["ragged"] = lambda: frame.lm_direction(*data(2, D + 1), coef(2), 0, 1)
    table["table"] = lambda: frame.lm_direction(*data(2), coef(4).reshape(2, 2), 0, 1)
    table["bfloat16"] = lambda: frame.lm_direction(*data(1), *data(1, dtype=torch.bfloat16), coef(2), 0, 1)
    table["float64"] = lambda: frame.lm_direction(*data(2, dtype=torch.float64), coef(2), 0, 1)
    table["affine-3"] = lambda: frame.affine_step(data(3), coef(3), None, 1)
    table["affine-8"] = lambda: frame.affine_step(data(8), coef(8), None, 1)
    table["affine-noise"] = lambda: frame.affine_step(data(3), coef(4), seed, 1)
    table["affine-backward"] = lambda: frame.affine_step_backward(
        *data(1), data(3), coef(4), seed, True, True, 1
    )
    many = coef(17 * 18).reshape(17, 18)
    square = coef(18 * 18).reshape(18, 18)
    bounds = coef(36).reshape(18, 2)
    table["gram-18"] = lambda: frame.frame_gram(data(16), square, bounds, seed, True, True, 1)
    table["gram-8"] = lambda: frame.frame_gram(data(6), square[:8, :8], bounds[:8], seed, True, True, 1)
    table["gram-plain"] = lambda: frame.frame_gram(data(18), None, None, None, False, True, 1)
    table["apply-18"] = lambda: frame.frame_apply(data(16), many, square, bounds, seed, True, 1)
    table["map"] = lambda: frame.frame_map(2, 0, coef(10).reshape(2, 5), coef(4).reshape(2, 2))
    return table


def compile_cases(capability, names):
    """Compile what the calls launch and print what ptxas made of it."""
    import contextlib
    import tempfile

    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        """A driver that only knows which architecture is meant."""

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", capability, 32)

    driver.set_active(Driver())
    launch_real = JITFunction.run
    built = []

    def run(self, *args, grid, warmup, **kwargs):
        kernel = launch_real(self, *args, grid=grid, warmup=True, **kwargs)
        built.append((self.__name__, kernel))
        return kernel

    JITFunction.run = run
    frame, launch = import_kernels()
    launch.check_device = lambda *args: None
    launch.on = lambda device: contextlib.nullcontext()
    cases = calls(frame, torch)
    tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
    for name in names:
        built.clear()
        launch.emulated = lambda name=name: name == "map"  # leaves the map's tables on the CPU
        cases[name]()
        for kernel_name, kernel in built:
            with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
                cubin.write(kernel.asm["cubin"])
                cubin.flush()
                usage = subprocess.run(
                    [tool, "-res-usage", cubin.name], capture_output=True, text=True
                ).stdout
            found = dict(re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", usage))
            ptx = kernel.asm["ptx"]
            widths = [int(v or 1) for v in re.findall(r"ld\.global(?:\.L1::\S+)?(?:\.v(\d))?\.b32", ptx)]
            report = {k.lower(): int(v) for k, v in found.items()}
            report |= {"case": name, "kernel": kernel_name, "widest_load": max(widths, default=0)}
            report["approximate_log"] = "lg2.approx" in ptx
            print(json.dumps(report), flush=True)


def import_kernels():
    try:
        from marquardt.triton_kernels import frame, launch
    except ImportError:
        from triton_kernels import frame, launch
    return frame, launch


def reports(capability, names, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, __file__, str(capability), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(found, names):
    assert {r["case"] for r in found} == set(names)
    for r in found:
        family, spilled = r["case"].partition("-")[0], r["stack"] + r["local"]
        # Outside the loops ptxas may park a scalar or two; gram-18 reloads coefficients of its 18 × 18 prologue.
        allowed = (
            0 if family in ("direction", "backward", "jvp") or r["case"] in ("affine-3", "affine-8") else 16
        )
        if r["case"] != "gram-18":
            assert spilled <= allowed, f"{r['case']}: {r['kernel']} spills: {r}"
        assert not r["approximate_log"]
        if r["case"] in ("direction-0", "affine-3", "backward-0", "affine-8"):
            assert r["widest_load"] == 4, f"{r['case']}: {r['kernel']} does not load 16 bytes at a time: {r}"


def test_builds_without_spills(tmp_path):
    check(reports(90, QUICK, tmp_path), QUICK)


@pytest.mark.full
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_variant_builds_without_spills(capability, tmp_path):
    check(reports(capability, QUICK + SLOW, tmp_path), QUICK + SLOW)


if __name__ == "__main__":
    compile_cases(int(sys.argv[1]), sys.argv[2:])
