"""The exceptions, by what each of them ends.

::

    ImagewatchError
    ├─ UsageError         the command line asks for the impossible       exit 64
    ├─ ConfigError        the configuration: nothing starts              exit 78
    ├─ SpoolError         local disk: full, read-only, missing            exit 74 if it stays
    │  ├─ AlreadyRunning  another daemon has this inbox or state         exit 75
    │  └─ DatabaseError   the shared database cannot be used             exit 69 if it stays
    │     └─ UncertainError  it is not known whether a change was written
    └─ JobError           about one request; the daemon lives
       ├─ BadRequest      unreadable prompt, bad image: no call was made
       │  └─ Outdated     the prompt changed: it is checked again
       ├─ Unavailable     provably free: connect failed; may be tried again
       │  └─ Broken       a part of the request left, and provably not the whole
       ├─ Withdrawn       a hold or a stop at the last moment; no byte of it left
       └─ ChargeUnknown   sent, no usable response

Every message names the file, the cause and the next action. ``OSError`` becomes ``SpoolError`` in ``disk_errors``, and
also in ``journal/sqlite`` and ``job/record``.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import Final

MORE_FILES: Final = (
    "allow the daemon more open files (LimitNOFILE= of the unit, or ulimit -n), or lower limits.concurrency"
)
"""The next action where this process may not open another file."""
MISSING = "check the path and that it is mounted; the daemon creates the folders at its first start"
"""The next action where one of the folders does not exist."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration or a prompt, and what to do about it.

    Attributes:
        field: Dotted name of the key or a file name, e.g. ``inbox.settle_seconds``.
        reason: What is wrong, as text.
        hint: The next action, or an empty string.
    """

    field: str
    reason: str
    hint: str = ""

    def __str__(self) -> str:
        """Return ``field: reason (hint)``."""
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.field}: {self.reason}{hint}"


class ImagewatchError(Exception):
    """Root of everything imagewatch raises on purpose.

    Attributes:
        hint: The next action, as one sentence, or an empty string.
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class UsageError(ImagewatchError):
    """The command line asks for the impossible; nothing was done."""


class ConfigError(ImagewatchError):
    """The configuration cannot be used; nothing was started.

    Attributes:
        problems: All problems.
        source: Name of the file that was read, or an empty string.
    """

    def __init__(self, problems: list[Problem], *, source: str = "") -> None:
        where = f"{source}: " if source else ""
        super().__init__(where + "; ".join(str(problem) for problem in problems))
        self.problems = problems
        self.source = source


class SpoolError(ImagewatchError):
    """The local disk failed: full, read-only or missing.

    Attributes:
        path: The file or folder concerned.
        code: The ``errno`` value, or 0.
    """

    def __init__(self, message: str, *, path: str = "", code: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.path = path
        self.code = code


class AlreadyRunning(SpoolError):  # noqa: N818  reads as the sentence it is
    """Another process holds the lock of this inbox or this state folder."""


class DamagedJobError(SpoolError):
    """What is recorded of a job cannot be read; a person has to decide about it."""


class DatabaseError(SpoolError):
    """The shared database cannot be used: out of reach, read-only or refusing the connection.

    Its ``code`` is not 0, so that a job which fails with it is tried again automatically.
    """

    def __init__(self, message: str, *, path: str = "", code: int = errno.EREMOTEIO, hint: str = "") -> None:
        super().__init__(message, path=path, code=code, hint=hint)


class NameTakenError(SpoolError):
    """Another job of this name is not over; this one is tried again when it is."""


class UncertainError(DatabaseError):
    """It is not known whether a change was written: the connection failed during its COMMIT."""


class LostJobError(SpoolError):
    """Another daemon of the inbox has the job now; this one must do nothing more with it."""


class JobError(ImagewatchError):
    """Something about one request; the daemon and the other jobs continue."""


class BadRequest(JobError):  # noqa: N818
    """The prompt or one of its images cannot be used; no call was made.

    Attributes:
        problems: All problems.
    """

    def __init__(self, problems: list[Problem], *, hint: str = "") -> None:
        super().__init__("; ".join(str(problem) for problem in problems), hint=hint)
        self.problems = problems


class Outdated(BadRequest):
    """The prompt changed between its check and its claim. No call was made; it is checked again."""


class Unavailable(JobError):  # noqa: N818
    """The request provably did not reach the API whole; it was free and may be tried again."""


class KeyRefused(Unavailable):
    """The API answered that it does not accept the key; nothing was asked for that costs anything."""


class Broken(Unavailable):
    """The connection broke before the last byte of the request was sent; it was free.

    Attributes:
        is_own: Whether the cause may be this request: the network worked, and the request is large.
    """

    def __init__(self, message: str, *, hint: str = "", is_own: bool = False) -> None:
        super().__init__(message, hint=hint)
        self.is_own = is_own


class Withdrawn(JobError):  # noqa: N818
    """The queue was put on hold, or the daemon stops, before the first byte of the request left; it was free."""


class ChargeUnknown(JobError):  # noqa: N818
    """The whole request left, and no usable response came: it may have been charged."""
