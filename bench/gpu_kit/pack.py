"""Wheels for a machine without network: pytest and pytest-benchmark with all they need, as installed here."""

from __future__ import annotations

import importlib.metadata
import pathlib
import subprocess
import sys
import zipfile

WANTED = ("pytest", "pytest-benchmark")
THERE = ("torch", "triton", "numpy")  # the machine's own
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def needed(names: tuple[str, ...] = WANTED) -> dict[str, str]:
    """name -> version of the packages and of what they need, from the metadata of this environment."""
    from packaging.requirements import Requirement

    found: dict[str, str] = {}
    open_names = list(names)
    while open_names:
        name = open_names.pop()
        if name.lower() in found or name.lower() in THERE:
            continue
        here = importlib.metadata.distribution(name)
        found[name.lower()] = here.version
        for text in here.requires or []:
            requirement = Requirement(text)
            there = {
                "python_version": "3.12",
                "sys_platform": "linux",
                "platform_system": "Linux",
                "extra": "",
            }
            if requirement.marker is None or requirement.marker.evaluate(there):
                open_names.append(requirement.name)
    return dict(sorted(found.items()))


def pack(folder: pathlib.Path, python: str = "3.12", more: tuple[str, ...] = ()) -> list[pathlib.Path]:
    """Downloads the wheels into `folder`; `more` are further NAME==VERSION."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [f"{name}=={version}" for name, version in needed().items()]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    subprocess.run([*command, *wanted, *more], check=True)
    return sorted(folder.glob("*.whl"))


def unpack(folder: pathlib.Path, site: pathlib.Path) -> list[str]:
    """Makes the wheels importable from `site`, without pip; names of those that were unpacked."""
    site.mkdir(parents=True, exist_ok=True)
    names = []
    for wheel in sorted(folder.glob("*.whl")):
        mark = site / f".{wheel.name}"
        if not mark.exists():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
            mark.touch()
        names.append(wheel.name)
    return names
