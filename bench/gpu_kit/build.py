"""The library on the machine at hand: by CMake, or by g++ and nvcc directly where CMake or Ninja cannot."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from .runner import ROOT, Context, Ran, Skip

sys.path.insert(0, str(ROOT / "build_tools"))

import cuda_static
import native
import nvcc
import torch_dir

PACKAGE = ROOT / "python" / "marquardt"


@dataclass(frozen=True)
class Tools:
    cxx: str
    nvcc: str  # "" builds the CPU kernels alone
    torch: pathlib.Path
    arch: str  # "90"


def _flags_of(name: str) -> list[str]:
    """A list of flags that CMake's files set under a name."""
    text = (ROOT / "cmake" / "sources.cmake").read_text()
    found = re.search(rf"set\({name} ([^)]*)\)", text)
    if not found:
        raise RuntimeError(f"cmake/sources.cmake no longer sets {name}")
    return found[1].split()


def sources() -> list[pathlib.Path]:
    found = [p for p in sorted(ROOT.glob("csrc/*/*")) if p.suffix in (".cpp", ".cu")]
    return [p for p in found if p.parent.name != "emulation"]


def common(tools: Tools, folder: pathlib.Path) -> list[str]:
    defines = ["-DNDEBUG", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    if tools.nvcc:
        defines.append("-DMARQUARDT_WITH_CUDA=1")
    include = [f"-I{ROOT / 'csrc'}", f"-I{folder / 'generated'}", "-isystem", str(tools.torch / "include")]
    return ["-O3", "-std=c++20", *defines, *include]


def compile_command(
    source: pathlib.Path, made: pathlib.Path, tools: Tools, folder: pathlib.Path
) -> list[str]:
    """What CMake would call for this source."""
    words = common(tools, folder)
    if source.suffix == ".cu":
        words += [
            word for word in cuda_static.flags() if not word.startswith("--Werror") and word not in words
        ]
        words += ["-Xcompiler=-fPIC,-fvisibility=hidden"]
        words.append(f"-gencode=arch=compute_{tools.arch},code=sm_{tools.arch}")
        return [tools.nvcc, *words, "-c", str(source), "-o", str(made)]
    words += ["-g0", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
    words += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wall", "-Wextra"]
    for isa in ("avx2", "avx512"):
        if source.stem.endswith(f"_{isa}"):
            words += _flags_of(f"{isa}_flags")
    return [tools.cxx, *words, "-c", str(source), "-o", str(made)]


def link_command(objects: list[pathlib.Path], made: pathlib.Path, tools: Tools) -> list[str]:
    """Wider instruction sets last, as in CMake: the linker keeps the first copy of a shared function."""
    ordered = sorted(objects, key=lambda p: ("_avx2." in p.name) + 2 * ("_avx512." in p.name))
    libraries = [
        "--no-as-needed",
        f"-L{tools.torch / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
        "-ltorch",
        "--no-undefined",
    ]
    if tools.nvcc:
        words = [word for library in libraries for word in ("-Xlinker", library)]
        return [tools.nvcc, "-shared", "-cudart", "static", *map(str, ordered), *words, "-o", str(made)]
    words = [w if w.startswith(("-l", "-L")) else f"-Wl,{w}" for w in libraries]
    return [tools.cxx, "-shared", *map(str, ordered), *words, "-o", str(made)]


def write_config(folder: pathlib.Path, tools: Tools, commit: str, version: str) -> pathlib.Path:
    """build_config.h, from CMake's template."""
    values = {
        "MARQUARDT_VERSION": version,
        "MARQUARDT_COMMIT": commit,
        "MARQUARDT_COMPILER": tools.cxx,
        "MARQUARDT_CXX_FLAGS": "direct build",
        "MARQUARDT_ISA": "baseline avx2 avx512",
        "MARQUARDT_TORCH_VERSION": torch_dir.version(tools.torch),
        "MARQUARDT_CUDA_COMPILER": f"nvcc {nvcc.version(tools.nvcc)}" if tools.nvcc else "none",
        "MARQUARDT_CUDA_ARCHS_BUILT": f"{tools.arch}-real" if tools.nvcc else "none",
    }
    text = (ROOT / "cmake" / "build_config.h.in").read_text()
    path = folder / "generated" / "build_config.h"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"@(\w+)@", lambda hit: values[hit[1]], text))
    return path


