"""Drops prompts in the right order.

Prompts and copies of their images are written into the inbox under hidden names, which the daemon does not claim, and
checked there. If all of them are valid they are renamed: the images first, then the prompt, which declares them. So the
daemon can claim it immediately, and never half-written. Only the folders are needed, not the key or the state folder.
"""

from __future__ import annotations

import contextlib
import difflib
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

from imagewatch.commands.wait import Result
from imagewatch.config.locate import is_hidden, refusal
from imagewatch.inbox.system_folders import why_not_entered
from imagewatch.protocol import prompt as prompts
from imagewatch.protocol.names import SUFFIX, group, stem_of
from imagewatch.protocol.request import build, may_be_image, open_plain, read_image, unused_problems
from imagewatch.protocol.values import Dropped
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.errors import MISSING, BadRequest, Problem, SpoolError
from imagewatch.system.text import printable
from imagewatch.system.untrusted import RefusedError, open_file, resolve_own_link

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping, Sequence
    from typing import Self

    from imagewatch.config.schema import Config
    from imagewatch.protocol.request import Opener

_STAGED = ".submit-"
NAMED = ".named-"
"""How hidden names of prompts with a note begin. Such a prompt shows that it was not dropped, so it stays."""
_STALE_SECONDS = 86_400.0
"""Staged files of this age were left by a command that was killed."""
_NUMBERS = re.compile("[0-9]+")
_COPY_BYTES = 1 << 20
_MOST_WORDS = 40
_MOST_STEM = 200
"""Longest base name in bytes: the daemon never has to cut it, whatever it adds for a result."""


