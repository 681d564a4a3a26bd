"""``imagewatch check --shared``: whether two hosts can process one inbox together."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from imagewatch.commands.check_settings import Line
from imagewatch.job.common_folder import FolderProbes, require_tried
from imagewatch.job.two_hosts import FOLDER, TwoHosts
from imagewatch.protocol.names import CLAIMS
from imagewatch.system.disk import Disk
from imagewatch.system.errors import ConfigError, SpoolError
from imagewatch.system.file_systems import Kinds
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config


def shared_lines(config: Config) -> Iterator[Line]:
    """Yield what the file system of the inbox can do, first on this host, then together with another one."""
    disk, inbox = Disk(), config.folders.inbox
    claims = os.path.join(inbox, CLAIMS)
    kinds = Kinds()
    kinds.refresh()
    try:
        disk.make_folder(inbox, mode=0o777)
        kind = kinds.of(inbox)
        require_tried(inbox, kind)
        disk.tops.open(inbox)
        disk.make_folder(claims)
        disk.tops.open(claims)
        FolderProbes(disk, claims).run()
    except (ConfigError, SpoolError, OSError) as error:
        yield Line("bad", "file system", _text(error))
        return
    yield Line("ok", "file system", f"{kind or 'unknown'}: new files, renames, locks: {printable(inbox)}")
    folder = os.path.join(claims, FOLDER)
    disk.make_folder(folder)
    try:
        for result in TwoHosts(disk, folder).run():
            yield Line(*result)
    except SpoolError as error:
        yield Line("bad", "common inbox", _text(error))
    finally:  # a folder of daemons is not empty; one of another user would keep them from starting
        disk.remove_folder(folder)
        disk.remove_folder(claims)


def _text(error: Exception) -> str:
    hint = getattr(error, "hint", "")
    return printable(f"{error} ({hint})" if hint else str(error))
