"""`python -m bench.gpu_kit`: see the package's docstring."""

from __future__ import annotations

import argparse
import os
import pathlib
import sys

from . import __doc__ as about
from . import pack
from .parts import PARTS, commit
from .runner import DONE, ROOT, SKIPPED, Context, run

LIMIT = 480.0  # seconds of a whole run


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    names = [part.name for part in PARTS]
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_kit",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(names), help="some of " + ",".join(names))
    parser.add_argument("--again", action="store_true", help="also what is done")
    parser.add_argument("--dry-run", action="store_true", help="print the commands, run none")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all parts together")
    parser.add_argument("--state", type=pathlib.Path, default=ROOT / "build" / "gpu_kit", help="what is kept")
    parser.add_argument(
        "--out", type=pathlib.Path, default=os.environ.get("OUT"), help="copies of JSON and log"
    )
    parser.add_argument(
        "--wheels", type=pathlib.Path, default=ROOT / "build" / "wheels", help="carried wheels"
    )
    parser.add_argument("--pack", type=pathlib.Path, metavar="DIR", help="only fetch the wheels into DIR")
    parser.add_argument(
        "--also", nargs="+", default=[], metavar="NAME==VERSION", help="more wheels for --pack"
    )
    options = parser.parse_args(arguments)
    options.chosen = [part for part in PARTS if part.name in options.parts.split(",")]
    unknown = set(options.parts.split(",")) - set(names)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; parts are {', '.join(names)}")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    if options.pack:
        for wheel in pack.pack(options.pack, more=tuple(options.also)):
            print(wheel)
        return 0
    options.state.mkdir(parents=True, exist_ok=True)
    with (options.state / "log.txt").open("w" if options.again else "a") as log:
        context = Context(options.state.absolute(), log, dry=options.dry_run, wheels=options.wheels)
        statuses = run(
            options.chosen,
            context,
            limit=options.limit,
            again=options.again,
            out=pathlib.Path(options.out) if options.out else None,
            commit=commit(),
        )
        context.say("; ".join(f"{name}: {status}" for name, status in statuses.items()))
    return 0 if all(status in (DONE, SKIPPED) for status in statuses.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
