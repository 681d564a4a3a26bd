"""The rows of a table become prompts: each with its text, options, images and base name, all of them checked.

A row is known by its name: that of the column ``name``, else one that is made from all that the row asks for. So the
same row has the same name each time, and a row that was changed is another one.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import re
import tomllib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from imagewatch.commands.drop import SubmitRequest, composed, require_stem, stem_for
from imagewatch.commands.template import parse
from imagewatch.config.validate import check, nearest
from imagewatch.protocol.names import SUFFIX
from imagewatch.protocol.prompt import FrontMatter
from imagewatch.protocol.request import build, read_image
from imagewatch.protocol.similar_names import caseless
from imagewatch.protocol.values import Dropped
from imagewatch.system.errors import BadRequest, Problem
from imagewatch.system.text import printable
from imagewatch.system.untrusted import RefusedError, open_file, resolve_own_link

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from imagewatch.commands.table import Table, TableRow
    from imagewatch.commands.template import Template
    from imagewatch.config.schema import Config
    from imagewatch.protocol.values import Input

NAME = "name"
PROMPT = "prompt"
_OPTIONS = FrontMatter.__struct_fields__
_NUMBERS = ("n", "seed")
_WHOLE = re.compile(r"[+-]?[0-9]{1,18}")
_DIGITS = 10
"""Hexadecimal digits in a name that is made from a row: of 10,000 rows, two have the same once in 20,000 tables."""
_IGNORED = "#"
"""How the name of a column begins that is only for people."""
_WITHOUT_TEMPLATE = "{" + PROMPT + "}"


@dataclass(frozen=True)
class Row:
    """One prompt of a table.

    Attributes:
        line: The line of the table in which it begins.
        stem: Its base name.
        request: What it asks for.
        digest: Hash of all that it asks for.
        text: Its text as it is sent.
        fields: The body of the request, without text and images; empty if it is not known here.
    """

    line: int
    stem: str
    request: SubmitRequest
    digest: str
    text: str
    fields: Mapping[str, Any]


class Rows:
    """Makes prompts of rows.

    Args:
        table: The table.
        template: A prompt file with fields in its text, as a request; None if the column ``prompt`` has the text.
        options: Options of the command line; those of a row replace them, and they replace those of the template.
        images: Input images for each row that names none itself.
        base: The folder below which the table names images.
        folder: The folder of the inbox, as the daemon calls it.
        config: Presets, defaults, limits.
        blind: Only the folders are known, so that presets cannot be checked.
    """

    def __init__(
        self,
        table: Table,
        template: SubmitRequest | None,
        *,
        options: Mapping[str, Any],
        images: tuple[str, ...],
        base: str,
        folder: str,
        config: Config,
        blind: bool,
    ) -> None:
        self._table = table
        self._request = template or SubmitRequest(_WITHOUT_TEMPLATE, {})
        self._has_template = template is not None
        self._given = {name: value for name, value in options.items() if value is not None}
        self._images = images or self._request.images
        self._base = base
        self._folder = folder
        self._config = config
        self._blind = blind
        self._image = functools.cache(_image)

    def read(self) -> list[Row]:
        """Return all prompts.

        Raises:
            BadRequest: All problems of all rows, with their lines.
        """
        template = parse(self._request.text)
        if problems := [*self._template_problems(template), *self._column_problems(template)]:
            raise BadRequest(problems)
        rows, problems = [], []
        for one in self._table.rows:
            try:
                rows.append(self._row(one, template))
            except BadRequest as error:
                where = self._table.where(one.line)
                problems += [Problem(f"{where}: {each.field}", each.reason, each.hint) for each in error.problems]
        problems += self._repeated(rows)
        if problems:
            raise BadRequest(problems)
        return rows

    def _template_problems(self, template: Template) -> Iterator[Problem]:
        columns = self._table.columns
        for name in dict.fromkeys(template.fields):
            if name in columns:
                continue
            if not self._has_template:
                yield Problem(self._table.name, 'it has no column "prompt"', "add one, or name a --template")
                continue
            reason = f'the table has no column "{printable(name, 60)}"'
            yield Problem("template", reason, nearest(name, columns, "columns"))
        for name, value in self._request.options.items():
            if isinstance(value, str) and re.search(r"\{[^{}]*\}", value):
                hint = f"fields are for the text; give the table a column {name}"
                yield Problem("template", f"{name} has a field in braces", hint)

    def _column_problems(self, template: Template) -> Iterator[Problem]:
        known = {*_OPTIONS, NAME, *template.fields}
        for column in self._table.columns:
            shown = printable(column, 60)
            if column in _OPTIONS and column in template.fields:
                reason = f'"{shown}" is an option and also a field of the template'
                yield Problem(self._table.name, reason, "give the field another name")
            elif column not in known and not column.startswith(_IGNORED):
                reason = f'the column "{shown}" is no option and no field of the template'
                hint = f'{nearest(column, known, "columns")}; a column that begins with "{_IGNORED}" is ignored'
                yield Problem(self._table.name, reason, hint)

    def _row(self, one: TableRow, template: Template) -> Row:
        problems = [
            Problem(name, "the cell is empty", "write a value, or remove the field from the template")
            for name in dict.fromkeys(template.fields)
            if name not in one.cells
        ]
        cells = {name: cell for name, cell in one.cells.items() if name in _OPTIONS}
        front, wrong = check({name: _value(name, cell) for name, cell in cells.items()}, FrontMatter)
        images = self._images if front.input_images is None else tuple(self._path(n) for n in front.input_images)
        inputs: list[Input] = []
        for path in images:
            image = self._image(path)
            wrong += image if isinstance(image, list) else []
            inputs += [] if isinstance(image, list) else [image]
        if problems := problems + wrong:
            raise BadRequest(problems)
        own = {name: getattr(front, name) for name in cells if name != "input_images"}
        text = template.filled(one.cells)
        request = SubmitRequest(text, {**self._request.options, **self._given, **own}, images)
        digest = _digest(request, inputs)
        words = " ".join(one.cells[name] for name in template.fields) or text
        stem = one.cells.get(NAME) or stem_for(words, digest[:_DIGITS])
        require_stem(stem)
        sent, fields = self._checked(request, stem, inputs)
        return Row(one.line, stem, request, digest, sent, fields)

    def _path(self, name: str) -> str:
        return os.path.join(self._base, name)

    def _checked(self, request: SubmitRequest, stem: str, inputs: list[Input]) -> tuple[str, Mapping[str, Any]]:
        """Refuse what the daemon would refuse; return the text that is sent, and the body of the request."""
        names = tuple(f"{stem}.in{number}{_ending(item)}" for number, item in enumerate(inputs, 1))
        content = composed(request, names)
        paths = dict(zip(names, request.images, strict=True))

        def opener(path: str) -> IO[bytes]:
            name = os.path.basename(path)
            return open_file(resolve_own_link(paths[name])) if name in paths else io.BytesIO(content)

        try:
            built = build(
                Dropped(folder=self._folder, stem=stem, images=names, declared=None), "", self._config, opener
            )
        except BadRequest as error:
            problems = [one for one in error.problems if not (self._blind and one.field == "preset")]
            if problems:
                raise BadRequest(problems) from None
            return request.text.strip(), {}
        return built.prompt, built.fields

    def _repeated(self, rows: list[Row]) -> Iterator[Problem]:
        first: dict[str, Row] = {}
        for row in rows:
            other = first.setdefault(caseless(row.stem), row)
            if other is row:
                continue
            if NAME in self._table.columns and other.digest != row.digest:
                reason, hint = f'"{printable(row.stem, 60)}" is also the name of line {other.line}', "use another name"
            else:
                reason = f"the row is the same as line {other.line}"
                hint = "remove one; for more images set n, or give each row a name of its own in a column name"
            yield Problem(self._table.where(row.line), reason, hint)


def _value(name: str, cell: str) -> object:
    if name in _NUMBERS and _WHOLE.fullmatch(cell):
        return int(cell)
    if name != "input_images":
        return cell
    if not cell.startswith("["):
        return [part.strip() for part in cell.split(",") if part.strip()]
    try:
        return tomllib.loads(f"names = {cell}")["names"]
    except (tomllib.TOMLDecodeError, RecursionError):
        raise BadRequest([Problem(name, "it begins with [ and is no TOML list", "separate names by commas")]) from None


def _image(path: str) -> Input | list[Problem]:
    """Return what an image is, or what is wrong with it."""
    try:
        return read_image(resolve_own_link(path), path)
    except RefusedError as error:
        return [Problem(path, f"it {error.strerror}", "use a copy of the image")]
    except BadRequest as error:
        missing = not os.path.lexists(path)
        return [Problem(path, "no such file", "check the path of the image")] if missing else error.problems


def _ending(item: Input) -> str:
    return "." + item.mime.rpartition("/")[2]


def _digest(request: SubmitRequest, inputs: list[Input]) -> str:
    """Return the hash of all that a row asks for: text, options, and the content of its images."""
    asked = [request.text, sorted(request.options.items()), [item.sha256 for item in inputs]]
    return hashlib.sha256(json.dumps(asked).encode()).hexdigest()


def source_of(folder: str, stem: str) -> str:
    """Return the path of a prompt below the inbox."""
    return os.path.join(folder, stem + SUFFIX)
