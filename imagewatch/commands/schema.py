"""``imagewatch schema``: the JSON schemas of the files that the daemon writes for programs."""

from __future__ import annotations

import json

import click
from click.shell_completion import CompletionItem

from imagewatch.system.bundled import names, read
from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable

_FOLDER = "schemas/"
_ENDING = ".schema.json"


def _offered(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in _schemas() if name.startswith(incomplete)]


@click.command()
@click.argument("name", required=False, shell_complete=_offered)
def schema(name: str | None) -> None:
    """List or print the JSON schemas of the daemon's files.

    They describe receipts, error files and the status in the folders. With NAME, the schema is printed.
    """
    known = _schemas()
    if name is None:
        width = max(map(len, known))
        for one in known:
            click.echo(f"{one:<{width}}  {json.loads(_text(one))['title']}")
    elif name in known:
        click.echo(_text(name), nl=False)
    else:
        hint = f"choose one of {', '.join(known)}"
        raise UsageError(f"there is no such schema: {printable(name, 100)}", hint=hint)


def _schemas() -> list[str]:
    found = (name for name in names() if name.startswith(_FOLDER) and name.endswith(_ENDING))
    return [name[len(_FOLDER) : -len(_ENDING)] for name in found]


def _text(name: str) -> str:
    return read(f"{_FOLDER}{name}{_ENDING}")
