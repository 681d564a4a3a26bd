"""The claim folder of a job in a common inbox: what one daemon leaves there for another that takes the job over.

::

    inbox/.imagewatch/ID.E/claim.json     what was claimed: where its originals belong, if the database loses its rows
                           sent.N         witness: attempt N may have been sent
                           answer.N       its response, copied from the state folder of the daemon that sent it
                           answer.image.K its images; also image.K, fetched.K and raw, as in the state folder

The name of the folder has the epoch. A daemon that takes a job over empties the folder of an earlier one and
removes it, so whatever that one still does with it fails.

The witness is there before the first byte leaves. It protects against a database that has lost its last commits: a
daemon that can send has the originals, and the witness is beside them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from secrets import token_hex
from typing import TYPE_CHECKING, Final

import msgspec

from imagewatch.inbox.claimed import JOB
from imagewatch.journal.common import lost
from imagewatch.protocol.names import CLAIM_NOTE, SUFFIX
from imagewatch.protocol.values import Claim, Sent, load
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.errors import ChargeUnknown, SpoolError

if TYPE_CHECKING:
    from imagewatch.job.folders import JobFolders
    from imagewatch.job.record import Record

_SENT = re.compile(r"sent\.([1-9][0-9]{0,8})")
_ANSWER = re.compile(r"answer\.[1-9][0-9]{0,8}|(?:answer\.image|image|fetched)\.[0-9]{1,3}|raw")
_RESPONSE = re.compile(r"answer\.([1-9][0-9]{0,8})")
_OURS = re.compile(rf"{_SENT.pattern}|(?:{_ANSWER.pattern})(?:(?:\.[0-9a-f]{{16}})?\.tmp)?")
_FOLDER = re.compile(rf"({JOB.pattern})(?:\.([1-9][0-9]{{0,17}}))?")
NOT_KNOWN: Final = Sent(prompt="", prompt_sha256="", fields={}, inputs=(), contents={}, endpoint="", at=0.0)
"""What was sent, if nothing of it is known."""
_REMOVED = re.compile(r"\.nfs[0-9a-f]{16,}")
"""A file that was removed while a client of NFS had it open."""
_MOST_TRIES = 20
_PIECE = 1024 * 1024
_MOST_BYTES = 4 * 1024 * 1024


class Witness(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of an attempt beside its row.

    Attributes:
        attempt: Its number.
        nonce: Of its row.
        instance: The daemon that may have sent it.
        sent: What was sent.
        claim: Its prompt; None if that is not known.
    """

    attempt: int
    nonce: str
    instance: str
    sent: Sent
    claim: Claim | None = None


