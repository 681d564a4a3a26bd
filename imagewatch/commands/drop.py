"""Dropping prompts the right way.

Prompts and copies of their images are written into the inbox under hidden names, which nobody takes, and checked there.
When all of them are sound they are renamed: the images first, then the prompt, which declares them, so that it
is taken at once and never half-written. Only the folders are needed, neither the key nor the state folder.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import re
import secrets
import shutil
import stat
import time
import unicodedata
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Any

import tomli_w

from imagewatch.commands.wait import Made
from imagewatch.config.locate import is_hidden, refusal
from imagewatch.inbox.system_folders import why_not_entered
from imagewatch.protocol import prompt as prompts
from imagewatch.protocol.names import SUFFIX, group, stem_of
from imagewatch.protocol.request import build, may_be_image, open_plain, read_image, unused_problems
from imagewatch.protocol.values import Dropped
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import closing, ours
from imagewatch.system.errors import BadRequest, Problem, SpoolError
from imagewatch.system.text import printable
from imagewatch.system.untrusted import RefusedError, open_file, own_way

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from typing import Self

    from imagewatch.config.load import Config

_STAGED = ".submit-"
_STALE_SECONDS = 86_400.0
"""Staged files that old belong to nobody any more: the sender was killed."""
_COPY_BYTES = 1 << 20
_MOST_WORDS = 40
_MOST_STEM = 200
"""Longest name of a prompt in bytes: whatever the daemon adds to it for a result, it is never cut."""


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
    def of_file(cls, raw: bytes, path: str, options: Mapping[str, Any], images: tuple[str, ...]) -> Wish:
        """Read a prompt file; what is said beside it wins over what it says itself.

        Its images are those it declares, from its own folder; without, and if it is called like a prompt, those that
        would be its own in an inbox.

        Args:
            raw: The file.
            path: Its path.
            options: What was said beside it.
            images: Images given beside it.

        Raises:
            BadRequest: It cannot be read.
        """
        parsed = prompts.parse(raw)
        own = {name: getattr(parsed.front, name) for name in parsed.front.__struct_fields__}
        declared = own.pop("input_images")
        given = {name: value for name, value in options.items() if value is not None}
        folder, name = os.path.split(os.path.abspath(path))
        if not images:
            names = _siblings(folder, name) if declared is None else declared
            images = tuple(os.path.join(folder, name) for name in names)
        return cls(parsed.text, {**own, **given}, images)


def _siblings(folder: str, name: str) -> Sequence[str]:
    stem = stem_of(name)
    if stem is None:
        return ()
    hint = "name its images by --image, or in its input_images"
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise BadRequest([Problem(name, f"its folder cannot be listed: {error.strerror}", hint)]) from None
    # Where a file system takes other cases or accents for the same, images would be missed, and a text be paid for.
    if name not in names:
        raise BadRequest([Problem(name, "its folder lists no file of exactly this name", hint)])
    dropped = group(names)[stem]
    if problems := unused_problems([name for name in dropped.doubtful if _may_be_image(os.path.join(folder, name))]):
        raise BadRequest(problems)
    return dropped.images


def _may_be_image(path: str) -> bool:
    try:
        return may_be_image(path, os.lstat(path))
    except OSError:
        return False  # gone


def stem_for(text: str) -> str:
    """Return a name for a prompt: its first words, and a few random digits so that it is nobody else's."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain)[:_MOST_WORDS].strip("-")
    return f"{words or 'prompt'}-{secrets.token_hex(3)}"


def require_stem(stem: str) -> None:
    """Make sure that a prompt can have this name.

    Raises:
        BadRequest: It cannot.
    """
    reason = ""
    if "/" in stem or stem_of(stem + SUFFIX) is None or not stem:
        reason = "is not the name of a prompt: no slash, and no dot, ~ or # at its beginning"
    elif printable(stem) != stem:
        reason = "has characters that no terminal can show"
    elif len(stem.encode()) > _MOST_STEM:
        reason = f"is longer than {_MOST_STEM} bytes"
    if reason:
        raise BadRequest([Problem("name", f'"{printable(stem, 60)}" {reason}', "use another")])


def folder_of(name: str, *, recursive: bool) -> str:
    """Return a folder below the inbox as the daemon calls it.

    Args:
        name: What the sender calls it; empty for the inbox itself.
        recursive: Whether the daemon looks into sub-folders.

    Raises:
        BadRequest: The daemon would not look there.
    """
    parts = [part for part in name.split("/") if part]
    reason, hint = "", "name a folder below the inbox, such as poster or 2026/spring"
    if name.startswith("/"):
        reason = "begins at the root"
    elif ".." in parts:
        reason = "leads out of the inbox"
    elif why := next(filter(None, map(why_not_entered, parts)), ""):
        reason = f"is, or is in, {why}"
    elif printable(name) != name:
        reason = "has characters that no terminal can show"
    elif parts and not recursive:
        reason, hint = "is not looked into", "inbox.recursive is false in the configuration"
    if reason:
        raise BadRequest([Problem("folder", f'"{printable(name, 100)}" {reason}', hint)])
    return "/".join(parts)


