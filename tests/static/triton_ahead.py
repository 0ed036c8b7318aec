"""Ahead-of-time builds of the Triton kernels: every variant, compiled for an architecture that is not there.

The real entry points run on CPU tensors in a process without the interpreter, on a driver that only names an
architecture; each launch stops behind the compiler. So the specialisations (divisibility, alignment) are those of
real calls. As a script it prints one JSON line per kernel (triton_ahead.py <capability> <case>...), or with --table
what the README shows of all of them (--markdown).
"""

import collections
import concurrent.futures
import dataclasses
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "build_tools"))

import cubin  # noqa: E402
import cuda_static  # noqa: E402
import nvcc  # noqa: E402
import promises  # noqa: E402
import sass  # noqa: E402
import static_checks  # noqa: E402

D = 3 * 16384
CAPABILITIES = (80, 90, 100)
QUICK = [
    "backward-0",
    "affine-noise",
    "fused",
    "ragged",
    "bfloat16",
    "lowrank-solve-4",
    "step-2",
    "step-fused",
]
SLOW = [
    "direction-0",
    "jvp-0",
    "affine-3",
    "affine-8",
    "affine-backward",
    "float64",
    "lowrank-product-4",
    "lowrank-vjp-4",
    "lowrank-logdet-4",
    "step-6-all",
    "direction-1",
    "direction-2",
    "backward-1",
    "backward-2",
    "jvp-1",
    "jvp-2",
    "table",
    "gram-8",
    "gram-plain",
    "gram-18",
    "apply-18",
    "map",
    "lowrank-product-16",
    "lowrank-product-vjp-16",
    "lowrank-solve-1",
    "lowrank-solve-16",
    "lowrank-solve-bfloat16",
    "lowrank-solve-float64",
    "lowrank-solve-ragged",
    "lowrank-vjp-16",
    "lowrank-logdet-16",
    "lowrank-logdet-vjp-4",
    "lowrank-logdet-vjp-16",
    "step-1",
    "step-2-plain",
    "step-2-gamma",
    "step-2-snr",
    "step-2-table",
    "step-2-ragged",
    "step-2-bfloat16",
    "step-2-float64",
    "step-4-noise",
    "step-6",
    "step-6-float64",
    "step-fused-6-all",
]

