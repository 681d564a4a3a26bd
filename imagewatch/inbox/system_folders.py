"""Which folders of the inbox are never entered, because systems and tools keep them for themselves. Pure.

A recycle bin holds prompts that a person has deleted, a snapshot holds prompts that were processed long ago, and a
folder of metadata holds no prompt at all. If the daemon entered them, it would pay for what was not asked for.
"""

from __future__ import annotations

import re

HIDDEN = "a hidden folder, which is never entered"
SYSTEM = "a folder of the system (recycle bin, snapshots or metadata), which is never entered"
MARKED = "a folder whose name begins with @, #, ~ or $, which is never entered"

_MARKS = "@#~$"
"""With these the names of most such folders begin, and of hardly any other: ``@Recycle`` (QNAP), ``#recycle`` and
``@eaDir`` (Synology), ``~snapshot`` (NetApp), ``$RECYCLE.BIN`` (Windows), ``@GMT-…`` (shadow copies of Samba)."""

_KNOWN_MARKED = re.compile(
    r"@(?:eadir|recycle|recently-snapshot|tmp|sharesnap|sharebin|__thumb|transcode|gmt-.*)"
    r"|#(?:recycle|snapshot)|~snapshot|\$recycle\.bin|\$extend",
    re.IGNORECASE | re.DOTALL,
)
"""Those that are sure to be a system's, so that it is not worth a line in the log."""

_KNOWN = re.compile(
    r"lost\+found|found\.[0-9]{3}"  # what a check of the file system has found: ext4 and others, Windows
    r"|system volume information"  # Windows
    r"|recycle[rd]?|recycle[ .]?bin|network recycle bin.*"  # Windows until 2003, Samba as often set up, QNAP
    r"|_nas_recycle_.*|trash(?:es|box|[ .]?bin)?"  # Thecus; macOS, Buffalo and others
    r"|files_trashbin|files_versions"  # Nextcloud, ownCloud
    r"|__macosx"  # what an archive made by macOS has beside its files
    r"|network trash folder|temporary items|thevolumesettingsfolder|thefindbycontentfolder",  # macOS on shares
    re.IGNORECASE | re.DOTALL,
)


def why_not_entered(name: str) -> str:
    """Return why a folder with this name is never entered.

    Args:
        name: The name alone, without the folders above.

    Returns:
        ``HIDDEN``, ``SYSTEM`` or ``MARKED``, or an empty string if the folder is entered.
    """
    if name.startswith("."):
        return HIDDEN
    plain = name.rstrip(" .")  # the same name for Windows and Samba
    if _KNOWN.fullmatch(plain) or _KNOWN_MARKED.fullmatch(plain):
        return SYSTEM
    return MARKED if name[:1] in _MARKS and name else ""
