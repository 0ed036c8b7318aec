"""What the kernels promise about their machine code, read from comments beside them.

    // promise: frame_held threads=256 shared=64K ctas>=3 registers<=80 wide=LDGSTS.128|LDG.128,STG.128 has=DFMA
    // promise: frame_held shared=48K@80 ctas>=2@80 has=UCGABAR_ARV@90+
    // promise: frame_held<double, *> ctas>=1

name           without namespaces: every instance of the kernel, or those whose template arguments match the glob. Lines
               are merged in the order of the file: a later clause replaces an earlier one of its key; those of has
               and none add up.
threads=N      the launch bound, which is also the CTA for which `ctas` is promised
shared=N, NK   dynamic shared memory of that CTA (default 0)
ctas>=N        how many such CTAs a multiprocessor holds
registers<=N   of a thread (optional)
stack<=N       bytes of stack frame, and with them spills: an exception that wants its reason beside it (default 0)
wide=A,B       classes of global accesses that the code must have, `|` between alternatives; `-`: moves nothing in bulk
has=A, none=A  instruction classes that must, or must not, be there
narrow=N       bits of the narrowest global access allowed in a loop that moves data in bulk (default 64; 0: any)
@90, @90+      behind a clause: for sm_90 alone, for sm_90 and newer (with has and none also behind each class)
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

MARK = re.compile(r"^\s*(?://|#)\s*promise:\s*(.*?)\s*$")
NAME = re.compile(r"^(\w+)\s*(?:<([^>]*)>)?\s*")
CLAUSE = re.compile(
    r"^(threads|shared|ctas|registers|stack|wide|has|none|narrow)(=|>=|<=)([^@\s]+)(?:@(\d+)(\+?))?$"
)
SIGNS = {"ctas": ">=", "registers": "<=", "stack": "<="}
NUMBERS = ("threads", "shared", "ctas", "registers", "stack", "narrow")
ADDED = ("has", "none")
REQUIRED = ("threads", "ctas", "wide")
NARROW = 64


class PromiseError(ValueError):
    """A promise that cannot be read; the message says which and why."""


@dataclass(frozen=True)
class Clause:
    key: str
    value: str
    target: int = 0  # 0: every target
    newer: bool = False

    def applies(self, target: str) -> bool:
        number = int(target.removeprefix("sm_"))
        return self.target in (0, number) or (self.newer and number > self.target)


@dataclass(frozen=True)
class Line:
    """One comment."""

    where: str  # file:line
    kernel: str
    arguments: str | None  # a glob, None: whatever they are
    clauses: tuple[Clause, ...]

    def matches(self, kernel: str, arguments: str) -> bool:
        if self.kernel != kernel:
            return False
        return self.arguments is None or fnmatch.fnmatchcase(_plain(arguments), _plain(self.arguments))


@dataclass(frozen=True)
class Promise:
    """What one kernel promises for one target."""

    threads: int
    ctas: int
    shared: int = 0
    registers: int | None = None
    stack: int = 0
    wide: tuple[tuple[str, ...], ...] = ()  # all of them, each by one of its alternatives
    has: tuple[tuple[str, ...], ...] = ()
    none: tuple[str, ...] = ()
    narrow: int = NARROW
    where: tuple[str, ...] = field(default=(), compare=False)


def _plain(arguments: str) -> str:
    """Without blanks, bools as numbers."""
    return re.sub(r"\b(true|false)\b", lambda hit: str(int(hit[1] == "true")), arguments.replace(" ", ""))


def _number(clause: Clause, where: str) -> int:
    text = clause.value
    found = re.fullmatch(r"(\d+)(K?)", text)
    if not found:
        raise PromiseError(f"{where}: {clause.key} must be a number, got {text!r}")
    return int(found[1]) * (1024 if found[2] else 1)


def _each(word: str) -> list[str]:
    """ "has=A@90+,B@90" -> one clause for each class, since has and none add up; other words as they are."""
    key, sign, value = word.partition("=")
    if key not in ADDED or "@" not in value.rpartition(",")[0]:
        return [word]
    return [f"{key}{sign}{kind}" for kind in value.split(",")]


def _line(text: str, where: str) -> Line:
    name = NAME.match(text)
    if not name:
        raise PromiseError(f"{where}: a promise starts with a kernel's name, got {text!r}")
    clauses = []
    for word in (part for whole in text[name.end() :].split() for part in _each(whole)):
        found = CLAUSE.match(word)
        if not found or found[2] != SIGNS.get(found[1], "="):
            raise PromiseError(f"{where}: no clause of a promise: {word!r}")
        clauses.append(Clause(found[1], found[3], int(found[4] or 0), bool(found[5])))
        if found[1] in NUMBERS:
            _number(clauses[-1], where)
    if not clauses:
        raise PromiseError(f"{where}: {name[1]} promises nothing")
    return Line(where, name[1], name[2], tuple(clauses))


def read(files: Iterable[Path], root: Path) -> list[Line]:
    """All promises of the sources, in order."""
    found = []
    for path in sorted(files):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if hit := MARK.match(text):
                found.append(_line(hit[1], f"{path.relative_to(root)}:{number}"))
    return found


def _alternatives(words: list[str]) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(word.split("|")) for word in words if word != "-")


def promise(lines: Iterable[Line], kernel: str, arguments: str, target: str) -> Promise | None:
    """What the lines together say of one kernel; None if no line is about it."""
    about = [line for line in lines if line.matches(kernel, arguments)]
    if not about:
        return None
    last: dict[str, tuple[Clause, str]] = {}
    added: dict[str, list[str]] = {key: [] for key in ADDED}
    for line in about:
        for clause in line.clauses:
            if not clause.applies(target):
                continue
            if clause.key in added:
                added[clause.key] += clause.value.split(",")
            else:
                last[clause.key] = clause, line.where
    missing = [key for key in REQUIRED if key not in last]
    if missing:
        raise PromiseError(f"{about[-1].where}: {kernel} on {target} promises no {', '.join(missing)}")
    numbers = {key: _number(*last[key]) for key in NUMBERS if key in last}
    return Promise(
        **numbers,
        wide=_alternatives(last["wide"][0].value.split(",")),
        has=_alternatives(added["has"]),
        none=tuple(added["none"]),
        where=tuple(line.where for line in about),
    )


def unused(lines: Iterable[Line], kernels: Iterable[tuple[str, str]]) -> list[str]:
    """Promises that no kernel (name, template arguments) made: each as "file:line: name"."""
    known = set(kernels)
    return [
        f"{line.where}: {line.kernel}" + (f"<{line.arguments}>" if line.arguments is not None else "")
        for line in lines
        if not any(line.matches(*kernel) for kernel in known)
    ]
