"""Commands for whoever looks after a daemon: ``status``, ``history``, ``estimate``, ``retry``, ``hold``, ``release``.

They read the ledger and the status file, and leave requests in the control folder; the daemon may run meanwhile or not.
None of them needs the key or the network.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import pwd
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, TextIO

import click

from imagewatch.commands import table
from imagewatch.inbox.candidate import Wait
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.text import amount, local, printable, to_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from imagewatch.commands.estimate import Estimate
    from imagewatch.commands.retry import Failed, Retry
    from imagewatch.config.load import Config
    from imagewatch.journal.control import Control
    from imagewatch.journal.ledger import Ledger

EXIT_HELD = 69
_PATIENCE = 6.0
"""How long a daemon may take to notice a request, seconds; where there are no change events it looks every five."""
_COLOURS = {"completed": "green", "refused": "yellow", "invalid": "yellow", "unknown": "red", "paid": "red"}


class Seconds(click.FloatRange):
    """A time on the command line: a number with an end. ``nan`` is neither below nor above any bound."""

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
    help="The configuration. Without it: $IMAGEWATCH_CONFIG, else ./imagewatch.toml, else "
    "~/.config/imagewatch/config.toml, else /etc/imagewatch/config.toml.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def load(path: str | None) -> Config:
    """Return the configuration that a command is to use."""
    from imagewatch.config import load as config  # noqa: PLC0415
    from imagewatch.config import locate as places  # noqa: PLC0415

    return config.load(places.find(path, os.environ, here()), os.environ)


def here() -> str:
    """Return the current folder, or an empty string when it is gone."""
    try:
        return os.getcwd()
    except OSError:
        return ""


def silence(stream: TextIO | None) -> None:
    """Let a stream lead nowhere, or what it could not write would be tried once more at the very end."""
    if stream is None:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """Print a line on standard error. Where that cannot be written, the exit code still tells."""
    try:
        click.echo(line, err=True)
    except OSError:
        silence(sys.stderr)


# Hold and release


@click.command()
@click.argument("reason", default="")
@json_option
@config_option
def hold(reason: str, path: str | None, *, as_json: bool) -> None:
    """Send nothing more until "imagewatch release".

    What has been sent is finished; prompts stay in the inbox. A restart changes nothing. REASON is shown to whoever
    asks.
    """
    config = _owned(path)
    control = _control(config)
    control.hold(reason)
    running = _running(config)
    noticed = running and _until(lambda: "manual" in _hold_kinds(config))
    if as_json:
        _print_asked("hold", running=running, noticed=noticed)
        return
    if not running:
        click.echo("Held. The daemon is not running; when it starts it sends nothing.")
    elif noticed:
        click.echo("Held. What has been sent is finished; the rest waits in the inbox.")
    else:
        click.echo("Asked for a hold; the daemon has not taken notice yet.")
    click.echo("To continue: imagewatch release")


def _print_asked(what: str, *, running: bool, noticed: bool) -> None:
    click.echo(to_json({"asked": what, "is_running": running, "is_noticed": noticed}))


@click.command()
@click.option("--accept-new-ledger", "accept", is_flag=True, help="Use the ledger that is there, or an empty one.")
@json_option
@config_option
def release(path: str | None, *, as_json: bool, accept: bool) -> None:
    """End every hold, also one by hand and the burst guard's.

    What the account refuses is refused again, and held again; that costs nothing. With --accept-new-ledger, a ledger
    that was deleted or is damaged is replaced by an empty one, and one that was put in its place is used: caps then
    count only what is in it, history shows only that, and prompts that a sync tool brings back may be paid for again.
    """
    config = _owned(path)
    control = _control(config)
    if accept:
        _accept_ledger(config, control)
    control.release()
    running = _running(config)
    noticed = running and _until(lambda: not control.release_pending())
    if as_json:
        _print_asked("release", running=running, noticed=noticed)
    elif not running:
        click.echo("Released. The daemon is not running; when it starts, only what still fails holds the queue.")
    elif noticed:
        click.echo("Released.")
    else:
        click.echo("Asked for the end of all holds; the daemon has not taken notice yet.")


def _accept_ledger(config: Config, control: Control) -> None:
    from imagewatch.journal.health import trouble  # noqa: PLC0415

    error = trouble(config.folders.state)
    if error is None:
        raise UsageError("the ledger is in order; nothing was done")
    if error.code not in {errno.ENOENT, errno.ESTALE, errno.EIO}:
        raise UsageError(f"{printable(str(error))}; an empty ledger would not help", hint=error.hint)
    known = "Caps, history and the recognition of prompts that come again know only what is in the new ledger."
    click.echo(known, err=True)
    control.accept_ledger()


# Retry


@click.command()
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--all", "everything", is_flag=True, help="All in the errors folder but what may have been charged.")
@click.option("--pay-again", is_flag=True, help="Also what may have been charged: it may then be paid for twice.")
@json_option
@config_option
def retry(names: Sequence[str], path: str | None, *, everything: bool, pay_again: bool, as_json: bool) -> None:
    """Put failed prompts back into the inbox.

    NAME is a prompt in the errors folder: its name without ending, or the path of its prompt or error file. What may
    have been charged is put back only with --pay-again. What was charged, but gave no picture, is never sent again: its
    answer is read again by the daemon (a picture's host may be back by now).
    """
    if everything == bool(names):
        raise click.UsageError("name the prompts to retry, or use --all")
    if everything and pay_again:
        raise click.UsageError("--pay-again needs the prompts by name")
    config = _owned(path)
    from imagewatch.commands.retry import Retry  # noqa: PLC0415
    from imagewatch.system.disk import Disk  # noqa: PLC0415

    with _ledger(config) as ledger:
        again = Retry(config.folders, Disk(), ledger, _control(config))
        paths = list(again.all()) if everything else [again.find(name) for name in names]
        answers = []
        for file in paths:
            answers.append(_retried(again, file, pay_again=pay_again, config=config))
            if not as_json:
                click.echo(_retry_told(answers[-1]), err=not answers[-1]["retried"])
    if as_json:
        click.echo(to_json(answers, indent=1))
    elif not paths:
        click.echo("There is nothing in the errors folder.")
    sys.exit(0 if all(answer["retried"] for answer in answers) else 1)


def _retry_told(answer: dict[str, Any]) -> str:
    return printable(f"{answer['name']}: {answer['told']}" if answer["name"] else answer["told"])


def _retried(again: Retry, file: str, *, pay_again: bool, config: Config) -> dict[str, Any]:
    """Deal with one error file; return what became of it."""
    try:
        failed = again.read(file)
        told, done = _retry_one(again, failed, pay_again=pay_again, config=config)
    except SpoolError as error:
        told = f"{error} ({error.hint})" if error.hint else str(error)
        return {"name": None, "document": file, "charged": None, "retried": False, "told": told}
    return {"name": failed.name, "document": file, "charged": failed.charged, "retried": done, "told": told}


def _retry_one(again: Retry, failed: Failed, *, pay_again: bool, config: Config) -> tuple[str, bool]:
    if failed.charged == "yes":
        again.look_again(failed)
        when = "" if _running(config) else " when it starts"
        return f"was paid for; the daemon reads its answer again{when}, nothing is sent", True
    if failed.charged != "no" and not pay_again:
        if not again.has_prompt(failed):
            return (
                "may have been charged; its prompt is missing, so nothing can be sent again; look at the balance",
                False,
            )
        return "may have been charged, so it is not sent again; look at the balance, then use --pay-again", False
    again.put_back(failed)
    return "back in the inbox", True


# History


@click.command()
@click.option(
    "--by", type=click.Choice(["day", "month", "provider", "folder", "owner"]), help="Sums instead of single jobs."
)
@click.option(
    "--days", type=click.IntRange(1, 36_500), metavar="NUMBER", help="Only of the last days, today included (UTC)."
)
@click.option(
    "--limit", type=click.IntRange(0, 10**9), metavar="NUMBER", help="Only the newest jobs; 0 is all. Without it: 20."
)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="For spreadsheets.")
@config_option
def history(
    by: str | None, days: int | None, limit: int | None, path: str | None, *, as_json: bool, as_csv: bool
) -> None:
    """Show what was made, refused and spent.

    The ledger knows every job that ever was. Days are those of UTC, as for the caps.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    from imagewatch.commands import history as told  # noqa: PLC0415
    from imagewatch.commands.balances import with_balances  # noqa: PLC0415
    from imagewatch.journal.budget import day_and_month  # noqa: PLC0415

    config = load(path)
    today = day_and_month(time.time())[0][0].timestamp()
    since = today - (days - 1) * 86_400 if days else 0.0
    whole = by or as_json or as_csv or days
    newest = limit or None if limit is not None or whole else 20
    with _ledger(config) as ledger:
        jobs = [with_balances(job, ledger) for job in ledger.jobs(since, newest)]
        totals = ledger.totals(since)
    if by:
        _show_sums(told.sums(jobs, by), by, as_json=as_json, as_csv=as_csv)
    elif as_json or as_csv:
        click.echo((told.as_json if as_json else told.as_csv)(jobs), nl=as_json)
    else:
        _show_jobs(jobs, totals)


def _show_sums(sums: Sequence[Any], by: str, *, as_json: bool, as_csv: bool) -> None:
    columns = ("completed", "refused", "unknown", "credits", "unknown_cost")
    rows = [{by: one.name, **{name: getattr(one, name) for name in columns}} for one in sums]
    if as_json:
        click.echo(to_json(rows, indent=1))
    elif as_csv:
        from imagewatch.commands.history import table_csv  # noqa: PLC0415

        click.echo(table_csv((by, *columns), [row.values() for row in rows]), nl=False)
    else:
        head = (f"{by} (UTC)" if by in {"day", "month"} else by, *columns)
        _show(head, [[_shown(value) for value in row.values()] for row in rows])


def _show_jobs(jobs: Sequence[dict[str, Any]], totals: dict[str, float]) -> None:
    if not jobs:
        click.echo("Nothing was made yet.")
        return
    from imagewatch.protocol.names import SUFFIX  # noqa: PLC0415

    outcomes = ["paid" if job["charged"] == "yes" and not job["got"] else job["outcome"] for job in jobs]
    rows = [
        [
            time.strftime("%Y-%m-%d %H:%M", time.localtime(job["sent_at"] or job["claimed_at"])),
            outcome,
            _shown(job["credits"]),
            _shown(job["provider"]),
            _shown(job["got"] or None),
            printable(job["source"].removesuffix(SUFFIX), 100),
        ]
        for job, outcome in zip(jobs, outcomes, strict=True)
    ]
    _show(
        ("time", "outcome", "credits", "provider", "images", "prompt"),
        rows,
        colours=[_COLOURS.get(outcome) for outcome in outcomes],
        notes=[printable("; ".join(filter(None, (job["message"], job["balances"]))), 400) for job in jobs],
    )
    completed, refused, unknown = (int(totals[name]) for name in ("completed", "refused", "unknown"))
    click.echo(
        f"\nIn all: {completed} completed, {refused} refused, {unknown} unknown, {amount(totals['credits'])} credits."
    )


# Estimate


@click.command()
@json_option
@config_option
def estimate(path: str | None, *, as_json: bool) -> None:
    """Say what the prompts in the inbox may cost; no network.

    The endpoint publishes no prices: this is what requests like them were charged here before.
    """
    from imagewatch.commands import afford  # noqa: PLC0415
    from imagewatch.commands import estimate as guess  # noqa: PLC0415

    config = load(path)
    with afford.budget_of(config) as budget:
        found = list(guess.inbox(config, budget))
    if as_json:
        click.echo(to_json([{name: getattr(one, name) for name in one.__slots__} for one in found], indent=1))
        return
    if not found:
        click.echo("There is no prompt in the inbox.")
        return
    _show(
        ("prompt", "request", "credits"),
        [[printable(one.source, 60), _shown(one.request), _price(one)] for one in found],
    )
    known = [one for one in found if one.usual is not None]
    unknown = sum(one.usual is None and not one.problem for one in found)
    low, high = sum(one.low or 0 for one in known), sum(one.high or 0 for one in known)
    click.echo(f"\nIn all: {_span(low, high)} credits" + (f", and {unknown} of unknown price." if unknown else "."))


def _price(one: Estimate) -> str:
    if one.problem:
        return f"none: it will be refused ({printable(one.problem, 100)})"
    if one.usual is None or one.low is None or one.high is None:
        reserved = f"; a cap reserves {amount(one.reserve)}" if one.reserve is not None else ""
        return f"unknown: none like it was charged in the last 30 days{reserved}"
    return f"{_span(one.low, one.high)}, usually {amount(one.usual)} ({one.seen} made)"


def _span(low: float, high: float) -> str:
    return amount(low) if low == high else f"{amount(low)} to {amount(high)}"


# Status


@click.command()
@json_option
@click.option("--prometheus", is_flag=True, help="For node_exporter's textfile collector; 0 also while held.")
@click.option("--watch", is_flag=True, help="Refresh every two seconds until Ctrl-C.")
@config_option
def status(path: str | None, *, as_json: bool, prometheus: bool, watch: bool) -> None:
    """Say what the daemon is doing: waiting, in flight, held, spent.

    Works while it is down, and then says so. Exit code 69 while the queue is held.
    """
    if prometheus and (as_json or watch):
        raise click.UsageError(f"--prometheus and {'--json' if as_json else '--watch'} exclude each other")
    config = load(path)
    if prometheus:
        from imagewatch.commands import metrics  # noqa: PLC0415

        click.echo(metrics.text(_page(config)), nl=False)
        return
    wait = threading.Event().wait
    while True:
        page = _page(config)
        if watch and not as_json and sys.stdout.isatty():
            click.echo("\033[H\033[J", nl=False, color=True)  # also where no colours are wanted
        click.echo(to_json(page) if as_json else "\n".join(_story(page)))
        if not watch:
            break
        wait(2.0)
    sys.exit(EXIT_HELD if page["holds"] else 0)


def _page(config: Config) -> dict[str, Any]:
    """Return the daemon's own words, with what is true if it is not running."""
    from imagewatch.daemon import status as told  # noqa: PLC0415

    state = config.folders.state
    page = told.read(state)
    if page is None:
        raise _unreadable(state) if os.path.lexists(state) and not os.access(state, os.X_OK) else _never_ran(state)
    running = _running(config)
    if running:
        # It has the lock already, and has yet to say something.
        page["state"] = "starting" if page["state"] == "stopped" else page["state"]
    else:
        page["state"] = "stopped" if page["state"] == "stopped" else "died"
        page |= {"in_flight": [], "holds": told.lasting(page, _control(config))}
    return {**told.as_of(page, time.time()), "is_running": running}


def holds(config: Config) -> list[dict[str, Any]]:
    """Return why nothing is sent at present, or will be at the next start; nothing if this user may not know."""
    with contextlib.suppress(SpoolError):
        found: list[dict[str, Any]] = _page(config)["holds"]
        return found
    return []


def _story(page: dict[str, Any]) -> Iterator[str]:
    from imagewatch.daemon.status import kind  # noqa: PLC0415

    states = {
        "stopped": "is not running (it was stopped)",
        "died": "is not running (it died; the next start recovers)",
        "starting": "is starting",
        "stopping": "finishes what is sent, then ends",
    }
    yield f"imagewatch {page['version']} {states.get(page['state'], 'is running')}, as of {local_time(page['updated'])}"
    yield f"  inbox      {page['inbox']} ({page['mode']}, last scan {local_time(page['last_scan'])})"
    for path, reason in page["polled"]["folders"].items():
        yield f"             {path}: looked at regularly ({reason})"
    waiting = page["waiting"]
    yield f"  waiting    {waiting['ready'] + waiting['not_ready']}" + _why(waiting["why"])
    yield f"  in flight  {len(page['in_flight'])}"
    for job in page["in_flight"]:
        yield f"             {job['source']}"
    if stuck := page.get("stuck"):  # not there in what an older daemon said
        yield click.style(f"  stuck      {len(stuck)}, as the log says", fg="red")
        yield from (f"             {job['source'] or job['job']}" for job in stuck)
    for name, label in (("today", "today"), ("month", "this month")):
        one = page[name]
        cap = f" of {amount(one['cap'])}" if one["cap"] else ""
        yield (
            f"  {label:<10} {one['completed']} completed, {one['refused']} refused, {one['unknown']} unknown, "
            f"{amount(one['credits'])}{cap} credits (UTC)"
        )
    if balance := page.get("balance"):  # not there in what an older daemon said
        yield f"  balance    {amount(balance['credits'])} credits, as of {local_time(balance['at'])}"
    if page["ignored"]["count"]:
        yield f"  ignored    {page['ignored']['count']}"
        for name, reason in page["ignored"]["files"].items():
            yield f"             {name}: {reason}"
    for one in page["holds"]:
        next_try = f"; next try at {local_time(one['next_try_at'])}" if one["next_try_at"] else ""
        yield click.style(f"  on hold    {kind(one)}: {one['reason']}{next_try}", fg="red")
        yield f"             {one['next']}"


def _why(reasons: dict[str, int]) -> str:
    texts = {wait.value: wait.text for wait in Wait}  # a daemon of another version may have other reasons
    return f" ({', '.join(f'{count} {texts.get(key, key)}' for key, count in reasons.items())})" if reasons else ""


def local_time(text: str | None) -> str:
    """Return a UTC time, as a status has it, in words for people."""
    from imagewatch.daemon.status import moment  # noqa: PLC0415

    return local(moment(text).timestamp()) if text else "never"


# What they share


def _control(config: Config) -> Any:  # noqa: ANN401  imported late
    from imagewatch.journal.control import Control  # noqa: PLC0415
    from imagewatch.system.disk import Disk  # noqa: PLC0415

    return Control(config.folders.state, Disk())


def _owned(path: str | None) -> Config:
    """Return the configuration, as the owner of the state folder: what root made the daemon could not remove."""
    # Loaded while we may: our own code may lie where only root can read.
    from imagewatch.commands import retry  # noqa: F401, PLC0415
    from imagewatch.daemon import status  # noqa: F401, PLC0415
    from imagewatch.journal import control, ledger  # noqa: F401, PLC0415

    config = load(path)
    state = config.folders.state
    try:
        owner = os.stat(state)
    except FileNotFoundError:
        raise _never_ran(state) from None
    except OSError:
        raise _unreadable(state) from None
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.setgroups(_groups(owner))
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    if not os.access(state, os.W_OK | os.X_OK):
        hint = "use the daemon's user or root, e.g. sudo imagewatch …"
        raise SpoolError(f"{printable(state)}: this user may not change it", path=state, hint=hint)
    return config


def _groups(owner: os.stat_result) -> list[int]:
    with contextlib.suppress(KeyError):
        return os.getgrouplist(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
    return []


def _never_ran(state: str) -> SpoolError:
    hint = "start it: imagewatch run; or name its configuration with --config"
    return SpoolError(f"{printable(state)}: no daemon has run with this configuration yet", path=state, hint=hint)


def _unreadable(state: str) -> SpoolError:
    hint = "use the daemon's user or root, e.g. sudo imagewatch …"
    return SpoolError(f"{printable(state)}: this user may not look into it", path=state, hint=hint)


@contextlib.contextmanager
def _ledger(config: Config) -> Iterator[Ledger]:
    from imagewatch.config.locate import is_hidden  # noqa: PLC0415
    from imagewatch.journal.health import trouble  # noqa: PLC0415
    from imagewatch.journal.ledger import Ledger  # noqa: PLC0415

    path = _ledger_path(config)
    if is_hidden(path):
        raise _unreadable(config.folders.state)
    if not os.path.exists(path):
        if error := trouble(config.folders.state):  # there was one
            raise error
        hint = "nothing was made with this configuration yet; or name another one with --config"
        raise SpoolError(f"{printable(path)}: there is no ledger", path=path, hint=hint)
    with contextlib.closing(Ledger(path)) as ledger:
        yield ledger


def _ledger_path(config: Config) -> str:
    return os.path.join(config.folders.state, "ledger.sqlite3")


def _running(config: Config) -> bool:
    from imagewatch.system.disk import locked  # noqa: PLC0415

    return locked(os.path.join(config.folders.state, "lock"))


def _hold_kinds(config: Config) -> set[str]:
    from imagewatch.daemon.status import read  # noqa: PLC0415

    page = read(config.folders.state)
    return {one["kind"] for one in page["holds"]} if page else set()


def _until(condition: Callable[[], bool]) -> bool:
    """Wait until the daemon has taken notice; return whether it has."""
    wait, end = threading.Event().wait, time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > end:
            return False
        wait(0.05)
    return True


def _shown(value: object) -> str:
    if value is None:
        return ""
    return amount(value) if isinstance(value, float) else printable(str(value), 100)


def _show(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    colours: Sequence[str | None] = (),
    notes: Sequence[str] = (),
) -> None:
    """Print a table.

    Args:
        head: What each column is called.
        rows: Text for each of them.
        colours: Of each row; without it none.
        notes: A line below each row; none where it is empty.
    """
    first, *others = table.lines(head, rows)
    click.echo(click.style(first, bold=True))
    for at, line in enumerate(others):
        colour = colours[at] if colours else None
        for part in (line, f"    {notes[at]}" if notes and notes[at] else ""):
            if part:
                click.echo(click.style(part, fg=colour) if colour else part)
