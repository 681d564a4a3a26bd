"""What is published: names that are free, and files put into outbox, errors and archive."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict
from typing import TYPE_CHECKING

from imagewatch.job.result_files import result_file
from imagewatch.protocol.names import RECEIPT, fits, fitted, tagged
from imagewatch.protocol.values import Claim, Decision, Destination, Move
from imagewatch.system.disk_moves import nothing
from imagewatch.system.errors import SpoolError
from imagewatch.system.shared import Together
from imagewatch.system.text import printable
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Folders
    from imagewatch.job.folders import JobFolders
    from imagewatch.job.originals import Originals
    from imagewatch.job.record import Record
    from imagewatch.system.folders import Tops

_DURABLE = "state/answer.image."
"""Images that were decoded while their response arrived: they were synced with it."""
_PIECE = 1024 * 1024
_EARLIER = 20
"""Of so many earlier holders of a job it is removed what they were about to publish."""
_LONGEST_NAME, _LONGEST_PATH = 255, 4095
"""In bytes; what Linux takes."""


def blocked(folders: Folders, folder: str, tops: Tops) -> str:
    """Return why no result of a folder below the inbox could be published, or an empty string.

    Checked before a prompt is claimed: what is paid for must have a destination.

    Args:
        folders: The destinations.
        folder: Below the inbox, with ``/``.
        tops: The folders that were opened.
    """
    for top in (folders.outbox, folders.errors, folders.archive):
        if top == "delete":
            continue
        path = os.path.join(top, folder)
        if len(os.fsencode(path)) > _LONGEST_PATH - _LONGEST_NAME - 1:
            return "the paths of its results would be too long, so nothing is claimed from"
        if tops.opened(top) is None and not tops.exists(top):
            continue  # the daemon makes it when it starts, and does not start if it cannot
        path = _deepest(tops, top, folder)
        if path != top and not tops.is_folder(path):
            return f"{printable(path, 255)} is not a folder, so results cannot be published and nothing is claimed from"
        place = tops.at(path)
        if not os.access(place.name, os.W_OK | os.X_OK, dir_fd=place.dir_fd):
            return f"the daemon may not write to {printable(path, 255)}, so nothing is claimed from"
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


class Delivery:
    """Publishes the results of jobs.

    Args:
        folders: All folders.
        originals: The files that were dropped.
    """

    def __init__(self, folders: JobFolders, originals: Originals) -> None:
        self._folders = folders
        self._originals = originals
        self._disk = folders.disk
        self._keeping = Together(self._keep_all)
        self._expected: set[str] = set()

    def is_published(self, claim: Claim, decision: Decision) -> bool:
        """Return whether the result file of a decision is at its destination."""
        if decision.destination == "discarded":
            return False
        path = os.path.join(self.destination_folder(decision.destination, claim), decision.name)
        return self._disk.has_content(path, decision.result_file.encode())

    def destination_folder(self, destination: Destination | str, claim: Claim) -> str:
        """Return the folder of a destination that mirrors the folder of the inbox."""
        top = {"outbox": self._folders.outbox, "errors": self._folders.errors, "archive": self._folders.archive or ""}[
            destination
        ]
        return os.path.join(top, claim.folder) if claim.folder else top

    def base(self, claim: Claim, destination: Destination, endings: list[str]) -> str:
        """Choose the beginning of the names a job publishes, once for all of them.

        Args:
            claim: The job.
            destination: Where they go.
            endings: What follows the base in each name, e.g. ``.png``, ``.receipt.toml``.

        Returns:
            The stem, or the stem with as much of the job's id as it takes to be free.
        """
        folder, bases = self.destination_folder(destination, claim), self.bases(claim)
        for base in bases:
            if not any(self._folders.tops.exists(os.path.join(folder, base + ending)) for ending in endings):
                return base
        return bases[-1]

    @staticmethod
    def bases(claim: Claim) -> list[str]:
        """Return what the names that a job publishes may begin with, the best one first."""
        plain = [claim.stem] if fits(claim.stem + RECEIPT) else []
        return plain + [fitted(claim.stem, f".{tag}{RECEIPT}")[: -len(RECEIPT)] for tag in (claim.tag, claim.job)]

    def free_originals(
        self, claim: Claim, destination: str, present: list[str], base: str | None = None
    ) -> tuple[Move, ...]:
        """Return how the originals of a job are named at a destination, so that nothing is overwritten.

        Args:
            claim: The job.
            destination: ``errors`` or ``archive``.
            present: Names in the claim, the prompt last.
            base: The base chosen for this destination, if other names of the job go there too.
        """
        folder = self.destination_folder(destination, claim)
        plain = base in {None, claim.stem}
        if plain and not any(self._folders.tops.exists(os.path.join(folder, name)) for name in present):
            return tuple(Move(source=f"claim/{name}", name=name) for name in present)
        tag = claim.tag
        if any(self._folders.tops.exists(os.path.join(folder, tagged(name, claim.stem, tag))) for name in present):
            tag = claim.job
        return tuple(Move(source=f"claim/{name}", name=tagged(name, claim.stem, tag)) for name in present)

    def deliver(self, claim: Claim, decision: Decision, check: Callable[[], object]) -> None:
        """Put a decision's files where they go, and the result file last.

        Args:
            claim: The job.
            decision: How it ended.
            check: Raises an error if another daemon has the job. Called right before each name appears, when the file
                has its temporary name. The other one removes that name first, so that no daemon publishes a file which
                the other one has published, also if it is stopped after the check.

        Raises:
            FileExistsError: A name exists since the decision; decide again and repeat.
        """
        folder = self.destination_folder(decision.destination, claim)
        self._mirror(decision.destination, claim)
        with self._folders.reached(folder):
            if any(move.source.startswith("claim/") for move in decision.moves):
                self._originals.leave(self._folders.inbox_folder(claim))
            for number in (*range(len(decision.moves)), "d"):  # of all, before the first one is published
                self._temporary(folder, claim, str(number))
            self._carry_all(claim, decision.moves, folder, decision.mtime_ns, check)
            target = os.path.join(folder, decision.name)
            self._disk.publish(
                target,
                self._temporary(folder, claim, "d"),
                decision.result_file.encode(),
                self._folders.permissions.apply,
                check,
            )

    def expect(self, job: str) -> None:
        """Note that the originals of a job will have to be kept soon."""
        self._expected.add(job)

    def expect_no_more(self, job: str) -> None:
        """Note that they will not, or are."""
        self._expected.discard(job)

    def keep(self, claim: Claim, decision: Decision) -> None:
        """Empty the claim folder of a finished job: its originals go to the archive, or are removed if none is kept.

        Jobs that end at about the same time share what is waited for: the result files are there, so there is time.
        """
        self._expected.add(claim.job)
        try:
            self._keeping.do((claim, decision), lambda: len(self._expected))
        finally:
            self._expected.discard(claim.job)

    def _keep_all(self, jobs: list[tuple[Claim, Decision]]) -> dict[int, Exception]:
        """Do it for several jobs, and return the error of each that failed, by its number."""
        errors: dict[int, Exception] = {}
        self._share(jobs, errors, lambda claim, _: self._folders.inbox_folder(claim), self._originals.leave)
        for number, (claim, decision) in enumerate(jobs):
            if number not in errors:
                try:
                    self._keep(claim, decision)
                except Exception as error:  # noqa: BLE001  a bug in one job must not stop the others
                    errors[number] = error
        self._share(jobs, errors, self._kept_in, self._disk.sync_folder)
        return errors

    @staticmethod
    def _share(
        jobs: list[tuple[Claim, Decision]],
        errors: dict[int, Exception],
        folder_of: Callable[[Claim, Decision], str],
        act: Callable[[str], object],
    ) -> None:
        """Do something with the folder of each job that has not failed, once for each folder."""
        folders: defaultdict[str, list[int]] = defaultdict(list)
        for number, job in enumerate(jobs):
            if number not in errors and (folder := folder_of(*job)):
                folders[folder].append(number)
        for folder, numbers in folders.items():
            try:
                act(folder)
            except (SpoolError, OSError) as error:
                errors.update(dict.fromkeys(numbers, error))

    def _kept_in(self, claim: Claim, decision: Decision) -> str:
        """Return the folder into which the originals of a job go; an empty string if they are removed."""
        if decision.destination == "outbox" and self._folders.archive is None:
            return ""
        return self.destination_folder("archive" if decision.destination == "outbox" else "errors", claim)

    def _keep(self, claim: Claim, decision: Decision) -> None:
        """Move the originals of a job to where they are kept, or remove them."""
        if not (folder := self._kept_in(claim, decision)):
            self._originals.discard(claim)
            return
        destination, moves = "archive", decision.keep
        if decision.destination != "outbox":
            destination, moves = "errors", tuple(m for m in decision.moves if m.source.startswith("claim/"))
        self._mirror(destination, claim)
        with self._folders.reached(folder):
            with contextlib.suppress(FileExistsError):  # a file that got the name meanwhile keeps it; ours go beside it
                self._carry_all(claim, moves, folder, decision.mtime_ns)
            if left := self._originals.present(claim):
                self._carry_all(claim, self.free_originals(claim, destination, left), folder, decision.mtime_ns)

    def open_folder(self, claim: Claim) -> None:
        """Make the claim folder of a reopened job."""
        self._folders.ensure_claims()
        self._disk.make_folder(self._folders.claim_folder(claim.job))
        self._disk.sync_folder(self._folders.claims)

    def reclaim(self, claim: Claim, record: Record) -> None:
        """Move the originals of a reopened job out of ``errors``, then remove its raw response and its error file.

        If the error file is not there any more, the other files stay: they are of a later prompt of that name.
        """
        assert record.row is not None
        decision = record.row.withdrawn
        assert decision is not None
        folder = self.destination_folder(decision.destination, claim)
        with self._folders.reached(folder):  # in a folder that was exchanged, nothing shows that the file was removed
            if self._has_result_file(claim, decision):
                self._withdraw(claim, decision, folder)
        record.reclaimed()

    def _has_result_file(self, claim: Claim, decision: Decision) -> bool:
        """Return whether the result file of a decision is there, also if a person has written into it."""
        if self.is_published(claim, decision):
            return True
        path = os.path.join(self.destination_folder(decision.destination, claim), decision.name)
        found = result_file(self._folders, path, decision.destination)
        return found is not None and found.claim.job == claim.job

    def _withdraw(self, claim: Claim, decision: Decision, folder: str) -> None:
        claimed = self._folders.claim_folder(claim.job)
        for number, move in enumerate(decision.moves):
            path, target = os.path.join(folder, move.name), self._source(claim, move)
            if move.source.startswith("claim/"):
                self._disk.carry(path, target, self._temporary(claimed, claim, str(number)))
            else:
                self._disk.unlink(path)
        self._disk.sync_folder(claimed)
        self._disk.unlink(os.path.join(folder, decision.name))
        if self._folders.tops.is_folder(folder):
            self._disk.sync_folder(folder)

    def source_exists(self, claim: Claim, move: Move) -> bool:
        """Return whether a file is still to be moved."""
        return self._folders.tops.exists(self._source(claim, move))

    def _source(self, claim: Claim, move: Move) -> str:
        place, _, name = move.source.partition("/")
        return self._folders.original(claim, name) if place == "claim" else self._folders.record(claim.job).path(name)

    def _carry_all(
        self,
        claim: Claim,
        moves: tuple[Move, ...],
        folder: str,
        mtime_ns: int,
        check: Callable[[], object] = nothing,
    ) -> None:
        """Move files to a destination. Files that we created get our permissions, originals keep their own.

        The prompt gets a new mtime, so that moving it back into the inbox makes a new job: with its old one it would
        be a redelivery.
        """
        for number, move in enumerate(moves):
            target, dropped = os.path.join(folder, move.name), move.source.startswith("claim/")
            temporary = self._temporary(folder, claim, str(number))
            if not dropped and self._folders.journal.common.is_on and self._is_there(self._source(claim, move), target):
                self._disk.unlink(self._source(claim, move))  # another daemon has published it
                continue
            self._disk.carry(
                self._source(claim, move),
                target,
                temporary,
                None if dropped else self._folders.permissions.apply,
                mtime_ns=mtime_ns if dropped and move.source == f"claim/{claim.prompt}" else None,
                is_durable=move.source.startswith(_DURABLE),
                check=check,
            )

    def _is_there(self, source: str, target: str) -> bool:
        """Return whether a file is published already: the target has the same content."""
        try:
            with (
                open(self._folders.tops.open_file(source, os.O_RDONLY), "rb") as own,
                open_file(target, self._folders.tops) as other,
            ):
                if os.fstat(own.fileno()).st_size != os.fstat(other.fileno()).st_size:
                    return False
                while piece := own.read(_PIECE):
                    if other.read(len(piece)) != piece:
                        return False
        except (OSError, RefusedError):
            return False
        return True

    def _mirror(self, destination: str, claim: Claim) -> None:
        """Make the folder of a destination that mirrors the folder of the inbox, durably."""
        top = self.destination_folder(destination, Claim(job="", folder="", stem=""))
        self._folders.require_mounts(top)
        self._disk.make_inner(
            top, claim.folder, self._folders.permissions.folder_mode if destination == "outbox" else None
        )

    def _temporary(self, folder: str, claim: Claim, number: str) -> str:
        """Return the name under which a file is written that is about to be published.

        An earlier holder of a job of a common inbox may still write it: that one's name is another one, and is removed.
        """
        epoch, name = self._folders.journal.common.epoch(claim.job), f".iw-{claim.job}.{number}"
        for earlier in range(max(1, epoch - _EARLIER), epoch):
            self._disk.unlink(os.path.join(folder, f"{name}.{earlier}.tmp"))
        return os.path.join(folder, f"{name}.{epoch}.tmp" if epoch else f"{name}.tmp")
