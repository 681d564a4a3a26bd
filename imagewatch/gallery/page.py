"""The page: one HTML file out of a template, its style, its script and the jobs as data. Pure.

No data becomes markup here or in the browser: it is JSON in a block that is not run, and the script creates elements
and text from it. A policy in the page's head allows only our own script and style, by their hashes. It forbids the
script to create markup from text, and all addresses except those of images beside the page.
"""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import msgspec

from imagewatch import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.gallery.values import Job, Status

MARK = b"<!doctype html><!-- imagewatch gallery -->"
"""The beginning of every gallery page."""
PARTS = {
    name: importlib.resources.files(__package__).joinpath(f"page.{name}").read_text(encoding="utf-8")
    for name in ("html", "css", "js")
}
"""The template, its style and its script. They are read at import: the process may become another user later."""
_SLOT = re.compile(r"\{\{(\w+)\}\}")


@dataclass(frozen=True)
class Page:
    """A page, and the name of the file that shows that it is the newest.

    Attributes:
        content: The file.
        stamp: Name of the file that is beside the thumbnails while this page is the newest.
    """

    content: bytes
    stamp: str


def page(
    jobs: Sequence[Job],
    notes: Sequence[str],
    *,
    title: str,
    files: str,
    written: float,
    status: Status | None = None,
) -> Page:
    """Return the page.

    Args:
        jobs: The newest first.
        notes: What could not be read, in words.
        title: Its title.
        files: Name of the folder beside it with the thumbnails.
        written: Wall-clock time, seconds since the epoch; the stamp does not depend on it.
        status: What the daemon reports; None if there is nothing to report.
    """
    shown = msgspec.json.encode({"jobs": jobs, "notes": notes, "title": title, "status": status})
    parts = shown + "".join(PARTS.values()).encode()
    stamp = f"stamp-{hashlib.blake2b(parts, digest_size=8).hexdigest()}.svg"
    data: dict[str, Any] = {
        "version": __version__,
        "written": int(written * 1000),
        "files": quote(os.fsencode(files)),
        "stamp": stamp,
        "shown": msgspec.Raw(shown),
    }
    slots = {
        "policy": _policy(PARTS["js"], PARTS["css"]),
        "title": html.escape(title),
        "css": PARTS["css"],
        "js": PARTS["js"],
        "data": inert(msgspec.json.encode(data)).decode(),
    }
    text = _SLOT.sub(lambda slot: slots[slot[1]], PARTS["html"])
    return Page(MARK + b"\n" + text.encode(), stamp)


def _policy(script: str, style: str) -> str:
    # 'self' is for web servers: a page that is opened as a file has no origin.
    rules = [
        "default-src 'none'",
        f"script-src {_hash(script)}",
        f"style-src {_hash(style)}",
        "img-src 'self' file:",
        "base-uri 'none'",
        "form-action 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join(rules)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def inert(json: bytes) -> bytes:
    """Return JSON that cannot end the script block that contains it."""
    return json.replace(b"<", rb"\u003c").replace(b">", rb"\u003e").replace(b"&", rb"\u0026")
