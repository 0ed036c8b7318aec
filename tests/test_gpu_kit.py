"""The kit for a machine with a GPU, as far as it can be tried without one: parts, budgets, resuming, builds."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from bench.gpu_kit import __main__ as command
from bench.gpu_kit import build, parts, recorder, runner

from gpu_kit_context import gpu_kit_context, read

ROOT = runner.ROOT


# --- parts, budgets, resuming -------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path: pathlib.Path) -> runner.Context:
    return gpu_kit_context(tmp_path)


class Runs:
    """Parts that count how often they ran."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def part(self, name: str, good: bool = True, act: Callable[[], Any] = dict, **more: Any) -> runner.Part:
        def run(context: runner.Context) -> tuple[bool, dict[str, Any]]:
            self.names.append(name)
            return good, {"made": act()}

        return runner.Part(name, more.pop("share", 1.0), ("csrc",), run, **more)


def test_what_is_done_is_not_run_again(context: runner.Context) -> None:
    runs = Runs()
    chosen = [runs.part("first"), runs.part("second", good=False)]
    wanted = {"first": runner.DONE, "second": runner.FAILED}
    assert runner.run(chosen, context, limit=100) == wanted
    assert runner.run(chosen, context, limit=100) == wanted
    assert runs.names == ["first", "second", "second"]  # what failed is tried once more
    (context.root / "csrc" / "a.cu").write_text("two")
    runner.run(chosen[:1], context, limit=100)
    runner.run(chosen[:1], context, limit=100, again=True)
    assert runs.names[3:] == ["first", "first"]


def test_builds_and_caches_are_no_sources(context: runner.Context) -> None:
    before = runner.fingerprint(["csrc"], context.root)
    (context.root / "csrc" / "made.so").write_text("library")
    (context.root / "csrc" / "__pycache__").mkdir()
    (context.root / "csrc" / "__pycache__" / "a.txt").write_text("cache")
    assert runner.fingerprint(["csrc"], context.root) == before
    (context.root / "csrc" / "b.h").write_text("header")
    assert runner.fingerprint(["csrc"], context.root) != before


def test_a_broken_part_does_not_take_the_others_along(context: runner.Context) -> None:
    def fail() -> None:
        raise ZeroDivisionError("no such thing")

    def leave() -> None:
        raise runner.Skip("the tool is missing")

    runs = Runs()
    statuses = runner.run(
        [
            runs.part("broken", act=fail),
            runs.part("after"),
            runs.part("hungry", needs=("broken",)),
            runs.part("content", needs=("after",)),
            runs.part("missing", act=leave),
        ],
        context,
        limit=100,
    )
    assert statuses == {
        "broken": runner.FAILED,
        "after": runner.DONE,
        "hungry": runner.SKIPPED,
        "content": runner.DONE,
        "missing": runner.SKIPPED,
    }
    assert read(context, "broken")["reason"] == "ZeroDivisionError: no such thing"
    assert read(context, "hungry")["reason"] == "needs broken"
    assert read(context, "missing")["reason"] == "the tool is missing"
    assert runner.run([runs.part("alone", needs=("after",))], context, limit=100) == {"alone": runner.DONE}
    assert runner.run([runs.part("lone", needs=("broken",))], context, limit=100) == {"lone": runner.SKIPPED}


def test_no_part_starts_when_the_time_is_up(context: runner.Context) -> None:
    runs = Runs()
    statuses = runner.run([runs.part("late")], context, limit=runner.LEAST / 2)
    assert statuses == {"late": runner.LATE} and runs.names == []
    assert runner.run([runs.part("late")], context, limit=100) == {"late": runner.DONE}


def test_time_is_shared_and_what_is_left_goes_on(context: runner.Context) -> None:
    seen: dict[str, float] = {}

    def part(name: str, share: float) -> runner.Part:
        def run(context: runner.Context) -> tuple[bool, dict[str, Any]]:
            seen[name] = context.left
            return True, {}

        return runner.Part(name, share, ("csrc",), run)

    chosen = [part("build", 0.2), part("bench", 0.5), part("rest", 0.3)]
    runner.run(chosen, context, limit=100)
    assert seen == pytest.approx({"build": 20, "bench": 100 * 0.5 / 0.8, "rest": 100}, abs=2)
    (context.state / "bench.json").unlink()
    runner.run(chosen, context, limit=100)  # what is done takes no share
    assert seen["bench"] == pytest.approx(100, abs=2)


