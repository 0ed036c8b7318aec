"""The emulated machine: what CUDA's functions do, and what it refuses."""

from __future__ import annotations

import re
import threading
import time

import numpy as np
import pytest

pytestmark = pytest.mark.emulation

MODES = ("fibers", "threads")
SEEDS = (0, 1, 7)
SHARED_END = 232448  # most bytes of a CTA


@pytest.fixture(params=MODES)
def mode(request):
    return request.param


@pytest.mark.parametrize(
    "grid, block, cluster", [(1, 1, 1), (3, 32, 1), (5, 96, 1), (6, 40, 2), (16, 64, 16)]
)
def test_indices(machine, mode, grid, block, cluster):
    found = np.full((grid * block, 6), -1, np.int64)
    machine.run("indices", [found], grid=grid, block=block, cluster=cluster, mode=mode, seed=3)
    thread, number = np.arange(grid * block) % block, np.arange(grid * block) // block
    sizes = [np.full(grid * block, size) for size in (block, grid)]
    expected = [thread, number, *sizes, number % cluster, np.full(grid * block, cluster)]
    assert (found == np.stack(expected, 1)).all()


def test_the_end_of_the_largest_grid(machine):
    """Indices beyond 2^31, and beyond 2^38: only the last CTAs of the grid run."""
    grid, block, blocks = 2**31 - 1, 256, 3
    first = (grid - blocks) * block
    found = np.zeros(blocks * block, np.int64)
    machine.run("wide_index", [found], [first], grid=grid, block=block, first_block=grid - blocks)
    assert (found == first + np.arange(blocks * block)).all()


def _shuffled(x, kind, lanes, width):
    lane = np.arange(32)
    first = lane // width * width
    source = {
        0: first + lanes % width,
        1: np.where((lane ^ lanes) < first + width, lane ^ lanes, lane),
        2: np.where(lane + lanes < first + width, lane + lanes, lane),
        3: np.where(lane - lanes >= first, lane - lanes, lane),
    }[kind]
    return x.reshape(-1, 32)[:, source].reshape(-1)


@pytest.mark.parametrize("dtype", [np.int32, np.float32, np.uint64, np.float64], ids=lambda d: d.__name__)
@pytest.mark.parametrize("kind", range(4), ids=["idx", "xor", "down", "up"])
def test_shuffles(machine, kind, dtype):
    rng = np.random.default_rng(0)
    number = [np.int32, np.float32, np.uint64, np.float64].index(dtype)
    for lanes in (0, 1, 3, 5, 16, 31):
        for width in (4, 8, 32):
            x = rng.integers(0, 2**62, 128, dtype=np.uint64)
            x = x.astype(dtype) if dtype != np.int32 else (x >> np.uint64(32)).astype(np.int32)
            found = np.zeros_like(x)
            machine.run("shuffles", [x, found], [kind, lanes, width, number], grid=2, block=64, seed=lanes)
            assert (found == _shuffled(x, kind, lanes, width)).all(), (lanes, width)


@pytest.mark.parametrize("mask", [0xFFFFFFFF, 0x0000FFFF, 0x80000001, 0x00000010])
def test_votes(machine, mode, mask):
    rng = np.random.default_rng(0)
    for predicates in (rng.integers(0, 3, 64), np.zeros(64), np.ones(64)):
        predicates = predicates.astype(np.int32)
        found = np.full((64, 3), 9, np.uint32)
        machine.run("votes", [predicates, found], [mask], block=64, mode=mode, seed=2)
        for warp in range(2):
            ballot = sum(int(predicates[32 * warp + i] != 0) << i for i in range(32)) & mask
            for i in range(32):
                expected = [ballot, int(ballot != 0), int(ballot == mask)] if mask >> i & 1 else [9, 9, 9]
                assert found[32 * warp + i].tolist() == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_halves_of_a_warp_meet_apart(machine, mode, seed):
    found = np.zeros(64, np.int32)
    machine.run("half_warps", [found], block=64, mode=mode, seed=seed)
    assert (found == np.tile(np.repeat([16 + 200, 2 + 200], 16), 2)).all()


