"""``imagewatch skill``: the instructions for agents that have a shell, as an Agent Skill."""

from __future__ import annotations

import importlib.resources
import os
import re
from typing import Final

import click

from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file, resolve_own_link

_NAME: Final = "imagewatch"
_FILE: Final = "SKILL.md"
_EXAMPLE_ROOT: Final = "/srv/imagewatch"
_MOST_BYTES: Final = 1 << 20
_PLAIN = re.compile(r"/[A-Za-z0-9_./-]+")


@click.command()
@click.option(
    "--install",
    "folder",
    type=click.Path(),
    metavar="FOLDER",
    help="Write it into this folder of an agent's skills, as imagewatch/SKILL.md",
)
@click.option("--root", type=click.Path(), metavar="FOLDER", help="Watched folder that the instructions name")
def skill(folder: str | None, root: str | None) -> None:
    """Print or install instructions for agents (an Agent Skill).

    They are for an agent that has a shell and a watched folder. Agents read skills from a folder such as
    ~/.claude/skills or .agents/skills. An existing file that differs is not replaced.
    """
    text = _text(root)
    if folder is None:
        click.echo(text, nl=False)
        return
    path = os.path.join(os.path.abspath(folder), _NAME, _FILE)
    Disk().make_folder(os.path.dirname(path), 0o777)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        _require_same(path, text)
    except OSError as error:
        hint = "choose another folder"
        raise SpoolError(f"cannot write the file: {error.strerror}: {printable(path)}", hint=hint) from None
    click.echo(f"Installed: {printable(path)}")


def _text(root: str | None) -> str:
    text = importlib.resources.files("imagewatch").joinpath("skills", _NAME, _FILE).read_text(encoding="utf-8")
    if root is None:
        return text
    path = os.path.abspath(root)
    if not _PLAIN.fullmatch(path):  # it is part of commands
        hint = "use a path of letters, digits and the characters / . _ -, such as that of a link to the folder"
        raise UsageError(f"the path cannot be used in commands as it is: {printable(path)}", hint=hint)
    return text.replace(_EXAMPLE_ROOT, path)


def _require_same(path: str, text: str) -> None:
    try:
        with open_file(resolve_own_link(path), most_bytes=_MOST_BYTES) as file:
            is_same = file.read() == text.encode()
    except OSError:
        is_same = False
    if not is_same:
        hint = "compare it with the output of imagewatch skill; remove the file to install the new one"
        raise UsageError(f"the file already exists and differs: {printable(path)}", hint=hint)
