"""Makes the development environment: virtual environment, requirements, native library, editable install.

Called by the Makefile with any Python >= 3.10 and its standard library. Every step leaves a stamp with what
it was made from, so that a second run does only what changed.
"""

import argparse
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class SetupError(Exception):
    """The machine lacks something; the message says what to install."""


def run(*command, **keywords) -> None:
    print("    " + " ".join(shlex.quote(str(part)) for part in command), flush=True)
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT, **keywords)


def fingerprint(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update((part.read_bytes() if isinstance(part, Path) else str(part).encode()) + b"\0")
    return digest.hexdigest()


def check_machine() -> None:
    if sys.version_info < (3, 10):  # noqa: UP036  (run by whatever python3 is)
        raise SetupError(
            f"Python 3.10 or newer is needed, {sys.executable} is {sys.version.split()[0]};"
            " name another with PYTHON=python3.12"
        )
    compiler = os.environ.get("CXX", "").split(" ")[0]
    if not any(shutil.which(name) for name in ([compiler] if compiler else ["c++", "g++", "clang++"])):
        raise SetupError(
            f"no C++ compiler was found ({compiler or 'c++, g++, clang++'}). Install one:\n"
            "    Debian, Ubuntu: apt install g++      Fedora: dnf install gcc-c++      or name one with CXX="
        )


def make_venv(venv: Path, arguments: list) -> None:
    """A virtual environment with a working pip."""
    python = venv / "bin" / "python"
    works = (
        python.exists()
        and not subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode
    )
    if works:
        return
    try:
        import ensurepip  # noqa: F401  (Debian and Ubuntu ship it apart)
        import venv as _  # noqa: F401
    except ImportError:
        package = f"python{sys.version_info[0]}.{sys.version_info[1]}-venv"
        raise SetupError(
            f"{sys.executable} cannot make virtual environments. Debian, Ubuntu: apt install {package}"
        ) from None
    run(sys.executable, "-m", "venv", "--clear", *arguments, venv)
    if "--system-site-packages" in arguments and sys.prefix != sys.base_prefix:
        # To a virtual environment "system" is the interpreter that it came from; its own packages are meant.
        import sysconfig

        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        Path(site, "outer-environment.pth").write_text(sysconfig.get_path("purelib") + "\n")


def install_requirements(pip: list, options: argparse.Namespace) -> None:
    """torch first and alone: what it pins (triton, on CUDA builds) is then already there."""
    install = [*pip, "install", *shlex.split(options.pip_args)]
    run(*install, options.torch_spec)
    run(*install, "-r", "requirements-dev.txt")
    if options.triton_spec:
        result = subprocess.run([*install, options.triton_spec], cwd=ROOT)
        if result.returncode:
            print("    triton is not to be had here: its tests will be skipped")


def install_package(venv: Path, pip: list) -> None:
    """Compiles what changed; installs the package in place once."""
    run(venv / "bin" / "python", "build_tools/native.py")
    stamp = venv / "stamp-package"
    made_from = fingerprint(*(ROOT / name for name in ("pyproject.toml", "setup.py")), str(ROOT))
    if not stamp.is_file() or stamp.read_text() != made_from:
        run(*pip, "install", "--quiet", "--no-deps", "--no-build-isolation", "--editable", ".")
        stamp.write_text(made_from)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--venv-args", default="")
    parser.add_argument("--pip-args", default="")
    parser.add_argument("--torch-spec", required=True)
    parser.add_argument("--triton-spec", default="")
    parser.add_argument("--steps", type=int, default=3, help="number of steps that the caller announces")
    options = parser.parse_args()
    venv = options.venv.absolute()
    pip = [venv / "bin" / "python", "-m", "pip"]

    check_machine()
    made_from = fingerprint(
        ROOT / "requirements-dev.txt",
        options.torch_spec,
        options.triton_spec,
        options.pip_args,
        options.venv_args,
    )
    stamp = venv / "stamp-requirements"
    current = stamp.is_file() and stamp.read_text() == made_from
    print(f"[1/{options.steps}] virtual environment {options.venv}", flush=True)
    make_venv(venv, shlex.split(options.venv_args))
    print(
        f"[2/{options.steps}] requirements ({options.torch_spec})" + (": up to date" if current else ""),
        flush=True,
    )
    if not current:
        install_requirements(pip, options)
        stamp.write_text(made_from)
    print(f"[3/{options.steps}] native library (CMake, Ninja)", flush=True)
    install_package(venv, pip)


if __name__ == "__main__":
    try:
        main()
    except SetupError as problem:
        sys.exit(f"marquardt: {problem}")
    except subprocess.CalledProcessError as failure:
        sys.exit(
            f"marquardt: this step failed (exit {failure.returncode}): {' '.join(map(str, failure.cmd))}"
        )
