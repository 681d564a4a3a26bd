"""The frozen values that a job is made of, and how they are written to disk. Pure.

A *job* is a claimed prompt with its images; an *attempt* is one call for it. ``Claim``, ``Sent`` and
``Decision`` are what the journal has of a job; their field names are its format.
"""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

import msgspec

from imagewatch.protocol.names import SUFFIX

Charged = Literal["yes", "no", "unknown"]
Destination = Literal["outbox", "errors", "discarded"]
T = TypeVar("T")
_RENAMED = {"door": "destination", "document": "result_file", "away": "discarded"}
"""Keys and values of an earlier ``decision.json``."""


class Dropped(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt and its images as they were dropped. The scan finds it, the claim records it, the request sends it.

    Attributes:
        folder: Folder below the inbox, with ``/``; empty for the inbox itself. Its first part may name a preset.
        stem: The prompt's name without ``.prompt.txt``.
        images: Names of its input images, in the order in which they are sent.
        declared: Whether the prompt names its images itself; None if that is not known.
        unused: Files beside the prompt that may be meant as its images and are not used. The prompt is refused for
            them; they stay in the inbox.
    """

    folder: str
    stem: str
    images: tuple[str, ...] = ()
    declared: bool | None = False
    unused: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[str, str]:
        """Folder and stem, by which the prompt is known in memory."""
        return self.folder, self.stem

    @property
    def prompt(self) -> str:
        """File name of the prompt."""
        return self.stem + SUFFIX

    @property
    def source(self) -> str:
        """Path of the prompt below the inbox."""
        return f"{self.folder}/{self.prompt}" if self.folder else self.prompt

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all its files, the prompt first."""
        return (self.prompt, *self.images)

    @property
    def originals(self) -> tuple[str, ...]:
        """The same in the order in which they are moved: the prompt last, as it is what counts."""
        return (*self.images, self.prompt)


class Claim(Dropped, frozen=True, kw_only=True):
    """What was claimed, written before the prompt leaves the inbox.

    Attributes:
        job: Random id, 16 hexadecimal digits.
        size: Size of the prompt file, bytes.
        mtime_ns: Modification time of the prompt file, nanoseconds since the epoch.
        files: Inode, size in bytes (-1 of what is no regular file) and modification time in nanoseconds of each file
            as the scan accepted it, by name.
        folder_inode: Inode of the folder; 0 for the inbox itself, and where it is not known.
        at: Wall-clock time of the claim, seconds since the epoch.
        owner: Name of the user to whom the prompt belongs, else the number; empty where it is not known.
    """

    job: str
    size: int = 0
    mtime_ns: int = 0
    files: dict[str, tuple[int, int, int]] = {}
    folder_inode: int = 0
    at: float = 0.0
    owner: str = ""

    @property
    def tag(self) -> str:
        """The short id that goes into a name if the plain name exists."""
        return self.job[:4]


class Input(msgspec.Struct, frozen=True, kw_only=True):
    """One input image as it was sent.

    Attributes:
        file: Its name.
        mime: Its type, by content.
        bytes: Its size.
        width: In pixels, as stored.
        height: Likewise.
        sha256: Of its content.
        orientation: How it is to be turned when it is shown, by its EXIF data, 1 to 8; 1 is not at all. It is
            sent as stored.
    """

    file: str
    mime: str
    bytes: int
    width: int
    height: int
    sha256: str
    orientation: int = 1


class Sent(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt, written before the first byte of the request leaves.

    Attributes:
        fields: The JSON body without ``prompt`` and ``input_images``.
        contents: Hash of each file as dropped, by name; the prompt file is one of them.
        endpoint: The address called.
        at: Wall-clock time, seconds since the epoch.
    """

    prompt: str
    prompt_sha256: str
    fields: dict[str, Any]
    inputs: tuple[Input, ...]
    contents: dict[str, str]
    endpoint: str
    at: float

    @property
    def asked(self) -> int:
        """Number of images asked for."""
        return int(self.fields.get("n", 1))


class Head(msgspec.Struct, frozen=True, kw_only=True):
    """How a response began; the first line of its file.

    Attributes:
        status: HTTP status, or 0 when the request was not sent completely.
        headers: Headers worth keeping, lower-case names.
        at: Wall-clock time of the first byte, seconds since the epoch.
        reason: Why the request was not sent completely, as text.
        counts: Whether it counts towards ``retry.attempts`` although it was not sent completely.
        framed: Whether the body is in frames, with its images in files of their own.
    """

    status: int
    headers: dict[str, str] = {}
    at: float = 0.0
    reason: str = ""
    counts: bool = False
    framed: bool = False


class Tail(msgspec.Struct, frozen=True, kw_only=True):
    """How a response ended; the last line of its file.

    Attributes:
        complete: Whether the body came whole.
        reason: Why not, as text.
        at: Wall-clock time of the end, seconds since the epoch.
    """

    complete: bool
    reason: str = ""
    at: float = 0.0


class Move(msgspec.Struct, frozen=True, kw_only=True):
    """One file to be put into a folder that others read.

    Attributes:
        source: Where it is: ``state/NAME`` or ``claim/NAME``.
        name: Its name there.
    """

    source: str
    name: str


class Decision(msgspec.Struct, frozen=True, kw_only=True):
    """How a job ends: where its files go, which files, and the result file.

    Attributes:
        destination: ``outbox``, ``errors``, or ``discarded``: nothing is published, and the originals are removed,
            because a finished job had the same.
        moves: What goes there, in this order.
        name: Name of the result file, which goes last.
        result_file: Its whole text.
        facts: What is logged of it.
        keep: Originals for the archive, when the destination is ``outbox``.
        mtime_ns: What the prompt gets as its mtime, nanoseconds since the epoch; 0: the present.
    """

    destination: Destination
    moves: tuple[Move, ...] = ()
    name: str = ""
    result_file: str = ""
    facts: dict[str, Any] = {}
    keep: tuple[Move, ...] = ()
    mtime_ns: int = 0


def dump(value: msgspec.Struct) -> bytes:
    """Return a record as one line of JSON."""
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # a lone surrogate, by which Python carries the bytes of a file name that is not UTF-8
        return json.dumps(msgspec.to_builtins(value), separators=(",", ":")).encode()


def load(raw: bytes, kind: type[T]) -> T:
    """Return the record that ``dump`` wrote.

    Raises:
        ValueError: It is not one (a file damaged from outside).
    """
    return msgspec.convert(json.loads(raw), kind)


def load_decision(raw: bytes) -> Decision:
    """Return a decision, also one that version 0.1.0 wrote with other names.

    Raises:
        ValueError: It is not one.
    """
    found = json.loads(raw)
    if isinstance(found, dict) and "door" in found:
        found = {_RENAMED.get(name, name): value for name, value in found.items()}
        found["destination"] = _RENAMED.get(found["destination"], found["destination"])
    return msgspec.convert(found, Decision)
