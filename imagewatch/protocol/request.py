"""Dropped files become a valid request, before any money is spent.

All problems are reported together. The files may be hostile: each is opened without following links and without
blocking, checked by its descriptor, and what is sent later must have the same hash.
"""

from __future__ import annotations

import functools
import hashlib
import os
import stat
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from imagewatch.config.schema import Options
from imagewatch.config.validate import nearest
from imagewatch.protocol import prompt as prompts
from imagewatch.protocol.image_kinds import TEXT_SAMPLE, could_be_image, foreign, has_image_ending
from imagewatch.protocol.images import inspect
from imagewatch.protocol.names import spellings
from imagewatch.protocol.options import body_fields, choose_provider, layered
from imagewatch.protocol.values import Input
from imagewatch.system.errors import BadRequest, Outdated, Problem
from imagewatch.system.text import printable
from imagewatch.system.untrusted import RefusedError, open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from imagewatch.config.schema import Config
    from imagewatch.protocol.values import Dropped

    Opener = Callable[[str], IO[bytes]]
    """Opens a file that other people wrote; raises OSError."""

SUPPORTED = "png, jpg and webp are supported"
NO_PRESET = "there is no preset"
_UNUSED = "may be meant as an image, and is not used"
_WAYS_OUT = "list the images in input_images, or write input_images = []"
_MOST_UNUSED = 10
"""So many of them are named; the others are counted."""
_FAULTS = {
    "damage": ("it is not a whole image: {}", "drop it again"),
    "size": ("it is too large: {}", "make it smaller"),
    "form": ("it is not supported: {}", "save it with another program as png, jpg or webp"),
}


@dataclass(frozen=True)
class Part:
    """One input image of a request, still on disk.

    Attributes:
        open: Opens the file for reading.
        mime: Its type, by content.
        size: Bytes.
        sha256: Of what was validated; what is sent must be the same.
    """

    open: Callable[[], IO[bytes]]
    mime: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Request:
    """A request that may be sent.

    Attributes:
        prompt: The text.
        fields: The JSON body without ``prompt`` and ``input_images``.
        inputs: Its images, in order.
        contents: Hash of each file as dropped, by name.
        parts: The images again, as the body reads them.
    """

    prompt: str
    fields: dict[str, Any]
    inputs: tuple[Input, ...]
    contents: dict[str, str]
    parts: tuple[Part, ...]

    @property
    def prompt_sha256(self) -> str:
        """Hash of the text sent."""
        return hashlib.sha256(self.prompt.encode()).hexdigest()


def build(dropped: Dropped, where: str, config: Config, opener: Opener = open_file) -> Request:
    """Validate what was dropped and return the request for it.

    Args:
        dropped: The prompt and its images.
        where: The folder they are in now.
        config: Presets, defaults, limits.
        opener: Opens them.

    Raises:
        Outdated: The prompt does not name the images that were claimed with it.
        BadRequest: Everything that is wrong.
    """
    raw = read_prompt(os.path.join(where, dropped.prompt), opener)
    parsed = prompts.parse(raw, max_characters=config.limits.max_prompt_chars)
    _require_as_scanned(dropped, parsed.front.input_images)
    options, problems = effective(parsed.front, dropped.folder, config)
    inputs, parts, wrong = _inputs(dropped, where, config.limits.max_input_bytes, opener)
    provider = choose_provider(options, has_inputs=bool(dropped.images))
    problems += wrong + _refused_by_limits(options, provider, config)
    if provider is None:
        problems.append(unknown_family(options))
    if problems or provider is None:
        raise BadRequest(problems)
    hashes = {dropped.prompt: hashlib.sha256(raw).hexdigest()}
    hashes |= {name: item.sha256 for name, item in zip(dropped.images, inputs, strict=True)}
    return Request(parsed.text, body_fields(options, provider), inputs, hashes, parts)


def fields_of(raw: bytes, folder: str, config: Config, *, has_inputs: bool) -> dict[str, Any]:
    """Return the JSON body of the request for a prompt, without ``prompt`` and ``input_images``.

    Args:
        raw: The prompt file.
        folder: The folder below the inbox it was dropped into.
        config: Presets, defaults, limits.
        has_inputs: Whether it has input images.

    Raises:
        BadRequest: It cannot be read, or its options are wrong. Unlike ``build``, this does not check ``[limits]``.
    """
    options, problems = effective(prompts.parse(raw).front, folder, config)
    provider = choose_provider(options, has_inputs=has_inputs)
    if problems or provider is None:
        raise BadRequest(problems or [unknown_family(options)])
    return body_fields(options, provider)


