"""One attempt: what is recorded before its first byte leaves, and what this process knows about it afterwards.

Before the first byte leaves, this is on the disk, in this order: the open file of the response, and the row of the
attempt in the journal (``Sending._begin``), which is synced. The table of ``rules`` says what such a row without a
response means after a kill. What the disk does not accept, because it fails, is kept in memory: the job continues from
it.
"""

from __future__ import annotations

import contextlib
import enum
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from msgspec.structs import replace as changed

from imagewatch.endpoint.api import largest_answer
from imagewatch.endpoint.body import Body
from imagewatch.journal.prices import Asked
from imagewatch.protocol.reasons import Reason, failure
from imagewatch.protocol.values import Head, Sent, Tail, dump
from imagewatch.system.errors import Broken, ChargeUnknown, ConfigError, JobError, SpoolError, Unavailable, Withdrawn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager

    from imagewatch.config.schema import Config
    from imagewatch.endpoint.client import Client
    from imagewatch.endpoint.saved_answer import Sink
    from imagewatch.job.record import Record
    from imagewatch.journal.row import Row
    from imagewatch.protocol.request import Request
    from imagewatch.protocol.values import Claim

_LINES_BYTES = 64 * 1024
"""Room for the first and the last line of the file of a response."""


_KINDS = {ConfigError: "key", Unavailable: "unreachable", Broken: "unreachable"}
"""What an error before the response means for other requests."""


class NotAdmittedError(JobError):
    """The journal did not let a request be sent.

    Args:
        reason: Why not.
    """

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.message)
        self.reason = reason


class Left(enum.Enum):
    """How much of a request has been sent."""

    NOTHING = "nothing: the attempt is removed"
    PART = "provably not all of it: that is recorded in the place of the response"
    WHOLE = "possibly all of it"


@dataclass(frozen=True)
class Fate:
    """What happened to a request.

    Attributes:
        claim: Its job.
        row: Its row in the journal.
        sent: What is sent.
        left: How much of it has been sent.
        message: What happened; empty if the response is saved.
        counts: Whether it counts towards ``retry.attempts`` although it was not sent completely.
        status: HTTP status that had arrived when the disk failed, 0 without.
        reason: Why it failed, where that may concern other requests.
        is_saved: Whether the disk has the response, or the record that the request was not sent completely.
    """

    claim: Claim
    row: Row
    sent: Sent
    left: Left = Left.NOTHING
    message: str = ""
    counts: bool = False
    status: int = 0
    reason: Reason | None = None
    is_saved: bool = False

    @property
    def attempt(self) -> int:
        """Its number."""
        return self.row.attempt

    @property
    def is_charged(self) -> bool:
        """Whether a response had arrived that is charged."""
        return 200 <= self.status < 300  # noqa: PLR2004

    def is_missing(self, sent: int) -> bool:
        """Return whether the journal does not show that a request may have left, although it may have.

        Args:
            sent: Highest attempt that the journal shows.
        """
        return self.left is not Left.NOTHING and sent < self.attempt


