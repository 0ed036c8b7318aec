"""The package with the emulated CUDA kernels under its operators: the tests of the ops, as they are, run through them.

In libmarquardt_emulated.so the CPU plays the device, so every layout, dtype pair, bad argument and derivative reaches
the kernels the way a CUDA tensor does. The same tests run on a real GPU without this.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emulation as emulated

pytestmark = pytest.mark.emulation

ROOT = Path(__file__).resolve().parent.parent.parent
OPS = (
    "tests/test_hessian.py",
    "tests/test_langevin.py",
    *(f"tests/test_lowrank{name}.py" for name in ("", "_forms", "_logdet", "_update", "_hessian_module")),
)


@pytest.fixture(scope="session")
def library() -> Path:
    pytest.importorskip("torch")
    try:
        return emulated.build(["marquardt_emulated"]) / "libmarquardt_emulated.so"
    except emulated.Missing as problem:
        pytest.skip(str(problem))


@pytest.fixture
def tests(library):
    """tests(*words) runs pytest with the emulated library; all it selects must pass, and there must be some."""

    def run(*words: str, **environment: str) -> None:
        kept = {
            k: v for k, v in os.environ.items() if k not in ("MARQUARDT_BACKEND", "TRITON_INTERPRET", "FULL")
        }
        child = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--durations=0", *words],
            cwd=ROOT,
            env={**kept, "MARQUARDT_LIBRARY": str(library), **environment},
            capture_output=True,
            text=True,
            timeout=1500,
        )
        assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]

    return run


@pytest.mark.full
@pytest.mark.parametrize("gpu", ["sm_80", "sm_90"])
def test_device_paths(tests, gpu: str):
    """Tables of numbers on the device, matrices, plans; with clusters and without."""
    tests("tests/emulation/device_paths.py", MARQUARDT_EMULATED_GPU=gpu)


@pytest.mark.full
def test_ops(tests):
    """Dtype pairs, layouts and bad arguments of every op."""
    tests("-m", "(dtypes or strides or errors) and not full", "-k", "not reference", *OPS)


@pytest.mark.full
def test_thresholds(tests):
    """The selection and the division behind it."""
    tests("-m", "not full", "-k", "not reference", "tests/test_threshold.py", "tests/test_threshold_calls.py")


@pytest.mark.full
def test_without_clusters(tests):
    tests("-m", "dtypes and not full", "-k", "not reference", *OPS, MARQUARDT_EMULATED_GPU="sm_80")


@pytest.mark.full
def test_engine(tests):
    """Gram and apply with every feature, the maps, and tensors that are more than memory."""
    tests("-m", "not full", "tests/test_frame.py", "tests/test_maps.py", "tests/test_dispatch.py")


@pytest.mark.full
def test_values_and_derivatives(tests):
    """Accuracy against the oracles, derivatives of every kind, equal bits over batch sizes and positions."""
    kinds = "(accuracy or gradcheck or determinism) and not full"
    tests("-m", kinds, "-k", "not reference", "tests/test_hessian.py", "tests/test_langevin.py")


@pytest.mark.full
def test_steps(tests):
    files = (f"tests/test_{name}.py" for name in ("lml_steps", "lml_rules", "lml_errors", "langevin_steps"))
    tests("-m", "not full", "-k", "not reference", *files)


@pytest.mark.full
def test_values_of_the_low_rank_family(tests):
    chosen = "not reference and not gradient and not tangent"
    tests(
        "-m", "accuracy and not full", "-k", chosen, "tests/test_lowrank.py", "tests/test_lowrank_logdet.py"
    )