def test_a_part_says_why_and_what_it_goes_without(context: runner.Context) -> None:
    seen: list[tuple[str, ...]] = []

    def less(context: runner.Context) -> tuple[bool, dict[str, Any]]:
        seen.append(context.missing)
        return not context.missing, {"reason": "in part", "rest": 1}

    bad = Runs().part("build", good=False)
    less_part = runner.Part("less", 1.0, ("csrc",), less, wants=("build",))
    assert runner.run([bad, less_part], context, limit=100)["less"] == runner.FAILED
    assert seen == [("build",)]
    found = read(context, "less")
    assert (found["reason"], found["result"]) == ("in part", {"rest": 1})


def test_the_schema_of_a_part(context: runner.Context, tmp_path: pathlib.Path) -> None:
    out = tmp_path / "out"
    (context.state / "log.txt").write_text("log")
    runner.run([Runs().part("one")], context, limit=100, out=out, commit="abc")
    found = json.loads((out / "one.json").read_text())
    types = {
        "part": str, "status": str, "reason": str, "seconds": float, "result": dict, "fingerprint": str,
        "commit": str, "budget": float,
    }  # fmt: skip
    assert {name: type(value) for name, value in found.items()} == types
    assert (found["status"], found["commit"], found["result"]) == ("done", "abc", {"made": {}})
    assert sorted(p.name for p in out.iterdir()) == ["log.txt", "one.json"]


def test_a_command_is_stopped_with_its_children(context: runner.Context, tmp_path: pathlib.Path) -> None:
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    context.end = time.monotonic() + 1.0
    ran = context.python("-c", parent)
    assert ran.late and not ran.good and ran.seconds < 2.5 and "begun" in ran.output
    time.sleep(max(0.0, 3.5 - ran.seconds))
    assert not mark.exists()
    assert "begun" in context.log.getvalue()  # type: ignore[attr-defined]


def test_the_whole_fits_the_limit() -> None:
    assert sum(part.share for part in parts.PARTS) == pytest.approx(1) and command.LIMIT == 480
    names = [part.name for part in parts.PARTS]
    assert names.index("bench") < names.index("sanitizer")
    files = len(parts.PARTS) + 1  # and the log
    assert files <= 8


# --- the command --------------------------------------------------------------------------------------------


def test_a_dry_run_names_every_command_and_runs_none(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: pytest.fail("a command was run"))
    monkeypatch.setattr(parts, "commit", lambda: "abc")
    monkeypatch.setattr(command, "commit", lambda: "abc")
    monkeypatch.setattr(build, "find_tools", lambda arch: build.Tools("g++", "nvcc", ROOT, arch))
    monkeypatch.setattr(build.native, "find_cmake", lambda: "cmake")
    monkeypatch.setattr(parts.shutil, "which", lambda name, **more: name)
    assert command.main(["--dry-run", "--state", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    for words in (
        "nvidia-smi --query-gpu=name",
        "build_tools/native.py",
        "-k cuda-cuda tests/test_hessian.py",
        "-k cuda-triton tests/test_langevin.py",
        "compute-sanitizer --tool racecheck",
        "ncu --cache-control none",
        "-m bench.ceiling",
        "-m bench --device cuda",
    ):
        assert words in shown, words
    assert shown.splitlines()[-1] == "; ".join(f"{part.name}: done" for part in parts.PARTS)
    assert not list(tmp_path.glob("*.json")) and not (tmp_path / "out").exists()


def test_an_unknown_part_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--parts", "build,fly"])
    assert "no such part: fly" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: pathlib.Path) -> None:
    assert command.main(["--parts", "machine,build,tests", "--state", str(tmp_path)]) == 1
    found = {
        name: json.loads((tmp_path / f"{name}.json").read_text()) for name in ("machine", "build", "tests")
    }
    assert found["machine"]["status"] == runner.FAILED and found["machine"]["result"]["gpus"] == []
    assert (found["build"]["status"], found["build"]["reason"]) == (runner.SKIPPED, "nvidia-smi finds no GPU")
    assert (found["tests"]["status"], found["tests"]["reason"]) == (runner.SKIPPED, "nvidia-smi finds no GPU")


# --- tests there, and their record --------------------------------------------------------------------------

STAND_IN = """
import pytest
def test_good(): pass
def test_bad(): assert 1 == 2, "numbers"
@pytest.fixture
def broken(): raise RuntimeError("fixture")
def test_broken(broken): pass
def test_left(): pytest.skip("no GPU here")
"""


def test_outcomes_are_recorded_as_they_come(context: runner.Context, tmp_path: pathlib.Path) -> None:
    (tmp_path / "test_stand_in.py").write_text(STAND_IN)
    record = tmp_path / "record.jsonl"
    words = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "bench.gpu_kit.recorder",
        "-p",
        "no:cacheprovider",
        "test_stand_in.py",
    ]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = context.python(*words, MARQUARDT_RECORD=str(record), PYTHONPATH=path)
    assert ran.code == 1, ran.output
    shared = [tmp_path / f"record{k}.jsonl" for k in range(2)]
    for k, path_k in enumerate(shared):
        context.python(*words, MARQUARDT_RECORD=str(path_k), MARQUARDT_SHARD=f"{k}/2", PYTHONPATH=path)
    assert [recorder.summary(path_k)["collected"] for path_k in shared] == [2, 2]
    assert {k: v for k, v in recorder.summary(*shared).items() if k != "failures"} == {
        k: v for k, v in recorder.summary(record).items() if k != "failures"
    }
    with record.open("a") as file:
        file.write('{"test": "cut o')  # the time limit struck
    found = recorder.summary(record)
    counts = {name: found[name] for name in ("collected", "passed", "failed", "error", "skipped")}
    assert counts == {"collected": 4, "passed": 1, "failed": 1, "error": 1, "skipped": 1}
    assert [f["test"].split("::")[1] for f in found["failures"]] == ["test_bad", "test_broken"]
    assert "numbers" in found["failures"][0]["why"] and "no GPU here" in str(found["skip_reasons"])
    assert recorder.summary(tmp_path / "nothing")["passed"] == 0


