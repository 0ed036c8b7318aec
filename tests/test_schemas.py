"""Schemas are public once released: a changed one breaks exported programs and other people's code.

`schemas.txt` is the snapshot of every public operator `marquardt::*`. To change it on purpose, run

    python tests/test_schemas.py > tests/schemas.txt
"""

from __future__ import annotations

import pathlib

import pytest
import torch

import marquardt  # noqa: F401 (registers the operators)

SNAPSHOT = pathlib.Path(__file__).with_name("schemas.txt")


def public_schemas() -> list[str]:
    """Operators of the namespace whose names do not start with an underscore."""
    found = {str(s) for s in torch._C._jit_get_all_schemas() if s.name.startswith("marquardt::")}
    return sorted(s for s in found if not s.startswith("marquardt::_"))


@pytest.mark.opcheck
def test_snapshot():
    from harness import native_only

    native_only()
    assert public_schemas() == SNAPSHOT.read_text().splitlines(), (
        "a public schema changed: see the head of this file"
    )


@pytest.mark.opcheck
def test_sizes_are_symbolic_and_scalars_are_tensors():
    """A `float` argument would be one compiled graph per value."""
    for schema in public_schemas():
        assert "float " not in schema and "Scalar" not in schema, schema


@pytest.mark.opcheck
def test_mutations_are_declared():
    for schema in public_schemas():
        assert ("_out(" in schema) == ("Tensor(a!)" in schema or "Tensor($0! -> " in schema), schema


if __name__ == "__main__":
    print("\n".join(public_schemas()))
