"""The tables of a configuration: those of the file, the environment over them, and where each value comes from."""

from __future__ import annotations

import re
import tomllib
from typing import TYPE_CHECKING, Any, Final

import msgspec

from imagewatch.config.dsn import PASSWORD_HINT
from imagewatch.config.schema import NAMED, SECTIONS
from imagewatch.config.validate import nearest
from imagewatch.system.errors import Problem

if TYPE_CHECKING:
    from collections.abc import Mapping

KEY_HINT: Final = "put the key in a file and name it in api_key_file"
SECTION_NAMES: Final = (*SECTIONS, *NAMED)
_SECRET_HINTS: Final = {
    "notify": "put the secret in a file and name it in secret_file",
    "shared": PASSWORD_HINT,
}
_PREFIX: Final = "IMAGEWATCH_"
_KEY_NAMES: Final = frozenset(
    {"apikey", "key", "lettaapikey", "token", "apitoken", "bearer", "authorization", "secret", "password", "pgpassword"}
)


class Tables:
    """Tables that are not checked yet, and everything that is wrong with them.

    Args:
        table: The file's.
        environ: The environment: ``IMAGEWATCH_SECTION__KEY`` and others.

    Attributes:
        table: The tables.
        environ: The environment.
        origins: The variable from which a key comes, by the key's dotted name.
        problems: Everything that is wrong.
    """

    def __init__(self, table: dict[str, Any], environ: Mapping[str, str]) -> None:
        self.table = table
        self.environ = environ
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []

    def named(self) -> list[Problem]:
        """Return the problems under the names that their causes have where they were written."""
        return [self._named(problem) for problem in self.problems]

    def _named(self, problem: Problem) -> Problem:
        key = re.sub(r"[-_]", "", problem.field.rpartition(".")[2].rpartition("__")[2]).lower()
        secret = problem.reason == "unknown key" and key in _KEY_NAMES
        name = self.origins.get(problem.field, problem.field)
        section = problem.field.lower().removeprefix("imagewatch_").replace("__", ".").partition(".")[0]
        hint = _SECRET_HINTS.get(section, KEY_HINT)
        return Problem(_printable(name), problem.reason, hint if secret else problem.hint)

    def _wrong(self, field: str, reason: str, hint: str = "") -> None:
        self.problems.append(Problem(field, reason, hint))

    def _is_faulty(self, prefix: str) -> bool:
        return any(problem.field.startswith(prefix) for problem in self.problems)

    def _override(self) -> None:
        """Put ``IMAGEWATCH_SECTION__KEY`` over the tables of the file."""
        for variable in sorted(self.environ):
            section, separator, key = variable.removeprefix(_PREFIX).partition("__")
            if not variable.startswith(_PREFIX) or not separator:
                continue
            section = section.lower()
            if section in NAMED:
                self._override_named(variable, section, key)
            elif section in SECTIONS:
                self._set(variable, SECTIONS[section], key.lower(), (section,))
            else:
                self._wrong(variable, "unknown section", nearest(section, SECTION_NAMES))

    def _override_named(self, variable: str, section: str, rest: str) -> None:
        name, separator, key = rest.rpartition("__")
        if not separator:
            self._wrong(variable, "names no key", f"write IMAGEWATCH_{section.upper()}__NAME__KEY")
            return
        tables = self.table.get(section, {})
        known = tables if isinstance(tables, dict) else {}
        # Variables are upper case by custom; what is in the file keeps its own spelling.
        spelt = [one for one in known if one.lower() == name.lower()]
        if name in spelt:
            spelt = [name]
        if len(spelt) > 1:
            self._wrong(variable, f"may mean {' or '.join(map(_printable, spelt))}", "write the name as in the file")
            return
        self._set(variable, NAMED[section], key.lower(), (section, *(spelt or [name.lower()])))

    def _set(self, variable: str, struct: type[msgspec.Struct], key: str, where: tuple[str, ...]) -> None:
        """Set one key of the table at ``where`` from a variable, if it is known and text."""
        field, text = ".".join((*where, key)), self.environ[variable]
        if key not in struct.__struct_fields__:
            prefix = _printable(variable.rpartition("__")[0])
            known = [f"{prefix}__{one.upper()}" for one in struct.__struct_fields__]
            self._wrong(variable, "unknown key", nearest(variable, known))
        elif field in self.origins:
            self._wrong(variable, f"sets the same key as {self.origins[field]}", "remove one of them")
        elif not _is_unicode(text):
            self._wrong(variable, "is not UTF-8")
        elif (table := self._table(where)) is not None:
            is_command = key in {"api_key_command", "command"} and not text.lstrip().startswith("[")
            table[key] = text if is_command or _is_text(where[0], struct, key) else _value(text)
            self.origins[field] = variable

    def _table(self, where: tuple[str, ...]) -> dict[str, Any] | None:
        """Return the table at a place, created if need be; ``None`` where the file has something else."""
        table = self.table
        for name in where:
            inner = table.setdefault(name, {})
            if not isinstance(inner, dict):
                return None
            table = inner
        return table

    def _top_level(self) -> None:
        """Report what is outside of the known sections."""
        for name, value in self.table.items():
            if name in SECTION_NAMES:
                continue
            home = next((one for one, struct in SECTIONS.items() if name in struct.__struct_fields__), "")
            if isinstance(value, dict):
                self._wrong(name, "unknown section", nearest(name, SECTION_NAMES))
            else:
                hint = f"it belongs below [{home}]" if home else nearest(name, SECTION_NAMES)
                self._wrong(name, "unknown key", hint)


def parse(text: str, name: str = "") -> tuple[dict[str, Any], Problem | None]:
    """Return the tables of a TOML text, or where it is not TOML; the message names line and column."""
    try:
        return tomllib.loads(text), None
    except tomllib.TOMLDecodeError as error:
        return {}, _not_toml(text, name, error)
    except ValueError:  # not a TOMLDecodeError: a number of thousands of digits
        return {}, Problem(name, "a number is too long")
    except RecursionError:
        return {}, Problem(name, "is nested too deeply")


def _not_toml(text: str, name: str, error: tomllib.TOMLDecodeError) -> Problem:
    """Return where a text is not TOML, and what to do; a section or a key that is there twice is the usual mistake."""
    reason = repr(str(error))[1:-1][-120:]  # its end is the position
    if found := re.fullmatch(r"Cannot declare .* twice \(at line (\d+), .*\)", str(error)):
        lines = [line.partition("#")[0].strip() for line in text.split("\n")]
        number = int(found[1])
        header = lines[number - 1] if number <= len(lines) else ""
        earlier = lines.index(header) + 1 if header in lines[: number - 1] else 0
        where = f"it is in line {earlier} already" if earlier else "it is in the file already"
        section = _printable(header) if header else "a section"
        return Problem(name, f"{section} is there twice (at line {number})", f"{where}: put the keys there")
    if str(error).startswith("Cannot overwrite a value"):
        return Problem(name, f"a key is there twice: {reason}", "keep one of them")
    return Problem(name, reason, "put text in double quotes; # begins a comment")


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
    table, problem = parse(f"value = {text}")
    return table["value"] if problem is None and set(table) == {"value"} else text


def _is_unicode(text: str) -> bool:
    """Return whether a variable was UTF-8; other bytes come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
