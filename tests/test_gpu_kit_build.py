"""The kit's wheels and builds, as far as they can be tried without a GPU."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
import time
from typing import Any

import pytest
from bench.gpu_kit import build, pack, runner

from gpu_kit_context import gpu_kit_context, read

ROOT = runner.ROOT


@pytest.fixture
def context(tmp_path: pathlib.Path) -> runner.Context:
    return gpu_kit_context(tmp_path)


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


class Machine:
    """Commands that answer what they are told to, by a word of theirs."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, answers: dict[str, runner.Ran], cmake: str = "cmake"
    ) -> None:
        self.asked: list[str] = []

        def run(context: runner.Context, *words: Any, **more: Any) -> runner.Ran:
            self.asked.append(" ".join(map(str, words)))
            found = [ran for word, ran in answers.items() if word in self.asked[-1]]
            return found[0] if found else runner.Ran(0, "versions\n{}", 1.0)

        monkeypatch.setattr(runner.Context, "run", run)
        monkeypatch.setattr(build, "find_tools", lambda arch: build.Tools("g++", "nvcc", ROOT, arch))
        monkeypatch.setattr(build.native, "find_cmake", lambda: cmake)
        monkeypatch.setattr(build.native, "find_ninja", lambda: "ninja")
        monkeypatch.setattr(build, "shared_runtime", lambda context, tools: "")
        monkeypatch.setattr(build, "write_config", lambda *a: None)
        monkeypatch.setattr(build.shutil, "copy2", lambda *a: None)
        monkeypatch.setattr(build.os, "replace", lambda *a: None)
        monkeypatch.setattr(build, "make_site", lambda context: context.state / "site")

    def compiled(self) -> bool:
        return any("-shared" in words for words in self.asked)


REFUSED = """[3/9] Building
FAILED: [code=1] a.o
/usr/bin/c++ -Werror=all a.cpp
a.cpp:3:4: error: no such thing
a.cpp:9:9: error: nor that
ninja: build stopped: subcommand failed.
"""


def test_what_a_compiler_refuses_is_not_tried_again(
    context: runner.Context, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = Machine(monkeypatch, {"native.py": runner.Ran(1, REFUSED, 9.0)})
    part = runner.Part("build", 1.0, (), lambda context: build.build(context, "90", "abc"))
    assert runner.run([part], context, limit=100) == {"build": runner.FAILED}
    assert len(there.asked) == 1 and not there.compiled()
    found = read(context, "build")
    assert found["reason"] == "a.cpp:3:4: error: no such thing" and "nor that" in found["result"]["tail"]
    assert "nor that" in capsys.readouterr().out


def test_cmake_that_cannot_configure_is_done_without(
    context: runner.Context, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = Machine(monkeypatch, {"native.py": runner.Ran(1, "CMake Error at CMakeLists.txt:9", 1.0)})
    good, result = build.build(context, "90", "abc")
    assert good and there.compiled() and result["how"] == "direct"
    assert (result["environment"], result["build_info"]) == (["versions"], "{}")
    assert sum("env.report" in words for words in there.asked) == 1
    there = Machine(monkeypatch, {"-shared": runner.Ran(1, "ld: error: undefined", 1.0)}, cmake="")
    good, result = build.build(context, "90", "abc")
    assert not good and result["reason"] == "ld: error: undefined"
    assert not any("native.py" in words for words in there.asked)
    there = Machine(monkeypatch, {})
    good, result = build.build(context, "90", "abc")
    assert good and not there.compiled() and result["how"] == "cmake"


@pytest.mark.full
def test_the_direct_build_makes_a_library_that_loads(tmp_path: pathlib.Path) -> None:
    context = runner.Context(tmp_path, io.StringIO(), end=time.monotonic() + 900)
    tools = (
        dataclasses.replace(build.find_tools("90"), nvcc="")
        if not build.nvcc.find()
        else build.find_tools("90")
    )
    assert build.direct(context, tools, "abc", tmp_path).good, context.log.getvalue()[-3000:]  # type: ignore[attr-defined]
    check = "import marquardt; from marquardt import _native; print(_native.why_not(), _native.build_info())"
    ran = context.python("-c", check, MARQUARDT_LIBRARY=str(tmp_path / build.native.LIBRARY))
    assert ran.good and ran.output.startswith("None") and "direct build" in ran.output, ran.output


def test_a_site_imports_the_package_without_installing(tmp_path: pathlib.Path) -> None:
    context = runner.Context(tmp_path, io.StringIO(), end=time.monotonic() + 100)
    build.make_site(context)
    check = "import marquardt, marquardt.triton_kernels as t; print(marquardt.__file__, t.__file__)"
    ran = context.python("-c", check)
    assert ran.good and ran.output.count(str(tmp_path / "site" / "marquardt")) == 2, ran.output
