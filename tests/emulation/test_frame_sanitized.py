"""The kernels under ThreadSanitizer, and under AddressSanitizer with UndefinedBehaviorSanitizer."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from frame_calls import outputs_in, run, write_case
from frame_oracle import margins
from frame_small import small_cases, write_small_cases

from harness import same_bits

pytestmark = [pytest.mark.emulation, pytest.mark.full]

FOUND = 66  # the exit status when a sanitizer has something to say


@pytest.fixture(scope="module")
def folder(tmp_path_factory, program):
    fields = program("frame", "asan", "--fields").stdout.split()
    made = tmp_path_factory.mktemp("frames")
    write_small_cases(made, fields)
    return made


def report(made) -> str:
    return f"exit status {made.returncode}\n{made.stdout}\n{made.stderr[-6000:]}"


@pytest.mark.parametrize("variant", ["asan", "tsan"])
def test_clean(program, emulation, folder, variant):
    """No race, nothing out of bounds, nothing misaligned, nothing undefined; the same bits as without sanitizers."""
    made = program("frame", variant, "--write", variant, str(folder))
    cases = small_cases()
    assert made.returncode == 0 and f"{len(cases)} cases, 0 failed" in made.stdout, report(made)
    for name, (frame, plan) in cases.items():
        plain = run(emulation, frame, **plan)
        arrays = {
            f.stem.removeprefix(variant + "_"): np.load(f) for f in (folder / name).glob(f"{variant}_*")
        }
        found = outputs_in(frame, arrays)
        assert all(same_bits(a, b) for a, b in zip(found, plain.outputs, strict=True)), name
        if frame.scalars:
            assert arrays["scalars"].tobytes() == plain.scalars.numpy().tobytes(), name


class TestFaults:
    """A clean run means something only if another run is not."""

    @pytest.mark.parametrize("name", ["held-1", "held-3-in-place", "two-1-ring", "one-1-ring"])
    def test_an_array_that_is_too_short(self, program, folder, name):
        made = program("frame", "asan", "--short", "1", str(folder / name))
        assert made.returncode == FOUND and "heap-buffer-overflow" in made.stderr, report(made)

    @pytest.mark.parametrize("name", ["held-2-given", "two-2-scalars"])
    def test_too_little_shared_memory(self, program, tmp_path, emulation, name):
        frame, plan = small_cases()[name]
        wanted = run(emulation, frame, **plan).plan["shared"]
        write_case(tmp_path / name, frame, emulation.fields(), margins(frame), **plan, shared=wanted - 256)
        made = program("frame", "asan", str(tmp_path / name))
        assert made.returncode != 0 and ("overflow" in made.stderr or "shared memory" in made.stdout), report(
            made
        )

    def test_wrong_results_are_seen(self, program, folder, tmp_path):
        """The judge of the stand-alone cases: an expected number that is off by more than is allowed."""
        copy = tmp_path / "held-1"
        shutil.copytree(folder / "held-1", copy)
        expected, allowed = np.load(copy / "expected0.npy"), np.load(copy / "allowed0.npy")
        expected[1, 300] += 2.5 * allowed[1, 300]
        np.save(copy / "expected0.npy", expected)
        made = program("frame", "asan", str(copy))
        assert made.returncode == 1 and "FAIL held-1" in made.stdout and "[1, 300]" in made.stdout, report(
            made
        )
