"""``imagewatch init``: a configuration file with every key."""

from __future__ import annotations

import os
import sys

import click

from imagewatch.config.example import initial
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.text import printable


@click.command()
@click.argument("file", default="imagewatch.toml", type=click.Path(dir_okay=False))
@click.option(
    "--root", type=click.Path(), metavar="FOLDER", help="Folder to watch; on a terminal the command asks for it"
)
def init(file: str, root: str | None) -> None:
    """Write a configuration file with comments.

    FILE (default: imagewatch.toml) gets every key with its default and a comment. An existing file is not changed. The
    daemon does not start until a folder to watch is set.
    """
    if root is None and sys.stdin is not None and sys.stdin.isatty() and not os.path.lexists(file):
        root = click.prompt("Folder to watch (it gets inbox, outbox, errors and archive)", err=True)
    text = initial(_root(root))
    try:
        with open(file, "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UsageError(
            f"the file already exists: {printable(file)}", hint="choose another name or remove the file"
        ) from None
    except OSError as error:
        hint = "create its folder first" if isinstance(error, FileNotFoundError) else "choose another file"
        raise SpoolError(f"cannot write the file: {error.strerror}: {printable(file)}", hint=hint) from None
    shown = printable(file)
    first = "Export" if root else "Set root, the folder to watch, in this file, and export"
    click.echo(
        f"Wrote {shown}. {first} LETTA_API_KEY=… (or set api_key_file or api_key_command in the file). "
        f"Then run: imagewatch check --config {shown}"
    )


def _root(root: str | None) -> str | None:
    """Return the folder to watch as it is written into the file: an absolute path, or one that begins with ~."""
    if root is None:
        return None
    if not root.strip() or printable(root) != root:
        raise UsageError(f'"{printable(root, 100)}" is not a folder to watch', hint="name it with --root FOLDER")
    return root if root.startswith("~") else os.path.abspath(root)
