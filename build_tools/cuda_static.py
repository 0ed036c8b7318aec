"""What the compiler made of the CUDA kernels, proven without a GPU: `python build_tools/cuda_static.py`.

Every csrc/*/*.cu is compiled for each target with the flags of the real build. The compiler's resource report, the
launch bounds in the cubin and the machine code are read, kept under build/static as long as sources and flags stay the
same, and judged against the promises beside the kernels (promises.py has their syntax).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_tools"))

import cubin  # noqa: E402  (neighbours of this file, not installed modules)
import nvcc  # noqa: E402
import promises  # noqa: E402
import sass  # noqa: E402
import static_checks  # noqa: E402

TARGETS = ("sm_80", "sm_90", "sm_100")
CACHE = ROOT / "build" / "static"
JOBS = 2


class CompileError(Exception):
    """nvcc refused a source; the message is nvcc's."""


@dataclass(frozen=True)
class Kernel:
    """One kernel, as compiled for one target."""

    name: str  # without namespaces
    arguments: str  # of its template
    symbol: str
    source: str
    target: str
    registers: int
    shared: int  # static
    stack: int
    spill_stores: int
    spill_loads: int
    barriers: int
    bound: int  # most threads of a CTA by its launch bounds, 0: none
    opcodes: dict[str, int]  # "LDG.E.128" -> how many
    narrowest_hot: int  # bits, 0: no loop moves data in bulk

    @property
    def label(self) -> str:
        return self.name + (f"<{self.arguments}>" if self.arguments else "")

    def count(self, kind: str) -> int:
        """Instructions of a class such as "DFMA", "LDG.128", "HMMA.16816"."""
        return sum(n for opcode, n in self.opcodes.items() if sass.instruction(opcode).belongs(kind))

    def accesses(self) -> Counter[str]:
        found: Counter[str] = Counter()
        for opcode, n in self.opcodes.items():
            if (made := sass.instruction(opcode)).bits:
                found[f"{made.opcode}.{made.bits}"] += n
        return found


def sources() -> list[Path]:
    return sorted(p for p in ROOT.glob("csrc/*/*.cu") if p.parent.name != "emulation")


def promise_files() -> list[Path]:
    files = (p for p in ROOT.glob("csrc/*/*") if p.suffix in (".cu", ".cuh", ".h"))
    return [p for p in files if p.parent.name != "emulation"]


def flags() -> list[str]:
    """What CMake gives nvcc, read where it is written, and warnings as errors."""
    options = (ROOT / "cmake" / "cuda.cmake").read_text()
    own = re.findall(r"\$<\$<COMPILE_LANGUAGE:CUDA>:([^>]*)>", options)
    release = re.search(r'set\(CMAKE_CUDA_FLAGS_RELEASE "([^"]*)"\)', (ROOT / "CMakeLists.txt").read_text())
    if not own or not release or not any("--Werror" in text for text in own):
        raise CompileError("cmake/cuda.cmake or CMakeLists.txt no longer say which flags nvcc gets")
    words = " ".join([release[1], *own]).split()
    return ["-std=c++20", *words, "-DMARQUARDT_WITH_CUDA=1", f"-I{ROOT / 'csrc'}"]


# --- one source for one target -----------------------------------------------------------------------------

_ENTRY = re.compile(r"Compiling entry function '(\S+)' for")
_PROPERTIES = re.compile(r"Function properties for (\S+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:, used (\d+) barriers)?(.*)")


def resources(log: str) -> dict[str, dict[str, int]]:
    """Mangled kernel name -> registers, stack, ...: the report of `ptxas -v`."""
    found: dict[str, dict[str, int]] = {}
    entry, function = "", ""
    for line in log.splitlines():
        if hit := _ENTRY.search(line):
            entry = hit[1]
            found[entry] = dict.fromkeys(
                ("registers", "shared", "stack", "spill_stores", "spill_loads", "barriers"), 0
            )
        elif hit := _PROPERTIES.search(line):
            function = hit[1]
        elif (hit := _STACK.search(line)) and entry:
            # A function that is called and not inlined spills on its caller's account.
            numbers = (int(n) for n in hit.groups()) if function else ()
            for key, n in zip(("stack", "spill_stores", "spill_loads"), numbers, strict=False):
                found[entry][key] += n
        elif (hit := _USED.search(line)) and entry:
            found[entry] |= {"registers": int(hit[1]), "barriers": int(hit[2] or 0)}
            if more := re.search(r"(\d+) bytes smem", hit[3]):
                found[entry]["shared"] = int(more[1])
            if more := re.search(r"(\d+) bytes cumulative stack", hit[3]):
                found[entry]["stack"] = max(found[entry]["stack"], int(more[1]))
    return found


def demangle(symbols: Sequence[str]) -> list[tuple[str, str]]:
    """(name without namespaces, template arguments) of each; enumerators and bools become plain numbers."""
    if not symbols:
        return []
    done = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    return [split_name(line) for line in done.stdout.splitlines()]


def split_name(demangled: str) -> tuple[str, str]:
    text = demangled.replace("(anonymous namespace)::", "")
    text = re.sub(r"\([\w:]+(?: [\w:]+)*\)(?=-?\d)", "", text)  # (marquardt::DType)1
    depth, end = 0, len(text)
    for at, letter in enumerate(text):  # the parameter list is the last thing at depth 0
        if letter == "(" and depth == 0:
            end = at
            break
        depth += (letter == "<") - (letter == ">")
    head, _, arguments = text[:end].partition("<")
    name = head.split()[-1].split("::")[-1]
    arguments = re.sub(r"\b\w+::", "", arguments.rpartition(">")[0])
    return name, re.sub(r"\b(true|false)\b", lambda hit: str(int(hit[1] == "true")), arguments)


