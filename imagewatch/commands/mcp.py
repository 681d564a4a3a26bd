"""``imagewatch mcp``: the watched folder for agents that have no shell, over the Model Context Protocol.

The server reads and writes the folders, and nothing else: it has no key and no network. The library for the protocol is
an extra, and only ``mcp_server`` imports it.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import TYPE_CHECKING

import click

from imagewatch.commands.allowed_images import AllowedImages
from imagewatch.commands.common import Seconds, config_option, load_folders, root_option
from imagewatch.commands.named_jobs import NamedJobs
from imagewatch.commands.terminal import say
from imagewatch.system.errors import BadRequest, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.config.schema import Config

_MOST_SECONDS = 30.0
"""With the time for previews a call is answered within 45 s (``mcp_server``), also if the folders do not respond."""
_EXTRA = "pipx install --force 'imagewatch[mcp]'"


@click.command()
@root_option
@click.option("--folder", default="", metavar="NAME", help="Sub-folder of the inbox for all prompts of this server")
@click.option(
    "--allow",
    "allowed",
    multiple=True,
    type=click.Path(readable=False),
    metavar="FOLDER",
    help="Folder from which images may be sent; repeat for more. Without it: only the watched folder",
)
@click.option(
    "--wait",
    "seconds",
    type=Seconds(1, _MOST_SECONDS),
    default=25.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait this long for the image; a call is answered within 45 seconds in any case",
)
@config_option
def mcp(path: str | None, root: str | None, folder: str, allowed: Sequence[str], seconds: float) -> None:
    """Offer the folder to agents without a shell (MCP).

    An agent's program starts this command and speaks the Model Context Protocol with it on standard input and output.
    It offers four tools: create an image, get a result, list what waits, cancel. The server only reads and writes the
    folders; it has no key. The same name is always the same job: a call that is repeated is not charged again. Needs
    the extra imagewatch[mcp].
    """
    if importlib.util.find_spec("mcp") is None:
        raise UsageError(
            "the library for the Model Context Protocol is not installed",
            hint=f"install it as you installed imagewatch, for example: {_EXTRA}",
        )
    from imagewatch.commands import mcp_server  # noqa: PLC0415  it imports the extra

    config = load_folders(path, root)
    images = AllowedImages(allowed or _own(config), config.limits.max_input_bytes)
    try:
        jobs = NamedJobs(config, folder, images, blind=root is not None)
    except BadRequest as error:
        raise UsageError(str(error)) from None
    if sys.stdin is not None and sys.stdin.isatty():
        say("imagewatch mcp: waiting for an agent's program on standard input; Ctrl-C ends it")
    mcp_server.serve(jobs, seconds)


def _own(config: Config) -> list[str]:
    folders = config.folders
    if folders.root:
        return [folders.root]
    return [folders.outbox, folders.inbox, folders.errors]
