"""The text of many prompts, with fields in braces: ``A poster for {product}``. Pure.

``{{`` and ``}}`` are literal braces. A field is a column's name and nothing else: no attributes, formats or
expressions. Values are put in once and are not read again, so braces in them are only text.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from imagewatch.system.errors import BadRequest, Problem
from imagewatch.system.text import printable

if TYPE_CHECKING:
    from collections.abc import Mapping

_PART = re.compile(r"\{\{|\}\}|\{(?P<field>[^{}\n]*)\}|[{}]")
_AROUND = 20
HINT = "write a field as {column}, and a brace that is meant as text as {{ or }}"


@dataclass(frozen=True)
class Template:
    """A text with fields.

    Attributes:
        literals: What is before, between and after the fields.
        fields: The columns whose values go between them: one less than the literals.
    """

    literals: tuple[str, ...]
    fields: tuple[str, ...]

    def filled(self, values: Mapping[str, str]) -> str:
        """Return the text with values in the place of its fields; it has one for each."""
        inner = (values[name] + literal for name, literal in zip(self.fields, self.literals[1:], strict=True))
        return self.literals[0] + "".join(inner)


def parse(text: str) -> Template:
    """Read a template.

    Raises:
        BadRequest: All braces that belong to no field.
    """
    literals, fields, at, problems = [""], [], 0, []
    for match in _PART.finditer(text):
        literals[-1] += text[at : match.start()]
        at, part, name = match.end(), match[0], (match["field"] or "").strip()
        if part in {"{{", "}}"}:
            literals[-1] += part[0]
        elif name:
            fields.append(name)
            literals.append("")
        else:
            near = printable(text[max(match.start() - _AROUND, 0) : match.end() + _AROUND], 60)
            problems.append(Problem("template", f'"{part}" names no column, near "{near}"', HINT))
    literals[-1] += text[at:]
    if problems:
        raise BadRequest(problems)
    return Template(tuple(literals), tuple(fields))