def test_a_suite_goes_on_behind_a_test_that_ends_its_process(
    context: runner.Context, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_deadly.py").write_text(
        "import os\ndef test_a(): pass\ndef test_b(): os.kill(os.getpid(), 11)\ndef test_c(): pass\n"
    )
    traced: list[str] = []
    monkeypatch.setitem(parts.SUITES, "cuda", (("test_deadly.py",), "", 1))
    monkeypatch.setattr(parts, "backtrace", lambda context, test, record: traced.append(test))
    context.environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    ran = parts.run_suite(context, "cuda", 0)
    found = parts.suite_result(context, "cuda", [ran])
    counts = {name: found[name] for name in ("exit", "collected", "passed", "error")}
    assert counts == {"exit": -11, "collected": 3, "passed": 2, "error": 1}
    assert traced == ["test_deadly.py::test_b"] and "signal 11" in found["failures"][0]["why"]


@pytest.mark.parametrize(("passed", "code", "well"), [(5, 0, True), (0, 0, False), (5, 1, False)])
def test_tests_are_well_if_some_ran_and_none_failed(
    passed: int, code: int, well: bool, context: runner.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_suite(context: runner.Context, name: str, shard: int) -> runner.Ran:
        line = '{"collected": 3}\n' + '{"test": "a", "outcome": "passed"}\n' * passed
        parts.record_of(context, name, shard).write_text(line)
        return runner.Ran(code if shard == 0 else 0, "", 1.0)

    monkeypatch.setattr(parts, "needs_module", lambda context, name: None)
    monkeypatch.setattr(parts, "run_suite", run_suite)
    good, result = parts.tests(context)
    processes = sum(suite[2] for suite in parts.SUITES.values())
    assert good is well and result["total"]["passed"] == passed * processes
    assert sum(suite["collected"] for suite in result["suites"].values()) == 3 * processes


def test_triton_is_tested_without_a_build(context: runner.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: set[str] = set()

    def run_suite(context: runner.Context, name: str, shard: int) -> runner.Ran:
        ran.add(name)
        parts.record_of(context, name, shard).write_text('{"test": "a", "outcome": "passed"}\n')
        return runner.Ran(0, "", 1.0)

    monkeypatch.setattr(parts, "needs_module", lambda context, name: None)
    monkeypatch.setattr(parts, "run_suite", run_suite)
    monkeypatch.setattr(parts, "gpu_arch", lambda context: "90")
    context.missing = ("build",)
    good, result = parts.tests(context)
    assert not good and sorted(ran) == ["hessian-triton", "langevin-triton", "lowrank-triton"]
    assert result["reason"] == "in part, without build"


def test_the_harness_can_leave_the_cpu_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import harness

    monkeypatch.setenv("MARQUARDT_TEST_DEVICE", "cpu")
    assert {target.device for target in harness.targets()} == {"cpu"}
    monkeypatch.setenv("MARQUARDT_TEST_DEVICE", "cuda")
    if torch.cuda.is_available():
        assert {target.device for target in harness.targets()} == {"cuda"}
    else:
        with pytest.raises(pytest.UsageError, match="MARQUARDT_TEST_DEVICE=cuda"):
            harness.targets()
    monkeypatch.setenv("MARQUARDT_TEST_DEVICE", "tpu")
    with pytest.raises(pytest.UsageError, match="tpu"):
        harness.targets()


# --- what tools print ---------------------------------------------------------------------------------------

NCU = """==PROF== Connected to process 7
bytes read at least: 1000, written: 500
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","void marquardt::frame_held(A)","dram__bytes_read.sum","byte","1,010"
"0","7","void marquardt::frame_held(A)","gpu__time_duration.sum","nsecond","42"
"1","7","void marquardt::frame_apply(A)","dram__bytes_read.sum","byte","20"
"""


def test_counters_are_read(context: runner.Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.shutil, "which", lambda name: name)
    monkeypatch.setattr(parts.build, "make_site", lambda context: context.state)
    monkeypatch.setattr(runner.Context, "run", lambda self, *words, **more: runner.Ran(0, NCU, 1.0))
    good, result = parts.counters(context)
    assert good and result["reads_of_the_input"] == 1.03 and len(result["kernels"]) == 2
    assert result["kernels"][0]["gpu__time_duration.sum"] == 42.0
    monkeypatch.setattr(runner.Context, "run", lambda self, *words, **more: runner.Ran(0, "no kernels", 1.0))
    assert not parts.counters(context)[0]


@pytest.mark.parametrize(
    ("code", "output", "clean"),
    [
        (0, "========= ERROR SUMMARY: 0 errors", True),
        (9, "========= ERROR SUMMARY: 3 errors", False),
        (0, "========= nothing was watched", False),
        (1, "WRONG lm (3, 7)\n========= ERROR SUMMARY: 0 errors", False),
    ],
    ids=["clean", "errors", "no summary", "wrong result"],
)
def test_a_sanitizer_is_clean_only_with_its_summary(
    code: int, output: str, clean: bool, context: runner.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Sequence[Any]] = []

    def run(self: runner.Context, *words: Any, **more: Any) -> runner.Ran:
        asked.append(words)
        return runner.Ran(code, output, 1.0)

    monkeypatch.setattr(runner.Context, "run", run)
    found = parts.sanitize(context, "memcheck")
    assert found["clean"] is clean
    assert len(asked) == (1 if "SUMMARY" in output else 2)  # once more without the filter
    assert found["filtered"] is ("SUMMARY" in output)


def test_architectures_and_rows_are_read(tmp_path: pathlib.Path) -> None:
    assert parts.arch_of("9.0\n") == "90" and parts.arch_of("10.0\n9.0") == "100"
    with pytest.raises(runner.Skip):
        parts.arch_of("[N/A]")
    (tmp_path / "rows.json").write_text(
        json.dumps({"benchmarks": [{"extra_info": {"id": "a"}, "stats": {}}]})
    )
    lines = tmp_path / "rows.jsonl"
    assert parts.read_rows(tmp_path / "rows.json", lines) == [{"id": "a"}]
    assert parts.read_rows(tmp_path / "none.json", lines) == []
    lines.write_text('{"id": "a"}\n{"id": "wrong", "failure": "why"}\n{"id": "cut o')
    assert [row["id"] for row in parts.read_rows(tmp_path / "rows.json", lines)] == ["a", "wrong"]
    assert [row["id"] for row in parts.read_rows(tmp_path / "none.json", lines)] == ["a", "wrong"]


CEILING = '{"gbps": 3000.0, "by_size": {}}'


@pytest.mark.parametrize("missing", [(), ("build",)], ids=["built", "not built"])
def test_the_ceiling_is_measured_once_and_rows_survive(
    missing: tuple[str, ...], context: runner.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, ...]] = []

    def run(self: runner.Context, *words: Any, timeout: float = 0.0, **environment: str) -> runner.Ran:
        asked.append(tuple(map(str, words)))
        if "bench.ceiling" in words:
            self.end -= 20.0  # it took its time
            return runner.Ran(0, CEILING, 20.0)
        if "bench" in words:
            assert pathlib.Path(environment["MARQUARDT_BENCH_CEILING"]).read_text() == CEILING
            pathlib.Path(environment["MARQUARDT_BENCH_ROWS"]).write_text('{"id": "a"}\n')
            return runner.Ran(-9, "", 70.0, late=True)
        return runner.Ran(0, "", 0.0)

    monkeypatch.setattr(runner.Context, "run", run)
    monkeypatch.setattr(parts, "gpu_arch", lambda context: "90")
    monkeypatch.setattr(parts.build, "make_site", lambda context: context.state)
    context.missing, context.end = missing, time.monotonic() + 100
    good, result = parts.benchmarks(context)
    assert not good and result["ceiling"]["gbps"] == 3000
    assert result["rows"] == ([] if missing else [{"id": "a"}])
    if not missing:
        words = asked[-1]
        assert 50 <= float(words[words.index("--deadline") + 1]) <= 56  # 100 - 20 - START - MARGIN
