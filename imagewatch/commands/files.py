"""``imagewatch files``: the files that come with imagewatch, for people who have no checkout."""

from __future__ import annotations

import difflib

import click
from click.shell_completion import CompletionItem

from imagewatch.system.bundled import names, read
from imagewatch.system.errors import UsageError
from imagewatch.system.text import printable


def _offered(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    return [CompletionItem(name) for name in names() if name.startswith(incomplete)]


@click.command()
@click.argument("name", required=False, shell_complete=_offered)
def files(name: str | None) -> None:
    """List or print the files that come with imagewatch.

    Examples, schemas, systemd units, completions, the manual page and the configuration with all defaults. With NAME,
    the file is printed.
    """
    known = names()
    if name is None:
        click.echo("\n".join(known))
    elif name in known:
        click.echo(read(name), nl=False)
    else:
        near = difflib.get_close_matches(name, known, 1, 0.4)
        hint = f'did you mean "{near[0]}"?' if near else "list them with: imagewatch files"
        raise UsageError(f"there is no such file: {printable(name, 100)}", hint=hint)
