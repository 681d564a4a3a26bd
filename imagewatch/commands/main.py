"""The group of all commands: it imports a command when it is called, and turns every error into an exit code.

``--help`` and ``--version`` import no command, so that they stay quick.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import signal
import sys
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import click
from click.shell_completion import CompletionItem

from imagewatch import __version__
from imagewatch.commands.exits import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_INTERNAL,
    EXIT_RUNNING,
    EXIT_SIGNAL,
    EXIT_SPOOL,
    EXIT_USAGE,
)
from imagewatch.commands.terminal import current_folder, say, silence
from imagewatch.system.errors import AlreadyRunning, ConfigError, ImagewatchError, SpoolError, UsageError
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMANDS: Mapping[str, tuple[str, str]] = {
    "check": ("check", "Say what the daemon would do, and why; send nothing."),
    "demo": ("demo", "Show everything at once on a local endpoint: no key, no cost."),
    "estimate": ("estimate", "Say what the prompts in the inbox may cost; no network."),
    "gallery": ("gallery", "Write a page of all pictures, costs and failures."),
    "history": ("history", "Show what was made, refused and spent."),
    "hold": ("hold", 'Send nothing more until "imagewatch release".'),
    "init": ("init", "Write a configuration file with comments."),
    "once": ("once", "Make everything that is in the inbox, then end."),
    "release": ("hold", "End every hold, also one by hand and the burst guard's."),
    "retry": ("retry", "Put failed prompts back into the inbox."),
    "run": ("run", "Watch the inbox until stopped (the daemon)."),
    "sandbox": ("sandbox", "Run a local endpoint like the real one that charges nothing."),
    "status": ("status", "Say what the daemon is doing: waiting, in flight, held, spent."),
    "submit": ("submit", "Drop prompts into the inbox, the right way."),
}
"""For each command the module in this package that has it, and its help in a line."""
_CODES = (
    (UsageError, EXIT_USAGE),
    (ConfigError, EXIT_CONFIG),
    (AlreadyRunning, EXIT_RUNNING),
    (SpoolError, EXIT_SPOOL),
)
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

_EXIT_CODES = """\b
Exit codes:
  0   done
  1   some job failed (once, submit --wait), or was not put back (retry)
  64  the command line is wrong
  69  the queue is held (status), with prompts left (once); something was
      dropped and is not known to be finished (submit): do not repeat it
  70  internal error, or a job is stuck (once): look into the folders first
  74  our own disk: full, read-only or gone
  75  another imagewatch has this inbox
  78  the configuration is wrong"""


class _Commands(click.Group):
    """Commands that are imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's own
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's own
        """Import a command."""
        return load_command(cmd_name) if cmd_name in COMMANDS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in self.list_commands(ctx)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Offer the names of commands from the table, and the options of the group."""
        names = (name for name in self.list_commands(ctx) if name.startswith(incomplete))
        offered = [CompletionItem(name, help=COMMANDS[name][1]) for name in names]
        return [*offered, *click.Command.shell_complete(self, ctx, incomplete)]

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  click's own
        """Run a command whose reader may be gone.

        Click ends it with 1 then, which says that a job failed. What was paid for is not said by it.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            silence(sys.stdout)
            sys.exit(EXIT_SPOOL)


def load_command(name: str) -> click.Command:
    """Return a command, which is imported for that."""
    found = getattr(importlib.import_module(f"{__package__}.{COMMANDS[name][0]}"), name)
    assert isinstance(found, click.Command)
    return found


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, "--version", message="imagewatch %(version)s")
def cli() -> None:
    """A watched folder for paid image generation.

    Drop NAME.prompt.txt into the inbox; get the pictures and a receipt in the outbox, or the API's own words in
    the errors folder. Nothing is paid for twice, and nothing that was paid for is lost.

    New here? "imagewatch demo" shows everything in ten seconds, without a key.
    """


def main() -> NoReturn:
    """Run a command; translate every error into one line, a next action and an exit code."""
    try:
        _in_utf_8()
        _main()
    except OSError as error:
        if error.filename is not None or (error.errno not in _UNWRITABLE and current_folder()):
            _internal(error)
        if error.errno not in _UNWRITABLE:
            _fail(UsageError("the current folder is gone", hint="go to another one"), EXIT_USAGE)
        silence(sys.stdout)
        hint = "its work may be done, in part or in whole: look into the folders before you repeat it"
        _fail(SpoolError(f"the output cannot be written: {error.strerror}", hint=hint), EXIT_SPOOL)
    except Exception as error:  # noqa: BLE001  Python would end with 1, which says that a job failed
        _internal(error)


def _internal(error: Exception) -> NoReturn:
    """Report a bug, or a dependency that is not as expected. The exit code promises nothing about the work."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        say(printable(line))
    what = "install imagewatch again, with its dependencies" if isinstance(error, ImportError) else "please report this"
    hint = f"requests may have been sent: look into the folders before you run the command again; {what}"
    _fail(ImagewatchError(f"internal error: {type(error).__name__}: {error}", hint=hint), EXIT_INTERNAL)


def _in_utf_8() -> None:
    """Start once more in Python's UTF-8 mode where the locale has names of files in another encoding.

    Prompts are UTF-8 and name files, receipts do, too: in Latin-1 or ASCII such a name cannot even be looked for.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1" or not sys.executable:
        return
    # What is printed stays in the encoding of the terminal.
    shown = {"PYTHONIOENCODING": sys.stdout.encoding} if sys.stdout else {}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], shown | dict(os.environ) | {"PYTHONUTF8": "1"})  # noqa: S606


def _main() -> NoReturn:
    if sys.stderr is None:  # it was closed; some other file would have its number soon
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 is no reason to stop
    colours = False if os.environ.get("NO_COLOR") else None  # None: where there is a terminal
    try:
        code = cli.main(standalone_mode=False, color=colours)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        # Not its own show(): an argument may be the name of a file, and a stranger may have chosen it.
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "imagewatch"
        say(f"imagewatch: {printable(error.format_message())}")
        say(f"  see {command} --help")
        sys.exit(EXIT_USAGE)
    except click.Abort:
        sys.exit(EXIT_SIGNAL + signal.SIGINT)
    except ImagewatchError as error:
        _fail(error, next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_FAILED))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: ImagewatchError, code: int) -> NoReturn:
    if isinstance(error, ConfigError):
        where = f"{printable(error.source)}: " if error.source else ""
        say(f"imagewatch: {where}the configuration cannot be used:")
        for problem in error.problems:
            say(f"  {printable(str(problem))}")
    else:
        say(f"imagewatch: {printable(str(error))}")
    if error.hint:
        say(f"  {printable(error.hint)}")
    sys.exit(code)
