"""What ``check`` prints about caps and budgets: what is spent, and whether a request fits now. Nothing is changed.

Credits that a running daemon has reserved for requests in flight are not known here.
"""

from __future__ import annotations

import contextlib
import os
import unicodedata
from typing import TYPE_CHECKING

from imagewatch.commands.ledger import open_budget
from imagewatch.config.schema import FolderBudget
from imagewatch.inbox.system_folders import why_not_entered
from imagewatch.journal.budget import CAPS, setting
from imagewatch.journal.prices import Asked
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import amount, printable

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from imagewatch.config.schema import Config
    from imagewatch.journal.budget import Budget
    from imagewatch.protocol.request import Request


def refusal(budget: Budget, request: Request, folder: str) -> tuple[str, str]:
    """Return ``wait`` or ``refuse``, and why, if a request does not fit the caps now; two empty texts if it fits.

    Args:
        budget: What is spent.
        request: The request.
        folder: The first-level folder of its prompt.
    """
    asked = Asked.of(request.fields)
    if problem := budget.never(asked, folder):
        return "refuse", printable(str(problem))
    found = budget.over_cap(asked, folder=folder) or budget.over_budget_rate(folder)
    return ("wait", found.message) if found else ("", "")


def caps(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield verdict, setting and text for each cap on credits.

    A cap below ``assumed_credits`` is bad as long as no charge is known: then no request is ever sent.
    """
    limits = config.limits
    set_ = [
        (rule, cap) for rule, cap in zip(CAPS, (limits.credits_per_day, limits.credits_per_month), strict=True) if cap
    ]
    if not set_:
        return
    try:
        with open_budget(config) as budget:
            spent, is_known = budget.spent(), budget.knows_prices()
    except SpoolError as error:
        yield "warn", "caps", printable(f"spent credits are not known: {error}")
        return
    for rule, cap in set_:
        yield _cap(rule, cap, spent[rule], limits.assumed_credits, is_known=is_known)


def budgets(config: Config) -> Iterator[tuple[str, str, str]]:
    """Yield verdict, setting and text for each budget: its folder, then each of its caps."""
    if not config.budgets:
        return
    try:
        with open_budget(config) as budget:
            spent, is_known = {name: budget.spent(name) for name in config.budgets}, budget.knows_prices()
    except SpoolError as error:
        yield "warn", "budgets", printable(f"spent credits are not known: {error}")
        return
    there = _first_level_folders(config.folders.inbox)
    for name, own in config.budgets.items():
        if problem := _folder_problem(name, there, is_recursive=config.inbox.recursive):
            yield "warn", printable(setting(name)), printable(problem)
        if own == FolderBudget():
            yield "warn", printable(setting(name)), "sets no cap"
        for key, cap in (("credits_per_day", own.credits_per_day), ("credits_per_month", own.credits_per_month)):
            if cap:
                rule = setting(name, key)
                verdict, _, text = _cap(rule, cap, spent[name][rule], config.limits.assumed_credits, is_known=is_known)
                yield "warn" if verdict == "bad" else verdict, printable(rule), printable(text)
        if own.requests_per_minute:
            text = f"{amount(own.requests_per_minute)} requests in a minute"
            yield "ok", printable(setting(name, "requests_per_minute")), text


def _first_level_folders(inbox: str) -> list[str]:
    """Return the names of the folders in the inbox as they are on the disk, without links."""
    with contextlib.suppress(OSError), os.scandir(inbox) as entries:
        return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return []


def _folder_problem(name: str, there: Collection[str], *, is_recursive: bool) -> str:
    """Return why a budget has no effect as things are, or an empty string."""
    if not is_recursive:
        return "it has no effect, because inbox.recursive is false: no prompts of sub-folders are sent"
    if why := why_not_entered(name):
        return f"it has no effect: it is {why}"
    if name in there:
        return ""
    same = next((one for one in sorted(there) if _folded(one) == _folded(name)), "")
    hint = f'; did you mean "{same}"? Names are compared byte by byte' if same else ""
    return f"there is no folder of this name in the inbox, so it has no effect yet{hint}"


def _folded(name: str) -> str:
    return unicodedata.normalize("NFKC", name).casefold().strip()


def _cap(rule: str, cap: float, spent: tuple[float, str], assumed: float, *, is_known: bool) -> tuple[str, str, str]:
    """Return verdict, setting and text for a cap.

    Args:
        rule: The setting.
        cap: Its value, credits.
        spent: What is spent, credits, and when the period ends.
        assumed: ``assumed_credits``.
        is_known: Whether any charge is known.
    """
    text = f"{amount(cap)} credits; {amount(spent[0])} are spent; the period ends {spent[1]}"
    if cap >= assumed:
        return "ok", rule, text
    text += f"; it is below limits.assumed_credits ({amount(assumed)})"
    if is_known:
        return "warn", rule, f"{text}: no request is sent to a provider that was not charged in the last 30 days"
    return "bad", rule, f"{text}, so every request is refused; raise it, or set assumed_credits to a likely cost"
