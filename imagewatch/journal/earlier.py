"""Jobs that an earlier version has left in files of their own become rows of the journal."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from msgspec.structs import astuple, replace

from imagewatch.journal.budget import folder_of
from imagewatch.journal.ledger import storable
from imagewatch.journal.prices import Asked
from imagewatch.journal.row import LOST, sent_row
from imagewatch.journal.schema import COLUMNS
from imagewatch.protocol.values import dump

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from imagewatch.journal.budget import Budget
    from imagewatch.journal.database import Connection
    from imagewatch.protocol.values import Claim, Decision, Sent


def adopt(
    connection: Connection,
    inbox_jobs: str,
    budget: Budget,
    claim: Claim,
    state: str,
    decision: Decision | None,
    sent: Mapping[int, Sent],
) -> None:
    """Write the rows of a job, unless there are some.

    Args:
        connection: In a transaction.
        inbox_jobs: The table or view with the jobs of this inbox; see ``Database``.
        budget: What is reserved for a request without a result.
        claim: What was claimed.
        state: Where the job is.
        decision: How it ends, if that is decided.
        sent: Each attempt of which the first byte may have left, by number.
    """
    if connection.execute("SELECT 1 FROM jobs WHERE id = ?", (claim.job,)).fetchone():
        return
    names = os.fsencode(claim.folder), os.fsencode(claim.stem)
    taken = f"SELECT 1 FROM {inbox_jobs} WHERE folder = ? AND stem = ? AND state IN ('open', 'decided', 'published')"  # noqa: S608
    if state == "open" and connection.execute(taken, names).fetchone():
        state = "returning"
    connection.execute(
        "INSERT INTO jobs (id, folder, stem, claim, state, decision, opened_at) VALUES (?, ?, ?, ?, ?, ?, ?)",
        (claim.job, *names, dump(claim).decode(), state, dump(decision).decode() if decision else "", claim.at),
    )
    for number, one in sent.items():
        _attempt(connection, budget, claim, number, one)
    # The mark of an attempt was durable before its first byte left.
    connection.execute(
        "UPDATE attempts SET outcome = 'unsent', charged = 'no', reserved = 0 "
        "WHERE job = ? AND outcome = 'sent' AND attempt > ?",
        (claim.job, max(sent, default=0)),
    )


def _attempt(connection: Connection, budget: Budget, claim: Claim, number: int, sent: Sent) -> None:
    asked, request = Asked.of(sent.fields), dump(sent).decode()
    reserved = budget.reservation(asked, folder_of(claim.source))
    known = "UPDATE attempts SET request = ?, reserved = CASE outcome WHEN 'sent' THEN ? ELSE 0 END "
    known += "WHERE job = ? AND attempt = ?"
    if connection.execute(known, (request, reserved, claim.job, number)).rowcount:
        return
    row = replace(
        sent_row(claim, number, sent),
        counted_at=sent.at,
        provider=asked.provider,
        asked_provider=asked.provider,
        price_kind=asked.kind,
        reserved=reserved,
    )
    marks = ", ".join("?" * len(COLUMNS))
    connection.execute(
        f"INSERT INTO attempts ({', '.join(COLUMNS)}) VALUES ({marks})",  # noqa: S608  our own names
        storable(astuple(row)),
    )


def close_lost(connection: Connection, known: Collection[str]) -> int:
    """Give attempts of which only their row is left their result: whether they were charged is unknown.

    Args:
        connection: In a transaction.
        known: Jobs of which more may be found out.

    Returns:
        How many there were.
    """
    question = "SELECT job, attempt FROM attempts WHERE outcome = 'sent' AND job NOT IN (SELECT id FROM jobs)"
    lost = [(LOST, *row) for row in connection.execute(question).fetchall() if row["job"] not in known]
    close = "UPDATE attempts SET outcome = 'unknown', message = ?, reserved = 0 WHERE job = ? AND attempt = ?"
    for values in lost:
        connection.execute(close, values)
    return len(lost)
