"""Listing a folder in pieces, and why files in it are no prompts."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

from imagewatch.protocol.names import STATUS_JSON, STATUS_TEXT, SUFFIX, final_name, is_image_name, stem_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

_Item = TypeVar("_Item")
MANY = 4096
"""More names than this are not kept for later: the folder is listed again."""
_PIECE = 32
"""So many names are one piece of a listing: a name may take a quarter of a millisecond."""


class Others:
    """What is in a folder beside prompts and folders. Of very many none is kept: they are listed again when needed.

    Args:
        descriptor: The folder.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._few: list[tuple[str, bool]] = []

    def add(self, entry: os.DirEntry[str]) -> None:
        """Note that something is there."""
        if len(self._few) <= MANY:
            self._few.append((entry.name, entry.is_symlink()))

    def __bool__(self) -> bool:
        return bool(self._few)

    def __iter__(self) -> Iterator[tuple[str, bool] | None]:
        """Return the names, and whether each is a link's; None after each piece of the work."""
        return pieces(self._few) if len(self._few) <= MANY else self._listed()

    def _listed(self) -> Iterator[tuple[str, bool] | None]:
        with os.scandir(self._descriptor) as entries:
            for entry in pieces(entries):
                if entry is None:
                    yield None
                elif stem_of(entry.name) is None and not entry.is_dir(follow_symlinks=False):
                    yield entry.name, entry.is_symlink()


def pieces(items: Iterable[_Item]) -> Iterator[_Item | None]:
    """Return these, and None after each piece of the work."""
    for count, item in enumerate(items, 1):
        yield item
        if not count % _PIECE:
            yield None


def why_near_miss(name: str) -> str:
    """Return what is wrong with a name that is almost a prompt's."""
    rule = f"must end in exactly {SUFFIX}" if not name.endswith(SUFFIX) else "must not begin with ., ~ or #"
    return f"not a prompt: the name {rule}"


def why_no_prompt(name: str) -> str:
    """Return why a file that is no prompt is ignored."""
    if is_image_name(name):
        return "an image without a matching prompt"
    if name in {STATUS_TEXT, STATUS_JSON}:
        return "the status of imagewatch"
    if final_name(name):
        return "a temporary file of an editor or a transfer"
    return "hidden" if name[0] == "." else "not a prompt"
