"""What comes next for a job, told from what lies on the disk. Pure: no clock, no disk, no network.

The rules are tried from the top; the first that holds names the step. There is no other place that decides,
and no memory of what was done: after a crash the same question gets the same answer. Each step can be run
twice without harm. ``docs/ARCHITECTURE.md`` shows this table; a test keeps the two equal.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from imagewatch.protocol.reasons import Reaction

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.protocol.values import Door


class Step(enum.Enum):
    """What to do for a job; the value says what commits it."""

    RECLAIM = "originals from errors back into the claim, then the error file removed"
    ARCHIVE = "originals moved to the archive"
    FORGET = "claim folder, job record and then the answers removed, in this order"
    PUBLISH = "images in the outbox, then the receipt"
    REJECT = "originals in errors, then the error file"
    DISCARD = "originals removed, then as FORGET"
    BANK = "what came of the answer, closed and renamed to answer.N"
    DOUBT = "ledger row, then the decision: errors, charged = unknown"
    READ = "images decoded or fetched, ledger row (also before a fetch), decision: outbox (or errors, charged = yes)"
    GIVE_BACK = "ledger row, then originals back in the inbox, the prompt last"
    REFUSE = "ledger row, then the decision: errors, with the API's words"
    GATHER = "each input renamed into the claim"
    CHECK = "nothing on disk if the request is valid, else the decision: errors, charged = no"
    SEND = "sent.N before the first byte leaves; answer.N before anybody reads it"
    DONE = "nothing is left of the job"


class Evidence(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of one job.

    Attributes:
        recorded: Its record is in the state folder.
        leftovers: A claim folder or other files of it are there.
        claimed: The prompt lies in the claim folder.
        originals: Something lies in the claim folder.
        missing: An input of it still lies in the inbox.
        checked: This process has validated the request.
        sent: Highest N of ``sent.N``, 0 without.
        answered: Highest N of ``answer.N``, 0 without.
        begun: The answer to the newest attempt had begun to come in.
        reaction: What ``answer.N`` means, if N is the newest attempt.
        attempts_left: Whether the retry limit allows another attempt.
        reports: This job is the one that shows an account-level refusal in ``errors``; the others go back.
        decided: The door of the decision, if there is one.
        over: The receipt or error file is out.
        reopened: Its paid answer is to be read again, and its originals lie in ``errors`` still.
    """

    recorded: bool = False
    leftovers: bool = False
    claimed: bool = False
    originals: bool = False
    missing: bool = False
    checked: bool = False
    sent: int = 0
    answered: int = 0
    begun: bool = False
    reaction: Reaction | None = None
    attempts_left: bool = True
    reports: bool = True
    decided: Door | None = None
    over: bool = False
    reopened: bool = False


class Rule(NamedTuple):
    """One row of the table: the words for people, the same as code, and the step."""

    seen: str
    holds: Callable[[Evidence], bool]
    step: Step


_MAY_GO_BACK = {Reaction.WAIT, Reaction.ACCOUNT, Reaction.RETRY}

RULES = (
    Rule("no record, nothing left", lambda e: not e.recorded and not e.leftovers, Step.DONE),
    Rule("no record, but files of the job", lambda e: not e.recorded, Step.FORGET),
    Rule("reopened: to be read again, nothing else", lambda e: e.reopened, Step.RECLAIM),
    Rule("receipt or error file is out, originals in the claim", lambda e: e.over and e.originals, Step.ARCHIVE),
    Rule("receipt or error file is out", lambda e: e.over, Step.FORGET),
    Rule("decision: outbox", lambda e: e.decided == "outbox", Step.PUBLISH),
    Rule("decision: errors", lambda e: e.decided == "errors", Step.REJECT),
    Rule("decision: away, the job was a re-delivery", lambda e: e.decided == "away", Step.DISCARD),
    Rule("newest `sent.N` with the beginning of an answer", lambda e: e.sent > e.answered and e.begun, Step.BANK),
    Rule(
        "newest `sent.N` without `answer.N`",
        lambda e: e.sent != e.answered or (e.sent > 0 and e.reaction is None),
        Step.DOUBT,
    ),
    Rule("`answer.N`: success", lambda e: e.reaction is Reaction.SUCCESS, Step.READ),
    Rule(
        "`answer.N`: free, and the prompt is back in the inbox",
        lambda e: e.reaction in _MAY_GO_BACK and not e.claimed,
        Step.FORGET,
    ),
    Rule("claim, inputs still in the inbox", lambda e: e.claimed and e.missing, Step.GATHER),
    Rule("`answer.N`: the request never left whole", lambda e: e.reaction is Reaction.WAIT, Step.GIVE_BACK),
    Rule(
        "`answer.N`: account-level refusal, already shown by another job",
        lambda e: e.reaction is Reaction.ACCOUNT and not e.reports,
        Step.GIVE_BACK,
    ),
    Rule(
        "`answer.N`: any other refusal, or attempts spent",
        lambda e: e.reaction is not None and not (e.reaction is Reaction.RETRY and e.attempts_left),
        Step.REFUSE,
    ),
    Rule("the prompt is not in the claim (cancelled, or given back)", lambda e: not e.claimed, Step.FORGET),
    Rule("claim complete, not yet validated", lambda e: not e.checked, Step.CHECK),
    Rule("valid, nothing sent, or the newest answer was free and transient", lambda _: True, Step.SEND),
)


def next_step(evidence: Evidence) -> Step:
    """Return the step for what is seen on disk."""
    return next(rule.step for rule in RULES if rule.holds(evidence))


def retry_delay(attempt: int, *, initial: float, longest: float, retry_after: float | None, jitter: float) -> float:
    """Return how long to wait before the next attempt.

    ``initial`` doubled with each attempt up to ``longest``, or what the endpoint asked for if that is more
    (up to an hour), plus up to a quarter of it, so that several daemons do not come back together.

    Args:
        attempt: How many attempts were made, from 1.
        initial: First delay, seconds.
        longest: Longest delay of our own, seconds.
        retry_after: The endpoint's ``Retry-After``, seconds, or None.
        jitter: A random number from 0 to 1.

    Returns:
        Seconds.
    """
    own = min(longest, initial * 2.0 ** min(attempt - 1, 30))
    asked = min(max(retry_after or 0.0, 0.0), 3600.0)
    delay = max(own, asked)
    return delay + delay * 0.25 * jitter
