"""A running job: what this process knows of it beside what the disk shows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from msgspec.structs import replace

from imagewatch.endpoint.api import Verdict, classify
from imagewatch.job.rules import State

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.endpoint.saved_answer import Answer
    from imagewatch.job.record import Record
    from imagewatch.protocol.reasons import Reason
    from imagewatch.protocol.request import Request
    from imagewatch.protocol.values import Claim, Head, Sent, Tail


class Attempt(NamedTuple):
    """One API call of a job, as far as it is known.

    Attributes:
        number: From 1; 0: no call was made.
        sent: What was sent.
        head: How its response began, if there is one.
        tail: How its response ended.
        nonce: Of the process that may send it.
        made: How many were made with it: one of which no byte left has a number, too.
    """

    number: int = 0
    sent: Sent | None = None
    head: Head | None = None
    tail: Tail | None = None
    nonce: str = ""
    made: int = 0

    @property
    def fields(self) -> dict[str, Any]:
        """What was asked for."""
        return self.sent.fields if self.sent else {}


NO_ATTEMPT = Attempt()


@dataclass
class RunningJob:
    """A running job.

    Attributes:
        record: What the journal has of it, and its files in the state folder.
        claim: What was claimed.
        shown: What the disk shows.
        is_foreseen: Whether the last step set ``shown``, so that the disk need not be asked.
        state: ``shown``, and what this process adds to it; the rules are applied to it.
        request: The valid request, once checked.
        is_fresh: Whether its prompt is still in the inbox: it is valid, and claimed when its attempt is recorded.
        is_resumed: Whether the wait before another attempt is over.
        may_send: Whether a request may be sent.
        earlier: Number of the newest response that was there before: what it says of the account may be outdated.
        reason: What stopped it.
        unknown_reason: Why the result of a request is not known.
        began: When it was started or resumed, seconds since the epoch.
        mtime_ns: The mtime that the prompt gets where it goes, nanoseconds; 0: it goes nowhere.
        hold_claim: Called when its claim folder is made: reaches that by one descriptor from then on.
    """

    record: Record
    claim: Claim
    shown: State = field(default_factory=State)
    is_foreseen: bool = False
    state: State = field(default_factory=State)
    request: Request | None = None
    is_fresh: bool = False
    is_resumed: bool = False
    may_send: bool = True
    earlier: int = 0
    reason: Reason | None = None
    unknown_reason: str = ""
    began: float = 0.0
    mtime_ns: int = 0
    hold_claim: Callable[[], object] = lambda: None

    @property
    def id(self) -> str:
        """The id that names its claim folder and its record."""
        return self.claim.job

    @property
    def has_new_response(self) -> bool:
        """Whether the newest response came in this run: only such a one says something about the account now."""
        return self.state.answered > self.earlier

    def lacks_response(self, attempt: int) -> bool:
        """Return whether an attempt is recorded as free and its response is missing: another host may have it."""
        known = self.record.attempt(attempt)
        return known is not None and known.outcome == "busy" and not self.record.has_answer(known.number)

    def foresee(self, **changes: object) -> None:
        """Set what the disk shows now that a step has succeeded: asking it would cost 5 % of a job's CPU."""
        self.shown, self.is_foreseen = replace(self.shown, **changes), True

    def attempt(self) -> Attempt:
        """Return the newest attempt, with its response if there is one."""
        number = self.state.sent
        has_answer = self.state.answered >= number > 0 and not self.lacks_response(number)
        answer = self.record.answer(number) if has_answer else None
        if (known := self.record.attempt(number)) is None:
            return NO_ATTEMPT
        made = self.record.made()
        if answer is None:
            return Attempt(number, known.sent, nonce=known.nonce, made=made)
        return Attempt(number, known.sent, answer.head, answer.tail, known.nonce, made)

    def answer(self) -> Answer:
        """Return the saved response of the newest attempt that has one."""
        return self.record.answer(self.state.answered)

    def verdict(self, attempt: int = 0) -> Verdict:
        """Return what the response of an attempt means.

        Args:
            attempt: Its number; 0: the newest that has one.
        """
        answer = self.record.answer(attempt or self.state.answered)
        return classify(answer.head, answer.sample)