class Sending:
    """Sends requests. Safe to use from several threads.

    Args:
        client: The endpoint.
        config: Limits.
        fates: What is known about jobs and may not be on the disk, by id; the caller keeps it across a change of
            the configuration.
        leaving: In it the first bytes of a request leave; raises ``Withdrawn`` when it is entered if none may.
        on_disk_error: Called when the disk refuses a part of a response, which then waits.
        clock: Wall clock, seconds since the epoch.
    """

    def __init__(
        self,
        client: Client,
        config: Config,
        fates: dict[str, Fate],
        leaving: Callable[[], AbstractContextManager[object]],
        on_disk_error: Callable[[SpoolError], object],
        clock: Callable[[], float],
    ) -> None:
        self._client = client
        self._config = config
        self._fates = fates
        self._leaving = leaving
        self._on_disk_error = on_disk_error
        self._clock = clock

    def mark(self, request: Request) -> Sent:
        """Return the record of a request; its time is set when the request leaves."""
        return Sent(
            prompt=request.prompt,
            prompt_sha256=request.prompt_sha256,
            fields=request.fields,
            inputs=request.inputs,
            contents=request.contents,
            endpoint=self._client.url,
            at=0.0,
        )

    def send(
        self,
        record: Record,
        claim: Claim,
        request: Request,
        sent: Sent,
        row: Row,
        on_spent: Callable[[], object] = lambda: None,
    ) -> Fate:
        """Make an attempt, and save its response.

        Args:
            record: The job record.
            claim: Its job.
            request: The valid request.
            sent: What is sent.
            row: Its row in the journal.
            on_spent: Called when the attempt is recorded, before its first byte leaves.

        Returns:
            What happened to it; it is in ``fates``, too, until ``forget``.
        """
        fate = self._fates[claim.job] = Fate(claim, row, sent)
        sink = record.sink(row.attempt, record.make_folder, self._on_disk_error)
        with contextlib.closing(sink):
            try:
                with self._leaving():
                    pass  # if none may leave, nothing is started
                body = Body(request.prompt, request.fields, request.parts)
                begin = functools.partial(self._begin, record, sink, fate, request, on_spent)
                self._client.send(claim.job, body, begin, sink)
            except (JobError, ConfigError, SpoolError) as error:
                fate = _failed(self._fates[claim.job], error, sink)
            except BaseException:  # a bug, or the end of the process: the disk decides
                self.forget(claim.job)
                raise
            else:
                fate = replace(fate, left=Left.WHOLE, is_saved=True)
        self._fates[claim.job] = fate
        return fate

    def _begin(
        self, record: Record, sink: Sink, fate: Fate, request: Request, on_spent: Callable[[], object]
    ) -> AbstractContextManager[object]:
        """Write what must be on the disk before the first byte leaves; return the context in which that leaves."""
        sink.open(self._room(request))
        with self._leaving():
            pass  # if none may leave, nothing is recorded
        now = self._clock()
        sent = changed(fate.sent, at=now)
        row = changed(fate.row, sent_at=now, request=dump(sent).decode())
        fate = self._fates[fate.claim.job] = replace(fate, sent=sent, row=row)
        skip = self._config.inbox.redelivery == "skip"
        if refusal := record.spend(row, sent, Asked.of(sent.fields), skip_repeated=skip):
            raise NotAdmittedError(refusal)
        on_spent()
        return self._first_bytes(fate)

    @contextlib.contextmanager
    def _first_bytes(self, fate: Fate) -> Iterator[None]:
        with self._leaving():
            self._fates[fate.claim.job] = replace(fate, left=Left.WHOLE)
            yield

    def _room(self, request: Request) -> int:
        """Return how many bytes are reserved for a response: never more than the configured free space."""
        limits = self._config.endpoint.max_response_bytes, self._config.limits.min_free_bytes
        return min(largest_answer(request.fields) + _LINES_BYTES, *limits)

    def known(self, job: str, attempt: int = 0) -> Fate | None:
        """Return what is known about the newest request of a job in this process, or None.

        Args:
            job: The job.
            attempt: The number that it must have; 0 for any.
        """
        fate = self._fates.get(job)
        return fate if fate and attempt in {0, fate.attempt} else None

    def forget(self, job: str) -> None:
        """Forget what is known about a job: the disk shows it, or the job is over."""
        self._fates.pop(job, None)

    def prove(self, record: Record, fate: Fate) -> None:
        """Record, in the place of the response, that a request was not sent completely."""
        if record.attempts()[1] == fate.attempt:
            return  # there is a response after all
        now = self._clock()
        with contextlib.closing(record.sink(fate.attempt)) as sink:
            sink.start(Head(status=0, at=now, reason=fate.message, counts=fate.counts))
            sink.finish(Tail(complete=False, reason=fate.message, at=now))
        self._fates[fate.claim.job] = replace(fate, is_saved=True)


def _failed(fate: Fate, error: JobError | ConfigError | SpoolError, sink: Sink) -> Fate:
    """Return what happened to a request that got no response, or none that could be saved.

    Args:
        fate: What was known about it when it failed.
        error: How it failed.
        sink: Where its response was to go.
    """
    is_unsent, message = fate.left is Left.NOTHING, str(error)
    if isinstance(error, ChargeUnknown):
        return replace(fate, left=Left.WHOLE, message=message)
    if isinstance(error, SpoolError):
        return replace(fate, message=message, status=sink.status, reason=failure(error) if is_unsent else None)
    if isinstance(error, ConfigError):
        problem = error.problems[0]
        message, step = f"{problem.field}: {problem.reason}", problem.hint
    else:
        step = ""
    kind = _KINDS.get(type(error), "")
    if isinstance(error, Broken) and error.is_own:
        kind = "broken"
    if isinstance(error, NotAdmittedError):
        return replace(fate, left=Left.NOTHING, message=message, reason=error.reason)
    is_unsent = is_unsent or isinstance(error, Withdrawn)
    left = Left.NOTHING if is_unsent else Left.PART
    reason = Reason(kind, message, step=step) if kind else None
    return replace(fate, left=left, message=message, counts=kind == "broken", reason=reason)
