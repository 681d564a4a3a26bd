"""The baseline: the least work from a prompt to its receipt with the durable steps of one job of imagewatch.

    python bench/loop.py ROOT URL [THREADS] [--observer]

Raw inotify, one ``httpx`` client, a response decoded while it arrives. It syncs as often as imagewatch does, the same
kinds of files in the same order (``SYNCS``), and does nothing else: no settling, no checks, no recovery,
no caps, no log. ``--observer`` uses the events of watchdog's default ``Observer`` instead.
"""

from __future__ import annotations

import json
import os
import queue
import secrets
import sqlite3
import sys
import threading
import time
from typing import TYPE_CHECKING

import httpcore
import httpx
import pybase64
from inotify import CLOSE_WRITE, MOVED_TO, Inotify
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent

SYNCS = (
    "claim.json",
    "its folder",
    "the folder of jobs",
    "the folder of claims",
    "the claim",
    "the inbox",
    "the ledger's row",
    "sent.1",
    "its folder",
    "answer.1",
    "its folder",
    "the image",
    "the ledger's row",
    "decision.json",
    "its folder",
    "the image, before it is published",
    "the outbox",
    "the receipt",
    "the outbox",
    "the prompt",
    "the archive",
    "the folder of claims",
    "the job's folder",
    "the folder of jobs",
)
"""The syncs of one job. The request is sent after the ninth, the receipt is durable after the nineteenth."""
SUFFIX = ".prompt.txt"
READ_BYTES = 1 << 20


def sync(folder: str) -> None:
    """Sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write(path: str, content: bytes) -> None:
    """Write a file durably, including its name."""
    with open(path + ".tmp", "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.rename(path + ".tmp", path)
    sync(os.path.dirname(path))


class Decoder:
    """Decodes base64 of a response into a file, piece by piece."""

    _KEY = b'"b64_json": "'

    def __init__(self, file) -> None:
        self._file = file
        self._held = b""
        self._inside = False

    def feed(self, chunk: bytes) -> None:
        """Decode the next piece of the response."""
        data = self._held + chunk
        if not self._inside:
            head, found, data = data.partition(self._KEY)
            self._held = b"" if found else head
            self._inside = bool(found)
        if self._inside:
            data, quote, _ = data.partition(b'"')
            whole = len(data) - len(data) % 4
            self._file.write(pybase64.b64decode(data[:whole], validate=True))
            self._held = data[whole:]
            self._inside = not quote


class Loop:
    """Processes prompts on a few threads."""

    def __init__(self, root: str, url: str) -> None:
        folders = ("inbox", "inbox/.claims", "outbox", "archive", "jobs")
        self.inbox, self.claims, self.outbox, self.archive, self.jobs = (os.path.join(root, name) for name in folders)
        for folder in (self.inbox, self.claims, self.outbox, self.archive, self.jobs):
            os.makedirs(folder, exist_ok=True)
        httpcore.HTTP11Connection.READ_NUM_BYTES = READ_BYTES
        self._client = httpx.Client(timeout=600, trust_env=False)
        self._url = url + "/v1/images/generations"
        self._ledger = sqlite3.connect(os.path.join(root, "ledger"), check_same_thread=False, isolation_level=None)
        self._ledger.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; CREATE TABLE rows (job, row)")
        self._lock = threading.Lock()
        self.names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work(self) -> None:
        """Process one prompt after the other."""
        while True:
            self.process(self.names.get())

    def process(self, name: str) -> None:
        """Process a prompt until it is in the archive."""
        job, stem = secrets.token_hex(8), name.removesuffix(SUFFIX)
        record, claim = os.path.join(self.jobs, job), os.path.join(self.claims, job)
        prompt, out = os.path.join(claim, name), os.path.join(self.outbox, stem)
        os.mkdir(record)
        write(f"{record}/claim.json", json.dumps({"job": job, "stem": stem, "at": time.time()}).encode())
        sync(self.jobs)
        os.mkdir(claim)
        sync(self.claims)
        os.rename(os.path.join(self.inbox, name), prompt)
        sync(claim)
        sync(self.inbox)
        self.ask(record, prompt)
        with open(f"{record}/image.0", "rb") as image:
            os.fsync(image.fileno())  # it is synced already, but imagewatch does it, too
        os.rename(f"{record}/image.0", f"{out}.png")
        sync(self.outbox)
        write(f"{out}.receipt.toml", f'job = "{job}"\nsource = "{name}"\n'.encode() + b"# " + b"x" * 600 + b"\n")
        with open(prompt, "rb") as file:
            os.fsync(file.fileno())
        os.rename(prompt, os.path.join(self.archive, name))
        sync(self.archive)
        os.rmdir(claim)
        sync(self.claims)
        os.unlink(f"{record}/claim.json")
        sync(record)
        for rest in os.listdir(record):
            os.unlink(f"{record}/{rest}")
        os.rmdir(record)
        sync(self.jobs)

    def ask(self, record: str, prompt: str) -> None:
        """Send the request; write the response, the image, the rows and the decision."""
        with open(prompt, "rb") as file:
            text = file.read().rpartition(b"+++\n")[2].decode().strip()
        body = json.dumps({"provider": "flux", "prompt": text}).encode()
        self._record(record)
        write(f"{record}/sent.1", body)
        headers = {"content-type": "application/json", "authorization": "Bearer bench", "accept-encoding": "identity"}
        with open(f"{record}/image.0", "wb") as image:
            decoder = Decoder(image)
            with (
                open(f"{record}/answer.1.part", "wb") as saved,
                self._client.stream("POST", self._url, content=body, headers=headers) as response,
            ):
                for chunk in response.iter_raw():
                    saved.write(chunk)
                    decoder.feed(chunk)
                saved.flush()
                os.fsync(saved.fileno())
            os.rename(f"{record}/answer.1.part", f"{record}/answer.1")
            sync(record)
            image.flush()
            os.fsync(image.fileno())
        self._record(record)
        write(f"{record}/decision.json", b"x" * 900)

    def _record(self, record: str) -> None:
        """Write a row of the ledger, as imagewatch does before and after a request."""
        with self._lock:
            self._ledger.execute("INSERT INTO rows VALUES (?, ?)", (record, "x" * 400))


class Handler(FileSystemEventHandler):
    """The events of watchdog's default observer."""

    def __init__(self, names: queue.SimpleQueue[str]) -> None:
        self._names = names

    def on_created(self, event: FileSystemEvent) -> None:
        """Add a file that was moved in; this bench creates none in another way."""
        self._take(str(event.src_path))

    def on_moved(self, event: FileSystemEvent) -> None:
        """Add a file that was renamed inside."""
        self._take(str(event.dest_path))

    def _take(self, path: str) -> None:
        if path.endswith(SUFFIX) and ".claims" not in path:
            self._names.put(os.path.basename(path))


def main() -> None:
    """Run until ended."""
    root, url, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    loop = Loop(root, url)
    for _ in range(threads):
        threading.Thread(target=loop.work, daemon=True).start()
    if "--observer" in sys.argv:
        observer = Observer()
        observer.schedule(Handler(loop.names), loop.inbox, recursive=False)
        observer.start()
        observer.join()
    events = Inotify()
    events.add(loop.inbox, CLOSE_WRITE | MOVED_TO)
    for event in events.read():
        if event.name.endswith(SUFFIX):
            loop.names.put(event.name)


if __name__ == "__main__":
    main()
