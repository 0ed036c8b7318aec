"""Planted faults: each is found, by the tool that is said to find it, and its right twin is left alone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytestmark = [pytest.mark.emulation, pytest.mark.full]

SOURCE = Path(__file__).resolve().parent.parent.parent / "csrc" / "emulation" / "faults.cu"
SILENT, WRONG, REFUSED, REPORTED = (
    0,
    1,
    2,
    66,
)  # exit status: all is well, wrong numbers, the machine, a sanitizer

# Fault -> what the kernel's own numbers and the machine say; AddressSanitizer and UndefinedBehaviorSanitizer;
# ThreadSanitizer. A plain run of `misaligned` may crash, or not: the compiler chooses the instruction.
FAULTS = {
    "barrier": (WRONG, WRONG, REPORTED),
    "bounds_global": (SILENT, REPORTED, SILENT),
    "bounds_shared": (REFUSED, REPORTED, REFUSED),
    "misaligned": (None, REPORTED, WRONG),
    "last_cluster_barrier": (REFUSED, REFUSED, REPORTED),
    "syncwarp": (WRONG, WRONG, REPORTED),
    "second_barrier": (WRONG, WRONG, REPORTED),
    "second_syncwarp": (WRONG, WRONG, REPORTED),
    "second_cluster_barrier": (WRONG, WRONG, REPORTED),
    "shuffle_for_syncwarp": (SILENT, SILENT, REPORTED),
    "copy_without_wait": (WRONG, WRONG, WRONG),
    "copy_too_early": (WRONG, WRONG, REPORTED),
    "divergent": (REFUSED, REFUSED, REFUSED),
    "sum_of_grid": (SILENT, SILENT, REPORTED),
    "last_block": (SILENT, SILENT, REPORTED),
    "overflow": (WRONG, REPORTED, None),
}
VARIANTS = ("plain", "asan", "tsan")


def lines_of(name: str, remark: str) -> set[int]:
    """Lines of the kernel that say `// …remark…`."""
    text = SOURCE.read_text().split("\n")
    begin = next(i for i, line in enumerate(text) if f") {name}(" in line)
    end = next(i for i in range(begin, len(text)) if text[i] == "}")
    return {i + 1 for i in range(begin, end) if re.search(rf"//.*\b{remark}\b", text[i])}


@pytest.mark.parametrize("mode", ["threads", "fibers"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_right_twins_are_left_alone(program, variant, mode):
    for seed in (0, 1) if variant == "plain" else (int(mode == "fibers"),):
        made = program("faults", variant, "all", mode, f"seed={seed}")
        assert (made.returncode, made.stderr) == (SILENT, ""), made.stdout + made.stderr
        assert made.stdout == f"{len(FAULTS)} kernels ran, and were right\n"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_found(program, name, variant):
    expected = FAULTS[name][VARIANTS.index(variant)]
    if expected is None:
        return
    for seed in (0, 1) if variant == "plain" else (0,):
        made = program("faults", variant, name, "faulty", "threads", f"seed={seed}")
        assert made.returncode == expected, made.stdout + made.stderr


@pytest.mark.parametrize("mode", ["threads", "fibers"])
@pytest.mark.parametrize("name", ["barrier", "syncwarp", "shuffle_for_syncwarp"])
def test_a_race_is_told_with_both_lines(program, name, mode):
    made = program("faults", "tsan", name, "faulty", mode)
    assert made.returncode == REPORTED
    reports = made.stderr.split("WARNING: ThreadSanitizer: data race")[1:]
    assert reports
    seen = {int(line) for line in re.findall(r"#0 \S+ \S*faults\.cu:(\d+)", made.stderr)}
    assert lines_of(name, "writes") <= seen and lines_of(name, "reads") <= seen


@pytest.mark.parametrize("mode", ["threads", "fibers"])
def test_a_race_between_ctas_is_told_with_one_line(program, mode):
    """The other belongs to a CTA that is over, whose steps ThreadSanitizer may have forgotten."""
    made = program("faults", "tsan", "last_block", "faulty", mode)
    assert made.returncode == REPORTED
    (line,) = lines_of("last_block", "reads")
    assert re.search(rf"#0 last_block \S*faults\.cu:{line} ", made.stderr)


@pytest.mark.parametrize("mode", ["threads", "fibers"])
def test_a_read_of_a_cta_that_is_gone(program, mode):
    """The race is between the end of the CTA and the other's read, whichever comes first."""
    made = program("faults", "tsan", "last_cluster_barrier", "faulty", mode)
    assert made.returncode == REPORTED
    (line,) = lines_of("last_cluster_barrier", "reads")
    assert f"faults.cu:{line}" in made.stderr and "#0 free" in made.stderr
    plain = program("faults", "plain", "last_cluster_barrier", "faulty", mode)
    assert f"has ended, and its shared memory is gone (emulation/faults.cu:{line})" in plain.stdout


@pytest.mark.parametrize("mode", ["threads", "fibers"])
def test_what_address_and_undefined_say(program, mode):
    for name, message in {
        "bounds_global": "heap-buffer-overflow",
        "bounds_shared": "heap-buffer-overflow",
        "misaligned": "misaligned address",
        "overflow": "signed integer overflow",
    }.items():
        made = program("faults", "asan", name, "faulty", mode)
        assert made.returncode == REPORTED and message in made.stderr, made.stderr
        assert re.search(r"faults\.cu:\d+", made.stderr)
