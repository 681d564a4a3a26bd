"""``imagewatch retry``: failed prompts back into the inbox.

A prompt that was not charged goes back as it was. One that may have been charged goes back only if the administrator
accepts that it may be charged twice. One that was charged does not go back: the daemon reads its saved response again.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import stat
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from imagewatch.commands.common import config_option, json_option
from imagewatch.commands.ledger import open_journal
from imagewatch.commands.state import is_running, load_as_owner
from imagewatch.inbox.system_folders import why_not_entered
from imagewatch.job.receipts import unvouched
from imagewatch.journal.control import Control
from imagewatch.protocol.names import ERROR, SUFFIX
from imagewatch.protocol.prompt import MAX_BYTES
from imagewatch.protocol.request import contents
from imagewatch.system import leftovers
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.exits import EXIT_FAILED
from imagewatch.system.folders import is_private
from imagewatch.system.locks import locked_if_possible
from imagewatch.system.text import printable, to_json, whole
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imagewatch.config.schema import Config, Folders
    from imagewatch.journal.journal import Journal

_ENDINGS = (ERROR, SUFFIX, "")
_MOST_BYTES = 4 << 20
_JOB = re.compile("[0-9a-f]{16}")
_HASH = re.compile("[0-9a-f]{64}")


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option(
    "--all", "everything", is_flag=True, help="Retry all failed prompts except those that may have been charged"
)
@click.option(
    "--pay-again", is_flag=True, help="Also retry prompts that may have been charged; they may be charged twice"
)
@json_option
@config_option
def retry(names: Sequence[str], path: str | None, *, everything: bool, pay_again: bool, as_json: bool) -> None:
    """Put failed prompts back into the inbox.

    NAME is a prompt in the errors folder: its base name, or the path of its prompt or error file. A prompt that may
    have been charged is put back only with --pay-again. A prompt that was charged, but whose response held no
    readable image, is never sent again: the daemon reads the saved response again, and downloads images that could not
    be downloaded before.
    """
    if everything == bool(names):
        raise click.UsageError("name the prompts to retry, or use --all")
    if everything and pay_again:
        raise click.UsageError("--pay-again needs the prompts by name")
    config = load_as_owner(path)
    with open_journal(config) as journal:
        disk = Disk()
        again = Retry(config.folders, disk, journal, Control(config.folders.state, disk, journal.requests))
        paths = list(again.all()) if everything else [again.find(name) for name in names]
        results = []
        for file in paths:
            results.append(_retried(again, file, pay_again=pay_again, config=config))
            if not as_json:
                click.echo(_text(results[-1]), err=not results[-1]["retried"])
    if as_json:
        click.echo(to_json(results, indent=1))
    elif not paths:
        click.echo("There are no failed prompts.")
    sys.exit(0 if all(result["retried"] for result in results) else EXIT_FAILED)


def _text(result: dict[str, Any]) -> str:
    return printable(f"{result['name']}: {result['message']}" if result["name"] else result["message"])


def _retried(again: Retry, file: str, *, pay_again: bool, config: Config) -> dict[str, Any]:
    """Retry the prompt of one error file; return the result."""
    try:
        failed = again.read(file)
        message, done = _retry_one(again, failed, pay_again=pay_again, config=config)
    except SpoolError as error:
        message = f"{error} ({error.hint})" if error.hint else str(error)
        return {"name": None, "result_file": file, "charged": None, "retried": False, "message": message}
    return {"name": failed.name, "result_file": file, "charged": failed.charged, "retried": done, "message": message}


def _retry_one(again: Retry, failed: Failed, *, pay_again: bool, config: Config) -> tuple[str, bool]:
    if failed.charged == "yes":
        again.reread(failed)
        when = "" if is_running(config) else " when it starts"
        return f"was charged; the daemon reads its saved response again{when}; nothing is sent", True
    if failed.charged != "no" and not pay_again:
        if not again.has_prompt(failed):
            return "may have been charged; its prompt is missing, so it cannot be sent again; check the balance", False
        return "may have been charged, so it is not sent again; check the balance, then use --pay-again", False
    again.put_back(failed)
    return "back in the inbox", True


@dataclass(frozen=True)
class Failed:
    """A failed prompt.

    Attributes:
        path: Its error file.
        folder: Its folder below the errors folder.
        job: Its job id.
        charged: ``yes``, ``no`` or ``unknown``, by the ledger; a job that is not in the ledger counts as ``unknown``.
        originals: Name in the errors folder, and name as dropped; the prompt last.
        digest: Hash of the prompt as dropped, by the ledger; empty if it is not there.
    """

    path: str
    folder: str
    job: str
    charged: str
    originals: tuple[tuple[str, str], ...]
    digest: str = ""

    @property
    def name(self) -> str:
        """The name that people see."""
        return os.path.join(self.folder, os.path.basename(self.path)[: -len(ERROR)])


class Retry:
    """Puts failed prompts back.

    Args:
        folders: Inbox, errors and state.
        disk: The disk.
        journal: It decides whether a job was charged.
        control: Where the daemon is asked to read a saved response again.
    """

    def __init__(self, folders: Folders, disk: Disk, journal: Journal, control: Control) -> None:
        self._inbox = folders.inbox
        self._errors = folders.errors
        self._disk = disk
        self._tops = disk.tops
        with contextlib.suppress(OSError):  # the error is reported when the folder is needed
            self._tops.open(self._errors)
        self._opener = functools.partial(open_file, tops=self._tops)
        self._journal = journal
        self._ledger = journal.ledger
        self._control = control

    def all(self) -> Iterator[str]:
        """Yield every error file, oldest first."""
        found = []
        for folder, inner, names in os.walk(self._errors):
            inner[:] = [name for name in inner if not name.startswith(".")]
            for name in names:
                if name.endswith(ERROR) and not name.startswith("."):
                    path = os.path.join(folder, name)
                    with contextlib.suppress(FileNotFoundError):
                        found.append((os.lstat(path).st_mtime_ns, path))
        for _, path in sorted(found):
            yield path

    def find(self, name: str) -> str:
        """Return the path of an error file.

        Args:
            name: A prompt's name without its ending, or the path of its prompt or error file.

        Raises:
            UsageError: There is none.
        """
        for ending in _ENDINGS:
            stem = name[: -len(ending)] if ending and name.endswith(ending) else name
            for base in (self._errors, "."):
                path = os.path.abspath(os.path.join(base, stem + ERROR))
                if path.startswith(self._errors + os.sep) and os.path.lexists(path):
                    return path
        shown = printable(name, 255)
        raise UsageError(f"no error file of this name: {shown}", hint=f"see the names in {printable(self._errors)}")

    def read(self, path: str) -> Failed:
        """Read an error file. It is in a shared folder and is not trusted.

        Raises:
            SpoolError: It is not one.
        """
        shown = printable(path)
        try:
            facts = unvouched(self._text(path))
            job, charged = _id(facts["job"]), str(facts["charged"])
            originals = self._real(
                path, [(_name(t["file"]), _name(t["dropped_as"])) for t in facts.get("originals", [])]
            )
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            hint = "move the prompt and its images back into the inbox yourself"
            raise SpoolError(f"not an error file of imagewatch ({error}): {shown}", path=path, hint=hint) from None
        folder = os.path.dirname(os.path.relpath(path, self._errors))
        originals.sort(key=lambda names: names[1].endswith(SUFFIX))
        row, digest = self._ledger.job(job), ""
        # Another user may have copied the job id out of an error file.
        if row and originals and row["source"] == whole(os.path.join(folder, originals[-1][1])):
            charged, digest = row["charged"], _digest(row["contents"], originals[-1][1])
        elif charged == "no":
            charged = "unknown"
        return Failed(path, folder, job, charged, tuple(originals), digest)

    def _text(self, path: str) -> str:
        try:
            with disk_errors(path, "read"), open_file(path, self._tops, most_bytes=_MOST_BYTES) as file:
                return file.read(_MOST_BYTES).decode()
        except SpoolError as error:
            cause = error.__cause__
            if not isinstance(cause, RefusedError):
                raise
            raise ValueError(f"it {cause.strerror}") from None

    def _real(self, path: str, originals: list[tuple[str, str]]) -> list[tuple[str, str]]:
        """Return names as the disk has them: a name that is not UTF-8 is escaped in an error file."""
        if not any("\\" in name for names in originals for name in names):
            return originals
        folder = os.path.dirname(path)
        here, there = _described(folder), _described(os.path.join(self._inbox, os.path.relpath(folder, self._errors)))
        found = []
        for file, dropped in originals:
            name = _untagged(here[file], dropped) if file in here else ""
            found.append((here.get(file, file), name or there.get(dropped, dropped)))
        return found

    def put_back(self, failed: Failed) -> None:
        """Move the originals into the inbox, the prompt last, and then remove the error file.

        Raises:
            SpoolError: The inbox has a file of that name, another command does the same now, or the disk failed.
        """
        shown = printable(failed.path)
        try:
            # If the inbox is on another file system, two commands would both copy the prompt: the daemon might have
            # claimed the first copy when the second one gets its name.
            with locked_if_possible(failed.path, self._tops) as has_name:
                if not has_name:
                    hint = "no action needed: another command has put the prompt back"
                    raise SpoolError(f"the error file was removed: {shown}", path=failed.path, hint=hint)
                if self.read(failed.path) != failed:
                    hint = "nothing was moved; run the command again"
                    raise SpoolError(f"the error file is another one now: {shown}", path=failed.path, hint=hint)
                self._put_back(failed)
        except BlockingIOError:
            hint = "nothing was moved; wait until the other command has ended"
            raise SpoolError(
                f"another command has locked the error file: {shown}", path=failed.path, hint=hint
            ) from None

    def _put_back(self, failed: Failed) -> None:
        source, target = os.path.dirname(failed.path), self._target(failed)
        if why := next(filter(None, map(why_not_entered, failed.folder.split("/"))), ""):
            hint = "nothing was moved; move its files into another folder of the inbox, the prompt last"
            raise SpoolError(f"the target is, or is in, {why}: {printable(target)}", path=target, hint=hint)
        if not os.path.isdir(self._inbox):
            shown = printable(self._inbox)
            raise SpoolError(f"the inbox is missing: {shown}", path=self._inbox, hint="restore or mount it")
        with disk_errors(self._inbox, "open the folder"):
            self._tops.open(self._inbox)
        self._disk.make_inner(self._inbox, failed.folder)
        there = [(os.path.join(source, a), os.path.join(target, b)) for a, b in failed.originals]
        self._require_free(there)
        if not there or not self._tops.exists(there[-1][0]):
            self._require_prompt(failed, there[-1][1] if there else "")
        for path, _ in there:
            self._require_public(path)
        with disk_errors(source, "enter the folder"), self._tops.held(source), self._tops.held(target):
            self._move(failed, there)

    def _target(self, failed: Failed) -> str:
        return os.path.join(self._inbox, failed.folder) if failed.folder else self._inbox

    def _move(self, failed: Failed, there: list[tuple[str, str]]) -> None:
        source, target = os.path.dirname(failed.path), self._target(failed)
        leftovers.remove(self._disk, [target], {})
        mark = self._mark(failed.path)
        for number, (path, new) in enumerate(there):
            # Where there are no locks, two commands may do this at the same time.
            name = f".iw-{failed.job}.{number}.{secrets.randbelow(10**18)}.tmp"
            temporary, mtime_ns = os.path.join(target, name), 0 if new.endswith(SUFFIX) else None
            still = functools.partial(self._require_source, path, failed.path, mark)
            try:
                self._disk.carry(path, new, temporary, mtime_ns=mtime_ns, check=still)
            except FileExistsError:
                raise _taken(new) from None
        self._disk.sync_folder(target)
        self._disk.sync_folder(os.path.dirname(target))
        self._disk.unlink(failed.path)
        self._disk.sync_folder(source)

    def _require_source(self, path: str, error_file: str, mark: tuple[int, ...]) -> None:
        """Check that a file was not put back by another command meanwhile: the daemon may have claimed it already."""
        if not self._tops.exists(path) or self._mark(error_file) != mark:
            hint = "no action needed: another command has put it back"
            raise SpoolError(f"the file was moved meanwhile: {printable(path)}", path=path, hint=hint)

    def _mark(self, path: str) -> tuple[int, ...]:
        """Return what distinguishes a file from another one of its name; nothing if there is none."""
        try:
            status = self._tops.lstat(path)
        except FileNotFoundError:
            return ()
        return status.st_dev, status.st_ino, status.st_ctime_ns

    def _require_free(self, there: list[tuple[str, str]]) -> None:
        for path, new in there:
            if self._tops.exists(new) and self._tops.exists(path):
                raise _taken(new)

    def _require_public(self, path: str) -> None:
        """Refuse a hard link to a file that only its owner may read: a copy would show it to others."""
        if not self._tops.exists(path):
            return
        with disk_errors(path, "read the status of the file"):
            status, folder = self._tops.lstat(path), self._tops.folder(os.path.dirname(path)).status()
        if stat.S_ISREG(status.st_mode) and is_private(status, folder):
            message = f"hard link to a private file: {printable(path)}"
            raise SpoolError(message, path=path, hint="remove it; nothing was moved")

    def _require_prompt(self, failed: Failed, new: str) -> None:
        """Check that the prompt is in the inbox: an earlier retry may have moved it and then been killed.

        If the inbox has another prompt of that name, the images that are left here must not be added to it.
        """
        if not (new and self._tops.exists(new)):
            hint = "remove the error file, or drop the prompt again"
            raise SpoolError(
                f"the prompt of this error file is missing: {printable(failed.path)}", path=failed.path, hint=hint
            )
        folder, name = os.path.split(new)
        if not failed.digest or contents(folder, [name], MAX_BYTES, self._opener).get(name) != failed.digest:
            message = f"the prompt is missing, and the inbox has another one of its name: {printable(new)}"
            hint = "nothing was moved; remove the error file, or drop its prompt again under another name"
            raise SpoolError(message, path=new, hint=hint)

    def has_prompt(self, failed: Failed) -> bool:
        """Return whether its prompt exists: beside the error file, or in the inbox after an earlier retry."""
        if not failed.originals:
            return False
        file, dropped_as = failed.originals[-1]
        places = (os.path.join(os.path.dirname(failed.path), file), os.path.join(self._target(failed), dropped_as))
        return any(map(os.path.lexists, places))

    def reread(self, failed: Failed) -> None:
        """Ask the daemon to read the saved response again.

        Raises:
            SpoolError: It is not in the state folder, or the error file is not where the daemon put it.
        """
        shown, kept = printable(failed.path), self._journal.kept(failed.job)
        decision = (kept.decision or kept.withdrawn) if kept else None
        if kept is None or decision is None:
            hint = "nothing is sent; what the API returned may be beside the error file"
            raise SpoolError(f"there is no saved response: {shown}", path=failed.path, hint=hint)
        place = os.path.join(self._errors, kept.claim.folder, decision.name)
        if place != failed.path:  # other files may be there now
            hint = f"move it back with its other files: {printable(place)}"
            raise SpoolError(f"the error file was moved: {shown}", path=failed.path, hint=hint)
        self._control.retry(failed.job)


def _described(folder: str) -> dict[str, str]:
    """Return the names in a folder by their form in result files. A name that needs no escapes has priority."""
    try:
        names = os.listdir(folder)
    except OSError:  # the error is reported when the files are moved
        return {}
    return {whole(name): name for name in sorted(names, key=lambda name: whole(name) == name)}


def _untagged(file: str, dropped: str) -> str:
    """Return the name as dropped, or an empty string if it was cut to make room for the job's id.

    Args:
        file: Its name on the disk; it may have that id in it.
        dropped: That name in the result file, possibly with escapes.
    """
    tag = len(whole(file)) - len(dropped)
    if tag < 0:
        return ""
    names = (file[:at] + file[at + tag :] for at in range(len(file) - tag + 1))
    return next((name for name in names if whole(name) == dropped), "")


def _digest(recorded: str, name: str) -> str:
    """Return a file's hash from the ledger's ``contents``, or an empty string: some files have a text there."""
    found = json.loads(recorded).get(name, "") if recorded else ""
    return found if _HASH.fullmatch(found) else ""


def _taken(path: str) -> SpoolError:
    hint = "remove it first, or wait until it is processed"
    return SpoolError(f"the inbox has a file of this name: {printable(path)}", path=path, hint=hint)


def _id(value: object) -> str:
    """Return a job id; it becomes a part of file names."""
    if not isinstance(value, str) or not _JOB.fullmatch(value):
        raise ValueError("it has no job id")
    return value


def _name(value: object) -> str:
    """Return a plain file name; an error file must not point outside its folder."""
    if not isinstance(value, str) or "/" in value or "\0" in value or value in {"", ".", ".."}:
        raise ValueError("a name in it is not a file name")
    return value
