"""Every barrier of the kernels is left out once, and every time it is noticed: by ThreadSanitizer, by the machine, or
by a wrong result. A copy of the sources has a switch at each of them; it is compiled once.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from frame_small import write_small_cases

import emulation as emulated  # build_tools/emulation.py

pytestmark = [pytest.mark.emulation, pytest.mark.full]

SOURCES = emulated.ROOT / "csrc" / "frame"
SITE = re.compile(
    r"(__syncthreads\(\)|__syncwarp\(\)|ptx::cluster_(?:sync|arrive|arrive_relaxed|wait)\(\)"
    r"|ptx::copy_async_(?:wait<[^;]*>|commit)\(\));"
)
# Two sorts of kernels, and cases of theirs that together come past every barrier, the cheapest first.
SORTS = ("cuda_f32.cu", "cuda_general_mixed.cu")
CASES = (
    "two-1-ring", "one-2-in-place", "held-1", "held-2-zero-kappa", "two-2-in-place", "held-2-given", "one-8-general",
    "held-4-blocks", "two-1-blocks-ring", "held-1-step", "held-1-root", "held-2-solve",
)  # fmt: skip
SWITCH = """
#include <cstdlib>
namespace marquardt {
bool left_out(int site) {
  static const int chosen = std::atoi(std::getenv("MARQUARDT_LEFT_OUT"));
  return site == chosen;
}
}  // namespace marquardt
"""


def sites() -> list[tuple[str, int, str]]:
    """(file, line, statement) of every barrier, in the order of the switches."""
    found = []
    for path in sorted([*SOURCES.glob("cuda*.cu"), *SOURCES.glob("cuda*.cuh")]):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [(path.name, number, m[1]) for m in SITE.finditer(line.split("//")[0])]
    return found


def switched(folder: Path) -> Path:
    """The kernels with a switch at every barrier, in a folder that goes before csrc."""
    count = 0

    def switch(match: re.Match) -> str:
        nonlocal count
        count += 1
        return f"left_out({count - 1}) ? void() : {match[1]};"

    (folder / "frame").mkdir(parents=True)
    for path in sorted(SOURCES.glob("cuda*")) + [SOURCES / "frame.h", SOURCES / "maps.h", SOURCES / "dual.h"]:
        text = path.read_text()
        if path.suffix in (".cu", ".cuh"):
            lines = [line.split("//") for line in text.splitlines()]
            text = "\n".join("//".join([SITE.sub(switch, parts[0]), *parts[1:]]) for parts in lines) + "\n"
        if path.suffix == ".cu":
            text = "namespace marquardt {\nbool left_out(int site);\n}\n" + text
        (folder / "frame" / path.name).write_text(text)
    (folder / "switch.cpp").write_text(SWITCH)
    assert count == len(sites())
    return folder


def _run(command: list[str], directory: Path) -> None:
    made = subprocess.run(command, cwd=directory, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


@pytest.fixture(scope="module")
def faulty(tmp_path_factory, program):
    """frame_tsan with switches: faulty(site) runs all cases without that barrier; −1: with every one."""
    fields = program("frame", "tsan", "--fields").stdout.split()
    directory, before = emulated.build(["frame_tsan"]), emulated.prefix("tsan")
    folder = switched(tmp_path_factory.mktemp("switched"))
    ninja = [emulated.native.find_ninja(), "-C", str(directory), "-t", "commands", "frame_tsan"]
    listed = subprocess.run(ninja, capture_output=True, text=True, check=True).stdout.splitlines()
    linked = shlex.split(listed[-1].removeprefix(": && ").removesuffix(" && :"))
    linked[linked.index("-o") + 1] = str(folder / "frame_faulty")
    commands = []
    for line in listed[:-1]:
        command = shlex.split(line)
        source, target = Path(command[-1]), command.index("-o") + 1
        if source.name in SORTS:
            copy = folder / "frame" / source.name
            linked[linked.index(command[target])] = command[target] = str(copy.with_suffix(".o"))
            command.remove("-g")
            commands.append([command[0], f"-I{folder}", *command[1:-1], str(copy)])
    assert len(commands) == len(SORTS)
    with ThreadPoolExecutor(max_workers=emulated.native.jobs()) as pool:
        list(pool.map(lambda command: _run(command, directory), commands))
    _run([*linked, "-x", "c++", str(folder / "switch.cpp")], directory)
    write_small_cases(folder / "cases", fields, CASES)

    def run(site: int):
        environment = {**emulated.environment("tsan"), "MARQUARDT_LEFT_OUT": str(site)}
        environment["TSAN_OPTIONS"] += ":halt_on_error=1"
        command = [*before, str(folder / "frame_faulty"), *(str(folder / "cases" / name) for name in CASES)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_without_a_fault(faulty):
    made = faulty(-1)
    assert made.returncode == 0, made.stdout + made.stderr


@pytest.mark.parametrize("site", range(len(sites())), ids=lambda i: "{}:{}".format(*sites()[i][:2]))
def test_a_missing_barrier_is_noticed(faulty, site):
    made = faulty(site)
    assert made.returncode != 0, f"nobody misses {sites()[site]}"
