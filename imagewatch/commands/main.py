"""The group of all commands. It imports a command when it is called, and turns each error into an exit code.

``--help`` and ``--version`` import no command, so that they are quick.
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
from imagewatch.commands.terminal import current_folder, say, silence
from imagewatch.system.errors import AlreadyRunning, ConfigError, DatabaseError, ImagewatchError, SpoolError, UsageError
from imagewatch.system.exits import (
    EXIT_CONFIG,
    EXIT_FAILED,
    EXIT_HELD,
    EXIT_INTERNAL,
    EXIT_RUNNING,
    EXIT_SIGNAL,
    EXIT_SPOOL,
    EXIT_USAGE,
)
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

COMMANDS: Mapping[str, tuple[str, str]] = {
    "again": ("submit", "Drop a finished prompt once more; it is charged again."),
    "check": ("check", "List what the daemon would do with each file, and every problem."),
    "completion": ("completion", "Print the completion script of a shell."),
    "db": ("db", "Create, check and restore the tables of a shared database."),
    "demo": ("demo", "Show everything on a local endpoint: no key, no cost."),
    "estimate": ("estimate", "Estimate what the prompts in the inbox will cost."),
    "files": ("files", "List or print the files that come with imagewatch."),
    "gallery": ("gallery", "Write a web page of all images, costs and failures."),
    "history": ("history", "Show completed, refused and unknown jobs and their cost."),
    "hold": ("hold", "Put the queue on hold: this daemon sends nothing more."),
    "hosts": ("hosts", "List the daemons that share an account, or remove one."),
    "init": ("init", "Write a configuration file with comments."),
    "mcp": ("mcp", "Offer the folder to agents without a shell (MCP)."),
    "migrate": ("migrate", "Move the journal into a shared database, or out of it."),
    "once": ("once", "Process all prompts in the inbox, then exit."),
    "release": ("hold", "End all holds except those of caps."),
    "retry": ("retry", "Put failed prompts back into the inbox."),
    "run": ("run", "Run the daemon: watch the inbox until stopped."),
    "sandbox": ("sandbox", "Run a local test endpoint that charges nothing."),
    "schema": ("schema", "List or print the JSON schemas of the daemon's files."),
    "service": ("service", "Install or print the systemd units for this installation."),
    "skill": ("skill", "Print or install instructions for agents (an Agent Skill)."),
    "status": ("status", "Show what the daemon does: prompts, requests, holds, credits."),
    "submit": ("submit", "Drop prompts into the inbox; with --wait, print their results."),
}
"""For each command, the module of this package that has it, and its help in one line."""
_CODES = (
    (UsageError, EXIT_USAGE),
    (ConfigError, EXIT_CONFIG),
    (AlreadyRunning, EXIT_RUNNING),
    (DatabaseError, EXIT_HELD),
    (SpoolError, EXIT_SPOOL),
)
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}

_EXIT_CODES = """\b
Exit codes:
  0   success
  1   a job failed (once, submit --wait, again --wait); a prompt was not put
      back (retry); a claimed prompt cannot go back because a newer file has
      its name (once); nothing was changed without --yes, or something could
      not be restored (hosts forget, db recover); the file system of a common
      inbox is not good enough (check --shared)
  64  the command line is wrong
  69  on hold, a cap or budget that is reached included (once, status);
      the shared database cannot be used; submit, again: dropped, but not
      known to be finished; do not run it again (except submit --table)
  70  internal error, or a job is stuck and needs a person (once);
      check the folders first
  74  a local disk is full, read-only or missing, or a job is stuck and is
      retried automatically (once)
  75  another imagewatch uses this inbox or this state folder; the inbox is
      a common one with another name or account; another daemon has this
      instance name (run); a daemon of the inbox runs (db recover, migrate);
      another submit --table drops rows into this folder
  78  the configuration is wrong; check: a setting, the key, a folder, the
      disk or the ledger is bad; db check: the server or its tables are"""


class _Commands(click.Group):
    """Commands that are imported by name."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's own
        """Return the names of all commands in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's own
        """Import a command; return None if there is none with this name."""
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
        """Run a command, even if the reader of its output stops reading.

        Click would exit with 1 then, which means that a job failed.
        """
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            silence(sys.stdout)
            sys.exit(EXIT_SPOOL)


def load_command(name: str) -> click.Command:
    """Import the module of a command and return the command."""
    found = getattr(importlib.import_module(f"{__package__}.{COMMANDS[name][0]}"), name)
    assert isinstance(found, click.Command)
    return found


@click.group(
    cls=_Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=_EXIT_CODES,
)
@click.version_option(__version__, "--version", message="imagewatch %(version)s", help="Show the version and exit")
def cli() -> None:
    """A watched folder for paid image generation.

    Drop NAME.prompt.txt into the inbox. The images and a receipt appear in the outbox. A prompt that fails appears in
    the errors folder, with the reason and whether it was charged. imagewatch pays at most once per prompt and keeps
    every response it receives.

    New here? "imagewatch demo" shows everything in a few seconds, without a key.
    """


def main() -> NoReturn:
    """Run a command; turn each error into a message, a next step and an exit code."""
    try:
        _in_utf_8()
        _main()
    except OSError as error:
        if error.filename is not None or (error.errno not in _UNWRITABLE and current_folder()):
            _internal(error)
        if error.errno not in _UNWRITABLE:
            _fail(UsageError("the current folder was removed", hint="change to another folder"), EXIT_USAGE)
        silence(sys.stdout)
        hint = "the command may have done its work; check the folders before you run it again"
        _fail(SpoolError(f"cannot write the output: {error.strerror}", hint=hint), EXIT_SPOOL)
    except Exception as error:  # noqa: BLE001  Python would exit with 1, which means that a job failed
        _internal(error)


def _internal(error: Exception) -> NoReturn:
    """Report a bug or a broken dependency. The exit code does not say whether the command has done its work."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        say(printable(line))
    what = "install imagewatch again" if isinstance(error, ImportError) else "report this error"
    hint = f"requests may have been sent; check the folders before you run the command again, and {what}"
    _fail(ImagewatchError(f"internal error: {type(error).__name__}: {error}", hint=hint), EXIT_INTERNAL)


def _in_utf_8() -> None:
    """Start again in Python's UTF-8 mode if the locale has another encoding for file names.

    Prompts and receipts are UTF-8 and name files. In Latin-1 or ASCII Python cannot open a file of such a name.
    """
    if sys.getfilesystemencoding() == "utf-8" or os.environ.get("PYTHONUTF8") == "1" or not sys.executable:
        return
    # Output keeps the encoding of the terminal.
    shown = {"PYTHONIOENCODING": sys.stdout.encoding} if sys.stdout else {}
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], shown | dict(os.environ) | {"PYTHONUTF8": "1"})  # noqa: S606


def _main() -> NoReturn:
    if sys.stderr is None:  # it was closed; another file would soon get its number
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # the terminal may not be UTF-8
    colors = False if os.environ.get("NO_COLOR") else None  # None: if it is a terminal
    try:
        code = cli.main(standalone_mode=False, color=colors)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(EXIT_USAGE)
    except click.ClickException as error:
        # Not its own show(): an argument may be the name of a file that other people have chosen.
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
        where = f": {printable(error.source)}" if error.source else ""
        say(f"imagewatch: the configuration cannot be used{where}")
        for problem in error.problems:
            say(f"  {printable(str(problem))}")
    else:
        say(f"imagewatch: {printable(str(error))}")
    if error.hint:
        say(f"  {printable(error.hint)}")
    sys.exit(code)
