"""What must not have a second implementation, held to the source text of the package."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import imagewatch

PACKAGE = Path(imagewatch.__file__).parent
ONE_PLACE = {
    # To open a file without following a link and without waiting: only a file that other people wrote needs both. The
    # administrator's files of the key and of the secret of notifications are opened through links.
    r"\bO_NONBLOCK\b": {"system/untrusted.py", "config/secret_file.py"},
    # A hard link to a private file.
    r"\bst_nlink\b.*\bS_IROTH\b": {"system/folders.py"},
    # The table of mounts, and on which of them a file is.
    r"/proc/[^/]+/mount|/proc/mounts|mountinfo\"|fdinfo": {"system/file_systems.py"},
    # Names of file systems.
    r"\"(?:ext4|nfs4|cifs|btrfs)\"": {"system/file_systems.py"},
    # Mode and group of files. ``claims`` closes its own folder to others; ``drop`` and ``name_notes`` make files in
    # the inbox.
    r"\bos\.(?:l?chmod|fchmod|l?chown|fchown)\(": {
        *("system/permissions.py", "system/disk_calls.py", "job/claims.py", "commands/drop.py"),
        *("commands/name_notes.py", "journal/sqlite.py"),
    },
    r"\bos\.f?chown\(|\bos\.lchown\(|getgrnam\(": {"system/permissions.py"},
}


@pytest.mark.parametrize("pattern", ONE_PLACE)
def test_there_are_no_two_implementations(pattern: str) -> None:
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if "sandbox" not in path.parts and re.search(pattern, path.read_text())
    }
    assert found == ONE_PLACE[pattern]
