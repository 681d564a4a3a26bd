"""Set the address of the repository in ``pyproject.toml`` and in every file that names it: ``make url URL=https://…``."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
SAFE = re.compile(r"https://[A-Za-z0-9.-]+(/[A-Za-z0-9._~-]+)+")


def main(url: str) -> str:
    """Replace the address and return which files were changed.

    Args:
        url: The new one.
    """
    if not SAFE.fullmatch(url):
        return f"{url!r} is not the address of a repository, such as https://codeberg.org/NAME/imagewatch"
    before = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]
    named = re.compile(rf"{re.escape(before)}(?![A-Za-z0-9_~-])")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    changed = []
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or not path.is_file():
            continue
        content = path.read_bytes().decode(errors="surrogateescape")
        if (new := named.sub(url, content)) != content:
            path.write_bytes(new.encode(errors="surrogateescape"))
            changed.append(name)
    return f"{before} is now {url} in {', '.join(changed)}"


if __name__ == "__main__":
    sys.stdout.write(main(sys.argv[1]) + "\n")
