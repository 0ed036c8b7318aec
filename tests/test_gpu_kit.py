"""The kit for a machine with a GPU, as far as it can be tried without one: parts, budgets, resuming, builds."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where the folder `bench` lies

from bench.gpu_kit import __main__ as command
from bench.gpu_kit import build, pack, parts, recorder, runner

ROOT = runner.ROOT


# --- parts, budgets, resuming -------------------------------------------------------------------------------


@pytest.fixture
def context(tmp_path: pathlib.Path) -> runner.Context:
    (tmp_path / "state").mkdir()
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "a.cu").write_text("one")
    return runner.Context(tmp_path / "state", io.StringIO(), root=tmp_path)


class Runs:
    """Parts that count how often they ran."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def part(self, name: str, good: bool = True, act: Callable[[], Any] = dict, **more: Any) -> runner.Part:
        def run(context: runner.Context) -> tuple[bool, dict[str, Any]]:
            self.names.append(name)
            return good, {"made": act()}

        return runner.Part(name, more.pop("seconds", 5.0), ("csrc",), run, **more)


def read(context: runner.Context, name: str) -> dict[str, Any]:
    return json.loads((context.state / f"{name}.json").read_text())


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
    assert sum(part.seconds for part in parts.PARTS) <= command.LIMIT == 480
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
    assert (found["tests"]["status"], found["tests"]["reason"]) == (runner.SKIPPED, "needs build")


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
    with record.open("a") as file:
        file.write('{"test": "cut o')  # the time limit struck
    found = recorder.summary(record)
    counts = {name: found[name] for name in ("collected", "passed", "failed", "error", "skipped")}
    assert counts == {"collected": 4, "passed": 1, "failed": 1, "error": 1, "skipped": 1}
    assert [f["test"].split("::")[1] for f in found["failures"]] == ["test_bad", "test_broken"]
    assert "numbers" in found["failures"][0]["why"] and "no GPU here" in str(found["skip_reasons"])
    assert recorder.summary(tmp_path / "nothing")["passed"] == 0


@pytest.mark.parametrize(("passed", "code", "well"), [(5, 0, True), (0, 0, False), (5, 1, False)])
def test_tests_are_well_if_some_ran_and_none_failed(
    passed: int, code: int, well: bool, context: runner.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcome = {"exit": code, "passed": passed, "failed": 0, "error": 0, "skipped": 2}
    monkeypatch.setattr(parts, "needs_module", lambda context, name: None)
    monkeypatch.setattr(parts, "run_suite", lambda context, name: dict(outcome))
    good, result = parts.tests(context)
    assert good is well and result["total"]["passed"] == passed * len(parts.SUITES)


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
    assert parts.read_rows(tmp_path / "rows.json") == [{"id": "a"}]
    assert parts.read_rows(tmp_path / "none.json") == []


# --- wheels and builds --------------------------------------------------------------------------------------


def test_the_wheels_are_those_that_pytest_needs(tmp_path: pathlib.Path) -> None:
    import zipfile

    found = pack.needed()
    assert {"pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest-benchmark"} <= set(found)
    assert not {"torch", "numpy"} & set(found)
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "thing-1-py3-none-any.whl", "w") as archive:
        archive.writestr("thing.py", "VALUE = 3\n")
    for _ in range(2):  # the second time finds it there
        assert pack.unpack(wheels, site) == ["thing-1-py3-none-any.whl"]
    assert (site / "thing.py").read_text() == "VALUE = 3\n"


def words_of(text: str) -> set[str]:
    """Flags as a set, without what names files and folders, or is said by CMake alone."""
    import shlex

    words = shlex.split(text)
    kept, skip = set(), False
    for word in words[1:]:
        if skip or word.startswith(("-I", "-o", "/", "-Dmarquardt_EXPORTS")) or word in ("-c", "-isystem"):
            skip = word in ("-o", "-isystem", "-c")
            continue
        kept.add(word)
    return {w.replace("-std=gnu++17", "-std=c++20") for w in kept} - {"-Werror", "-march=native"}


def test_the_direct_build_has_the_flags_of_the_other(tmp_path: pathlib.Path) -> None:
    database = ROOT / "build" / "cmake" / "compile_commands.json"
    if not database.is_file():
        pytest.skip("no CMake build is here to compare with")
    tools = build.Tools("c++", "", ROOT, "90")
    entries = [e for e in json.loads(database.read_text()) if e["file"].endswith(".cpp")]
    for entry in entries:
        source = pathlib.Path(entry["file"])
        if not source.is_file():
            continue
        mine = build.compile_command(source, tmp_path / "a.o", tools, tmp_path)
        theirs = words_of(entry["command"]) - {"-DMARQUARDT_WITH_CUDA=1"}
        assert words_of(" ".join(mine)) == theirs, source.name


def test_the_direct_build_gives_nvcc_the_flags_of_the_other(tmp_path: pathlib.Path) -> None:
    options = (ROOT / "cmake" / "cuda.cmake").read_text()
    words = build.compile_command(
        ROOT / "csrc" / "a.cu", tmp_path / "a.o", build.Tools("c++", "nvcc", ROOT, "90"), tmp_path
    )
    assert words[0] == "nvcc" and "-gencode=arch=compute_90,code=sm_90" in words
    own = [w for w in build.cuda_static.flags() if w in options]
    assert "--expt-relaxed-constexpr" in own and set(own) - {"--Werror=all-warnings"} <= set(words)
    assert not any(w.startswith("--Werror") for w in words)  # another machine's compiler may warn of more


def test_the_linker_sees_wide_instructions_last(tmp_path: pathlib.Path) -> None:
    objects = [tmp_path / f"frame-{name}.cpp.o" for name in ("cpu_avx512", "cpu_avx2", "cpu", "launch")]
    words = build.link_command(objects, tmp_path / "a.so", build.Tools("c++", "", ROOT, "90"))
    order = [pathlib.Path(w).name for w in words if w.endswith(".o")]
    assert order[:2] == ["frame-cpu.cpp.o", "frame-launch.cpp.o"]
    assert order[2:] == ["frame-cpu_avx2.cpp.o", "frame-cpu_avx512.cpp.o"]
    words = build.link_command(objects, tmp_path / "a.so", build.Tools("c++", "nvcc", ROOT, "90"))
    assert words[0] == "nvcc" and "-lc10" in words and words[words.index("-lc10") - 1] == "-Xlinker"


@pytest.mark.full
def test_the_direct_build_makes_a_library_that_loads(tmp_path: pathlib.Path) -> None:
    context = runner.Context(tmp_path, io.StringIO(), end=time.monotonic() + 900)
    tools = (
        dataclasses.replace(build.find_tools("90"), nvcc="")
        if not build.nvcc.find()
        else build.find_tools("90")
    )
    assert build.direct(context, tools, "abc", tmp_path), context.log.getvalue()[-3000:]  # type: ignore[attr-defined]
    check = "import marquardt; from marquardt import _native; print(_native.why_not(), _native.build_info())"
    ran = context.python("-c", check, MARQUARDT_LIBRARY=str(tmp_path / build.native.LIBRARY))
    assert ran.good and ran.output.startswith("None") and "direct build" in ran.output, ran.output


def test_a_site_imports_the_package_without_installing(tmp_path: pathlib.Path) -> None:
    context = runner.Context(tmp_path, io.StringIO(), end=time.monotonic() + 100)
    build.make_site(context)
    check = "import marquardt, marquardt.triton_kernels as t; print(marquardt.__file__, t.__file__)"
    ran = context.python("-c", check)
    assert ran.good and ran.output.count(str(tmp_path / "site" / "marquardt")) == 2, ran.output
