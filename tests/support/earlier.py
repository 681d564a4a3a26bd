"""Folders that an earlier version left behind, as stored in ``tests/data``; and what becomes of them at the next start.

``earlier.tar.xz`` has the contents of all files, each once, and ``index.json``: which files each state consists of.
``earlier.json`` has, for each state, the scenario and the kill point, what the endpoint had seen, and how it ended.
What cannot be stored: inodes and ctimes. Inodes are in ``claim.json`` and ``claims.json``, which get the new ones.
``control/passed`` is a ctime up to which prompts may be sent, and becomes the time of the restore.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tarfile
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from imagewatch.commands.main import main
from support.daemon import TESTS, Folders
from support.small_endpoint import CREDITS, SmallEndpoint

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

ARCHIVE, MANIFEST = TESTS / "data" / "earlier.tar.xz", TESTS / "data" / "earlier.json"
NO_PORT = b"127.0.0.1:00000"
"""What stored responses have in place of the host and port of the endpoint."""
_LEDGER = ("source", "outcome", "charged", "credits", "asked", "got", "status")
"""What is compared of a row of ``history --json``."""
_WITH_URLS = re.compile(r"state/(jobs|paid)/[^/]+/answer\.[^/]+")
_WITH_INODES = re.compile(r"state/((jobs|paid)/[^/]+/claim|claims)\.json")
_NOT_LEFT = {"lock", ".imagewatch-claims"}


class Entry(NamedTuple):
    """One file or folder of a state.

    Attributes:
        path: Below the root; a name that is not UTF-8 has surrogates.
        mode: With its type.
        mtime_ns: Nanoseconds since the epoch.
        inode: As it was.
        blob: Number of its content; -1 of a folder.
    """

    path: str
    mode: int
    mtime_ns: int
    inode: int
    blob: int


class State(NamedTuple):
    """One state.

    Attributes:
        scenario: What had happened.
        point: Where the daemon was killed.
        tree: Number of its folders in the archive.
        requests: How often the endpoint had received each prompt.
        charged: How often it had charged each prompt.
        end: How the version that made it finished it: what ``end_of`` returned.
    """

    scenario: str
    point: str
    tree: int
    requests: dict[str, int]
    charged: dict[str, int]
    end: dict[str, Any] | None = None


class Archive:
    """The stored folders, in memory."""

    def __init__(self, entries: list[Entry], trees: list[list[int]], blobs: list[bytes]) -> None:
        self._entries, self._trees, self._blobs = entries, trees, blobs

    @classmethod
    def read(cls, path: Path = ARCHIVE) -> Archive:
        """Read what ``make_earlier.py`` has stored."""
        with tarfile.open(path, "r:xz") as tar:
            contents = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
        index = json.loads(contents.pop("index.json"))
        blobs = [contents[f"{number:04}"] for number in range(len(contents))]
        return cls([Entry(*entry) for entry in index["entries"]], index["trees"], blobs)

    def restore(self, tree: int, root: Path, base_url: str) -> None:
        """Put the folders of a state below a root.

        Args:
            tree: Number of the state's folders.
            root: An empty folder.
            base_url: Of the endpoint that is to serve the images named in saved responses.
        """
        entries = [self._entries[number] for number in self._trees[tree]]
        inodes = {0: 0}
        for entry in entries:
            path = root / entry.path
            if entry.blob < 0:
                path.mkdir(parents=True, exist_ok=True)
            else:
                path.write_bytes(self._blobs[entry.blob])
            inodes[entry.inode] = path.stat().st_ino
        for entry in entries:
            self._translate(entry, root / entry.path, inodes, base_url)
        folders = [entry for entry in reversed(entries) if entry.blob < 0]
        for entry in [*(entry for entry in entries if entry.blob >= 0), *folders]:  # what is inside of them comes first
            (root / entry.path).chmod(entry.mode & 0o7777)
            os.utime(root / entry.path, ns=(entry.mtime_ns, entry.mtime_ns))

    def _translate(self, entry: Entry, path: Path, inodes: dict[int, int], base_url: str) -> None:
        if _WITH_URLS.fullmatch(entry.path):
            path.write_bytes(path.read_bytes().replace(NO_PORT, base_url.removeprefix("http://").encode()))
        elif _WITH_INODES.fullmatch(entry.path):
            with contextlib.suppress(ValueError):  # one that is damaged on purpose
                path.write_bytes(_with_inodes(json.loads(path.read_bytes()), inodes))
        elif entry.path == "state/control/passed":
            path.write_text(repr(time.time() + 1))


def _with_inodes(found: dict[str, Any], inodes: dict[int, int]) -> bytes:
    for name in {"inode", "folder_inode"} & set(found):
        found[name] = inodes.get(found[name], found[name])
    for file in found.get("files", {}).values():
        file[0] = inodes.get(file[0], file[0])
    return json.dumps(found, separators=(",", ":")).encode()


# What becomes of a state


def run(folders: Folders, *arguments: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed."""
    before, argv, out = dict(os.environ), sys.argv, io.StringIO()
    os.environ.clear()
    os.environ.update({"PATH": before["PATH"], "HOME": str(folders.root), **folders.environ})
    sys.argv = ["imagewatch", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()) as errors:
            main()
    except SystemExit as end:
        return int(end.code or 0), out.getvalue() or errors.getvalue()
    finally:
        sys.argv = argv
        os.environ.clear()
        os.environ.update(before)
        structlog.reset_defaults()


