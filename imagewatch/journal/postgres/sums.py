"""Compares what follows from attempts in SQLite and in PostgreSQL: the sums for the caps, and the prices."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    import sqlite3

    from imagewatch.journal.postgres.converting import Converter
    from imagewatch.journal.postgres.session import Session

_ACCOUNT: Final = "account = current_setting('imagewatch.account')"
_OWN: Final = f"{_ACCOUNT} AND instance = current_setting('imagewatch.instance')"
_GROUP: Final = {
    "sums": "day, provider, price_kind",
    "folder_sums": "folder, day, provider, price_kind",
}
PRICE: Final = ("provider", "price_kind", "price", "last_at")
PRICES: Final = "SELECT provider, price_kind, price, last_at FROM prices"
ALL_PRICES: Final = (
    "SELECT provider, price_kind, price, max(last_at) AS last_at FROM prices GROUP BY provider, price_kind, price"
)
_COUNTED: Final = (
    "sent_at IS NOT NULL AND charged IN ('yes', 'unknown') AND outcome IN ('completed', 'unknown', 'refused')"
)
_FROM_ATTEMPTS: Final = """
    SELECT {0}CASE WHEN sent_at >= -62135596800 AND sent_at < 253402300800
    THEN to_char(to_timestamp(sent_at) AT TIME ZONE 'UTC', 'YYYY-MM-DD') ELSE '9999-12-31' END AS day,
    asked_provider AS provider, price_kind, sum(coalesce(credits, 0)) AS credits,
    sum(CASE WHEN credits IS NULL THEN greatest(asked, 1) ELSE 0 END) AS unknown FROM {1} WHERE {2} GROUP BY {3}"""
_EQUAL: Final = 1e-9

_Sums = dict[tuple[Any, ...], tuple[float, float]]


def require_same_as_moved(session: Session, file: sqlite3.Connection, convert: Converter) -> None:
    """Compare a file with the attempts that were copied from it, and those with the sums of the database.

    Raises:
        SpoolError: They differ.
    """
    for name, group in _GROUP.items():
        asked = f"SELECT {group}, credits, unknown FROM {name}"  # noqa: S608  our own names
        in_file = _sums([_text(row, convert) for row in file.execute(asked).fetchall()])
        _require(name, in_file, _sums(session.execute(_attempts(name, "moving", "true")).fetchall()))
        in_database = f"SELECT {group}, credits, unknown FROM imagewatch.{name} WHERE {_OWN}"  # noqa: S608
        own = _sums(session.execute(in_database).fetchall())
        _require(name, _sums(session.execute(_attempts(name, "imagewatch.attempts", _OWN)).fetchall()), own)
    row = session.execute(
        "SELECT count(*) FROM moving AS m LEFT JOIN imagewatch.attempts AS a USING (job, attempt) "
        "WHERE a.job IS NULL OR (a.instance = m.instance AND (a.outcome, a.charged, a.credits, a.sent_at, a.reserved) "
        "IS DISTINCT FROM (m.outcome, m.charged, m.credits, m.sent_at, m.reserved))"
    ).fetchone()
    if row is None or row[0]:
        raise _different("the attempts")


def require_same_in_file(session: Session, file: sqlite3.Connection, taken_along: str) -> None:
    """Compare a file with the attempts of the database that were copied into it.

    Args:
        session: The database.
        file: The file.
        taken_along: Which attempts of the account were copied.

    Raises:
        SpoolError: They differ.
    """
    for name, group in _GROUP.items():
        in_file = _sums(file.execute(f"SELECT {group}, credits, unknown FROM {name}").fetchall())  # noqa: S608
        copied = _attempts(name, "imagewatch.attempts", f"{_ACCOUNT} AND {taken_along}")
        _require(name, _sums(session.execute(copied).fetchall()), in_file)
    prices = {tuple(row) for row in session.execute(ALL_PRICES).fetchall()}
    if prices != {tuple(row) for row in file.execute(PRICES).fetchall()}:
        raise _different("the prices")


def credits_of(file: sqlite3.Connection) -> float:
    """Return what all attempts of a file are known to have been charged."""
    return float(file.execute("SELECT coalesce(sum(credits), 0.0) FROM sums").fetchone()[0])


def _attempts(name: str, table: str, rows: str) -> str:
    """Return the question for the sums that follow from attempts."""
    folder, where, group = "", f"{rows} AND {_COUNTED}", "1, 2, 3"
    if name == "folder_sums":
        folder, where, group = "split_part(source, '/', 1) AS folder, ", f"{where} AND source LIKE '%/%'", "1, 2, 3, 4"
    return _FROM_ATTEMPTS.format(folder, table, where, group)


def _text(row: Any, convert: Converter) -> list[Any]:  # noqa: ANN401  a row of SQLite
    before = convert.replaced
    found = [convert(one, "text", "sums") if isinstance(one, str) else one for one in row]
    convert.replaced = before  # it was counted in the attempts
    return found


def _sums(rows: list[Any]) -> _Sums:
    """Return credits and unknown images by what identifies them; what is 0 is left out."""
    found: _Sums = {}
    for row in rows:
        *key, credits_, unknown = row
        before = found.get(tuple(key), (0.0, 0.0))
        found[tuple(key)] = before[0] + float(credits_), before[1] + float(unknown)
    return {key: value for key, value in found.items() if abs(value[0]) > _EQUAL or value[1]}


def _require(name: str, one: _Sums, other: _Sums) -> None:
    for key in one.keys() | other.keys():
        (credits_, unknown), (other_credits, other_unknown) = one.get(key, (0.0, 0.0)), other.get(key, (0.0, 0.0))
        if unknown != other_unknown or not math.isclose(credits_, other_credits, rel_tol=_EQUAL, abs_tol=1e-6):
            raise _different(f"the {name.replace('_', ' ')}")


def _different(what: str) -> SpoolError:
    hint = "nothing was changed; run imagewatch check, then run this again; if it remains, please report it"
    return SpoolError(f"the copy of the journal differs in {what}", hint=hint)
