"""``imagewatch sandbox``: the local endpoint in the foreground."""

from __future__ import annotations

import contextlib
import shlex

import click

from imagewatch.commands.common import Seconds
from imagewatch.sandbox import PROPOSED_KEY, Sandbox, tags_help
from imagewatch.system.errors import ConfigError, UsageError


@click.command()
@click.option(
    "--port",
    default=8283,
    type=click.IntRange(0, 65_535),
    show_default=True,
    metavar="NUMBER",
    help="Port on 127.0.0.1; 0 takes a free one",
)
@click.option("--key", metavar="KEY", help="Accept only this key; without it: any key")
@click.option(
    "--latency",
    default=0.0,
    type=Seconds(0, 86_400),
    metavar="SECONDS",
    help="Delay each response by this time (default: none)",
)
@click.option("--tags", is_flag=True, help="List all tags and exit")
def sandbox(port: int, key: str | None, latency: float, *, tags: bool) -> None:
    """Run a local test endpoint that charges nothing.

    It checks requests as strictly as the API's contract, draws placeholder images, and counts what it would have
    charged (GET /sandbox/report). A prompt with a tag such as "[sandbox: 402]" gets that response.
    """
    if tags:
        click.echo(tags_help())
        return
    try:
        server = Sandbox(
            port=port, key=key, latency_seconds=latency, on_request=lambda line: click.echo(line, err=True)
        )
    except ConfigError as error:  # of a command that has no configuration
        raise UsageError(
            f"the sandbox {error.problems[0].reason}", hint="choose another port with --port; 0 takes a free one"
        ) from None
    proposed = shlex.quote(key or PROPOSED_KEY)
    click.echo(
        f"The sandbox is listening. To use it, run:\n\n  LETTA_BASE_URL={server.base_url} LETTA_API_KEY={proposed} "
        "imagewatch run\n"
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()
