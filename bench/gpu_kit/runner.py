"""Parts with budgets: what is run, what is kept of it, and what a second run may leave out."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

ROOT = pathlib.Path(__file__).resolve().parents[2]
TAIL = 4000  # characters of output that a command hands on
LEAST = 5.0  # seconds under which no part is started

DONE, FAILED, SKIPPED, LATE = "done", "failed", "skipped", "out of time"


class Skip(Exception):
    """The part cannot run here; the message says why."""


@dataclass(frozen=True)
class Ran:
    """A command that has ended."""

    code: int
    output: str
    seconds: float
    late: bool = False

    @property
    def good(self) -> bool:
        return self.code == 0 and not self.late

    @property
    def tail(self) -> str:
        return self.output[-TAIL:]


@dataclass
class Context:
    """What a part may use: the folders, the clock, and commands that are logged and stopped in time."""

    state: pathlib.Path
    log: TextIO
    environment: dict[str, str] = field(default_factory=lambda: dict(os.environ))
    dry: bool = False
    wheels: pathlib.Path | None = None
    end: float = float("inf")  # of the part that runs, by time.monotonic()
    missing: tuple[str, ...] = ()  # of what the part that runs can do without
    root: pathlib.Path = ROOT

    @property
    def left(self) -> float:
        return self.end - time.monotonic()

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.log.write(text + "\n")
        self.log.flush()

    def run(self, *words: Any, timeout: float = float("inf"), **environment: str) -> Ran:
        """Runs a command from the root; it is ended with the part's time, together with what it started."""
        command = [str(word) for word in words]
        shown = " ".join([*(f"{k}={v}" for k, v in environment.items()), shlex.join(command)])
        self.say(f"$ {shown}")
        if self.dry:
            return Ran(0, "", 0.0)
        start = time.monotonic()
        try:
            child = subprocess.Popen(
                command,
                cwd=self.root,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                start_new_session=True,  # so that its children can be ended with it
            )
        except OSError as error:
            self.say(f"# {error}")
            return Ran(127, str(error), 0.0)
        late = False
        try:
            limit = max(0.1, min(timeout, self.left))
            output, _ = child.communicate(timeout=None if math.isinf(limit) else limit)
        except subprocess.TimeoutExpired:
            late = True
            os.killpg(child.pid, signal.SIGKILL)
            output, _ = child.communicate()
        ran = Ran(child.returncode, output or "", time.monotonic() - start, late)
        how = "stopped" if late else f"exit {ran.code}"
        self.log.write(f"{ran.output}\n# {how} after {ran.seconds:.1f} s: {shown}\n")
        self.log.flush()
        return ran

    def python(self, *words: Any, timeout: float = float("inf"), **environment: str) -> Ran:
        return self.run(sys.executable, *words, timeout=timeout, **environment)


@dataclass(frozen=True)
class Part:
    """run(context) -> (whether all was well, numbers as JSON); a "reason" among the numbers says what was not.

    share:  of the time that is left when it starts, against the shares of the parts that come after it.
    inputs: what its result depends on.
    needs:  parts without which it is skipped; wants: those without which it does less (context.missing).
    """

    name: str
    share: float
    inputs: tuple[str, ...]
    run: Callable[[Context], tuple[bool, dict[str, Any]]]
    needs: tuple[str, ...] = ()
    wants: tuple[str, ...] = ()


def fingerprint(inputs: Sequence[str], root: pathlib.Path = ROOT) -> str:
    """Of the sources under these folders and files."""
    digest = hashlib.sha256()
    for name in inputs:
        place = root / name
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        for path in files:
            if "__pycache__" in path.parts or path.suffix in (".so", ".pyc", ".json"):
                continue
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def read_state(state: pathlib.Path, part: Part) -> dict[str, Any] | None:
    """What the last run of the part left, None if nothing or nothing readable."""
    try:
        found = json.loads((state / f"{part.name}.json").read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def is_done(found: Mapping[str, Any] | None, mark: str) -> bool:
    return found is not None and found.get("status") == DONE and found.get("fingerprint") == mark


def run_part(part: Part, context: Context, budget: float) -> dict[str, Any]:
    """Runs a part and describes how it went."""
    start = time.monotonic()
    context.end = start + budget
    reason, result = "", {}
    try:
        good, result = part.run(context)
        reason = str(result.pop("reason", ""))
        status = DONE if good else LATE if context.left <= 0 else FAILED
    except Skip as why:
        status, reason = SKIPPED, str(why)
    except Exception as error:  # one broken part must not take the others along
        status, reason = FAILED, f"{type(error).__name__}: {error}"
    return {
        "status": status,
        "reason": reason,
        "seconds": round(time.monotonic() - start, 1),
        "budget": round(budget, 1),
        "result": result,
    }


def not_run(status: str, reason: str) -> dict[str, Any]:
    return {"status": status, "reason": reason, "seconds": 0.0, "budget": 0.0, "result": {}}


def run(
    parts: Sequence[Part],
    context: Context,
    *,
    limit: float,
    again: bool = False,
    out: pathlib.Path | None = None,
    commit: str = "unknown",
) -> dict[str, str]:
    """All parts in order, within `limit` seconds together; name -> status. Each leaves <state>/<name>.json."""
    start = time.monotonic()
    statuses: dict[str, str] = {}
    marks = {part.name: fingerprint(part.inputs, context.root) for part in parts}
    before = {
        part.name
        for part in parts
        if not again and is_done(read_state(context.state, part), marks[part.name])
    }
    for k, part in enumerate(parts):
        if part.name in before:
            context.say(f"== {part.name}: done before")
            statuses[part.name] = DONE
            deliver(context, part, out)
            continue
        left = limit - (time.monotonic() - start)
        budget = left * part.share / sum(p.share for p in parts[k:] if p.name not in before)
        missing = [name for name in part.needs if not good(context, name, statuses)]
        context.missing = tuple(name for name in part.wants if not good(context, name, statuses))
        context.say(f"== {part.name}: at most {max(budget, 0.0):.0f} s")
        if missing:
            made = not_run(SKIPPED, f"needs {', '.join(missing)}")
        elif left < LEAST:
            made = not_run(LATE, "the run's time is up")
        else:
            made = run_part(part, context, budget)
        statuses[part.name] = made["status"]
        context.say(f"== {part.name}: {made['status']} {made['reason']} ({made['seconds']} s)")
        if context.dry:
            continue
        whole = {"part": part.name, **made, "fingerprint": marks[part.name], "commit": commit}
        (context.state / f"{part.name}.json").write_text(json.dumps(whole, indent=1))
        deliver(context, part, out)
    return statuses


def good(context: Context, name: str, statuses: Mapping[str, str]) -> bool:
    """Whether a part that another one needs has been done, now or by an earlier run."""
    if context.dry or statuses.get(name) == DONE:
        return True
    try:
        kept = json.loads((context.state / f"{name}.json").read_text())
    except (OSError, ValueError):
        return False
    return name not in statuses and kept.get("status") == DONE


def deliver(context: Context, part: Part, out: pathlib.Path | None) -> None:
    """Copies of the part's JSON and of the log to where results are fetched from."""
    if out is None or context.dry:
        return
    out.mkdir(parents=True, exist_ok=True)
    for name in (f"{part.name}.json", "log.txt"):
        if (context.state / name).is_file():
            shutil.copyfile(context.state / name, out / name)