def test_a_part_of_a_warp(machine):
    """The last warp of a CTA of 40 threads has eight lanes; a full mask means those."""
    x, found = np.arange(40, dtype=np.float32), np.zeros(40, np.float32)
    machine.run("shuffles", [x, found], [1, 4, 32, 1], block=40)
    assert (found == (np.arange(40) ^ 4)).all()


class TestAtomics:
    TYPES = (np.int32, np.uint32, np.uint64, np.float32, np.float64)

    def run(self, machine, kind, x, start, mode="fibers", seed=5):
        to, old = np.array([start], x.dtype), np.zeros_like(x)
        number = self.TYPES.index(x.dtype.type)
        machine.run(
            "atomics", [x, to, old], [kind, number], grid=len(x) // 64, block=64, mode=mode, seed=seed
        )
        return to[0], old

    @pytest.mark.parametrize("dtype", TYPES, ids=lambda d: d.__name__)
    def test_add(self, machine, mode, dtype):
        x = np.ones(128, dtype)
        total, old = self.run(machine, 0, x, 5, mode)
        assert total == 133 and sorted(old) == list(range(5, 133))

    def test_add_wraps_around(self, machine):
        assert self.run(machine, 0, np.full(64, 2**31 - 1, np.int32), 0)[0] == np.int32(-64)

    @pytest.mark.parametrize("dtype", TYPES[:3], ids=lambda d: d.__name__)
    def test_of_integers(self, machine, dtype):
        x = np.random.default_rng(0).integers(1, 2**31 - 1, 128).astype(dtype)
        low = -(2**31) if dtype == np.int32 else 0
        assert self.run(machine, 1, x, low)[0] == x.max()
        assert self.run(machine, 2, x, x.max())[0] == x.min()
        assert self.run(machine, 5, x, 0)[0] == np.bitwise_or.reduce(x)
        assert self.run(machine, 6, x, x.max())[0] == np.bitwise_and.reduce(x)
        last, old = self.run(machine, 3, x, 0)
        assert sorted([last, *old]) == sorted([0, *x])
        first, old = self.run(machine, 4, x, 0)
        assert (old == 0).sum() == 1 and first == x[old == 0] and set(old) == {dtype(0), first}


@pytest.mark.parametrize("seed", SEEDS)
def test_barriers(machine, mode, seed):
    x = np.random.default_rng(seed).integers(0, 1000, 4 * 128).astype(np.float64)
    found = np.zeros(4)
    machine.run("tree", [x, found], [3], grid=4, block=128, shared=128 * 8, mode=mode, seed=seed)
    assert (found == x.reshape(4, 128).sum(1)).all()


@pytest.mark.parametrize("size", [1, 2, 8, 16])
@pytest.mark.parametrize("seed", SEEDS)
def test_clusters(machine, mode, size, seed):
    block, grid = 32, 2 * size
    x, found = np.arange(grid * block, dtype=np.float64), np.zeros((grid, block, 2))
    if (
        size == 1
    ):  # the barrier of a cluster of one does nothing, as on older chips; threads touch their own alone
        seed = 0
    shared = block * 16
    machine.run(
        "cluster_sums", [x, found], grid=grid, block=block, cluster=size, shared=shared, mode=mode, seed=seed
    )
    sums = x.reshape(2, size, block).sum(1)
    assert (found[..., 0].reshape(2, size, block) == sums[:, None]).all()
    before = (np.arange(grid) % size - 1) % size
    assert (found[..., 1] == 1000 * before[:, None] + np.arange(block) + 1.0).all()


@pytest.mark.parametrize("shared", [1, 1000, SHARED_END])
def test_shared_memory_is_fresh(machine, mode, shared):
    found = np.zeros(shared, np.uint8)
    machine.run("fresh", [found], [shared], grid=3, block=32, shared=shared, mode=mode)
    assert (found == 0xFF).all()


