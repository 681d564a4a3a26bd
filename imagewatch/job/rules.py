"""The next step of a job, from its rows in the journal and what is in the folders. Pure: no clock, no disk, no network.

The rules are tried from the top; the first rule that is true gives the step. What the process and the configuration add
(attempts left, what was checked) is in ``State``, too. After a crash the same rows and files lead to the same step.
Each step can be run twice without harm. ``docs/contributing/architecture.md`` shows this table; a test keeps the two
equal.
"""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from imagewatch.protocol.reasons import Reaction

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.protocol.values import Destination


class Step(enum.Enum):
    """What to do for a job; the value is what commits it."""

    RECLAIM = "originals from errors back into the claim, then the error file removed"
    ARCHIVE = "originals moved to the archive"
    FORGET = "claim folder removed, then the job noted as over, then the responses removed"
    PUBLISH = "images in the outbox, then the receipt"
    REJECT = "originals in errors, then the error file"
    DISCARD = "originals removed, then as FORGET"
    SAVE = "the part of the response that arrived gets its name"
    UNKNOWN = "result and decision in one transaction: errors, charged = unknown"
    READ = (
        "images decoded or fetched (before a fetch: the result), then result and decision in one transaction: outbox "
        "(or errors, charged = yes)"
    )
    GIVE_BACK = "result, then originals back in the inbox, the prompt last"
    REFUSE = "result and decision in one transaction: errors, with the API's message"
    GATHER = "each input renamed into the claim"
    CHECK = (
        "nothing if the request is valid, else result and decision in one transaction: errors, charged = no "
        "(or discarded: a redelivery)"
    )
    SEND = "row of the attempt before the first byte leaves; its response saved before it is read"
    DONE = "nothing is left of the job"


class State(msgspec.Struct, frozen=True, kw_only=True):
    """What journal and folders show of one job, and what the process knows.

    Attributes:
        recorded: The journal knows it, and it is not over.
        leftovers: Its claim folder is there.
        claimed: The prompt is in the claim folder.
        originals: One of its files is in the claim folder.
        missing: An input of it is still in the inbox.
        checked: This process has validated the request.
        fresh: The prompt is still in the inbox, and this process has validated its request there.
        sent: Number of the newest attempt that may have left, 0 without.
        answered: Number of the newest attempt of which the response is saved, or recorded as free; 0 without.
        begun: The response to the newest attempt had begun to arrive.
        reaction: What the response to the newest attempt means, if there is one.
        attempts_left: Whether the retry limit allows another attempt.
        reports: This job is the one that shows an account-level refusal in ``errors``; the others go back.
        decided: The destination of the decision, if there is one.
        over: The result file is published.
        reopened: Its paid response is to be read again, and its originals are still in ``errors``.
        returning: It goes back into the inbox as soon as a newer file has given up its name.
    """

    recorded: bool = False
    leftovers: bool = False
    claimed: bool = False
    originals: bool = False
    missing: bool = False
    checked: bool = False
    fresh: bool = False
    sent: int = 0
    answered: int = 0
    begun: bool = False
    reaction: Reaction | None = None
    attempts_left: bool = True
    reports: bool = True
    decided: Destination | None = None
    over: bool = False
    reopened: bool = False
    returning: bool = False


class Rule(NamedTuple):
    """One row of the table: the condition as text, the same as code, and the step."""

    seen: str
    holds: Callable[[State], bool]
    step: Step


_MAY_GO_BACK = {Reaction.WAIT, Reaction.ACCOUNT, Reaction.RETRY}

RULES = (
    Rule("a new prompt, valid, still in the inbox", lambda s: s.fresh, Step.SEND),
    Rule("over or not known, nothing left", lambda s: not s.recorded and not s.leftovers, Step.DONE),
    Rule(
        "over or not known, with a claim folder (not known, with originals in it: stuck)",
        lambda s: not s.recorded,
        Step.FORGET,
    ),
    Rule("reopened: to be read again, nothing else", lambda s: s.reopened, Step.RECLAIM),
    Rule("the result file is published, originals in the claim", lambda s: s.over and s.originals, Step.ARCHIVE),
    Rule("the result file is published", lambda s: s.over, Step.FORGET),
    Rule("decision: outbox", lambda s: s.decided == "outbox", Step.PUBLISH),
    Rule("decision: errors", lambda s: s.decided == "errors", Step.REJECT),
    Rule("decision: discarded, the job was a redelivery", lambda s: s.decided == "discarded", Step.DISCARD),
    Rule(
        "newest attempt without a response, but with the beginning of one",
        lambda s: s.sent > s.answered and s.begun,
        Step.SAVE,
    ),
    Rule(
        "newest attempt without a response",
        lambda s: s.sent != s.answered or (s.sent > 0 and s.reaction is None),
        Step.UNKNOWN,
    ),
    Rule("response: success", lambda s: s.reaction is Reaction.SUCCESS, Step.READ),
    Rule(
        "response: free, and the prompt is back in the inbox",
        lambda s: s.reaction in _MAY_GO_BACK and not s.claimed,
        Step.FORGET,
    ),
    Rule(
        "returning, and it came out late that it was refused, or may have been charged",
        lambda s: s.returning and s.reaction in {Reaction.REFUSED, Reaction.UNKNOWN},
        Step.REFUSE,
    ),
    Rule("returning: a newer file had its name", lambda s: s.returning and s.claimed, Step.GIVE_BACK),
    Rule("claim, inputs still in the inbox", lambda s: s.claimed and s.missing, Step.GATHER),
    Rule(
        "response: not sent completely, except a large upload that broke",
        lambda s: s.reaction is Reaction.WAIT,
        Step.GIVE_BACK,
    ),
    Rule(
        "response: account-level refusal, already reported by another job",
        lambda s: s.reaction is Reaction.ACCOUNT and not s.reports,
        Step.GIVE_BACK,
    ),
    Rule(
        "response: any other refusal, or no attempts left",
        lambda s: s.reaction is not None and not (s.reaction is Reaction.RETRY and s.attempts_left),
        Step.REFUSE,
    ),
    Rule("the prompt is not in the claim (canceled, or given back)", lambda s: not s.claimed, Step.FORGET),
    Rule("claim complete, not yet validated", lambda s: not s.checked, Step.CHECK),
    Rule("valid, nothing sent, or the newest response was free and transient", lambda _: True, Step.SEND),
)


def next_step(state: State) -> Step:
    """Return the step for a state."""
    return next(rule.step for rule in RULES if rule.holds(state))


def retry_delay(attempt: int, *, initial: float, longest: float, retry_after: float | None, jitter: float) -> float:
    """Return how long to wait before the next attempt.

    ``initial`` doubled with each attempt up to ``longest``, or what the endpoint asked for if that is more
    (up to an hour), plus up to a quarter of it, so that several daemons do not retry at the same time.

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