def _digest(path: Path | str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def _cached(mark: Path) -> list[Kernel] | None:
    try:
        kept = json.loads(mark.read_text())
        fresh = all(_digest(path) == digest for path, digest in kept["made_from"].items())
        return [Kernel(**kernel) for kernel in kept["kernels"]] if fresh else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _dependencies(makefile: str) -> list[str]:
    return makefile.replace("\\\n", " ").partition(":")[2].split()


def _unchanged(paths: Sequence[str], since: float) -> dict[str, str] | None:
    """Digests of the files, None if one of them changed meanwhile: then nobody knows what was compiled."""
    try:
        return None if any(os.path.getmtime(p) >= since for p in paths) else {p: _digest(p) for p in paths}
    except OSError:
        return None


def compile_one(
    source: Path, target: str, compiler: str, disassembler: str, more: Sequence[str] = ()
) -> list[Kernel]:
    """The kernels of a source for a target, from the cache if nothing has changed."""
    command = [compiler, *flags(), *more, "-cubin", f"-arch={target}", "-Xptxas=-v"]
    readers = [_digest(module.__file__) for module in (sys.modules[__name__], cubin, sass)]
    tools = [nvcc.identity(compiler), nvcc.identity(disassembler)]
    identity = json.dumps([str(source), command, tools, readers])
    mark = CACHE / f"{source.stem}-{target}-{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if (kept := _cached(mark)) is not None:
        return kept
    CACHE.mkdir(parents=True, exist_ok=True)
    start = time.time()
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:
        made, depends = Path(folder, "kernel.cubin"), Path(folder, "kernel.d")
        words = [*command, "-MMD", "-MF", str(depends), "-o", str(made), str(source)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{source.name} for {target}:\n{(done.stderr or done.stdout)[-4000:]}")
        used = resources(done.stderr + done.stdout)
        listing = subprocess.run(
            [disassembler, "-sass", str(made)], capture_output=True, text=True, check=True
        )
        code, bounds = sass.parse(listing.stdout), cubin.launch_bounds(made.read_bytes())
        files = _unchanged(_dependencies(depends.read_text()), start)
    kernels = []
    for (symbol, numbers), (name, arguments) in zip(used.items(), demangle(list(used)), strict=True):
        if not code.get(symbol):
            raise CompileError(f"{source.name} for {target}: no machine code of {symbol} in the listing")
        place = os.path.relpath(source, ROOT) if source.is_relative_to(ROOT) else source.name
        kernels.append(
            Kernel(
                name=name,
                arguments=arguments,
                symbol=symbol,
                source=place,
                target=target,
                **numbers,
                bound=bounds.get(symbol, 0),
                opcodes=dict(Counter(".".join((i.opcode, *i.modifiers)) for i in code[symbol])),
                narrowest_hot=sass.narrowest_hot(code[symbol]),
            )
        )
    if files is None:
        return kernels
    temporary = mark.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps({"made_from": files, "kernels": [asdict(k) for k in kernels]}))
    os.replace(temporary, mark)
    return kernels


def kernels(
    targets: Iterable[str] = TARGETS, files: Sequence[Path] | None = None, more: Sequence[str] = ()
) -> list[Kernel]:
    """Every kernel for every target. Raises NoCompiler where there is no nvcc or no cuobjdump."""
    compiler, disassembler = nvcc.find_or_install(), nvcc.find_tool("cuobjdump")
    if not disassembler:
        raise nvcc.NoCompiler("no cuobjdump beside nvcc, on PATH or in Triton's package")
    pairs = [(s, t) for s in (sources() if files is None else files) for t in targets]
    with ThreadPoolExecutor(JOBS) as pool:
        made = list(pool.map(lambda p: compile_one(p[0], p[1], compiler, disassembler, more), pairs))
    return [kernel for group in made for kernel in group]


def listing(kernel: str, targets: Iterable[str], files: Sequence[Path]) -> str:
    """The machine code of the kernels of a name, for reading."""
    compiler, disassembler = nvcc.find_or_install(), nvcc.find_tool("cuobjdump")
    parts = []
    with tempfile.TemporaryDirectory() as folder:
        for source in files:
            for target in targets:
                made = str(Path(folder, "kernel.cubin"))
                subprocess.run(
                    [compiler, *flags(), "-cubin", f"-arch={target}", "-o", made, str(source)], check=True
                )
                text = subprocess.run([disassembler, "-sass", made], capture_output=True, text=True).stdout
                code = sass.parse(text)
                for symbol, (name, arguments) in zip(code, demangle(list(code)), strict=True):
                    if name == kernel:
                        parts.append(f"# {name}<{arguments}> {target}")
                        parts += [str(instruction) for instruction in code[symbol]]
    return "\n".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--targets", nargs="+", default=list(TARGETS))
    parser.add_argument("--sources", nargs="+", type=Path, help="default: every csrc/*/*.cu")
    parser.add_argument("--all", action="store_true", help="a line for every instance of a kernel")
    parser.add_argument("--markdown", action="store_true", help="the table as Markdown")
    parser.add_argument("--sass", metavar="KERNEL", help="print the machine code of a kernel instead")
    options = parser.parse_args(arguments)
    files = [path.resolve() for path in options.sources] if options.sources else sources()
    try:
        if options.sass:
            print(listing(options.sass, options.targets, files))
            return 0
        found = kernels(options.targets, files)
        lines = promises.read(promise_files(), ROOT)
    except (nvcc.NoCompiler, CompileError, promises.PromiseError) as problem:
        print(problem, file=sys.stderr)
        return 1
    print(static_checks.table(found, lines, every=options.all, markdown=options.markdown))
    wrong = static_checks.problems(found, lines, stale=options.sources is None)
    for problem in wrong:
        print(problem, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
