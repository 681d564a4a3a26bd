"""The configuration: one file, the environment over it, and everything that is wrong said at once.

Each section of the file is a frozen struct below; names, defaults and bounds are those of
``config.example.toml``, and a test holds the two together. An API key is never part of a configuration,
so a ``Config`` may be printed; what somebody wrote under an unknown key may be a key and is never printed.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.resources
import ipaddress
import itertools
import json
import math
import os
import re
import shlex
import tomllib
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeVar
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from imagewatch.config.locate import expanded_home, usual, xdg
from imagewatch.config.schema import Options, Provider, check, nearest
from imagewatch.system.errors import ConfigError, Problem
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

S = TypeVar("S", bound=msgspec.Struct)

# A day at most: longer waits overflow the timers below us, and nobody means them.
_Seconds = Annotated[float, Meta(ge=0, le=86_400)]
_Timeout = Annotated[float, Meta(gt=0, le=86_400)]
_Amount = Annotated[float, Meta(ge=0)]
_Bytes = Annotated[int, Meta(ge=0)]
_Text = Annotated[str, Meta(min_length=1)]

_PREFIX: Final = "IMAGEWATCH_"
_MAX_FILE_BYTES: Final = 1 << 20
_MAX_MODE: Final = 0o7777
_DELETE: Final = "delete"
_EXAMPLE: Final = "config.example.toml"
_EXAMPLE_ROOT: Final = "/srv/imagewatch"
_PLACES: Final = ("inbox", "outbox", "errors", "archive")
_KEY_HINT: Final = "put the key in a file and name it in api_key_file"
_KEY_NAMES: Final = frozenset(
    {"apikey", "key", "lettaapikey", "token", "apitoken", "bearer", "authorization", "secret", "password"}
)


class Folders(msgspec.Struct, frozen=True, kw_only=True):
    """``[folders]``: where everything is. Loaded, all paths are absolute.

    Attributes:
        root: The folder that the others are in unless set alone; empty when not set.
        inbox: Where prompts are dropped.
        outbox: Where pictures and receipts appear.
        errors: Where refused prompts go, each with an error file.
        archive: Where prompts go that were done, or the word ``delete``.
        state: Evidence, ledger and lock; local and private.
    """

    root: _Text = ""
    inbox: _Text = ""
    outbox: _Text = ""
    errors: _Text = ""
    archive: _Text = ""
    state: _Text = ""


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """``[endpoint]``: whom to ask, with which key, and for how long.

    Attributes:
        base_url: Without ``/v1`` and without a slash at the end.
        api_key_file: Absolute path of a file that holds the key alone.
        api_key_command: Program and arguments that print the key; empty when not set.
        connect_timeout_seconds: For the connection alone.
        timeout_seconds: For each single read of the answer.
        deadline_seconds: For one request in total.
        max_response_bytes: A longer answer is cut off.
        ca_file: Absolute path of a PEM bundle to trust instead of the usual ones.
        allow_private_downloads: Whether a picture's url may lead to a private address.
    """

    base_url: str = "https://api.letta.com"
    api_key_file: _Text | None = None
    api_key_command: tuple[str, ...] = ()
    connect_timeout_seconds: _Timeout = 10.0
    timeout_seconds: _Timeout = 600.0
    deadline_seconds: _Timeout = 900.0
    max_response_bytes: Annotated[int, Meta(ge=1)] = 400_000_000
    ca_file: _Text | None = None
    allow_private_downloads: bool = False


class Inbox(msgspec.Struct, frozen=True, kw_only=True):
    """``[inbox]``: how the inbox is watched.

    Attributes:
        watch: Change events of the kernel, polling, or whichever works.
        settle_seconds: How long files must have been quiet.
        input_wait_seconds: How long declared input images are waited for.
        rescan_seconds: Interval of the complete look that needs no events.
        recursive: Whether sub-folders are watched.
        redelivery: What to do with a finished prompt that a sync tool brings back.
    """

    watch: Literal["auto", "native", "poll"] = "auto"
    settle_seconds: Annotated[float, Meta(ge=0, le=3600)] = 5.0
    input_wait_seconds: _Seconds = 60.0
    rescan_seconds: Annotated[float, Meta(ge=0.1, le=86_400)] = 30.0
    recursive: bool = True
    redelivery: Literal["skip", "run"] = "skip"


class Outbox(msgspec.Struct, frozen=True, kw_only=True):
    """``[outbox]``: who may read what is published.

    Attributes:
        file_mode: Permission bits of published files; ``None`` leaves it to the umask.
        folder_mode: Permission bits of folders made; ``None`` leaves it to the umask.
        group: Name of the group that owns both; ``None`` leaves it to the system.
    """

    file_mode: int | None = None
    folder_mode: int | None = None
    group: _Text | None = None


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """``[limits]``: guard rails for money, disk and what prompts may ask. An empty list allows all.

    Attributes:
        concurrency: Requests at the same time.
        requests_per_minute: Requests begun in a minute; 0 is off.
        credits_per_day: Credits in a day, by UTC; 0 is off.
        credits_per_month: Credits in a calendar month, by UTC; 0 is off.
        assumed_credits: Credits reserved for a request whose price is not known yet.
        burst: More new prompts at once than this are held until released; 0 is off.
        providers: Providers that may be asked.
        models: Models that may be asked.
        qualities: Qualities that may be asked.
        max_n: Images per request.
        max_prompt_chars: Characters of a prompt.
        max_input_bytes: Bytes of all input images of one request together.
        min_free_bytes: Free space below which nothing new is begun.
    """

    concurrency: Annotated[int, Meta(ge=1, le=64)] = 4
    requests_per_minute: _Amount = 0.0
    credits_per_day: _Amount = 0.0
    credits_per_month: _Amount = 0.0
    assumed_credits: _Amount = 150.0
    burst: Annotated[int, Meta(ge=0)] = 0
    providers: tuple[Provider, ...] = ()
    models: tuple[_Text, ...] = ()
    qualities: tuple[Literal["low", "medium", "high", "auto"], ...] = ()
    max_n: Annotated[int, Meta(ge=1, le=4)] = 4
    max_prompt_chars: Annotated[int, Meta(ge=1, le=32_000)] = 32_000
    max_input_bytes: _Bytes = 300_000_000
    min_free_bytes: _Bytes = 500_000_000


class Retry(msgspec.Struct, frozen=True, kw_only=True):
    """``[retry]``: for what is provably free only.

    Attributes:
        attempts: Attempts in all, the first included.
        initial_seconds: Wait after the first; doubled after each.
        max_seconds: The longest wait.
    """

    attempts: Annotated[int, Meta(ge=1, le=20)] = 4
    initial_seconds: _Seconds = 1.0
    max_seconds: _Seconds = 60.0


class Log(msgspec.Struct, frozen=True, kw_only=True):
    """``[log]``: how much is logged and how it looks.

    Attributes:
        level: The least important level that is shown.
        format: For people, for machines, or by whether a terminal reads it.
    """

    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "console", "json"] = "auto"


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """A whole configuration, checked. Holds no key.

    Attributes:
        folders: ``[folders]``, all absolute.
        endpoint: ``[endpoint]``.
        inbox: ``[inbox]``.
        outbox: ``[outbox]``.
        defaults: ``[defaults]``; ``provider`` is always set.
        presets: ``[presets.NAME]`` by name.
        limits: ``[limits]``.
        retry: ``[retry]``.
        log: ``[log]``.
        source: Absolute name of the file, or ``environment``.
    """

    folders: Folders
    endpoint: Endpoint = Endpoint()
    inbox: Inbox = Inbox()
    outbox: Outbox = Outbox()
    defaults: Options = Options(provider="auto")
    presets: dict[str, Options] = msgspec.field(default_factory=dict)
    limits: Limits = Limits()
    retry: Retry = Retry()
    log: Log = Log()
    source: str = "environment"


_SECTIONS: Final[dict[str, type[msgspec.Struct]]] = {
    "folders": Folders,
    "endpoint": Endpoint,
    "inbox": Inbox,
    "outbox": Outbox,
    "defaults": Options,
    "limits": Limits,
    "retry": Retry,
    "log": Log,
}
_SECTION_NAMES: Final = (*_SECTIONS, "presets")


def load(path: str | None, environ: Mapping[str, str]) -> Config:
    """Read a configuration file and the environment over it.

    Args:
        path: The file, or ``None`` when the environment says everything.
        environ: The environment: ``IMAGEWATCH_SECTION__KEY`` and the variables that defaults come from.

    Returns:
        The configuration, complete and checked.

    Raises:
        ConfigError: With everything that is wrong at once.
    """
    source = "" if path is None else os.path.abspath(path)
    table: dict[str, Any] = {}
    if path is not None:
        text, problem = _read(source)
        if problem is None:
            table, problem = _parse(text, os.path.basename(source))
        if problem is not None:
            raise ConfigError([problem], source=source)
    draft = _Draft(table, os.path.dirname(source), environ)
    if path is None:
        with contextlib.suppress(FileNotFoundError):  # the current folder is gone; there may be no need of it
            draft.looked_for = usual(environ, os.getcwd())
    config = draft.config(source or "environment")
    if draft.problems:
        raise ConfigError(draft.named(), source=source)
    return config


def initial(root: str | None) -> str:
    """Return the text of a new configuration: ``config.example.toml`` for a folder to watch.

    Args:
        root: The folder; without one ``root`` is a comment, so that nothing starts with a folder that nobody named.

    Raises:
        ConfigError: If the installation lost the file.
    """
    line = f'root = "{_EXAMPLE_ROOT}"\n'
    if root is None:
        return example().replace(f"\n{line}", f"\n## {line}")
    quoted = json.dumps(root, ensure_ascii=False)[1:-1]  # of printable text TOML has the same form
    return example().replace(f'"{_EXAMPLE_ROOT}', f'"{quoted}')


def example() -> str:
    """Return the text of ``config.example.toml``.

    Raises:
        ConfigError: If the installation lost the file.
    """
    packaged = importlib.resources.files("imagewatch").joinpath(_EXAMPLE)
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    text, problem = _read(os.path.join(os.path.dirname(str(importlib.resources.files("imagewatch"))), _EXAMPLE))
    if problem is not None:
        raise ConfigError([Problem(_EXAMPLE, "is missing from the installation", "install imagewatch again")])
    return text


def _read(path: str) -> tuple[str, Problem | None]:
    """Return the text of a file, or what keeps it from being read."""
    name = os.path.basename(path) or path
    try:
        with open(path, "rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = (error.strerror if isinstance(error, OSError) else None) or "is not a file name"
        return "", Problem(name, f"cannot be read: {reason}", "check the path and the permissions")
    if len(content) > _MAX_FILE_BYTES:
        return "", Problem(name, "is larger than 1 MiB", "is this the right file?")
    try:
        return content.decode("utf-8-sig"), None  # some editors write a BOM
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return "", Problem(name, f"is not UTF-8 (line {line})", "save it as UTF-8")


def _parse(text: str, name: str = "") -> tuple[dict[str, Any], Problem | None]:
    """Return the tables of a TOML text, or where it is not TOML; the message names line and column."""
    try:
        return tomllib.loads(text), None
    except tomllib.TOMLDecodeError as error:
        reason = repr(str(error))[1:-1][-120:]  # its end is the position
        return {}, Problem(name, reason, "text stands in double quotes; # begins a comment")
    except ValueError:  # not a TOMLDecodeError: a number of thousands of digits
        return {}, Problem(name, "a number is too long")
    except RecursionError:
        return {}, Problem(name, "is nested too deeply")


def _printable(text: str) -> str:
    """Return a name from outside in a form that cannot disturb a log, cut to 100 characters."""
    return repr(text)[1:-1][:100]


def _is_text(section: str, struct: type[msgspec.Struct], key: str) -> bool:
    """Return whether a key takes plain text, so that a variable for it is not read as TOML."""
    if section == "outbox":
        return True  # modes are written as text
    kind = next(field.type for field in msgspec.structs.fields(struct) if field.name == key)
    info = msgspec.inspect.type_info(kind)
    kinds = info.types if isinstance(info, msgspec.inspect.UnionType) else (info,)
    texts = (msgspec.inspect.StrType, msgspec.inspect.LiteralType, msgspec.inspect.NoneType)
    return all(isinstance(one, texts) for one in kinds)


def _value(text: str) -> object:
    """Return the TOML value that a variable spells, else the text itself."""
    table, problem = _parse(f"value = {text}")
    return table["value"] if problem is None and set(table) == {"value"} else text


def _flaw(value: object) -> str:
    """Return what makes a value unusable whatever its type should be, or an empty string."""
    if isinstance(value, float) and not math.isfinite(value):
        return "must be a finite number"
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return "is too large"
    if isinstance(value, str) and "\0" in value:
        return "must not contain NUL"
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return next((flaw for one in value if (flaw := _flaw(one))), "")
    return ""


def _url_flaw(url: str) -> tuple[str, str]:
    """Return what is wrong with a base URL and what to do about it; the URL is not repeated."""
    write = 'write it like "https://api.letta.com"'
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "is not a URL", write
    plain = f"[{host}]" if ":" in host else host
    netloc = plain if port is None else f"{plain}:{port}"
    has_scheme = url.lower().startswith(("http://", "https://"))
    rules = (
        (not has_scheme or not host, "must begin with https:// and a host", write),
        ("@" in parts.netloc, "must not hold a user name or password", _KEY_HINT),
        (not re.fullmatch(r"[\x21-\x7e]+", url), "must be plain ASCII without white space", write),
        (bool(re.search(r"[?#\\]", url)), "must have no query and no fragment", write),
        # Compared whole, so that what we call the host is what everybody else calls the host.
        (parts.netloc.lower() != netloc, "must begin with https:// and a host", write),
        (not re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", host), "must begin with https:// and a host", write),
        (parts.path.lower().endswith("/v1"), "must not end in /v1", "remove /v1"),
        (
            parts.scheme == "http" and not _is_loopback(host),
            "the key would travel unencrypted",
            "use https://; http:// is for this machine only",
        ),
    )
    return next(((reason, hint) for broken, reason, hint in rules if broken), ("", ""))


def _is_loopback(host: str) -> bool:
    """Return whether a host is this machine by its very name."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Draft:
    """A configuration in the making: the tables, where each value came from, and all that is wrong."""

    def __init__(self, table: dict[str, Any], folder: str, environ: Mapping[str, str]) -> None:
        self.table = table
        self.folder = folder
        self.environ = environ
        self.looked_for: tuple[str, ...] = ()
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def config(self, source: str) -> Config:
        """Return the configuration; faulty parts are at their defaults."""
        self._override()
        self._top_level()
        defaults = self._section("defaults", Options)
        return Config(
            folders=self._folders(),
            endpoint=self._endpoint(),
            inbox=self._section("inbox", Inbox),
            outbox=self._outbox(),
            defaults=defaults.over(Options(provider="auto")),
            presets=self._presets(),
            limits=self._section("limits", Limits),
            retry=self._retry(),
            log=self._section("log", Log),
            source=source,
        )

    def named(self) -> list[Problem]:
        """Return the problems under the names that their causes have where they were written."""
        return [self._named(problem) for problem in self.problems]

    def _named(self, problem: Problem) -> Problem:
        key = re.sub(r"[-_]", "", problem.field.rpartition(".")[2].rpartition("__")[2]).lower()
        secret = problem.reason == "unknown key" and key in _KEY_NAMES
        name = self.origins.get(problem.field, problem.field)
        return Problem(_printable(name), problem.reason, _KEY_HINT if secret else problem.hint)

    def _wrong(self, field: str, reason: str, hint: str = "") -> None:
        self.problems.append(Problem(field, reason, hint))

    def _is_faulty(self, prefix: str) -> bool:
        return any(problem.field.startswith(prefix) for problem in self.problems)

    # --- the environment

    def _override(self) -> None:
        """Put ``IMAGEWATCH_SECTION__KEY`` over the tables of the file."""
        for variable in sorted(self.environ):
            section, separator, key = variable.removeprefix(_PREFIX).partition("__")
            if not variable.startswith(_PREFIX) or not separator:
                continue
            section = section.lower()
            if section == "presets":
                self._override_preset(variable, key)
            elif section in _SECTIONS:
                self._set(variable, section, key.lower(), (section,))
            else:
                self._wrong(variable, "unknown section", nearest(section, _SECTION_NAMES))

    def _override_preset(self, variable: str, rest: str) -> None:
        name, separator, key = rest.rpartition("__")
        if not separator:
            self._wrong(variable, "names no key", "write IMAGEWATCH_PRESETS__NAME__KEY")
            return
        presets = self.table.get("presets", {})
        known = presets if isinstance(presets, dict) else {}
        # Variables are upper case by custom; a preset of the file keeps its own spelling.
        spelt = next((one for one in known if one.lower() == name.lower()), name.lower())
        self._set(variable, "defaults", key.lower(), ("presets", spelt))

    def _set(self, variable: str, section: str, key: str, where: tuple[str, ...]) -> None:
        """Set one key of the table at ``where`` from a variable, if it is known and text."""
        struct, field, text = _SECTIONS[section], ".".join((*where, key)), self.environ[variable]
        if key not in struct.__struct_fields__:
            prefix = _printable(variable.rpartition("__")[0])
            known = [f"{prefix}__{one.upper()}" for one in struct.__struct_fields__]
            self._wrong(variable, "unknown key", nearest(variable, known))
        elif field in self.origins:
            self._wrong(variable, f"sets the same key as {self.origins[field]}", "remove one of them")
        elif not _is_unicode(text):
            self._wrong(variable, "is not UTF-8")
        elif (table := self._table(where)) is not None:
            is_command = key == "api_key_command" and not text.lstrip().startswith("[")
            table[key] = text if is_command or _is_text(section, struct, key) else _value(text)
            self.origins[field] = variable

    def _table(self, where: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the table at a place, made if need be; ``None`` where the file has something else."""
        table = self.table
        for name in where:
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                return None
            table = inner
        return table

    # --- sections

    def _top_level(self) -> None:
        """Report what stands outside of the known sections."""
        for name, value in self.table.items():
            if name in _SECTION_NAMES:
                continue
            home = next((one for one, struct in _SECTIONS.items() if name in struct.__struct_fields__), "")
            if isinstance(value, dict):
                self._wrong(name, "unknown section", nearest(name, _SECTION_NAMES))
            else:
                hint = f"it belongs below [{home}]" if home else nearest(name, _SECTION_NAMES)
                self._wrong(name, "unknown key", hint)

    def _section(self, name: str, struct: type[S]) -> S:
        return self._checked(self.table.get(name, {}), struct, name)

    def _checked(self, table: object, struct: type[S], where: str) -> S:
        """Return a table as a struct; everything wrong is noted."""
        if not isinstance(table, dict):
            self._wrong(where, "must be a section", f"write [{where}] on a line of its own")
            return struct()
        sound: dict[str, Any] = {}
        for key, value in table.items():
            flaw = _flaw(value) if key in struct.__struct_fields__ else ""
            if flaw:
                self._wrong(f"{where}.{key}", flaw)
            else:
                sound[key] = value
        result, problems = check(sound, struct, f"{where}.")
        for one in problems:
            self._wrong(one.field, one.reason, one.hint)
        return result

    def _path(self, path: str, field: str) -> str:
        """Return a path absolute: relative ones begin at the configuration's folder."""
        expanded = expanded_home(path, self.environ)
        if path.startswith("$"):
            hint = "write the path, or ~ for your home; a folder of such a name is ./$NAME"
            self._wrong(field, "begins with $, but variables are not expanded", hint)
        if expanded.startswith("~"):
            self._wrong(field, "names the home of an unknown user", "write ~/ or an absolute path")
        return os.path.abspath(os.path.join(self.folder, expanded))

    def _folders(self) -> Folders:
        """Return ``[folders]`` with every path absolute."""
        raw = self._section("folders", Folders)
        root = self._path(raw.root, "folders.root") if raw.root else ""
        places: dict[str, str] = {}
        for name in _PLACES:
            own = getattr(raw, name)
            fallback = os.path.join(root, name) if root else ""
            places[name] = self._path(own, f"folders.{name}") if own else fallback
        if raw.archive == _DELETE:
            places["archive"] = _DELETE
        self._missing([name for name in _PLACES if not places[name]])
        state = self._path(raw.state, "folders.state") if raw.state else self._state(places["inbox"])
        folders = Folders(root=root, state=state, **places)
        if not self._is_faulty("folders"):
            self.problems.extend(overlaps(folders))
        return folders

    def _missing(self, names: list[str]) -> None:
        """Report folders that are not set, unless a fault already reported is the cause."""
        names = [name for name in names if not self._is_faulty(f"folders.{name}")]
        if not names or self._is_faulty("folders.root") or not isinstance(self.table.get("folders", {}), dict):
            return
        if self.looked_for and len(names) == len(_PLACES):
            places = ", ".join(map(printable, self.looked_for))
            hint = 'name one with --config, or write one: "imagewatch init"; or set IMAGEWATCH_FOLDERS__ROOT'
            self._wrong("folders.root", f"is not set, and no configuration file was found; looked for: {places}", hint)
            return
        what = "is not set" if len(names) == len(_PLACES) else f"is not set, and neither is {', '.join(names)}"
        hint = 'set root = "/srv/imagewatch" below [folders] or IMAGEWATCH_FOLDERS__ROOT'
        self._wrong("folders.root", what, f'{hint}; "imagewatch init" writes a commented file')

    def _state(self, inbox: str) -> str:
        """Return the default state folder: one for each inbox, so that no two daemons share evidence."""
        given = self.environ.get("STATE_DIRECTORY", "").split(":")[0]
        if given:
            return os.path.abspath(given)
        name = hashlib.sha256(os.fsencode(inbox)).hexdigest()[:8]
        home = xdg(self.environ, "XDG_STATE_HOME", "~/.local/state")
        return os.path.abspath(os.path.join(home, "imagewatch", name))

    def _endpoint(self) -> Endpoint:
        """Return ``[endpoint]`` with its URL checked and its paths absolute."""
        table = self._table(("endpoint",))
        if table is not None:
            self._key_entries(table)
            if "base_url" not in table and self.environ.get("LETTA_BASE_URL"):
                table["base_url"] = self.environ["LETTA_BASE_URL"]
                self.origins["endpoint.base_url"] = "LETTA_BASE_URL"
        raw = self._section("endpoint", Endpoint)
        url = raw.base_url.rstrip("/")
        reason, hint = _url_flaw(url)
        if reason:
            self._wrong("endpoint.base_url", reason, hint)
        if raw.deadline_seconds < raw.connect_timeout_seconds and not self._is_faulty("endpoint."):
            self._wrong("endpoint.deadline_seconds", "is less than connect_timeout_seconds", "raise it")
        paths = {
            name: self._path(path, f"endpoint.{name}") if (path := getattr(raw, name)) else None
            for name in ("api_key_file", "ca_file")
        }
        return msgspec.structs.replace(raw, base_url=url, **paths)

    def _key_entries(self, table: dict[str, Any]) -> None:
        """Check what leads to the key. Nothing is repeated: somebody may have put the key itself there."""
        path = table.get("api_key_file", "/")
        if not isinstance(path, str) or "/" not in path:
            del table["api_key_file"]
            self._wrong("endpoint.api_key_file", "is not a path", 'write a path with a slash, as in "./key"')
        command = table.get("api_key_command", ["-"])
        if isinstance(command, str):
            command = table["api_key_command"] = _split(command)
        if not isinstance(command, list) or not command or not all(isinstance(arg, str) for arg in command):
            del table["api_key_command"]
            hint = 'write it like ["pass", "show", "letta"]'
            self._wrong("endpoint.api_key_command", "is not a command with its arguments", hint)

    def _outbox(self) -> Outbox:
        """Return ``[outbox]`` with its modes read as octal numbers."""
        table = self._table(("outbox",)) or {}
        for key in ("file_mode", "folder_mode"):
            if key in table and (mode := self._mode(key, table.pop(key))) is not None:
                table[key] = mode
        return self._section("outbox", Outbox)

    def _mode(self, key: str, value: object) -> int | None:
        """Return permission bits from text such as ``0640``; a number would have lost its base."""
        if not isinstance(value, str):
            self._wrong(f"outbox.{key}", "must be text", f'quote it: {key} = "0640"')
            return None
        mode = int(value, 8) if re.fullmatch(r"(0o)?[0-7]{3,5}", value) else -1
        if not 0 <= mode <= _MAX_MODE:
            self._wrong(f"outbox.{key}", "is not an octal mode", f'write it like {key} = "0640"')
        elif key == "folder_mode" and mode & 0o700 != 0o700:  # noqa: PLR2004
            self._wrong(f"outbox.{key}", "would lock imagewatch out of its own folders", 'begin with 7: "0750"')
        elif key == "file_mode" and mode & 0o600 != 0o600:  # noqa: PLR2004
            self._wrong(f"outbox.{key}", "would lock imagewatch out of its own files", 'begin with 6: "0640"')
        else:
            return mode
        return None

    def _presets(self) -> dict[str, Options]:
        """Return ``[presets.NAME]``; a name must be one that a folder can have."""
        presets = self.table.get("presets", {})
        if not isinstance(presets, dict):
            self._wrong("presets", "must be a section", "write [presets.NAME] on a line of its own")
            return {}
        for name in presets:
            if not name or name.startswith(".") or "/" in name or not name.isprintable():
                hint = "no slash and no dot at the beginning"
                self._wrong(f"presets.{name}", "is not a name that a folder can have", hint)
        return {name: self._checked(table, Options, f"presets.{name}") for name, table in presets.items()}

    def _retry(self) -> Retry:
        """Return ``[retry]``."""
        retry = self._section("retry", Retry)
        if retry.max_seconds < retry.initial_seconds and not self._is_faulty("retry."):
            self._wrong("retry.max_seconds", "is less than initial_seconds", "raise it")
        return retry


def _is_unicode(text: str) -> bool:
    """Return whether a variable was UTF-8; other bytes come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _split(command: str) -> list[str]:
    """Return the words of a command line, or nothing when its quotes do not match."""
    try:
        return shlex.split(command)
    except ValueError:
        return []


def overlaps(folders: Folders) -> list[Problem]:
    """Return a problem for each pair of folders that are equal or nested, also by way of links."""
    names = [name for name in (*_PLACES, "state") if getattr(folders, name) != _DELETE]
    places = {name: os.path.realpath(getattr(folders, name)) for name in names}
    problems: list[Problem] = []
    for one, two in itertools.combinations(names, 2):
        common = os.path.commonpath((places[one], places[two]))
        if common not in (places[one], places[two]):
            continue
        outer, inner = (one, two) if common == places[one] else (two, one)
        how = "is the same folder as" if places[one] == places[two] else "lies inside"
        problems.append(Problem(f"folders.{inner}", f"{how} folders.{outer}", "choose separate folders"))
    return problems
