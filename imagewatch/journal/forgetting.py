"""What happens to the jobs of a daemon of a shared account that does not come back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.journal.database import Connection, Database

FORGOTTEN = "the daemon that sent this request was removed from the account before its result was known"
"""Message of an attempt whose daemon was forgotten."""
_NOW = "extract(epoch FROM clock_timestamp())::float8"
_KNOWN = f"""
    SELECT ended_at IS NULL AND {_NOW} - seen_at < ? AS is_running, {_NOW} - seen_at AS seconds
    FROM instances WHERE name = ?
    AND forgotten_at IS NULL"""  # noqa: S608  our own names
_OPEN = """
    SELECT a.job, a.source, a.reserved FROM attempts AS a WHERE a.instance = ? AND a.outcome = 'sent'
    ORDER BY a.claimed_at, a.job"""
_UNSENT = """
    SELECT count(*) AS count FROM jobs AS j WHERE j.holder = ? AND j.state IN ('open', 'returning')
    AND NOT EXISTS (SELECT 1 FROM attempts AS a WHERE a.job = j.id AND a.outcome <> 'unsent')"""
_LOSE = "UPDATE attempts SET outcome = 'unknown', message = ?, reserved = 0 WHERE instance = ? AND outcome = 'sent'"
_ALONE = """
    SELECT a.job, a.source FROM attempts AS a JOIN jobs AS j ON j.id = a.job
    WHERE a.answer_on = ? AND j.state NOT IN ('done', 'kept') ORDER BY a.claimed_at, a.job"""
_UNRESERVE = "UPDATE jobs SET reserved = 0 WHERE holder = ? AND state <> 'done'"
_LET_GO = "UPDATE jobs SET lease_ends_at = 0 WHERE holder = ? AND epoch > 0 AND state <> 'done'"
_FORGET = f"""
    UPDATE instances SET forgotten_at = {_NOW}, ended_at = coalesce(ended_at, {_NOW})
    WHERE name = ?"""  # noqa: S608


@dataclass(frozen=True)
class Left:
    """What a daemon has left.

    Attributes:
        sent: The requests without a result: job, path of the prompt below the inbox, credits that are reserved.
        waiting: How many prompts it has claimed and not sent; they are in its own folders, or in the common inbox.
        alone: The responses that only its state folder has: job, path of the prompt below the inbox.
    """

    sent: Sequence[tuple[str, str, float]]
    waiting: int
    alone: Sequence[tuple[str, str]] = ()


def left_of(file: Database, name: str, alive_seconds: float) -> Left:
    """Return what a daemon has left that does not run any more.

    Args:
        file: The shared database.
        name: Its ``shared.instance``.
        alive_seconds: How long after it was seen last it counts as running.

    Raises:
        UsageError: There is no such daemon, or it runs.
        SpoolError: The database cannot be used.
    """
    with file.using() as connection:
        _require_not_running(connection, name, alive_seconds)
        return _left(connection, name)


def forget(file: Database, name: str, alive_seconds: float) -> Left:
    """Let the requests of a daemon without a result count as unknown charges, and list it no more.

    If it comes back, it continues its jobs: a response that it has saved is published, and replaces the unknown charge.
    In a common inbox, the other daemons take over what it has, and wait no more for responses that only it has.

    Args:
        file: The shared database.
        name: Its ``shared.instance``.
        alive_seconds: How long after it was seen last it counts as running.

    Returns:
        What it has left.

    Raises:
        UsageError: There is no such daemon, or it runs.
        SpoolError: The database cannot be used.
    """

    def act(connection: Connection) -> Left:
        _require_not_running(connection, name, alive_seconds)
        left = _left(connection, name)
        connection.execute(_LOSE, (FORGOTTEN, name))
        connection.execute(_UNRESERVE, (name,))
        connection.execute(_LET_GO, (name,))
        connection.execute(_FORGET, (name,))
        return left

    return file.change(act, locked=True)


def _require_not_running(connection: Connection, name: str, alive_seconds: float) -> None:
    known = connection.execute(_KNOWN, (alive_seconds, name)).fetchone()
    if known is None:
        hint = "imagewatch status --all lists the daemons of the account"
        raise UsageError(f"the account has no daemon {printable(name)}", hint=hint)
    if known["is_running"]:
        hint = f"stop it first; after a kill, wait until it was not seen for {alive_seconds:.0f} seconds"
        seconds = max(known["seconds"], 0.0)
        raise UsageError(f"{printable(name)} was seen {seconds:.0f} seconds ago and may still send", hint=hint)


def _left(connection: Connection, name: str) -> Left:
    sent = [tuple(row) for row in connection.execute(_OPEN, (name,)).fetchall()]
    waiting = connection.execute(_UNSENT, (name,)).fetchone()
    alone = [tuple(row) for row in connection.execute(_ALONE, (name,)).fetchall()]
    return Left(
        [(job, source, reserved) for job, source, reserved in sent],
        int(waiting["count"]),
        [(job, source) for job, source in alone],
    )
