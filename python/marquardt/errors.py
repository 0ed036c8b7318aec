"""Errors: native checks name the exception type in front of their message; here it becomes that type.

The stable ABI carries every C++ exception to Python as a RuntimeError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_KINDS: tuple[type[Exception], ...] = (TypeError, ValueError, NotImplementedError, torch.OutOfMemoryError)


def translate(error: Exception, check: Callable[..., Any] | None, args: tuple[Any, ...]) -> Exception:
    """The exception a caller should see for `error`, raised by a native operator called with `args`.

    A message without a tag comes from the dispatcher (a sparse tensor, a device without a kernel): the Python
    checks of the operator say it better.
    """
    message = str(error).split("\nException raised from")[0]
    for kind in _KINDS:
        tag = kind.__name__ + ": "
        at = message.find(tag)
        if at >= 0:
            return kind(message[at + len(tag) :])
    if check is not None:
        try:
            check(*args)
        except Exception as better:
            return better
    return error


def value(op: str, argument: str, rule: str, got: object) -> ValueError:
    """`op: argument must rule, got got`."""
    return ValueError(f"{op}: {argument} must {rule}, got {got}")


def kind(op: str, argument: str, rule: str, got: object) -> TypeError:
    """The same for a wrong type or dtype."""
    return TypeError(f"{op}: {argument} must {rule}, got {got}")
