"""Speed and memory of imagewatch compared with a floor and with others: ratios within one run, with their spread.

    python bench                          # everything, half an hour
    python bench --quick                  # a few minutes; the figures are rough
    python bench --only latency disk      # only some of the measurements; --help lists them
    python bench --write-docs             # into docs/contributing/performance.md

It starts endpoints of its own on loopback, warms up all contenders, lets them take turns, and repeats. It prints a
table, writes it to a JSON file, and exits with 1 if a bound is not reached. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import page
from burst import burst
from disk import disk
from figures import machine
from gallery import gallery
from job import job
from latency import latency
from memory import memory
from plan import FULL, QUICK, Bench
from scale import scale
from shared import shared
from start import start
from team import team
from throughput import slots, throughput

if TYPE_CHECKING:
    from collections.abc import Callable

    from figures import Row

MEASUREMENTS: dict[str, Callable[[Bench], list[Row]]] = {
    "latency": latency,
    "throughput": throughput,
    "slots": slots,
    "start": start,
    "disk": disk,
    "job": job,
    "memory": memory,
    "scale": scale,
    "burst": burst,
    "gallery": gallery,
    "shared": shared,
    "team": team,
}


def arguments() -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = argparse.ArgumentParser(prog="python bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASUREMENTS, default=list(MEASUREMENTS))
    parser.add_argument("--quick", action="store_true", help="few repetitions, small amounts")
    parser.add_argument("--json", type=Path, metavar="FILE", default=Path("bench.json"), help="default: %(default)s")
    parser.add_argument("--write-docs", action="store_true", help="write docs/contributing/performance.md, too")
    asked = parser.parse_args()
    if asked.quick and asked.write_docs:
        parser.error("rough figures do not belong in the docs: omit --quick or --write-docs")
    return asked


def main() -> int:
    """Measure, print, return 1 if a bound is not reached."""
    asked = arguments()
    found: dict[str, list[Row]] = {}
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as folder:
        on = machine(Path(folder))
        print(", ".join(f"{name}: {value}" for name, value in on.items()), flush=True)
        for name in asked.only:
            root = Path(folder) / name
            root.mkdir()
            found[name] = MEASUREMENTS[name](Bench(root, QUICK if asked.quick else FULL))
            print(page.text(found[name]), flush=True)
            if asked.write_docs:
                page.put(name, on, found[name])
    values = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    asked.json.write_text(
        json.dumps({"machine": on, "quick": asked.quick, "rows": values}, indent=1, ensure_ascii=False)
    )
    return int(any(not check.reached for rows in found.values() for row in rows for check in row.checks))


if __name__ == "__main__":
    sys.exit(main())
