"""The command ``submit``: for people at a terminal, and for programs and agents that speak files."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import click

from imagewatch.commands.common import Seconds, config_option, load_config
from imagewatch.commands.drop import Delivery, Wish, folder_of, require_stem, stem_for
from imagewatch.commands.exits import EXIT_FAILED, EXIT_HELD, EXIT_SIGNAL, EXIT_USAGE
from imagewatch.commands.interrupts import Interrupted, Interrupts
from imagewatch.commands.results import name_dropped, print_results, report
from imagewatch.commands.terminal import say, silence
from imagewatch.commands.wait import Waiting
from imagewatch.config.load import load
from imagewatch.protocol.prompt import MAX_BYTES
from imagewatch.system.errors import BadRequest, Problem, SpoolError
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file, own_way

if TYPE_CHECKING:
    from collections.abc import Sequence

    from imagewatch.commands.wait import Made
    from imagewatch.config.load import Config

_LOOK_SECONDS = 0.2
_UNTOUCHED_SECONDS = 20.0
_OPTIONS = ("provider", "model", "n", "size", "quality", "output_format", "seed", "preset")


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]…")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Input image; repeat for more, in this order.",
)
@click.option(
    "--from",
    "files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="A file with a prompt; - is standard input.",
)
@click.option("--provider", type=click.Choice(["auto", "flux", "gemini", "openai"]), help="Provider.")
@click.option("--model", metavar="NAME", help="The model; passed on as it is.")
@click.option("-n", "n", type=click.IntRange(1, 4), metavar="NUMBER", help="Pictures, 1 to 4.")
@click.option("--size", metavar="SIZE", help="Width and height, such as 1024x1536.")
@click.option("--quality", type=click.Choice(["low", "medium", "high", "auto"]), help="For openai.")
@click.option("--output-format", type=click.Choice(["png", "jpeg", "webp"]), help="Kind of the pictures.")
@click.option("--seed", type=int, metavar="NUMBER", help="The same number may give the same picture again.")
@click.option("--preset", metavar="NAME", help="A preset of the configuration.")
@click.option("--folder", default="", metavar="NAME", help="A folder below the inbox.")
@click.option("--name", metavar="NAME", help="Name of the results. Without it: the first words and some digits.")
@click.option(
    "--root",
    type=click.Path(readable=False),
    metavar="FOLDER",
    help="The watched folder, where there is no configuration: a share.",
)
@click.option("--wait", is_flag=True, help="Wait for the result and print it.")
@click.option("--timeout", type=Seconds(0), metavar="SECONDS", help="Stop waiting after this long; the prompts stay.")
@click.option(
    "--format", "form", type=click.Choice(["paths", "markdown", "json"]), default="paths", help="What is printed."
)
@click.option("--json", "as_json", is_flag=True, help="The same as --format json.")
@config_option
def submit(prompts: Sequence[str], path: str | None, **options: Any) -> None:  # noqa: ANN401  click's own
    """Drop prompts into the inbox, the right way.

    PROMPT is the text. Images and prompt are checked, copied and put into the inbox in the right order; the key is not
    needed. With --wait the pictures are printed (as paths, Markdown image lines or JSON), and the credits.
    """
    if options["as_json"]:
        if options["form"] == "markdown":
            raise click.UsageError("--json and --format markdown exclude each other")
        options["form"] = "json"
    if not options["wait"] and (options["timeout"] is not None or options["form"] == "markdown"):
        raise click.UsageError("--timeout and --format markdown need --wait")
    call = _Call(_config(path, options["root"]), options)
    with Interrupts() as interrupts:
        try:
            _run(prompts, call, interrupts)
        except Interrupted as error:
            _end_early(error, call)


def _run(prompts: Sequence[str], call: _Call, interrupts: Interrupts) -> None:
    try:
        waiting = _dropped(prompts, call, interrupts)
        if waiting:
            _wait_and_report(call, waiting)
        call.is_printed = True
        _print_dropped(call)
    except Exception as error:  # noqa: BLE001  whatever ends it, what was dropped is named
        interrupts.keep()
        _end_early(error, call)


@dataclass
class _Call:
    """One run of the command, and how far it came.

    Attributes:
        config: The configuration.
        options: The command line's options.
        wanted: How many prompts are to be dropped.
        jobs: Those that were dropped.
        is_printed: Whether printing the result has begun: JSON must not be printed twice.
        is_told: Whether every prompt that was dropped has been named.
    """

    config: Config
    options: dict[str, Any]
    wanted: int = 0
    jobs: list[Made] = field(default_factory=list)
    is_printed: bool = False
    is_told: bool = False

    @property
    def form(self) -> str:
        """What is printed: ``paths``, ``markdown`` or ``json``."""
        return str(self.options["form"])


def _config(path: str | None, root: str | None) -> Config:
    if root is None:
        return load_config(path)
    # Only the folders: what else there may be in this environment is for a daemon of one's own.
    return load(None, {"HOME": os.environ.get("HOME", ""), "IMAGEWATCH_FOLDERS__ROOT": os.path.abspath(root)})


# Dropping


def _dropped(prompts: Sequence[str], call: _Call, interrupts: Interrupts) -> Waiting | None:
    """Drop everything, or nothing if anything is wrong; return what waits for it."""
    config, options = call.config, call.options
    wishes = _wishes(prompts, options)
    folder = folder_of(options["folder"], recursive=config.inbox.recursive)
    stems = _stems([wish for _, wish in wishes], options["name"])
    waiting = Waiting(config.folders, folder, stems) if options["wait"] else None
    call.wanted = len(wishes)
    with Delivery(config, folder, blind=options["root"] is not None) as delivery:
        _stage(delivery, wishes, stems)
        # A prompt must not be cut off from its images, nor from the list of those that were dropped.
        interrupts.keep()
        with contextlib.closing(delivery.place()) as placed:
            for job in placed:
                call.jobs.append(job)
                if waiting:
                    waiting.expect(job)
                interrupts.check()
    interrupts.obey()
    if delivery.unsynced:
        told = f"{delivery.unsynced}; the prompts are dropped, but a power cut may take them away"
        click.echo(f"imagewatch: {printable(told)}", err=True)
    return waiting


def _stems(wishes: Sequence[Wish], name: str | None) -> list[str]:
    if name is None:
        return [stem_for(wish.text) for wish in wishes]
    stems = [f"{name}-{number}" for number in range(1, len(wishes) + 1)] if len(wishes) > 1 else [name]
    require_stem(max(stems, key=len))
    return stems


def _stage(delivery: Delivery, wishes: Sequence[tuple[str, Wish]], stems: Sequence[str]) -> None:
    """Check everything before anything is dropped, and name all that is wrong."""
    problems = []
    for (label, wish), stem in zip(wishes, stems, strict=True):
        try:
            delivery.stage(wish, stem)
        except BadRequest as error:
            problems += _labelled(error, label if len(wishes) > 1 else "")
    if problems:
        raise BadRequest(problems)


def _labelled(error: BadRequest, label: str) -> list[Problem]:
    where = f"{label}: " if label else ""
    return [Problem(where + one.field, one.reason, one.hint) for one in error.problems]


def _end_early(error: Interrupted | Exception, call: _Call) -> NoReturn:
    """End a command that something has ended before its time: a signal, the disk, its output, or a bug."""
    if not call.jobs:
        _end_without_prompts(error)
    _clear()
    for line in _reasons(error):
        say(f"imagewatch: {printable(line)}")
    if isinstance(error, BadRequest | SpoolError) and error.hint:
        say(f"  {printable(error.hint)}")
    if not call.is_told:
        _name_dropped(call)
    try:
        if call.is_printed:
            click.echo(nl=False)  # what could not be written would be tried once more at the very end
        elif call.form == "json" or not call.options["wait"]:  # else pictures are printed, and nothing but pictures
            _print_dropped(call)
    except OSError:
        silence(sys.stdout)
    if not _reasons(error):
        raise error
    sys.exit(EXIT_HELD)


def _end_without_prompts(error: Interrupted | Exception) -> NoReturn:
    if not isinstance(error, Interrupted | BadRequest):
        raise error
    for line in _reasons(error):
        say(f"imagewatch: {printable(line)}")
    say("  Nothing was dropped.")
    sys.exit(EXIT_SIGNAL + error.number if isinstance(error, Interrupted) else EXIT_USAGE)


def _reasons(error: Interrupted | Exception) -> list[str]:
    """Return what ended the command, in lines; nothing of a bug, which is reported as one."""
    if isinstance(error, Interrupted):
        return [f"interrupted by {error}"]
    if isinstance(error, BadRequest):
        return [str(problem) for problem in error.problems]
    if isinstance(error, OSError) and error.filename is None:
        return [f"the output cannot be written: {error.strerror}"]
    return [str(error)] if isinstance(error, SpoolError) else []


def _name_dropped(call: _Call) -> None:
    """Name the prompts that were dropped: they are paid for, and once more if they are dropped again."""
    count = len(call.jobs)
    it, verb = ("it", "was") if count == 1 else ("them", "were")
    rest = "" if count == call.wanted else " The others were not dropped."
    say(f"{count} of {call.wanted} prompts {verb} dropped, and the daemon processes {it}.{rest}")
    name_dropped(call.jobs, call.config)


def _wishes(prompts: Sequence[str], options: dict[str, Any]) -> list[tuple[str, Wish]]:
    """Return each prompt, and what to call it when something is wrong with it."""
    asked, images = {name: options[name] for name in _OPTIONS}, tuple(options["images"])
    wishes = [(f"prompt {number}", Wish(text.strip(), asked, images)) for number, text in enumerate(prompts, 1)]
    problems: list[Problem] = []
    for file in options["files"] or (() if prompts else ("-",)):
        if not options["files"] and (sys.stdin is None or sys.stdin.isatty()):
            raise click.UsageError("say what the picture should show")
        try:
            wishes.append((file, Wish.of_file(_content(file), file, asked, images)))
        except BadRequest as error:
            problems += _labelled(error, "" if file == "-" else file)
    if problems:
        raise BadRequest(problems)
    return wishes


def _content(file: str) -> bytes:
    try:
        # What the shell hands over is the caller's own; a file may be anybody's.
        is_own = file == "-" or file.startswith(("/dev/", "/proc/self/fd/"))
        with click.open_file(file, "rb") if is_own else open_file(own_way(file)) as stream:
            content: bytes = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise click.UsageError(f"{file}: {error.strerror}") from None
    return content


# Waiting


def _wait_and_report(call: _Call, waiting: Waiting) -> NoReturn:
    try:
        try:
            left = _waited(call, waiting)
        except Interrupted as error:
            _clear()
            say(f"imagewatch: {_reasons(error)[0]}")
            left = waiting.look()
    except SpoolError:
        _report_before_failing(call)
        raise
    _clear()
    call.is_printed = True
    print_results(call.jobs, call.form)
    report(call.jobs, left, call.config)
    if left:  # before any failure: a script reads that as the end, and drops again what may yet be paid for
        sys.exit(EXIT_HELD)
    sys.exit(EXIT_FAILED if any(job.door == "errors" for job in call.jobs) else 0)


def _report_before_failing(call: _Call) -> None:
    """Say what is known where a result cannot be read: everything is dropped, and the failure is only ours."""
    _clear()
    call.is_printed = True
    print_results(call.jobs, call.form)
    report(call.jobs, (), call.config)
    for job in call.jobs:
        if not job.door:
            told = "was dropped; what became of it is not known"
            click.echo(f"{printable(job.source)}: {told}", err=True)
    call.is_told = True


def _waited(call: _Call, waiting: Waiting) -> list[Made]:
    """Wait until all is over; return what is not."""
    jobs, timeout = call.jobs, call.options["timeout"]
    began, wait = time.monotonic(), threading.Event().wait
    warned = False
    while left := waiting.look():
        passed = time.monotonic() - began
        if timeout is not None and passed >= timeout:
            break
        _live(len(jobs) - len(left), len(jobs), passed)
        if not warned and passed >= _UNTOUCHED_SECONDS and waiting.untouched() == len(jobs):
            warned = True
            _clear()
            where = printable(call.config.folders.inbox)
            click.echo(f'Nobody has taken them from {where} yet. "imagewatch status" tells why.', err=True)
        wait(_LOOK_SECONDS)
    return left


def _live(done: int, count: int, passed: float) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done} of {count} done, {passed:.0f} s \033[K", nl=False, err=True, color=True)


def _clear() -> None:
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):
            click.echo("\r\033[K", nl=False, err=True, color=True)


# Telling


def _print_dropped(call: _Call) -> None:
    if call.form == "json":
        print_results(call.jobs, call.form)
        return
    for job in call.jobs:
        click.echo(printable(os.path.join(call.config.folders.inbox, job.source)))
