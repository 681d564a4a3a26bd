"""Receipts and error files read back: what they prove of a job whose rows a shared database has lost.

Only files of the daemon's own user are read: other users may write into the outbox.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import datetime  # noqa: TC003  msgspec reads it
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from imagewatch.inbox.claimed import JOB
from imagewatch.job.receipts import facts_of, unvouched
from imagewatch.journal.row import Row
from imagewatch.protocol.names import ERROR, RECEIPT, SUFFIX
from imagewatch.protocol.values import Claim, Decision, Destination, Move
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.job.folders import JobFolders

_ENDINGS: dict[str, Destination] = {RECEIPT: "outbox", ERROR: "errors"}
_MOST_BYTES = 4 * 1024 * 1024


class _Times(msgspec.Struct, frozen=True):
    claimed: datetime
    sent: datetime | None = None
    answered: datetime | None = None


class _Original(msgspec.Struct, frozen=True):
    file: str
    dropped_as: str


class _File(msgspec.Struct, frozen=True):
    """The keys of a result file that are columns of the ledger."""

    job: str
    source: str
    charged: Literal["yes", "no", "unknown"]
    times: _Times
    attempts: int = 0
    owner: str = ""
    message: str = ""
    status: int = 0
    code: str = ""
    credits_charged: float | None = None
    provider: str = ""
    model: str = ""
    asked: int = 0
    got: int = 0
    prompt_sha256: str = ""
    endpoint: str = ""
    version: str = ""
    request: dict[str, Any] = {}
    billing: dict[str, Any] = {}
    ids: dict[str, str] = {}
    originals: tuple[_Original, ...] = ()


class ResultFile(msgspec.Struct, frozen=True, kw_only=True):
    """What a receipt or an error file proves.

    Attributes:
        claim: The job, as far as the file has it: sizes and times of the prompt are not in it.
        row: Its last attempt, with its result; number 0: no call was made.
        decision: How it ended, with nothing left to be moved.
    """

    claim: Claim
    row: Row
    decision: Decision


def result_files(folders: JobFolders) -> Iterator[ResultFile]:
    """Yield what the result files in outbox and errors prove, as far as they can be read.

    Args:
        folders: All folders, opened.
    """
    for ending, destination in _ENDINGS.items():
        top = folders.outbox if destination == "outbox" else folders.errors
        for path, names in _walk(folders, top):
            for name in names:
                if name.endswith(ending) and (found := result_file(folders, os.path.join(path, name), destination)):
                    yield found


def _walk(folders: JobFolders, path: str) -> Iterator[tuple[str, list[str]]]:
    """Yield each folder below one that is not hidden, with the names of its files; links are not followed."""
    try:
        names, inner = sorted(folders.tops.names(path, folders=False)), sorted(folders.tops.names(path, folders=True))
    except OSError:
        return
    yield path, names
    for name in inner:
        if not name.startswith(".") and folders.tops.is_folder(below := os.path.join(path, name)):
            yield from _walk(folders, below)


def result_file(folders: JobFolders, path: str, destination: Destination) -> ResultFile | None:
    """Return what a result file proves; None if it is missing, or is not one of the daemon's user.

    Args:
        folders: All folders, opened.
        path: Of the file.
        destination: What its folder is.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError, msgspec.ValidationError):
        with open_file(path, folders.tops, most_bytes=_MOST_BYTES) as file:
            if os.fstat(file.fileno()).st_uid != os.geteuid():
                return None
            text = file.read().decode()
        values = unvouched(text)
        found = msgspec.convert(values, _File)
        if not JOB.fullmatch(found.job) or not found.source.endswith(SUFFIX):
            return None
        moves = _moves(folders, path, found) if destination == "errors" else ()
        name, facts = os.path.basename(path), facts_of(values)
        decision = Decision(destination=destination, moves=moves, name=name, result_file=text, facts=facts)
        return ResultFile(claim=_claim(found), row=_row(found, destination), decision=decision)
    return None


def _moves(folders: JobFolders, path: str, found: _File) -> tuple[Move, ...]:
    """Return what was moved into the errors folder together with an error file."""
    base = path.removesuffix(ERROR)
    raw = [f"{base}.answer.{ending}" for ending in ("json", "bin")]
    there = [Move(source="state/raw", name=os.path.basename(one)) for one in raw if folders.tops.exists(one)]
    return (*(Move(source=f"claim/{one.dropped_as}", name=one.file) for one in found.originals), *there)


def _claim(found: _File) -> Claim:
    folder, _, name = found.source.rpartition("/")
    stem = name.removesuffix(SUFFIX)
    return Claim(job=found.job, folder=folder, stem=stem, at=found.times.claimed.timestamp(), owner=found.owner)


def _row(found: _File, destination: Destination) -> Row:
    sent, answered = found.times.sent, found.times.answered
    billing = found.billing
    balance = billing.get("new_credit_balance")
    return Row(
        job=found.job,
        attempt=found.attempts if sent else 0,
        source=found.source,
        outcome=_outcome(found, destination),
        charged=found.charged,
        claimed_at=found.times.claimed.timestamp(),
        prompt_sha256=found.prompt_sha256,
        credits=found.credits_charged,
        provider=found.provider or str(found.request.get("provider", "")),
        model=found.model or str(found.request.get("model", "")),
        fields=json.dumps(found.request) if found.request else "",
        asked=found.asked or (int(found.request.get("n", 1)) if sent else 0),
        got=found.got,
        status=found.status or (200 if destination == "outbox" else 0),
        code=found.code,
        message=found.message,
        request_id=found.ids.get("x-request-id") or found.ids.get("cf-ray") or "",
        endpoint=found.endpoint,
        version=found.version,
        sent_at=sent.timestamp() if sent else None,
        answered_at=answered.timestamp() if answered else None,
        transaction_id=str(billing.get("transaction_id", ""))[:200],
        new_credit_balance=float(balance) if isinstance(balance, int | float) else None,
        owner=found.owner,
    )


def _outcome(found: _File, destination: Destination) -> str:
    if destination == "outbox" or found.charged == "yes":
        return "completed"
    if found.charged == "unknown":
        return "unknown"
    return "refused" if found.times.sent else "invalid"