def direct(context: Context, tools: Tools, commit: str, destination: pathlib.Path = PACKAGE) -> Ran:
    """Every source at once, on all cores; the library goes beside the package. The command that failed, or the last."""
    folder = context.state / "objects"
    if not context.dry:
        write_config(folder, tools, commit, native.project_version())
    files = sources() if tools.nvcc else [p for p in sources() if p.suffix == ".cpp"]
    objects = [folder / f"{p.parent.name}-{p.name}.o" for p in files]

    def make(pair: tuple[pathlib.Path, pathlib.Path]) -> Ran:
        return context.run(*compile_command(*pair, tools, folder))

    with ThreadPoolExecutor(native.jobs()) as pool:
        for ran in list(pool.map(make, zip(files, objects, strict=True))):
            if not ran.good:
                return ran
    made = folder / native.LIBRARY
    linked = context.run(*link_command(objects, made, tools))
    if linked.good and not context.dry:
        shutil.copy2(made, destination / f"{native.LIBRARY}.new")
        os.replace(destination / f"{native.LIBRARY}.new", destination / native.LIBRARY)
    return linked


def find_tools(arch: str) -> Tools:
    cxx = os.environ.get("CXX") or native.find_tool("c++", "g++", "clang++")
    if not cxx:
        raise Skip("no C++ compiler")
    compiler = nvcc.find()
    if not compiler:
        raise Skip("no nvcc")
    return Tools(cxx, compiler, torch_dir.find(), arch)


COMPILED = re.compile(r"^(FAILED: |ninja: )", re.MULTILINE)  # Ninja's words, which come after CMake's
# The report, the build, and whether an error of the library reaches Python.
ASK = """
import json, torch
import marquardt
from marquardt import _native, env
print(env.report())
print(json.dumps(_native.build_info()), flush=True)
x = torch.ones(1, 4)
try:
    marquardt.lm_direction(x, x, damping=-1.0, kappa=0.5)
except ValueError as error:
    print(error)
"""
# C++ exceptions pass from the library to torch, so both must use the same C++ runtime. Some compilers are set up to
# link it statically, and then an error ends the process.
SHARED_RUNTIME = "-Wl,--push-state,--no-as-needed -l:libstdc++.so.6 -l:libgcc_s.so.1 -Wl,--pop-state"


def shared_runtime(context: Context, tools: Tools) -> str:
    """Linker flags that bring the shared runtime in, "" where the linker does not find it."""
    words = [tools.cxx, "-shared", *SHARED_RUNTIME.split(), "-o", context.state / "runtime.so"]
    return SHARED_RUNTIME if context.run(*words).good else ""


def why(ran: Ran) -> str:
    """The first line of an output that names an error, else the last."""
    lines = [line.strip() for line in ran.output.splitlines() if line.strip()]
    named = [line for line in lines if "error:" in line] + [line for line in lines if "CMake Error" in line]
    return (named or lines[-1:] or [f"exit {ran.code}"])[0]


def build(context: Context, arch: str, commit: str) -> tuple[bool, dict[str, Any]]:
    """By CMake; directly where CMake or Ninja is missing or CMake cannot configure. What a compiler refuses, it refuses
    either way. Numbers: how it was built, and what the library says of itself."""
    tools = find_tools(arch)
    how, made = "direct", None
    if native.find_cmake() and native.find_ninja():
        how = "cmake"
        made = context.python(
            "build_tools/native.py",
            MARQUARDT_CUDA="1",
            MARQUARDT_CUDA_ARCHS=f"{arch}-real",
            CUDACXX=tools.nvcc,
            LDFLAGS=os.environ.get("LDFLAGS") or shared_runtime(context, tools),
        )
        if not made.good and not made.late and not COMPILED.search(made.output):
            context.say(f"# CMake: {why(made)}")
            how, made = "direct", None
    if made is None:
        made = direct(context, tools, commit)
    site = make_site(context)
    numbers: dict[str, Any] = {"how": how, "arch": arch, "site": site.name}
    asked = context.python("-c", ASK) if made.good else made
    lines = asked.output.strip().splitlines()
    infos = [k for k, line in enumerate(lines) if line.startswith("{")]
    numbers["errors_arrive"] = bool(lines) and "must be finite" in lines[-1]
    if not context.dry and not (made.good and infos):
        reason = "out of time" if asked.late else why(asked)
        context.say(asked.tail)
        return False, {**numbers, "reason": reason, "tail": asked.tail}
    at = infos[0] if infos else 0
    return True, {**numbers, "build_info": "".join(lines[at : at + 1]), "environment": lines[:at]}


def make_site(context: Context) -> pathlib.Path:
    """A folder from which `import marquardt` finds package, library and Triton kernels, without installing."""
    site = context.state / "site"
    package = site / "marquardt"
    context.environment["PYTHONPATH"] = os.pathsep.join(
        [str(site), str(context.state / "wheels"), str(ROOT), context.environment.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    if context.dry:
        return site
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    for path in [*sorted(PACKAGE.iterdir()), ROOT / "triton_kernels"]:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)
    return site
