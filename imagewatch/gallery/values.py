"""A job and its images, as the page gets them: these are the keys that ``page.js`` reads."""

from __future__ import annotations

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
        problem: Why it is not shown, or what is wrong with it.
    """

    name: str
    href: str = ""
    thumb: str = ""
    width: int = 0
    height: int = 0
    bytes: int = 0
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
