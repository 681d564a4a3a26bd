"""Pure: the jobs of this process, with their states.

The table holds what this process knows of jobs that are not over. What the disk shows of a job is not in it: that is
for the worker to ask. Belongs to the main thread.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import ANYWHERE, JobKeys, first_level
from imagewatch.protocol.names import SUFFIX

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.inbox.candidate import Key

_FIRST_RETRY, _LONGEST_RETRY = 5.0, 300.0
"""How long a job that is stuck waits before the first automatic retry, and at most before any, seconds."""
_MOST_STUCK = 2
"""So many jobs from the inbox itself are stuck before it is closed; for another folder one is enough."""


class State(enum.Enum):
    """Where a job is."""

    AT_WORK = "a worker has it, and it may send a request"
    DELIVERING = "a worker has it, and its response is saved: it needs no request any more"
    DEFERRED = "it is claimed and waits until a worker may have it"
    LEFT = "only a person, or the next start, can carry it on"


class Need(enum.Enum):
    """What a deferred job needs beside the time at which it is due."""

    NOTHING = "nothing: it may get further without a request, so a hold does not concern it"
    TURN = "its turn to be sent; during a hold it is continued immediately, and goes back to the inbox"
    NAME = "its name: a newer file of the same name has to leave the inbox before this one can go back"
    REQUEST = "another request"


@dataclass(eq=False)
class Job:
    """One job.

    Attributes:
        id: Job id.
        key: Its stem, if its record can be read.
        state: Where it is.
        at: Monotonic time at which it is continued if it is deferred, seconds.
        need: What else it needs if it is deferred.
        retry_seconds: How long it waits for its next automatic retry if it is stuck; 0: it is not, or needs a person.
        problem: Why it is stuck, if it is.
    """

    id: str
    key: Key | None = None
    state: State = State.DEFERRED
    at: float = 0.0
    need: Need = Need.NOTHING
    retry_seconds: float = 0.0
    problem: str = ""

    @property
    def folder(self) -> str:
        """The first-level folder it came from."""
        return first_level(self.key[0]) if self.key and self.key[0] != ANYWHERE else ""

    @property
    def fails(self) -> bool:
        """Whether it is stuck because of its own files, and retried automatically."""
        return self.retry_seconds > 0

    @property
    def names(self) -> dict[str, str]:
        """The fields of a log event about it: its id and, if its record can be read, the path of its prompt."""
        if self.key is None or self.key[0] == ANYWHERE:
            return {"job": self.id}
        return {"job": self.id, "source": "/".join(part for part in self.key if part) + SUFFIX}


class Jobs:
    """The jobs of this process that are not over, one entry for each."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._concurrency = self._most_workers = 0

    def configure(self, concurrency: int) -> None:
        """Take a configuration.

        Args:
            concurrency: How many requests there may be at the same time. Half as many jobs more may be delivered:
                a slow disk must not let saved responses pile up.
        """
        self._concurrency = concurrency
        self._most_workers = concurrency + concurrency // 2

    # What happens to a job

    def start(self, job: Job) -> None:
        """Note that a worker has a job."""
        self._put(job, State.AT_WORK)

    def deliver(self, job: str) -> None:
        """Note that the response of a job is saved."""
        if known := self._jobs.get(job):
            known.state = State.DELIVERING

    def take(self, job: str) -> Job:
        """Take a job out of the table, as its worker has ended."""
        return self._jobs.pop(job, None) or Job(job)

    def defer(self, job: Job, at: float, need: Need = Need.NOTHING) -> None:
        """Let a job wait until a monotonic time, seconds."""
        job.at, job.need = at, need
        self._put(job, State.DEFERRED)

    def retry_stuck(self, job: Job, now: float) -> None:
        """Let a job wait that is stuck, each time for twice as long."""
        job.retry_seconds = min(2 * job.retry_seconds, _LONGEST_RETRY) if job.fails else _FIRST_RETRY
        self.defer(job, now + job.retry_seconds)

    def clear_failure(self, job: Job) -> bool:
        """Note that a job does not fail any more; return whether it did."""
        failed, job.retry_seconds = job.fails, 0.0
        return failed

    def leave(self, job: Job) -> None:
        """Leave a job to a person. Its stem stays taken: it may be paid for, and be delivered again."""
        self._put(job, State.LEFT)

    def forget(self, job: str) -> Job:
        """Forget a job of which nothing is left, and return it."""
        return self._jobs.pop(job)

    def free_name(self, key: Key | None, now: float) -> None:
        """Continue the jobs that wait for this name: it may be free now."""
        for job in self._in(State.DEFERRED):
            if job.need is Need.NAME and job.key == key:
                job.at = now

    def _put(self, job: Job, state: State) -> None:
        job.state = state
        self._jobs.pop(job.id, None)  # in the order in which they came into their state
        self._jobs[job.id] = job

    def _in(self, *states: State) -> Iterator[Job]:
        return (job for job in self._jobs.values() if job.state in states)

    # Which there are

    def __contains__(self, job: object) -> bool:
        """Return whether a job is continued by this process without a person."""
        return isinstance(job, str) and job in self._jobs and self._jobs[job].state is not State.LEFT

    def knows(self, job: str) -> bool:
        """Return whether a job is in the table, also one that needs a person."""
        return job in self._jobs

    def __iter__(self) -> Iterator[str]:
        """Return the ids of the jobs that this process continues without a person."""
        return (job.id for job in self._in(State.AT_WORK, State.DELIVERING, State.DEFERRED))

    @property
    def at_work(self) -> dict[str, Key | None]:
        """The jobs that workers have, and their stems."""
        return {job.id: job.key for job in self._in(State.AT_WORK, State.DELIVERING)}

    @property
    def left(self) -> list[str]:
        """The jobs that only a person, or the next start, can continue."""
        return [job.id for job in self._in(State.LEFT)]

    @property
    def stuck(self) -> dict[str, Key | None]:
        """The jobs that cannot finish for a reason of their own, and their stems."""
        failing = {job.id: job.key for job in self._jobs.values() if job.fails}
        return failing | {job.id: job.key for job in self._in(State.LEFT)}

    @property
    def problems(self) -> dict[str, str]:
        """Why each of the stuck jobs is stuck."""
        return {job: self._jobs[job].problem for job in self.stuck}

    @property
    def any_at_work(self) -> bool:
        """Whether a worker has a job."""
        return any(self._in(State.AT_WORK, State.DELIVERING))

    @property
    def any_deferred(self) -> bool:
        """Whether a job is deferred."""
        return any(self._in(State.DEFERRED))

    @property
    def any_fails(self) -> bool:
        """Whether a job is stuck and retried automatically."""
        return any(job.fails for job in self._jobs.values())

    # What may be done

    def taken(self) -> JobKeys:
        """Return the stems of which a job is not over: the same files are not another job yet."""
        return JobKeys({job.key for job in self._jobs.values() if not _waits_for_name(job)})

    def closed_folders(self) -> frozenset[str]:
        """Return the folders out of which nothing may be claimed, because a job from there is stuck."""
        folders = [job.key[0] for job in self._jobs.values() if job.fails and job.key]
        # One prompt in the inbox itself may have a fault of its own; if there are more, the others may have it, too.
        return frozenset(folder for folder in folders if folder or folders.count("") >= _MOST_STUCK)

    def may_send(self, slots: int) -> bool:
        """Return whether a worker may have a job that sends a request. A job that is only delivered uses no slot.

        Args:
            slots: How many requests there may be at the same time: 0 during a hold, 1 while one is a probe.
        """
        workers = sum(1 for _ in self._in(State.AT_WORK, State.DELIVERING))
        return sum(1 for _ in self._in(State.AT_WORK)) < slots and workers < self._most_workers

    def free(self, slots: int) -> int:
        """Return how many workers may have a job that sends a request; ``slots`` as of ``may_send``."""
        workers = sum(1 for _ in self._in(State.AT_WORK, State.DELIVERING))
        return max(min(slots - sum(1 for _ in self._in(State.AT_WORK)), self._most_workers - workers), 0)

    def may_deliver(self, *, stores_work: bool) -> bool:
        """Return whether a worker may have a job that needs no request: only local disk or database can forbid that."""
        return stores_work and self.may_send(self._concurrency)

    def due(self, now: float, *, is_held: bool) -> list[Job]:
        """Return the deferred jobs that may be continued, the one that waits longest first."""
        waiting = (job for job in self._in(State.DEFERRED) if job.at <= now or (is_held and job.need is Need.TURN))
        return sorted(waiting, key=lambda job: job.at)

    def next_due(self, *, may_send: bool, may_deliver: bool) -> float:
        """Return the monotonic time at which the next deferred job is to be continued; infinite without one."""
        waiting = self._in(State.DEFERRED)
        return min(
            (job.at for job in waiting if may_send or (may_deliver and job.need is not Need.REQUEST)), default=math.inf
        )

    def any_may_continue(self) -> bool:
        """Return whether a deferred job may get further during a hold."""
        needs = {Need.NOTHING, Need.TURN}  # to deliver what was paid for, or to go back to the inbox
        return any(job.need in needs and not job.fails for job in self._in(State.DEFERRED))

    def any_is_awaited(self, now: float) -> bool:
        """Return whether ``once`` waits for a deferred job: it will get further automatically, and soon."""
        return any(not job.fails and (job.need is not Need.NAME or job.at <= now) for job in self._in(State.DEFERRED))


def _waits_for_name(job: Job) -> bool:
    return job.state is State.DEFERRED and job.need is Need.NAME
