"""What carrying a job came to: the answer of ``worker`` to ``daemon``. Pure."""

from __future__ import annotations

import enum

import msgspec


class End(enum.Enum):
    """How ``process`` ended."""

    OVER = "receipt or error file is out"
    LATER = "the job stays claimed; call again after a delay"
    RETURNED = "its files are back in the inbox"
    REDELIVERED = "its files were those of a job that is over, brought back by a sync tool; they are removed"
    NOTHING = "there was nothing to do"


class Trouble(msgspec.Struct, frozen=True):
    """Something that concerns every request, not only this one.

    Attributes:
        kind: ``key``, ``credits``, ``quota``, ``address``, ``unreachable``, ``disk``, ``rate`` or ``busy``; ``cap`` or
            ``soon``, which concern only requests that cost as much; ``broken`` if the upload was cut off, which only
            concerns every request if several meet it.
        message: What was said.
        seconds: How long it wants us to wait, or None.
        hint: What a person can do in this very case, or an empty string.
        path: Of ``disk``: the file or folder concerned.
        code: Of ``disk``: the ``errno`` value, or 0.
    """

    kind: str
    message: str
    seconds: float | None = None
    hint: str = ""
    path: str = ""
    code: int = 0


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
        trouble: What the other requests would meet too, or None.
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
    trouble: Trouble | None = None
    displaced: bool = False
