"""The commands. The only place where errors become exit codes.

Heavy modules are imported by the commands that use them, so that ``--help`` and ``--version`` stay quick.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import sys
import threading
import traceback
from typing import TYPE_CHECKING, Any, NoReturn

import click

from imagewatch import __version__
from imagewatch.commands import admin, table
from imagewatch.commands.submit import submit
from imagewatch.system.errors import AlreadyRunning, ConfigError, ImagewatchError, SpoolError, UsageError
from imagewatch.system.text import amount, complaint, printable, to_json, whole

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from imagewatch.commands.check import Line
    from imagewatch.config.load import Config
    from imagewatch.daemon.loop import Daemon
    from imagewatch.job.outcome import Outcome

EXIT_FAILED = 1
EXIT_USAGE = 64
EXIT_INTERNAL = 70
EXIT_SPOOL = 74
EXIT_RUNNING = 75
EXIT_CONFIG = 78
_CODES = (
    (UsageError, EXIT_USAGE),
    (ConfigError, EXIT_CONFIG),
    (AlreadyRunning, EXIT_RUNNING),
    (SpoolError, EXIT_SPOOL),
)
_say = admin.say
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
    """Commands whose reader may be gone.

    Click ends them with 1 then, which says that a job failed. What was paid for is not said by it.
    """

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401  click's own
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            admin.silence(sys.stdout)
            sys.exit(EXIT_SPOOL)


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


@cli.command()
@admin.config_option
def run(path: str | None) -> None:
    """Watch the inbox until stopped (the daemon).

    SIGTERM or Ctrl-C finishes what has been sent and ends; a second one kills, and the next start recovers. SIGHUP
    reads the configuration again.
    """
    from imagewatch.daemon.loop import Daemon  # noqa: PLC0415

    def configured(config: Config) -> None:
        _configure_log(config)
        _warn_without_key(config)

    config = admin.load(path)
    configured(config)
    with _named(config):
        code = Daemon(config, os.environ, reload=lambda: admin.load(path), on_reloaded=configured).run()
    sys.exit(code)


def _warn_without_key(config: Config) -> None:
    """Say at the start what else would be said at the first prompt."""
    import structlog  # noqa: PLC0415

    from imagewatch.config.key import key_problem  # noqa: PLC0415

    if problem := key_problem(config.endpoint, os.environ):
        reason = printable(f"{problem.field}: {problem.reason}")
        structlog.get_logger().warning("no key; every prompt will wait", reason=reason, next=problem.hint)


@cli.command()
@admin.json_option
@admin.config_option
def once(path: str | None, *, as_json: bool) -> None:
    """Make everything that is in the inbox, then end.

    Does not wait out a hold (no credits, a rejected key, …): it says why and ends with 69; the prompts stay.
    """
    from imagewatch.daemon.loop import Daemon  # noqa: PLC0415

    config = admin.load(path)
    terminal = sys.stderr.isatty()
    _configure_log(config, level="error" if terminal else None)
    over: list[Outcome] = []

    def finished(outcome: Outcome) -> None:
        bar.finished(outcome)
        if as_json:
            over.append(outcome)

    with _named(config), _progress(shown=terminal) as bar:
        daemon = Daemon(config, os.environ, once=True, on_outcome=finished, on_seen=bar.found)
        code = daemon.run()
    if as_json:
        click.echo(to_json(_once_told(over, daemon), indent=1))
    else:
        for line in bar.story(held=daemon.hold is not None) if terminal else ():
            _say(line)
        _tell_hold(daemon)
    sys.exit(code)


def _tell_hold(daemon: Daemon) -> None:
    if hold := daemon.hold:
        left = f"{daemon.left} {'prompt' if daemon.left == 1 else 'prompts'} left in the inbox"
        what = f"Prompts for {hold.provider} wait" if hold.provider else "The queue is held"
        _say(f"{what} ({hold.kind}: {printable(hold.reason.message)}): {left}.")
        end = f"; next attempt at {admin.local_time(daemon.hold_ends)}" if daemon.hold_ends else ""
        _say(f"  {printable(hold.reason.next)}{end}")


def _once_told(over: Sequence[Outcome], daemon: Daemon) -> dict[str, object]:
    """Return what became of an inbox, for programs; names are those of ``submit`` and ``status``."""
    hold = daemon.hold
    held = None
    if hold:
        held = {"kind": hold.kind, "provider": hold.provider or None, "reason": hold.reason.message}
        held |= {"until": daemon.hold_ends, "next": hold.reason.next}
    jobs = [
        {
            "source": whole(one.source),
            "job": one.job,
            "door": one.door,
            "document": whole(one.document),
            "charged": one.charged,
            "credits_charged": one.credits,
            "message": one.message or None,
            "problems": list(one.problems) or None,
        }
        for one in over
    ]
    return {"jobs": jobs, "left": daemon.left, "hold": held}


@cli.command()
@click.option("--balance", is_flag=True, help="Ask the endpoint what the account holds, too (free of charge).")
@admin.json_option
@admin.config_option
def check(path: str | None, *, balance: bool, as_json: bool) -> None:
    """Say what the daemon would do, and why; send nothing.

    Looks at the configuration, the folders, the key (never shown), whether the queue is held, and every file in the
    inbox.
    """
    from dataclasses import asdict  # noqa: PLC0415

    found: dict[str, list[Line]] = {"settings": [], "files": []}
    for part, line in _checked(admin.load(path), balance=balance):
        found[part].append(line)
        if not as_json:
            _row(line)
    if as_json:
        click.echo(to_json({part: [asdict(line) for line in lines] for part, lines in found.items()}, indent=1))
    elif not found["files"]:
        click.echo("There is no prompt in the inbox.")
    sys.exit(EXIT_CONFIG if any(line.verdict == "bad" for line in found["settings"]) else 0)


def _checked(config: Config, *, balance: bool) -> Iterator[tuple[str, Line]]:
    """Yield what was found, line by line: the endpoint may take its time."""
    from imagewatch.commands import check as explain  # noqa: PLC0415
    from imagewatch.daemon.status import kind  # noqa: PLC0415

    for line in explain.settings(config, os.environ):
        yield "settings", line
    for line in explain.balance(config, os.environ) if balance else ():
        yield "settings", line
    for hold in admin.holds(config):
        yield "settings", explain.Line("wait", "queue", f"held ({kind(hold)}): {hold['reason']}; {hold['next']}")
    for job, source in explain.stuck(config).items():
        why = f"{source} is stuck; the log says why, and what to do; no other prompt of its name is sent until then"
        yield "settings", explain.Line("wait", f"job {job}", why)
    for line in explain.files(config):
        yield "files", line


@cli.command()
@click.argument("folder", default="imagewatch-demo", type=click.Path(file_okay=False))
def demo(folder: str) -> None:
    """Show everything at once on a local endpoint: no key, no cost.

    Makes FOLDER (default: imagewatch-demo; a number is added if it is there), drops six prompts into its inbox and
    runs the real daemon on them. Nothing leaves this machine.
    """
    from imagewatch.commands import demo as show  # noqa: PLC0415

    with _progress(shown=sys.stderr.isatty()) as bar:
        story = show.play(folder, on_outcome=bar.finished, on_seen=bar.found)
    for line in story.lines:
        click.echo(line)


@cli.command()
@click.option(
    "--port",
    default=8283,
    type=click.IntRange(0, 65_535),
    show_default=True,
    metavar="NUMBER",
    help="Where to listen, on 127.0.0.1; 0 takes a free one.",
)
@click.option("--key", metavar="KEY", help="Accept this key only; without it any key will do.")
@click.option(
    "--latency",
    default=0.0,
    type=admin.Seconds(0, 86_400),
    metavar="SECONDS",
    help="Delay each answer by this long (default: none).",
)
@click.option("--tags", is_flag=True, help="List all such tags and exit.")
def sandbox(port: int, key: str | None, latency: float, *, tags: bool) -> None:
    """Run a local endpoint like the real one that charges nothing.

    It checks requests as strictly as the contract says, draws placeholders, and counts what it would have charged
    (GET /sandbox/report). A prompt with a tag like "[sandbox: 402]" gets that answer.
    """
    from imagewatch.sandbox import PROPOSED_KEY, Sandbox, tags_help  # noqa: PLC0415

    if tags:
        click.echo(tags_help())
        return
    try:
        server = Sandbox(
            port=port, key=key, latency_seconds=latency, on_request=lambda line: click.echo(line, err=True)
        )
    except ConfigError as error:  # of a command that has no configuration
        raise UsageError(
            f"the sandbox {error.problems[0].reason}", hint="name another port by --port; 0 takes a free one"
        ) from None
    proposed = shlex.quote(key or PROPOSED_KEY)
    click.echo(
        f"The sandbox is listening. To use it, run:\n\n  LETTA_BASE_URL={server.base_url} LETTA_API_KEY={proposed} "
        "imagewatch run\n"
    )
    with contextlib.suppress(KeyboardInterrupt):
        server.serve_forever()


@cli.command()
@click.argument("file", default="imagewatch.toml", type=click.Path(dir_okay=False))
@click.option("--root", type=click.Path(), metavar="FOLDER", help="The folder to watch; asked for on a terminal.")
def init(file: str, root: str | None) -> None:
    """Write a configuration file with comments.

    FILE (default: imagewatch.toml) gets every key, its default and a line about it. A file that is there already
    stays as it is. Nothing starts before a folder to watch is named.
    """
    from imagewatch.config.load import initial  # noqa: PLC0415

    if root is None and sys.stdin is not None and sys.stdin.isatty() and not os.path.lexists(file):
        root = click.prompt("Folder to watch (it gets inbox, outbox, errors and archive)", err=True)
    text = initial(_root(root))
    try:
        with open(file, "x", encoding="utf-8") as out:
            out.write(text)
    except FileExistsError:
        raise UsageError(f"{printable(file)}: is there already", hint="name another file, or remove it first") from None
    except OSError as error:
        hint = "make its folder first" if isinstance(error, FileNotFoundError) else "name another file"
        raise SpoolError(f"{printable(file)}: cannot be written: {error.strerror}", hint=hint) from None
    shown = printable(file)
    first = "Export" if root else "Set root in it, the folder to be watched, and export"
    click.echo(
        f"Wrote {shown}. {first} LETTA_API_KEY=… (or set api_key_file or api_key_command in it). "
        f"Then: imagewatch check --config {shown}"
    )


def _root(root: str | None) -> str | None:
    """Return the folder to watch as it is written into a file; relative to the current folder, ~ stays."""
    if root is None:
        return None
    if not root.strip() or printable(root) != root:
        raise UsageError(f'"{printable(root, 100)}" is not a folder to watch', hint="name it by --root FOLDER")
    return root if root.startswith("~") else os.path.abspath(root)


@cli.command()
@admin.config_option
@click.option(
    "--output", type=click.Path(), metavar="FILE", help="The page; without it gallery.html beside the outbox."
)
@click.option("--watch", is_flag=True, help="Write it again when something came or went, until stopped.")
def gallery(path: str | None, output: str | None, *, watch: bool) -> None:
    """Write a page of all pictures, costs and failures.

    One HTML file for any browser, without a network. It lies beside the outbox, its thumbnails in gallery_files. Run
    by root, it works with the rights of the owner of the page's folder.
    """
    from imagewatch.gallery import Gallery, Written, keep_fresh  # noqa: PLC0415

    def tell(written: Written) -> None:
        click.echo(f"Wrote {printable(written.path)}: {written.made} made, {written.failed} failed.")
        for note in written.notes:
            click.echo(f"  {printable(note)}", err=True)

    def count(done: int, total: int) -> None:
        if sys.stderr.isatty():
            click.echo(f"\r  {done} of {total} thumbnails", nl=done == total, err=True)

    page = Gallery(admin.load(path), output)
    page.step_down()
    tell(page.write(count))
    if watch:
        with contextlib.suppress(KeyboardInterrupt):
            keep_fresh(page, threading.Event().wait, tell)


for command in (submit, admin.status, admin.history, admin.estimate, admin.retry, admin.hold, admin.release):
    cli.add_command(command)


def main() -> NoReturn:
    """Run a command; translate every error into one line, a next action and an exit code."""
    try:
        _in_utf_8()
        _main()
    except OSError as error:
        if error.filename is not None or (error.errno not in _UNWRITABLE and admin.here()):
            _internal(error)
        if error.errno not in _UNWRITABLE:
            _fail(UsageError("the current folder is gone", hint="go to another one"), EXIT_USAGE)
        admin.silence(sys.stdout)
        hint = "its work may be done, in part or in whole: look into the folders before you repeat it"
        _fail(SpoolError(f"the output cannot be written: {error.strerror}", hint=hint), EXIT_SPOOL)
    except Exception as error:  # noqa: BLE001  Python would end with 1, which says that a job failed
        _internal(error)


def _internal(error: Exception) -> NoReturn:
    """Report a bug, or a dependency that is not as expected. The exit code promises nothing about the work."""
    for line in "".join(traceback.format_exception(error)).splitlines():
        _say(printable(line))
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
        _say(f"imagewatch: {printable(error.format_message())}")
        _say(f"  see {command} --help")
        sys.exit(EXIT_USAGE)
    except click.Abort:
        sys.exit(130)
    except ImagewatchError as error:
        _fail(error, next((code for kind, code in _CODES if isinstance(error, kind)), EXIT_FAILED))
    sys.exit(code if isinstance(code, int) else 0)


def _fail(error: ImagewatchError, code: int) -> NoReturn:
    if isinstance(error, ConfigError):
        where = f"{printable(error.source)}: " if error.source else ""
        _say(f"imagewatch: {where}the configuration cannot be used:")
        for problem in error.problems:
            _say(f"  {printable(str(problem))}")
    else:
        _say(f"imagewatch: {printable(str(error))}")
    if error.hint:
        _say(f"  {printable(error.hint)}")
    sys.exit(code)


@contextlib.contextmanager
def _named(config: Config) -> Iterator[None]:
    """Name the file where a part of the daemon refuses its section: it was given no more than that."""
    try:
        yield
    except ConfigError as error:
        error.source = error.source or config.source
        raise


def _configure_log(config: Config, level: str | None = None) -> None:
    from imagewatch.system import log  # noqa: PLC0415

    log.configure(level or config.log.level, config.log.format)  # type: ignore[arg-type]


_COLOURS = {"ok": "green", "take": "green", "bad": "red", "refuse": "red", "wait": "yellow", "ignore": "yellow"}


def _row(line: Line) -> None:
    verdict = click.style(f"{line.verdict:<7}", fg=_COLOURS[line.verdict])
    click.echo(f"{verdict} {table.padded(printable(line.what), 32)} {printable(line.why)}")


class _Bar:
    """A progress bar whose end moves when more prompts are found."""

    def __init__(self, bar: click._termui_impl.ProgressBar[int] | None) -> None:
        self._bar = bar
        self._done = 0
        self._credits = 0.0
        self._failed: list[Outcome] = []

    def found(self, waiting: int) -> None:
        if self._bar is not None:
            self._bar.length = max(self._done + waiting, 1)
            self._bar.update(0)

    def finished(self, outcome: Outcome) -> None:
        self._done += 1
        self._credits += outcome.credits or 0.0
        if outcome.door == "errors":
            self._failed.append(outcome)
        if self._bar is not None:
            self._bar.length = max(self._bar.length or 1, self._done)
            self._bar.label = printable(outcome.source, 40)
            self._bar.update(1)

    def story(self, *, held: bool) -> Iterator[str]:
        """Yield what became of everything, for people."""
        made = self._done - len(self._failed)
        if self._done:
            yield f"{made} made for {amount(self._credits)} credits, {len(self._failed)} not made."
        elif not held:
            yield 'No prompt in the inbox was ready; "imagewatch check" says more.'
        for outcome in self._failed:
            first, *others = complaint(outcome.message, outcome.problems)
            yield f"  {printable(outcome.source, 100)}: {first}"
            yield from (f"  {line}" for line in others)
            yield f"    {printable(outcome.document)}"


@contextlib.contextmanager
def _progress(*, shown: bool) -> Iterator[_Bar]:
    if not shown:
        yield _Bar(None)
        return
    with click.progressbar(length=1, label="looking", file=sys.stderr, show_pos=True) as bar:
        yield _Bar(bar)
