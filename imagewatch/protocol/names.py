"""The grammar of file names in the inbox: what is a prompt, whose is an image, who is still writing. Pure.

Rules, from the folder protocol: a prompt ends in exactly ``.prompt.txt`` and does not begin with ``.``, ``~``
or ``#``. The images of ``cat.prompt.txt`` are ``cat.png`` and then ``cat.1.png``, ``cat.2.jpg``, … in number
order, with any ending of an image; never a wildcard. A numbered name that is the plain image of another prompt
(``cat.1.png`` beside ``cat.1.prompt.txt``) belongs to that prompt alone. Two names are the same when only the way
differs in which their accents are composed: macOS takes letters apart, others do not. Files with other names that may
be meant for a prompt (``cat-2.png``, ``Cat.png``, ``cat.final.jpg``) are known for it, but are not its images.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.protocol.image_kinds import IMAGE_ENDINGS, has_image_ending
from imagewatch.protocol.similar_names import base_names, caseless, is_called_copy, is_leftover

if TYPE_CHECKING:
    from collections.abc import Container, Iterable

SUFFIX = ".prompt.txt"
RECEIPT, ERROR = ".receipt.toml", ".error.toml"
"""How the names of result files end."""
CLAIMS = ".imagewatch"
"""Name of the folder inside the inbox that holds the originals of claimed jobs."""
CLAIM_NOTE = "claim.json"
"""Name of the file in the folder of a claim of a common inbox that lists what was claimed."""
NOTES = ".imagewatch-mcp"
"""Name of the folder, inside a folder of the inbox, in which ``imagewatch mcp`` notes the names that it has used."""
STATUS_TEXT, STATUS_JSON = "imagewatch-status.txt", "imagewatch-status.json"
"""Names of the status files for users: never a prompt, and never meant for one, if they are in the inbox."""
ANSWERS = "answers"
"""Name of the folder inside the state folder for responses and their images."""
MOST_SIMILAR = 40
"""So many files that may be meant for a prompt are opened: with more beside it, it is refused."""
_START, _MOST_STARTS = 3, 1000
"""So many characters of the names of prompts are compared first, unless they begin in more different ways."""
NAME_MAX = 255
"""Longest file name in bytes on every file system we know."""
_WIDEST = 4
"""Most bytes of one character in UTF-8."""

_NUMBERED = re.compile(r"(?P<stem>.+)\.(?P<number>[0-9]{1,9})", re.DOTALL)

_ENDINGS = "|".join(sorted(map(re.escape, IMAGE_ENDINGS)))
# How editors and transfer tools name a file while they write it; the group is its final name.
_WAYS = (
    r"\.(.+)\.sw[a-z]",  # vim, nano: from opening to closing
    r"\.(.+)\.kate-swp",
    r"\.~lock\.(.+)#",  # LibreOffice
    r"~\$(.+)",  # Office; of a longer name the first two characters are missing
    r"\.#(.+)",  # Emacs: a dangling link while the buffer is modified
    r"#(.+)#",  # Emacs: auto-save
    r"(.+)___jb_(?:tmp|old)___",  # JetBrains safe write
    r"(.+)\.sb-[0-9a-f]{8}-\w{6}",  # Cocoa safe save
    r"\.syncthing\.(.+)\.tmp",
    r"~syncthing~(.+)\.tmp",
    r"\.unison\.(.+)\.[0-9a-f]{32}\.unison\.tmp",
    r"\.(.+)\.~[0-9a-f]+",  # Nextcloud, ownCloud
    r"\.(.+)\.[A-Za-z0-9]{6}",  # rsync
    rf"(.+)\.(?!(?i:{_ENDINGS})\.)[A-Za-z0-9]{{4,16}}\.partial",  # rclone; not cat.webp.partial
    r"(.+?)(?:\.ocTransferId[0-9]+)?\.(?:partial~?|part|filepart|crdownload|opdownload|download|aria2|!sync|tmp)",
    r"(.+)\.(?=[a-z]*[A-Z0-9])[A-Za-z0-9]{6}",  # GLib, Qt; not cat.png.backup
    r"\.in\.(.+)\.",  # lftp, FTP servers
)
_IN_FLIGHT = re.compile("|".join(f"(?:{way})" for way in _WAYS), re.DOTALL)
_MAY_BE_IN_FLIGHT = re.compile(
    r"[.~#]|.*(?:___|\.(?:sb-[^.]*|[A-Za-z0-9]{6}|partial~?|part|filepart|[a-z]*download|aria2|!sync|tmp))\Z", re.DOTALL
)
"""What is asked first, of a hundred thousand names that are all something else: each of the ways matches it."""
_LOCKS = (".{}.swp", ".~lock.{}#", ".#{}", ".{}.kate-swp")
_TEXT = re.compile(r"\.txt$|pro?mp?t.*\.(?:text|md|rtf|doc|docx|odt)$|\.pro?mp?t$|\.pro?mp?t\.txt\b", re.IGNORECASE)
_LEFT_BEHIND = ("~", ":Zone.Identifier")  # an editor's backup, a mark of Windows


@dataclass
class Siblings:
    """One prompt and the files beside it that belong to it.

    Attributes:
        stem: The prompt's name without ``.prompt.txt``.
        images: Its sibling images in the order in which they are sent.
        busy: Names that show that an editor or a transfer is writing this prompt, or on what may be meant for it.
        coming: Images that are not there, but on their way by one of the busy names.
        uncertain: Other files that may be meant for it, by their names (``cat-2.png``, ``cat.final.jpg``, ``cat.log``).
            Their content decides whether they can be images.
    """

    stem: str
    images: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)
    coming: list[str] = field(default_factory=list)
    uncertain: list[str] = field(default_factory=list)

    @property
    def prompt(self) -> str:
        """The prompt's file name."""
        return self.stem + SUFFIX

    @property
    def names(self) -> tuple[str, ...]:
        """The prompt and everything that must be unchanged with it."""
        return (self.prompt, *self.images)


