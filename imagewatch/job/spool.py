"""The folders: taking work out of the inbox, and putting results where others read them.

The only module that knows which folder is which. It never looks at what an answer means. Its order of
operations is the protocol (``docs/ARCHITECTURE.md``); each of its public methods can be run again after a crash
and then finishes what was begun.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import secrets
import stat
from typing import IO, TYPE_CHECKING

from imagewatch.config.load import overlaps
from imagewatch.config.locate import others_above
from imagewatch.inbox.candidate import ANYWHERE
from imagewatch.inbox.claimed import JOB
from imagewatch.job.claims import Claims, NotOursError
from imagewatch.job.record import Record
from imagewatch.job.rules import Evidence
from imagewatch.protocol.names import PAID, SUFFIX, fits, fitted, tagged
from imagewatch.protocol.values import Claim, Decision, Door, Move
from imagewatch.system import leftovers
from imagewatch.system.disk_errors import closing, ours
from imagewatch.system.errors import ConfigError, SpoolError
from imagewatch.system.file_systems import Kinds, Mounts, keeps_times
from imagewatch.system.folders import NotAFolderError, has_file
from imagewatch.system.locks import lock
from imagewatch.system.permissions import Permissions
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from imagewatch.config.load import Config, Folders
    from imagewatch.system.disk import Disk
    from imagewatch.system.folders import Tops

_PROBE = ".iw-probe"
_LOCK = "lock"
_LONGEST_ENDING = ".receipt.toml"
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""In bytes; what Linux takes."""
_LEAST_FILES = 1000
"""Files that must still be possible, whatever space there is: a job makes some ten, SQLite two."""


def blocked(folders: Folders, folder: str, tops: Tops) -> str:
    """Return why no result of a folder below the inbox could be published, or an empty string.

    Asked before anything is claimed: what is paid for must have a place to go.

    Args:
        folders: Where the doors are.
        folder: Below the inbox, with ``/``.
        tops: The folders that were opened.
    """
    for door in (folders.outbox, folders.errors, folders.archive):
        if door == "delete":
            continue
        path = os.path.join(door, folder)
        if len(os.fsencode(path)) > _LONGEST_PATH - _LONGEST_NAME - 1:
            return "what it makes would have too long a path, so nothing is taken out of"
        if tops.opened(door) is None and not tops.exists(door):
            continue  # the daemon makes it when it starts, and does not start if it cannot
        path = _deepest(tops, door, folder)
        if path != door and not tops.is_folder(path):
            return f"{printable(path, 255)} is in the way of what it makes, so nothing is taken out of"
        place = tops.at(path)
        if not os.access(place.name, os.W_OK | os.X_OK, dir_fd=place.dir_fd):
            return f"what it makes cannot be put into {printable(path, 255)}, so nothing is taken out of"
    return ""


def _deepest(tops: Tops, top: str, folder: str) -> str:
    """Return how much of a path below a top is there: up to the first part that is missing, or is no folder."""
    whole = os.path.join(top, folder) if folder else top
    if tops.is_folder(whole):  # nearly always
        return whole
    path = top
    for part in folder.split("/"):
        inner = os.path.join(path, part)
        if not tops.exists(inner):
            break
        path = inner
        if not tops.is_folder(inner):
            break
    return path


def require_space(folders: Iterable[str], least: int, tops: Tops) -> None:
    """Make sure that there is room in folders.

    Args:
        folders: The folders.
        least: Bytes that must be free in each.
        tops: The folders that were opened.

    Raises:
        SpoolError: There is too little space, or hardly any file can be made any more.
    """
    for folder in folders:
        with ours(folder, "ask for the free space"):
            top = tops.opened(folder)
            status = os.statvfs(top.fileno() if top else folder)
        free, files = status.f_bavail * status.f_frsize, status.f_favail
        hint = "make room"
        if free < least:
            hint += ", or lower limits.min_free_bytes"
            message = f"{free:,} bytes are free, limits.min_free_bytes asks for {least:,}"
        elif status.f_files and files < _LEAST_FILES:  # some file systems do not count
            message = f"there is room for {files} more files only (inodes)"
        else:
            continue
        raise SpoolError(f"{printable(folder)}: {message}", path=folder, code=errno.ENOSPC, hint=hint)


