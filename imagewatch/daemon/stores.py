"""The local disk and the shared database: which of them failed, for which jobs, and how each is tested.

A journal in the state folder is a part of the local disk. For each of the two there is a kind of hold
(``protocol.reasons.STORES``), which ``admission`` begins and ends.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from imagewatch.protocol.reasons import STORES, failure
from imagewatch.system.disk_errors import FULL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from imagewatch.job.spool import Spool
    from imagewatch.journal.journal import Journal
    from imagewatch.system.errors import SpoolError

_MOST_CAUSES: Final = 10
"""The log names at most so many causes of one hold; the status has the newest one."""


class Stores:
    """What is known about local disk and shared database.

    Args:
        spool: The folders.
        journal: Records everything that is sent.

    Attributes:
        held_by: With which failure a job lets the queue be on hold until it continues, by its id.
        failed: Kinds of hold of what has failed since the start.
        on_database_back: Called when the hold for the database ends.
    """

    def __init__(self, spool: Spool, journal: Journal) -> None:
        self._spool = spool
        self._journal = journal
        self._is_proved = False  # whether the journal was written once, before the first prompt
        self._causes: dict[str, set[tuple[str, int, str]]] = {kind: set() for kind in STORES}
        self.held_by: dict[str, SpoolError] = {}
        self.failed: set[str] = set()
        self.on_database_back: Callable[[], object] = lambda: None

    def ended(self, kinds: Iterable[str]) -> None:
        """Note that holds have ended."""
        if "database" in kinds:
            self.on_database_back()

    def held(self) -> dict[str, SpoolError]:
        """Return the kinds of hold that last until certain jobs continue, each with the first failure of such a job."""
        kinds: dict[str, SpoolError] = {}
        for error in list(self.held_by.values()):
            kinds.setdefault(failure(error).kind, error)
        return kinds

    def test(self, kind: str, *, least_free: int, probe: bool) -> None:
        """Test what a kind of hold is about. The journal is tested with the database, wherever it is.

        Args:
            kind: The kind of hold.
            least_free: Free space that there must be, bytes.
            probe: Whether it is tested that every folder, or the journal, can be written.

        Raises:
            SpoolError: It cannot be used.
        """
        if kind == "database":
            self._journal.require(prove=probe or not self._is_proved)
            self._is_proved = True
            return
        if probe:
            self._spool.probe()
        self._spool.require_room(least_free)

    def is_logged(self, kind: str, error: SpoolError, *, is_held: bool) -> bool:
        """Return whether the log has a hold with the cause of this failure; from now on it has.

        Args:
            kind: The kind of hold.
            error: The failure.
            is_held: Whether there is a hold of this kind already.
        """
        hint = "" if error.code in FULL else error.hint  # wherever a full disk is noticed
        cause, causes = (self._spool.top(error.path), error.code, hint), self._causes[kind]
        if not is_held:
            causes.clear()
        elif cause in causes or len(causes) >= _MOST_CAUSES:
            return True
        causes.add(cause)
        return False