class Handover:
    """Reads and writes what daemons leave for each other.

    Args:
        folders: All folders.
    """

    def __init__(self, folders: JobFolders) -> None:
        self._folders = folders
        self._disk = folders.disk
        self._common = folders.journal.common
        self._fenced: dict[str, int] = {}
        self.is_on = self._common.is_on

    # The folder

    def fence(self, job: str) -> None:
        """Empty the claim folders of earlier epochs of a job that was taken over into that of its own, and remove them.

        Once for each epoch, as long as the folder is there: after that no older folder has anything that counts. They
        are removed and not renamed: a daemon on another host that has one open, or whose kernel remembers its name
        (NFS), would still use it.

        Raises:
            LostJobError: Another daemon has the job.
            SpoolError: The disk failed.
        """
        epoch, target = self._common.epoch(job), self._folders.claim_folder(job)
        if self._fenced.get(job) == epoch and self._folders.tops.exists(target):
            return
        self._folders.ensure_claims()
        folders = self._of(job)
        if (
            epoch and (newest := max(folders.values(), default=0)) > epoch
        ):  # the database has lost that it was taken over
            self._common.pass_epoch(job, newest)
            epoch, target = self._common.epoch(job), self._folders.claim_folder(job)
        for name in sorted((one for one in folders if folders[one] < epoch), key=folders.__getitem__, reverse=True):
            self._disk.make_folder(target)
            self._empty(os.path.join(self._folders.claims, name), target)
        self._disk.sync_folder(self._folders.claims)
        self._fenced[job] = epoch

    def _empty(self, path: str, target: str) -> None:
        """Move all that is in an older claim folder, also what its daemon puts there meanwhile, and remove it."""
        for _ in range(_MOST_TRIES):
            names = self._all_in(path)
            # The witnesses first: what may have been sent is known as such wherever this ends.
            for name in sorted(names, key=lambda name: not _SENT.fullmatch(name)):
                self._move(name, path, target)
            if names:
                self._disk.sync_folder(target)
            if self._disk.remove_folder(path):
                return
        with disk_errors(path, "remove the folder"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), path)

    def _all_in(self, path: str) -> list[str]:
        with disk_errors(path, "list the folder"), contextlib.suppress(FileNotFoundError):
            return self._folders.tops.names(path)
        return []

    def _move(self, name: str, path: str, target: str) -> None:
        source, there = os.path.join(path, name), os.path.join(target, name)
        is_partial = name.endswith(".tmp") and (_OURS.fullmatch(name) or name == f"{CLAIM_NOTE}.tmp")
        if is_partial or _REMOVED.fullmatch(name):
            self._disk.unlink(source)
            return
        try:
            self._rename(source, there)
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError) and self._folders.tops.is_folder(target):
                return  # an earlier daemon, or one with a later epoch, has moved it in this moment
            # An earlier daemon may have handed its response over to this epoch in this moment.
            is_there = isinstance(error.__cause__, FileExistsError)
            if not (is_there and (name == CLAIM_NOTE or _ANSWER.fullmatch(name) or self._disk.same(source, there))):
                raise
            self._disk.unlink(source)

    def _of(self, job: str) -> dict[str, int]:
        """Return the names of the claim folders of a job, and the epoch of each."""
        return {name: epoch for name, epoch in self.claimed().items() if name.partition(".")[0] == job}

    def claimed(self) -> dict[str, int]:
        """Return the names of all claim folders, and the epoch of each.

        Raises:
            SpoolError: The disk failed.
        """
        with disk_errors(self._folders.claims, "list the folder"):
            names = self._folders.tops.names(self._folders.claims, folders=True)
        return {name: found[1] for name in names if (found := job_and_epoch(name)) is not None}

    def holds(self, job: str) -> bool:
        """Return whether there is anything in a claim folder of a job, of whichever epoch."""
        return any(self._names_in(os.path.join(self._folders.claims, name)) for name in self._of(job))

    def give_back_late(self, name: str, folder: str) -> None:
        """Put back into the inbox what was claimed after another daemon had taken the job over: nothing of it was sent.

        Args:
            name: Of the claim folder, whose epoch is over.
            folder: Below the inbox.

        Raises:
            SpoolError: The disk failed.
        """
        path = os.path.join(self._folders.claims, name)
        with disk_errors(path, "list the folder"), contextlib.suppress(FileNotFoundError):
            names = self._names_in(path)
            if any(is_ours(one) for one in names):
                return  # it may have been sent
            if names:
                self._return_late(path, names, folder)
            self._drop_notes(path)
            self._disk.remove_folder(path)

    def _return_late(self, path: str, names: list[str], folder: str) -> None:
        """Put files of a claim folder back into the inbox, the prompt last."""
        target = os.path.join(self._folders.inbox, folder)
        self._folders.require_mounts()
        self._disk.make_inner(self._folders.inbox, folder)
        for one in sorted(names, key=lambda one: one.endswith(SUFFIX)):
            with contextlib.suppress(FileNotFoundError, FileExistsError):  # a newer file has the name
                self._disk.rename(os.path.join(path, one), os.path.join(target, one))
        self._disk.sync_folder(target)

    def _rename(self, source: str, target: str) -> None:
        """Rename; if that fails, check the target: on a network it may have happened nevertheless."""
        try:
            with disk_errors(source, "rename"):
                self._disk.rename(source, target)
        except SpoolError:
            if self._folders.tops.exists(source) or not self._folders.tops.exists(target):
                raise

    def _drop_notes(self, folder: str) -> None:
        for name in (CLAIM_NOTE, f"{CLAIM_NOTE}.tmp"):
            self._disk.unlink(os.path.join(folder, name))

    def has_response(self, job: str) -> bool:
        """Return whether the response of a job is in its claim folder, whichever daemon had it last.

        Raises:
            SpoolError: The folder cannot be read.
        """
        paths = [os.path.join(self._folders.claims, folder) for folder in self._of(job)]
        return any(response_number(name) for path in paths for name in self._names_in(path))

    def clear(self, job: str, *, keep: bool = False) -> None:
        """Remove what daemons have left for each other: the job is over.

        Args:
            job: Its id.
            keep: Keep the response, for ``imagewatch retry`` on any host.
        """
        self._fenced.pop(job, None)
        self._drop_notes(self._folders.claim_folder(job))
        for name in self._names(job):
            if keep and name.startswith("answer."):
                continue
            if is_ours(name):
                self._disk.unlink(os.path.join(self._folders.claim_folder(job), name))

    def _names(self, job: str) -> list[str]:
        return self._names_in(self._folders.claim_folder(job))

    def _names_in(self, path: str) -> list[str]:
        with disk_errors(path, "list the folder"), contextlib.suppress(FileNotFoundError):
            names = self._folders.tops.names(path, folders=False)
            return [name for name in names if name.removesuffix(".tmp") != CLAIM_NOTE]
        return []

    def claim(self, job: str) -> Claim | None:
        """Return what was claimed as its folder has it; None if that is missing, or was not written whole."""
        path = os.path.join(self._folders.claim_folder(job), CLAIM_NOTE)
        with (
            contextlib.suppress(OSError, ValueError, msgspec.DecodeError),
            open(self._folders.tops.open_file(path, os.O_RDONLY), "rb") as file,
        ):
            return load(file.read(_MOST_BYTES), Claim)
        return None

    # Witnesses

    def testify(self, job: str, witness: Witness) -> None:
        """Leave the witness of an attempt whose row is committed, before its first byte leaves.

        Raises:
            ChargeUnknown: There is one of this number: a request of it may have been sent before.
            LostJobError: The folder is missing: another daemon has the job.
            SpoolError: The disk failed.
        """
        folder = self._folders.claim_folder(job)
        path = os.path.join(folder, f"sent.{witness.attempt}")
        try:
            with closing(self._disk.create(path), path) as file:
                with disk_errors(path, "write"):
                    file.write(msgspec.json.encode(witness))
                self._disk.sync(file, path)
            self._disk.sync_folder(folder)
        except SpoolError as error:
            if isinstance(error.__cause__, FileExistsError):
                message = f"a request with the number {witness.attempt} may have been sent before"
                raise ChargeUnknown(message) from error
            if isinstance(error.__cause__, FileNotFoundError):
                raise lost(job) from error
            raise
        self._common.require_lease(job)

    def witnesses(self, job: str, folder: str = "") -> list[Witness]:
        """Return the witnesses of a job, in order; those that cannot be read have no content.

        Args:
            job: Its id.
            folder: Name of its claim folder; empty: that of its epoch.

        Raises:
            SpoolError: The disk failed.
        """
        found = []
        where = os.path.join(self._folders.claims, folder) if folder else self._folders.claim_folder(job)
        for name in self._names_in(where):
            if number := _SENT.fullmatch(name):
                path = os.path.join(where, name)
                with disk_errors(path, "read"), open(self._folders.tops.open_file(path, os.O_RDONLY), "rb") as file:
                    raw = file.read(_MOST_BYTES)
                try:
                    found.append(msgspec.json.decode(raw, type=Witness))
                except (ValueError, msgspec.DecodeError):  # cut off by the end of its host: it may have been sent
                    found.append(Witness(attempt=int(number[1]), nonce="", instance="", sent=NOT_KNOWN))
        return sorted(found, key=lambda witness: witness.attempt)

    # Responses

    def share(self, record: Record) -> None:
        """Copy the saved responses of a job from the state folder into its claim folder.

        Raises:
            SpoolError: They cannot be copied; the folder may be missing.
        """
        folder = self._folders.claim_folder(record.job)
        names = [name for name in record.names() if _ANSWER.fullmatch(name)]
        # The response last: where it is, its images are.
        for name in sorted(names, key=response_number):
            if not self._has(os.path.join(folder, name), record.path(name)):
                # Two daemons may hand over the same response: neither may rename what the other one is writing.
                path = os.path.join(folder, name)
                self._copy(record.path(name), path, f"{path}.{token_hex(8)}.tmp")
        self._disk.sync_folder(folder)

    def fetch(self, record: Record) -> bool:
        """Copy the responses of a job that another daemon has left into the state folder; return whether there is one.

        Raises:
            SpoolError: They cannot be copied.
        """
        folder, known = self._folders.claim_folder(record.job), set(record.names())
        names = [name for name in self._names(record.job) if _ANSWER.fullmatch(name) and name not in known]
        for name in sorted(names, key=response_number):
            self._copy(os.path.join(folder, name), record.path(name))
        if names:
            self._disk.sync_folder(self._folders.answers)
        return bool(names)

    def _copy(self, source: str, target: str, temporary: str | None = None) -> None:
        with (
            disk_errors(source, "read"),
            open(self._folders.tops.open_file(source, os.O_RDONLY), "rb") as file,
            self._disk.writing(target, temporary) as copy,
        ):
            while piece := file.read(_PIECE):
                copy.write(piece)

    def _has(self, path: str, original: str) -> bool:
        try:
            return self._folders.tops.lstat(path).st_size == self._folders.tops.lstat(original).st_size
        except OSError:
            return False


def job_and_epoch(folder: str) -> tuple[str, int] | None:
    """Return the job of a claim folder and its epoch, 0 without, by the folder's name; None if it is none."""
    match = _FOLDER.fullmatch(folder)
    return (match[1], int(match[2] or 0)) if match else None


def response_number(name: str) -> int:
    """Return the number of the attempt whose response is in a file of a claim folder; 0: it is another file."""
    match = _RESPONSE.fullmatch(name)
    return int(match[1]) if match else 0


def is_ours(name: str) -> bool:
    """Return whether a file of a claim folder of a common inbox is from a daemon, and no original."""
    return bool(_OURS.fullmatch(name))
