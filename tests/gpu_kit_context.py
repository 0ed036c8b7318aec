"""What the tests of the GPU kit start from: a folder with one source, and a log in memory."""

from __future__ import annotations

import io
import json
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where the folder `bench` lies

from bench.gpu_kit import runner


def gpu_kit_context(folder: pathlib.Path) -> runner.Context:
    """A context whose root and state lie in `folder`."""
    (folder / "state").mkdir()
    (folder / "csrc").mkdir()
    (folder / "csrc" / "a.cu").write_text("one")
    return runner.Context(folder / "state", io.StringIO(), root=folder)


def read(context: runner.Context, name: str) -> dict[str, Any]:
    return json.loads((context.state / f"{name}.json").read_text())