# What the kernels promise (build_tools/promises.py), <case> in place of template arguments. A sample of D + 1 elements
# is aligned to 4 bytes alone. The kernels of 8 rows and more walk in steps of 64 bits, and the prologue of 18 × 18
# coefficients is more than the registers hold. Those over a stack sum in float64: a head, which all warps read alike,
# is read 32 bits a lane. With one row ptxas spills 8 bytes on sm_100, at 47 registers.
#
# promise: gram_kernel threads=256 ctas>=2 wide=LDG.128
# promise: gram_kernel<jvp-?> ctas>=1
# promise: gram_kernel<ragged> ctas>=1 wide=-
# promise: gram_kernel<affine-backward> ctas>=4 stack<=8@100
# promise: apply_kernel threads=256 ctas>=5 wide=LDG.128,STG.128
# promise: apply_kernel<backward-?> ctas>=4
# promise: apply_kernel<jvp-?> ctas>=3
# promise: apply_kernel<ragged> ctas>=4 wide=-
# promise: apply_kernel<fused> threads=512 ctas>=1
# promise: merge_kernel threads=128 ctas>=10 wide=-
# promise: tiled_gram_kernel threads=256 ctas>=1 wide=-
# promise: tiled_gram_kernel<gram-18> stack<=544
# promise: matrix_apply_kernel threads=256 ctas>=1 wide=-
# promise: stack_gram_kernel threads=256 ctas>=1 wide=LDG.128 narrow=32
# promise: stack_gram_kernel<lowrank-solve-1> threads=128 ctas>=4 stack<=8@100
# promise: stack_gram_kernel<lowrank-solve-bfloat16> wide=LDG.64
# promise: stack_gram_kernel<lowrank-solve-ragged> wide=-
# promise: stack_apply_kernel threads=256 ctas>=1 wide=STG.128
# promise: stack_apply_kernel<lowrank-product-?> threads=128 ctas>=8 wide=LDG.128,STG.128
# promise: stack_apply_kernel<lowrank-product-16> threads=128 ctas>=8 wide=LDG.128,STG.128
# promise: stack_apply_kernel<lowrank-solve-*> threads=128 ctas>=8 wide=LDG.128,STG.128
# promise: stack_apply_kernel<lowrank-solve-ragged> ctas>=6 wide=-
# promise: small_kernel threads=32 ctas>=8 wide=- narrow=0
# promise: small_kernel<lowrank-*-16> threads=64 ctas>=4
# promise: table_kernel threads=32 ctas>=16 wide=- narrow=0
# promise: map_kernel threads=32 ctas>=32 wide=-
# promise: step_gram_kernel threads=256 ctas>=2 wide=LDG.128
# promise: step_gram_kernel<step-2> ctas>=5 ctas>=4@80
# promise: step_gram_kernel<step-2-ragged> ctas>=4 wide=-
# promise: step_kernel threads=256 ctas>=3 wide=LDG.128,STG.128
# promise: step_kernel<step-2> ctas>=5
# promise: step_kernel<step-2-ragged> ctas>=4 wide=-
# promise: step_kernel<step-6-all> ctas>=2 ctas>=1@90
# promise: step_kernel<step-fused*> threads=512 ctas>=1
# promise: step_kernel<step-fused-6-all> stack<=8@100


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
    table.update(lowrank_calls(frame, data, coef, torch))
    table.update(step_calls(frame, data, coef, seed, torch))
    return table


def step_calls(frame, data, coef, seed, torch):
    """The steps of samplers: by the number of sources; "all": guided, noise, clamp, and every output."""

    def step(
        sources, variant=0, size=D, dtype=torch.float32, model=None, prev=True, seed=None, full=False, rows=0
    ):
        (x,), outputs = data(1, size, dtype), data(sources - 1, size, model or dtype)
        before = data(1, size, model or dtype)[0] if prev else None
        count = (
            3 + 2 * sources + (2 if seed is not None and variant != 3 else 0) + (3 + sources if full else 0)
        )
        numbers = coef(rows * count).reshape(rows, count) if rows else coef(count)
        wanted = 1 + 4 + 8 + 16 if full else 2
        return lambda: frame.lm_step(x, outputs, before, numbers, seed, variant, wanted, full, 1)

    return {
        "step-1": step(1),
        "step-2": step(2),
        "step-2-plain": step(2, prev=False),
        "step-2-gamma": step(2, 2),
        "step-2-snr": step(2, 3, prev=False, seed=seed),
        "step-2-table": step(2, rows=2),
        "step-2-ragged": step(2, size=D + 1),
        "step-2-bfloat16": step(2, model=torch.bfloat16),
        "step-2-float64": step(2, dtype=torch.float64),
        "step-4-noise": step(4, seed=seed),
        "step-6": step(6),
        "step-6-float64": step(6, dtype=torch.float64),
        "step-6-all": step(6, seed=seed, full=True),
        "step-fused": step(2, size=4096),
        "step-fused-6-all": step(6, size=4096, seed=seed, full=True),
    }