def end_of(archive: Archive, state: State, root: Path, settings: dict[str, str], then: Sequence[str]) -> dict[str, Any]:
    """Start this version on a state; return how everything ended, as plain values that are the same each time.

    Args:
        archive: Where the folders are stored.
        state: The state.
        root: A folder that is not there yet.
        settings: Of the configuration.
        then: A command to run afterwards; then everything is started again.
    """
    with SmallEndpoint() as endpoint:
        folders = Folders(root, endpoint.base_url, **{**settings, "limits__concurrency": "1", "log__level": "error"})
        archive.restore(state.tree, root, endpoint.base_url)
        end = _end(folders, endpoint)
        if then:
            end["command"] = run(folders, *then)[0]
            end["then"] = _end(folders, endpoint)
        charged = Counter(state.charged) + endpoint.charged
    end["charged"] = dict(charged)
    end["balanced"] = _is_balanced(end.get("then", end)["ledger"], charged.total())
    return end


def _end(folders: Folders, endpoint: SmallEndpoint) -> dict[str, Any]:
    """Start twice; return how everything ended."""
    before = Counter(endpoint.requests)
    codes = [run(folders, "once")[0]]
    first = endpoint.requests - before
    codes.append(run(folders, "once")[0])
    _, history = run(folders, "history", "--json")
    rows = json.loads(history) if history.startswith("[") else []
    claims = folders.inbox / ".imagewatch"
    left = sorted(path.relative_to(claims).as_posix() for path in claims.rglob("*") if path.is_file())
    left = [name for name in left if name not in _NOT_LEFT]
    jobs = {row["job"] for row in rows} | {name.partition("/")[0] for name in left}
    return {
        "exit_codes": codes,
        "sent": dict(first),
        "sent_again": dict(endpoint.requests - before - first),
        "files": {_plain(name, jobs): content for name, content in _published(folders).items()},
        "claimed": [_plain(name, jobs) for name in left],
        "ledger": sorted((_values(row) for row in rows), key=str),
    }


def _values(row: dict[str, Any]) -> list[Any]:
    """Return what is compared of a row. That the result of a request is not known has had two names."""
    outcome = "unknown" if row["outcome"] == "sent" else row["outcome"]
    return [({**row, "outcome": outcome})[name] for name in _LEDGER]


def _published(folders: Folders) -> dict[str, str]:
    """Return a hash of each file in the shared folders; of a result file, what it says about the charge."""
    found = {}
    for path in sorted(folders.root.rglob("*")):
        name = path.relative_to(folders.root).as_posix()
        if path.is_file() and not name.startswith(("inbox/.imagewatch/", "imagewatch-status.")):
            content = path.read_bytes()
            charged = re.search(rb'^charged = "(\w+)"$', content, re.MULTILINE)
            is_result = name.endswith((".receipt.toml", ".error.toml"))
            port = folders.environ["LETTA_BASE_URL"].encode()
            digest = hashlib.sha256(content.replace(port, b"")).hexdigest()[:12]
            found[name] = charged[1].decode() if is_result and charged else digest
    return found


def _plain(name: str, jobs: set[str]) -> str:
    """Return a name without what is random in it: the id of a job, or the part of it that makes a name free."""
    for job in jobs:
        name = name.replace(job, "JOB").replace(job[:4], "TAG") if len(job) == 16 else name
    return name


def _is_balanced(ledger: list[list[Any]], charged: int) -> bool:
    """Return whether the ledger has every charge of the endpoint and no other.

    A charge of unknown amount or certainty may be one or none.
    """
    rows = [dict(zip(_LEDGER, row, strict=True)) for row in ledger]
    known = sum(row["credits"] or 0.0 for row in rows)
    unknown = CREDITS * sum(row["credits"] is None and row["charged"] != "no" for row in rows)
    return bool(known <= CREDITS * charged <= known + unknown)
