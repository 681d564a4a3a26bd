"""The measured programs: the daemon, the floor and others. Each has its own processes and folders."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Self

from daemon import COMMAND, PAUSE, TICKS, environment
from inotify import MOVED_TO, Inotify
from stamping import SIZE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from stamping import Stamping

HERE = Path(__file__).parent
TEXT = "+++\ninput_images = []\n+++\n{} a lighthouse on a cliff at dusk, long exposure, calm sea\n"
DAEMON, FLOOR, SHELL, OBSERVER = "imagewatch", "floor", "shell", "observer"


def missing(name: str) -> str:
    """Return why a contender cannot take part, or an empty string."""
    tools = [tool for tool in ("inotifywait", "xargs", "curl", "sed") if name == SHELL and not shutil.which(tool)]
    return f"{name} is skipped: no {', no '.join(tools)} here (Debian: inotify-tools, curl)" if tools else ""


@dataclass
class Contender:
    """A measured program; ``with`` starts it, warms it up and ends it.

    Attributes:
        name: Its name.
        root: Its folders.
        endpoint: The API that it uses.
        slots: Requests at the same time.
        environ: Further environment variables.
        under: A command that runs it, such as a tracer.
        instead: A command that replaces its own.
    """

    name: str
    root: Path
    endpoint: Stamping
    slots: int = 4
    environ: dict[str, str] = field(default_factory=dict)
    under: tuple[str, ...] = ()
    instead: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        shutil.rmtree(self.root, ignore_errors=True)
        self.inbox, self.outbox, self.archive = (self.root / name for name in ("inbox", "outbox", "archive"))
        for folder in (self.inbox, self.outbox, self.archive):
            folder.mkdir(parents=True)
        self._next = 0
        self._watch = Inotify()
        self._receipts = self._watch.add(str(self.outbox), MOVED_TO)
        self._archive = self._watch.add(str(self.archive), MOVED_TO)
        self.endpoint.take(0, SIZE)
        environ = environment(self.root, self.endpoint.base_url, limits__concurrency=self.slots) | self.environ
        self._process = subprocess.Popen(
            [*self.under, *self._command()], env=environ, stderr=subprocess.DEVNULL, start_new_session=True
        )
        self._warm_up()
        return self

    def _command(self) -> list[str]:
        if self.instead:
            return list(self.instead)
        if self.name == DAEMON:
            return [*COMMAND, "run"]
        if self.name == SHELL:
            return [str(HERE / "shell.sh"), str(self.root), self.endpoint.base_url]
        mode = ["--observer"] if self.name == OBSERVER else []
        return [sys.executable, str(HERE / "floor.py"), str(self.root), self.endpoint.base_url, str(self.slots), *mode]

    def _warm_up(self) -> None:
        """Drop prompts until some are done: most programs do not find files from before they began to watch."""
        began = time.monotonic()
        while time.monotonic() < began + 60:
            if self.finish([self.drop()[0] for _ in range(3)], 1.0) is not None:
                PAUSE(0.7)
                for _ in self._watch.read(0):
                    pass
                return
        sys.exit(f"{self.name} does not work")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # the session is ours: end everything in it
        self._process.wait()
        self._watch.close()
        shutil.rmtree(self.root, ignore_errors=True)

    def stop(self) -> None:
        """Tell it to end, and wait for the end."""
        os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait(30)

    def drop(self) -> tuple[str, int]:
        """Drop a prompt by rename; return its job's name, and the time just before the rename."""
        self._next += 1
        name = f"job-{self._next:06}"
        part = self.inbox / ".part"
        part.write_text(TEXT.format(name))
        target, now = self.inbox / f"{name}.prompt.txt", time.monotonic_ns()
        part.rename(target)
        return name, now

    def finish(self, names: Iterable[str], seconds: float = 300.0) -> dict[str, int] | None:
        """Wait until prompts are in the archive.

        Returns:
            When each receipt came. None if the prompts were not done in time.
        """
        left, receipts = set(names), {}
        for event in self._watch.read(seconds):
            if event.watch == self._archive:
                left.discard(event.name.removesuffix(".prompt.txt"))
                if not left:
                    return receipts
            elif event.name.endswith(".receipt.toml"):
                receipts[event.name.removesuffix(".receipt.toml")] = event.at
        return None

    def cpu(self) -> float:
        """Return the CPU time used so far by all of its processes, seconds."""
        total = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                fields = path.read_text().rpartition(")")[2].split()
                if int(fields[3]) == self._process.pid:
                    total += sum(int(field) for field in fields[11:15])  # its own, and that of ended children
        return total / TICKS
