"""The build, the wheel, and the promise that one library serves every torch >= 2.11."""

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import marquardt
from marquardt import _native

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).resolve().parent.parent
BUILD_TOOLS = ROOT / "build_tools"
OBJECTS = ROOT / "build" / "cmake" / "CMakeFiles" / "marquardt.dir" / "csrc"

# What a user does first: both ops, and the proof that the native kernels answered.
FIRST_STEPS = """
import pathlib, sys
import torch, marquardt
from marquardt import _native
assert _native.why_not() is None, _native.why_not()
assert "cpu" in marquardt.backends.available()
eps, prev = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
out = marquardt.lm_direction(eps, prev, damping=0.01, kappa=0.1)
torch.testing.assert_close(out.flatten(1).norm(dim=1), eps.flatten(1).norm(dim=1))
assert torch.equal(marquardt.affine_step([torch.ones(2, 8)] * 2, [0.5, 0.25]), torch.full((2, 8), 0.75))
print(pathlib.Path(marquardt.__file__).parent)
"""


def run(*command, check=True, **environment):
    """A command outside the source tree, so that nothing is imported from it by accident."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=os.sep,
        env={**kept, "MARQUARDT_WERROR": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert not check or result.returncode == 0, result.stdout
    return result


def make_venv(directory: Path, *packages: str) -> Path:
    """A fresh environment that also sees the packages of the directories given; returns its interpreter."""
    run(sys.executable, "-m", "venv", directory)
    python = directory / "bin" / "python"
    site = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(site, "outer.pth").write_text("\n".join(packages))
    return python


# ---- the library ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library() -> Path:
    path = Path(_native.library_path())
    if not path.is_file():
        pytest.fail(f"{path} is not built: make build")
    return path


def test_library_is_stable_abi(library):
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent)) or shutil.which(
        "torch-abi-audit"
    )
    if audit is None:
        pytest.skip("torch-abi-audit is not installed")
    run(audit, "--check", "torch", library)
    report = json.loads(run(audit, "--json", library).stdout)
    (found,) = [
        entry for entry in report["extensions"] + report["bundled_libs"] if entry["path"] == str(library)
    ]
    assert found["torch"]["stable"] and found["torch"]["unstable_symbols"] == []
    assert tuple(map(int, found["torch"]["min_torch_version"].split(".")[:2])) <= (2, 11)


def _tool(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} (binutils) is not installed")
    return path


def test_library_has_no_python_and_no_cuda_runtime(library):
    undefined = run(_tool("nm"), "-D", "--undefined-only", library).stdout
    assert not re.findall(r"\bU _?Py\w+", undefined)
    dynamic = run(_tool("readelf"), "-d", library).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert {"libtorch_cpu.so", "libc10.so", "libtorch.so"} <= set(needed)
    assert not [name for name in needed if re.match(r"libpython|libcudart|libtorch_python", name)]
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


@pytest.mark.skipif(sysconfig.get_platform() != "linux-x86_64", reason="one instruction set on this platform")
def test_shared_inline_functions_are_baseline(library):
    """Of an inline function that several files hold, the linker kept the copy that runs everywhere."""
    objects = [path for path in OBJECTS.glob("*/*.o") if not re.search(r"_avx(2|512)\.", path.name)]
    if not objects:
        pytest.skip("the objects of the build are gone")
    weak = set(re.findall(r" [WVu] (\S+)", run(_tool("nm"), "--defined-only", *objects).stdout))
    code = run(_tool("objdump"), "-d", "--no-show-raw-insn", library).stdout
    wide = {
        body.split(">:", 1)[0] for body in re.split(r"\n[0-9a-f]+ <", code) if re.search(r"%[yz]mm\d", body)
    }
    assert weak, "no inline function at all: this test looks at the wrong files"
    assert not weak & wide


def test_build_info_names_compiler_and_instruction_sets():
    info = _native.build_info()
    assert info, "the library says nothing about its making"
    text = json.dumps(info)
    assert "cuda" in text and marquardt.__version__ in text


# ---- the build -----------------------------------------------------------------------------------


def _torch_dir(directory, tmp_path):
    return run(
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(BUILD_TOOLS)!r}); import torch_dir; print(torch_dir.find())",
        check=False,
        MARQUARDT_TORCH_DIR=str(directory or tmp_path),
    )


def test_missing_torch_is_explained(tmp_path):
    result = _torch_dir(None, tmp_path)
    assert result.returncode != 0
    assert "no torch was found" in result.stdout
    assert "pip install 'torch>=2.11'" in result.stdout and "for CPUs only" in result.stdout


def test_old_torch_is_explained(tmp_path):
    (tmp_path / "version.py").write_text("__version__ = '2.10.1+cpu'\n")
    result = _torch_dir(tmp_path, tmp_path)
    assert result.returncode != 0
    assert "torch 2.10.1+cpu" in result.stdout and "too old" in result.stdout


def test_build_switches_are_checked():
    result = run(sys.executable, BUILD_TOOLS / "native.py", check=False, MARQUARDT_CUDA="yes")
    assert result.returncode == 1
    assert "MARQUARDT_CUDA must be 0 or 1, got 'yes'" in result.stdout


def test_parallel_jobs(monkeypatch):
    spec = importlib.util.spec_from_file_location("native", BUILD_TOOLS / "native.py")
    native = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the module adds its own directory
    spec.loader.exec_module(native)
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native.jobs() == 3
    monkeypatch.delenv("MAX_JOBS")
    monkeypatch.setattr(native, "free_gib", lambda: 0.5)
    assert native.jobs() == 1


def test_editable_install_finds_both_trees():
    if ROOT not in Path(marquardt.__file__).resolve().parents:
        pytest.skip("marquardt is not installed in place")
    kernels = importlib.util.find_spec("marquardt.triton_kernels")
    assert Path(marquardt.__file__).resolve().parent == ROOT / "python" / "marquardt"
    assert kernels is not None and Path(kernels.origin).resolve().parent == ROOT / "triton_kernels"


@pytest.mark.full
def test_install_without_torch_says_what_to_install(tmp_path):
    python = make_venv(tmp_path / "venv")
    result = run(python, "-m", "pip", "install", ROOT, check=False)
    if "No matching distribution found for setuptools" in result.stdout:
        pytest.skip("the build requirements cannot be downloaded here")
    assert result.returncode != 0
    assert "no torch was found" in result.stdout
    assert "pip install 'torch>=2.11'" in result.stdout and "for CPUs only" in result.stdout
    assert not re.search(r"(Collecting|Downloading) torch", result.stdout)


# ---- the wheel -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Without CUDA: nvcc takes minutes, and what it made is tested where the library stands."""
    directory = tmp_path_factory.mktemp("wheel")
    command = (
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        directory,
        ROOT,
    )
    run(*command, MARQUARDT_CUDA="0")
    (path,) = directory.glob("*.whl")
    return path


