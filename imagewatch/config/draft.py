"""Makes a configuration of its tables: each section checked, paths absolute, everything that is wrong noted."""

from __future__ import annotations

import hashlib
import os
import re
from typing import TYPE_CHECKING, Any, Final, TypeVar

import msgspec

from imagewatch.config.dsn import WRITE_DATABASE, database_flaw
from imagewatch.config.locate import expanded_home, xdg
from imagewatch.config.schema import (
    DELETE,
    OFF,
    Config,
    Endpoint,
    FolderBudget,
    Folders,
    Inbox,
    Limits,
    Log,
    Notify,
    Options,
    Outbox,
    Retry,
    Shared,
)
from imagewatch.config.tables import Tables
from imagewatch.config.validate import check
from imagewatch.config.values import (
    PLACES,
    above_status,
    flaw_of,
    name_flaw,
    overlaps,
    split_command,
    url_flaw,
    webhook_flaw,
)
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

S = TypeVar("S", bound=msgspec.Struct)
_MAX_MODE: Final = 0o7777
_ESCAPED_BYTE: Final = re.compile(r"\\udc[89a-f][0-9a-f]")
_FIRST_LEVEL: Final = "name a folder directly in the inbox; its budget counts for everything below it"


class Draft(Tables):
    """A configuration in the making.

    Args:
        table: The file's tables.
        folder: The folder of the file, from which relative paths begin.
        environ: The environment.

    Attributes:
        searched: Where a file was searched, if there is none.
    """

    def __init__(self, table: dict[str, Any], folder: str, environ: Mapping[str, str]) -> None:
        super().__init__(table, environ)
        self.folder = folder
        self.searched: tuple[str, ...] = ()

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
            presets=self._named_tables("presets", Options),
            limits=self._section("limits", Limits),
            budgets=self._named_tables("budgets", FolderBudget),
            notify=self._notify(),
            shared=self._shared(),
            retry=self._retry(),
            log=self._section("log", Log),
            source=source,
        )

    def _section(self, name: str, struct: type[S]) -> S:
        return self._checked(self.table.get(name, {}), struct, name)

    def _checked(self, table: object, struct: type[S], where: str) -> S:
        """Return a table as a struct; everything wrong is noted."""
        if not isinstance(table, dict):
            self._wrong(where, "must be a section", f"write [{where}] on a line of its own")
            return struct()
        sound: dict[str, Any] = {}
        for key, value in table.items():
            flaw = flaw_of(value) if key in struct.__struct_fields__ else ""
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
            hint = "write the path, or ~ for your home folder; for a folder whose name begins with $, write ./$NAME"
            self._wrong(field, "begins with $, but variables are not expanded", hint)
        if expanded.startswith("~"):
            self._wrong(field, "names the home of an unknown user", "write ~/ or an absolute path")
        return os.path.abspath(os.path.join(self.folder, expanded))

    def _folders(self) -> Folders:
        """Return ``[folders]`` with every path absolute."""
        raw = self._section("folders", Folders)
        root = self._path(raw.root, "folders.root") if raw.root else ""
        places: dict[str, str] = {}
        for name in PLACES:
            own = getattr(raw, name)
            fallback = os.path.join(root, name) if root else ""
            places[name] = self._path(own, f"folders.{name}") if own else fallback
        if raw.archive == DELETE:
            places["archive"] = DELETE
        self._missing([name for name in PLACES if not places[name]])
        state = self._path(raw.state, "folders.state") if raw.state else self._state(places["inbox"])
        folders = Folders(root=root, state=state, **places)
        if not self._is_faulty("folders"):
            self.problems.extend(overlaps(folders))
        return msgspec.structs.replace(folders, notice=self._notice(raw.notice, folders))

    def _notice(self, own: str, folders: Folders) -> str:
        """Return the folder for the status files, or an empty string if there are none."""
        if own == OFF or not (own or folders.root):
            return ""
        path = self._path(own, "folders.notice") if own else folders.root
        above = "" if self._is_faulty("folders") else above_status(path, folders)
        if not above:
            return path
        if own:
            hint = "choose a folder that users can read, such as the one that contains inbox"
            self._wrong("folders.notice", f"is inside folders.{above}", hint)
        return ""

    def _missing(self, names: list[str]) -> None:
        """Report folders that are not set, unless a fault already reported is the cause."""
        names = [name for name in names if not self._is_faulty(f"folders.{name}")]
        if not names or self._is_faulty("folders.root") or not isinstance(self.table.get("folders", {}), dict):
            return
        if self.searched and len(names) == len(PLACES):
            places = ", ".join(map(printable, self.searched))
            hint = "to write one, run: imagewatch init; or name one with --config, or set IMAGEWATCH_FOLDERS__ROOT"
            self._wrong("folders.root", f"is not set, and no configuration file was found; searched: {places}", hint)
            return
        what = "is not set" if len(names) == len(PLACES) else f"is not set, and neither is {', '.join(names)}"
        hint = 'set root = "/srv/imagewatch" below [folders] or IMAGEWATCH_FOLDERS__ROOT'
        self._wrong("folders.root", what, f"{hint}; to get a file with comments, run: imagewatch init")

    def _state(self, inbox: str) -> str:
        """Return the default state folder: one for each inbox, so that no two daemons share job records."""
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
        reason, hint = url_flaw(url)
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
        """Check where the key comes from. No value is repeated: it may be the key itself."""
        path = table.get("api_key_file", "/")
        if not isinstance(path, str) or "/" not in path:
            del table["api_key_file"]
            self._wrong("endpoint.api_key_file", "is not a path", 'write a path with a slash, as in "./key"')
        command = table.get("api_key_command", ["-"])
        if isinstance(command, str):
            command = table["api_key_command"] = split_command(command)
        if not isinstance(command, list) or not command or not all(isinstance(arg, str) for arg in command):
            del table["api_key_command"]
            hint = 'write it like ["pass", "show", "letta"]'
            self._wrong("endpoint.api_key_command", "is not a command with its arguments", hint)

    def _notify(self) -> Notify:
        """Return ``[notify]``. Neither command nor URL is repeated in a problem: they may hold a secret."""
        table = self._table(("notify",)) or {}
        command = table.get("command", ["-"])
        if isinstance(command, str):
            command = table["command"] = split_command(command)
        if not isinstance(command, list) or not command or not all(isinstance(arg, str) for arg in command):
            del table["command"]
            hint = 'write it like ["/usr/local/bin/notify", "--quiet"]'
            self._wrong("notify.command", "is not a command with its arguments", hint)
        raw = self._section("notify", Notify)
        if raw.url is not None and (flaw := webhook_flaw(raw.url)):
            self._wrong("notify.url", flaw, 'write it like "https://ntfy.example.com/images"')
        path = self._path(raw.secret_file, "notify.secret_file") if raw.secret_file else None
        words = raw.command
        if words and "/" in words[0]:
            words = (self._path(words[0], "notify.command"), *words[1:])
        return msgspec.structs.replace(raw, command=words, secret_file=path)

    def _shared(self) -> Shared:
        """Return ``[shared]``. The value of ``database`` is never repeated: it may hold a password."""
        table = self._table(("shared",)) or {}
        database = table.get("database", "")
        reason, hint = database_flaw(database) if isinstance(database, str) else ("must be text", WRITE_DATABASE)
        if reason:
            del table["database"]
            self._wrong("shared.database", reason, hint)
        for key in ("account", "instance", "inbox"):
            name = table.get(key)
            if isinstance(name, str) and (flaw := name_flaw(name, may_be_empty=key != "account")):
                del table[key]
                self._wrong(f"shared.{key}", flaw)
        return self._section("shared", Shared)

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
            self._wrong(
                f"outbox.{key}", "would take away the daemon's access to its own folders", 'begin with 7: "0750"'
            )
        elif key == "file_mode" and mode & 0o600 != 0o600:  # noqa: PLR2004
            self._wrong(f"outbox.{key}", "would take away the daemon's access to its own files", 'begin with 6: "0640"')
        else:
            return mode
        return None

    def _named_tables(self, section: str, struct: type[S]) -> dict[str, S]:
        """Return the tables of a section such as ``[presets.NAME]``; a name must be one that a folder can have."""
        tables = self.table.get(section, {})
        if not isinstance(tables, dict):
            self._wrong(section, "must be a section", f"write [{section}.NAME] on a line of its own")
            return {}
        for name in tables:
            if not name or name.startswith(".") or "/" in name or not name.isprintable():
                hint = _FIRST_LEVEL if section == "budgets" else "use a name without a slash or a leading dot"
                self._wrong(f"{section}.{name}", "is not a valid folder name", hint)
            elif section == "budgets" and name[0] in "@#~$":
                reason = "is a folder that is never entered: its name begins with @, #, ~ or $"
                self._wrong(f"{section}.{name}", reason, _FIRST_LEVEL)
            elif section == "budgets" and _ESCAPED_BYTE.search(name):  # what is spent in the two would be one sum
                reason = "has a part like \\udcff, which is how the ledger writes a name that is not UTF-8"
                self._wrong(f"{section}.{name}", reason, "rename the folder")
        return {name: self._checked(table, struct, f"{section}.{name}") for name, table in tables.items()}

    def _retry(self) -> Retry:
        """Return ``[retry]``; its longest wait is not less than the first."""
        retry = self._section("retry", Retry)
        if retry.max_seconds < retry.initial_seconds and not self._is_faulty("retry."):
            self._wrong("retry.max_seconds", "is less than initial_seconds", "raise it")
        return retry
