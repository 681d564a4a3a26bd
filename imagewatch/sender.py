"""Dropping prompts the right way, and waiting for what becomes of them.

Everything is staged in a hidden folder inside the inbox, checked there, and then renamed into place: images first, the
prompt last, declaring its images, so that it is taken at once and never half-written. Only the folders are needed,
neither the key nor the state folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import unicodedata
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import tomli_w

from imagewatch import prompt as prompts
from imagewatch.documents import facts
from imagewatch.durable import Disk, ours
from imagewatch.errors import BadRequest, Problem
from imagewatch.names import SUFFIX
from imagewatch.request import Files, build, open_plain, read_image
from imagewatch.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from imagewatch.config import Config, Folders

_COPY_BYTES = 1 << 20
_MOST_WORDS = 40
_MOST_DOCUMENT = 4 << 20


@dataclass(frozen=True)
class Wish:
    """One prompt that somebody wants to be made.

    Attributes:
        text: What is asked for.
        options: Front matter: what is not None is written.
        images: Paths of input images, in order.
    """

    text: str
    options: Mapping[str, Any]
    images: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, raw: bytes, options: Mapping[str, Any], images: tuple[str, ...], folder: str) -> Wish:
        """Read a prompt file; options given beside it win over its front matter.

        Args:
            raw: The file.
            options: What was said beside it.
            images: Images given beside it.
            folder: Where the images are that it names itself.

        Raises:
            BadRequest: It cannot be read.
        """
        parsed = prompts.parse(raw)
        own = {name: getattr(parsed.front, name) for name in parsed.front.__struct_fields__}
        named = own.pop("input_images") or ()
        given = {name: value for name, value in options.items() if value is not None}
        return cls(parsed.text, {**own, **given}, images or tuple(os.path.join(folder, name) for name in named))


@dataclass
class Made:
    """What became of a prompt.

    Attributes:
        source: Its path below the inbox.
        prompt: Its text.
        door: ``outbox`` or ``errors`` once it is over, else empty.
        document: Path of the receipt or error file.
        images: Paths of the pictures.
        facts: What the document says.
    """

    source: str
    prompt: str
    door: str = ""
    document: str = ""
    images: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def stem(self) -> str:
        """The prompt's name, without folder and ending."""
        return os.path.basename(self.source)[: -len(SUFFIX)]


def stem_for(text: str) -> str:
    """Return a name for a prompt: its first words, and a few random digits so that it is nobody else's."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain)[:_MOST_WORDS].strip("-")
    return f"{words or 'prompt'}-{secrets.token_hex(3)}"


def deliver(wish: Wish, config: Config, folder: str, stem: str) -> Made:
    """Put a prompt and copies of its images into the inbox.

    Args:
        wish: What is wanted.
        config: Folders, presets and limits.
        folder: Folder below the inbox, or an empty string.
        stem: The prompt's name without ending.

    Raises:
        BadRequest: The daemon would refuse it; nothing was put into the inbox.
        SpoolError: The inbox cannot be written, or has the name already.
    """
    disk = Disk()
    inbox = config.folders.inbox
    target = os.path.join(inbox, folder)
    source = os.path.join(folder, stem + SUFFIX)
    stage = os.path.join(inbox, f".submit-{secrets.token_hex(6)}")
    disk.make_folder(target, mode=0o777)
    disk.make_folder(stage)
    try:
        names = [_copied(disk, path, stage, stem, number) for number, path in enumerate(wish.images)]
        with disk.writing(os.path.join(stage, stem + SUFFIX), mode=_mode()) as file:
            file.write(_composed(wish, names))
        _check(Files(stage, folder, stem, tuple(names)), config)
        for name in (*names, stem + SUFFIX):
            _place(disk, os.path.join(stage, name), os.path.join(target, name))
        disk.sync_folder(target)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(stage)
    return Made(source, wish.text)


def _copied(disk: Disk, path: str, stage: str, stem: str, number: int) -> str:
    """Copy an image into the stage; return the name it gets there."""
    path = os.path.realpath(path)  # a link of the sender's own, unlike one in the inbox
    kind = read_image(path, path).mime.rpartition("/")[2]
    name = f"{stem}.{kind}" if number == 0 else f"{stem}.{number}.{kind}"
    with open_plain(path, path) as image, disk.writing(os.path.join(stage, name), mode=_mode()) as copy:
        shutil.copyfileobj(image, copy, _COPY_BYTES)
    return name


def _composed(wish: Wish, names: Sequence[str]) -> bytes:
    options = {name: value for name, value in wish.options.items() if value is not None}
    front = tomli_w.dumps({**options, "input_images": list(names)})
    return f"+++\n{front}+++\n{wish.text}\n".encode()


def _check(files: Files, config: Config) -> None:
    """Refuse what the daemon would refuse.

    Without the daemon's own configuration (only folders are known) its presets cannot be looked up.
    """
    try:
        build(files, config)
    except BadRequest as error:
        known = bool(config.source)
        problems = [problem for problem in error.problems if known or problem.field != "preset"]
        if problems:
            raise BadRequest(problems) from None


def _place(disk: Disk, source: str, target: str) -> None:
    try:
        with ours(target, "put the file into the inbox"):
            disk.rename(source, target)
    except Exception as error:
        if isinstance(error.__cause__, FileExistsError):
            problem = Problem(printable(os.path.basename(target)), "the inbox has a file of this name", "use another")
            raise BadRequest([problem]) from None
        raise


def _mode() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask


class Waiting:
    """Waits for receipts and error files.

    Args:
        folders: Where they appear.
        jobs: What was dropped.
    """

    def __init__(self, folders: Folders, jobs: Sequence[Made]) -> None:
        self._folders = folders
        self._jobs = jobs
        self._before = {path for job in jobs for _, path in self._documents(job)}

    def look(self) -> list[Made]:
        """Look once; return what is not over yet."""
        for job in self._jobs:
            if not job.door:
                self._look_for(job)
        return [job for job in self._jobs if not job.door]

    def untouched(self) -> int:
        """Return how many prompts still lie in the inbox."""
        return sum(os.path.lexists(os.path.join(self._folders.inbox, job.source)) for job in self._jobs if not job.door)

    def _look_for(self, job: Made) -> None:
        for door, path in self._documents(job):
            if path in self._before:
                continue
            try:
                with open(path, "rb") as file:
                    document = facts(file.read(_MOST_DOCUMENT).decode())
            except (OSError, ValueError):
                continue  # a stranger's file; ours appear whole
            if document.get("source") == job.source:
                job.door, job.document, job.facts = door, path, document
                folder = os.path.dirname(path)
                job.images = [os.path.join(folder, str(image["file"])) for image in document.get("images", [])]
                return

    def _documents(self, job: Made) -> Iterator[tuple[str, str]]:
        """Yield what may be the document of a prompt: a name that is taken gets the job's id in it."""
        folder = os.path.dirname(job.source)
        for door, top, ending in (
            ("outbox", self._folders.outbox, ".receipt.toml"),
            ("errors", self._folders.errors, ".error.toml"),
        ):
            place = os.path.join(top, folder)
            with contextlib.suppress(OSError):
                for name in sorted(os.listdir(place)):
                    if name.startswith(job.stem + ".") and name.endswith(ending):
                        yield door, os.path.join(place, name)
