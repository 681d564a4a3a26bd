"""What is written to the journal about an attempt."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec

from imagewatch import __version__
from imagewatch.journal.row import Row, sent_row
from imagewatch.protocol.values import dump
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.endpoint.decode import Reading
    from imagewatch.job.running import Attempt, RunningJob
    from imagewatch.protocol.values import Charged, Claim, Sent


def row_of(  # noqa: PLR0913  what the columns need
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
) -> Row:
    """Return the row of an attempt; ``contents`` are the hashes of the originals, if nothing was sent."""
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
        nonce=attempt.nonce,
    )
    return _with_response(_with_request(row, attempt), attempt)


def restored_row(claim: Claim, attempt: int, nonce: str, sent: Sent, at: float) -> Row:
    """Return the row of an attempt that a shared database has lost, and of which a witness is left.

    Args:
        claim: The job.
        attempt: Its number.
        nonce: Of the lost row.
        sent: What was sent; what is not known of it is empty.
        at: When, if that is not known.
    """
    return msgspec.structs.replace(
        sent_row(claim, attempt, sent),
        sent_at=sent.at or at,
        contents=json.dumps(sent.contents) if sent.contents else "",
        fields=json.dumps(sent.fields) if sent.fields else "",
        prompt_sha256=sent.prompt_sha256,
        provider=str(sent.fields.get("provider", "")),
        version=__version__,
        nonce=nonce,
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
        request=dump(sent).decode(),
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