def stem_of(name: str) -> str | None:
    """Return the stem of a prompt's file name, or None when the name is not a prompt's."""
    if not name.endswith(SUFFIX) or name[0] in ".~#":
        return None
    return name[: -len(SUFFIX)]


def near_miss(name: str) -> bool:
    """Return whether this name may have been meant as a prompt, although it is none.

    Any visible ``.txt`` is one: a text in a folder of prompts is there for a reason.
    """
    if stem_of(name) is not None or suffix_of(name) in IMAGE_ENDINGS or name == STATUS_TEXT:
        return False
    if name.startswith(".") != (name == SUFFIX) or name.endswith(_LEFT_BEHIND):
        return False
    if name[:1] in {"~", "#"}:
        return name.endswith(SUFFIX) and final_name(name) is None
    return bool(_TEXT.search(name))


@functools.lru_cache(maxsize=16)  # of one name it is asked several times in a row, and some names take long
def final_name(name: str) -> str | None:
    """Return the name to which a temporary or lock file belongs, or None."""
    if not _MAY_BE_IN_FLIGHT.match(name):
        return None
    match = _IN_FLIGHT.fullmatch(name)
    return match[match.lastindex or 0] if match else None


def locks(name: str) -> tuple[str, ...]:
    """Return the names by which editors show that a file is open, as far as they follow from its own."""
    return tuple(lock.format(name) for lock in _LOCKS)


def spellings(name: str) -> tuple[str, ...]:
    """Return the ways in which the accents of a name may be composed, its own first."""
    return (name, *(unicodedata.normalize(form, name) for form in ("NFC", "NFD")))


def suffix_of(name: str) -> str:
    """Return what follows the last dot, in lower case; an empty string without a dot."""
    return name.rpartition(".")[2].lower() if "." in name else ""


def is_image_name(name: str) -> bool:
    """Return whether a name is that of an image, of a kind the endpoint takes or not."""
    return suffix_of(name) in IMAGE_ENDINGS and name[0] not in ".~#"


def may_be_meant(name: str) -> bool:
    """Return whether a file may be meant as an image of some prompt, by its name.

    Prompts, hidden files, and what editors and transfers leave may not.
    """
    if name[:1] in ".~#" or stem_of(name) is not None or is_leftover(name) or name in {STATUS_TEXT, STATUS_JSON}:
        return False
    return has_image_ending(name) or final_name(name) is None


class CaselessStems:
    """Which prompts a folder has, however their names are written in upper and lower case."""

    __slots__ = ("_has_dots", "_known", "_starts")

    def __init__(self) -> None:
        self._known: set[str] = set()
        self._starts: set[str] | None = set()  # how their names begin; None if in too many ways
        self._has_dots = False

    def add(self, stem: str) -> None:
        """Note that there is a prompt."""
        like = caseless(stem)
        self._known.add(like)
        self._has_dots = self._has_dots or "." in like
        if self._starts is not None:
            self._starts.add(like[:_START])
            if len(self._starts) > _MOST_STARTS:
                self._starts = None

    def may_have(self, name: str) -> bool:
        """Return whether there can be a prompt for which a file of this name is meant; most files end here."""
        if self._starts is None or is_called_copy(name):
            return True
        like = caseless(name)
        return any(like[:length] in self._starts for length in range(1, _START + 1))

    def __contains__(self, base: str) -> bool:
        """Return whether there is a prompt of which ``caseless`` returns this."""
        return (self._has_dots or "." not in base) and base in self._known


