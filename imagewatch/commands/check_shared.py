"""``imagewatch check --shared``: whether two hosts can process one inbox together."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from imagewatch.commands.check_settings import Line
from imagewatch.config.locate import is_hidden
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
    folder, kinds, what = os.path.join(claims, FOLDER), Kinds(), "file system"
    kinds.refresh()
    kind = kinds.of(inbox)
    if not os.path.lexists(inbox) and not is_hidden(inbox):  # to create it would hide that the mount is missing
        yield Line("bad", what, printable(f"the inbox does not exist: {inbox} (mount the shared file system)"))
        return
    try:
        require_tried(inbox, kind)
        disk.tops.open(inbox)
        disk.make_folder(claims)
        disk.tops.open(claims)
        FolderProbes(disk, claims).run()
        yield Line("ok", what, f"{kind or 'unknown'}: new files, renames, locks: {printable(inbox)}")
        what = "common inbox"
        disk.make_folder(folder)
        for result in TwoHosts(disk, folder).run():
            yield Line(*result)
    except (ConfigError, SpoolError, OSError) as error:
        yield Line("bad", what, _text(error))
    finally:  # a folder of daemons is not empty; one of another user would keep them from starting
        for path in (folder, claims):
            with contextlib.suppress(SpoolError):
                disk.remove_folder(path)


def _text(error: Exception) -> str:
    hint = getattr(error, "hint", "")
    return printable(f"{error} ({hint})" if hint else str(error))
