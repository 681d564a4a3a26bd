"""Reads the value of ``[shared] database`` as libpq does, to refuse a password in it. Pure; psycopg is not needed.

The value may be a service (``service=NAME``), ``KEY=VALUE`` pairs or a URI. Only what this module reads completely is
accepted, with parameters that are listed here. So no other reading of the same text finds a password in it. No message
repeats any part of the value.
"""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import unquote_to_bytes

PASSWORD_HINT: Final = (
    "put the password into a password file (~/.pgpass), a service file or the systemd credential database_password, "  # noqa: S105
    "and remove it here"
)
WRITE_DATABASE: Final = (
    'write it like "service=imagewatch", "host=db.example.com dbname=imagewatch user=imagewatch" or '
    '"postgresql://imagewatch@db.example.com/imagewatch"'
)
_PARAMETERS: Final = frozenset(
    {
        "application_name",
        "channel_binding",
        "client_encoding",
        "connect_timeout",
        "dbname",
        "fallback_application_name",
        "gssdelegation",
        "gssencmode",
        "gsslib",
        "host",
        "hostaddr",
        "keepalives",
        "keepalives_count",
        "keepalives_idle",
        "keepalives_interval",
        "krbsrvname",
        "load_balance_hosts",
        "max_protocol_version",
        "min_protocol_version",
        "options",
        "passfile",
        "port",
        "require_auth",
        "requirepeer",
        "requiressl",
        "service",
        "servicefile",
        "ssl",
        "ssl_max_protocol_version",
        "ssl_min_protocol_version",
        "sslcert",
        "sslcertmode",
        "sslcompression",
        "sslcrl",
        "sslcrldir",
        "sslkey",
        "sslmode",
        "sslnegotiation",
        "sslrootcert",
        "sslsni",
        "target_session_attrs",
        "tcp_user_timeout",
        "user",
    }
)
"""The connection parameters of libpq that hold no secret."""
_MOST_CHARS: Final = 2000
_SCHEMES: Final = ("postgresql://", "postgres://")
_SECRET_NAME: Final = re.compile(r"pass(?!file)|pwd|secret|scram|token", re.IGNORECASE)
_VALUE_FLAWS: Final = {
    "dbname": re.compile("="),
    "host": re.compile(r"[^,]@|="),  # an abstract socket begins with @
    "port": re.compile(r"[^0-9,]"),
    "service": re.compile("="),
    "user": re.compile("[:=]"),
}
"""What a part of a broken connection string has, and a value does not."""
_NAME: Final = re.compile(r" *(?P<name>[^ =']+) *= *")
_QUOTED: Final = re.compile(r"'(?P<value>(?:[^'\\]|\\.)*)'")
_UNQUOTED: Final = re.compile(r"(?P<value>(?!')(?:[^ \\]|\\.)*)(?= |\Z)")
_URI: Final = re.compile(
    r"(?:(?P<user>[^:@/?#\[\],]*)(?P<password>:[^@/]*)?@)?"
    r"(?P<hosts>(?:\[[0-9A-Fa-f:.%]+\]|[^:@/?#\[\],]*)(?::[0-9]*)?"
    r"(?:,(?:\[[0-9A-Fa-f:.%]+\]|[^:@/?#\[\],]*)(?::[0-9]*)?)*)"
    r"(?:/(?P<dbname>[^:@/?#]*))?(?:\?(?P<query>[^?#@]*))?"
)


def database_flaw(text: str) -> tuple[str, str]:
    """Return what is wrong with a connection string and what to do about it, or empty strings; it is not repeated."""
    if not text.isprintable() or len(text) > _MOST_CHARS:
        return f"must be printable, on one line and at most {_MOST_CHARS} characters long", WRITE_DATABASE
    pairs = _read(text)
    names = {name for name, _ in pairs or ()}
    if any(_SECRET_NAME.search(name) for name in names):
        return "must not hold a password", PASSWORD_HINT
    if pairs is not None and names - _PARAMETERS:
        return "has an unknown connection parameter", WRITE_DATABASE
    if pairs is None or not all(_is_plain(name, value) for name, value in pairs):
        # It may hold a password in any place.
        is_secret = "@" in text or _SECRET_NAME.search(_decoded(text) or text)
        hint = f"{WRITE_DATABASE}; {PASSWORD_HINT}" if is_secret else WRITE_DATABASE
        return "cannot be read as a connection to PostgreSQL", hint
    return "", ""


def names_password_file(text: str) -> bool:
    """Return whether a connection string that has no flaw names a password file."""
    return any(name == "passfile" for name, _ in _read(text) or ())


def _read(text: str) -> list[tuple[str, str]] | None:
    """Return the parameters of a connection string, or None if it cannot be read."""
    return _uri_pairs(text) if text.startswith(_SCHEMES) else _pairs(text)


def _is_plain(name: str, value: str) -> bool:
    """Return whether a value is not itself a connection string, which libpq may expand, nor a part of a broken one."""
    flaw = _VALUE_FLAWS.get(name)
    return "://" not in value and not (flaw and flaw.search(value))


def _pairs(text: str) -> list[tuple[str, str]] | None:
    r"""Return the ``KEY=VALUE`` pairs, or None. In a value, ``\`` precedes a character that is taken as it is."""
    pairs: list[tuple[str, str]] = []
    rest = text.strip(" ")
    while rest:
        name = _NAME.match(rest)
        value = name and (_QUOTED.match(rest, name.end()) or _UNQUOTED.match(rest, name.end()))
        if not name or not value:
            return None
        pairs.append((name["name"], re.sub(r"\\(.)", r"\1", value["value"])))
        rest = rest[value.end() :].lstrip(" ")
    return pairs


def _uri_pairs(text: str) -> list[tuple[str, str]] | None:
    """Return the parameters of a URI, or None; those of its query may be written with ``%`` and two digits."""
    match = _URI.fullmatch(text.partition("://")[2])
    if match is None:
        return None
    pairs = [("host", match["hosts"]), ("user", match["user"] or ""), ("dbname", match["dbname"] or "")]
    if match["password"] is not None:
        pairs.append(("password", ""))
    for part in match["query"].split("&") if match["query"] else ():
        name, equals, value = part.partition("=")
        if not equals or "=" in value:
            return None
        pairs.append((name, value))
    decoded = [(_decoded(name), _decoded(value)) for name, value in pairs]
    if any(name is None or value is None for name, value in decoded):
        return None
    return [((name or "").strip(), value or "") for name, value in decoded]


def _decoded(text: str) -> str | None:
    """Return text with ``%`` and two digits replaced, or None where that does not give printable text."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", text):
        return None
    try:
        plain = unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        return None
    return plain if plain.isprintable() else None
