"""A job and its images, as the page gets them: these are the keys that ``page.js`` reads."""

from __future__ import annotations

import msgspec


class Picture(msgspec.Struct, omit_defaults=True):
    """One picture of a job, or one of its inputs.

    Attributes:
        name: File name, as the document has it.
        href: Address relative to the page; empty when the file is not there.
        thumb: Name of its thumbnail; empty when there is none.
        width: Pixels.
        height: Pixels.
        bytes: Size of the file.
        problem: Why there is nothing to see, or what is wrong with it.
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
        made: Whether it ended in the outbox.
        name: The prompt's name without ``.prompt.txt``.
        folder: Folder below the inbox, with ``/``.
        document: Address of the receipt or error file, relative to the page.
        unread: Whether the document is none; then it may be anything, and is not linked.
        at: When it was over, milliseconds since the epoch.
        seconds: From the request to the answer.
        job: Its id.
        charged: ``yes``, ``no``, ``unknown``, or empty when the document cannot be read.
        credits: What was charged, when it is known.
        asked: Number of pictures asked for.
        options: What was asked for beside prompt and provider, in words.
        status: Of the answer that was no success; ``code`` and ``needs`` (credits) as it named them.
        next: What to do now.
    """

    made: bool
    name: str
    folder: str = ""
    document: str
    unread: bool = False
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
    pictures: list[Picture] = []
    inputs: list[Picture] = []
