"""The images of a paid response: decoded or downloaded into files of the job, and checked by their bytes.

Nothing here sends a request; fetching is free and tried again until a url has expired.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

import structlog

from imagewatch.endpoint.decode import Got, Reading, read
from imagewatch.endpoint.download import FetchError, bare
from imagewatch.endpoint.frames import image_name
from imagewatch.endpoint.without_key import holds_key, shown
from imagewatch.protocol.image_kinds import foreign
from imagewatch.protocol.images import Image, inspect
from imagewatch.system.disk_errors import closing, disk_errors
from imagewatch.system.text import printable
from imagewatch.system.untrusted import open_file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.endpoint.client import Client
    from imagewatch.endpoint.saved_answer import Answer
    from imagewatch.system.disk import Disk
    from imagewatch.system.folders import Tops

_FETCH_SECONDS = 600.0
"""How long the URLs of a job are tried. Known signed URLs are valid for ten minutes (BFL's skills repository)."""
_LEAST_SECONDS = 30.0
"""What a try gets however little of that is left: less would cut off whatever comes."""
_LONGEST_PAUSE = 15.0
_MOST_TRIES_4XX = 3
_log = structlog.get_logger()


@dataclass(frozen=True)
class Picture:
    """One image of a paid response, on the disk.

    Attributes:
        source: Name of its file in the record.
        image: What its bytes are, or None if they are not an image that we know.
        mime: Its type according to the endpoint.
        size: Bytes.
        sha256: Their hash.
        problem: What is wrong with it, or an empty string.
        broken: Whether its base64 could not be decoded to the end; the file is only its beginning.
    """

    source: str
    image: Image | None
    mime: str
    size: int
    sha256: str
    problem: str
    broken: bool = False

    @property
    def good(self) -> bool:
        """Whether this is what was paid for, as far as it came."""
        return self.image is not None and not self.broken

    @property
    def ending(self) -> str:
        """The ending by its bytes, not by the type that the endpoint names."""
        return f".{self.image.extension}" if self.image else ".bin"

    def table(self, name: str) -> dict[str, object]:
        """Return its table in the receipt, under its published name."""
        table: dict[str, object] = {
            "file": name,
            "mime": self.image.mime if self.image else "application/octet-stream",
            "bytes": self.size,
            "width": self.image.width if self.image else None,
            "height": self.image.height if self.image else None,
            "sha256": self.sha256,
        }
        if self.mime and self.mime != table["mime"]:
            table["declared_mime"] = printable(self.mime, 100)
        if self.image and self.image.has_credentials:
            table["content_credentials"] = True
        if self.problem:
            table["problem"] = printable(self.problem)
        return table


@dataclass
class _Wanted:
    """An image by URL.

    Attributes:
        url: From the response; not trusted.
        path: Where it goes.
        waits: Whether it is to be tried, for the first time or again.
        refused: How often its host refused it.
        problem: What went wrong at the last try, or an empty string.
    """

    url: str
    path: str
    waits: bool = True
    refused: int = 0
    problem: str = ""


class Pictures:
    """Gets the images out of responses.

    Args:
        disk: The local disk.
        client: For images by URL.
        limit: Most bytes of one response, and of one image by URL.
        monotonic: Monotonic clock, seconds: a wall clock that is set forward does not make a URL expire.
        wait: Waits some seconds.
    """

    def __init__(
        self,
        disk: Disk,
        client: Client,
        limit: int,
        *,
        monotonic: Callable[[], float],
        wait: Callable[[float], object],
    ) -> None:
        self._disk = disk
        self._client = client
        self._limit = limit
        self._now = monotonic
        self._wait = wait

    def read(self, path: Callable[[str], str], answer: Answer) -> Reading:
        """Read a paid response; its base64 images go into files of the job, unless they are in files of the response.

        Args:
            path: Returns the path of a file of the job.
            answer: The response; its images are files of the job, too.
        """
        with contextlib.closing(answer.pieces()) as pieces:
            return read(
                pieces,
                encoding=_coding(answer),
                limit=2 * self._limit,
                create=lambda number: self._create(path(f"image.{number}")),
            )

    def shown(self, answer: Answer) -> Iterator[bytes]:
        """Yield what other users may see of a paid response: without the key, and without its content coding."""
        return shown(answer.chunks(), encoding=_coding(answer), limit=2 * self._limit)

    def collect(self, path: Callable[[str], str], reading: Reading) -> list[Picture]:
        """Download the images by URL, and check every image."""
        wanted = {
            number: _Wanted(got.url, path(f"fetched.{number}")) for number, got in enumerate(reading.images) if got.url
        }
        self._fetch(list(wanted.values()))
        return [self._picture(path, number, got, wanted.get(number)) for number, got in enumerate(reading.images)]

    def _create(self, path: str) -> IO[bytes]:
        return _Ours(self._disk, path)  # type: ignore[return-value]

    def _picture(self, path: Callable[[str], str], number: int, got: Got, wanted: _Wanted | None) -> Picture:
        if wanted:
            name, problem = f"fetched.{number}", wanted.problem
        else:
            name, problem = f"image.{got.decoded}", got.problem if got.decoded is None else ""
        if got.saved is not None:
            name = image_name(got.saved)
        if problem:
            return Picture("", None, got.mime, 0, "", problem)
        return _inspected(path(name), self._disk.tops, name, got)

    def _fetch(self, wanted: list[_Wanted]) -> None:
        """Download images in rounds, until each is here, or trying again cannot help, or their URLs have expired.

        Every one is tried before any is tried again: the urls of the good hosts expire while a bad one is waited for.
        """
        until, rounds, is_last = self._now() + _FETCH_SECONDS, 0, False
        # What an earlier run has is durable; its url may not work twice.
        waiting = [one for one in wanted if not self._disk.tops.exists(one.path)]
        while waiting:
            for position, one in enumerate(waiting):
                left = until - self._now()
                if not rounds or left > 0 or is_last:
                    # Each gets a share of the time: a slow host must not use up the time of all.
                    self._try(one, round(max(left / (len(waiting) - position), _LEAST_SECONDS), 1))
            rounds += 1
            pause = min(0.25 * 2 ** min(rounds, 30), _LONGEST_PAUSE)
            waiting = [one for one in waiting if one.waits]
            # So late only if this process was stopped: then each has a second try nevertheless.
            is_last = rounds == 1 and self._now() > until + _LEAST_SECONDS * len(wanted)
            if not waiting or (self._now() + pause >= until and not is_last):
                return
            for one in waiting:
                _log.warning("download_failed", url=bare(one.url), reason=one.problem, tries=rounds)
            self._wait(pause)

    def _try(self, one: _Wanted, seconds: float) -> None:
        """Download an image if it arrives within some seconds, and note the result."""

        def write(chunk: bytes) -> None:
            with disk_errors(one.path, "write"):
                file.write(chunk)

        try:
            with self._disk.writing(one.path) as file:
                self._client.fetch(one.url, write, self._limit, seconds)
            self._disk.sync_folder(os.path.dirname(one.path))
        except FetchError as error:
            one.problem = str(error)
            one.refused += error.refused
            one.waits = not error.final and one.refused < _MOST_TRIES_4XX
        else:
            one.problem, one.waits = "", False


def _coding(answer: Answer) -> str:
    return answer.head.headers.get("content-encoding", "")


class _Ours:
    """A file whose errors are those of the local disk. It is durable when it is closed."""

    def __init__(self, disk: Disk, path: str) -> None:
        self._disk = disk
        self._file = disk.replace_leftover(path)
        self._path = path

    def write(self, content: bytes) -> int:
        with disk_errors(self._path, "write"):
            return self._file.write(content)

    def close(self) -> None:
        if not self._file.closed:
            with closing(self._file, self._path):
                self._disk.sync(self._file, self._path)


def _inspected(path: str, tops: Tops, name: str, got: Got) -> Picture:
    """Check an image by its bytes."""
    digest = hashlib.sha256()
    with open_file(path, tops) as file:
        size = os.fstat(file.fileno()).st_size
        image = inspect(file, digest.update)
        problem = got.problem
        if image is None:
            file.seek(0)
            kind = foreign(file.read(512)) or "unknown"
            problem = problem or f"not an image: its content is {kind}"
            file.seek(0)
            if holds_key(file):
                return Picture("", None, got.mime, 0, "", "not an image: it holds the API key and is not published")
        else:
            problem = problem or image.problem
    return Picture(name if size else "", image, got.mime, size, digest.hexdigest(), problem, broken=bool(got.problem))
