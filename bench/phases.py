"""Where the time of one job goes: the real daemon with a clock around its parts.

    python bench/phases.py OUT

Run it instead of ``python -m imagewatch``. When it ends it writes the milliseconds of each part as JSON. Time that one
part spends inside another counts for the inner one only.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

from imagewatch.commands import main as cli
from imagewatch.daemon import dispatch, report, results
from imagewatch.endpoint import client, pictures, saved_answer
from imagewatch.inbox import scan
from imagewatch.job import completion, delivery, folders, originals, record, spool, steps, worker
from imagewatch.journal import journal, ledger, sqlite

if TYPE_CHECKING:
    from collections.abc import Callable

PARTS: dict[str, list[tuple[Any, tuple[str, ...]]]] = {
    "fsync": [(os, ("fsync",))],
    "spool: claim, deliver, archive, forget": [
        (folders.JobFolders, ("require_room", "require_mounts")),
        (originals.Originals, ("claim", "gather")),
        (delivery.Delivery, ("deliver", "keep")),
        (spool.Spool, ("forget", "make_durable")),
        (record.Record, ("begin", "spend", "decide", "remove", "mark_over")),
    ],
    "state of the job": [(spool.Spool, ("job_state",)), (record.Record, ("decision", "attempts"))],
    "http: connect, send, receive": [(client.Client, ("send",))],
    "save: the response to disk, its images decoded": [(saved_answer.Sink, ("open", "start", "write", "finish"))],
    "read: what was not decoded": [(pictures.Pictures, ("read",)), (saved_answer.Answer, ("__init__", "sample"))],
    "check: checksums of the image": [(pictures.Pictures, ("collect",))],
    "journal: SQLite, with its syncs": [
        (sqlite.SqliteDatabase, ("change",)),
        (ledger.Ledger, ("ask",)),
        (journal.Journal, ("job", "refusal")),
    ],
    "result file and decision": [(completion.Completion, ("read", "outcome"))],
    "checks of the prompt": [(steps.Steps, ("_check",))],
    "log": [(completion.Completion, ("_report",)), (worker.Worker, ("_end_by_bug",))],
    "scan: from the event to the worker": [
        (scan.InboxScan, ("check_arrival", "more", "unchanged")),
        (dispatch.Dispatch, ("run",)),
        (results.Results, ("take",)),
        (report.Report, ("write_if_due",)),
    ],
    "worker: everything else": [(worker.Worker, ("start", "process"))],
}


class Clock:
    """Adds up the time of each part."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()
        self._here = threading.local()

    def around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time measured."""

        @functools.wraps(function)
        def timed(*arguments: Any, **named: Any) -> Any:
            inner = self._here.__dict__.setdefault("inner", [0.0])
            inner.append(0.0)
            began = time.perf_counter()
            try:
                return function(*arguments, **named)
            finally:
                took = time.perf_counter() - began
                self.spent[part] += took - inner.pop()
                self.calls[part] += 1
                inner[-1] += took

        return timed


def main() -> None:
    """Run the daemon, then write the times."""
    out, clock = sys.argv[1], Clock()
    for part, owners in PARTS.items():
        for owner, names in owners:
            for name in names:
                setattr(owner, name, clock.around(part, getattr(owner, name)))
    prepare = spool.Spool.prepare

    def forget_start(self: spool.Spool) -> None:
        prepare(self)
        clock.spent.clear()
        clock.calls.clear()

    spool.Spool.prepare = forget_start  # type: ignore[method-assign]
    sys.argv = ["imagewatch", "run"]
    try:
        cli.main()
    except SystemExit:
        with open(out, "w", encoding="utf-8") as file:
            json.dump({part: [clock.spent[part] * 1000, clock.calls[part]] for part in PARTS}, file)


if __name__ == "__main__":
    main()
