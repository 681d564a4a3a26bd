"""The options that several commands take, and the configuration they name."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import click

from imagewatch.commands.terminal import current_folder
from imagewatch.config import load, locate

if TYPE_CHECKING:
    from imagewatch.config.schema import Config


class Seconds(click.FloatRange):
    """A time on the command line: a finite number. ``nan`` would be within all bounds."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:  # noqa: ANN401
        """Return the number."""
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value!r} is not a number of seconds.", param, ctx)
        return number


config_option = click.option(
    "--config",
    "path",
    type=click.Path(readable=False),
    metavar="FILE",
    help="Configuration file; without it: $IMAGEWATCH_CONFIG, else ./imagewatch.toml, else "
    "~/.config/imagewatch/config.toml, else /etc/imagewatch/config.toml",
)
root_option = click.option(
    "--root",
    type=click.Path(readable=False),
    metavar="FOLDER",
    help="Watched folder, if this machine has no configuration (a share)",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON")


def load_config(path: str | None) -> Config:
    """Return the configuration that a command is to use.

    Args:
        path: The file named by ``--config``, or None for the first one that is found.
    """
    return load.load(locate.find(path, os.environ, current_folder()), os.environ)


def load_folders(path: str | None, root: str | None) -> Config:
    """Return the configuration for a command that needs only the folders.

    Args:
        path: The file named by ``--config``, or None.
        root: The watched folder if this machine has no configuration for it, or None.
    """
    if root is None:
        return load_config(path)
    # Only the folders: other variables of this environment are for a daemon of this user.
    return load.load(None, {"HOME": os.environ.get("HOME", ""), "IMAGEWATCH_FOLDERS__ROOT": os.path.abspath(root)})
