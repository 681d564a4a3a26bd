"""Why a prompt fails or waits: one table with every response of the API and every reason of our own. Pure.

``KINDS`` answers "what happens on a 402?": whether the request may have been charged, what happens to the prompt and to
the other prompts, and the next step for the sender and the administrator. ``RESPONSES`` is the table of
``docs/explanation/money.md``; a test compares the two. ``LIMITS`` are our own reasons not to send a request.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from imagewatch.system.errors import DatabaseError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from imagewatch.protocol.values import Charged
    from imagewatch.system.errors import SpoolError

QUOTA, NOT_ADMITTED, JSON_OBJECT = "it names a quota", '"admitted": false', "a JSON object that is not empty"
"""What the body of a response must contain, where its status alone is not enough."""
_API_FAILED = "the API failed; move the prompt back into the inbox to try again; nothing was charged"
DISK_SECONDS = 5.0
"""How long after the local disk or the shared database failed the next test is made."""


class Reaction(enum.Enum):
    """What happens to the prompt; the values are the words of the documentation."""

    SUCCESS = "images and receipt in `outbox/`"
    REFUSED = "`errors/`"
    ACCOUNT = "the first refused prompt goes to `errors/`, the others wait in the inbox"
    RETRY = "retried automatically a few times, then `errors/`"
    WAIT = "waits in the inbox"
    UNKNOWN = "`errors/`; never sent again automatically"


class Others(enum.Enum):
    """What happens to the other prompts; the values are the words of the documentation."""

    CONTINUE = "continue"
    FITTING = "continue if they fit below the cap"
    PAUSE = "wait as the API asks, for about an hour at most (503: 30 seconds)"
    SLOW = "wait for the next minute"
    PROBE = "wait; from time to time one is sent as a test"
    DISK = "wait until a test write succeeds"
    PERSON = "wait for `imagewatch release`"


@dataclass(frozen=True)
class Kind:
    """One row of the table.

    Attributes:
        name: In the log, in ``status.json`` and in metrics.
        cause: What happened, in the words of the documentation.
        charged: Whether the request may have been charged.
        reaction: What happens to the prompt.
        others: What happens to the other prompts. If they do not just ``CONTINUE``, a hold begins. It has the name of
            this row; only ``lost`` begins a hold ``disk``. The holds ``disk`` and ``database`` are in ``STORES``.
        statuses: HTTP statuses that mean this, each with what the body must contain, or an empty string. The first row
            that fits a response counts.
        next: Next step while the hold lasts, for the administrator.
        retry: Next step in the error file, for the sender.
        retry_of: The same for HTTP statuses for which it differs.
        seconds: How long the hold lasts if the reason sets no time; None: see ``journal.holds``.
        is_own: Whether it is our own limit; it is not checked again after the request was admitted.
        is_short: Whether it is our own limit for a short time: a job that waits for it stays claimed.
        is_shared: Whether it concerns all daemons of a shared account. A key and a URL are those of one host.
    """

    name: str
    cause: str
    charged: Charged
    reaction: Reaction
    others: Others = Others.CONTINUE
    statuses: Mapping[int, str] = field(default_factory=dict)
    next: str = ""
    retry: str = "fix the cause, then move the prompt back into the inbox"
    retry_of: Mapping[int, str] = field(default_factory=dict)
    seconds: float | None = None
    is_own: bool = False
    is_short: bool = False
    is_shared: bool = False

    @property
    def is_account(self) -> bool:
        """Whether the API refuses the account or the URL: one prompt shows that, the others wait."""
        return self.reaction is Reaction.ACCOUNT


RESPONSES = (
    Kind(
        "completed",
        "the API returns images (200)",
        "yes",
        Reaction.SUCCESS,
        statuses=dict.fromkeys(range(200, 300), ""),
    ),
    Kind(
        "unreadable",
        "it returns a damaged response, or no readable image",
        "yes",
        Reaction.UNKNOWN,
        retry="do not send it again; imagewatch retry NAME reads the saved response again, free of charge; a copy of "
        "it is beside this file",
    ),
    Kind(
        "invalid",
        "the prompt or one of its images is not valid",
        "no",
        Reaction.REFUSED,
        retry="correct the prompt or its images, then move them back into the inbox",
    ),
    Kind(
        "refused",
        "the API refuses the request (400, 422, 500 with a JSON object, …)",
        "no",
        Reaction.REFUSED,
        statuses=dict.fromkeys({*range(400, 500)} - {401, 402, 403, 404, 405, 408, 429}, "") | {500: JSON_OBJECT},
        retry_of=dict.fromkeys((409, 500), _API_FAILED),
    ),
    Kind(
        "key",
        "it does not accept the API key (401, 403)",
        "no",
        Reaction.ACCOUNT,
        Others.PROBE,
        statuses=dict.fromkeys((401, 403), ""),
        next="replace the API key",
        retry="ask the administrator to replace the API key, then move the prompt back into the inbox",
    ),
    Kind(
        "credits",
        "the account has too few credits (402)",
        "no",
        Reaction.ACCOUNT,
        Others.PROBE,
        statuses={402: ""},
        next="add credits to the account; the daemon resumes automatically; to try now: imagewatch release",
        retry="add credits to the account, then move the prompt back into the inbox",
        is_shared=True,
    ),
    Kind(
        "quota",
        "the quota of the account is used up (429 that names a quota)",
        "no",
        Reaction.ACCOUNT,
        Others.PROBE,
        statuses={429: QUOTA},
        next="wait until the quota is renewed; the daemon resumes automatically",
        retry="wait until the quota is renewed, then move the prompt back into the inbox",
        is_shared=True,
    ),
    Kind(
        "endpoint",
        "the URL is not the image API (404, 405, redirect)",
        "no",
        Reaction.ACCOUNT,
        Others.PROBE,
        statuses=dict.fromkeys((404, 405, *range(300, 400)), ""),
        next="correct base_url in the configuration, then reload the daemon (systemctl reload imagewatch, or SIGHUP)",
        retry="ask the administrator to correct base_url, then move the prompt back into the inbox",
    ),
    Kind(
        "busy",
        'it is busy (429, 503 with `"admitted": false`)',
        "no",
        Reaction.RETRY,
        Others.PAUSE,
        statuses={429: "", 503: NOT_ADMITTED},
        next="no action needed; the daemon resumes automatically",
        retry="the API was busy for too long; move the prompt back into the inbox to try again",
    ),
    Kind(
        "unreachable",
        "the API cannot be reached",
        "no",
        Reaction.WAIT,
        Others.PROBE,
        next="check the network and base_url; the daemon resumes automatically",
    ),
    Kind(
        "broken",
        "the connection breaks during a large upload",
        "no",
        Reaction.RETRY,
        retry="use fewer or smaller images, then move the prompt back into the inbox; a proxy or gateway may limit the "
        "size of a request",
    ),
    Kind(
        "unknown",
        "the response is lost (timeout, reset, 408, 502, 504, crash)",
        "unknown",
        Reaction.UNKNOWN,
        statuses=dict.fromkeys((*range(100, 200), 408, *range(500, 600)), ""),
        retry="check the balance (imagewatch check --balance); only if you accept a second charge: imagewatch retry "
        "--pay-again NAME, or move the prompt back into the inbox",
    ),
    Kind(
        "disk",
        "a folder or the ledger cannot be used before the request is sent",
        "no",
        Reaction.WAIT,
        Others.DISK,
        next="check the disk and the system log; the daemon resumes automatically",
        seconds=DISK_SECONDS,
    ),
    Kind(
        "database",
        "the shared database cannot be used before the request is sent",
        "no",
        Reaction.WAIT,
        Others.DISK,
        next="to see the cause, run: imagewatch check; the daemon resumes automatically",
        seconds=DISK_SECONDS,
    ),
    Kind(
        "lost",
        "the local disk fails while a response arrives and does not recover before the call times out",
        "yes",
        Reaction.UNKNOWN,
        Others.DISK,
        retry="check the disk; the response is lost, so imagewatch retry cannot read it; only if you accept a second "
        "charge, move the prompt back into the inbox",
    ),
)
LIMITS = (
    Kind(
        "too_expensive",
        "the request may cost more than a whole cap",
        "no",
        Reaction.REFUSED,
        retry="raise the cap or ask for less, then move the prompt back into the inbox",
    ),
    Kind(
        "cap",
        "the request does not fit below a cap with what was spent",
        "no",
        Reaction.WAIT,
        Others.FITTING,
        next="wait until the day or month of the cap ends, or raise the cap and reload the daemon; prompts that fit "
        "are still sent",
        is_own=True,
    ),
    Kind(
        "reserved",
        "the request does not fit below a cap with what is reserved for requests in flight",
        "no",
        Reaction.WAIT,
        is_own=True,
        is_short=True,
        seconds=2.0,
    ),
    Kind(
        "rate",
        "too many requests in this minute",
        "no",
        Reaction.WAIT,
        Others.SLOW,
        next="no action needed; the daemon resumes automatically",
        is_own=True,
        is_short=True,
    ),
    Kind(
        "burst",
        "too many prompts arrived at the same time",
        "no",
        Reaction.WAIT,
        Others.PERSON,
        next="check the inbox; to process what is in it now: imagewatch release",
        seconds=math.inf,
    ),
    Kind(
        "manual",
        "a person ran `imagewatch hold`",
        "no",
        Reaction.WAIT,
        Others.PERSON,
        next="to resume: imagewatch release",
        seconds=math.inf,
    ),
    Kind(
        "manual_account",
        "a person ran `imagewatch hold --account`",
        "no",
        Reaction.WAIT,
        Others.PERSON,
        next="to resume all daemons of the account: imagewatch release --account",
        seconds=math.inf,
        is_shared=True,
    ),
    Kind(
        "repeated",
        "the same file was requested before",
        "no",
        Reaction.REFUSED,
        retry="no action needed; for another image, save the prompt again and move it into the inbox",
    ),
)
KINDS = {kind.name: kind for kind in (*RESPONSES, *LIMITS)}
HOLDS = {kind.name: kind for kind in KINDS.values() if kind.next}
"""The kinds of hold."""
STORES = tuple(kind.name for kind in HOLDS.values() if kind.others is Others.DISK)
"""The kinds of hold that end when a test write succeeds, each by its own test: local disk and shared database."""


@dataclass(frozen=True)
class Reason:
    """Why a prompt fails or waits.

    Attributes:
        kind: Name of the row in ``KINDS``.
        message: What is wrong; the API's message where there is one.
        seconds: How long to wait, if the API asked for a time.
        ends: For ``cap``: when its day or month ends, and for ``rate`` when one more may be sent; seconds since the
            epoch.
        error: For the kinds in ``STORES``: what failed.
        step: Next step for the administrator, where it is not the one of the row.
        folder: The first-level folder whose budget it is about; empty: it is not about one. It does not concern the
            prompts of other folders.
    """

    kind: str
    message: str = ""
    seconds: float | None = None
    ends: float = 0.0
    error: SpoolError | None = None
    step: str = ""
    folder: str = ""

    @property
    def row(self) -> Kind:
        """What happens."""
        return KINDS[self.kind]

    @property
    def is_short(self) -> bool:
        """Whether a job that waits for it stays claimed; at a budget each prompt waits in the inbox."""
        return self.row.is_short and not self.folder

    @property
    def next(self) -> str:
        """Next step for the administrator."""
        return (self.error.hint if self.error else "") or self.step or self.row.next


def failure(error: SpoolError) -> Reason:
    """Return the reason to wait after the shared database failed, or the local disk, which has the ledger, too."""
    return Reason("database" if isinstance(error, DatabaseError) else "disk", str(error), error=error)
