"""The floor: the least work from a prompt to a durable receipt, with nothing that makes a crash harmless.

    python bench/floor.py ROOT URL [THREADS] [--observer]

Raw inotify, one ``httpx`` client, a response decoded by ``pybase64`` while it arrives. It waits for the disk three
times: for the image, the receipt and the folder of both. It saves nothing before it is read and has no journal, no
claims, no settling, no checks, no caps and no log. ``--observer`` uses the events of watchdog's default ``Observer``
instead.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from typing import TYPE_CHECKING, BinaryIO

import httpcore
import httpx
import pybase64
from inotify import CLOSE_WRITE, MOVED_TO, Inotify
from watchdog.events import FileSystemEventHandler
from watchdog.observers import Observer

if TYPE_CHECKING:
    from watchdog.events import FileSystemEvent

SUFFIX = ".prompt.txt"
READ_BYTES = 1 << 20
HEADERS = {"content-type": "application/json", "authorization": "Bearer bench", "accept-encoding": "identity"}


def sync(folder: str) -> None:
    """Sync a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def sync_file(file: BinaryIO) -> None:
    """Sync an open file."""
    file.flush()
    os.fsync(file.fileno())


class Decoder:
    """Decodes base64 of a response into a file, piece by piece."""

    _KEY = b'"b64_json": "'

    def __init__(self, file: BinaryIO) -> None:
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


class Floor:
    """Processes prompts on a few threads."""

    def __init__(self, root: str, url: str) -> None:
        self.inbox, self.outbox, self.archive = (os.path.join(root, name) for name in ("inbox", "outbox", "archive"))
        httpcore.HTTP11Connection.READ_NUM_BYTES = READ_BYTES
        self._client = httpx.Client(timeout=600, trust_env=False)
        self._url = url + "/v1/images/generations"
        self.names: queue.SimpleQueue[str] = queue.SimpleQueue()

    def work(self) -> None:
        """Process one prompt after the other."""
        while True:
            self.process(self.names.get())

    def process(self, name: str) -> None:
        """Process a prompt until it is in the archive."""
        stem, prompt = name.removesuffix(SUFFIX), os.path.join(self.inbox, name)
        part, out = os.path.join(self.outbox, f".{stem}"), os.path.join(self.outbox, stem)
        with open(prompt, "rb") as file:
            text = file.read().rpartition(b"+++\n")[2].decode().strip()
        with open(part, "wb", buffering=0) as image:
            self._ask(text, image)
            sync_file(image)
        os.rename(part, f"{out}.png")
        with open(part, "wb") as receipt:
            receipt.write(f'source = "{name}"\n# {"x" * 600}\n'.encode())
            sync_file(receipt)
        os.rename(part, f"{out}.receipt.toml")
        sync(self.outbox)
        os.rename(prompt, os.path.join(self.archive, name))

    def _ask(self, text: str, image: BinaryIO) -> None:
        """Send the request, and write the image of the response while it arrives."""
        body, decoder = json.dumps({"provider": "flux", "prompt": text}).encode(), Decoder(image)
        with self._client.stream("POST", self._url, content=body, headers=HEADERS) as response:
            for chunk in response.iter_raw():
                decoder.feed(chunk)


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
        if path.endswith(SUFFIX):
            self._names.put(os.path.basename(path))


def main() -> None:
    """Run until ended."""
    root, url, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    floor = Floor(root, url)
    for _ in range(threads):
        threading.Thread(target=floor.work, daemon=True).start()
    if "--observer" in sys.argv:
        observer = Observer()
        observer.schedule(Handler(floor.names), floor.inbox, recursive=False)
        observer.start()
        observer.join()
    events = Inotify()
    events.add(floor.inbox, CLOSE_WRITE | MOVED_TO)
    for event in events.read():
        if event.name.endswith(SUFFIX):
            floor.names.put(event.name)


if __name__ == "__main__":
    main()
