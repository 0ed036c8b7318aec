"""The guard: ratios of two small rows, in seconds; fails as soon as a kernel is slower than eager PyTorch.

On one thread: on a busy machine two threads wait for each other, which says nothing about a kernel.
"""

from __future__ import annotations

import pathlib
import statistics
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where the folder `bench` lies

from bench import bench_frame, peers, protocol
from bench.row import Contest, Goal, Peer, Row

pytestmark = pytest.mark.alone
GUARD = protocol.Settings(min_rounds=15, max_rounds=31, row_time=0.3, min_time=5e-4, warm_up=0.02)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def times_faster(row: Row) -> float:
    """Than eager; the median of three attempts, since a neighbour may take a core away from one of them."""
    return statistics.median(protocol.measure(row, GUARD).value(Goal("eager", 1)) for _ in range(3))


def test_guard_lm_direction_is_faster_than_eager() -> None:
    row = bench_frame.lm_row((4, 4, 64, 64), torch.float32, "cpu", with_compile=False)
    assert times_faster(row) > 1


def test_guard_affine_step_is_faster_than_eager() -> None:
    row = bench_frame.affine_row(3, (4, 4, 64, 64), torch.float32, "cpu", with_compile=False)
    assert times_faster(row) > 1


def test_the_guard_notices_a_slow_kernel() -> None:
    eps, prev = peers.correlated_pair((4, 4, 64, 64), torch.float32, "cpu")

    def once() -> Tensor:
        return peers.published_lm(eps, prev, 0.005, 0.3)

    def twice() -> Tensor:
        once()
        return once()

    want = peers.published_lm(eps.double(), prev.double(), 0.005, 0.3)
    slow = Contest(twice, lambda: [want], 1e-3, {"eager": Peer(once, 1e-3)})
    assert times_faster(Row("op", (4, 4, 64, 64), torch.float32, lambda: slow, traffic=1, flops=1)) < 1
