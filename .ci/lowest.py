"""Print the lowest version that ``pyproject.toml`` allows of each dependency, as constraints for pip."""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]


def lowest(text: str) -> str:
    """Return a requirement of exactly the lowest version that another one allows.

    Raises:
        ValueError: It has no lower bound, or more than one.
    """
    requirement = Requirement(text)
    (version,) = [one.version for one in requirement.specifier if one.operator == ">="]
    return f"{requirement.name}=={version}"


if __name__ == "__main__":
    for one in (*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]):
        sys.stdout.write(f"{lowest(one)}\n")
