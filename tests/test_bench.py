"""The benchmark harness: wrong results are never timed, rounds interleave, the JSON is complete."""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where the folder `bench` lies

from bench import bench_frame, floors, machine, plugin, protocol, table
from bench.row import Contest, Floor, Goal, Peer, Row

ROOT = machine.ROOT
SHORT = protocol.Settings(min_rounds=5, max_rounds=5, row_time=0.0, min_time=1e-5, warm_up=0.0)


def row_of(contest: Contest, dtype: torch.dtype = torch.float32, goals: tuple[Goal, ...] = ()) -> Row:
    return Row("op", (2, 3), dtype, lambda: contest, traffic=24, flops=6, goals=goals)


def contest_of(got: Tensor, want: Tensor, **more: Any) -> Contest:
    return Contest(subject=lambda: got, oracle=lambda: [want], tolerance=2e-7, **more)


# --- the gate -----------------------------------------------------------------------------------------------

WANT = torch.linspace(1.0, 2.0, 12, dtype=torch.float64).reshape(4, 3)
RIGHT = WANT.float()


def one_bad_sample() -> Tensor:
    got = RIGHT.clone()
    got[3] *= 1 + 4e-7  # beyond 2e-7, while the mean over the batch is below it
    return got


@pytest.mark.parametrize(
    "got",
    [RIGHT * (1 + 1e-6), torch.full_like(RIGHT, torch.nan), one_bad_sample(), RIGHT[:3], RIGHT.double()],
    ids=["scaled", "unwritten", "one sample", "shape", "dtype"],
)
def test_a_wrong_result_is_never_timed(got: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(protocol, "interleave", lambda *a, **k: timed.append(a))
    with pytest.raises(protocol.WrongResult):
        protocol.measure(row_of(contest_of(got, WANT)))
    assert not timed


def test_the_gate_sees_every_output() -> None:
    contest = Contest(subject=lambda: (RIGHT, RIGHT * 2), oracle=lambda: [WANT, WANT], tolerance=2e-7)
    with pytest.raises(protocol.WrongResult):
        protocol.check(row_of(contest))
    with pytest.raises(protocol.WrongResult):
        protocol.check(row_of(dataclasses.replace(contest, subject=lambda: RIGHT)))


def test_a_right_result_passes_and_its_error_is_kept() -> None:
    ours, _, _ = protocol.gate(contest_of(RIGHT, WANT), torch.float32)
    assert 0 < ours < 1e-7
    zero = torch.zeros(2, 3)
    assert protocol.gate(contest_of(zero, zero.double()), torch.float32)[0] == 0.0


def test_an_oracle_below_float64_is_refused() -> None:
    with pytest.raises(TypeError, match="float64"):
        protocol.check(row_of(contest_of(RIGHT, RIGHT)))


def test_an_inexact_peer_is_timed_and_marked() -> None:
    rivals = {
        "good": Peer(lambda: RIGHT, 1e-3),
        "bad": Peer(lambda: RIGHT * 1.1, 1e-3),
        "overflowed": Peer(lambda: RIGHT * math.inf, 1e-3),
        "own noise": Peer(lambda: RIGHT * 7, None),
    }
    result = protocol.measure(row_of(contest_of(RIGHT, WANT, peers=rivals)), SHORT)
    assert result.inexact == {"bad", "overflowed"}
    assert result.peer_errors["own noise"] is None
    assert set(result.samples) == {protocol.OURS, *rivals}


# --- rounds -------------------------------------------------------------------------------------------------


def test_rounds_interleave_and_rotate() -> None:
    log: list[str] = []

    def seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
        log.append(calls[0]())
        return 1.0 * repeats

    contestants = {name: [lambda name=name: name] for name in "abc"}
    samples, _ = protocol.interleave(contestants, SHORT, seconds)
    timed = "".join(log[3:])  # the first three are the warm-up
    assert timed == "abc" + "bca" + "cab" + "abc" + "bca"
    assert all(len(values) == 5 for values in samples.values())


def test_each_timing_is_preceded_by_an_untimed_call_of_its_own() -> None:
    log: list[str] = []
    contestants = {name: [lambda name=name: log.append(name)] for name in "ab"}

    def seconds(calls: Sequence[Callable[[], Any]], repeats: int) -> float:
        log.append("timed")
        return 1.0 * repeats

    protocol.interleave(contestants, SHORT, seconds)
    assert log[2:6] == ["a", "timed", "b", "timed"]


@pytest.mark.parametrize("cost", [1e-7, 3e-5, 1e-3, 0.2])
def test_one_timing_lasts_the_minimum(cost: float) -> None:
    settings = dataclasses.replace(SHORT, min_time=1e-3)
    samples, repeats = protocol.interleave({"a": [lambda: None]}, settings, lambda calls, r: cost * r)
    assert 1e-3 <= repeats["a"] * cost * 1.001
    assert repeats["a"] == 1 or repeats["a"] * cost <= 1.2e-3
    assert samples["a"] == pytest.approx([cost] * 5)


def test_the_empty_loop_is_subtracted() -> None:
    samples, _ = protocol.interleave({"a": [lambda: None]}, SHORT, lambda calls, r: 1e-3 * r, overhead=4e-4)
    assert samples["a"] == pytest.approx([6e-4] * 5)


def test_the_garbage_collector_is_off_meanwhile() -> None:
    seen = []
    assert gc.isenabled()
    protocol.interleave({"a": [lambda: seen.append(gc.isenabled())]}, SHORT)
    assert seen and not any(seen)
    assert gc.isenabled()


def test_ratios_are_of_medians() -> None:
    result = protocol.Result(
        row=row_of(contest_of(RIGHT, WANT)),
        samples={protocol.OURS: [1.0, 2.0, 9.0], "eager": [20.0, 6.0, 8.0]},
        error=0.0,
        tolerance=0.0,
        peer_errors={"eager": 0.0},
        inexact=frozenset(),
        floors={"triad": 1.5, "traffic": 1.0},
        floor_notes={},
        substitutes=frozenset({"traffic"}),
        repeats={},
    )
    assert result.value(Goal("eager", 3)) == 4.0
    assert result.value(Goal("eager", 3, slower=True)) == 0.25
    assert result.value(Goal("triad", 0.85)) == 0.75
    assert result.spread() == (5.5 - 1.5) / 2.0
    assert Goal("eager", 4).met(4.0) and not Goal("triad", 0.85).met(0.75)
    assert Goal("torch.add", 3.5, slower=True).met(3.4) and not Goal("torch.add", 3.5, slower=True).met(3.6)
    assert not result.can_judge(Goal("traffic", 0.85))  # a substitute judges nothing
    assert not result.can_judge(Goal("compile", 6))  # left out of this run


# --- floors -------------------------------------------------------------------------------------------------


def test_caches_and_levels() -> None:
    known = [floors.Cache(1, 48 << 10, 1), floors.Cache(2, 2 << 20, 1), floors.Cache(3, 32 << 20, 2)]
    assert floors._bytes("48K") == 49152 and floors._count("0-3,8") == 5
    assert floors.level(96 << 10, 2, known) == "L1"  # half of it for each of two private caches
    assert floors.level(3 << 20, 2, known) == "L2"
    assert floors.level(3 << 20, 1, known) == "L3"
    assert floors.level(20 << 20, 2, known) == "L3"  # one L3 for both
    assert floors.level(64 << 20, 2, known) == "memory"


def test_the_traffic_model_adds_two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def native(name: str, device: torch.device) -> Callable[..., object]:
        def kernel(inputs: list[Tensor], *rest: Any) -> None:
            counts = [t.numel() for t in inputs]
            calls.append((name, counts, *(r for r in rest if not isinstance(r, list))))

        return kernel

    monkeypatch.setattr(floors, "_native", native)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    eps, prev, out = (torch.zeros(8, 4, 128, 128) for _ in range(3))
    first = floors.triad([eps, prev], out)
    model = floors.traffic(first, [eps, prev], out)
    for call in model.contestants.values():
        call()
    size, sample = eps.numel(), eps[0].numel()
    repeats = floors.SWEEP_BYTES // (2 * 2 * sample * 4)
    assert calls == [
        ("_stream_floor", [size, size], True),
        ("_stream_floor", [size, size], False),
        ("_read_floor", [2 * sample, 2 * sample], repeats, 1),  # two threads with one sample each
    ]
    times = {"triad, streaming stores": 3e-3, "triad, cached stores": 2e-3, "read sweep": 1e-3}
    second = 2 * size * 4 / (2 * 2 * sample * 4 * repeats / 1e-3)
    assert model.seconds(times) == pytest.approx(2e-3 + second)
    assert first.seconds(times) == 2e-3
    assert not model.substitute


@pytest.mark.parametrize(
    ("batch", "threads", "samples"), [(1, 2, 1), (16, 2, 2), (3, 8, 3)], ids=["split", "own", "mixed"]
)
def test_the_sweep_covers_one_sample_per_thread(batch: int, threads: int, samples: int) -> None:
    assert floors.sample_words(batch, 4 * 1000, threads) == samples * 1000


@pytest.mark.skipif(not hasattr(torch.ops.marquardt, "_stream_floor"), reason="no native kernels")
@pytest.mark.parametrize("streaming", [True, False], ids=["streaming", "cached"])
@pytest.mark.parametrize("outputs", [1, 2])
@pytest.mark.parametrize("skip", [0, 3], ids=["aligned", "astray"])
def test_the_streaming_kernel_writes_sums_everywhere(streaming: bool, outputs: int, skip: int) -> None:
    for count, n in ((1, 1), (2, 31), (4, 4096), (8, 70001)):
        inputs = [
            (j + 1.0) * (torch.arange(n) % 97) + j for j in range(count)
        ]  # small integers: any order is exact
        memory = torch.full((outputs, n + 16), -1.0)
        outs = [memory[i, skip * (i + 1) : skip * (i + 1) + n] for i in range(outputs)]
        torch.ops.marquardt._stream_floor(inputs, outs, streaming)
        assert all(torch.equal(out, torch.stack(inputs).sum(0)) for out in outs)
        assert int((memory == -1).sum()) == outputs * 16  # and nowhere else
    for inputs, outs in (([], [torch.ones(2)]), ([torch.ones(2)], []), ([torch.ones(3)], [torch.ones(2)])):
        with pytest.raises(RuntimeError, match="_stream_floor: "):
            torch.ops.marquardt._stream_floor(inputs, outs, streaming)


def test_without_the_kernels_floors_are_substitutes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_native", lambda name, device: None)
    eps, prev, out = (torch.zeros(2, 3, 8, 8) for _ in range(3))
    first = floors.triad([eps, prev], out)
    model = floors.traffic(first, [eps, prev], out)
    assert first.substitute and model.substitute
    for call in model.contestants.values():
        call()


# --- the suite ----------------------------------------------------------------------------------------------


def test_every_floor_of_the_design_has_its_row() -> None:
    rows = bench_frame.rows("cpu", False)
    have = {(row.id, str(goal)) for row in rows for goal in row.goals}
    shapes = ["1x4x64x64", "16x4x64x64", "8x4x128x128", "64x4x128x128", "16x16x256x256"]
    for shape, eager, compiled in zip(shapes, (10, 22, 45, 25, 32), (6, 8, 10, 4.5, 4.3), strict=True):
        for goal in (f"eager >= {eager}", f"compile >= {compiled}", "traffic >= 0.85"):
            assert (f"lm_direction-{shape}-float32", goal) in have
    assert ("affine_step-8x4x128x128-float32-3_terms", "triad >= 0.85") in have
    for op in ("lm_direction", "affine_step"):
        assert (f"{op}-1x1-float32-call_cost", "torch.add <= 3.5") in have
        assert (f"{op}-1x1-float32-call_cost_with_gradients", "torch.add <= 6") in have


def test_rows_have_names_of_their_own_and_full_has_them_all() -> None:
    quick = [row.id for row in bench_frame.rows("cpu", False)]
    full = [row.id for row in bench_frame.rows("cpu", True)]
    assert len(set(full)) == len(full)
    assert set(quick) < set(full)
    assert not any("," in name or " " in name for name in full)  # they are words on a command line


@pytest.mark.parametrize("gamma", [None, 0.25], ids=["damped", "extrapolation"])
def test_the_published_formula_is_the_op(gamma: float | None) -> None:
    row = bench_frame.lm_row((3, 4, 16, 16), torch.float32, "cpu", gamma=gamma, with_compile=False)
    _, errors, inexact = protocol.gate(row.build(), row.dtype)
    assert not inexact and errors["eager"] is not None and errors["eager"] < 1e-4


def test_gradients_and_sums_pass_the_gate() -> None:
    for row in (
        bench_frame.lm_backward_row((3, 4, 16, 16), "cpu", with_compile=False),
        bench_frame.lm_row((3, 8), torch.bfloat16, "cpu", kappa="per sample", with_compile=False),
        bench_frame.lm_row((3, 8), torch.float32, "cpu", kappa=0.0, with_compile=False),
        bench_frame.affine_row(8, (3, 8), torch.float16, "cpu", with_compile=False),
        bench_frame.affine_row(2, (3, 8), torch.float32, "cpu", noise=0.5, with_compile=False),
    ):
        protocol.check(row)


# --- tables and machine -------------------------------------------------------------------------------------


def measured(goals: tuple[Goal, ...], substitute: bool = False) -> table.Info:
    rivals = {"eager": Peer(lambda: RIGHT * 2, 1e-3)}
    floor = Floor("triad", {"stream": lambda: None}, lambda t: t["stream"], "how", substitute)
    contest = contest_of(RIGHT, WANT, peers=rivals, floors=(floor,))
    return plugin.info(protocol.measure(row_of(contest, goals=goals), SHORT), "python -m bench --rows x")


def test_the_table_says_met_missed_inexact_and_substitute() -> None:
    met = measured((Goal("eager", 1e-9),))
    missed = measured((Goal("eager", 1e9), Goal("compile", 2)), substitute=True)
    cost = {**measured((Goal("eager", 1e9, slower=True),)), "spread": 0.5}
    wrong = {**met, "failure": "relative error 1", "goals": []}
    text = table.plain([met, missed, cost, wrong], "a machine")
    first, second, third, fourth = (
        line for line in text.splitlines() if line.startswith("op ") and "2x3" in line
    )
    assert first.endswith(" met") and "x ~" in first
    assert "missed: eager >= 1e+09" in second and "% *" in second
    assert " calls" in third and third.endswith(" met")
    assert "WRONG, not timed" in fourth
    assert "4 rows; floors: 2 met, 1 missed, 1 not judged; wrong results: 1" in text
    assert all(note in text for note in ("\ncalls: ", "\n~: ", "\n*: ", "\n!: "))
    marked = table.markdown([met, missed], "a machine").splitlines()
    assert all(line.count("|") == marked[0].count("|") for line in marked[:4])


def test_the_machine_line_names_hardware_and_no_person() -> None:
    text = machine.line()
    for part in ("threads", "torch", "marquardt", "commit", "load"):
        assert part in text
    assert str(pathlib.Path.home()) not in text and str(ROOT) not in text
    assert socket.gethostname() not in text.split()


# --- through pytest -----------------------------------------------------------------------------------------

STAND_IN = """
import pathlib, torch
from bench.row import Contest, Goal, Peer, Row

CALLS = pathlib.Path(__file__).with_suffix(".calls")
X = torch.ones(4, 3)

def subject(factor):
    with CALLS.open("a") as f:
        f.write(f"{factor}\\n")
    return X * factor

def row(name, factor):
    def build():
        peers = {"eager": Peer(lambda: X * 1.0, 1e-3)}
        return Contest(lambda: subject(factor), lambda: [X.double()], 2e-7, peers)
    return Row(name, (4, 3), torch.float32, build, 24, 12, goals=(Goal("eager", 1e-9),))

def rows(device, full):
    return [row("right", 1.0), row("wrong", 1.5)]

def test_row(row, measure):
    measure(row)
"""


def run(*arguments: str, cwd: pathlib.Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """(folder, outcome) of a run of two rows, one of them wrong."""
    folder = tmp_path_factory.mktemp("suite")
    (folder / "bench_stand_in.py").write_text(STAND_IN)
    outcome = run("bench", str(folder / "bench_stand_in.py"), "--json", str(folder / "out.json"))
    return folder, outcome


def test_a_wrong_row_is_named_and_fails_the_run(stand_in: tuple[pathlib.Path, Any]) -> None:
    folder, outcome = stand_in
    assert outcome.returncode != 0, outcome.stdout + outcome.stderr
    assert "WRONG, not timed: relative error 0.5" in outcome.stdout
    assert "[2/2]" in outcome.stderr and "FAILED wrong" in outcome.stderr
    calls = (folder / "bench_stand_in.calls").read_text().splitlines()
    assert calls.count("1.5") == 1  # the gate's one call, and not one more
    assert calls.count("1.0") > 15


def test_the_json_holds_what_it_promises(stand_in: tuple[pathlib.Path, Any]) -> None:
    folder, _ = stand_in
    made = json.loads((folder / "out.json").read_text())
    assert [entry["name"] for entry in made["benchmarks"]] == ["test_row[right-4x3-float32]"]
    assert "node" not in made["machine_info"]
    (entry,) = made["benchmarks"]
    found = entry["extra_info"]
    # pytest-benchmark's statistics are those of the interleaved samples, not of anything else it timed.
    assert entry["stats"]["median"] == found["median"] and entry["stats"]["rounds"] == found["rounds"] >= 15
    types = {
        "id": str, "op": str, "shape": list, "dtype": str, "device": str, "bytes": int, "flops": int,
        "median": float, "spread": float, "gbps": float, "gate": dict, "peers": dict, "floors": dict,
        "goals": list, "machine": str, "commit": str, "versions": dict, "repro": str,
    }  # fmt: skip
    assert {name: type(found[name]) for name in types} == types
    assert set(found["peers"]["eager"]) == {"median", "spread", "ratio", "error", "exact"}
    assert found["peers"]["eager"]["ratio"] == found["peers"]["eager"]["median"] / found["median"]
    assert found["goals"][0]["met"] is True
    assert found["repro"].startswith("python -m bench --rows right-4x3-float32")


def test_a_table_can_be_made_from_a_file(stand_in: tuple[pathlib.Path, Any]) -> None:
    outcome = run("bench", "--show", str(stand_in[0] / "out.json"), "--markdown")
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout.startswith("| op | shape |") and "| right | 4x3 |" in outcome.stdout


@pytest.mark.full
def test_plain_pytest_knows_the_rows() -> None:
    """`pytest bench` with any of pytest-benchmark's options; here the gate alone."""
    row = "lm_direction-1x1-float32-call_cost"
    outcome = run("pytest", "bench", "-q", "--benchmark-disable", f"--bench-rows={row}")
    assert outcome.returncode == 0 and "1 passed" in outcome.stdout, outcome.stdout + outcome.stderr
