"""All folders of one daemon: opened, locked, tested, and noticed when they are replaced."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import secrets
import stat
from typing import IO, TYPE_CHECKING

from imagewatch.config.locate import others_above
from imagewatch.config.values import overlaps
from imagewatch.inbox.claimed import JOB
from imagewatch.job.claims import Claims, NotOursError
from imagewatch.job.common_folder import PROBE, PROBE_INNER, FolderProbes, Whose, claim_inbox, require_tried
from imagewatch.job.record import Record
from imagewatch.protocol.names import ANSWERS
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.errors import ConfigError, SpoolError
from imagewatch.system.file_systems import Kinds, Mounts, keeps_times
from imagewatch.system.folders import has_file
from imagewatch.system.locks import lock
from imagewatch.system.permissions import Permissions
from imagewatch.system.text import counted, printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.journal import Journal
    from imagewatch.protocol.values import Claim
    from imagewatch.system.disk import Disk
    from imagewatch.system.folders import Tops

_LOCK = "lock"
_SAME_USER = "run all daemons of a common inbox as the same user: the same number (uid) on all hosts"
_OLD_SECONDS = 3600.0
"""How old a test file is in a common inbox before another daemon removes it, seconds."""
_LEAST_FILES = 1000
"""Files that must still be possible, whatever space there is: a job makes some ten, SQLite two."""


def require_space(folders: Iterable[str], least: int, tops: Tops) -> None:
    """Make sure that there is space in folders.

    Args:
        folders: The folders.
        least: Bytes that must be free in each.
        tops: The folders that were opened.

    Raises:
        SpoolError: There is too little space, or too few files (inodes) are left.
    """
    for folder in folders:
        with disk_errors(folder, "ask for the free space"):
            top = tops.opened(folder)
            status = os.statvfs(top.fileno() if top else folder)
        free, files = status.f_bavail * status.f_frsize, status.f_favail
        hint = "free some space"
        if free < least:
            hint += ", or lower limits.min_free_bytes"
            message = f"{free:,} bytes are free, limits.min_free_bytes requires {least:,}"
        elif status.f_files and files < _LEAST_FILES:  # some file systems do not count
            message = f"there is room for only {files} more files (inodes)"
        else:
            continue
        raise SpoolError(f"{message}: {printable(folder)}", path=folder, code=errno.ENOSPC, hint=hint)


class JobFolders:
    """All folders of one daemon.

    Args:
        config: Where they are, and the modes for what is published.
        disk: The local disk.
        journal: What is recorded of jobs.
    """

    def __init__(self, config: Config, disk: Disk, journal: Journal) -> None:
        folders = config.folders
        self.journal = journal
        self._folders = folders
        self.disk = disk
        self.inbox = folders.inbox
        self.outbox = folders.outbox
        self.errors = folders.errors
        self.archive = None if folders.archive == "delete" else folders.archive
        self.state = folders.state
        self.answers = os.path.join(folders.state, ANSWERS)
        self._claims = Claims(folders.inbox, folders.state, disk)
        self.claims = self._claims.path
        self.permissions = Permissions(config.outbox.file_mode, config.outbox.folder_mode, config.outbox.group)
        self._lock: IO[bytes] | None = None
        self._claims_lock: IO[bytes] | None = None
        self._is_alone = True
        self._mounts = Mounts([])
        self._ways: dict[str, str] = {}
        self._kinds = Kinds()
        self._kinds.refresh()

    # Start-up

    @property
    def tops(self) -> Tops:
        """The folders as they were opened."""
        return self.disk.tops

    def prepare(self) -> None:
        """Create the folders and prove that they can be used, before anything is paid for.

        If another folder has the name of the one for claims, the start continues: the queue will be on hold.

        Raises:
            ConfigError: Two folders are the same, or one is inside another.
            SpoolError: One of them cannot be written.
        """
        for folder in self._all():
            self.disk.make_folder(folder, mode=0o700 if folder == self.state else 0o777)
        if problems := overlaps(self._folders):  # a link may have been created since the configuration was read
            raise ConfigError(problems)
        self._open()
        self.disk.make_folder(self.answers)
        with contextlib.suppress(NotOursError):
            self._claims.require()
        self._sync_above([*self._all(), self.answers, self.claims])
        self._remove_probes()
        with contextlib.suppress(NotOursError):
            self.probe()
            if self.journal.common.is_on:
                FolderProbes(self.disk, self.claims).run()
        self._prove_outbox()
        self._mounts = Mounts(self._all())

    def lock(self, *, is_alone: bool = False) -> None:
        """Lock this inbox and this state folder, until the process ends.

        Args:
            is_alone: Whether no other daemon may use the inbox, not even one of a common inbox.

        Raises:
            AlreadyRunning: Another daemon has locked them.
        """
        self._is_alone = is_alone or not self.journal.common.is_on
        self.disk.make_folder(self.state)
        self.disk.make_folder(self.inbox, mode=0o777)
        self._open([self.state, self.inbox])
        self._lock = lock(os.path.join(self.state, _LOCK), self.tops)
        try:
            self._require_common()
            self.require_claims()
        except NotOursError as error:
            if self.journal.common.is_on:
                raise SpoolError(str(error), path=error.path, code=error.code, hint=_SAME_USER) from error

    def _require_common(self) -> None:
        """Make sure that a common inbox may be on this file system, and has no jobs of before it was common.

        Raises:
            ConfigError: It may not.
            SpoolError: It has some.
        """
        if not self.journal.common.is_on:
            return
        self._kinds.refresh()
        require_tried(self.inbox, self._kinds.of(self.inbox))
        with disk_errors(self.claims, "list the folder"), contextlib.suppress(FileNotFoundError):
            if jobs := [name for name in self.tops.names(self.claims, folders=True) if JOB.fullmatch(name)]:
                left = f"{counted(len(jobs), 'job')} in {printable(self.claims)}"
                message = f"a daemon that had this inbox alone has left {left}"
                hint = "start it once more without shared.inbox and let it finish them (imagewatch once)"
                raise SpoolError(message, path=self.claims, code=errno.EBUSY, hint=hint)

    def require_claims(self) -> None:
        """Make sure that the folder for claims is ours, and that no other daemon uses it.

        The lock is a file in it. Every user who may read the inbox could lock the inbox itself.

        Raises:
            NotOursError: Another folder has its name.
            AlreadyRunning: Another daemon uses it; nothing may be claimed from this inbox.
        """
        self._claims.require()
        self._lock_claims()

    def _lock_claims(self) -> None:
        path = os.path.join(self.claims, _LOCK)
        if self._lock is None:  # nothing is claimed in this process
            return
        if self._claims_lock is None or not self._is_file(self._claims_lock, path):
            whose = Whose(*self.journal.common.names_of_inbox)
            is_common = self.journal.common.is_on
            held = claim_inbox(path, self.disk, whose, is_common=is_common, is_alone=self._is_alone)
            if self._claims_lock is not None:
                self._claims_lock.close()
            self._claims_lock = held

    def _is_file(self, file: IO[bytes], path: str) -> bool:
        """Return whether an open file still has a name."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.tops.lstat(path))
        except OSError:
            return False

    def _open(self, folders: list[str] | None = None) -> None:
        """Open our folders, and again those that the administrator has replaced."""
        for folder in folders or self._all():
            with disk_errors(folder, "open the folder"):
                if self.tops.is_replaced(folder):
                    self._require_same_way(folder)
                    self._require_lock_in(folder)
                    self.tops.open(folder, is_private=folder == self.state)
                    self._kinds.refresh()
            if folder == self.state:
                self._lock_again()

    def _require_same_way(self, folder: str) -> None:
        """Make sure that no other user put a link where one of our folders was: it might point to another one of ours.

        Raises:
            SpoolError: Its path points elsewhere than before, and other users could have changed it.
        """
        real = os.path.realpath(folder)
        if self._ways.get(folder, real) != real and others_above(folder):
            message = (
                f"{printable(folder)} points to {printable(real)} now, and pointed to {printable(self._ways[folder])}"
            )
            hint = "put the folder back, or restart the daemon if this is intended"
            raise SpoolError(message, path=folder, code=errno.ENOTDIR, hint=hint)
        self._ways[folder] = real

    def _require_lock_in(self, folder: str) -> None:
        """Make sure that the state folder that this process locked was not moved.

        Another one has another ledger, or none. If the locked one was deleted, this process still knows what it has
        sent, and continues with the one that is there.

        Raises:
            SpoolError: It was replaced.
        """
        if folder != self.state or self._lock is None:
            return
        if has_file(folder, _LOCK, self._lock) or not os.fstat(self._lock.fileno()).st_nlink:
            return
        message = f"the state folder was replaced by another one while imagewatch was running: {printable(folder)}"
        hint = "put the previous one back, it records what was paid; or restart imagewatch to use this one"
        raise SpoolError(message, path=folder, code=errno.ESTALE, hint=hint)

    def _lock_again(self) -> None:
        """Lock the state folder if the file of the lock was deleted."""
        if self._lock is None or os.fstat(self._lock.fileno()).st_nlink:
            return
        held = lock(os.path.join(self.state, _LOCK), self.tops)
        self._lock.close()
        self._lock = held

    def _sync_inner(self, top: str, folder: str) -> None:
        """Make the names in the folders between a top and a folder below it durable, as far as they are there."""
        path = top
        for part in ["", *(folder.split("/") if folder else [])]:
            path = os.path.join(path, part) if part else path
            if not self.tops.is_folder(path):
                return
            self.disk.sync_folder(path)

    def _sync_above(self, folders: list[str]) -> None:
        """Make the names of our folders durable, and of those that were created above them."""
        above = {folder for inner in folders for folder in _above(os.path.realpath(inner))}
        own = {os.path.realpath(self.inbox), os.path.realpath(self.state)}
        for folder in sorted(above - own):
            # If we may not open a folder, we created nothing in it.
            with contextlib.suppress(SpoolError):
                self.disk.sync_folder(folder)
        for folder in sorted(own):
            self.disk.sync_folder(folder)

    def unlock(self) -> None:
        """Unlock the folders for another daemon."""
        for held in (self._claims_lock, self._lock):
            if held is not None:
                held.close()
        self._claims_lock = self._lock = None

    def require_mounts(self, *folders: str) -> None:
        """Make sure that no file system below one of our folders was unmounted since the start.

        Args:
            folders: Those that are compared; without, all.

        Raises:
            SpoolError: One was, or one of our folders is missing.
        """
        for folder in folders or self._all():
            with disk_errors(folder, "check the folder"):
                if not self.tops.is_replaced(folder):
                    continue
            self._mounts.require()
            self._open()
            return

    def require_folders(self) -> None:
        """Make sure that no folder was replaced, also the one for claims if there is one.

        Raises:
            SpoolError: One was.
        """
        self.require_mounts()
        self._claims.check()
        if self._claims.is_open():
            self._lock_claims()

    def probe(self) -> None:
        """Prove that files can be moved out of the inbox and written to every other folder."""
        self.require_folders()
        self.require_claims()
        for folder in self._all()[1:]:
            self.disk.probe(folder, self._probe_name())
        self._prove_claim()

    def _probe_name(self) -> str:
        """Return a name for a short-lived file that no other user can predict."""
        return PROBE + self.new_job()

    def _remove_probes(self) -> None:
        """Remove the test files of a process that was killed; in a common inbox another daemon may be testing now."""
        newest = self.journal.clock() - _OLD_SECONDS if self.journal.common.is_on else math.inf
        for folder in (*self._all(), *([self.claims] if self._claims.is_open() else [])):
            with disk_errors(folder, "list the folder"):
                names = [name for name in self.tops.names(folder) if name.startswith(PROBE)]
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError, SpoolError):
                    status = self.tops.lstat(path)
                    if status.st_uid != os.geteuid() or status.st_mtime > newest:
                        continue
                    if stat.S_ISDIR(status.st_mode):
                        self.disk.unlink(os.path.join(path, PROBE_INNER))
                        self.disk.remove_folder(path)
                    else:
                        self.disk.unlink(path)

    def require_room(self, least: int) -> None:
        """Make sure that a paid response can be saved.

        Args:
            least: Bytes that must be free where responses and images are written.

        Raises:
            SpoolError: There is too little space, or too few files (inodes) are left.
        """
        self.require_folders()
        require_space((self.state, self.outbox), least, self.tops)

    def _all(self) -> list[str]:
        archive = [self.archive] if self.archive else []
        return [self.inbox, self.outbox, self.errors, *archive, self.state]

    def destinations(self) -> list[str]:
        """Return the folders into which files are published."""
        return [folder for folder in (self.outbox, self.errors, self.archive) if folder]

    def has_claims(self) -> bool:
        """Return whether the folder for claims is open."""
        return self._claims.is_open()

    def ensure_claims(self) -> None:
        """Open the folder for claims, if it is not open.

        Raises:
            NotOursError: Another folder has its name.
        """
        if not self.has_claims():
            self.require_claims()

    def top(self, path: str) -> str:
        """Return the one of our folders that contains a path; an empty string if none does."""
        return next((top for top in self._all() if path == top or path.startswith(f"{top}/")), "")

    def _prove_claim(self) -> None:
        """Prove that a file can be renamed from the inbox into a claim."""
        name = self._probe_name()
        source, target = os.path.join(self.inbox, name), os.path.join(self.claims, name)
        self.disk.create(source).close()
        try:
            with disk_errors(self.inbox, "rename a file inside the inbox, which claiming a prompt needs"):
                self.disk.rename(source, target)
        finally:
            self.disk.unlink(source)
            self.disk.unlink(target)

    def _prove_outbox(self) -> None:
        """Prove that published files can get their mode and group."""
        path, folder = (
            os.path.join(self.outbox, self._probe_name()),
            os.path.join(self.outbox, self._probe_name() + ".d"),
        )
        try:
            with (
                closing(self.disk.create(path), path) as file,
                disk_errors(self.outbox, "set [outbox] file_mode or group"),
            ):
                self.permissions.apply(file.fileno())
        finally:
            self.disk.unlink(path)
        if self.permissions.folder_mode is None:
            return
        self.disk.make_folder(folder)
        try:
            self.disk.set_mode(folder, self.permissions.folder_mode)
        finally:
            self.disk.remove_folder(folder)

    def keeps_times(self) -> bool:
        """Return whether files of the inbox keep inode and times as long as they exist."""
        return keeps_times(self._kinds.of(self.inbox))

    @contextlib.contextmanager
    def reached(self, folder: str, inode: int = 0) -> Iterator[None]:
        """Reach a folder by one descriptor during the block, also if it is renamed.

        Raises:
            SpoolError: A link or a file is in its place, or a folder with another inode.
        """
        with contextlib.ExitStack() as stack:
            with disk_errors(folder, "enter the folder"):
                stack.enter_context(self.tops.held(folder, inode))
            yield

    def new_job(self) -> str:
        """Return an id that cannot be guessed."""
        return secrets.token_hex(8)

    def record(self, job: str) -> Record:
        """Return the record of a job; there need not be one."""
        return Record(self.journal, self.disk, self.answers, job, self._prepare_image)

    def _prepare_image(self, descriptor: int) -> None:
        """Give an image its mode and group before it is synced; what cannot be set is tried again when it is moved."""
        with contextlib.suppress(OSError):
            self.permissions.apply(descriptor)

    def claim_folder(self, job: str) -> str:
        """Return the folder of a job's originals."""
        epoch = self.journal.common.epoch(job)
        return os.path.join(self.claims, f"{job}.{epoch}" if epoch else job)

    def inbox_folder(self, claim: Claim) -> str:
        """Return the folder into which a prompt was dropped."""
        return os.path.join(self.inbox, claim.folder) if claim.folder else self.inbox

    def original(self, claim: Claim, name: str) -> str:
        """Return the path of a claimed original."""
        return os.path.join(self.claim_folder(claim.job), name)


def _above(folder: str) -> Iterator[str]:
    while (above := os.path.dirname(folder)) != folder:
        yield above
        folder = above
