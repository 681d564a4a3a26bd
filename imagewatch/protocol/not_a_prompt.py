"""Text that is clearly not what should be sent: options that are not read as such, and files of other kinds. Pure.

Each rule needs more than one sign, since a prompt may be about anything: one that mentions HTML, begins with a rule of
dashes or quotes a merge marker is sent. ``docs/reference/folder-protocol.md`` has the rules for senders.
"""

from __future__ import annotations

import re

from imagewatch.config.schema import Options

FENCE = "+++"
"""The line before and after the front matter."""

_INVISIBLE = "\ufeff\u200b\u200c\u200d\u2060"
_WIDE = str.maketrans({"\uff0b": "+", "\uff0d": "-", "\uff40": "`", "\uff5e": "~"})
"""The signs of fences as an East Asian keyboard may give them."""
_FORMAT = r"\s*(?:toml|ya?ml|json|ini)?"
_PLUS = re.compile(r"\+{2,}" + _FORMAT, re.IGNORECASE)
_DASH = re.compile("---" + _FORMAT, re.IGNORECASE)
_CODE = re.compile(r"(`{3,})[^`]*|(~{3,}).*")
_KEYS = "|".join(sorted((*Options.__struct_fields__, "input_images", "preset")))
_SETS = re.compile(rf"[\"']?(?:{_KEYS})[\"']?\s*[=:]")

_OPTION = re.compile(r"[\"']?[\w.-]+[\"']?\s*[=:]|#|\[")

_RTF = re.compile(r"\{\\rtf[0-9\\}]")
_HTML = re.compile(
    r"(?>(?:<\?xml[^>]*>\s*|<!--(?:(?!-->).)*-->\s*)*)(?:<!doctype\s+html[^>]*>|<(?:html|head|body)(?:\s[^>]*)?>)"
    r"(?=.{,4096}?<(?:/?(?:html|head|body|title)|meta|link|script|h1)[\s>])",
    re.IGNORECASE | re.DOTALL,
)
"""An HTML page has at least two of its tags; its parts are searched in so many characters."""
_POINTER = re.compile(
    r"version https?://(?:git-lfs|hawser)\.github\.com/spec/\S+\n(?:.*\n)*?oid \w+:[0-9a-f]{8}|/annex/objects/\S+\Z"
)
_ARMOR = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----\n(?:.*\n)*?-----END \1-----")
_BASE64 = re.compile(r"(?:data:image/[\w.+-]+;base64,|iVBORw0KGgo|/9j/|UklGR)[A-Za-z0-9+/=_\s-]{40,}\Z")
_DROP_TEXT = "drop the text of the prompt alone, in a plain text file"
_KINDS = (
    (_RTF, "it is Rich Text (RTF), not plain text", "save it as plain text"),
    (_HTML, "it is an HTML page, such as an error page of a web server", _DROP_TEXT),
    (
        _POINTER,
        "it is a pointer of Git LFS or git-annex, not the file itself",
        "get the file: git lfs pull, git annex get",
    ),
    (_ARMOR, "it is a key, a certificate, or an encrypted or signed message", _DROP_TEXT),
    (_BASE64, "it is an image in base64, not a text", "drop the image as a file beside the prompt"),
)
_CONFLICT = re.compile(r"^(?:(<)<{6}|([=|%+-])\2{6}|(>)>{6})(?: .*)?$", re.MULTILINE)
"""A line with a marker of a merge conflict: its beginning, something between two sides, its end."""


def almost_front_matter(text: str) -> str:
    r"""Return why a text begins almost like front matter, or an empty string.

    Args:
        text: The whole file, with ``\n`` line ends; its first line is not exactly ``+++``.
    """
    stripped = (line.strip().strip(_INVISIBLE).strip() for line in text.translate(_WIDE).splitlines())
    first, *later = [line for line in stripped if line] or [""]
    if first == FENCE:
        return "its first line that is not blank is +++, but with blanks around it or blank lines before it"
    if _PLUS.fullmatch(first) or (first.startswith(FENCE) and any(_closes(line, FENCE) for line in later)):
        return f"its first line is almost +++: {first[:40]}"
    if _DASH.fullmatch(first) and later and (_SETS.match(later[0]) or "---" in later):
        return "it opens with a --- block, which is YAML"
    if (code := _CODE.fullmatch(first)) and any(_closes(line, code[1] or code[2]) for line in later):
        return f"it opens with a code block between two lines of {code[1] or code[2]}"
    end = next((number for number, line in enumerate(later) if _closes(line, FENCE)), None)
    if end is not None and all(map(_SETS.match, [first, *later[:end]])):
        return "it has options before a line +++, but no line +++ before them"
    return ""


def without_options(text: str) -> str:
    r"""Return a text without the options at its beginning, also if they are not valid or only almost front matter.

    It is shown to people and never sent.

    Args:
        text: The whole file, with ``\n`` line ends.
    """
    lines = text.split("\n")
    if lines[0] != FENCE:
        if not almost_front_matter(text):
            return text.strip()
        lines = text.splitlines()
    signs = [line.translate(_WIDE).strip().strip(_INVISIBLE).strip() for line in lines]
    first = next(number for number, line in enumerate(signs) if line)
    code = _CODE.fullmatch(signs[first])
    fence = (code[1] or code[2]) if code else "---" if _DASH.fullmatch(signs[first]) else "++"
    end = next((number for number in range(first + 1, len(lines)) if _closes(signs[number], fence)), None)
    if end is None:  # the options end where the lines do not look like options any more
        end = first
        while end + 1 < len(lines) and (not signs[end + 1] or _OPTION.match(signs[end + 1])):
            end += 1
        return "\n".join(lines[end + 1 :]).strip()
    rest, inner = "\n".join(lines[end + 1 :]).strip(), lines[first + 1 : end]
    # The whole text may be between two fences.
    return rest or ("" if any(map(_OPTION.match, signs[first + 1 : end])) else "\n".join(inner).strip())


def _closes(line: str, fence: str) -> bool:
    """Return whether a line consists of nothing but the signs of a fence, at least as many."""
    return line.startswith(fence) and not line.strip(fence[0])


def no_prompt(text: str) -> tuple[str, str] | None:
    r"""Return why a text is clearly no prompt, and what to do, or None.

    Args:
        text: The text behind the front matter, with ``\n`` line ends and nothing blank around it.
    """
    for kind, reason, hint in _KINDS:
        if kind.match(text):
            return reason, hint
    markers = "".join(found[1] or found[3] or "=" for found in _CONFLICT.finditer(text))
    if re.search("<=+>", markers):
        return "it has the markers of a merge conflict (<<<<<<<, =======, >>>>>>>)", "resolve the conflict"
    return None
