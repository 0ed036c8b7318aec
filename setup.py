"""Build commands: CMake makes the native library (build_tools/native.py); pyproject.toml has the metadata."""

import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import native  # noqa: E402
import torch_dir  # noqa: E402


class BuildNative(build_ext):
    """Puts libmarquardt.so into the package: of the wheel, or of the source tree for editable installs."""

    def run(self):
        try:
            native.build(
                self._package(ROOT / "python" if self.inplace or self.editable_mode else self.build_lib)
            )
        except (native.BuildError, torch_dir.TorchNotFound) as problem:
            sys.exit(str(problem))
        except subprocess.CalledProcessError as failure:
            sys.exit(
                f"marquardt: the native build failed ({failure.cmd[0]} exited with {failure.returncode})"
            )

    @staticmethod
    def _package(root) -> Path:
        return Path(root) / "marquardt"

    def get_outputs(self):
        return [str(self._package(self.build_lib) / native.LIBRARY)]

    def get_output_mapping(self):
        if not (self.inplace or self.editable_mode):
            return {}
        return {self.get_outputs()[0]: str(self._package(ROOT / "python") / native.LIBRARY)}


class Wheel(bdist_wheel):
    """One wheel for every Python: the library holds no Python symbol, only the platform counts."""

    def run(self):
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)  # no stale modules
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


# triton_kernels/ stands beside csrc/, where people look for kernels, and is installed inside the package.
KERNELS = "marquardt.triton_kernels"

setup(
    packages=find_packages("python")
    + [KERNELS]
    + [f"{KERNELS}.{name}" for name in find_packages("triton_kernels")],
    package_dir={"": "python", KERNELS: "triton_kernels"},
    package_data={"marquardt": ["py.typed"]},
    include_package_data=False,
    ext_modules=[Extension("marquardt.libmarquardt", sources=[])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
