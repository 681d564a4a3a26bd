"""``imagewatch submit`` and ``again``: drop prompts, for people at a terminal and for programs and agents.

A dropped prompt will be charged. So whatever ends the command early, a signal or an error, it names the prompts that it
has dropped.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import click

from imagewatch.commands.batch import Batch
from imagewatch.commands.common import Seconds, config_option, load_folders, root_option
from imagewatch.commands.drop import Delivery, SubmitRequest, folder_of, require_stem, stem_for
from imagewatch.commands.expected_cost import Costs
from imagewatch.commands.finished import FinishedPrompts, changed, describe
from imagewatch.commands.interrupts import Interrupted, Interrupts
from imagewatch.commands.queue_state import QueueReport
from imagewatch.commands.results import name_dropped, print_results, report
from imagewatch.commands.row_record import STAGED, RowRecord
from imagewatch.commands.terminal import say, silence
from imagewatch.commands.wait import Waiting
from imagewatch.protocol.prompt import MAX_BYTES
from imagewatch.system.errors import BadRequest, Problem, SpoolError
from imagewatch.system.exits import EXIT_FAILED, EXIT_HELD, EXIT_SIGNAL, EXIT_USAGE
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file, resolve_own_link

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from imagewatch.commands.wait import Result
    from imagewatch.config.schema import Config

_REFRESH_SECONDS = 0.2
_UNCLAIMED_SECONDS = 20.0
_QUEUE_SECONDS = 2.0
"""How often the status file is read while results are waited for."""
_OPTIONS = ("provider", "model", "n", "size", "quality", "output_format", "seed", "preset")

_wait_option = click.option("--wait", is_flag=True, help="Wait for the results and print them")
_timeout_option = click.option(
    "--timeout",
    type=Seconds(0),
    metavar="SECONDS",
    help="Stop waiting after this time; the daemon still processes the prompts",
)
_format_option = click.option(
    "--format", "form", type=click.Choice(["paths", "markdown", "json"]), default="paths", help="What to print"
)
_json_option = click.option("--json", "as_json", is_flag=True, help="The same as --format json")


@click.command()
@click.argument("prompts", nargs=-1, metavar="[PROMPT]…")
@click.option(
    "--image",
    "images",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="Input image; repeat for more, in this order",
)
@click.option(
    "--from",
    "files",
    multiple=True,
    type=click.Path(),
    metavar="FILE",
    help="File with a prompt; - is standard input",
)
@click.option("--table", type=click.Path(), metavar="FILE", help="CSV file: one prompt per row; - is standard input")
@click.option(
    "--template",
    type=click.Path(),
    metavar="FILE",
    help="Prompt file for --table, with columns in braces: A poster for {product}",
)
@click.option("--dry-run", is_flag=True, help="With --table: print what would be dropped and its expected cost")
@click.option("--yes", is_flag=True, help="With --table: drop more prompts than the burst limit")
@click.option("--provider", type=click.Choice(["auto", "flux", "gemini", "openai"]), help="Provider")
@click.option("--model", metavar="NAME", help="Model; passed on unchanged")
@click.option("-n", "n", type=click.IntRange(1, 4), metavar="NUMBER", help="Number of images, 1 to 4")
@click.option("--size", metavar="SIZE", help="Width and height, such as 1024x1536")
@click.option("--quality", type=click.Choice(["low", "medium", "high", "auto"]), help="Quality, for openai")
@click.option("--output-format", type=click.Choice(["png", "jpeg", "webp"]), help="Format of the images")
@click.option("--seed", type=int, metavar="NUMBER", help="Seed; the same number may give the same image again")
@click.option("--preset", metavar="NAME", help="Preset of the configuration")
@click.option("--folder", default="", metavar="NAME", help="Sub-folder of the inbox")
@click.option("--name", metavar="NAME", help="Base name of the results; without it: the first words and some digits")
@root_option
@_wait_option
@_timeout_option
@_format_option
@_json_option
@config_option
def submit(prompts: Sequence[str], path: str | None, **options: Any) -> None:  # noqa: ANN401  click's own
    """Drop prompts into the inbox; with --wait, print their results.

    PROMPT is the text; - reads it from standard input. The command checks prompts and images, and drops them in the
    right order. It does not need the key. With --wait it prints the images, as paths, Markdown image lines or JSON, and
    what they cost.

    With --table, each row of a CSV file is a prompt. Columns have the names of options or of fields of the template. A
    second run drops only the rows that were not dropped yet.
    """
    _require_fitting(prompts, options)
    call = _Call(load_folders(path, options["root"]), _checked_form(options))
    with Interrupts() as interrupts:
        try:
            _run(functools.partial(_dropped, prompts), call, interrupts)
        except Interrupted as error:
            _end_early(error, call)


@click.command()
@click.argument("name")
@click.option("-n", "n", type=click.IntRange(1, 4), metavar="NUMBER", help="Number of images, 1 to 4; else as before")
@click.option("--seed", type=int, metavar="NUMBER", help="Seed; else as before")
@root_option
@_wait_option
@_timeout_option
@_format_option
@_json_option
@config_option
def again(name: str, path: str | None, n: int | None, seed: int | None, **options: Any) -> None:  # noqa: ANN401
    """Drop a finished prompt once more; it is charged again.

    NAME is its base name, with its folder below the inbox, or the path of its receipt. The new prompt has a new name,
    and the same text, options and images, except for -n and --seed. The command prints what it may cost.
    """
    call = _Call(load_folders(path, options["root"]), {"folder": "", "provider": None, **_checked_form(options)})
    with Interrupts() as interrupts:
        try:
            _run(functools.partial(_dropped_again, name, n, seed), call, interrupts)
        except Interrupted as error:
            _end_early(error, call)


def _checked_form(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options with the form of the output that they ask for.

    Raises:
        click.UsageError: They do not go together.
    """
    form = options["form"]
    if options["as_json"] and form == "markdown":
        raise click.UsageError("--json and --format markdown cannot be used together")
    if not options["wait"] and (options["timeout"] is not None or form == "markdown"):
        raise click.UsageError("--timeout and --format markdown need --wait")
    return {**options, "form": "json" if options["as_json"] else form}


