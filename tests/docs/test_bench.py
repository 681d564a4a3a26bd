"""The benchmarks fit the present code: they can be imported, and the functions that they time exist."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
CHECK = """
import importlib, pathlib, sys
sys.path.insert(0, sys.argv[1])
for path in sorted(pathlib.Path(sys.argv[1]).glob("[a-z]*.py")):
    importlib.import_module(path.stem)
for part, owners in importlib.import_module("phases").PARTS.items():
    for owner, names in owners:
        for name in names:
            assert callable(getattr(owner, name, None)), f"{part}: there is no {name} in {owner}"
"""


def test_the_benchmarks_can_be_imported_and_the_functions_they_time_exist() -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(BENCH)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
