"""The README as it is shown beside a release: its links lead to the files of that version in the repository."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)(\[[^\]]*\]\()(?!\w+:|#)([^)]+)\)")


class Readme(MetadataHookInterface):
    """Sets the description of the package."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Set ``readme``: relative links of README.md become links to the repository."""
        repository = metadata["urls"]["Source"]
        release = f"v{metadata['version']}"

        def absolute(found: re.Match[str]) -> str:
            kind = "raw" if found[1] else "blob"
            return f"{found[1]}{found[2]}{repository}/{kind}/{release}/{found[3]})"

        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": _LINK.sub(absolute, text)}
