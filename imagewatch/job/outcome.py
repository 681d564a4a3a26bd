"""The result of running a job, from ``worker`` to ``daemon``. Pure."""

from __future__ import annotations

import enum

import msgspec

from imagewatch.protocol.reasons import Reason  # noqa: TC001  msgspec reads it


class End(enum.Enum):
    """How a run of a job ended."""

    OVER = "its result file is published"
    DEFERRED = "it stays claimed and continues after a delay"
    RETURNED = "its files are back in the inbox"
    REDELIVERED = "a sync tool delivered the files of a finished job again; they are removed"
    NOTHING = "there was nothing to do"


class Outcome(msgspec.Struct, frozen=True):
    """The result of running a job.

    Attributes:
        job: Job id.
        end: How it ended.
        source: Path of the prompt below the inbox.
        destination: ``outbox`` or ``errors``, when over.
        charged: ``yes``, ``no`` or ``unknown``, when over.
        credits: What it cost, or None if the API did not say.
        answered: Whether the API responded to this very request.
        message: Of the error file.
        problems: Of the error file.
        result_file: Path of the receipt or error file, when over.
        delay: Seconds, for ``End.DEFERRED``.
        reason: Why it waits or was refused, where that may concern other requests, or None.
        needs_nothing: Whether it continues without a request, for ``End.DEFERRED``.
        awaits_name: Whether it waits for a newer file of the same name to leave the inbox.
    """

    job: str
    end: End
    source: str = ""
    destination: str = ""
    charged: str = ""
    credits: float | None = None
    answered: bool = False
    message: str = ""
    problems: tuple[str, ...] = ()
    result_file: str = ""
    delay: float = 0.0
    reason: Reason | None = None
    needs_nothing: bool = False
    awaits_name: bool = False