@pytest.mark.full
def test_wheel_content(wheel):
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name == f"marquardt-{marquardt.__version__}-py3-none-{platform}.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(f"marquardt-{marquardt.__version__}.dist-info/METADATA").decode()
    sources = {
        f"marquardt/{path.relative_to(ROOT / 'python/marquardt')}"
        for path in (ROOT / "python/marquardt").rglob("*.py")
    }
    kernels = {
        f"marquardt/triton_kernels/{path.relative_to(ROOT / 'triton_kernels')}"
        for path in (ROOT / "triton_kernels").rglob("*.py")
    }
    assert "marquardt/triton_kernels/frame.py" in kernels
    package = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert package == sources | kernels | {"marquardt/libmarquardt.so", "marquardt/py.typed"}
    requires = [
        line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line
    ]
    assert requires == ["Requires-Dist: torch>=2.11"]


@pytest.mark.full
def test_wheel_installs_beside_the_torch_that_is_there(wheel, tmp_path):
    python = make_venv(tmp_path / "venv", sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", wheel)
    place = run(python, "-c", FIRST_STEPS).stdout.splitlines()[-1]
    assert tmp_path.resolve() in Path(place).resolve().parents


@pytest.fixture(scope="module")
def old_torch_python(tmp_path_factory):
    """An interpreter with torch 2.11: what MARQUARDT_OLD_TORCH_PYTHON names, else a new environment."""
    named = os.environ.get("MARQUARDT_OLD_TORCH_PYTHON", "")
    if named == "none":
        pytest.skip("MARQUARDT_OLD_TORCH_PYTHON=none")
    if named:
        yield Path(named)
        return
    directory = tmp_path_factory.mktemp("old") / "venv"
    python = make_venv(directory)
    result = run(
        python,
        "-m",
        "pip",
        "install",
        "torch==2.11.0",
        "numpy",
        "pytest",
        "pytest-benchmark",
        "tqdm",
        check=False,
    )
    if result.returncode:
        shutil.rmtree(directory)
        pytest.skip(f"torch 2.11 cannot be installed: {result.stdout.strip().splitlines()[-1]}")
    yield python
    shutil.rmtree(directory)  # several gigabytes, which pytest would keep


# Tests of what stands in the source tree alone, and of Triton, which wants a process of its own.
OF_THE_SOURCES = (
    "emulation",
    "static",
    "test_gpu_kit.py",
    "test_gpu_kit_build.py",
    "test_gpu_bench.py",
    "triton",
)


@pytest.mark.full
def test_wheel_passes_the_tests_under_torch_2_11(wheel, old_torch_python, tmp_path):
    version = run(old_torch_python, "-c", "import torch; print(torch.__version__)").stdout.splitlines()[-1]
    assert version.startswith("2.11."), f"MARQUARDT_OLD_TORCH_PYTHON has torch {version}"
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", site, wheel)
    place = run(old_torch_python, "-c", FIRST_STEPS, PYTHONPATH=str(site)).stdout.splitlines()[-1]
    assert Path(place) == site / "marquardt"
    # The library that stands in the tree has its CUDA kernels, where there is a compiler for them.
    run(
        old_torch_python,
        "-c",
        FIRST_STEPS,
        PYTHONPATH=str(site),
        MARQUARDT_LIBRARY=str(_native.library_path()),
    )

    # Without the sources, the wheel alone can answer.
    for name in ("tests", "bench", "examples", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "results")
            )
        elif (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path / name)
    kinds = "not full and not packaging and not alone"
    result = run(
        *(
            old_torch_python,
            "-m",
            "pytest",
            "-q",
            "--tb=short",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tmp_path,
        ),
        *(
            "-c",
            tmp_path / "pyproject.toml",
            "-m",
            kinds,
            tmp_path / "tests",
            *(f"--ignore={tmp_path}/tests/{name}" for name in OF_THE_SOURCES),
        ),
        check=False,
        PYTHONPATH=str(site),
    )
    print(f"torch {version}: {result.stdout.strip().splitlines()[-1]}")
    assert result.returncode == 0, result.stdout[-6000:]