class Spool:
    """All folders of one daemon.

    Args:
        config: Where they are, and the modes for what is published.
        disk: Our disk.
    """

    def __init__(self, config: Config, disk: Disk) -> None:
        folders = config.folders
        self._folders = folders
        self.disk = disk
        self.inbox = folders.inbox
        self.outbox = folders.outbox
        self.errors = folders.errors
        self.archive = None if folders.archive == "delete" else folders.archive
        self.state = folders.state
        self.jobs = os.path.join(folders.state, "jobs")
        self.paid = os.path.join(folders.state, PAID)
        self._claims = Claims(folders.inbox, folders.state, disk)
        self.claims = self._claims.path
        self._permissions = Permissions(config.outbox.file_mode, config.outbox.folder_mode, config.outbox.group)
        self._lock: IO[bytes] | None = None
        self._claims_lock: IO[bytes] | None = None
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
        """Make the folders and prove that they can be used, before anything is paid for.

        If another folder has the name of the one for claims, the start goes on: the queue will be held.

        Raises:
            ConfigError: Two folders are the same, or one lies in another.
            SpoolError: One of them cannot be written.
        """
        for folder in self._all():
            self.disk.make_folder(folder, mode=0o700 if folder == self.state else 0o777)
        if problems := overlaps(self._folders):  # a link may have been made since the configuration was read
            raise ConfigError(problems)
        self._open()
        self.disk.make_folder(self.jobs)
        with contextlib.suppress(NotOursError):
            self._claims.require()
        self._sync_above([*self._all(), self.jobs, self.claims])
        self._remove_probes()
        self._remove_temporaries()
        self._drop_twins()
        with contextlib.suppress(NotOursError):
            self.probe()
        self._prove_outbox()
        self._mounts = Mounts(self._all())

    def lock(self) -> None:
        """Become the only daemon for this inbox and this state folder, until the process ends.

        Raises:
            AlreadyRunning: Another one has them.
        """
        self.disk.make_folder(self.state)
        self.disk.make_folder(self.inbox, mode=0o777)
        self._open([self.state, self.inbox])
        self._lock = lock(os.path.join(self.state, _LOCK), self.tops)
        with contextlib.suppress(NotOursError):
            self._require_claims()

    def _require_claims(self) -> None:
        """Make sure that the folder for claims is ours, and that no other daemon uses it.

        The lock is a file in it. A lock on the inbox could be taken by whoever may read the inbox.

        Raises:
            NotOursError: Another folder has its name.
            AlreadyRunning: Another daemon uses it; nothing may be taken out of this inbox.
        """
        self._claims.require()
        self._lock_claims()

    def _lock_claims(self) -> None:
        path = os.path.join(self.claims, _LOCK)
        if self._lock is None:  # nothing is claimed in this process
            return
        if self._claims_lock is None or not self._is_file(self._claims_lock, path):
            held = lock(path, self.tops)
            if self._claims_lock is not None:
                self._claims_lock.close()
            self._claims_lock = held

    def _is_file(self, file: IO[bytes], path: str) -> bool:
        """Tell whether an open file is still the one of a name."""
        try:
            return os.path.samestat(os.fstat(file.fileno()), self.tops.lstat(path))
        except OSError:
            return False

    def _open(self, folders: list[str] | None = None) -> None:
        """Open our folders, and those anew in whose place there is another one now: the administrator's doing."""
        for folder in folders or self._all():
            with ours(folder, "open the folder"):
                if self.tops.is_replaced(folder):
                    self._require_same_way(folder)
                    self._require_lock_in(folder)
                    self.tops.open(folder, is_private=folder == self.state)
                    self._kinds.refresh()
            if folder == self.state:
                self._lock_anew()

    def _require_same_way(self, folder: str) -> None:
        """Make sure that nobody else put a link where one of our folders was: it might lead to another one of ours.

        Raises:
            SpoolError: Its path leads elsewhere than before, and others may have made that so.
        """
        real = os.path.realpath(folder)
        if self._ways.get(folder, real) != real and others_above(folder):
            message = f"{printable(folder)}: leads to {printable(real)} now, and led to {printable(self._ways[folder])}"
            hint = "put the folder back, or restart the daemon if this is meant"
            raise SpoolError(message, path=folder, code=errno.ENOTDIR, hint=hint)
        self._ways[folder] = real

    def _require_lock_in(self, folder: str) -> None:
        """Make sure that the state folder that this process locked is not merely somewhere else.

        Another one has another ledger, or none. If the locked one was deleted, this process still knows what it has
        sent, and goes on with the one that is there.

        Raises:
            SpoolError: It was replaced.
        """
        if folder != self.state or self._lock is None:
            return
        if has_file(folder, _LOCK, self._lock) or not os.fstat(self._lock.fileno()).st_nlink:
            return
        message = f"{printable(folder)}: the state folder was replaced by another one while imagewatch was running"
        hint = "put the one back that was there, it says what was paid; or restart imagewatch to begin with this one"
        raise SpoolError(message, path=folder, code=errno.ESTALE, hint=hint)

    def _lock_anew(self) -> None:
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
        """Make the names of our folders durable, and of those that were made above them."""
        above = {folder for inner in folders for folder in _above(os.path.realpath(inner))}
        own = {os.path.realpath(self.inbox), os.path.realpath(self.state)}
        for folder in sorted(above - own):
            # One that we may not open is not one in which we made something.
            with contextlib.suppress(SpoolError):
                self.disk.sync_folder(folder)
        for folder in sorted(own):
            self.disk.sync_folder(folder)

    def _drop_twins(self) -> None:
        """Remove from the inbox what is claimed already, before anybody looks for prompts there.

        After a power cut a file that was renamed into a claim may have its old name, too (btrfs, when only the claim
        folder was synced); so may one that was given back. A second claim of it would be paid for again.
        """
        for job in self.unfinished():
            with contextlib.suppress(SpoolError):  # a damaged record: its job says so when it is carried on
                if claim := self.record(job).claim():
                    self._drop_twins_of(claim)

    def unlock(self) -> None:
        """Let another daemon have the folders."""
        for held in (self._claims_lock, self._lock):
            if held is not None:
                held.close()
        self._claims_lock = self._lock = None

    def require_mounts(self) -> None:
        """Make sure that no file system is gone from under one of our folders since the start.

        Raises:
            SpoolError: One is, or one of our folders is not there.
        """
        for folder in self._all():
            with ours(folder, "look at the folder"):
                if not self.tops.is_replaced(folder):
                    continue
            self._mounts.require()
            self._open()
            return

    def require_folders(self) -> None:
        """Make sure that all folders are those that they were, also the one for claims if there is one.

        Raises:
            SpoolError: One is not.
        """
        self.require_mounts()
        self._claims.check()
        if self._claims.is_open():
            self._lock_claims()

    def probe(self) -> None:
        """Prove that files can be taken out of the inbox and put into every other folder."""
        self.require_folders()
        self._require_claims()
        for folder in self._all()[1:]:
            self.disk.probe(folder, self._probe())
        self._prove_claim()

    def _probe(self) -> str:
        """Return a name for a short-lived file, in whose way nobody can put anything."""
        return f"{_PROBE}.{self.new_job()}"

    def _remove_probes(self) -> None:
        """Remove what a write probe of ours has left that was killed."""
        for folder in (*self._all(), *([self.claims] if self._claims.is_open() else [])):
            with ours(folder, "list the folder"):
                names = [name for name in self.tops.names(folder) if name.startswith(_PROBE)]
            for name in names:
                path = os.path.join(folder, name)
                with contextlib.suppress(OSError, SpoolError):
                    status = self.tops.lstat(path)
                    if status.st_uid == os.geteuid():
                        (self.disk.remove_folder if stat.S_ISDIR(status.st_mode) else self.disk.unlink)(path)

    def _remove_temporaries(self) -> None:
        """Remove what was about to be published when the daemon was killed."""
        keys = {job: key for job in self.unfinished() if (key := self.key(job))}
        doors = [door for door in (self.outbox, self.errors, self.archive) if door]
        leftovers.remove(self.disk, doors, {job: folder for job, (folder, _) in keys.items()})

    def require_room(self, least: int) -> None:
        """Make sure that a paid answer can be taken in.

        Args:
            least: Bytes that must be free where answers and pictures are written.

        Raises:
            SpoolError: There is too little space, or hardly any file can be made any more.
        """
        self.require_folders()
        require_space((self.state, self.outbox), least, self.tops)

    def _all(self) -> list[str]:
        archive = [self.archive] if self.archive else []
        return [self.inbox, self.outbox, self.errors, *archive, self.state]

    def top(self, path: str) -> str:
        """Return which of our folders something is, or is in; an empty string if it is in none."""
        return next((top for top in self._all() if path == top or path.startswith(f"{top}/")), "")

    def _prove_claim(self) -> None:
        """Prove that a file can be renamed from the inbox into a claim."""
        name = self._probe()
        source, target = os.path.join(self.inbox, name), os.path.join(self.claims, name)
        self.disk.create(source).close()
        try:
            with ours(self.inbox, "rename a file inside the inbox, which claiming a prompt needs"):
                self.disk.rename(source, target)
        finally:
            self.disk.unlink(source)
            self.disk.unlink(target)

    def _prove_outbox(self) -> None:
        """Prove that what we publish can get the mode and the group it is to have."""
        path, folder = os.path.join(self.outbox, self._probe()), os.path.join(self.outbox, self._probe() + ".d")
        try:
            with closing(self.disk.create(path), path) as file, ours(self.outbox, "set [outbox] file_mode or group"):
                self._permissions.apply(file.fileno())
        finally:
            self.disk.unlink(path)
        if self._permissions.folder_mode is None:
            return
        self.disk.make_folder(folder)
        try:
            self.disk.set_mode(folder, self._permissions.folder_mode)
        finally:
            self.disk.remove_folder(folder)

    # Taking work

    def record(self, job: str) -> Record:
        """Return the record of a job."""
        return Record(self.disk, self.jobs, job)

    def unfinished(self) -> list[str]:
        """Return the ids of all jobs of which anything is left, oldest record first."""
        with ours(self.state, "list the jobs"):
            ids = set(self.tops.names(self.jobs, folders=True))
            if self._claims.is_open():
                # Where a file system keeps no owners, others can make folders here.
                ids.update(filter(JOB.fullmatch, self.tops.names(self.claims, folders=True)))
        return sorted(ids, key=lambda job: (self._age(self.record(job).path("claim.json")), job))

    def _age(self, path: str) -> int:
        try:
            return self.tops.lstat(path).st_mtime_ns
        except OSError:
            return 0

    def key(self, job: str) -> tuple[str, str] | None:
        """Return folder and stem of a job; None where nothing tells.

        Where its record is gone or damaged, the claimed prompt has the stem; from which folder it came is not known.
        """
        with contextlib.suppress(SpoolError):
            if claim := self.record(job).claim():
                return claim.folder, claim.stem
        with contextlib.suppress(SpoolError):
            for name in self.orphans(job):
                if name.endswith(SUFFIX):
                    return ANYWHERE, name.removesuffix(SUFFIX)
        return None

    def is_left(self, job: str) -> bool:
        """Tell whether there is a record of a job, or a claimed file."""
        return self.tops.is_folder(os.path.join(self.jobs, job)) or bool(self._claimed_names(job))

    def orphans(self, job: str) -> list[str]:
        """Return the originals of a claim without a record, as only a lost state folder leaves them behind."""
        return sorted(self._claimed_names(job))

    def new_job(self) -> str:
        """Return an id that nobody can guess."""
        return secrets.token_hex(8)

    def owner(self, claim: Claim) -> str:
        """Return the name of the user to whom a prompt in the inbox belongs, else the number; empty if it is gone."""
        try:
            user = self.tops.lstat(os.path.join(self.inbox_folder(claim), claim.prompt)).st_uid
        except OSError:
            return ""
        try:
            return printable(pwd.getpwuid(user).pw_name, 100)
        except (KeyError, OSError):  # of another machine, or a directory that does not answer
            return str(user)

    def claim(self, claim: Claim) -> bool:
        """Take a prompt out of the inbox: its rename is the lock.

        Returns:
            False when the prompt was gone: it was cancelled, or another folder has the name of its folder now.
        """
        self._require_claims()
        record = self.record(claim.job)
        record.begin(claim)
        folder = self.claim_folder(claim.job)
        self.disk.make_folder(folder)
        self.disk.sync_folder(self.claims)
        try:
            with self._reached(self.inbox_folder(claim), self._inode(claim)):
                taken = self._take(claim, claim.prompt)
                if taken:
                    self.gather(claim)
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError | NotAFolderError) and not self._claimed_names(claim.job):
                return False
            raise
        return taken

    def _inode(self, claim: Claim) -> int:
        """Return the inode that the folder of a prompt must have; 0 where inodes do not tell."""
        return claim.folder_inode if self._is_steady() else 0

    def _is_steady(self) -> bool:
        """Tell whether the files of the inbox keep inode and times for as long as they exist."""
        return keeps_times(self._kinds.of(self.inbox))

    @contextlib.contextmanager
    def _reached(self, folder: str, inode: int = 0) -> Iterator[None]:
        """Reach a folder by one descriptor during the block, whatever happens to its name.

        Raises:
            SpoolError: A link or a file is in its place, or another folder than the one with this inode.
        """
        with contextlib.ExitStack() as stack:
            with ours(folder, "enter the folder"):
                stack.enter_context(self.tops.held(folder, inode))
            yield

    @contextlib.contextmanager
    def working_on(self, job: str) -> Iterator[None]:
        """Reach the claim of a job by one descriptor during the block, if it is there."""
        with contextlib.ExitStack() as stack:
            with contextlib.suppress(OSError):  # each step says what is in its place
                stack.enter_context(self.tops.held(self.claim_folder(job)))
            yield

    def gather(self, claim: Claim) -> None:
        """Take the other originals of a job, then make all its names durable."""
        with self._reached(self.inbox_folder(claim), self._inode(claim)):
            for name in claim.images:
                self._take(claim, name)
            self.disk.sync_folder(self.claim_folder(claim.job))
            self.disk.sync_folder(self.inbox_folder(claim))

    def _take(self, claim: Claim, name: str) -> bool:
        source = os.path.join(self.inbox_folder(claim), name)
        target = self.original(claim, name)
        if self._drop_twin(source, target):
            return True
        if not self._may_be_taken(source):
            return False
        try:
            with ours(source, "take the file out of the inbox"):
                self.disk.rename(source, target)
        except SpoolError as error:
            if isinstance(error.__cause__, FileNotFoundError | FileExistsError):
                return False
            raise
        if self.tops.is_folder(target):  # it took the place of the file in this moment
            with ours(source, "put the folder back into the inbox"):
                self.disk.rename(target, source)
            return False
        return True

    def _may_be_taken(self, path: str) -> bool:
        """Tell whether there is something to be claimed. A folder stays, whatever a prompt says of it."""
        try:
            return not stat.S_ISDIR(self.tops.lstat(path).st_mode)
        except OSError:
            return False

    def is_as_seen(self, claim: Claim) -> bool:
        """Tell whether the claimed files are those that the scan accepted, unchanged.

        Where inodes and times do not tell, their sizes are compared.
        """
        is_steady = self._is_steady()
        for name, (inode, size, mtime_ns) in claim.files.items():
            try:
                status = self.tops.lstat(self.original(claim, name))
            except FileNotFoundError:
                continue  # an image that is missing is a problem of the request
            if not stat.S_ISREG(status.st_mode):
                if size >= 0:
                    return False
            elif status.st_size != size or (is_steady and (status.st_ino, status.st_mtime_ns) != (inode, mtime_ns)):
                return False
        return True

    def settle(self, claim: Claim) -> None:
        """Make durable what a process that died, or a call that failed, has left of a job.

        What can be seen may not be durable yet, and what comes next is decided by what is seen.
        """
        self._drop_twins_of(claim)
        for folder in (self.jobs, self.record(claim.job).folder, self.claims, self.claim_folder(claim.job)):
            if self.tops.is_folder(folder):
                self.disk.sync_folder(folder)
        if self.tops.is_folder(self.inbox_folder(claim)):
            self.disk.sync_folder(self.inbox_folder(claim))
        for door in (self.outbox, self.errors, *([self.archive] if self.archive else [])):
            self._sync_inner(door, claim.folder)

    def _drop_twins_of(self, claim: Claim) -> None:
        with contextlib.suppress(OSError), self.tops.held(self.inbox_folder(claim)):
            self._drop_twins_in(claim)

    def _drop_twins_in(self, claim: Claim) -> None:
        for name in claim.originals:
            self._drop_twin(os.path.join(self.inbox_folder(claim), name), self.original(claim, name))

    def _drop_twin(self, source: str, target: str) -> bool:
        """Remove an inbox name of a file that is claimed already (some file systems bring it back)."""
        try:
            twin = os.path.samestat(self.tops.lstat(target), self.tops.lstat(source))  # hardly ever is there a target
        except OSError:
            return False
        if twin:
            self.disk.unlink(source)
        return twin

    def claim_folder(self, job: str) -> str:
        """Return the folder of a job's originals."""
        return os.path.join(self.claims, job)

    def inbox_folder(self, claim: Claim) -> str:
        """Return the folder a prompt was dropped into."""
        return os.path.join(self.inbox, claim.folder) if claim.folder else self.inbox

    def original(self, claim: Claim, name: str) -> str:
        """Return the path of a claimed original."""
        return os.path.join(self.claims, claim.job, name)

    # What lies there

    def evidence(self, claim: Claim, record: Record) -> Evidence:
        """Return what the disk shows of a job; what only the process knows is left at its default.

        Each folder is listed once, and only what is there is read.

        Args:
            claim: What was claimed; whether it still is written down, the disk says.
            record: The job's record.
        """
        job = claim.job
        names = record.names()
        if "claim.json" not in names:
            return Evidence(leftovers=record.exists() or self.tops.exists(self.claim_folder(job)))
        originals = self._originals(claim)
        sent, answered = record.attempts(names)
        decision = record.decision() if "decision.json" in names else None
        return Evidence(
            recorded=True,
            claimed=claim.prompt in originals,
            originals=bool(originals),
            missing=any(
                name not in originals and self._may_be_taken(os.path.join(self.inbox_folder(claim), name))
                for name in claim.images
            ),
            sent=sent,
            answered=answered,
            begun=sent > answered and record.partial(sent) is not None,
            decided=decision.door if decision else None,
            reopened="reopened.json" in names,
            over="over" in names or (decision is not None and self._document_out(claim, decision)),
        )

    def _claimed_names(self, job: str) -> set[str]:
        """Return the names of all files in the folder of a claim."""
        path = self.claim_folder(job)
        with ours(path, "list the folder"), contextlib.suppress(FileNotFoundError):
            return set(self.tops.names(path, folders=False))
        return set()

    def _originals(self, claim: Claim) -> set[str]:
        """Return which of its originals are in the claim. Whatever else is there is not touched."""
        return self._claimed_names(claim.job).intersection(claim.originals)

    def _document_out(self, claim: Claim, decision: Decision) -> bool:
        if decision.door == "away":
            return False
        path = os.path.join(self.door_folder(decision.door, claim), decision.name)
        return self.disk.has_content(path, decision.document.encode())

    # Putting results out

    def door_folder(self, door: Door | str, claim: Claim) -> str:
        """Return the folder behind a door, which mirrors the inbox."""
        top = {"outbox": self.outbox, "errors": self.errors, "archive": self.archive or ""}[door]
        return os.path.join(top, claim.folder) if claim.folder else top

    def base(self, claim: Claim, door: Door, endings: list[str]) -> str:
        """Choose the beginning of the names a job publishes, once for all of them.

        Args:
            claim: The job.
            door: Where they go.
            endings: What follows the base in each name, e.g. ``.png``, ``.receipt.toml``.

        Returns:
            The stem, or the stem with as much of the job's id as it takes to be free.
        """
        folder = self.door_folder(door, claim)
        plain = [claim.stem] if fits(claim.stem + _LONGEST_ENDING) else []
        by_id = [
            fitted(claim.stem, f".{tag}{_LONGEST_ENDING}")[: -len(_LONGEST_ENDING)] for tag in (claim.tag, claim.job)
        ]
        for base in (*plain, *by_id):
            if not any(self.tops.exists(os.path.join(folder, base + ending)) for ending in endings):
                return base
        return by_id[-1]

    def free_originals(self, claim: Claim, door: str, present: list[str], base: str | None = None) -> tuple[Move, ...]:
        """Return how the originals of a job are named behind a door, so that nothing is overwritten.

        Args:
            claim: The job.
            door: ``errors`` or ``archive``.
            present: Names in the claim, the prompt last.
            base: The base chosen for this door, if other names of the job go there too.
        """
        folder = self.door_folder(door, claim)
        plain = base in {None, claim.stem}
        if plain and not any(self.tops.exists(os.path.join(folder, name)) for name in present):
            return tuple(Move(source=f"claim/{name}", name=name) for name in present)
        tag = claim.tag
        if any(self.tops.exists(os.path.join(folder, tagged(name, claim.stem, tag))) for name in present):
            tag = claim.job
        return tuple(Move(source=f"claim/{name}", name=tagged(name, claim.stem, tag)) for name in present)

    def present(self, claim: Claim) -> list[str]:
        """Return the names of its originals that are in the claim, the prompt last."""
        return sorted(self._originals(claim), key=lambda name: (name == claim.prompt, name))

    def deliver(self, claim: Claim, decision: Decision) -> None:
        """Put a decision's files behind its door, and then the document that says it is over.

        Raises:
            FileExistsError: A name was taken in the meantime; decide again and repeat.
        """
        folder = self.door_folder(decision.door, claim)
        self._mirror(decision.door, claim)
        with self._reached(folder):
            self._carry_all(claim, decision.moves, folder, decision.mtime_ns)
            if decision.moves:
                self.disk.sync_folder(folder)
            target = os.path.join(folder, decision.name)
            self.disk.publish(
                target, _temporary(folder, claim, "d"), decision.document.encode(), self._permissions.apply
            )
        self.record(claim.job).mark_over()

    def keep(self, claim: Claim, decision: Decision) -> None:
        """Empty the claim folder of a finished job: its originals go to the archive, or away if none is kept."""
        door = "archive" if decision.door == "outbox" else "errors"
        if door == "archive" and self.archive is None:
            self.discard(claim)
            return
        folder = self.door_folder(door, claim)
        self._mirror(door, claim)
        moves = (
            decision.keep if door == "archive" else tuple(m for m in decision.moves if m.source.startswith("claim/"))
        )
        with self._reached(folder):
            with contextlib.suppress(FileExistsError):  # whoever took the name meanwhile keeps it; ours go beside it
                self._carry_all(claim, moves, folder, decision.mtime_ns)
            if left := self.present(claim):
                self._carry_all(claim, self.free_originals(claim, door, left), folder, decision.mtime_ns)
            self.disk.sync_folder(folder)

    def give_back(self, claim: Claim) -> bool:
        """Put the originals back into the inbox, the prompt last; their folder is made again if it is gone.

        Returns:
            False when a newer file has one of the names; the job then stays claimed.
        """
        folder = self.inbox_folder(claim)
        names = self.present(claim)
        if not names:
            return True
        self.require_mounts()  # or there is no inbox
        self.disk.make_inner(self.inbox, claim.folder)
        with self._reached(folder):
            return self._give_back(claim, folder, names)

    def _give_back(self, claim: Claim, folder: str, names: list[str]) -> bool:
        # A sync tool may have brought some of them back meanwhile: then those are the ones that stay.
        again = {name for name in names if self.disk.same(self.original(claim, name), os.path.join(folder, name))}
        if any(self.tops.exists(os.path.join(folder, name)) for name in names if name not in again):
            return False
        for name in names:
            if name in again:
                self.disk.unlink(self.original(claim, name))
            elif not self._return(self.original(claim, name), os.path.join(folder, name)):
                return False
        self.disk.sync_folder(folder)
        return True

    def _return(self, source: str, target: str) -> bool:
        try:
            with ours(target, "give the file back to the inbox"):
                self.disk.rename(source, target)
        except SpoolError as error:
            if isinstance(error.__cause__, FileExistsError | FileNotFoundError):
                return False
            raise
        return True

    def forget(self, job: str, *, keep: bool = False) -> None:
        """Remove the claim folder, then the record, then the answers: this order only.

        Whoever comes here has moved the originals on; what strangers put beside them stays.

        Args:
            job: Its id.
            keep: Keep the record, as its answer was paid for and may yet give a picture.
        """
        if not self._claims.is_open():
            self._require_claims()
        self.disk.remove_folder(self.claim_folder(job))
        self.disk.sync_folder(self.claims)
        record = self.record(job)
        if keep:
            record.bank(self.paid)
        elif record.exists():
            record.remove()

    def reopen(self, job: str) -> bool:
        """Make a paid job live again that gave no picture; return whether its answer is still there."""
        return self.record(job).reopen(self.paid)

    def reclaim(self, claim: Claim) -> None:
        """Take the originals of a reopened job out of ``errors`` again, then its raw answer and its error file."""
        record = self.record(claim.job)
        decision = record.reopened()
        assert decision is not None
        if not self._claims.is_open():
            self._require_claims()
        self.disk.make_folder(self.claim_folder(claim.job))
        self.disk.sync_folder(self.claims)
        folder = self.door_folder(decision.door, claim)
        with self._reached(folder):
            for number, move in enumerate(decision.moves):
                path, target = os.path.join(folder, move.name), self._source(claim, move)
                if move.source.startswith("claim/"):
                    self.disk.carry(path, target, _temporary(self.claim_folder(claim.job), claim, str(number)))
                else:
                    self.disk.unlink(path)
            self.disk.sync_folder(self.claim_folder(claim.job))
            self.disk.unlink(os.path.join(folder, decision.name))
            if self.tops.is_folder(folder):
                self.disk.sync_folder(folder)
        record.taken_back()

    def discard(self, claim: Claim) -> None:
        """Remove the originals of a job that nobody needs: those of a job that is over lie where it went."""
        for name in self.present(claim):
            self.disk.unlink(self.original(claim, name))

    def source_exists(self, claim: Claim, move: Move) -> bool:
        """Tell whether a file still waits to be moved."""
        return self.tops.exists(self._source(claim, move))

    def _source(self, claim: Claim, move: Move) -> str:
        place, _, name = move.source.partition("/")
        return self.original(claim, name) if place == "claim" else self.record(claim.job).path(name)

    def _carry_all(self, claim: Claim, moves: tuple[Move, ...], folder: str, mtime_ns: int) -> None:
        """Move files behind a door. What we made gets the mode of our files, what was dropped keeps its own.

        The prompt gets a new mtime, so that whoever moves it back into the inbox means a new job: with its old one it
        would be taken for a file that a sync tool brings back.
        """
        for number, move in enumerate(moves):
            target, dropped = os.path.join(folder, move.name), move.source.startswith("claim/")
            self.disk.carry(
                self._source(claim, move),
                target,
                _temporary(folder, claim, str(number)),
                None if dropped else self._permissions.apply,
                mtime_ns=mtime_ns if dropped and move.source == f"claim/{claim.prompt}" else None,
            )

    def _mirror(self, door: str, claim: Claim) -> None:
        """Make the folder behind a door that mirrors the inbox folder, durably."""
        self.require_mounts()
        top = self.door_folder(door, Claim(job="", folder="", stem=""))
        self.disk.make_inner(top, claim.folder, self._permissions.folder_mode if door == "outbox" else None)


def _temporary(folder: str, claim: Claim, number: str) -> str:
    return os.path.join(folder, f".iw-{claim.job}.{number}.tmp")


def _above(folder: str) -> Iterator[str]:
    while (above := os.path.dirname(folder)) != folder:
        yield above
        folder = above
