"""One harness for every op: declare the op once as a value, get all kinds of tests.

    OP = Op(name="lm_direction", ...)          # what it is called, its oracle, its cases, its dtype pairs

    class TestLmDirection(Suite):
        op = OP

A `Suite` is a class of test methods; their arguments `target`, `case`, `pair`, `layout`, ... are filled from the
declaration by `parametrize`, which conftest.py calls. Each method carries the marker of its kind, so
`pytest -m gradcheck` runs one kind for every op. `declare` holds the declaration, `targets` the devices and
backends, `compare` the tolerances; every other module is one kind of test.
"""

from .compare import assert_within, check, same_bits
from .declare import PAIRS, Case, Op, parametrize
from .determinism import Determinism
from .dtypes import Dtypes
from .errors import Errors
from .gradients import Gradients
from .layouts import LAYOUTS, Arena, arena
from .strides import Strides
from .targets import INTERPRETED, Target, native_only, targets
from .tracing import Compile, Opcheck
from .transforms import Transforms
from .values import Values

KINDS = (
    "accuracy",
    "gradcheck",
    "opcheck",
    "compile",
    "strides",
    "dtypes",
    "errors",
    "determinism",
    "interpreter",
)


class Suite(Values, Gradients, Transforms, Opcheck, Compile, Strides, Dtypes, Errors, Determinism):
    """Every kind of test of one op."""

    op: Op


__all__ = [
    "INTERPRETED",
    "KINDS",
    "LAYOUTS",
    "PAIRS",
    "Arena",
    "Case",
    "Op",
    "Suite",
    "Target",
    "arena",
    "assert_within",
    "check",
    "native_only",
    "parametrize",
    "same_bits",
    "targets",
]
