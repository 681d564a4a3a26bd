"""What makes a single value of a configuration unusable. Pure."""

from __future__ import annotations

import ipaddress
import itertools
import math
import os
import re
import shlex
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from imagewatch.config.schema import DELETE
from imagewatch.config.tables import KEY_HINT
from imagewatch.system.errors import Problem

if TYPE_CHECKING:
    from imagewatch.config.schema import Folders

MOST_NAME_CHARS = 100
"""Longest name of an account or an instance."""
PLACES = ("inbox", "outbox", "errors", "archive")
"""The folders that are in ``root`` unless they are set."""


def flaw_of(value: object) -> str:
    """Return what makes a value unusable whatever its type should be, or an empty string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is too large"
    if isinstance(value, str) and "\0" in value:
        return "must not contain NUL"
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((flaw for one in value if (flaw := flaw_of(one))), "")
    return ""


def url_flaw(url: str) -> tuple[str, str]:
    """Return what is wrong with a base URL and what to do about it; the URL is not repeated."""
    write = 'write it like "https://api.letta.com"'
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL", write
    plain = f"[{host}]" if ":" in host else host
    netloc = plain if port is None else f"{plain}:{port}"
    has_scheme = url.lower().startswith(("http://", "https://"))
    rules = (
        (not has_scheme or not host, "must begin with https:// and a host", write),
        ("@" in parts.netloc, "must not hold a user name or password", KEY_HINT),
        (not re.fullmatch(r"[\x21-\x7e]+", url), "must be ASCII without spaces", write),
        (bool(re.search(r"[?#\\]", url)), "must have no query and no fragment", write),
        # Compared whole, so that what we call the host is what all other programs call the host.
        (parts.netloc.lower() != netloc, "must begin with https:// and a host", write),
        (not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host), "must begin with https:// and a host", write),
        (parts.path.lower().endswith("/v1"), "must not end in /v1", "remove /v1"),
        (
            parts.scheme == "http" and not is_loopback(host),
            "the key would be sent unencrypted",
            "use https://; http:// is for this machine only",
        ),
    )
    return next(((reason, hint) for broken, reason, hint in rules if broken), ("", ""))


def webhook_flaw(url: str) -> str:
    """Return what is wrong with the URL of a receiver of notifications, or an empty string; it is not repeated."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL"
    rules = (
        (parts.scheme not in {"http", "https"} or not host, "must begin with https:// or http:// and a host"),
        (not re.fullmatch(r"[\x21-\x7e]+", url), "must be ASCII without spaces"),
        (bool(re.search(r"[#\\]", url)), "must have no fragment and no backslash"),
        (not re.fullmatch(r"[A-Za-z0-9._-]+|[0-9A-Fa-f:.]+", host), "must begin with https:// or http:// and a host"),
    )
    return next((reason for broken, reason in rules if broken), "")


def name_flaw(name: str, *, may_be_empty: bool) -> str:
    """Return what is wrong with the name of an account or instance, or an empty string."""
    if not name.isprintable() or name != name.strip():
        return "must be printable, without spaces at its ends"
    if len(name) > MOST_NAME_CHARS:
        return f"must be at most {MOST_NAME_CHARS} characters long"
    return "" if name or may_be_empty else "must not be empty"


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its very name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_command(command: str) -> list[str]:
    """Return the words of a command line, or nothing when its quotes do not match."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def above_status(path: str, folders: Folders) -> str:
    """Return the name of the folder for which a folder for the status files is unsuitable, or an empty string.

    In the inbox and the outbox themselves the files do no harm. A folder in them may be replaced by other users. In the
    others there might be a prompt's file of the same name, which would be replaced.
    """
    real = os.path.realpath(path)
    for name in (*PLACES, "state"):
        place = os.path.realpath(getattr(folders, name))
        if getattr(folders, name) == DELETE or os.path.commonpath((place, real)) != place:
            continue
        if real != place or name not in {"inbox", "outbox"}:
            return name
    return ""


def overlaps(folders: Folders) -> list[Problem]:
    """Return a problem for each pair of folders that are equal or nested, also by way of links."""
    names = [name for name in (*PLACES, "state") if getattr(folders, name) != DELETE]
    places = {name: os.path.realpath(getattr(folders, name)) for name in names}
    problems: list[Problem] = []
    for one, two in itertools.combinations(names, 2):
        common = os.path.commonpath((places[one], places[two]))
        if common not in (places[one], places[two]):
            continue
        outer, inner = (one, two) if common == places[one] else (two, one)
        how = "is the same folder as" if places[one] == places[two] else "is inside"
        problems.append(Problem(f"folders.{inner}", f"{how} folders.{outer}", "choose separate folders"))
    return problems
