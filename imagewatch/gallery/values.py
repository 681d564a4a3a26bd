"""A job and its images, and the daemon's status, as the page gets them: the keys that ``page.js`` reads."""

from __future__ import annotations

from typing import Literal

import msgspec


class JobImage(msgspec.Struct, omit_defaults=True):
    """One image of a job, or one of its inputs.

    Attributes:
        name: File name, as in the result file.
        href: Address relative to the page; empty if the file is missing.
        thumb: Name of its thumbnail; empty if there is none.
        width: Pixels.
        height: Pixels.
        bytes: Size of the file.
        has_credentials: Whether its receipt says that there are content credentials (C2PA) in it.
        problem: Why it is not shown, or what is wrong with it.
    """

    name: str
    href: str = ""
    thumb: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
    has_credentials: bool = False
    problem: str = ""


class Job(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One job, as the page shows it.

    Attributes:
        completed: Whether its destination is the outbox.
        name: The prompt's name without ``.prompt.txt``.
        folder: Folder below the inbox, with ``/``.
        result_file: Address of the receipt or error file, relative to the page.
        unreadable: Whether the result file cannot be read; then it may be anything, and is not linked.
        at: When it ended, milliseconds since the epoch.
        seconds: From the request to the response.
        job: Its id.
        charged: ``yes``, ``no``, ``unknown``, or empty if the result file cannot be read.
        credits: What was charged; None if that is not known.
        prompt: Its text, without options.
        is_cut: Whether the prompt is longer than this text.
        asked: Number of images asked for.
        options: The other options of the request, in words.
        status: HTTP status of the refusal; ``code`` and ``needs`` (credits) as in its body.
        next: The next step.
    """

    completed: bool
    name: str
    folder: str = ""
    result_file: str
    unreadable: bool = False
    at: int
    seconds: float = 0
    job: str = ""
    charged: str = ""
    credits: float | None = None
    provider: str = ""
    model: str = ""
    prompt: str = ""
    is_cut: bool = False
    asked: int = 0
    options: str = ""
    message: str = ""
    problems: list[str] = []
    status: int = 0
    code: str = ""
    needs: float | None = None
    next: str = ""
    images: list[JobImage] = []
    inputs: list[JobImage] = []


class Hold(msgspec.Struct, omit_defaults=True, kw_only=True):
    """Why prompts are not sent.

    Attributes:
        kind: The kind of hold.
        provider: The provider whose prompts wait; empty for all.
        folder: The first-level folder whose prompts wait; empty for all.
        message: Why.
        since: Since when, milliseconds since the epoch; 0 if that is not known.
        next_try_at: When the daemon tries again; 0 if only a person ends the hold.
        next: What to do.
    """

    kind: str = ""
    provider: str = ""
    folder: str = ""
    message: str = ""
    since: int = 0
    next_try_at: int = 0
    next: str = ""


class NamedProblem(msgspec.Struct, omit_defaults=True):
    """A file in the inbox: its path there, what is wrong with it, and what to do."""

    name: str
    message: str = ""
    next: str = ""


class Listed(msgspec.Struct, omit_defaults=True):
    """Files in the inbox: how many there are, and some of them."""

    count: int = 0
    files: list[NamedProblem] = []


class Status(msgspec.Struct, omit_defaults=True, kw_only=True):
    """What the daemon reports.

    Attributes:
        state: ``overdue``: it should have reported by now and has not, so it is not running.
        reported_at: If it is overdue, when it reported last; milliseconds since the epoch.
        due_at: If it is overdue, when it should have reported; 0 if that is not known.
        stopped_at: When it was stopped; 0 if it was not.
        oldest_since: Since when the oldest prompt waits; 0 if that is not known.
        in_flight: Jobs at work.
    """

    state: Literal["running", "on_hold", "stopped", "overdue"]
    reported_at: int = 0
    due_at: int = 0
    stopped_at: int = 0
    holds: list[Hold] = []
    waiting: Listed = msgspec.field(default_factory=Listed)
    oldest_since: int = 0
    in_flight: int = 0
    ignored: Listed = msgspec.field(default_factory=Listed)
    stuck: Listed = msgspec.field(default_factory=Listed)
