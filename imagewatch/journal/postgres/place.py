"""Where a daemon's rows are: the database, and the names by which they are found in it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Place:
    """Where a daemon's rows are.

    Attributes:
        database: Connection string of libpq, without a password.
        account: The paid account.
        inbox: Whose prompts they are.
        instance: Name of the daemon.
        parameters: More parameters of the connection: the password, which is not shown.
        is_replicated: Whether the server must have a synchronous standby.
    """

    database: str
    account: str
    inbox: str
    instance: str
    parameters: Mapping[str, str] = field(default_factory=dict, repr=False)
    is_replicated: bool = True
