"""The prompt file: its encodings, its ``+++`` front matter, its text. Pure.

All problems of a file are reported together, before any money is spent.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass

from imagewatch.config.schema import Options
from imagewatch.config.validate import check, shown
from imagewatch.protocol.names import NAME_MAX, SUFFIX, final_name, fits
from imagewatch.protocol.not_a_prompt import FENCE, almost_front_matter, no_prompt, without_options
from imagewatch.system.errors import BadRequest, Problem

MAX_BYTES = 256 * 1024
"""Largest prompt file: twice the size of 32,000 four-byte characters."""
MAX_FRONT = 16 * 1024
"""Longest front matter, in characters: a hostile file can make the TOML reader very slow."""
MAX_CHARACTERS = 32_000
"""Longest prompt (image-generation skill, "Request body": 1 to 32000 chars)."""
MAX_INPUTS = 14
"""Most input images of one request (image-generation skill, "Request body")."""

_BOMS = (
    (b"\xff\xfe\x00\x00", ""),
    (b"\x00\x00\xfe\xff", ""),
    (b"\xef\xbb\xbf", "utf-8"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_QUOTED = re.compile(r'"(?:\\.|[^"\\\n])*"|\'[^\'\n]*\'')
_NESTING = re.compile(r"[.\[{]")
_MAX_NESTING = 100
"""Dots and brackets outside of strings: thousands cost the TOML reader seconds; one or two are normal."""
_QUOTES = " \t'\u201c\u201d\u201e\u2018\u2019\u201a\xab\xbb"
_BARE = re.compile(rf"\s*(\w+)\s*[=:]([{_QUOTES}]*[\w.:/+-]+(?: [\w.:/+-]+)*[{_QUOTES}]*)(?:#.*)?")
"""An option whose value is text without double quotes, or with those of a word processor, and a comment."""
_TEXTS = {"provider", "model", "size", "quality", "output_format", "preset"}
_HINT_TEXT = "save it as plain text in UTF-8"
_HINT_TOML = "front matter is TOML between two lines that are exactly +++"
_HINT_ALMOST = (
    "line 1 must be exactly +++, and another line that is exactly +++ must end the options; "
    "for a text without options, begin the file with two lines +++"
)


class FrontMatter(Options, frozen=True, kw_only=True):
    """The keys that may be between the two ``+++`` lines."""

    input_images: tuple[str, ...] | None = None
    preset: str | None = None


@dataclass(frozen=True)
class Prompt:
    r"""A prompt file that can be read.

    Attributes:
        text: What is asked for, trimmed, with ``\\n`` line ends.
        front: What the front matter sets.
    """

    text: str
    front: FrontMatter

    @property
    def options(self) -> Options:
        """The request options of the front matter alone."""
        return Options(**{name: getattr(self.front, name) for name in Options.__struct_fields__})


def parse(raw: bytes, *, max_characters: int = MAX_CHARACTERS) -> Prompt:
    """Read a prompt file.

    Args:
        raw: The whole file.
        max_characters: Longest text, in characters.

    Raises:
        BadRequest: Everything that is wrong with it.
    """
    block, text = _split(_decode(raw))
    if unlike := no_prompt(text):
        raise BadRequest([Problem("prompt", *unlike)])
    problems: list[Problem] = []
    front = FrontMatter()
    if block is not None:
        front, problems = _front_matter(block)
    if not text:
        problems.append(Problem("prompt", "there is no text", "write what the image should show"))
    elif len(text) > max_characters:
        reason = f"{len(text):,} characters are more than {max_characters:,}"
        if max_characters < MAX_CHARACTERS:
            reason += " (limits.max_prompt_chars)"
        problems.append(Problem("prompt", reason, "shorten it"))
    if problems:
        raise BadRequest(problems)
    return Prompt(text, front)


def declared(raw: bytes) -> tuple[str, ...] | None:
    """Return the ``input_images`` of a prompt, also an empty list; None if it does not set them or cannot be read."""
    try:
        return parse(raw).front.input_images
    except BadRequest:
        return None


def text_for_people(raw: bytes) -> str:
    """Return the text of a prompt file without its options, also of a file that is refused.

    It is shown and never sent: what cannot be read is replaced, and options that are not valid are left out, too.
    """
    try:
        text = _decode(raw)
    except BadRequest:
        text = raw[:MAX_BYTES].decode("utf-8", "replace").replace("\0", "\ufffd").replace("\r\n", "\n")
    return without_options(text)


def _decode(raw: bytes) -> str:
    if len(raw) > MAX_BYTES:
        raise BadRequest([Problem("prompt", f"the file is larger than {MAX_BYTES // 1024} KiB", "shorten it")])
    encoding, body = "utf-8", raw
    for bom, found in _BOMS:
        if raw.startswith(bom):
            encoding, body = found, raw[len(bom) :]
            break
    if not encoding:
        raise BadRequest([Problem("prompt", "the file is in UTF-32", _HINT_TEXT)])
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(raw) - len(body) + error.start
        reason = f"not {encoding.upper()} text: byte {offset} cannot be read"
        raise BadRequest([Problem("prompt", reason, _HINT_TEXT)]) from None
    if "\0" in text:
        raise BadRequest([Problem("prompt", "the file contains NUL bytes, so it is not text", _HINT_TEXT)])
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _split(text: str) -> tuple[str | None, str]:
    """Return the front matter block, if there is one, and the text."""
    lines = text.split("\n")
    if lines[0] != FENCE:
        if reason := almost_front_matter(text):
            raise BadRequest([Problem("front matter", reason, _HINT_ALMOST)])
        return None, text.strip()
    try:
        end = lines.index(FENCE, 1)
    except ValueError:
        reason = "it opens with +++ but no second line is exactly +++"
        raise BadRequest([Problem("front matter", reason, _HINT_TOML)]) from None
    return "\n".join(lines[1:end]), "\n".join(lines[end + 1 :]).strip()


def _front_matter(block: str) -> tuple[FrontMatter, list[Problem]]:
    if len(block) > MAX_FRONT:
        return FrontMatter(), [Problem("front matter", f"more than {MAX_FRONT:,} characters", "shorten it")]
    if len(_NESTING.findall(_QUOTED.sub('""', block))) > _MAX_NESTING:
        return FrontMatter(), [Problem("front matter", "too many dots and brackets", _HINT_TOML)]
    try:
        table = tomllib.loads(block)
    except (tomllib.TOMLDecodeError, RecursionError, ValueError) as error:
        # ValueError: an integer of more digits than Python converts.
        return FrontMatter(), [Problem("front matter", f"not TOML: {_counted(error)}", _hint(block, str(error)))]
    front, problems = check(table, FrontMatter)
    if front.input_images is not None:
        problems += _input_problems(front.input_images)
    return front, problems


def _hint(block: str, error: str) -> str:
    """Return what to do about front matter that is not TOML; text without quotes is the usual mistake."""
    found, lines = re.search(r"\(at line (\d+), ", error), block.split("\n")
    line = lines[int(found[1]) - 1] if found and int(found[1]) <= len(lines) else ""
    option = _BARE.fullmatch(line)
    if option is None or option[1] not in _TEXTS:
        return _HINT_TOML
    return f'put text in double quotes: {option[1]} = "{option[2].strip(_QUOTES)}"'


def _counted(error: Exception) -> str:
    """Return a TOML error with the line number of the file, whose first line is the fence."""
    return re.sub(r"at line (\d+)", lambda match: f"at line {int(match[1]) + 1}", str(error))


def _input_problems(names: tuple[str, ...]) -> list[Problem]:
    problems: list[Problem] = []
    if len(names) > MAX_INPUTS:
        problems.append(Problem("input_images", f"{len(names)} images are more than {MAX_INPUTS}"))
    problems += [
        Problem("input_images", f"{shown(name)} {reason}") for name in names if (reason := _name_problem(name))
    ]
    if len(set(names)) < len(names):
        problems.append(Problem("input_images", "an image is named twice"))
    return problems


def _name_problem(name: str) -> str:
    if not name or "/" in name or "\\" in name or "\0" in name or name in {".", ".."}:
        return "is not the name of a file in the prompt's own folder"
    if name[0] in ".~#":
        return "is a hidden or temporary file"
    if not fits(name):  # no file can have it: to search it would be an error of the local disk
        return f"is longer than {NAME_MAX} bytes, which no file's name can be"
    if name.endswith(SUFFIX):
        return "is a prompt"
    if final_name(name):
        return "is a temporary file of a transfer or an editor"
    return ""  # its content decides whether it is an image, and of which kind
