"""Reads machine code (SASS) as cuobjdump prints it: instructions, memory accesses by width, loops.

An instruction class is written as opcodes are in the listing, modifiers after dots: "DFMA", "LDG.128" (any LDG of 128
bits), "HMMA.16816". For memory accesses the width is the number of bits that one thread moves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

GLOBAL = ("LDG", "STG", "LDGSTS", "RED", "REDG", "ATOM", "ATOMG")
SHARED = ("LDS", "STS", "ATOMS")
LOCAL = ("LDL", "STL")
GENERIC = ("LD", "ST")  # the compiler does not know the space; also distributed shared memory
MEMORY = (*GLOBAL, *SHARED, *LOCAL, *GENERIC)
WIDTHS = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
WIDE = 128


@dataclass(frozen=True)
class Instruction:
    address: int
    opcode: str
    modifiers: tuple[str, ...]
    operands: str
    predicate: str = ""

    @property
    def bits(self) -> int:
        """What one thread moves; 0 for an instruction that is no memory access."""
        if self.opcode not in MEMORY:
            return 0
        return next((WIDTHS[m] for m in self.modifiers if m in WIDTHS), 32)

    @property
    def target(self) -> int | None:
        """Where a direct branch goes."""
        if self.opcode != "BRA":
            return None
        found = re.findall(r"\b0x([0-9a-f]+)\b", self.operands)
        return int(found[-1], 16) if found else None

    def __str__(self) -> str:
        name = ".".join((self.opcode, *self.modifiers))
        return f"{self.address:06x} {self.predicate:>5} {name} {self.operands}".rstrip()

    def belongs(self, kind: str) -> bool:
        """Whether the instruction is of a class such as "DFMA", "LDG.128" or "HMMA.16816"."""
        opcode, *wanted = kind.split(".")
        if opcode != self.opcode:
            return False
        if self.bits:
            wanted = [w for w in wanted if w != str(self.bits)]
        return all(w in self.modifiers for w in wanted)


def instruction(opcode: str) -> Instruction:
    """An instruction of which only the opcode with its modifiers is known, as in "LDG.E.128"."""
    name, *modifiers = opcode.split(".")
    return Instruction(0, name, tuple(modifiers), "")


_FUNCTION = re.compile(r"^\s*Function\s*:\s*(\S+)")
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")


def parse(listing: str) -> dict[str, list[Instruction]]:
    """Mangled function name -> its instructions, from `cuobjdump -sass`."""
    found: dict[str, list[Instruction]] = {}
    current: list[Instruction] | None = None
    for line in listing.splitlines():
        if head := _FUNCTION.match(line):
            current = found.setdefault(head[1], [])
        elif current is not None and (hit := _INSTRUCTION.match(line)):
            opcode, *modifiers = hit[3].split(".")
            current.append(
                Instruction(int(hit[1], 16), opcode, tuple(modifiers), hit[4].strip(), hit[2] or "")
            )
    return found


def histogram(code: Iterable[Instruction]) -> Counter[str]:
    return Counter(i.opcode for i in code)


def accesses(code: Iterable[Instruction]) -> Counter[str]:
    """ "LDG.128" -> how many."""
    return Counter(f"{i.opcode}.{i.bits}" for i in code if i.bits)


def loops(code: list[Instruction]) -> list[list[Instruction]]:
    """The bodies of the innermost loops.

    A loop is the stretch from the target of a backward branch to the branch. The compiler lays its loops out in one
    piece; what it moves away (a slow path) leaves by a branch and comes back, and is not part of the body.
    """
    spans = {(i.target, i.address) for i in code if i.target is not None and i.target < i.address}
    inner = [
        (start, end)
        for start, end in spans
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in spans)
    ]
    return [[i for i in code if start <= i.address <= end] for start, end in sorted(inner)]


def hot(code: list[Instruction]) -> list[list[Instruction]]:
    """The loops that move data in bulk: innermost loops with a global access of 128 bits or more."""
    return [body for body in loops(code) if any(i.opcode in GLOBAL and i.bits >= WIDE for i in body)]


def narrowest_hot(code: list[Instruction]) -> int:
    """Bits of the narrowest global access in any hot loop; 0 where there is no hot loop."""
    return min((i.bits for body in hot(code) for i in body if i.opcode in GLOBAL), default=0)
