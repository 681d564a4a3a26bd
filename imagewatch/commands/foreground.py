"""What ``run`` and ``once`` share: the log, and the name of the configuration file in errors."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from imagewatch.system import log
from imagewatch.system.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.schema import Config


def configure_log(config: Config, level: str | None = None) -> None:
    """Configure the log as in the configuration, optionally with another level."""
    log.configure(level or config.log.level, config.log.format)  # type: ignore[arg-type]


@contextlib.contextmanager
def naming_source(config: Config) -> Iterator[None]:
    """Add the configuration file to the error of a part of the daemon, which knows only its section."""
    try:
        yield
    except ConfigError as error:
        error.source = error.source or config.source
        raise
