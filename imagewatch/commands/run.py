"""``imagewatch run``: the daemon."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click
import structlog

from imagewatch.commands.common import config_option, load_config
from imagewatch.commands.foreground import configure_log, naming_source
from imagewatch.config.key import key_problem
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from imagewatch.config.schema import Config


@click.command()
@config_option
def run(path: str | None) -> None:
    """Run the daemon: watch the inbox until stopped.

    On SIGTERM or Ctrl-C the daemon claims nothing more, waits for the requests in flight, and exits. On a second signal
    it exits immediately; the next start continues its jobs. SIGHUP reloads the configuration.
    """

    def configured(config: Config) -> None:
        configure_log(config)
        _warn_without_key(config)

    from imagewatch.daemon.loop import Daemon  # noqa: PLC0415  loads the HTTP library, which --help does not need

    config = load_config(path)
    configured(config)
    with naming_source(config):
        code = Daemon(config, os.environ, reload=lambda: load_config(path), on_reloaded=configured).run()
    sys.exit(code)


def _warn_without_key(config: Config) -> None:
    """Log a missing key at the start, and not only at the first prompt."""
    if problem := key_problem(config.endpoint, os.environ):
        reason = printable(f"{problem.field}: {problem.reason}")
        structlog.get_logger().warning("key_missing", reason=reason, next=problem.hint)