def unknown_family(options: Options) -> Problem:
    """Return the problem with a model of no known provider."""
    reason = (
        f'"{printable(options.model or "", 60)}" belongs to no known family of models, so the provider is not known'
    )
    return Problem("model", reason, 'add a line like provider = "openai" (or "gemini", "flux")')


def _require_as_scanned(dropped: Dropped, names: tuple[str, ...] | None) -> None:
    """Make sure that a prompt names what it named when its images were found.

    It may have been replaced since. The new text with the old images would be charged, and wrong.
    """
    if dropped.declared is None:
        return
    scanned = dropped.images if dropped.declared else None
    if _composed(names) != _composed(scanned):
        raise Outdated(
            [
                Problem(
                    "input_images", "the prompt changed while it was claimed", "no action needed; it is checked again"
                )
            ]
        )


def _composed(names: tuple[str, ...] | None) -> list[str] | None:
    """Return names with their accents in one way."""
    return None if names is None else [spellings(name)[1] for name in names]


def contents(where: str, names: Iterable[str], most_bytes: int, opener: Opener = open_file) -> dict[str, str]:
    """Return a hash of each file that exists, by name, to recognize the same files later.

    Args:
        where: The folder they are in.
        names: Their names.
        most_bytes: Of a larger file, which cannot have been sent, size and mtime are enough.
        opener: Opens them.
    """
    found = {}
    for name in names:
        path = os.path.join(where, name)
        try:
            with opener(path) as file:
                status = os.fstat(file.fileno())
                if status.st_size > most_bytes:
                    found[name] = f"{status.st_size} bytes of {status.st_mtime_ns}"
                else:
                    found[name] = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
        except FileNotFoundError:
            continue
        except OSError:
            found[name] = "not a plain file that can be read"
    return found


def effective(front: prompts.FrontMatter, folder: str, config: Config) -> tuple[Options, list[Problem]]:
    """Return the options that count: front matter over preset over defaults, as ``options.layered`` has it."""
    problems = []
    preset = config.presets.get(folder.partition("/")[0], Options())
    if front.preset is not None:
        if front.preset in config.presets:
            preset = config.presets[front.preset]
        else:
            hint = nearest(front.preset, config.presets, "presets") if config.presets else "no presets are configured"
            problems.append(Problem("preset", f'{NO_PRESET} "{printable(front.preset, 60)}"', hint))
    own = prompts.Prompt("", front).options
    return layered((own, preset, config.defaults)), problems


def read_prompt(path: str, opener: Opener = open_file) -> bytes:
    """Read a prompt file, or a little more than the largest one.

    Args:
        path: The file.
        opener: Opens it.

    Raises:
        BadRequest: It is not a readable file.
    """
    with open_plain(path, "prompt", opener) as file:
        try:
            return file.read(prompts.MAX_BYTES + 1)
        except OSError as error:  # a share that went away, a lock of another system, a bad sector
            reason = f"cannot be read: {error.strerror or error}"
            raise BadRequest([Problem("prompt", reason, "check the disk or the share")]) from None


def open_plain(path: str, name: str, opener: Opener = open_file) -> IO[bytes]:
    """Open a file that was dropped.

    Raises:
        BadRequest: It is not there, cannot be read, or is no plain file.
    """
    try:
        return opener(path)
    except FileNotFoundError:
        raise BadRequest([Problem(name, "the file is not there", "drop it before the prompt, or with it")]) from None
    except RefusedError as error:
        raise BadRequest([Problem(name, f"it {error.strerror}", "drop a plain file")]) from None
    except OSError as error:
        reason = f"cannot be read: {error.strerror}"
        raise BadRequest([Problem(name, reason, "drop a plain file that the daemon may read")]) from None


