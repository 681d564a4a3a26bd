"""The grammar of file names in the inbox: what is a prompt, whose is an image, who is still writing. Pure.

Rules, from the folder protocol: a prompt ends in exactly ``.prompt.txt`` and does not begin with ``.``, ``~``
or ``#``. The images of ``cat.prompt.txt`` are ``cat.png`` and then ``cat.1.png``, ``cat.2.jpg``, … in number
order; never a wildcard. A numbered name that is the plain image of another prompt (``cat.1.png`` beside
``cat.1.prompt.txt``) belongs to that prompt alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.images import FOREIGN_SUFFIXES, IMAGE_SUFFIXES

if TYPE_CHECKING:
    from collections.abc import Iterable

SUFFIX = ".prompt.txt"
CLAIMS = ".imagewatch"
"""Name of the folder inside the inbox that holds the originals of claimed jobs."""
PAID = "paid"
"""Name of the folder inside the state folder for answers that were paid for and gave no picture."""
NAME_MAX = 255
"""Longest file name in bytes on every file system we know."""
_WIDEST = 4
"""Most bytes of one character in UTF-8."""

_PICTURES = IMAGE_SUFFIXES | FOREIGN_SUFFIXES
_NUMBERED = re.compile(r"(?P<stem>.+)\.(?P<number>[0-9]{1,9})", re.DOTALL)

# What editors and transfer tools call a file while they are at work on it; the group is the name it will have.
_IN_FLIGHT = tuple(
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\.(.+)\.sw[a-z]",  # vim: from opening to closing
        r"\.(.+)\.kate-swp",
        r"\.~lock\.(.+)#",  # LibreOffice
        r"~\$(.+)",  # Office
        r"\.#(.+)",  # Emacs: a dangling link while the buffer is modified
        r"#(.+)#",  # Emacs: auto-save
        r"(.+)___jb_(?:tmp|old)___",  # JetBrains safe write
        r"(.+)\.sb-[0-9a-f]{8}-\w{6}",  # Cocoa safe save
        r"\.syncthing\.(.+)\.tmp",
        r"~syncthing~(.+)\.tmp",
        r"\.(.+)\.~[0-9a-f]+",  # Nextcloud, ownCloud
        r"\.(.+)\.[A-Za-z0-9]{6}",  # rsync
        rf"(.+)\.(?!(?i:{'|'.join(_PICTURES)})\.)[A-Za-z0-9]{{4,16}}\.partial",  # rclone; not cat.webp.partial
        r"(.+)\.(?:partial|part|filepart|crdownload|download|aria2|tmp)",
        r"\.in\.(.+)\.",  # lftp, FTP servers
    )
)
_NEAR_MISS = re.compile(r"prompt.*\.(?:txt|text|md|rtf|doc|docx|odt)$|\.prompt$|\.prompt\.txt\b", re.IGNORECASE)


@dataclass
class Dropped:
    """One prompt and what lies beside it for it.

    Attributes:
        stem: The prompt's name without ``.prompt.txt``.
        images: Its sibling images in the order in which they are sent.
        foreign: Siblings of a kind the endpoint does not take (``cat.gif``).
        busy: Names that show that an editor or a transfer is at work on this stem.
    """

    stem: str
    images: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """The prompt's file name."""
        return self.stem + SUFFIX

    @property
    def names(self) -> tuple[str, ...]:
        """The prompt and everything that must be quiet with it."""
        return (self.prompt, *self.images, *self.foreign)


def stem_of(name: str) -> str | None:
    """Return the stem of a prompt's file name, or None when the name is not a prompt's."""
    if not name.endswith(SUFFIX) or name[0] in ".~#":
        return None
    return name[: -len(SUFFIX)]


def near_miss(name: str) -> bool:
    """Tell whether somebody probably meant this name to be a prompt, though it is none."""
    return name[:1] not in ".~#" and stem_of(name) is None and bool(_NEAR_MISS.search(name))


def in_flight(name: str) -> str | None:
    """Return the name that a temporary or lock file stands for, or None."""
    for pattern in _IN_FLIGHT:
        if match := pattern.fullmatch(name):
            return match[1]
    return None


def suffix_of(name: str) -> str:
    """Return what follows the last dot, in lower case; an empty string without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def _owner(name: str, stems: dict[str, Dropped]) -> tuple[Dropped, int] | None:
    """Return whose image a name is, and its number (-1 for the plain one, which comes before ``cat.0.png``)."""
    base = name.rpartition(".")[0]
    if base in stems:
        return stems[base], -1
    match = _NUMBERED.fullmatch(base)
    if match and match["stem"] in stems:
        return stems[match["stem"]], int(match["number"])
    return None


def group(names: Iterable[str]) -> dict[str, Dropped]:
    """Sort the names of one folder into prompts, in one pass over them.

    Args:
        names: All file names of one folder, in any order.

    Returns:
        For each stem, what was dropped for it.
    """
    listed = list(names)
    stems = {stem: Dropped(stem) for name in listed if (stem := stem_of(name)) is not None}
    numbered: list[tuple[str, int, str]] = []
    for name in listed if stems else ():
        if stem_of(name) is not None:
            continue
        suffix = suffix_of(name)
        if suffix in _PICTURES and name[0] not in ".~#":
            if owner := _owner(name, stems):
                kind = owner[0].images if suffix in IMAGE_SUFFIXES else owner[0].foreign
                kind.append(name)
                numbered.append((owner[0].stem, owner[1], name))
        elif (target := in_flight(name)) and (busy := _target_owner(target, stems)):
            busy.busy.append(name)
    order = {(stem, name): number for stem, number, name in numbered}
    for dropped in stems.values():
        dropped.images.sort(key=lambda name: (order[dropped.stem, name], name))
        dropped.foreign.sort()
    return stems


def _target_owner(target: str, stems: dict[str, Dropped]) -> Dropped | None:
    stem = stem_of(target) if target else None
    if stem is not None:
        return stems.get(stem)
    owner = _owner(target, stems) if suffix_of(target) in _PICTURES else None
    return owner[0] if owner else None


def tagged(name: str, stem: str, tag: str) -> str:
    """Return a file name with a job's short id in it, for when the plain name is taken.

    ``cat.prompt.txt`` → ``cat.7f3a.prompt.txt``; ``logo.png`` of the same job → ``logo.7f3a.png``. The result
    fits into ``NAME_MAX`` bytes; the readable part is cut for it, the endings are kept.
    """
    ends = [name.rfind(".", 1)]
    if name.startswith(stem + "."):
        ends.insert(0, len(stem))
    for end in ends:
        tail = f".{tag}{name[end:]}"
        # A tail that leaves no room for a single character is no ending; the head may be cut, not lost.
        if end > 0 and len(_encoded(tail)) <= NAME_MAX - _WIDEST:
            return fitted(name[:end], tail)
    return fitted(name, f".{tag}")


def fitted(head: str, tail: str) -> str:
    """Return ``head + tail``, with ``head`` cut so that the whole fits into ``NAME_MAX`` bytes."""
    room = NAME_MAX - len(_encoded(tail))
    # Cut between characters: half a UTF-8 sequence would be a name that no tool can type.
    while head and len(_encoded(head)) > room:
        head = head[:-1]
    return head + tail


def fits(name: str) -> bool:
    """Tell whether a name is short enough for a file."""
    return len(_encoded(name)) <= NAME_MAX


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
