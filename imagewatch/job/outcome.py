"""What carrying a job came to: the answer of ``worker`` to ``daemon``. Pure."""

from __future__ import annotations

import enum

import msgspec

from imagewatch.protocol.reasons import Reason  # noqa: TC001  msgspec reads it


class End(enum.Enum):
    """How ``process`` ended."""

    OVER = "receipt or error file is out"
    LATER = "the job stays claimed; call again after a delay"
    RETURNED = "its files are back in the inbox"
    REDELIVERED = "its files were those of a job that is over, brought back by a sync tool; they are removed"
    NOTHING = "there was nothing to do"


class Outcome(msgspec.Struct, frozen=True):
    """What ``process`` came to.

    Attributes:
        job: Job id.
        end: How it ended.
        source: Path of the prompt below the inbox.
        door: ``outbox`` or ``errors``, when over.
        charged: ``yes``, ``no`` or ``unknown``, when over.
        credits: What it cost, or None when nobody said.
        answered: Whether the endpoint answered this very request.
        message: The error's words, when there are any.
        problems: All that is wrong, when that was listed.
        document: Path of the receipt or error file, when over.
        delay: Seconds, for ``End.LATER``.
        reason: Why it waits or was refused, where that may concern other requests, or None.
        displaced: Whether it waits for a newer file of the same name to leave the inbox.
    """

    job: str
    end: End
    source: str = ""
    door: str = ""
    charged: str = ""
    credits: float | None = None
    answered: bool = False
    message: str = ""
    problems: tuple[str, ...] = ()
    document: str = ""
    delay: float = 0.0
    reason: Reason | None = None
    displaced: bool = False
