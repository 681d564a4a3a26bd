"""What ``run`` and ``once`` share: the log, and the name of the file that a section's error is about."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from imagewatch.system import log
from imagewatch.system.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from imagewatch.config.load import Config


def configure_log(config: Config, level: str | None = None) -> None:
    """Write the log as the configuration says, or from another level on."""
    log.configure(level or config.log.level, config.log.format)  # type: ignore[arg-type]


@contextlib.contextmanager
def naming_source(config: Config) -> Iterator[None]:
    """Name the file where a part of the daemon refuses its section: it was given no more than that."""
    try:
        yield
    except ConfigError as error:
        error.source = error.source or config.source
        raise