def _require_fitting(prompts: Sequence[str], options: dict[str, Any]) -> None:
    """Refuse options that do not go together.

    Raises:
        click.UsageError: There are some.
    """
    if options["table"] is None:
        for name in ("template", "dry_run", "yes"):
            if options[name]:
                raise click.UsageError(f"--{name.replace('_', '-')} needs --table")
        return
    if prompts or options["files"]:
        raise click.UsageError("--table cannot be used together with PROMPT or --from")
    if options["name"] is not None:
        raise click.UsageError("--table cannot be used together with --name; add a column name to the table")
    if options["dry_run"] and options["wait"]:
        raise click.UsageError("--dry-run and --wait cannot be used together")


def _run(drop: Callable[[_Call, Interrupts], Waiting | None], call: _Call, interrupts: Interrupts) -> None:
    try:
        waiting = drop(call, interrupts)
        if call.left:
            call.queue.report(call.left)
        if waiting and call.jobs:
            _wait_and_report(call, waiting)
        call.is_printed = True
        _print_dropped(call)
    except Exception as error:  # noqa: BLE001  whatever it is, dropped prompts are named
        interrupts.keep()
        _end_early(error, call)


@dataclass
class _Call:
    """One run of the command, and its progress.

    Attributes:
        config: The configuration.
        options: The command line's options.
        wanted: How many prompts are to be dropped.
        jobs: The prompts that were dropped.
        batch: The rows, if the prompts come from a table.
        is_printed: Whether it has begun to print results: JSON must not be printed twice.
        is_named: Whether every prompt that was dropped has been named.
        queue: What the status file in the folders has about the queue.
    """

    config: Config
    options: dict[str, Any]
    wanted: int = 0
    jobs: list[Result] = field(default_factory=list)
    batch: Batch | None = None
    is_printed: bool = False
    is_named: bool = False
    queue: QueueReport = field(init=False)

    def __post_init__(self) -> None:
        options = self.options
        self.queue = QueueReport(self.config, options["folder"], options["provider"], time.time, say)

    @property
    def left(self) -> int:
        """How many prompts wait for the daemon: those dropped now, and rows of the table that were dropped before."""
        return len(self.jobs) + (self.batch.waiting if self.batch else 0)

    @property
    def form(self) -> str:
        """What is printed: ``paths``, ``markdown`` or ``json``."""
        return str(self.options["form"])


# Dropping


def _dropped(prompts: Sequence[str], call: _Call, interrupts: Interrupts) -> Waiting | None:
    """Drop all prompts, or none if one has a problem; return what waits for their results."""
    config, options = call.config, call.options
    if options["table"] is not None:
        return _dropped_rows(call, interrupts)
    requests = _requests(prompts, options)
    folder = folder_of(options["folder"], recursive=config.inbox.recursive)
    stems = _stems([request for _, request in requests], options["name"])
    return _drop(requests, stems, folder, call, interrupts)


def _dropped_again(name: str, n: int | None, seed: int | None, call: _Call, interrupts: Interrupts) -> Waiting | None:
    """Drop a finished prompt once more."""
    config, is_blind = call.config, call.options["root"] is not None
    found = changed(FinishedPrompts(config, blind=is_blind).find(name), n, seed)
    call.queue = QueueReport(config, found.folder, found.fields.get("provider"), time.time, say)
    for line in describe(found, Costs(config, found.folder, blind=is_blind), keeps_seed=seed is None):
        say(line)
    folder = folder_of(found.folder, recursive=config.inbox.recursive)
    return _drop([("", found.request)], [found.new_name()], folder, call, interrupts)


