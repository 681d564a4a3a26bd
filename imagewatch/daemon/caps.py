"""Which prompts wait in the inbox at a cap, and why.

If a prompt does not fit below a cap when its turn comes, it is not claimed, and the next prompt of its folder that fits
is. For this, a prompt is read before it is claimed, and what its request may cost is reserved. Prompts that cost the
same are treated the same until something changes.

A first-level folder with a budget is treated on its own: at its budget only its prompts wait.

Belongs to the main thread.
"""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from imagewatch.inbox.candidate import first_level
from imagewatch.journal.prices import Asked
from imagewatch.protocol.names import SUFFIX
from imagewatch.protocol.reasons import HOLDS
from imagewatch.protocol.request import fields_of, read_prompt
from imagewatch.system.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from imagewatch.config.schema import Config
    from imagewatch.inbox.candidate import Candidate, FileState, Key
    from imagewatch.journal.journal import Journal
    from imagewatch.protocol.reasons import Reason
    from imagewatch.protocol.request import Opener
    from imagewatch.protocol.values import Claim

_Kind = tuple[str, Asked]
"""What prompts have in common that are treated the same: the folder whose budget counts, or "", and the request."""


class Caps:
    """The prompts that wait at a cap.

    Args:
        journal: What may be spent.
        inbox: The inbox.
        opener: Opens a file of the inbox.
        monotonic: Monotonic clock, seconds.

    Attributes:
        due: Monotonic time at which the prompts that wait are checked again, seconds.
    """

    def __init__(self, journal: Journal, inbox: str, opener: Opener, monotonic: Callable[[], float]) -> None:
        self._journal = journal
        self._inbox = inbox
        self._opener = opener
        self._now = monotonic
        self.due = math.inf
        self._waiting: dict[Key, tuple[FileState, _Kind]] = {}
        self._earlier: dict[Key, _Kind] = {}  # what waited before a reload, and had no turn since
        self._refused: dict[_Kind, Reason] = {}
        self._held: dict[tuple[str, str], Reason] | None = None

    def configure(self, config: Config) -> None:
        """Take a configuration; every prompt is checked again.

        The inbox is scanned again, and all slots may be busy. Until then what has waited counts as waiting: else its
        hold would end and begin again.
        """
        self._config = config
        waited = self._earlier | {key: kind for key, (_, kind) in self._waiting.items()}
        self._earlier = {
            key: (name, asked)
            for key, (_, asked) in waited.items()
            for name in (self._with_budget(key),)
            if self._has_cap(name)
        }
        kinds = set(self._earlier.values())
        self._refused = {kind: refusal for kind, refusal in self._refused.items() if kind in kinds}
        self._waiting.clear()
        self._held = None
        if self._earlier:
            self.soon()

    def admits(self, candidate: Candidate, claim: Claim) -> bool:
        """Return whether a prompt may be claimed; if so, what it may cost is reserved.

        A prompt that may cost more than a whole cap may be claimed: its job refuses it, with an error file.

        Raises:
            SpoolError: The journal cannot be used, or a job of that name is not over.
        """
        kind = self._kind(candidate)
        self._earlier.pop(candidate.key, None)
        self._held = None
        if kind is None:  # its worker opens its job
            return True
        refusal = self._refused.get(kind) or self._journal.open(claim, kind[1])
        if refusal is None:
            self._waiting.pop(candidate.key, None)
            return True
        self._refused[kind] = refusal
        self._waiting[candidate.key] = candidate.states[0], kind
        return False

    def _kind(self, candidate: Candidate) -> _Kind | None:
        """Return the kind of a prompt; None if there is no cap for it, or its job will refuse it anyway."""
        name = self._with_budget(candidate.key)
        if not self._has_cap(name):
            return None
        known = self._waiting.get(candidate.key)
        if known and known[0] == candidate.states[0]:
            return known[1]
        folder, stem = candidate.key
        try:
            raw = read_prompt(os.path.join(self._inbox, folder, stem + SUFFIX), self._opener)
            return name, Asked.of(fields_of(raw, folder, self._config, has_inputs=bool(candidate.images)))
        except BadRequest:
            return None

    def _with_budget(self, key: Key) -> str:
        """Return the first-level folder whose budget counts for a prompt, or an empty string."""
        name = first_level(key[0])
        return name if name in self._config.budgets else ""

    def _has_cap(self, name: str) -> bool:
        limits = self._config.limits
        return bool(name or limits.credits_per_day or limits.credits_per_month)

    def soon(self) -> None:
        """Check the prompts that wait again soon: what they may cost, or what is left of the caps, has changed."""
        self.due = self._now()

    def may_fit(self) -> bool:
        """Return whether a prompt that waits may fit now."""
        return bool(self._waiting) and self.due <= self._now()

    def check(self, is_there: Callable[[Key], bool], is_file: Callable[[Key], bool]) -> set[Key]:
        """Check every request that waits again.

        Args:
            is_there: Returns whether a prompt is still passed over.
            is_file: Returns whether a prompt is still in the inbox.

        Returns:
            The prompts that may fit now.
        """
        self._held = None
        self._waiting = {key: known for key, known in self._waiting.items() if is_there(key)}
        self._forget_missing(is_file)
        if any(refusal.kind == "rate" for refusal in self._refused.values()):
            self._journal.correct_times()  # else a clock that was set back would hold them until it has caught up
        budget = self._journal.budget()
        kinds = {kind for _, kind in self._waiting.values()} | set(self._earlier.values())
        found = {
            (name, asked): budget.over_cap(asked, folder=name) or budget.over_budget_rate(name) for name, asked in kinds
        }
        self._refused = {kind: refusal for kind, refusal in found.items() if refusal and refusal.row.is_own}
        return {key for key, (_, kind) in self._waiting.items() if kind not in self._refused}

    def _forget_missing(self, is_file: Callable[[Key], bool]) -> None:
        """Forget what waited before a reload and was removed; one prompt of each kind is enough to be found."""
        found: set[_Kind] = set()
        for key, kind in list(self._earlier.items()):
            if kind not in found and is_file(key):
                found.add(kind)
            elif kind not in found:
                del self._earlier[key]

    def all_had_their_turn(self) -> None:
        """Note that every prompt of the inbox was checked since the last reload."""
        if self._earlier:
            self._earlier.clear()
            self._held = None

    def __len__(self) -> int:
        """Return how many prompts wait at a cap."""
        return len(self._waiting)

    def reasons(self) -> dict[str, str]:
        """Return why each of them waits, by its path below the inbox."""
        return {
            os.path.join(folder, stem + SUFFIX): self._refused[kind].message
            for (folder, stem), (_, kind) in self._waiting.items()
            if kind in self._refused
        }

    def held(self) -> dict[tuple[str, str], Reason]:
        """Return why prompts wait for a time, by provider and folder; one of the two is empty.

        For each provider whose prompts wait at a cap for the end of a day or a month, and for each folder whose prompts
        wait at its budget, it is the reason that ends first.
        """
        if self._held is None:
            self._held = self._find_held()
        return self._held

    def any_waits_briefly(self) -> bool:
        """Return whether a prompt waits for the next minute of a budget."""
        return any(reason.kind == "rate" for reason in self.held().values())

    def any_waits_for_others(self) -> bool:
        """Return whether a prompt waits only until requests in flight have ended."""
        return any(refusal.kind not in HOLDS for refusal in self._refused.values())

    def _find_held(self) -> dict[tuple[str, str], Reason]:
        found: dict[tuple[str, str], Reason] = {}
        for kind in {kind for _, kind in self._waiting.values()} | set(self._earlier.values()):
            refusal = self._refused.get(kind)
            if refusal is None or refusal.kind not in HOLDS:
                continue
            whose = ("", refusal.folder) if refusal.folder else (kind[1].provider, "")
            if whose not in found or refusal.ends < found[whose].ends:
                found[whose] = refusal
        return found
