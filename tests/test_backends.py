"""Which backend runs, how one is forced, and what is said about the others."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings

import pytest
import torch

import marquardt as mq
from harness import INTERPRETED, same_bits

pytestmark = [
    pytest.mark.errors,
    pytest.mark.skipif(
        INTERPRETED or os.environ.get("MARQUARDT_BACKEND", "auto") != "auto",
        reason="these tests choose the backend",
    ),
]
NAMES = ("cuda", "triton", "cpu", "reference")


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 40, generator=generator) for _ in range(2)]


def direction(pair, **keywords):
    return mq.lm_direction(*pair, damping=0.1, kappa=0.3, **keywords)


def python(program: str, **environment) -> subprocess.CompletedProcess:
    env = {**os.environ, **environment}
    return subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120
    )


def backend_of(pair) -> str | None:
    return mq.explain(mq.lm_direction, *pair, damping=0.1, kappa=0.3).backend


class TestUseBackend:
    def test_forced_and_restored(self, pair):
        assert backend_of(pair) == "cpu"
        with mq.use_backend("reference"):
            assert backend_of(pair) == "reference"
            with mq.use_backend("cpu"):
                assert backend_of(pair) == "cpu"
            with mq.use_backend("auto"):
                assert backend_of(pair) == "cpu"
            assert backend_of(pair) == "reference"
        assert backend_of(pair) == "cpu"

    def test_restored_after_an_error(self, pair):
        with pytest.raises(KeyError), mq.use_backend("reference"):
            raise KeyError
        assert backend_of(pair) == "cpu"

    def test_it_really_runs_there(self, pair, monkeypatch):
        """The reference is called under use_backend("reference") and not otherwise."""
        calls = []
        op = mq.hessian.LM
        original = op.reference
        monkeypatch.setattr(op, "reference", lambda *a: calls.append(1) or original(*a))
        direction(pair)
        assert not calls
        with mq.use_backend("reference"):
            direction(pair)
        assert calls

    def test_forced_cpu_is_auto(self, pair):
        """Forcing the backend that auto takes changes no bit, with out= and gradients too."""
        results = []
        for name in ("auto", "cpu"):
            with mq.use_backend(name):
                out, leaf = torch.empty_like(pair[0]), pair[0].clone().requires_grad_()
                direction(pair, out=out)
                found = torch.autograd.grad(
                    mq.lm_direction(leaf, pair[1], damping=0.1, kappa=0.3).sum(), leaf
                )
                results.append((direction(pair), out, *found, mq.affine_step(pair, [0.5, 2.0])))
        assert all(same_bits(a, b) for a, b in zip(*results, strict=True))
        assert same_bits(results[0][0], results[0][1])

    def test_backends_agree(self, pair):
        with mq.use_backend("reference"):
            slow = direction(pair)
        torch.testing.assert_close(direction(pair), slow, rtol=1e-5, atol=1e-6)

    def test_unknown_name(self):
        with pytest.raises(ValueError) as raised, mq.use_backend("metal"):
            pass
        for word in ("use_backend", "metal", *NAMES):
            assert word in str(raised.value)

    def test_one_that_cannot_run(self, pair):
        """Refused with the reason of every backend, before anything is written."""
        for name in ("cuda", "triton"):
            out = torch.full_like(pair[0], 7.0)
            with mq.use_backend(name), pytest.raises(NotImplementedError) as raised:
                direction(pair, out=out)
            assert issubclass(NotImplementedError, RuntimeError)
            message = str(raised.value)
            for word in ("lm_direction", name, *NAMES, "cpu"):
                assert word in message
            assert bool((out == 7).all())
            with mq.use_backend(name), pytest.raises(NotImplementedError, match="affine_step"):
                mq.affine_step(pair, [1.0, 2.0])
            with mq.use_backend(name), pytest.raises(NotImplementedError):
                mq.lm_direction(pair[0].clone().requires_grad_(), pair[1], damping=0.1, kappa=0.3)

    def test_no_silent_fallback(self, pair):
        """No warning on the fast path; forcing the reference is a wish and warns neither."""
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            direction(pair)
            with mq.use_backend("reference"):
                direction(pair)

    def test_backward_under_the_same_backend(self, pair):
        leaves = [t.clone().requires_grad_() for t in pair]
        with mq.use_backend("reference"):
            slow = torch.autograd.grad(direction(leaves).square().sum(), leaves)
        fast = torch.autograd.grad(direction(leaves).square().sum(), leaves)
        for a, b in zip(slow, fast, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


class TestEnvironment:
    SHOW = (
        "import torch, marquardt as mq\n"
        "x = torch.ones(2, 3)\n"
        "print(mq.explain(mq.lm_direction, x, x, damping=1.0, kappa=0.5).backend)\n"
        "mq.lm_direction(x, x, damping=1.0, kappa=0.5)\n"
    )

    def test_variable_forces(self):
        run = python(self.SHOW, MARQUARDT_BACKEND="reference")
        assert run.returncode == 0 and run.stdout.split() == ["reference"], run.stderr

    def test_auto_is_the_default(self):
        run = python(self.SHOW, MARQUARDT_BACKEND="auto")
        assert run.returncode == 0 and run.stdout.split() == ["cpu"], run.stderr

    def test_unknown_value(self):
        run = python("import marquardt", MARQUARDT_BACKEND="metal")
        assert run.returncode != 0 and "ValueError" in run.stderr and "metal" in run.stderr

    def test_forced_but_impossible(self):
        run = python(self.SHOW, MARQUARDT_BACKEND="cuda")
        assert run.returncode != 0 and "NotImplementedError" in run.stderr

    def test_use_backend_overrides_the_variable(self):
        program = (
            "import torch, marquardt as mq\nx = torch.ones(2, 3)\n"
            "with mq.use_backend('cpu'):\n"
            "    print(mq.explain(mq.lm_direction, x, x, damping=1.0, kappa=0.5).backend)\n"
        )
        run = python(program, MARQUARDT_BACKEND="reference")
        assert run.returncode == 0 and run.stdout.split() == ["cpu"], run.stderr


class TestExplain:
    def test_is_data(self, pair):
        found = mq.explain(mq.lm_direction, *pair, damping=0.1, kappa=0.3)
        assert dataclasses.is_dataclass(found)
        assert found.backend == "cpu" and set(found.reasons) == set(NAMES)
        assert found.reasons["cpu"] is None and found.reasons["reference"] is None
        assert isinstance(found.reasons["cuda"], str) and isinstance(found.reasons["triton"], str)
        assert list(found.copies) == []
        assert "cpu" in str(found)

    def test_by_name(self, pair):
        for op in ("lm_direction", mq.lm_direction):
            assert mq.explain(op, *pair, damping=0.1, kappa=0.3).backend == "cpu"
        for op in ("affine_step", mq.affine_step):
            assert mq.explain(op, pair, [1.0, 2.0]).backend == "cpu"

    def test_copies(self):
        """Layouts that must be copied are named; dense ones are not."""
        eps = torch.ones(2, 3, 4, 5)
        for dense in (eps, eps.contiguous(memory_format=torch.channels_last)):
            assert not mq.explain(mq.lm_direction, dense, dense, damping=0.1, kappa=0.3).copies
        gaps = torch.ones(2, 3, 4, 10)[..., ::2]
        assert mq.explain(mq.lm_direction, gaps, eps, damping=0.1, kappa=0.3).copies
        other = eps.contiguous(memory_format=torch.channels_last)
        (copy,) = mq.explain(mq.lm_direction, eps, other, damping=0.1, kappa=0.3).copies
        assert "1" in copy or "prev" in copy

    def test_nothing_is_computed(self, pair):
        before = torch.get_rng_state()
        out = torch.full_like(pair[0], 7.0)
        mq.explain(mq.affine_step, pair, [1.0, 2.0], noise_scale=1.0, out=out)
        assert bool((out == 7).all()) and torch.equal(torch.get_rng_state(), before)

    def test_available(self):
        assert mq.backends.available() == ("cpu", "reference")

    def test_unknown_op(self, pair):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            mq.explain("no_such_op", *pair)


class TestReport:
    def test_environment_report(self):
        """`python -m marquardt.env` prints what a bug report needs."""
        run = subprocess.run(
            [sys.executable, "-m", "marquardt.env"],
            env=dict(os.environ),
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert run.returncode == 0, run.stderr
        for word in ("marquardt", "torch", torch.__version__, "python", "cpu", "cuda", "triton", "reference"):
            assert word.lower() in run.stdout.lower(), f"{word!r} is missing in the report"

    def test_build_info(self):
        from marquardt import _native

        assert _native.library_path().is_file() and _native.why_not() is None
        info = _native.build_info()
        assert info and any("isa" in key.lower() for key in info), info

    def test_poison_is_seen(self):
        """The flag of the tests works: a fresh output of the native kernels is NaN before it is written."""
        empty = torch.ops.marquardt._frame_apply(
            [torch.ones(2, 5)], torch.zeros(1, 1, dtype=torch.float64), None, None, None, False, 1
        )
        assert same_bits(empty[0], torch.zeros(2, 5))