def test_bits(machine):
    found = np.zeros((64, 5), np.int32)
    machine.run("bits", [found], block=64)
    for x, first, count, zeros, fused in found:
        text = f"{int(x) & 0xFFFFFFFF:032b}"
        assert (first, count, zeros) == (
            32 - text.rindex("1") if x else 0,
            text.count("1"),
            (text + "1").index("1"),
        )
        assert np.int32(fused).view(np.float32) == 2.0 + first


class TestOrder:
    def run(self, machine, barrier, **at):
        counter, found = np.zeros(1, np.int32), np.zeros(256, np.int32)
        machine.run("order", [counter, found], [barrier], grid=4, block=64, **at)
        assert sorted(found) == list(range(256))
        return found.tolist()

    @pytest.mark.parametrize("barrier", [0, 1])
    def test_seeds(self, machine, mode, barrier):
        orders = [self.run(machine, barrier, mode=mode, seed=seed) for seed in range(6)]
        assert orders[0] == list(range(256))
        assert len({tuple(order) for order in orders}) == 6
        blocks = [[i // 64 for i in order[::64]] for order in orders]
        assert len({tuple(b) for b in blocks}) > 1  # CTAs change places too
        assert orders[3] == self.run(machine, barrier, mode=mode, seed=3)

    def test_modes_agree(self, machine):
        assert self.run(machine, 1, mode="fibers", seed=9) == self.run(machine, 1, mode="threads", seed=9)

    def test_waiting_for_another_thread(self, machine, mode):
        flag = np.zeros(1, np.int32)
        machine.run("patience", [flag], block=64, mode=mode)
        assert flag[0] == 1


# Check -> grid, block, cluster, bytes of shared memory; and what the message says. HERE is a line of the source.
REFUSED = {
    "half_waits": (
        (2, 64, 1, 0),
        "no thread can go on; block 0: threads 0-31 wait at __syncthreads (HERE), threads 32-63 ended",
    ),
    "two_barriers": ((1, 64, 1, 0), "divergent __syncthreads: thread 0 waits at another (HERE) (HERE)"),
    "lane_missing": (
        (1, 64, 1, 0),
        "threads 0-2 wait at a shuffle of lanes 0xffffffff (HERE), thread 3 ended, threads 4-31 wait at",
    ),
    "mask_without_caller": (
        (1, 32, 1, 0),
        "thread 16: __syncwarp: the mask does not name the lane that calls",
    ),
    "other_operation": ((1, 32, 1, 0), "thread 1: a shuffle: other lanes of the mask wait at __syncwarp"),
    "lane_outside_of_mask": ((1, 32, 1, 0), "thread 0: a shuffle reads lane 20, which does not take part"),
    "width_of_three": ((1, 32, 1, 0), "a shuffle's width must be 1, 2, 4, ... 32"),
    "barrier_and_shuffle": (
        (1, 64, 1, 0),
        "threads 0-31 wait at __syncthreads (HERE), thread 32 ended, "
        "threads 33-63 wait at __syncwarp of lanes 0xffffffff (HERE)",
    ),
    "block_missing": (
        (4, 32, 4, 0),
        "block 0: threads 0-31 ended; block 1: threads 0-31 wait at cluster_wait",
    ),
    "wait_without_arrive": ((2, 32, 2, 0), "cluster_wait without a cluster_arrive"),
    "arrive_twice": ((2, 32, 2, 0), "cluster_arrive without a cluster_wait after the one before"),
    "arrive_and_end": ((1, 32, 1, 0), "ends between cluster_arrive and cluster_wait"),
    "rank_beyond": ((2, 32, 2, 64), "there is no CTA 2 in a cluster of 2"),
    "address_beyond": ((2, 32, 2, 68), "an address outside of the CTA's 68 bytes of shared memory"),
    "block_gone": (
        (2, 32, 2, 64),
        "block 1, thread 0: the CTA of rank 0 has ended, and its shared memory is gone",
    ),
    "copy_misaligned": ((1, 32, 1, 64), "cp.async from an address that is no multiple of 16"),
    "copy_not_awaited": ((1, 32, 1, 64), "ends before its copies have arrived (cp.async without a wait)"),
    "load_misaligned": ((1, 32, 1, 0), "16 bytes are read from an address that is no multiple of 16"),
    "store_misaligned": ((1, 32, 1, 0), "8 bytes are written to an address that is no multiple of 8"),
    "row_misaligned": ((1, 32, 1, 512), "ldmatrix of a row that is no multiple of 16"),
    "half_a_warp_multiplies": (
        (1, 48, 1, 0),
        "thread 32: mma_m16n8k16_bf16: the warp has not all of these lanes",
    ),
    "nested": ((1, 32, 1, 0), "inner: a kernel cannot launch another"),
}


class TestRefused:
    @pytest.mark.parametrize("name", REFUSED)
    def test_misuse(self, machine, mode, name):
        (grid, block, cluster, shared), message = REFUSED[name]
        room = np.zeros(64)
        assert room.ctypes.data % 16 == 0  # numpy's own memory is
        with pytest.raises(RuntimeError) as error:
            machine.run(name, [room], grid=grid, block=block, cluster=cluster, shared=shared, mode=mode)
        text = re.sub(r"emulation/checks_misuse\.cu:\d+", "HERE", str(error.value))
        assert message in text
        assert text.startswith("inner: " if name == "nested" else name + ": ")

    @pytest.mark.parametrize("byte", [-128, -1, 1000, 1001, 1127])
    def test_beside_shared_memory(self, machine, mode, byte):
        with pytest.raises(
            RuntimeError, match=f"block 1 has 1000 bytes of shared memory and wrote to byte {byte}$"
        ):
            machine.run("behind_shared", [], [byte], grid=2, shared=1000, mode=mode, first_block=1)
        machine.run("behind_shared", [], [999], shared=1000, mode=mode)

    @pytest.mark.parametrize(
        "wrong, at",
        [
            ("a grid has 1 to 2147483647 CTAs", {"grid": 0}),
            ("a grid has 1 to 2147483647 CTAs", {"grid": 2**31}),
            ("a CTA has 1 to 1024 threads", {"block": 1025}),
            ("a cluster has 1 to 16 CTAs", {"grid": 17, "cluster": 17}),
            ("a grid consists of whole clusters", {"grid": 9, "cluster": 2}),
            ("a CTA has up to 232448 bytes of shared memory", {"shared": SHARED_END + 1}),
        ],
    )
    def test_launches(self, machine, wrong, at):
        with pytest.raises(RuntimeError) as error:
            machine.run("indices", [], **at)
        assert f"indices: launch failed: {wrong} (grid " in str(error.value)

    def test_exceptions_reach_the_caller(self, machine, mode):
        with pytest.raises(IndexError, match="^thread 40 has had enough$"):  # std::out_of_range
            machine.run("throws", [], [2], grid=4, block=64, mode=mode, seed=4)
        machine.run("throws", [], [99], grid=4, block=64, mode=mode, seed=4)  # and nothing is left behind


def test_fibers_are_quick(machine):
    """A million threads, each at eleven barriers."""
    grid, block = 4096, 256
    x, found = np.ones(grid * block), np.zeros(grid)
    began = time.perf_counter()
    machine.run("tree", [x, found], [1], grid=grid, block=block, shared=block * 8)
    assert time.perf_counter() - began < 10.0  # a second, on an idle machine
    assert (found == block).all()


def test_launches_of_several_host_threads(machine):
    """Each has a machine of its own at work."""
    failed = []

    def work(seed):
        x, found = np.random.default_rng(seed).integers(0, 9, 64 * 128).astype(np.float64), np.zeros(64)
        machine.run("tree", [x, found], [2], grid=64, block=128, shared=128 * 8)
        failed.extend([seed] * int((found != x.reshape(64, 128).sum(1)).any()))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
