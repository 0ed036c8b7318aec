"""Judges compiled kernels: no spills, no local memory, the promised occupancy and access widths; and shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import occupancy
import promises
import sass

if TYPE_CHECKING:
    from cuda_static import Kernel

Lines = Sequence[promises.Line]


def memory_problems(kernel: Kernel, allowed: int = 0) -> list[str]:
    """Spills and local memory, by the compiler's report and by the code; `allowed` bytes of stack excuse both."""
    if 0 < kernel.stack <= allowed:
        return []
    found = []
    if kernel.spill_stores or kernel.spill_loads:
        found.append(f"spills: {kernel.spill_stores} bytes stored, {kernel.spill_loads} loaded")
    if kernel.stack:
        found.append(f"stack frame of {kernel.stack} bytes" + (f", {allowed} are allowed" if allowed else ""))
    found += [f"{n} {kind} in the code" for kind in sass.LOCAL if (n := kernel.count(kind))]
    return found


def occupancy_problems(kernel: Kernel, promise: promises.Promise) -> list[str]:
    found = []
    chip = occupancy.CHIPS[kernel.target]
    if kernel.bound != promise.threads:
        found.append(
            f"compiled for {kernel.bound or 'any number of'} threads, {promise.threads} are promised"
        )
    if promise.registers is not None and kernel.registers > promise.registers:
        found.append(f"{kernel.registers} registers, at most {promise.registers} are promised")
    if kernel.registers * promise.threads > occupancy.REGISTERS:
        found.append(f"{kernel.registers} registers × {promise.threads} threads do not fit a multiprocessor")
    shared = kernel.shared + promise.shared
    if shared > chip.shared_per_cta:
        found.append(f"{shared} bytes of shared memory, {chip.shared_per_cta} is the most of a CTA")
    got = occupancy.occupancy(kernel.target, promise.threads, kernel.registers, shared)
    if got.ctas < promise.ctas:
        found.append(
            f"{got.ctas} CTAs a multiprocessor ({kernel.registers} registers, {shared} bytes shared;"
            f" limit: {got.limit}), {promise.ctas} are promised"
        )
    return found


def code_problems(kernel: Kernel, promise: promises.Promise) -> list[str]:
    """Access widths and instruction classes."""
    found = [
        f"no {' or '.join(choice)} in the code"
        for choice in (*promise.wide, *promise.has)
        if not any(kernel.count(kind) for kind in choice)
    ]
    found += [f"{n} {kind} in the code" for kind in promise.none if (n := kernel.count(kind))]
    if 0 < kernel.narrowest_hot < promise.narrow:
        found.append(
            f"a loop that moves data in bulk also has a global access of {kernel.narrowest_hot} bits,"
            f" {promise.narrow} is the least"
        )
    return found


def promise_of(kernel: Kernel, lines: Lines) -> tuple[promises.Promise | None, str]:
    """What the kernel promises, or why that is not known."""
    try:
        promise = promises.promise(lines, kernel.name, kernel.arguments, kernel.target)
    except promises.PromiseError as problem:
        return None, str(problem)
    return promise, "no promise beside its definition" if promise is None else ""


def problems_of(kernel: Kernel, lines: Lines) -> dict[str, list[str]]:
    """kind ("memory", "promise", "occupancy", "code") -> what is wrong."""
    promise, why_not = promise_of(kernel, lines)
    if promise is None:
        return {"memory": memory_problems(kernel), "promise": [why_not]}
    return {
        "memory": memory_problems(kernel, promise.stack),
        "occupancy": occupancy_problems(kernel, promise),
        "code": code_problems(kernel, promise),
    }


def problems(kernels: Iterable[Kernel], lines: Lines, kind: str = "", stale: bool = True) -> list[str]:
    """Everything that is wrong, a line each; of one kind if one is named. `stale`: unused promises too."""
    kernels = list(kernels)
    found = [
        f"{kernel.label} {kernel.target} ({kernel.source}): {text}"
        for kernel in kernels
        for name, texts in problems_of(kernel, lines).items()
        if kind in ("", name)
        for text in texts
    ]
    if stale and kind in ("", "promise"):
        names = [(kernel.name, kernel.arguments) for kernel in kernels]
        found += [f"{line}: promised, but there is no such kernel" for line in promises.unused(lines, names)]
    return found


# --- the table ----------------------------------------------------------------------------------------------

HEAD = (
    "kernel",
    "target",
    "registers",
    "shared",
    "spills, stack (B)",
    "CTAs/SM",
    "occupancy",
    "limit",
    "global accesses",
)


def _span(values: Iterable[int | float], unit: str = "") -> str:
    low, high = min(values := list(values)), max(values)
    return f"{low:g}{unit}" if low == high else f"{low:g}–{high:g}{unit}"


def _widths(group: Sequence[Kernel]) -> str:
    """ "LDG.128, STG.128; tails 32": the wide classes, and the widths of the rest."""
    classes = {
        tuple(kind.split(".")) for k in group for kind in k.accesses() if kind.split(".")[0] in sass.GLOBAL
    }
    wide = sorted(f"{opcode}.{bits}" for opcode, bits in classes if int(bits) >= sass.WIDE)
    rest = sorted({int(bits) for _, bits in classes if int(bits) < sass.WIDE}, reverse=True)
    words = [", ".join(wide)] if wide else []
    words += [("also " if wide else "") + "/".join(map(str, rest))] if rest else []
    return "; ".join(words) or "none"


def _row(label: str, group: Sequence[Kernel], lines: Lines) -> list[str]:
    target = group[0].target
    found = []
    shared = set()
    for kernel in group:
        promise, _ = promise_of(kernel, lines)
        if promise is not None:
            shared.add(kernel.shared + promise.shared)
            found.append(
                occupancy.occupancy(target, promise.threads, kernel.registers, kernel.shared + promise.shared)
            )
    spills = sum(k.spill_stores + k.spill_loads + k.stack for k in group)
    cells = [label, target, _span(k.registers for k in group)]
    cells += [_span((round(s / 1024, 1) for s in shared), " KiB") if shared else "?", f"{spills}"]
    if found:
        cells += [_span(o.ctas for o in found), _span((round(100 * o.fraction) for o in found), " %")]
        cells += [", ".join(sorted({o.limit for o in found}))]
    else:
        cells += ["?", "?", "no promise"]
    return [*cells, _widths(group)]


def _family(kernel: Kernel, lines: Lines) -> str:
    """The instances that promise the same: the name, with the narrowest glob among its promises."""
    globs = [
        line.arguments for line in lines if line.matches(kernel.name, kernel.arguments) and line.arguments
    ]
    return kernel.name + (f"<{globs[-1]}>" if globs else "")


def table(kernels: Iterable[Kernel], lines: Lines, every: bool = False, markdown: bool = False) -> str:
    """A line per target and kernel, over the instances that promise the same, or per instance."""
    groups: dict[tuple[str, str], list[Kernel]] = {}
    for kernel in kernels:
        label = kernel.label if every else _family(kernel, lines)
        groups.setdefault((label, kernel.target), []).append(kernel)
    body = [
        _row(f"{label} ({len(group)} instances)" if len(group) > 1 else label, group, lines)
        for (label, _), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]
    if markdown:
        rows = [list(HEAD), ["---"] * len(HEAD), *body]
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)
    widths = [max(len(row[k]) for row in [list(HEAD), *body]) for k in range(len(HEAD))]
    return "\n".join(
        "  ".join(f"{cell:<{w}}" for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in [HEAD, *body]
    )
