"""The lines of ``imagewatch check`` about configuration, folders, ledger, caps, key and, if asked, the account.

Reads only; nothing is claimed, sent or created.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import stat
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from imagewatch.commands import afford
from imagewatch.commands.balances import with_balances
from imagewatch.commands.check_notify import receivers
from imagewatch.commands.ledger import has_journal, open_ledger
from imagewatch.config.key import key_file_problem, key_source, read_key
from imagewatch.config.locate import is_hidden, others_who_write, refusal
from imagewatch.config.shared import instance_of
from imagewatch.daemon import status
from imagewatch.job.claims import HINT
from imagewatch.job.folders import require_space
from imagewatch.job.spool import Spool
from imagewatch.journal.control import accepts_ledger
from imagewatch.journal.files import path_in
from imagewatch.journal.opening import member_of, open_journal, problem
from imagewatch.protocol.names import CLAIMS
from imagewatch.protocol.options import choose_provider, layered
from imagewatch.protocol.request import unknown_family
from imagewatch.system.disk import Disk
from imagewatch.system.disk_errors import FULL, disk_errors
from imagewatch.system.errors import ConfigError, KeyRefused, SpoolError, Unavailable
from imagewatch.system.file_systems import POLL_SECONDS, Kinds, eventless, keeps_files, keeps_owners
from imagewatch.system.folders import Tops
from imagewatch.system.locks import locked
from imagewatch.system.text import amount, local, printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from imagewatch.config.schema import Config
    from imagewatch.endpoint.client import Client

_CREDENTIALS = "/run/credentials/imagewatch.service"
_ALL = os.R_OK | os.W_OK | os.X_OK


@dataclass(frozen=True)
class Line:
    """One thing that was checked.

    Attributes:
        verdict: ``ok``, ``wait``, ``warn`` or ``bad``; of a file ``take``, ``refuse``, ``wait`` or ``ignore``.
        what: The file, folder or setting.
        why: The reason, or details.
    """

    verdict: str
    what: str
    why: str


def settings(config: Config, environ: Mapping[str, str]) -> Iterator[Line]:
    """Check folders, key, and everything else that could stop the daemon from starting."""
    yield Line("ok", "configuration", config.source + _newer(config))
    yield Line("ok", "endpoint", config.endpoint.base_url)
    yield from _refused(config, environ)
    kinds = Kinds()
    kinds.refresh()
    for name in ("inbox", "outbox", "errors", "archive", "state"):
        path = getattr(config.folders, name)
        if path == "delete":
            yield Line("ok", name, "originals are deleted after success")
        else:
            yield _folder(name, path, kinds)
    yield from _room(config, kinds)
    yield from _journal(config)
    yield from (Line(*line) for line in (*afford.caps(config), *afford.budgets(config)))
    yield from _models(config)
    if os.path.isdir(config.folders.inbox):
        yield _watched(config, kinds)
        yield from _claims(config, kinds)
    yield from _key(config, environ)
    yield from (Line(*line) for line in receivers(config.notify, environ))


def _newer(config: Config) -> str:
    """Return a note if the file was changed after a daemon started; whether that was reloaded since is not known."""
    page = status.read(config.folders.state)
    if page is None:
        return ""
    with contextlib.suppress(OSError, SpoolError):  # there may be no file, or a daemon that this user may not see
        changed, is_running = os.stat(config.source).st_mtime, locked(os.path.join(config.folders.state, "lock"))
        if is_running and changed > status.moment(page["started"]).timestamp() + 1:  # it is written in whole seconds
            when = f"changed at {local(changed)}, after the daemon started"
            return f" ({when}; unless it was reloaded since, it is not in use yet)"
    return ""


def _journal(config: Config) -> Iterator[Line]:
    """Report what keeps the daemon from recording what it sends."""
    if is_hidden(path_in(config.folders.state)):  # the line of the folder reports it
        return
    what = "shared database" if config.shared.database else "ledger"
    try:
        error = problem(config)
    except ConfigError:  # a part that cannot be made, which is reported
        return
    if error is not None and accepts_ledger(config.folders.state):
        yield Line("wait", what, printable(f"{error} (the daemon accepts it when it starts)", 1000))
    elif error is not None:
        yield Line("bad", what, printable(f"{error} ({error.hint})", 1000))
    elif config.shared.database:
        member = member_of(config.folders.state)
        instance = member.instance if member else instance_of(config)
        yield Line("ok", what, printable(f"account {config.shared.account}, instance {instance}"))


def _models(config: Config) -> Iterator[Line]:
    """Name each configured model whose provider is not known: prompts that use it are refused."""
    presets = {f"presets.{name}": preset for name, preset in config.presets.items() if preset.model}
    for table, own in {"defaults": config.defaults, **presets}.items():
        options = layered((own, config.defaults))
        if choose_provider(options, has_inputs=False) is None:
            why = unknown_family(options)
            yield Line("warn", table, printable(f"{why}; without it, prompts that name no provider are refused"))


def _key(config: Config, environ: Mapping[str, str]) -> Iterator[Line]:
    """Say where the key comes from, or why there is none. A service may have a key that this user cannot read."""
    source = key_source(config.endpoint, environ)
    if not source and (whose := _daemon(config)):
        why = f"not visible to this command: {whose} and may have its own systemd credential or environment variable"
        yield Line("warn", "key", printable(f"{why} ({_with_its_key(config)})"))
        return
    try:
        read_key(config.endpoint, environ)
    except ConfigError as error:
        for one in error.problems:
            yield Line("bad", "key", printable(str(one)))
    else:
        warning = key_file_problem(config.endpoint.api_key_file) if config.endpoint.api_key_file else ""
        yield Line("ok", "key", printable(f"from {source}" + (f"; but {warning}" if warning else "")))


def _daemon(config: Config) -> str:
    """Return in words which daemon uses the state folder; an empty string if none is visible to this user."""
    state = config.folders.state
    try:
        if os.stat(state).st_uid != os.geteuid():
            return f"the daemon runs as {_owner(config)}"
        return "a daemon is running" if locked(os.path.join(state, "lock")) else ""
    except (OSError, SpoolError):
        return ""


def _with_its_key(config: Config) -> str:
    """Return how to run the command with the key of a daemon: a service of the system has a folder with it."""
    if os.path.isdir(_CREDENTIALS) or is_hidden(_CREDENTIALS):
        environ_of = f"CREDENTIALS_DIRECTORY={_CREDENTIALS}"
        return f"to check it, run as root: runuser -u {_owner(config)} -- env {environ_of} imagewatch check"
    return "to check it, run this command with the variables that the daemon was started with, such as LETTA_API_KEY"


def _owner(config: Config) -> str:
    """Return the user of the daemon: the owner of its state folder."""
    number = os.stat(config.folders.state).st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def _client(config: Config, environ: Mapping[str, str]) -> Client:
    from imagewatch.endpoint.client import Client  # noqa: PLC0415  loads the HTTP library, which --help does not need

    return Client(config.endpoint, lambda: read_key(config.endpoint, environ))


def _refused(config: Config, environ: Mapping[str, str]) -> Iterator[Line]:
    """Report what parts of the daemon refuse in the configuration, by creating them as the daemon does."""
    parts: tuple[Callable[[], object], ...] = (
        lambda: _client(config, environ).close(),
        lambda: Spool(config, Disk(), open_journal(config, time.time)),
    )
    for make in parts:
        try:
            make()
        except ConfigError as error:
            for one in error.problems:
                hint = f" ({one.hint})" if one.hint else ""
                yield Line("bad", one.field, printable(f"{one.reason}{hint}"))
        except SpoolError:
            pass  # the line of the state folder, or of the journal in it, reports it


def _room(config: Config, kinds: Kinds) -> Iterator[Line]:
    """Report too little free space; for a folder that does not exist yet, on the disk where it will be created."""
    nearest = {name: _nearest(getattr(config.folders, name)) for name in ("state", "outbox")}
    try:
        require_space((nearest["state"], nearest["outbox"]), config.limits.min_free_bytes, Tops())
    except SpoolError as error:
        if error.code in FULL and keeps_files(kinds.of(error.path)):  # else the folder's own line reports it
            yield Line("bad", "disk", f"{error} ({error.hint})")


def _watched(config: Config, kinds: Kinds) -> Line:
    """Say how the daemon notices changes in the inbox."""
    kind = kinds.of(config.folders.inbox)
    polled = config.inbox.watch == "poll" or (config.inbox.watch == "auto" and eventless(kind))
    seconds = min(config.inbox.rescan_seconds, POLL_SECONDS) if polled else config.inbox.rescan_seconds
    how = "a scan" if polled else "change events, and a scan"
    return Line("ok", "watch", f"{kind or 'unknown file system'}: {how} every {amount(seconds)} s")


def _claims(config: Config, kinds: Kinds) -> Iterator[Line]:
    """Report problems of the folder of claimed files."""
    kind = kinds.of(config.folders.inbox)
    if not keeps_owners(kind):
        why = "it may not store file owners, so other users of this share could change claimed files"
        yield Line("warn", "claims", f"{kind or 'unknown file system'}: {why}; key and state folder are not at risk")
        return
    path = os.path.join(config.folders.inbox, CLAIMS)
    if not os.path.lexists(path):
        return
    with disk_errors(path, "read the status of the folder"):
        status = os.lstat(path)
        daemon = os.stat(config.folders.state).st_uid if os.path.isdir(config.folders.state) else os.geteuid()
        if not stat.S_ISDIR(status.st_mode):
            yield Line("bad", "claims", f"not a folder: {printable(path)} ({HINT})")
        elif status.st_uid != daemon or stat.S_IMODE(status.st_mode) & 0o777 != stat.S_IRWXU:
            why = f"user number {status.st_uid}, mode {stat.S_IMODE(status.st_mode):o}"
            yield Line("bad", "claims", f"not the daemon's folder of claimed files ({why}): {printable(path)} ({HINT})")


def account(config: Config, environ: Mapping[str, str]) -> Iterator[Line]:
    """Ask the account for its balance, and list the jobs whose charge is unknown.

    If nothing else uses the account, the balance shows the administrator whether a lost response was charged.
    """
    try:
        with contextlib.closing(_client(config, environ)) as client:
            for name, credits_ in client.balance().items():
                yield Line("ok", name.replace("_", " "), f"{amount(credits_)} credits")
    except KeyRefused as error:
        yield Line("bad", "key", printable(f"the API refused it ({error})"))
    except Unavailable as error:
        yield Line("warn", "balance", printable(f"not available ({error}); nothing else depends on it"))
    except ConfigError as error:
        first = error.problems[0]
        yield Line("warn", "balance", printable(f"not available ({first.field}: {first.reason})"))
    if has_journal(config):
        try:
            with open_ledger(config) as ledger:
                yield from (
                    _unknown_charge(with_balances(job, ledger)) for job in ledger.jobs() if job["charged"] == "unknown"
                )
        except SpoolError as error:
            yield Line("warn", "ledger", printable(str(error)))


def _unknown_charge(job: Mapping[str, Any]) -> Line:
    sent = local(job["sent_at"]) if job["sent_at"] else "?"
    ids = f", request id {job['request_id']}" if job["request_id"] else ""
    return Line(
        "warn",
        printable(job["source"]),
        f"may have been charged: sent {sent}, job {job['job']}{ids}; {job['balances']}",
    )


def _folder(name: str, path: str, kinds: Kinds) -> Line:
    shown, nearest = printable(path), _nearest(path)
    if not keeps_files(kind := kinds.of(nearest)):
        return Line("bad", name, f"{shown}: {kind} does not keep files; use a folder on a disk")
    if os.path.isdir(path):
        return _existing_folder(name, path)
    if is_hidden(path):
        return Line("bad", name, f"{shown}: permission denied ({refusal(path, _ALL)})")
    if os.path.lexists(path):
        return Line("bad", name, f"{shown}: not a folder")
    if os.path.isdir(nearest) and os.access(nearest, os.W_OK | os.X_OK):
        return Line("ok", name, f"{shown} (will be created)")
    hint = "create it, or set root in the configuration to a folder of yours"
    return Line("bad", name, f"{shown}: does not exist, and this user cannot create it ({hint})")


def _existing_folder(name: str, path: str) -> Line:
    shown, above = printable(path), os.path.dirname(os.path.realpath(path))
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        return Line("bad", name, f"{shown}: permission denied ({refusal(path, _ALL)})")
    if who := others_who_write(os.stat(above)):
        why = f"{who} may write to {printable(above)}, so others can replace this folder"
        return Line("warn", name, f"{shown}: {why} (chmod go-w {printable(above)})")
    return Line("ok", name, shown)


def _nearest(path: str) -> str:
    """Return a path if it exists, else the nearest folder above it."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    return path
