"""What is written to the ledger about a job."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from imagewatch import __version__
from imagewatch.journal.row import Row
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.endpoint.decode import Reading
    from imagewatch.job.running import Attempt, RunningJob
    from imagewatch.journal.ledger import Ledger
    from imagewatch.protocol.values import Charged


class Rows:
    """Writes the rows of jobs.

    Args:
        ledger: The ledger.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def begin(self, job: RunningJob, attempt: Attempt) -> None:
        """Write the row of an attempt that is about to be sent.

        Raises:
            SpoolError: It cannot be recorded, so it must not be sent; or the ledger has a result already.
        """
        row = self._ledger.job(job.id)
        if row and (row["attempt"] > attempt.number or (row["attempt"] == attempt.number and row["outcome"] != "sent")):
            raise _outdated(job, row)
        self.write(job, attempt, "sent", "unknown")

    def result(self, job: RunningJob, attempt: int) -> dict[str, Any] | None:
        """Return the row of an attempt without a response if the ledger has its result, or None.

        Raises:
            SpoolError: The ledger has a result of another attempt, or a response; the files on the disk are an older
                copy.
        """
        row = self._ledger.job(job.id) or {"attempt": 0}
        if row["attempt"] > attempt:
            raise _outdated(job, row)
        if row["attempt"] < attempt or row["outcome"] in {"sent", "unknown"}:
            return None
        if row["answered_at"] is not None or row["charged"] != "yes":  # a response that was lost has no time
            raise _outdated(job, row)
        return row

    def write(  # noqa: PLR0913  what the columns need
        self,
        job: RunningJob,
        attempt: Attempt,
        outcome: str,
        charged: Charged,
        *,
        message: str = "",
        code: str = "",
        reading: Reading | None = None,
        got: int = 0,
        contents: dict[str, str] | None = None,
    ) -> None:
        """Write a row durably; ``contents`` are the hashes of the originals, if nothing was sent."""
        claim = job.claim
        row = Row(
            job=claim.job,
            attempt=attempt.number,
            source=claim.source,
            source_size=claim.size,
            source_mtime_ns=claim.mtime_ns,
            outcome=outcome,
            charged=charged,
            credits=reading.credits if reading else None,
            transaction_id=printable(reading.transaction, 200) if reading else "",
            new_credit_balance=reading.balance if reading else None,
            owner=claim.owner,
            provider=(reading and reading.provider) or attempt.fields.get("provider", ""),
            model=(reading and reading.model) or attempt.fields.get("model", ""),
            got=got,
            code=printable(code, 200),
            message=printable(message),
            contents=json.dumps(contents) if contents else "",
            version=__version__,
            claimed_at=claim.at,
            placed_mtime_ns=job.mtime_ns,
        )
        self._ledger.write(_with_response(_with_request(row, attempt), attempt))


def _outdated(job: RunningJob, row: Mapping[str, Any]) -> SpoolError:
    folder = printable(job.record.folder)
    return SpoolError(
        f"job {job.id}: the job record is an older copy without the result; the ledger has: "
        f"{row['outcome']}, charged: {row['charged']}",
        path=folder,
        hint=f"restore the state folder as a whole, or remove {folder}; the job has ended",
    )


def _with_request(row: Row, attempt: Attempt) -> Row:
    if (sent := attempt.sent) is None:
        return row
    return msgspec.structs.replace(
        row,
        contents=json.dumps(sent.contents),
        fields=json.dumps(sent.fields),
        prompt_sha256=sent.prompt_sha256,
        asked=sent.asked,
        endpoint=sent.endpoint,
        sent_at=sent.at,
    )


def _with_response(row: Row, attempt: Attempt) -> Row:
    if attempt.head is None or attempt.tail is None:
        return row
    headers = attempt.head.headers
    return msgspec.structs.replace(
        row,
        status=attempt.head.status,
        request_id=headers.get("x-request-id") or headers.get("cf-ray") or "",
        answered_at=attempt.tail.at,
    )
