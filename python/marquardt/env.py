"""`python -m marquardt.env`: what a bug report needs."""

from __future__ import annotations

import os
import platform
import sys

import torch

from . import __version__, _native, backends, gpu


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(module: str) -> str:
    """The installed version of an optional package."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(module)
    except PackageNotFoundError:
        return "not installed"


def gpus() -> list[str]:
    """Names and capabilities of the GPUs that torch sees."""
    if not torch.cuda.is_available():
        return []
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return [f"{gpu.name} (sm_{gpu.major}{gpu.minor})" for gpu in found]


def cuda_versions() -> str:
    """CUDA of the kernels and of the driver."""
    found = gpu.versions()
    if found is None:
        return "no kernels in this build"
    runtime, driver = found
    return f"kernels {gpu.version(runtime)}, driver {gpu.version(driver) if driver else 'not installed'}"


def report() -> str:
    """Versions, build, processor, backends and why some cannot run."""
    build = _native.build_info()
    lines = [
        ("marquardt", __version__),
        ("python", sys.version.split()[0]),
        ("platform", platform.platform()),
        ("torch", f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})"),
        ("triton", version_of("triton")),
        ("numpy", version_of("numpy")),
        ("native library", _native.why_not() or "loaded"),
        *((f"  {key}", str(value)) for key, value in build.items()),
        ("cpu", cpu_model()),
        ("torch cpu capability", torch.backends.cpu.get_cpu_capability()),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()}"),
        ("gpu", ", ".join(gpus()) or "none"),
        ("cuda", cuda_versions()),
        ("MARQUARDT_BACKEND", os.environ.get("MARQUARDT_BACKEND", "not set")),
    ]
    for device in ("cpu", "cuda"):
        for name, reason in backends.reasons("lm_direction", torch.device(device)).items():
            lines.append((f"backend {name} on {device}", "can run" if reason is None else reason))
    width = max(len(key) for key, _ in lines)
    return "\n".join(f"{key:<{width}}  {value}" for key, value in lines)


if __name__ == "__main__":
    print(report())
