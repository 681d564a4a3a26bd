"""``imagewatch init``: a configuration file with every key."""

from __future__ import annotations

import os
import sys

import click

from imagewatch.config.load import initial
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.text import printable


@click.command()
@click.argument("file", default="imagewatch.toml", type=click.Path(dir_okay=False))
@click.option("--root", type=click.Path(), metavar="FOLDER", help="The folder to watch; asked for on a terminal.")
def init(file: str, root: str | None) -> None:
    """Write a configuration file with comments.

    FILE (default: imagewatch.toml) gets every key, its default and a line about it. A file that is there already
    stays as it is. Nothing starts before a folder to watch is named.
    """
    if root is None and sys.stdin is not None and sys.stdin.isatty() and not os.path.lexists(file):
        root = click.prompt("Folder to watch (it gets inbox, outbox, errors and archive)", err=True)
    text = initial(_root(root))
    try:
        with open(file, "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UsageError(f"{printable(file)}: is there already", hint="name another file, or remove it first") from None
    except OSError as error:
        hint = "make its folder first" if isinstance(error, FileNotFoundError) else "name another file"
        raise SpoolError(f"{printable(file)}: cannot be written: {error.strerror}", hint=hint) from None
    shown = printable(file)
    first = "Export" if root else "Set root in it, the folder to be watched, and export"
    click.echo(
        f"Wrote {shown}. {first} LETTA_API_KEY=… (or set api_key_file or api_key_command in it). "
        f"Then: imagewatch check --config {shown}"
    )


def _root(root: str | None) -> str | None:
    """Return the folder to watch as it is written into a file; relative to the current folder, ~ stays."""
    if root is None:
        return None
    if not root.strip() or printable(root) != root:
        raise UsageError(f'"{printable(root, 100)}" is not a folder to watch', hint="name it by --root FOLDER")
    return root if root.startswith("~") else os.path.abspath(root)
