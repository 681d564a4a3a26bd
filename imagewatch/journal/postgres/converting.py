"""Values of SQLite, where a column may hold anything, as the columns of PostgreSQL can hold them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from imagewatch.journal.postgres.session import MOST
from imagewatch.system.errors import SpoolError
from imagewatch.system.text import whole

if TYPE_CHECKING:
    from imagewatch.journal.postgres.session import Session

_MOST: Final = {"bigint": 2**63 - 1, "integer": 2**31 - 1}
_COLUMNS: Final = """
    SELECT attname AS name, format_type(atttypid, NULL) AS kind FROM pg_attribute
    WHERE attrelid = ('imagewatch.' || ?)::regclass AND attnum > 0 AND NOT attisdropped"""


def columns_of(session: Session, table: str) -> dict[str, str]:
    """Return the types of the columns of a table, by name."""
    return {row["name"]: row["kind"] for row in session.execute(_COLUMNS, (table,)).fetchall()}


class Converter:
    """Converts values, and counts those that it had to change.

    Attributes:
        replaced: How many were replaced by the nearest that the column can hold.
    """

    def __init__(self) -> None:
        self.replaced = 0

    def __call__(self, value: object, kind: str, where: str) -> object:
        """Return a value for a column.

        Args:
            value: As SQLite has it, texts with surrogates for what is not UTF-8.
            kind: Type of the column.
            where: Name of the column, for the message.

        Raises:
            SpoolError: It is no number, and the column has numbers.
        """
        if value is None:
            return None
        try:
            found = self._converted(value, kind)
        except (ValueError, OverflowError):
            why = f"the ledger is damaged: {where} holds something that is not a number"
            raise SpoolError(why, hint="restore it from a backup") from None
        if found != value:
            self.replaced += 1
        return found

    @staticmethod
    def _converted(value: object, kind: str) -> object:
        if kind == "text":
            text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
            return whole(text).replace("\0", "\ufffd")
        if kind == "bytea":
            return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
        number = value if isinstance(value, int | float) else float(str(value))
        if kind == "double precision":
            return min(max(float(number), -MOST), MOST)
        most = _MOST[kind]
        if math.isinf(number):
            return most if number > 0 else -most - 1
        return min(max(int(number), -most - 1), most)