@dataclass
class _Parcel:
    """One prompt with its images under hidden names: paths in the order in which they are placed."""

    source: str
    text: str = ""
    files: list[tuple[str, str]] = field(default_factory=list)


class Delivery:
    """Prompts on their way into one folder of the inbox: the first is put there when all of them are sound.

    At the end of the block whatever was not put there is removed.

    Args:
        config: Folders, presets and limits.
        folder: Folder below the inbox, or an empty string.
        blind: Only the folders are known, so that the daemon's presets cannot be looked up.

    Attributes:
        unsynced: Why a power cut may still take away what was put there; None if it may not, or nobody can tell.

    Raises:
        SpoolError: The inbox is not there or cannot be written.
    """

    def __init__(self, config: Config, folder: str, *, blind: bool = False) -> None:
        self._config = config
        self._folder = folder
        self._blind = blind
        self._disk = Disk()
        self._tops = self._disk.tops
        self._held = contextlib.ExitStack()
        self.unsynced: SpoolError | None = None
        self._target = self._entered()
        self._mode = self._readable_mode()
        self._parcels: list[_Parcel] = []
        self._remove_stale()

    def __enter__(self) -> Self:
        with ours(self._target, "enter the folder"):
            self._held.enter_context(self._tops.held(self._target))
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            for parcel in self._parcels:
                self._remove(parcel)

    def stage(self, wish: Wish, stem: str) -> None:
        """Write a prompt and copies of its images under hidden names, and check them.

        Args:
            wish: What is wanted.
            stem: The prompt's name without ending.

        Raises:
            BadRequest: The daemon would refuse it, or its name is taken; everything that is wrong.
            SpoolError: The inbox cannot be written.
        """
        parcel = _Parcel(os.path.join(self._folder, stem + SUFFIX))
        self._parcels.append(parcel)
        hidden = _STAGED + secrets.token_hex(8)
        names: list[str] = []
        problems = self._taken(stem + SUFFIX)
        for number, path in enumerate(wish.images, 1):
            try:
                names.append(self._copy(parcel, path, f"{hidden}.{number}", f"{stem}.in{number}"))
            except BadRequest as error:
                problems += error.problems
        if problems:
            raise BadRequest(problems)
        content = _composed(wish, names)
        parcel.text = prompts.parse(content).text
        with self._writing(parcel, hidden + SUFFIX, stem + SUFFIX) as file:
            file.write(content)
        staged = tuple(os.path.basename(path) for path, _ in parcel.files[:-1])
        self._check(Dropped(folder=self._folder, stem=hidden, images=staged, declared=None))

    def place(self) -> Generator[Made, None, None]:
        """Put everything that was staged into the inbox; yield each prompt that is there.

        What has its final name will be paid for, and is yielded before anything else can fail.

        Raises:
            BadRequest: Somebody took a name in this very moment; of this prompt nothing is left in the inbox.
            SpoolError: The inbox cannot be written; nothing is left of this prompt either.
        """
        while self._parcels:
            parcel = self._parcels[0]
            *images, (hidden, prompt) = parcel.files
            for number, (path, final) in enumerate(images):
                self._rename(path, final)
                parcel.files[number] = (final, final)  # to be taken back if the prompt cannot follow
            self._rename(hidden, prompt)
            del self._parcels[0]
            try:
                yield Made(parcel.source, parcel.text)
            finally:  # also of the last one, where the caller is asked to end
                self._sync(self._target)

    def _sync(self, folder: str) -> None:
        """Make names durable, as far as this user may: who can only drop into a folder cannot open it."""
        try:
            self._disk.sync_folder(folder)
        except SpoolError as error:
            if error.code != errno.EACCES:
                self.unsynced = error

    def _rename(self, path: str, final: str) -> None:
        try:
            with ours(final, "put the file into the inbox"):
                self._disk.rename(path, final)
        except SpoolError as error:
            if self._has_arrived(path, final):
                return
            if isinstance(error.__cause__, FileExistsError):
                raise BadRequest(self._taken(os.path.basename(final))) from None
            raise

    def _has_arrived(self, path: str, final: str) -> bool:
        """Tell whether a file has its final name though the rename failed: by a link, or on a server that was slow."""
        try:
            return os.path.samestat(self._tops.lstat(path), self._tops.lstat(final))
        except OSError:
            # Gone from a folder that is there: renamed, and perhaps taken by the daemon already.
            return self._tops.is_folder(self._target) and not self._tops.exists(path)

    def _entered(self) -> str:
        """Return the target folder; made if it is not there, but never the inbox itself."""
        current = self._config.folders.inbox
        if not os.path.isdir(current):
            if is_hidden(current):
                raise _denied(current)
            hint = "check the path, and that it is mounted; the daemon makes the folders when it first starts"
            raise SpoolError(f"{printable(current)}: there is no such inbox", path=current, hint=hint)
        with ours(current, "open the folder"):
            self._tops.open(current)
        for part in self._folder.split("/") if self._folder else ():
            above, current = current, os.path.join(current, part)
            if self._tops.is_link(current):
                raise BadRequest([Problem("folder", f'"{part}" is a link, and not looked into', "use another")])
            if not self._tops.is_folder(current):
                # The daemon is often another user, and has to take files out of it as out of the folder above, which
                # the sticky bit would forbid: it is not the owner of this one.
                mode = stat.S_IMODE(self._tops.folder(above).status().st_mode) & ~stat.S_ISVTX
                self._disk.make_with_mode(current, mode)
                self._sync(above)
        place = self._tops.at(current)
        if not os.access(place.name, os.W_OK | os.X_OK, dir_fd=place.dir_fd):
            raise _denied(current)
        return current

    def _remove_stale(self) -> None:
        """Remove what a sender of ours that was killed has left in this folder."""
        with contextlib.suppress(OSError, SpoolError):
            for name in self._tops.names(self._target):
                if name.startswith(_STAGED):
                    path = os.path.join(self._target, name)
                    if time.time() - self._tops.lstat(path).st_ctime > _STALE_SECONDS:
                        self._disk.unlink(path)

    def _taken(self, name: str) -> list[Problem]:
        if not self._tops.exists(os.path.join(self._target, name)):
            return []
        return [Problem(printable(name, 255), "the inbox has a file of this name", "use another")]

    def _copy(self, parcel: _Parcel, path: str, hidden: str, name: str) -> str:
        """Copy an image; return the name it will have, with the ending that its content asks for."""
        try:
            real = own_way(path)
        except RefusedError as error:
            raise BadRequest([Problem(path, f"it {error.strerror}", "use a copy of the image")]) from None
        if not os.path.exists(real):
            raise BadRequest([Problem(path, "there is no such file", "check the path of the image")])
        ending = "." + read_image(real, path).mime.rpartition("/")[2]
        with open_plain(real, path) as image, self._writing(parcel, hidden + ending, name + ending) as copy:
            shutil.copyfileobj(image, copy, _COPY_BYTES)
        return name + ending

    @contextlib.contextmanager
    def _writing(self, parcel: _Parcel, hidden: str, name: str) -> Iterator[IO[bytes]]:
        path = os.path.join(self._target, hidden)
        parcel.files.append((path, os.path.join(self._target, name)))
        with closing(self._disk.create(path), path) as file:
            with ours(path, "write"):
                os.fchmod(file.fileno(), self._mode)
                yield file
            self._disk.sync(file, path)

    def _readable_mode(self) -> int:
        """Return the mode for a file: as the umask says, and whoever may look into the folder may read it."""
        mask = os.umask(0o022)
        os.umask(mask)
        return (0o666 & ~mask) | (self._tops.folder(self._target).status().st_mode & 0o444)

    def _check(self, dropped: Dropped) -> None:
        """Refuse what the daemon would refuse."""
        try:
            build(dropped, self._target, self._config, functools.partial(open_file, tops=self._tops))
        except BadRequest as error:
            problems = [one for one in error.problems if not (self._blind and one.field == "preset")]
            if problems:
                raise BadRequest(problems) from None

    def _remove(self, parcel: _Parcel) -> None:
        for path, _ in parcel.files:
            with contextlib.suppress(SpoolError):
                self._disk.unlink(path)


def _denied(path: str) -> SpoolError:
    why, code, hint = "permission denied", errno.EACCES, refusal(path, os.W_OK | os.X_OK)
    with contextlib.suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            why, code, hint = "read-only file system", errno.EROFS, "mount it for writing"
    return SpoolError(f"{printable(path)}: {why}", path=path, code=code, hint=hint)


def _composed(wish: Wish, names: Sequence[str]) -> bytes:
    options = {name: value for name, value in wish.options.items() if value is not None}
    front = tomli_w.dumps({**options, "input_images": list(names)})
    try:
        return f"+++\n{front}+++\n{wish.text}\n".encode()
    except UnicodeEncodeError:
        raise BadRequest([Problem("prompt", "it is not UTF-8 text")]) from None
