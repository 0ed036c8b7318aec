"""The measured rows for people: plain text for the terminal, Markdown for the README.

A row is the dictionary that `plugin.info` puts into the JSON, so a table can be made from a file at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Info = dict[str, Any]

NOISY = 0.25  # a spread above this says that something else was running


def duration(seconds: float) -> str:
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds * 1e9:.3g} ns"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.0f} %"


def _columns(rows: Sequence[Info], kind: str) -> list[str]:
    """Names of peers or floors in the order of their first appearance."""
    return list(dict.fromkeys(name for row in rows for name in row[kind]))


def _peer(row: Info, name: str) -> str:
    peer = row["peers"].get(name)
    if peer is None:
        return "-"
    # A ratio that is a cost (the price of a call in calls of torch.add) reads the other way round.
    cost = any(g["against"] == name and g["slower"] for g in row["goals"])
    text = f"{1 / peer['ratio']:.2f} calls" if cost else f"{peer['ratio']:.3g}x"
    return text + (" ~" if peer["exact"] is False else "")


def _floor(row: Info, name: str) -> str:
    floor = row["floors"].get(name)
    return "-" if floor is None else percent(floor["fraction"]) + (" *" if floor["substitute"] else "")


def verdict(row: Info) -> str:
    """'met', 'missed: ...', or '' for a row without goals."""
    if "failure" in row:
        return "WRONG"
    judged = [g for g in row["goals"] if g["met"] is not None]
    missed = [f"{g['text']} (got {g['value']:.3g})" for g in judged if not g["met"]]
    if missed:
        return "missed: " + ", ".join(missed)
    left = len(row["goals"]) - len(judged)
    return ("met" if judged else "") + (f" ({left} not judged)" if left else "")


def cells(rows: Sequence[Info]) -> tuple[list[str], list[list[str]]]:
    """(head, body) of the table."""
    good = [row for row in rows if "failure" not in row]
    peers, floors = _columns(good, "peers"), _columns(good, "floors")
    head = ["op", "shape", "dtype", "time", "spread", "GB/s", *peers, *floors, "error", "verdict"]
    body = []
    for row in rows:
        op = f"{row['op']} {row['variant']}".strip()
        start = [op, "x".join(map(str, row["shape"])), row["dtype"]]
        if "failure" in row:
            body.append([*start, *["-"] * (len(head) - 4), f"WRONG, not timed: {row['failure']}"])
            continue
        body.append(
            [
                *start,
                duration(row["median"]),
                percent(row["spread"]) + (" !" if row["spread"] > NOISY else ""),
                f"{row['gbps']:.3g}",
                *[_peer(row, name) for name in peers],
                *[_floor(row, name) for name in floors],
                f"{row['gate']['error']:.1e}",
                verdict(row),
            ]
        )
    return head, body


def legend(rows: Sequence[Info]) -> list[str]:
    good = [row for row in rows if "failure" not in row]
    lines = ["Nx: times faster than the peer; per cent of the floor's speed; medians of interleaved rounds."]
    if any(" calls" in _peer(row, name) for row in good for name in row["peers"]):
        lines.append("calls: the cost in calls of the peer, less is better.")
    if any(peer["exact"] is False for row in good for peer in row["peers"].values()):
        lines.append("~: the peer's own result is inexact (beyond its tolerance against float64).")
    if any(row["spread"] > NOISY for row in good):
        lines.append(f"!: spread above {percent(NOISY)}: something else was running, measure again.")
    if any(floor["substitute"] for row in good for floor in row["floors"].values()):
        lines.append("*: not the tuned floor kernel but a substitute; no goal is judged by it.")
    return lines


def summary(rows: Sequence[Info]) -> str:
    goals = [g for row in rows for g in row.get("goals", ())]
    met, missed = (sum(g["met"] is verdict for g in goals) for verdict in (True, False))
    wrong = sum("failure" in row for row in rows)
    return (
        f"{len(rows)} rows; floors: {met} met, {missed} missed, {len(goals) - met - missed} not judged"
        f"; wrong results: {wrong}"
    )


def plain(rows: Sequence[Info], machine: str) -> str:
    head, body = cells(rows)
    widths = [max(len(line[k]) for line in [head, *body]) for k in range(len(head) - 1)]

    def row(line: Sequence[str]) -> str:
        left = [f"{cell:<{w}}" for cell, w in zip(line[:3], widths, strict=False)]
        right = [f"{cell:>{w}}" for cell, w in zip(line[3:-1], widths[3:], strict=False)]
        return "  ".join([*left, *right, line[-1]]).rstrip()

    rule = "-" * len(row(head))
    lines = [row(head), rule, *[row(line) for line in body], rule, *legend(rows), summary(rows)]
    return "\n".join([f"machine: {machine}", "", *lines])


def markdown(rows: Sequence[Info], machine: str) -> str:
    head, body = cells(rows)
    lines = ["| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *body]]
    notes = " ".join([*legend(rows), summary(rows)])
    return "\n".join([*lines, "", notes, "", f"Machine: {machine}."])
