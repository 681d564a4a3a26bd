"""``imagewatch db``: makes and checks the tables of the shared database."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.journal.opening import place_of
from imagewatch.system.errors import ConfigError, Problem
from imagewatch.system.exits import EXIT_CONFIG
from imagewatch.system.text import printable, to_json

if TYPE_CHECKING:
    from imagewatch.journal.postgres.place import Place


@click.group()
def db() -> None:
    """Make and check the tables of a shared database.

    Several daemons with one paid account can share caps, holds and history in PostgreSQL; see [shared] in the
    configuration.
    """


@db.command()
@config_option
def init(path: str | None) -> None:
    """Make the tables. If they are there, nothing is changed."""
    place = _place(path)
    from imagewatch.journal.postgres.tables import initialize  # noqa: PLC0415  an extra

    is_new = initialize(place)
    click.echo("The tables were made." if is_new else "The tables are there; nothing was changed.")


@db.command()
@config_option
def upgrade(path: str | None) -> None:
    """Update the tables to this version. Stop all daemons of the database before."""
    place = _place(path)
    from imagewatch.journal.postgres.tables import upgrade as update  # noqa: PLC0415  an extra

    before, now = update(place)
    click.echo(f"The tables are those of version {now}" + ("." if before == now else f"; before: version {before}."))


@db.command()
@json_option
@config_option
def check(path: str | None, *, as_json: bool) -> None:
    """Check that the server keeps what it commits, and that its tables are those of this version."""
    place = _place(path)
    from imagewatch.journal.postgres.tables import check as find  # noqa: PLC0415  an extra

    problems = find(place)
    if as_json:
        click.echo(to_json({"problems": [{"message": why, "next": hint} for why, hint in problems]}))
    elif problems:
        for why, hint in problems:
            click.echo(printable(f"bad: the shared database {why} ({hint})"))
    else:
        click.echo(f"ok: the account {printable(place.account)}; this daemon is {printable(place.instance)}")
    sys.exit(EXIT_CONFIG if problems else 0)


def _place(path: str | None) -> Place:
    config = load_config(path)
    if not config.shared.database:
        hint = 'name the database there, for example database = "service=imagewatch"'
        raise ConfigError([Problem("shared.database", "is not set", hint)], source=config.source)
    return place_of(config, os.environ)