def _inputs(
    dropped: Dropped, where: str, most_bytes: int, opener: Opener
) -> tuple[tuple[Input, ...], tuple[Part, ...], list[Problem]]:
    inputs, parts = [], []
    problems = unused_problems(dropped.unused)
    if len(dropped.images) > prompts.MAX_INPUTS:
        problems.append(Problem("images", f"{len(dropped.images)} images are more than {prompts.MAX_INPUTS}"))
    for name in dropped.images[: prompts.MAX_INPUTS]:
        path = os.path.join(where, name)
        label = printable(name, 255)
        try:
            inputs.append(read_image(path, label, most_bytes, opener))
        except BadRequest as error:
            problems += error.problems
        else:
            item = inputs[-1]
            parts.append(Part(functools.partial(open_plain, path, label, opener), item.mime, item.bytes, item.sha256))
    total = sum(item.bytes for item in inputs)
    if total > most_bytes:
        reason = f"{total:,} bytes of images are more than limits.max_input_bytes ({most_bytes:,})"
        problems.append(Problem("images", reason, "make them smaller"))
    return tuple(inputs), tuple(parts), problems


def unused_problems(names: Sequence[str]) -> list[Problem]:
    """Return why a prompt without ``input_images`` is not sent beside these files.

    Args:
        names: Files that may be meant as its images and are not used.
    """
    problems = [Problem(printable(name, 255), _UNUSED, _WAYS_OUT) for name in names[:_MOST_UNUSED]]
    if left := len(names) - len(problems):
        problems.append(Problem("images", f"{left} more such files are beside the prompt", _WAYS_OUT))
    return problems


def may_be_image(path: str, status: os.stat_result, opener: Opener = open_file) -> bool:
    """Return whether a file may be meant as an image: by the ending of its name, else by its first bytes.

    A link may point to anything, and what cannot be read may be anything. A folder is no image, nor is a pipe or a
    device without the name of one. An empty file may become one: callers wait for content first.

    Args:
        path: The file.
        status: Its ``lstat``.
        opener: Opens it.
    """
    if stat.S_ISLNK(status.st_mode):
        return True
    if has_image_ending(path):
        return not stat.S_ISDIR(status.st_mode)
    if not stat.S_ISREG(status.st_mode):
        return False
    try:
        with opener(path) as file:
            head = file.read(TEXT_SAMPLE)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return not head or could_be_image(head)


def read_image(path: str, name: str, most_bytes: int | None = None, opener: Opener = open_file) -> Input:
    """Return what an input image is.

    Args:
        path: The file.
        name: What to call it in problems.
        most_bytes: A larger one is not read: it may be a hole of a terabyte.
        opener: Opens it.

    Raises:
        BadRequest: It is no whole image of a supported kind by its content, or too large.
    """
    with open_plain(path, name, opener) as file:
        size = os.fstat(file.fileno()).st_size
        if most_bytes is not None and size > most_bytes:
            reason = f"{size:,} bytes are more than limits.max_input_bytes ({most_bytes:,})"
            raise BadRequest([Problem(name, reason, "make it smaller")])
        digest = hashlib.sha256()
        image = inspect(file, digest.update)
        if image is None:
            file.seek(0)
            kind = foreign(file.read(512)) or "not a PNG, JPEG or WebP image"
            raise BadRequest([Problem(name, f"its content is {kind}", SUPPORTED)])
        if image.fault:
            reason, hint = _FAULTS[image.fault]
            raise BadRequest([Problem(name, reason.format(image.problem), hint)])
    return Input(
        file=name,
        mime=image.mime,
        bytes=size,
        width=image.width,
        height=image.height,
        sha256=digest.hexdigest(),
        orientation=image.orientation,
    )


def _refused_by_limits(options: Options, provider: str | None, config: Config) -> list[Problem]:
    """Return where the request passes the guard rails of a folder that any user can write."""
    limits = config.limits
    problems = []
    checks = (
        ("provider", provider, limits.providers, "limits.providers"),
        ("model", options.model, limits.models, "limits.models"),
        ("quality", options.quality, limits.qualities, "limits.qualities"),
    )
    for name, value, allowed, rule in checks:
        if value is not None and allowed and value not in allowed:
            reason = f'"{printable(value, 60)}" is not allowed here by {rule}'
            problems.append(Problem(name, reason, f"allowed: {', '.join(allowed)}"))
    if options.n is not None and options.n > limits.max_n:
        problems.append(Problem("n", f"{options.n} images are more than limits.max_n ({limits.max_n})"))
    return problems