@dataclass(frozen=True)
class SubmitRequest:
    """What one prompt asks for.

    Attributes:
        text: The text.
        options: Front matter; options that are None are not written.
        images: Paths of input images, in order.
    """

    text: str
    options: Mapping[str, Any]
    images: tuple[str, ...] = ()

    @classmethod
    def of_file(cls, raw: bytes, path: str, options: Mapping[str, Any], images: tuple[str, ...]) -> SubmitRequest:
        """Read a prompt file; options and images that are given replace those of the file.

        Its images are those that it declares, from its own folder. If it declares none and has the name of a prompt,
        they are those that an inbox would match to it.

        Args:
            raw: The file.
            path: Its path.
            options: Options that are given.
            images: Images that are given.

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
    hint = "name its images with --image, or in its input_images"
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise BadRequest([Problem(name, f"its folder cannot be listed: {error.strerror}", hint)]) from None
    # On a file system that ignores case or accents, images would be missed, and the text alone would be charged.
    if name not in names:
        raise BadRequest([Problem(name, "its folder lists no file of exactly this name", hint)])
    dropped = group(names)[stem]
    if problems := unused_problems([name for name in dropped.uncertain if _may_be_image(os.path.join(folder, name))]):
        raise BadRequest(problems)
    return dropped.images


def _may_be_image(path: str) -> bool:
    try:
        return may_be_image(path, os.lstat(path))
    except OSError:
        return False  # removed meanwhile


def stem_for(text: str, digits: str = "") -> str:
    """Return a base name for a prompt: its first words, and digits that make it unique; without any, random ones."""
    plain = unicodedata.normalize("NFKD", text.casefold()).encode("ascii", "ignore").decode().lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain)[:_MOST_WORDS].strip("-")
    return f"{words or 'prompt'}-{digits or secrets.token_hex(3)}"


def require_stem(stem: str) -> None:
    """Check a base name.

    Raises:
        BadRequest: A prompt cannot have it.
    """
    reason = ""
    if "/" in stem or stem_of(stem + SUFFIX) is None or not stem:
        reason = "is not a valid name: it may not contain a slash, or begin with a dot, ~ or #"
    elif printable(stem) != stem:
        reason = "has characters that cannot be printed"
    elif len(stem.encode()) > _MOST_STEM:
        reason = f"is longer than {_MOST_STEM} bytes"
    if reason:
        raise BadRequest([Problem("name", f'"{printable(stem, 60)}" {reason}', "use another name")])


def folder_of(name: str, *, recursive: bool) -> str:
    """Return a folder below the inbox as the daemon calls it.

    Args:
        name: What the sender calls it; empty for the inbox itself.
        recursive: Whether the daemon scans sub-folders.

    Raises:
        BadRequest: The daemon would not scan it.
    """
    parts = [part for part in name.split("/") if part]
    reason, hint = "", "use a folder below the inbox, such as poster or 2026/spring"
    if name.startswith("/"):
        reason = "is an absolute path"
    elif ".." in parts:
        reason = "points outside the inbox"
    elif why := next(filter(None, map(why_not_entered, parts)), ""):
        reason = f"is, or is in, {why}"
    elif printable(name) != name:
        reason = "has characters that cannot be printed"
    elif parts and not recursive:
        reason, hint = "is not scanned", "use the inbox itself, or set inbox.recursive = true"
    if reason:
        raise BadRequest([Problem("folder", f'"{printable(name, 100)}" {reason}', hint)])
    return "/".join(parts)


@dataclass
class _Staged:
    """One prompt with its images under hidden names: hidden and final paths, in the order in which they are renamed."""

    source: str
    text: str = ""
    files: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Staged:
    """A prompt that was written and checked, and is not dropped yet.

    Attributes:
        names: The names of its files in the folder until it is dropped, that of the prompt last.
        text: Its text.
        images: The names that its images get.
    """

    names: tuple[str, ...]
    text: str
    images: tuple[str, ...]

    @property
    def prompt(self) -> str:
        """The name of the prompt itself until it is dropped."""
        return self.names[-1]


class Delivery:
    """Prompts for one folder of the inbox: the first is dropped when all of them are valid.

    At the end of the block, files of prompts that were not dropped are removed.

    Args:
        config: Folders, presets and limits.
        folder: Folder below the inbox, or an empty string.
        blind: Only the folders are known, so that presets cannot be checked.
        staged: How hidden names begin. Files of other beginnings than the usual one are never removed as leftovers,
            except for images of ``NAMED``.
        opener: Opens the images of the caller.

    Attributes:
        disk: The disk.
        target: The folder, absolute.
        unsynced: Why dropped prompts may be lost if the power fails; None if they are safe, or if that is not known.
        similar: The name of a new folder, and a similar one that may have been meant; None if there is none.

    Raises:
        SpoolError: The inbox does not exist or cannot be written.
    """

    def __init__(
        self,
        config: Config,
        folder: str,
        *,
        blind: bool = False,
        opener: Opener = open_file,
        staged: str = _STAGED,
    ) -> None:
        self._config = config
        self._opener = opener
        self._folder = folder
        self._blind = blind
        self._prefix = staged
        self._disk = self.disk = Disk()
        self._tops = self._disk.tops
        self._held = contextlib.ExitStack()
        self.unsynced: SpoolError | None = None
        self.similar: tuple[str, str] | None = None
        self._target = self.target = self._entered()
        self._mode = self._readable_mode()
        self._staged: list[_Staged] = []
        self._remove_stale()

    def __enter__(self) -> Self:
        with disk_errors(self._target, "enter the folder"):
            self._held.enter_context(self._tops.held(self._target))
        return self

    def __exit__(self, *_: object) -> None:
        with self._held:
            for staged in self._staged:
                self._remove(staged)

    def stage(self, request: SubmitRequest, stem: str) -> None:
        """Write a prompt and copies of its images under hidden names, and check them.

        Args:
            request: What the prompt asks for.
            stem: Its base name.

        Raises:
            BadRequest: The daemon would refuse it, or its name exists; all problems.
            SpoolError: The inbox cannot be written.
        """
        staged = _Staged(os.path.join(self._folder, stem + SUFFIX))
        self._staged.append(staged)
        hidden = self._prefix + secrets.token_hex(8)
        names: list[str] = []
        problems = self._problems_of_name(stem + SUFFIX)
        for number, path in enumerate(request.images, 1):
            try:
                names.append(self._copy(staged, path, f"{hidden}.{number}", f"{stem}.in{number}"))
            except BadRequest as error:
                problems += error.problems
        if problems:
            raise BadRequest(problems)
        content = composed(request, names)
        staged.text = prompts.parse(content).text
        with self._writing(staged, hidden + SUFFIX, stem + SUFFIX) as file:
            file.write(content)
        images = tuple(os.path.basename(path) for path, _ in staged.files[:-1])
        self._check(Dropped(folder=self._folder, stem=hidden, images=images, declared=None))

    @property
    def staged(self) -> list[Staged]:
        """The prompts that were staged and are not dropped yet."""
        found = []
        for one in self._staged:
            names, finals = ([os.path.basename(path) for path in paths] for paths in zip(*one.files, strict=True))
            found.append(Staged(tuple(names), one.text, tuple(finals[:-1])))
        return found

    def place(self) -> Generator[Result, None, None]:
        """Drop everything that was staged; yield each prompt that is in the inbox.

        A prompt that has its final name will be charged, so it is yielded before anything else can fail.

        Raises:
            BadRequest: A name has been used meanwhile; nothing of this prompt is left in the inbox.
            SpoolError: The inbox cannot be written; nothing of this prompt is left there either.
        """
        while self._staged:
            staged = self._staged[0]
            *images, (hidden, prompt) = staged.files
            for number, (path, final) in enumerate(images):
                self._rename(path, final)
                staged.files[number] = (final, final)  # to be removed if the prompt cannot follow
            self._rename(hidden, prompt)
            del self._staged[0]
            try:
                yield Result(staged.source, staged.text)
            finally:  # also after the last one, if the caller is interrupted
                self._sync(self._target)

    def sync(self) -> None:
        """Make the names in the folder durable, if this user may."""
        self._sync(self._target)

    def remove_images(self) -> None:
        """Remove the images of prompts that were not dropped that have their final names already.

        The others stay: as long as the hidden one is there, what has the final name is another sender's.
        """
        for staged in self._staged:
            for path, final in staged.files[:-1]:
                if path == final:
                    with contextlib.suppress(SpoolError):
                        self._disk.unlink(path)

    def keep_staged(self) -> None:
        """Leave the hidden files of prompts that were not dropped."""
        self._staged.clear()

    def _sync(self, folder: str) -> None:
        """Make names durable, if this user may: a user who can only write into a folder cannot open it."""
        try:
            self._disk.sync_folder(folder)
        except SpoolError as error:
            if error.code != errno.EACCES:
                self.unsynced = error

    def _rename(self, path: str, final: str) -> None:
        try:
            with disk_errors(final, "drop the file"):
                self._disk.rename(path, final)
        except SpoolError as error:
            if self._has_arrived(path, final):
                return
            if isinstance(error.__cause__, FileExistsError):
                raise BadRequest(self._problems_of_name(os.path.basename(final))) from None
            raise

    def _has_arrived(self, path: str, final: str) -> bool:
        """Return whether a file has its final name although the rename failed: by a link, or on a slow server."""
        try:
            return os.path.samestat(self._tops.lstat(path), self._tops.lstat(final))
        except OSError:
            # Missing from a folder that exists: it was renamed, and the daemon may have claimed it already.
            return self._tops.is_folder(self._target) and not self._tops.exists(path)

    def _entered(self) -> str:
        """Return the target folder; it is created if it does not exist, but the inbox never is."""
        current = self._config.folders.inbox
        if not os.path.isdir(current):
            if is_hidden(current):
                raise _denied(current)
            raise SpoolError(f"no such inbox: {printable(current)}", path=current, hint=MISSING)
        with disk_errors(current, "open the folder"):
            self._tops.open(current)
        for part in self._folder.split("/") if self._folder else ():
            above, current = current, os.path.join(current, part)
            if self._tops.is_link(current):
                raise BadRequest([Problem("folder", f'"{part}" is a symbolic link', "use another folder")])
            if not self._tops.is_folder(current):
                # The daemon is often another user. It must be able to move files out of this folder, as out of the one
                # above; the sticky bit would forbid that, because the daemon does not own this folder.
                mode = stat.S_IMODE(self._tops.folder(above).status().st_mode) & ~stat.S_ISVTX
                self.similar = self.similar or self._similar_to(above, part)
                self._disk.make_with_mode(current, mode)
                self._sync(above)
        place = self._tops.at(current)
        if not os.access(place.name, os.W_OK | os.X_OK, dir_fd=place.dir_fd):
            raise _denied(current)
        return current

    def _similar_to(self, above: str, name: str) -> tuple[str, str] | None:
        """Return the name of a new folder, and a folder, preset or budget with a similar name, if there is one."""
        known: set[str] = set()
        if not self._blind and above == self._config.folders.inbox:
            known |= {*self._config.presets, *self._config.budgets}
        with contextlib.suppress(OSError), os.scandir(above) as entries:
            known |= {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
        close = () if name in known else difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.8)
        # A series, such as a folder for each month, is no mistake.
        return next(((name, one) for one in close if _NUMBERS.sub("", one) != _NUMBERS.sub("", name)), None)

    def _remove_stale(self) -> None:
        """Remove files that a command that was killed has left in this folder."""
        with contextlib.suppress(OSError, SpoolError):
            for name in self._tops.names(self._target):
                if name.startswith(_STAGED) or (name.startswith(NAMED) and not name.endswith(SUFFIX)):
                    path = os.path.join(self._target, name)
                    if time.time() - self._tops.lstat(path).st_ctime > _STALE_SECONDS:
                        self._disk.unlink(path)

    def _problems_of_name(self, name: str) -> list[Problem]:
        if not self._tops.exists(os.path.join(self._target, name)):
            return []
        return [Problem(printable(name, 255), "the inbox has a file of this name", "use another name")]

    def _copy(self, staged: _Staged, path: str, hidden: str, name: str) -> str:
        """Copy an image; return its final name, with the ending of its actual format."""
        try:
            real = resolve_own_link(path)
        except RefusedError as error:
            raise BadRequest([Problem(path, f"it {error.strerror}", "use a copy of the image")]) from None
        if not os.path.exists(real):
            raise BadRequest([Problem(path, "no such file", "check the path of the image")])
        ending = "." + read_image(real, path, opener=self._opener).mime.rpartition("/")[2]
        with (
            open_plain(real, path, self._opener) as image,
            self._writing(staged, hidden + ending, name + ending) as copy,
        ):
            shutil.copyfileobj(image, copy, _COPY_BYTES)
        return name + ending

    @contextlib.contextmanager
    def _writing(self, staged: _Staged, hidden: str, name: str) -> Iterator[IO[bytes]]:
        path = os.path.join(self._target, hidden)
        staged.files.append((path, os.path.join(self._target, name)))
        with closing(self._disk.create(path), path) as file:
            with disk_errors(path, "write"):
                os.fchmod(file.fileno(), self._mode)
                yield file
            self._disk.sync(file, path)

    def _readable_mode(self) -> int:
        """Return the mode for a file: that of the umask, and readable by all who may list the folder."""
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

    def _remove(self, staged: _Staged) -> None:
        for path, _ in staged.files:
            with contextlib.suppress(SpoolError):
                self._disk.unlink(path)


def _denied(path: str) -> SpoolError:
    why, code, hint = "permission denied", errno.EACCES, refusal(path, os.W_OK | os.X_OK)
    with contextlib.suppress(OSError):
        if os.statvfs(path).f_flag & os.ST_RDONLY:
            why, code, hint = "read-only file system", errno.EROFS, "mount it for writing"
    return SpoolError(f"{why}: {printable(path)}", path=path, code=code, hint=hint)


def composed(request: SubmitRequest, names: Sequence[str]) -> bytes:
    """Return the prompt file of a request whose images have these names in the inbox.

    Raises:
        BadRequest: The text is not UTF-8 text.
    """
    options = {name: value for name, value in request.options.items() if value is not None}
    front = tomli_w.dumps({**options, "input_images": list(names)})
    try:
        return f"+++\n{front}+++\n{request.text}\n".encode()
    except UnicodeEncodeError:
        raise BadRequest([Problem("prompt", "it is not UTF-8 text")]) from None
