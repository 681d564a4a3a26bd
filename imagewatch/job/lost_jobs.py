"""Jobs that a shared database has lost, found in the folders: ``imagewatch db recover``.

For each job of which a folder shows something:

=================================================  ===================================================================
a receipt or an error file, and no result          its result; originals in the claim folder are moved to where they
                                                   belong by a daemon
an error file with an unknown charge, and a        the same, and a daemon publishes the response
response
a claim folder with a witness or a response        the job and its attempts, without a result: a daemon publishes the
                                                   response, or reports an unknown charge
a claim folder of a common inbox without both      nothing was sent: the originals go back into the inbox
a claim folder of an inbox of its own              it may have been sent: an unknown charge
=================================================  ===================================================================
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec
from msgspec.structs import replace

from imagewatch.endpoint.api import classify
from imagewatch.inbox.claimed import JOB
from imagewatch.job.handover import NOT_KNOWN, is_ours, job_and_epoch, response_number
from imagewatch.job.record import attempt_of
from imagewatch.job.result_files import result_files
from imagewatch.job.rows import restored_row
from imagewatch.journal.lost_rows import Known, Lost, LostRows
from imagewatch.protocol.names import SUFFIX
from imagewatch.protocol.reasons import Reaction
from imagewatch.protocol.values import Claim
from imagewatch.system.disk_errors import disk_errors
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.job.handover import Witness
    from imagewatch.job.result_files import ResultFile
    from imagewatch.job.spool import Spool
    from imagewatch.journal.row import JobState, Row

_UNFINISHED = {"", "open", "returning", "reopened"}
_ENDS = {Reaction.SUCCESS, Reaction.REFUSED, Reaction.UNKNOWN}
"""What a response says after which its prompt is not sent again automatically."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found of one job.

    Attributes:
        job: Its id.
        source: Path of its prompt below the inbox, as far as it is known.
        what: What is done about it, as text.
        lost: What is written; None: nothing.
        goes_back: Whether its originals go back into the inbox.
    """

    job: str
    source: str
    what: str
    lost: Lost | None = None
    goes_back: bool = False


@dataclass
class _Seen:
    """What the folders show of a job.

    Attributes:
        epoch: In the name of its claim folder; 0: that has none; -1: there is no claim folder.
        result: Its receipt or error file.
        responses: Numbers of the attempts whose response is in the state folder of this host.
    """

    epoch: int = -1
    result: ResultFile | None = None
    responses: set[int] = field(default_factory=set)


class LostJobs:
    """Finds jobs that the database has lost. No daemon may use the inbox or the state folder meanwhile.

    Args:
        spool: The folders, locked and opened.
    """

    def __init__(self, spool: Spool) -> None:
        self._spool = spool
        self._common = spool.journal.common
        self._rows = LostRows(spool.journal.file)

    def find(self) -> Iterator[Found]:
        """Yield what there is to be done, job by job.

        Raises:
            SpoolError: The database or a folder cannot be read.
        """
        known = self._rows.known()
        for job, seen in sorted(self._seen().items()):
            if seen.epoch >= 0:
                self._common.set_epoch(job, seen.epoch)
            rows = known.get(job, Known())
            found = self._finished(rows, seen.result, seen) if seen.result else self._unfinished(job, rows, seen)
            if found is not None:
                yield found

    def _seen(self) -> dict[str, _Seen]:
        seen: dict[str, _Seen] = {}
        for result in result_files(self._spool):
            mine = seen.setdefault(result.claim.job, _Seen())
            if mine.result is None or result.row.outcome == "completed":  # it may have been an unknown charge before
                mine.result = result
        with disk_errors(self._spool.claims, "list the folder"):
            folders = self._spool.tops.names(self._spool.claims, folders=True) if self._spool.has_claims() else []
        for job, epoch in filter(None, map(job_and_epoch, folders)):
            mine = seen.setdefault(job, _Seen())
            mine.epoch = max(mine.epoch, epoch)
        with disk_errors(self._spool.answers, "list the folder"):
            for name in self._spool.tops.names(self._spool.answers):
                job, _, rest = name.partition(".")
                # Without content it was opened, and perhaps nothing was sent.
                if JOB.fullmatch(job) and (number := attempt_of(rest)) and self._has_content(name):
                    seen.setdefault(job, _Seen()).responses.add(number)
        return seen

    def _has_content(self, name: str) -> bool:
        try:
            return self._spool.tops.lstat(os.path.join(self._spool.answers, name)).st_size > 0
        except OSError:
            return False

    # With a receipt or an error file

    def _finished(self, known: Known, result: ResultFile, seen: _Seen) -> Found | None:
        claim, row, late = self._claim(result.claim), result.row, self._late(result.claim.job, seen)
        rows, changed, moved = [], None, 0
        if known.result == "unknown" and row.outcome == "completed":
            number = max(number for number, outcome in known.outcomes.items() if outcome == "unknown")
            changed = replace(row, attempt=number)
        elif not known.result and known.open_attempt:
            changed = replace(row, attempt=known.open_attempt)
        elif not known.result:
            rows.append((self._completed(claim, row, self._number(known, row, seen, late)), ""))
        elif self._common.is_on and known.result == row.outcome == "unknown" and late > known.highest:
            moved = late  # its number was not known where its row was written again
        state = self._state(claim, result, known, seen, late)
        if not rows and changed is None and state is None and not moved:
            return None
        charge = f"{row.credits:g} credits" if row.credits is not None else f"charged: {row.charged}"
        lost = Lost(
            claim=claim,
            rows=rows,
            result=changed,
            moved=moved,
            has_row=state is not None,
            state=state or "done",
            decision=result.decision if self._needs_decision(row, state) else None,
            epoch=max(seen.epoch, 0),
        )
        done = "its response is read again" if state == "reopened" else "its row is written"
        return Found(job=claim.job, source=claim.source, what=f"{row.outcome}, {charge}: {done}", lost=lost)

    def _late(self, job: str, seen: _Seen) -> int:
        """Return the number of the newest response at hand; 0: there is none, or it lets the prompt be sent again."""
        newest = max((*seen.responses, *self._handed_over(job)), default=0)
        if newest < max((one.attempt for one in self._witnesses(job)), default=0):
            return 0  # there was another request after it
        if newest in seen.responses:
            with contextlib.suppress(OSError, SpoolError, ValueError):  # only the beginning of one may be there
                answer = self._spool.record(job).answer(newest)
                return newest if classify(answer.head, answer.sample).reaction in _ENDS else 0
        return newest

    def _number(self, known: Known, row: Row, seen: _Seen, late: int) -> int:
        """Return which attempt a result is of that the database does not have."""
        number = max(known.highest + 1, row.attempt) if row.attempt or known.highest else 0
        if row.outcome == "unknown":  # its number in the file lacks those that were not sent
            newest = max((*seen.responses, *self._handed_over(row.job)), default=0)
            sent = (one.attempt for one in self._witnesses(row.job))
            number = max(number, newest if late or not newest else newest + 1, *sent)
        return number

    def _needs_decision(self, row: Row, state: JobState | None) -> bool:
        """Return whether the row of a finished job has how it ended: its response may still come from another host."""
        is_open = self._common.is_on and row.outcome == "unknown"
        return state in {"published", "kept", "reopened"} or (state == "done" and is_open)

    def _completed(self, claim: Claim, row: Row, number: int) -> Row:
        """Return the row of a result with what its claim folder has besides."""
        sent = next((one.sent for one in self._witnesses(claim.job) if one.attempt == number), NOT_KNOWN)
        contents = msgspec.json.encode(sent.contents).decode() if sent.contents else ""
        return replace(row, attempt=number, source_size=claim.size, source_mtime_ns=claim.mtime_ns, contents=contents)

    def _state(self, claim: Claim, result: ResultFile, known: Known, seen: _Seen, late: int) -> JobState | None:
        """Return which state the row of a finished job gets; None: it needs none, or has the right one."""
        if known.state not in _UNFINISHED or not known.is_ours:
            return None
        is_failed, charged = result.decision.destination == "errors", result.row.charged
        if is_failed and known.state == "reopened":
            return None  # a daemon reads its response again
        has_originals = seen.epoch >= 0 and bool(self._originals(claim.job))
        if is_failed and late:
            if charged == "unknown":
                return "reopened"
            if charged == "yes" and not has_originals:
                return "reopened" if known.state else "kept"
        if has_originals or (seen.epoch >= 0 and self._common.is_on):
            return "published"  # a daemon removes the folder with its witness and its response
        is_lost = self._common.is_on and charged == "unknown" and (known.is_recent or not known.result)
        return "done" if known.state or seen.responses or seen.epoch >= 0 or is_lost else None

    # Without

    def _unfinished(self, job: str, known: Known, seen: _Seen) -> Found | None:
        if seen.epoch < 0:
            return self._only_response(job, known, seen)
        claim = self._claim(Claim(job=job, folder="", stem=""))
        if known.state == "done":
            return None  # its files are of no use
        witnesses = self._witnesses(job)
        proven = {one.attempt for one in witnesses} | seen.responses | self._handed_over(job)
        if known.is_over(proven):
            return None
        if not (known.state or known.outcomes or proven or not self._common.is_on):
            return self._returned(claim)
        if not self._common.is_on and self._may_be_sent(job, known, seen):
            proven |= {max(known.highest, *proven, 0) + 1}
        rows = self._attempts(claim, known, witnesses, proven)
        if known.state and not rows and known.epoch >= seen.epoch:
            return None
        what = "its request was sent: the job is continued, or its charge is unknown"
        if known.state and not rows:
            what = "claimed: the job is continued"
        lost = Lost(claim=claim, rows=rows, epoch=max(seen.epoch, 0))
        return Found(job=job, source=claim.source, what=what, lost=lost)

    def _may_be_sent(self, job: str, known: Known, seen: _Seen) -> bool:
        """Return whether another request than those that are known may have been sent: its inbox has no witnesses."""
        is_open = known.state in {"", "open"} and not known.open_attempt and not known.result
        return is_open and self._late(job, seen) <= known.highest and bool(self._spool.orphans(job))

    def _only_response(self, job: str, known: Known, seen: _Seen) -> Found | None:
        if known.state or known.result:
            return None
        path = self._spool.record(job).path(f"answer.{max(seen.responses)}")
        if not self._spool.tops.exists(path):  # only what had arrived of one, or room for it
            return None
        what = f"only its response is left, and stays: {path}; check the balance (imagewatch check --balance)"
        return Found(job=job, source="", what=what)

    def _returned(self, claim: Claim) -> Found:
        what = "nothing was sent: it goes back into the inbox"
        if self._spool.handover.claim(claim.job) is None:
            what = "nothing was sent: it goes back into the inbox itself, as its sub-folder is not known"
        return Found(job=claim.job, source=claim.source, what=what, goes_back=True)

    def _attempts(
        self, claim: Claim, known: Known, witnesses: list[Witness], proven: set[int]
    ) -> list[tuple[Row, str]]:
        """Return the attempts that the database lacks. Another one follows only one that was free."""
        found, by_number = [], {one.attempt: one for one in witnesses}
        for number in sorted(one for one in proven if one > known.highest):
            one = by_number.get(number)
            sent = one.sent if one else NOT_KNOWN
            row = restored_row(claim, number, one.nonce if one else "", sent, claim.at)
            if number < max(proven):
                row = replace(row, outcome="busy", charged="no", request="")
            found.append((row, one.instance if one else ""))
        return found

    # What a claim folder has

    def _claim(self, known: Claim) -> Claim:
        """Return the prompt of a job: as it was claimed, else from what is in its folder."""
        job = known.job
        if (claim := self._spool.handover.claim(job)) is not None and claim.job == job:
            return claim
        names = self._originals(job)
        if witnessed := [one.claim for one in self._witnesses(job) if one.claim is not None]:
            return witnessed[0]
        sent = [name for one in self._witnesses(job) for name in one.sent.contents]
        prompts = [name for name in (*names, *sent) if name.endswith(SUFFIX)]
        if known.stem:
            return replace(known, images=tuple(name for name in names if name != known.prompt))
        stem = prompts[0].removesuffix(SUFFIX) if prompts else f"job-{job}"
        images = tuple(name for name in names if name != stem + SUFFIX)
        at = min((one.sent.at for one in self._witnesses(job) if one.sent.at), default=self._spool.journal.clock())
        return replace(known, stem=stem, images=images, at=at)

    def _originals(self, job: str) -> list[str]:
        names = self._spool.originals.claimed(job)
        return sorted(name for name in names if not (self._common.is_on and is_ours(name)))

    def _witnesses(self, job: str) -> list[Witness]:
        return self._spool.handover.witnesses(job) if self._common.epoch(job) else []

    def _handed_over(self, job: str) -> set[int]:
        names = self._spool.originals.claimed(job) if self._common.is_on else set()
        return {number for number in map(response_number, names) if number}

    # Doing it

    def carry_out(self, found: Found) -> str:
        """Do what was found; return why it cannot be done now, or an empty string.

        Raises:
            SpoolError: The database or a folder cannot be used.
        """
        if found.lost is not None:
            return self._rows.write(found.lost)
        return self._give_back(found.job) if found.goes_back else ""

    def _give_back(self, job: str) -> str:
        """Put originals back into the inbox, if no daemon has sent them in this moment."""
        handover, epoch = self._spool.handover, self._common.epoch(job)
        self._common.set_epoch(job, epoch + 1)
        handover.fence(job)  # a daemon that still has it can leave no witness any more
        if handover.witnesses(job):
            return "a daemon has sent it in this moment; run the command again"
        claim = self._claim(Claim(job=job, folder="", stem=""))
        if not self._spool.originals.give_back(claim):
            return "a newer file in the inbox has its name; rename that, then run the command again"
        handover.clear(job)
        self._spool.disk.remove_folder(self._spool.claim_folder(job))
        self._spool.disk.sync_folder(self._spool.claims)
        return ""
