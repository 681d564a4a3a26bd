"""Which name a file would need to be a prompt. Pure.

People see names without their endings, programs add endings, and copies get numbers: ``cat.prompt.txt.txt``,
``cat.Prompt.TXT``, ``cat.prompt (1).txt``. Such a file is not claimed. Its sender needs the right name.
"""

from __future__ import annotations

import re

from imagewatch.protocol.names import SUFFIX, final_name, fits, stem_of

_PLAIN = re.compile(r"\.(?:txt|text|md|partial)\Z", re.IGNORECASE)
_KEPT = re.compile(r"\.(?:bak|backup|old|orig|save)\Z", re.IGNORECASE)
_FORMATTED = re.compile(r"\.(?:rtf|docx?|odt)\Z", re.IGNORECASE)
_WORD = re.compile(r"(?:\A|[ ._-]+)pro?mp?t\Z", re.IGNORECASE)
_ANYWHERE = re.compile(r"(?<![a-z])pro?mp?t(?![a-z])", re.IGNORECASE)
_COPY = re.compile(r" ?\([0-9]{1,3}\)\Z| - (?:Copy|Kopie|Copie|Copia)\Z", re.IGNORECASE)
_MOST_PARTS = 6
"""So many endings and additions are taken off a name at most."""


def right_name(name: str) -> str | None:
    """Return the name of a prompt that this file most likely should have, or None if it has to be chosen.

    Args:
        name: The name of a file that is not a prompt's.
    """
    base = (final_name(name) or name).strip(" .").lstrip("~#")
    added = ""
    for _ in range(_MOST_PARTS):
        if copy := _COPY.search(base):
            base, added = base[: copy.start()], copy[0] + added
            continue
        endings = (kind.search(base) for kind in (_PLAIN, _FORMATTED, _KEPT, _WORD))
        ending = next(filter(None, endings), None)
        if ending is None:
            break
        base = base[: ending.start()].rstrip(" .")
    stem = base.rstrip(" ._-")
    found = stem + added + SUFFIX
    if not stem or found == name or stem_of(found) is None or not fits(found):
        return None
    return found


def has_hidden_ending(name: str) -> bool:
    """Return whether a name ends like a prompt's and then in another ``.txt``, which Windows does not show."""
    lower = name.lower()
    return lower.endswith(SUFFIX + ".txt")


def is_called_prompt(name: str) -> bool:
    """Return whether a name says that the file is a prompt, and not an earlier version of one."""
    return _ANYWHERE.search(name) is not None and _KEPT.search(name) is None


def is_formatted(name: str) -> bool:
    """Return whether a file is that of a word processor, so that another name is not enough."""
    return _FORMATTED.search(name) is not None
