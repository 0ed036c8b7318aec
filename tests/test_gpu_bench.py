"""Benchmarks on a GPU, as far as they can be tried without one: cold buffers, graph replay, goals, the copy floor."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where the folder `bench` lies

from bench import bench_frame, ceiling, cuda, floors, machine, protocol
from bench.row import Contest, Floor, Goal, Peer, Row

ROOT = machine.ROOT
MIB = 1 << 20


def test_buffers_rotate_until_the_cache_has_forgotten_them() -> None:
    assert cuda.sets(3 * 65536, 60 * MIB) == 800  # a small latent
    assert cuda.sets(48 * MIB, 60 * MIB) == 4
    assert cuda.sets(400 * MIB, 60 * MIB) == 2  # never the same twice in a row
    assert cuda.sets(1, 60 * MIB) == cuda.MOST_SETS
    for traffic in (3 * 65536, 10 * MIB, 48 * MIB, 400 * MIB):
        assert cuda.sets(traffic, 60 * MIB) * traffic >= cuda.COLD * 60 * MIB


def test_a_graph_walks_over_every_set_in_rounds() -> None:
    assert cuda.walk(["a", "b", "c"]) == ["a", "b", "c"] * 6  # type: ignore[list-item]
    assert len(cuda.walk([len] * 800)) == 800


def test_a_replay_counts_as_the_calls_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def event_seconds(calls: Sequence[Any], repeats: int) -> float:
        asked.append(repeats)
        return 5.0 * repeats * calls[0].count

    monkeypatch.setattr(cuda, "event_seconds", event_seconds)
    replay = FakeReplay([lambda: None] * 40)
    assert cuda.replay_seconds([replay], 100) == pytest.approx(500) and asked == [3]


class FakeReplay:
    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls, self.count = cuda.walk(calls), len(cuda.walk(calls))

    def __call__(self) -> None:
        for call in self.calls:
            call()


@pytest.mark.parametrize(
    ("traffic", "timing"), [(24, "graph"), (cuda.GRAPH_TRAFFIC, "events")], ids=["small", "large"]
)
def test_rows_on_a_gpu_are_cold_and_small_ones_replayed(
    traffic: int, timing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[list[int]] = []

    def contest() -> Contest:
        mine: list[int] = []
        made.append(mine)
        value = torch.ones(2, 3)

        def call() -> torch.Tensor:
            mine.append(1)
            return value

        copy = Floor("copy", {"copy, torch": lambda: None}, lambda t: t["copy, torch"], "how")
        return Contest(call, lambda: [value.double()], 1e-9, {"eager": Peer(lambda: value, 1e-3)}, (copy,))

    monkeypatch.setattr(cuda, "buffer_sets", lambda row: 5)
    monkeypatch.setattr(cuda.captured, "__defaults__", (FakeReplay,))

    def seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
        for k in range(repeats):
            calls[k % len(calls)]()
        return 1e-3 * repeats * sum(getattr(c, "count", 1) for c in calls) / len(calls)

    monkeypatch.setattr(cuda, "event_seconds", seconds)
    short = protocol.Settings(min_rounds=3, max_rounds=3, row_time=0.0, min_time=1e-5, warm_up=0.0)
    row = Row("op", (2, 3), torch.float32, contest, traffic=traffic, flops=6, device="cuda")
    result = protocol.measure(row, short)
    assert (result.timing, result.buffer_sets) == (timing, 5)
    assert result.median() == pytest.approx(1e-3) and result.floors["copy"] == pytest.approx(1e-3)
    # a set comes round only after all others
    counts = [len(mine) for mine in made]
    assert len(counts) == 5 and (max(counts) - min(counts) <= 2 or timing == "events")


def test_rows_on_a_gpu_have_the_goals_of_the_design() -> None:
    rows = bench_frame.rows("cuda", False)
    have = {row.id: [str(goal) for goal in row.goals] for row in rows}
    assert len(have) == len(rows)
    small = have["lm_direction-1x4x64x64-float32-cuda"]
    assert small == ["compile >= 3", "copy >= 0.666667"]
    for shape in ("16x4x64x64", "64x4x64x64", "1x4x128x128", "8x4x128x128", "64x4x128x128"):
        assert have[f"lm_direction-{shape}-float32-cuda"] == ["compile >= 3"]
    for name in ("lm_direction-16x16x256x256-float32-cuda", "affine_step-64x4x128x128-float32-3_terms-cuda"):
        assert have[name] == ["copy >= 0.9"], name
    assert all(row.device == "cuda" for row in rows)


def test_the_copy_floor_moves_as_many_bytes() -> None:
    x, y = ceiling.pair(3 * 4096, "cpu")
    assert x.nbytes + y.nbytes == 3 * 4096
    floor = floors.copy(3 * 4096, torch.device("cpu"))
    floor.contestants["copy, torch"]()
    assert not floor.substitute and floor.seconds(dict.fromkeys(floor.contestants, 2.0)) == 2.0
    assert Goal("copy", 0.9).met(0.95)


def test_make_bench_takes_a_device() -> None:
    shown = subprocess.run(
        ["make", "-n", "bench", "DEVICE=cuda"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert any("-m bench" in line and "--device cuda" in line for line in shown.stdout.splitlines())


@pytest.mark.full
def test_rows_are_written_as_they_are_measured(tmp_path: pathlib.Path) -> None:
    words = ["-m", "bench", "--rows", "lm_direction-1x1-float32-call_cost", "--threads", "1"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    lines = tmp_path / "rows.jsonl"
    more = {"PYTHONPATH": path, "MARQUARDT_BENCH_ROWS": str(lines), "MARQUARDT_COMMIT": "abc"}
    ran = subprocess.run(
        [sys.executable, *words, "--json", str(tmp_path / "rows.json")],
        cwd=ROOT,
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=120,
    )
    (line,) = lines.read_text().splitlines()
    found = json.loads(line)
    assert found["id"] == "lm_direction-1x1-float32-call_cost" and found["commit"] == "abc", ran.stderr
    (kept,) = json.loads((tmp_path / "rows.json").read_text())["benchmarks"]
    assert kept["extra_info"] == found


def test_an_earlier_ceiling_is_taken(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ceiling.json").write_text('{"gbps": 3000.0}')
    monkeypatch.setenv("MARQUARDT_BENCH_CEILING", str(tmp_path / "ceiling.json"))
    ceiling.measured.cache_clear()
    assert ceiling.measured()["gbps"] == 3000
    ceiling.measured.cache_clear()


@pytest.mark.full
def test_rows_stop_at_the_deadline(tmp_path: pathlib.Path) -> None:
    words = ["-m", "bench", "--rows", "lm_direction-1x1-float32-call_cost", "--deadline", "0.000001"]
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, *words, "--json", str(tmp_path / "rows.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "out of time, not measured: lm_direction-1x1-float32-call_cost" in ran.stderr, ran.stderr