class SiblingIndex:
    """The files beside the prompts of one folder, and to which prompt each belongs.

    Args:
        stems: All stems of the folder. It is only asked whether it has one.
        known: The same stems, however they are written. Without, nothing is noted that only may be meant for one.
    """

    def __init__(self, stems: Container[str], known: CaselessStems | None = None) -> None:
        self._stems = stems
        self._known = known
        self._own: dict[str, list[str]] = {}
        self._exactly: dict[str, list[str]] = {}  # files that may be meant, by the stem as it is written
        self._meant: dict[str, list[str]] = {}  # others, by what is left of the stem if its writing does not matter
        self._headless: dict[str, list[str]] = {}  # marks of Office, by what they have of the prompt's name

    def add(self, name: str) -> bool:
        """Sort in a name that is no prompt's; return whether it belongs to a prompt for sure."""
        stem = self.owner(name)
        if stem is not None:
            self._own.setdefault(stem, []).append(name)
        elif name.startswith("~$"):
            self._headless.setdefault(name[2:], []).append(name)
        elif self._known is not None:
            self._add_meant(name, self._known)
        return stem is not None

    def _add_meant(self, name: str, known: CaselessStems) -> None:
        """Note a file, or the mark of a program that writes one, for the prompt for which it is meant most likely."""
        target = name
        if not may_be_meant(name):
            target = final_name(name) or ""
            if not has_image_ending(target):
                return
        for base in base_names(target) if known.may_have(target) else ():
            if (like := caseless(base)) not in known:
                continue
            stem = self._find(base)
            files = self._meant.setdefault(like, []) if stem is None else self._exactly.setdefault(stem, [])
            if len(files) < MOST_SIMILAR:
                files.append(name)
            return

    def complete(self) -> None:
        """Note that everything was added: less has to be remembered."""
        self._known = None

    def may_be_for(self, name: str) -> bool:
        """Return whether a file may be meant for a prompt that is here, however that is written in its accents."""
        return may_be_meant(name) and any(self._find(base) is not None for base in base_names(name))

    def owner(self, name: str) -> str | None:
        """Return the stem to which a file belongs, as its image or as the mark of a program that writes it, or None."""
        if is_image_name(name):
            found = self._image(name)
            return found[0] if found else None
        target = final_name(name)
        if not target:
            return None
        if (stem := stem_of(target)) is not None:
            return self._find(stem)
        found = self._image(target) if suffix_of(target) in IMAGE_ENDINGS else None
        return found[0] if found else None

    def _find(self, stem: str) -> str | None:
        """Return a stem as it is written here, however its accents are composed."""
        if stem in self._stems:
            return stem
        return None if stem.isascii() else next((way for way in spellings(stem) if way in self._stems), None)

    def _image(self, name: str) -> tuple[str, int] | None:
        """Return whose image a name is, and its number (-1 for the plain one, which comes before ``cat.0.png``)."""
        base = name.rpartition(".")[0]
        if (stem := self._find(base)) is not None:
            return stem, -1
        match = _NUMBERED.fullmatch(base)
        if match and (stem := self._find(match["stem"])) is not None:
            return stem, int(match["number"])
        return None

    def has(self, stem: str) -> bool:
        """Return whether there may be an image of a prompt, a file meant for it, or a program that writes it."""
        if stem in self._own or stem in self._exactly or self._headless:
            return True
        return bool(self._meant) and caseless(stem) in self._meant

    def of(self, stem: str) -> Siblings:
        """Return what was siblings for one prompt."""
        siblings = Siblings(stem)
        names = self._own.get(stem, ())
        numbered = sorted((found[1], name) for name in names if is_image_name(name) and (found := self._image(name)))
        siblings.images = [name for _, name in numbered]
        siblings.busy = [name for name in names if not is_image_name(name)]
        for cut in (1, 2) if self._headless else ():
            siblings.busy += self._headless.get(siblings.prompt[cut:], ())
        for mark in siblings.busy:
            target = final_name(mark) or ""
            is_image = stem_of(target) is None and suffix_of(target) in IMAGE_ENDINGS
            if is_image and target not in (*siblings.names, *siblings.coming):
                siblings.coming.append(target)
        for name in sorted([*self._exactly.get(stem, ()), *self._meant.get(caseless(stem), ())]):
            (siblings.uncertain if may_be_meant(name) else siblings.busy).append(name)
        return siblings


def group(names: Iterable[str]) -> dict[str, Siblings]:
    """Sort the names of one folder into prompts.

    Args:
        names: All file names of one folder, in any order.

    Returns:
        For each stem, what was siblings for it.
    """
    listed = list(names)
    stems = dict.fromkeys(stem for name in listed if (stem := stem_of(name)) is not None)
    known = CaselessStems()
    for stem in stems:
        known.add(stem)
    siblings = SiblingIndex(stems, known)
    for name in listed if stems else ():
        if stem_of(name) is None:
            siblings.add(name)
    return {stem: siblings.of(stem) for stem in stems}


def tagged(name: str, stem: str, tag: str) -> str:
    """Return a file name with a job's short id in it, for when the plain name exists.

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
    # Cut between characters: half a UTF-8 sequence would be a name that no tool can type. None is less than a byte.
    head = head[: max(room, 0)]
    while head and len(_encoded(head)) > room:
        head = head[:-1]
    return head + tail


def fits(name: str) -> bool:
    """Return whether a name is short enough for a file."""
    return len(_encoded(name)) <= NAME_MAX


def _encoded(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")