def _drop(
    requests: Sequence[tuple[str, SubmitRequest]],
    stems: Sequence[str],
    folder: str,
    call: _Call,
    interrupts: Interrupts,
) -> Waiting | None:
    config, options = call.config, call.options
    waiting = Waiting(config.folders, folder, stems) if options["wait"] else None
    call.wanted = len(requests)
    with Delivery(config, folder, blind=options["root"] is not None) as delivery:
        _stage(delivery, requests, stems)
        _place(delivery.place(), call, waiting, interrupts)
    interrupts.obey()
    _warn(delivery)
    return waiting


def _dropped_rows(call: _Call, interrupts: Interrupts) -> Waiting | None:
    """Drop the rows of a table that were not dropped yet, or none if one has a problem."""
    config, options, is_blind = call.config, call.options, call.options["root"] is not None
    batch = Batch(config, options, {name: options[name] for name in _OPTIONS}, _content)
    if options["dry_run"]:
        call.batch = batch
        batch.compare()
        batch.announce()
        return None
    # Before the results are compared: what comes after that is of this run.
    waiting = Waiting(config.folders, batch.folder, batch.stems) if options["wait"] else None
    delivery = Delivery(config, batch.folder, blind=is_blind, staged=STAGED)
    with RowRecord(delivery.disk, delivery.target) as record, delivery:
        batch.compare(record.dropped())
        batch.announce()
        batch.require_few(yes=options["yes"])
        call.wanted, call.batch = len(batch.new), batch
        _place(batch.place(delivery, record), call, waiting, interrupts)
    interrupts.obey()
    _warn(delivery)
    return waiting


def _place(
    placing: Generator[Result, None, None], call: _Call, waiting: Waiting | None, interrupts: Interrupts
) -> None:
    """Drop prompts, and note each of them."""
    # No signal may end this between a prompt and its images, or before the prompt is in the list.
    interrupts.keep()
    with contextlib.closing(placing) as placed:
        for job in placed:
            call.jobs.append(job)
            if waiting:
                waiting.expect(job)
            interrupts.check()


def _warn(delivery: Delivery) -> None:
    if delivery.unsynced:
        warning = f"{delivery.unsynced}; the prompts are dropped, but may be lost if the power fails"
        click.echo(f"imagewatch: {printable(warning)}", err=True)
    if delivery.similar:
        new, other = delivery.similar
        say(f'imagewatch: the folder "{printable(new, 100)}" is new; did you mean "{printable(other, 100)}"?')


def _stems(requests: Sequence[SubmitRequest], name: str | None) -> list[str]:
    if name is None:
        return [stem_for(request.text) for request in requests]
    stems = [f"{name}-{number}" for number in range(1, len(requests) + 1)] if len(requests) > 1 else [name]
    require_stem(max(stems, key=len))
    return stems


def _stage(delivery: Delivery, requests: Sequence[tuple[str, SubmitRequest]], stems: Sequence[str]) -> None:
    """Check all prompts before one is dropped.

    Raises:
        BadRequest: All problems of all prompts.
    """
    problems = []
    for (label, request), stem in zip(requests, stems, strict=True):
        try:
            delivery.stage(request, stem)
        except BadRequest as error:
            problems += _labelled(error, label if len(requests) > 1 else "")
    if problems:
        raise BadRequest(problems)


def _labelled(error: BadRequest, label: str) -> list[Problem]:
    where = f"{label}: " if label else ""
    return [Problem(where + one.field, one.reason, one.hint) for one in error.problems]


def _end_early(error: Interrupted | Exception, call: _Call) -> NoReturn:
    """Exit after a signal or an error: name the prompts that are dropped, and exit with 69 if there are any."""
    if not call.jobs:
        _end_without_prompts(error)
    _clear()
    for line in _reasons(error):
        say(f"imagewatch: {printable(line)}")
    if isinstance(error, BadRequest | SpoolError) and error.hint:
        say(f"  {printable(error.hint)}")
    if not call.is_named:
        _name_dropped(call)
    try:
        if call.is_printed:
            click.echo(nl=False)  # else Python writes again at exit what could not be written
        elif call.form == "json" or not call.options["wait"]:  # else only images are printed
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
    """Return what ended the command, in lines; nothing for a bug, which ``main`` reports."""
    if isinstance(error, Interrupted):
        return [f"interrupted by {error}"]
    if isinstance(error, BadRequest):
        return [str(problem) for problem in error.problems]
    if isinstance(error, OSError) and error.filename is None:
        return [f"cannot write the output: {error.strerror}"]
    return [str(error)] if isinstance(error, SpoolError) else []


