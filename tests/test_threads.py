"""Several Python threads and several kernel threads at once."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import marquardt as mq
from harness import INTERPRETED, Target, native_only, same_bits

pytestmark = [
    pytest.mark.determinism,
    pytest.mark.skipif(INTERPRETED, reason="the interpreter keeps global state"),
]


def jobs(device: str):
    """Different ops, shapes and dtypes, with and without gradients."""

    def lm(shape, dtype, seed):
        generator = torch.Generator().manual_seed(seed)
        eps, prev = (torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(2))
        return lambda: mq.lm_direction(eps, prev, damping=0.1, kappa=0.3)

    def trained(shape, seed):
        generator = torch.Generator().manual_seed(seed)
        eps, prev = (torch.randn(shape, generator=generator).to(device) for _ in range(2))

        def run():
            leaf = eps.clone().requires_grad_()
            return torch.autograd.grad(mq.lm_direction(leaf, prev, damping=0.1, kappa=0.3).sum(), leaf)[0]

        return run

    def step(shape, seed):
        generator = torch.Generator().manual_seed(seed)
        terms = [torch.randn(shape, generator=generator).to(device) for _ in range(3)]
        words = torch.tensor([seed, 5], device=device)
        return lambda: mq.affine_step(terms, [0.5, 1.5, -0.3], noise_scale=0.2, seed=words)

    return [
        lm((1, 50000), torch.float32, 1),
        lm((8, 3000), torch.float32, 2),
        lm((3, 4, 33, 17), torch.bfloat16, 3),
        lm((64, 5), torch.float64, 4),
        trained((4, 6000), 5),
        trained((1, 40000), 6),
        step((2, 30000), 7),
        step((16, 100), 8),
    ]


def test_many_threads(target: Target):
    """Every thread gets the bits that the op gives alone."""
    work = jobs(target.device)
    alone = [job() for job in work]

    def repeat(i: int) -> bool:
        return all(same_bits(work[i](), alone[i]) for _ in range(8))

    with ThreadPoolExecutor(max_workers=len(work)) as pool:
        assert all(pool.map(repeat, range(len(work))))


def test_thread_count_changes_under_way(target: Target):
    """torch.set_num_threads between and during calls changes no bit."""
    if target.backend != "cpu":
        pytest.skip("threads of the CPU kernels")
    work, before = jobs(target.device), torch.get_num_threads()
    alone = [job() for job in work]
    stop = threading.Event()

    def disturb():
        count = 0
        while not stop.is_set():
            count += 1
            torch.set_num_threads(1 + count % 3)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        for _ in range(10):
            assert all(same_bits(job(), a) for job, a in zip(work, alone, strict=True))
    finally:
        stop.set()
        thread.join()
        torch.set_num_threads(before)


def test_results_of_another_thread_count():
    """A process of its own with one thread, and one with four, give the same bits."""
    native_only()
    program = (
        "import torch, marquardt as mq, hashlib\n"
        "g = torch.Generator().manual_seed(0)\n"
        "eps, prev = torch.randn(3, 70001, generator=g), torch.randn(3, 70001, generator=g)\n"
        "out = mq.lm_direction(eps, prev, damping=0.1, kappa=0.3)\n"
        "print(hashlib.sha256(out.numpy().tobytes()).hexdigest())\n"
    )
    hashes = set()
    for count in ("1", "2", "4"):
        environment = {**os.environ, "OMP_NUM_THREADS": count}
        run = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        hashes.add(run.stdout.strip())
    assert len(hashes) == 1


def test_errors_in_threads_stay_there(target: Target):
    """A refused call in one thread does not disturb the others."""
    eps = torch.ones(2, 100, device=target.device)
    faults = []

    def refused():
        for _ in range(20):
            try:
                mq.lm_direction(eps, eps[:, :50], damping=0.1, kappa=0.3)
                faults.append("not refused")
            except ValueError:
                pass

    def good():
        for _ in range(20):
            if not bool(mq.lm_direction(eps, 2 * eps, damping=0.1, kappa=0.3).isfinite().all()):
                faults.append("not finite")

    threads = [threading.Thread(target=f) for f in (refused, good, refused, good)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not faults, faults