def lowrank_calls(frame, data, coef, torch):
    """The calls of the low-rank Hessian that are launches alone; the eigenproblems share their Gram and apply."""
    product, solve = 0, 1

    def stack(k, size=D, dtype=torch.float32):
        return torch.zeros(2, k, size, dtype=dtype)

    def apply(k, variant, size=D, dtype=torch.float32, rows=None):
        v, U = data(1, size, dtype)[0], stack(k, size, rows or dtype)
        return lambda: frame.lowrank_apply(v, U, coef(1 + k), variant, False, 1)

    def vjp(k, variant):
        return lambda: frame.lowrank_vjp(*data(2), stack(k), coef(1 + k), variant, 1)

    table = {
        "lowrank-product-vjp-16": vjp(16, product),
        "lowrank-solve-1": apply(1, solve),
        "lowrank-solve-bfloat16": apply(4, solve, rows=torch.bfloat16),
        "lowrank-solve-float64": apply(4, solve, dtype=torch.float64),
        "lowrank-solve-ragged": apply(4, solve, size=D + 1),
    }
    for k in (4, 16):
        table[f"lowrank-product-{k}"] = apply(k, product)
        table[f"lowrank-solve-{k}"] = apply(k, solve)
        table[f"lowrank-vjp-{k}"] = vjp(k, solve)
        table[f"lowrank-logdet-{k}"] = lambda k=k: frame.lowrank_logdet(stack(k), coef(1 + k), False, 1)
        table[f"lowrank-logdet-vjp-{k}"] = lambda k=k: frame.lowrank_logdet_vjp(stack(k), coef(2 + k), 1)
    return table


def compile_cases(capability, names):
    """Compile what the calls launch and print what the compiler made of it."""
    import contextlib

    import torch
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
    tool = nvcc.find_tool("cuobjdump")
    for name in names:
        built.clear()
        launch.emulated = lambda name=name: name == "map"  # leaves the map's tables on the CPU
        cases[name]()
        for kernel_name, kernel in built:
            found = describe(kernel_name, name, f"sm_{capability}", kernel, tool)
            record = {
                "kernel": dataclasses.asdict(found),
                "approximate_log": "lg2.approx" in kernel.asm["ptx"],
            }
            print(json.dumps(record), flush=True)


def describe(name, case, target, kernel, tool):
    """A compiled kernel in the words of the CUDA kernels; its case stands for template arguments."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        options = {"capture_output": True, "text": True, "check": True}
        usage = subprocess.run([tool, "-res-usage", file.name], **options).stdout
        (code,) = sass.parse(subprocess.run([tool, "-sass", file.name], **options).stdout).values()
    found = {key: int(n) for key, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    (bound,) = cubin.launch_bounds(kernel.asm["cubin"]).values()
    return cuda_static.Kernel(
        name=name,
        arguments=case,
        symbol=name,
        source="triton_kernels",
        target=target,
        registers=found["REG"],
        shared=kernel.metadata.shared,
        stack=found["STACK"] + found["LOCAL"],
        spill_stores=0,  # not in the cubin; they are on the stack, and LDL and STL in the code
        spill_loads=0,
        barriers=0,
        bound=bound,
        opcodes=dict(collections.Counter(".".join((i.opcode, *i.modifiers)) for i in code)),
        narrowest_hot=sass.narrowest_hot(code),
    )


def import_kernels():
    try:
        from marquardt.triton_kernels import frame, launch
    except ImportError:
        sys.path.insert(0, str(ROOT))
        from triton_kernels import frame, launch
    return frame, launch


def compiled(capabilities, names, cache):
    """One record per kernel, case and capability; a process for each capability, two at a time."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)

    def run(capability):
        command = [sys.executable, __file__, str(capability), *names]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"sm_{capability}: {done.stderr[-3000:]}")
        return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]

    with concurrent.futures.ThreadPoolExecutor(cuda_static.JOBS) as pool:
        return [record for records in pool.map(run, capabilities) for record in records]


def main(arguments):
    if arguments[:1] == ["--table"]:
        found = compiled(CAPABILITIES, QUICK + SLOW, cuda_static.CACHE / "triton")
        kernels = [cuda_static.Kernel(**record["kernel"]) for record in found]
        lines = promises.read([pathlib.Path(__file__)], ROOT)
        print(static_checks.table(kernels, lines, markdown="--markdown" in arguments))
    else:
        compile_cases(int(arguments[0]), arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
