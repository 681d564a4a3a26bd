"""What to do about a file in the inbox that is ignored or waits: one sentence for its sender. Pure."""

from __future__ import annotations

from types import MappingProxyType

from imagewatch.inbox.candidate import Wait
from imagewatch.inbox.system_folders import MARKED
from imagewatch.protocol.names import SUFFIX, final_name, near_miss
from imagewatch.protocol.notice_text import NO_ACTION
from imagewatch.protocol.right_name import has_hidden_ending, is_called_prompt, is_formatted, right_name

READY = "ready"
_ADMINISTRATOR = "ask the administrator to check the permissions"
_BY_WAIT = MappingProxyType(
    {
        READY: NO_ACTION,
        Wait.EMPTY: "write the prompt into the file and save it",
        Wait.SETTLING: NO_ACTION,
        Wait.WRITING: "close the file in the program that writes it, or wait until its transfer ends",
        Wait.OPEN: "close the file in the program that has it open",
        Wait.ARRIVING: "wait until the transfer ends",
        Wait.UNREADABLE: "check the permissions of the file, or save it again",
        Wait.IMAGES: "put these images beside the prompt; without them it goes to the errors folder",
        Wait.CAP: f"{NO_ACTION}; the prompt is sent when the cap allows it",
    }
)
_BY_KIND = (
    ("a link", "put a copy of the file in the place of the link"),
    ("not a plain file", "put a plain file in its place"),
    ("a hard link", "put a copy of the file in its place"),
    ("a folder; inbox.recursive is off", "put the prompts into the inbox itself"),
    ("a folder whose path is too long", "use shorter names of folders"),
    ("a folder that is not scanned", "use fewer folders"),
    ("a folder that cannot be listed", _ADMINISTRATOR),
    (MARKED, "rename the folder, or put the prompts into another one"),
    ("may be meant as an image", "name it in input_images of the prompt, or write input_images = [] there"),
    ("the paths of its results", "use shorter names of folders"),
    ("until a stuck job continues", "ask the administrator: the log has the reason"),
    ("another file system", "put the prompts into a folder of the inbox's own file system"),
)


def why_ignored(path: str, reason: str) -> str:
    """Return why a file is ignored, with what its sender may not see.

    Args:
        path: Its path below the inbox.
        reason: Why, as the scan says it.
    """
    return f"{reason} (Windows may not show the last .txt)" if has_hidden_ending(path) else reason


def for_waiting(kind: str) -> str:
    """Return what to do about a prompt that waits.

    Args:
        kind: ``READY``, or why it waits.
    """
    return _BY_WAIT.get(kind, NO_ACTION)


def for_ignored(path: str, kind: str) -> str:
    """Return what to do about a file or folder that is ignored.

    Args:
        path: Its path below the inbox.
        kind: Why it is ignored.
    """
    found = next((step for start, step in _BY_KIND if kind.startswith(start)), None)
    if found is not None:
        return found
    name = path.rpartition("/")[2]
    return for_name(name) if near_miss(name) else _ADMINISTRATOR


def for_name(name: str) -> str:
    """Return what to do about a file whose name is almost a prompt's.

    Args:
        name: The name alone, without the folders above.
    """
    found = right_name(name)
    if found is None:
        return f"rename it to NAME{SUFFIX}, with a NAME of your choice"
    wrong, right = (f'"{one}"' if " " in one else one for one in (name, found))
    if is_formatted(name):
        return f"save it as plain text with the name {right}"
    if not is_called_prompt(name):
        return f"if it is a prompt, rename {wrong} to {right}; if not, move it out of the inbox"
    if final_name(name):
        return f"if the transfer is complete, rename {wrong} to {right}"
    return f"rename {wrong} to {right}"
