"""``imagewatch once``: the daemon on the prompts that are in the inbox now."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from imagewatch.commands.common import config_option, json_option, load_config
from imagewatch.commands.foreground import configure_log, naming_source
from imagewatch.commands.progress import progress
from imagewatch.commands.state import local_time
from imagewatch.commands.terminal import say
from imagewatch.system.text import printable, to_json, whole

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.daemon.loop import Daemon
    from imagewatch.job.outcome import Outcome


@click.command()
@json_option
@config_option
def once(path: str | None, *, as_json: bool) -> None:
    """Process all prompts in the inbox, then exit.

    If the API is busy, or requests_per_minute is reached, the command waits and then continues. At any other hold (too
    few credits, key not accepted, …) it prints the reason and exits with code 69, or 74 if a local disk is the cause.
    If the API refuses the account or the URL, the first refused prompt goes to the errors folder. The other prompts
    stay in the inbox.
    """
    from imagewatch.daemon.loop import Daemon  # noqa: PLC0415  loads the HTTP library, which --help does not need

    config = load_config(path)
    terminal = sys.stderr.isatty()
    configure_log(config, level="error" if terminal else None)
    ended: list[Outcome] = []

    def finished(outcome: Outcome) -> None:
        bar.finished(outcome)
        if as_json:
            ended.append(outcome)

    with naming_source(config), progress(shown=terminal) as bar:
        daemon = Daemon(config, os.environ, once=True, on_outcome=finished, on_found=bar.found)
        code = daemon.run()
    if as_json:
        click.echo(to_json(_results(ended, daemon), indent=1))
    else:
        for line in bar.summary(held=daemon.hold is not None) if terminal else ():
            say(line)
        _say_hold(daemon)
    sys.exit(code)


def _say_hold(daemon: Daemon) -> None:
    if hold := daemon.hold:
        left = f"{daemon.left} {'prompt' if daemon.left == 1 else 'prompts'} left in the inbox"
        what = f"Prompts for {hold.provider} are on hold" if hold.provider else "The queue is on hold"
        what = f"Prompts in {printable(hold.folder)}/ are on hold" if hold.folder else what
        say(f"{what} ({hold.kind}: {printable(hold.reason.message)}): {left}.")
        end = f"; next try at {local_time(daemon.hold_ends)}" if daemon.hold_ends else ""
        say(f"  {printable(hold.reason.next)}{end}")


def _results(ended: Sequence[Outcome], daemon: Daemon) -> dict[str, object]:
    """Return the results for programs, with the names of ``submit`` and ``status``."""
    hold = daemon.hold
    held = None
    if hold:
        held = {"kind": hold.kind, "provider": hold.provider or None, "folder": hold.folder or None}
        held |= {"reason": hold.reason.message, "next_try_at": daemon.hold_ends, "next": hold.reason.next}
    jobs = [
        {
            "source": whole(one.source),
            "job": one.job,
            "destination": one.destination,
            "result_file": whole(one.result_file),
            "charged": one.charged,
            "credits_charged": one.credits,
            "message": one.message or None,
            "problems": list(one.problems) or None,
        }
        for one in ended
    ]
    return {"jobs": jobs, "left": daemon.left, "hold": held}
