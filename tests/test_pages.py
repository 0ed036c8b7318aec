"""Large new outputs on the CPU ask for huge pages: a fault per 2 MB in place of one per 4 kB."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

import marquardt as mq
from marquardt import _native

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="no native library")

LARGE = (48 << 20) // 4  # float32 words; no allocator recycles that much, so the mapping is the tensor's own


def flags_at(address: int) -> set[str]:
    """The flags of the mapping that holds an address."""
    smaps = pathlib.Path("/proc/self/smaps")
    if not smaps.exists() or not pathlib.Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("this system has no huge pages to ask for")
    inside = False
    for line in smaps.read_text().splitlines():
        word = line.split()[0]
        if not word.endswith(":"):
            first, last = (int(x, 16) for x in word.split("-"))
            inside = first <= address < last
        elif inside and word == "VmFlags:":
            return set(line.split()[1:])
    pytest.skip("this system does not show the flags of mappings")


def flags_of_output(words: int) -> set[str]:
    out = mq.affine_step([torch.zeros(1, words)], [1.0])
    return flags_at(out.data_ptr() + words * 2)


def test_large_outputs_ask():
    assert "hg" in flags_of_output(LARGE)


def test_the_switch():
    """MARQUARDT_HUGE_PAGES=0 turns it off."""
    flags_at(torch.zeros(1).data_ptr())  # skips where there is nothing to see
    here = pathlib.Path(__file__).parent
    code = "import test_pages as t; print('hg' in t.flags_of_output(t.LARGE))"
    for setting, expected in (("0", "False"), ("1", "True")):
        environment = {**os.environ, "MARQUARDT_HUGE_PAGES": setting}
        run = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True
        )
        assert run.stdout.split() == [expected], run.stderr