def _name_dropped(call: _Call) -> None:
    """Name the prompts that were dropped: they will be charged, and charged again if they are dropped again."""
    count = len(call.jobs)
    it, verb = ("it", "was") if count == 1 else ("them", "were")
    rest = "" if count == call.wanted else " The others were not dropped."
    say(f"{count} of {call.wanted} prompts {verb} dropped. The daemon will process {it}.{rest}")
    if call.batch is None:
        name_dropped(call.jobs, call.config)
    elif rest:
        say("To drop the others, run the same command again: it skips the rows that were dropped.")


def _requests(prompts: Sequence[str], options: dict[str, Any]) -> list[tuple[str, SubmitRequest]]:
    """Return each prompt with a label for messages about it."""
    asked, images = {name: options[name] for name in _OPTIONS}, tuple(options["images"])
    texts = [text for text in prompts if text != "-"]
    files = (*options["files"], "-") if len(texts) < len(prompts) else options["files"]
    requests = [
        (f"prompt {number}", SubmitRequest(text.strip(), asked, images)) for number, text in enumerate(texts, 1)
    ]
    problems: list[Problem] = []
    for file in files or (() if prompts else ("-",)):
        if not files and (sys.stdin is None or sys.stdin.isatty()):
            raise click.UsageError("no prompt: give its text, or a file with --from")
        try:
            requests.append((file, SubmitRequest.of_file(_content(file), file, asked, images)))
        except BadRequest as error:
            problems += _labelled(error, "" if file == "-" else file)
    if problems:
        raise BadRequest(problems)
    return requests


def _content(file: str, most_bytes: int = MAX_BYTES) -> bytes:
    try:
        # The caller's shell has opened these; any other file may be from another user.
        is_own = file == "-" or file.startswith(("/dev/", "/proc/self/fd/"))
        with click.open_file(file, "rb") if is_own else open_file(resolve_own_link(file)) as stream:
            content: bytes = stream.read(most_bytes + 1)
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
            left = waiting.refresh()
        _clear()
        call.queue.report(waiting.unclaimed())
    except SpoolError:
        _report_before_failing(call)
        raise
    call.is_printed = True
    _print_results(call)
    queue = call.queue.read()
    report(call.jobs, left, call.config, is_running=queue is None or queue.state != "not_running")
    if left:  # before a failure: a script takes 1 for the end, and drops prompts again that may yet be charged
        sys.exit(EXIT_HELD)
    sys.exit(EXIT_FAILED if any(job.destination == "errors" for job in call.jobs) else 0)


def _report_before_failing(call: _Call) -> None:
    """Print the results that are known when one cannot be read: all prompts are dropped, and will be processed."""
    _clear()
    call.is_printed = True
    _print_results(call)
    report(call.jobs, (), call.config)
    for job in call.jobs:
        if not job.destination:
            click.echo(f"{printable(job.source)}: dropped; its result is not known", err=True)
    call.is_named = True


def _waited(call: _Call, waiting: Waiting) -> list[Result]:
    """Wait for all results; return the prompts that have none yet."""
    jobs, timeout = call.jobs, call.options["timeout"]
    began, wait = time.monotonic(), threading.Event().wait
    warned, checked = False, 0.0
    while left := waiting.refresh():
        passed = time.monotonic() - began
        if timeout is not None and passed >= timeout:
            break
        _live(len(jobs) - len(left), len(jobs), passed)
        if passed - checked >= _QUEUE_SECONDS:
            checked = passed
            _clear()
            if waits := waiting.unclaimed():
                call.queue.report(waits)
        if not warned and passed >= _UNCLAIMED_SECONDS and waiting.unclaimed() == len(jobs):
            warned = True
            _clear()
            where = printable(call.config.folders.inbox)
            click.echo(f"No prompt has been claimed from {where} yet. To see why, run: imagewatch status", err=True)
        wait(_REFRESH_SECONDS)
    return left


def _live(done: int, count: int, passed: float) -> None:
    if sys.stderr.isatty():
        click.echo(f"\r{done} of {count} done, {passed:.0f} s \033[K", nl=False, err=True, color=True)


def _clear() -> None:
    if sys.stderr.isatty():
        with contextlib.suppress(OSError):
            click.echo("\r\033[K", nl=False, err=True, color=True)


# Printing


def _print_results(call: _Call) -> None:
    if call.batch and call.form == "json":
        call.batch.print_json(call.queue.as_json())
    else:
        print_results(call.jobs, call.form, call.queue.as_json())


def _print_dropped(call: _Call) -> None:
    if call.batch and call.options["dry_run"]:
        call.batch.print_plan(call.form, call.queue.as_json())
        return
    if call.form == "json":
        _print_results(call)
        return
    for job in call.jobs:
        click.echo(printable(os.path.join(call.config.folders.inbox, job.source)))
