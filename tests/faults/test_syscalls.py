"""The real command is killed at its system calls, from outside, and started again; or one of them fails, or lasts long.

strace does that (``tracing.py``), so the choice of points does not depend on our code: they include SQLite's writes
and the sockets. A point is a system call and its number within its thread, counted from the time at which the
configuration is read. A run without a fault shows the points; those are used whose path or descriptor is in our
folders, and the sockets.

The process is killed at every call that changes something, here or at the API. It is killed before the call
happens, so "before call N" for all N is also "after call N - 1". Calls that only read need no kill: the disk is the
same at the next call that changes it. Opening for reading is among the calls that fail, however. A call that lasts
long is also a process that was stopped, or got no time, right after it.

``IMAGEWATCH_ALL_SYSCALLS=1 .venv/bin/python -m pytest -n 0 tests/faults/test_syscalls.py`` kills at every point,
fails every third one and delays every second one, in half an hour on two cores, and reports how many of each call were
hit.
Without the variable one or none of each call is used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
import sys
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from support import noon
from support.audit import ORDERS, Audit, Order, drop
from support.daemon import KEY, Folders, Running
from support.tracing import KILL, Fault, Point, Traced, reason_not_to_trace, trace

from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

ALL = os.environ.get("IMAGEWATCH_ALL_SYSCALLS") == "1"
FAILING = (
    *("openat", "write", "pwrite64", "ftruncate", "fallocate", "fsync", "fdatasync", "fchmod", "fchown", "utimensat"),
    *(
        "rename",
        "renameat",
        "renameat2",
        "link",
        "linkat",
        "symlinkat",
        "unlink",
        "unlinkat",
        "mkdir",
        "mkdirat",
        "rmdir",
    ),
)
KILLING = (*FAILING, "connect", "sendto", "recvfrom", "flock")
FULL, BROKEN = "error=ENOSPC", "error=EIO"
LONG = "delay_exit=2000000"
"""Longer than the deadline of a request."""


@dataclass(frozen=True)
class Scene:
    """Prompts, and how the daemon is set up for them.

    Attributes:
        orders: The prompts.
        concurrency: Requests at the same time. With one, every run reaches the same points.
        cap: ``limits.credits_per_day``, 0 without; it is removed before the last start.
        deadline: ``endpoint.deadline_seconds``; empty: as it is.
    """

    orders: dict[str, Order]
    concurrency: int = 1
    cap: int = 0
    deadline: str = ""

    def folders(self, root: Path, sandbox: Sandbox) -> Folders:
        settings = {"limits__concurrency": str(self.concurrency), "log__level": "error"}
        if self.cap:
            settings |= {"limits__credits_per_day": str(self.cap), "limits__assumed_credits": "30"}
        if self.deadline:
            settings |= {"endpoint__deadline_seconds": self.deadline, "endpoint__connect_timeout_seconds": "1"}
        return drop(Folders(root, sandbox.base_url, **settings), self.orders)


PLAIN = Scene(ORDERS)
SHORT = Scene(ORDERS, deadline="1.5")
CAPPED = Scene(
    {
        "cat": Order("a cat"),
        "dog": Order("a dog [sandbox: b64]"),
        "bad": Order("nothing nice [sandbox: 400]", destination="errors", charged="no"),
        "busy": Order("a busy day [sandbox: once 429-plain]"),
        "owl": Order("an owl"),
        "wrong": Order("+++\ncolour = 1\n+++\nnever sent", destination="errors", charged="no"),
        "fox": Order("a fox"),
    },
    concurrency=3,
    cap=60,
)
"""Each image costs 30 at the sandbox: two of five may be completed before the cap is removed."""


@dataclass(frozen=True)
class Trial:
    """The result of one fault.

    Attributes:
        fault: The fault, the last one if there were several.
        hit: Whether the fault hit one of our calls; threads take turns in any order, so sometimes none gets there.
        violation: What was wrong, with the faults and all output; empty if nothing was.
    """

    fault: Fault
    hit: bool
    violation: str = ""


class InboxRun:
    """One inbox full of prompts, from its first start to its audit.

    Args:
        root: An empty folder.
        scene: What is in the inbox.
        sandbox: The endpoint.
    """

    def __init__(self, root: Path, scene: Scene, sandbox: Sandbox) -> None:
        if scene.cap:
            noon.day_lasts()
        self.folders = scene.folders(root, sandbox)
        self.output: list[str] = []
        self._scene = scene
        self._sandbox = sandbox
        self._faults: list[Fault] = []

    def inject(self, fault: Fault) -> bool:
        """Start under strace with a fault; return whether it hit our calls and no others."""
        self._faults.append(fault)
        traced = trace(self.folders, [fault.point.call], fault)
        hits = traced.struck(fault)
        self.output += [f"{fault}: ended with {traced.code}: {traced.output}", traced.log[-2000:]]
        if fault.what == KILL and hits:
            return all(hits)
        if all(hits):
            assert traced.code in {0, 1, 69, 74}
            assert "Traceback" not in traced.output
        return bool(hits) and all(hits)

    def watch(self) -> Traced:
        """Start under strace without a fault."""
        return trace(self.folders, KILLING)

    def end(self) -> None:
        """Start without strace until all jobs are finished, and check the result."""
        if self._scene.cap:
            assert self._sandbox.report()["credits"] <= self._scene.cap
            self._start({0, 1, 69})
            assert self._sandbox.report()["credits"] <= self._scene.cap
            del self.folders.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"]
        self._start({0, 1})
        what = [fault.what for fault in self._faults]
        # A full disk loses nothing; a kill or a broken disk may lose responses in flight.
        kills_and_failures = self._scene.concurrency * (len(what) - what.count(FULL))
        refused = what.count(KILL) < len(what)
        Audit(self.folders, self._sandbox.report(), self._scene.orders, kills_and_failures, refused=refused).check()

    def _start(self, expected: set[int]) -> None:
        daemon = Running(self.folders, "once")
        with daemon.process:
            try:
                code = daemon.wait(60)
            finally:
                daemon.process.kill()
        self.output.append(f"then ended with {code}: {daemon.output}")
        assert code in expected


def tried(root: Path, scene: Scene, *faults: Fault) -> Trial:
    """Inject faults into one start after the other, then check."""
    root.mkdir()
    inbox_run = None
    with Sandbox(key=KEY) as sandbox:
        try:
            inbox_run = InboxRun(root, scene, sandbox)
            hit = [inbox_run.inject(fault) for fault in faults][-1]
            inbox_run.end()
        except Exception:  # noqa: BLE001  every violation is reported at the end
            texts = [", then ".join(map(str, faults)), traceback.format_exc(), *(inbox_run.output if inbox_run else ())]
            return Trial(faults[-1], hit=True, violation="\n".join(texts))
    shutil.rmtree(root)
    return Trial(faults[-1], hit)


def tried_until_hit(root: Path, scene: Scene, found: Iterable[Point], *faults: Fault) -> Trial:
    """Repeat from the beginning until the last fault hits: at these points, half way to them, and at the first ones.

    The points are those of other starts. Which ones a start reaches depends on timing (``reached``). If an earlier
    fault comes too late, nothing may be left to do for the next start.
    """
    for stage in (1.0, 0.5, 0.0):
        earlier = [replace(fault, point=before(fault.point, found, stage)) for fault in faults]
        trial = tried(root.with_name(f"{root.name}-{stage}"), scene, *earlier)
        if trial.hit or trial.violation:
            break
    return trial


def before(point: Point, found: Iterable[Point], stage: float) -> Point:
    """Return a point of the same call: the first one that was found at stage 0, the point itself at stage 1."""
    same = sorted({point, *(other for other in found if other.call == point.call and other < point)})
    return same[int((len(same) - 1) * stage)]


def points(root: Path, scene: Scene, *faults: Fault) -> dict[Point, str]:
    """Return the points of a start without a fault, after others with faults.

    The folder is as deep as those of the trials: the daemon syncs each folder above its own.
    """
    root.mkdir()
    with Sandbox(key=KEY) as sandbox:
        inbox_run = InboxRun(root, scene, sandbox)
        for fault in faults:
            inbox_run.inject(fault)
        traced = inbox_run.watch()
        assert traced.code in {0, 1, 69}, traced.output
        inbox_run.end()
        return traced.points()


def reached(root: Path, scene: Scene, *faults: Fault) -> dict[Point, str]:
    """Return the points that two of three starts reached, after others with faults.

    Timing decides in how many parts a response is written, and how often the status is. Sometimes a second thread
    gets a job because the first one is not idle yet; then each thread reaches only half of the points.
    """
    starts = [points(root / name, scene, *faults) for name in "012"]
    times = Counter(point for start in starts for point in start)
    found = {point: line for start in starts for point, line in start.items()}
    return {point: line for point, line in found.items() if times[point] > 1}


def to_kill(found: dict[Point, str]) -> list[Point]:
    return [point for point, line in found.items() if point.call != "openat" or "O_CREAT" in line]


def to_fail(found: dict[Point, str]) -> list[Point]:
    return [point for point in found if point.call in FAILING]


def few(chosen: Iterable[Point]) -> list[Point]:
    """Choose one of each call, at different stages of the run; not at its end, which many starts do not reach.

    A start that is traced more slowly writes a response in more parts and so reaches higher numbers.
    """
    by_call: dict[str, list[Point]] = {}
    for point in sorted(chosen):
        by_call.setdefault(point.call, []).append(point)
    stages = len(by_call)
    return [same[int(len(same) * 0.75 * (stage + 0.5) / stages)] for stage, same in enumerate(by_call.values())]


@pytest.fixture(scope="module")
def can_trace() -> None:
    if reason := reason_not_to_trace():
        pytest.skip(reason)


@pytest.fixture(scope="module")
def plain(can_trace: None, tmp_path_factory: pytest.TempPathFactory) -> dict[Point, str]:
    return reached(tmp_path_factory.mktemp("plain"), PLAIN)


@pytest.fixture(scope="module")
def capped(can_trace: None, tmp_path_factory: pytest.TempPathFactory) -> dict[Point, str]:
    return reached(tmp_path_factory.mktemp("capped"), CAPPED)


@pytest.fixture
def try_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Counter[str]]:
    """Try a list of faults, several at a time; return and print how many of each call were hit."""

    def tryer(
        scene: Scene, found: Iterable[Point], faults: Iterable[tuple[Fault, ...]], least: int | None = None
    ) -> Counter[str]:
        began = time.monotonic()
        with ThreadPoolExecutor(3) as pool:
            trials = list(
                pool.map(lambda job: tried_until_hit(tmp_path / str(job[0]), scene, found, *job[1]), enumerate(faults))
            )
        hit = Counter(trial.fault.point.call for trial in trials if trial.hit)
        missed = [str(trial.fault) for trial in trials if not trial.hit]
        texts = ", ".join(missed) or "none"
        violations = [trial.violation for trial in trials if trial.violation]
        with capsys.disabled():
            sys.stdout.write(
                f"\n{hit.total()} points hit ({', '.join(f'{call} {n}' for call, n in hit.most_common())}), "
                f"not reached: {texts}; {len(violations)} violations; {time.monotonic() - began:.0f} s\n"
            )
        assert not violations, f"{len(violations)} violations\n" + "\n\n".join(violations)
        # Several workers take turns in any order, so one of them alone does not always get that far.
        wanted = (0.9 if scene.concurrency == 1 else 0.6) * len(trials) if least is None else least
        assert hit.total() >= wanted, f"not reached: {texts}"
        return hit

    return tryer


def test_the_points_cover_the_system_calls_of_a_job(plain: dict[Point, str]) -> None:
    calls = Counter(point.call for point in to_kill(plain))
    ours = {"openat", "write", "fsync", "fchmod", "renameat", "renameat2", "unlinkat", "mkdirat"}
    sqlites = {"pwrite64", "ftruncate", "fdatasync"}
    assert ours | sqlites | {"connect", "sendto", "recvfrom", "flock"} <= set(calls)
    assert calls.total() >= 450
    assert not [line for line in plain.values() if ".pyc" in line]


@pytest.mark.timeout(3600)
def test_a_process_killed_at_any_system_call_pays_nothing_twice_and_loses_nothing(
    plain: dict[Point, str], try_all
) -> None:
    chosen = to_kill(plain) if ALL else few(to_kill(plain))
    hit = try_all(PLAIN, plain, [(Fault(point, KILL),) for point in chosen])
    assert not ALL or hit.total() >= 450


@pytest.mark.timeout(3600)
def test_a_system_call_that_fails_pays_nothing_twice_and_loses_nothing(plain: dict[Point, str], try_all) -> None:
    chosen = sorted(to_fail(plain))[::3] if ALL else few(to_fail(plain))[::2]
    try_all(
        PLAIN, plain, [(Fault(point, what),) for point, what in zip(chosen, [FULL, BROKEN] * len(chosen), strict=False)]
    )


@pytest.mark.timeout(3600)
def test_a_process_that_is_stopped_until_after_the_deadline_at_any_system_call_pays_nothing_twice(
    plain: dict[Point, str], try_all
) -> None:
    chosen = to_kill(plain)
    # The first requests of a thread: their headers and their bodies.
    at_api = [point for point in chosen if point.call in {"sendto", "recvfrom"} and 2 <= point.number <= 4]
    try_all(SHORT, plain, [(Fault(point, LONG),) for point in (chosen[::2] if ALL else at_api)])


@pytest.mark.timeout(3600)
def test_no_response_is_lost_for_lack_of_space(plain: dict[Point, str], try_all) -> None:
    saving = [point for point, line in plain.items() if "answer.1" in line and point.call in FAILING]
    if ALL:
        try_all(PLAIN, plain, [(Fault(point, FULL),) for point in saving])
        return
    # A thread with other jobs does not reach the later ones: any one of the first three is enough.
    creating = [point for point in saving if point.call == "openat" and "O_CREAT" in plain[point]]
    first = sorted(creating, key=lambda point: point.number)[:3]
    try_all(PLAIN, plain, [(Fault(point, FULL),) for point in first], least=1)


@pytest.mark.timeout(3600)
def test_a_process_killed_at_any_system_call_exceeds_no_cap(capped: dict[Point, str], try_all) -> None:
    chosen = to_kill(capped)[::2] if ALL else few(to_kill(capped))[::4]
    try_all(CAPPED, capped, [(Fault(point, KILL),) for point in chosen])


@pytest.mark.timeout(3600)
def test_a_recovery_may_be_interrupted_again(plain: dict[Point, str], try_all, tmp_path: Path) -> None:
    deaths = to_kill(plain)
    if not ALL:  # in the middle of the requests, so that some are left: space is reserved once for each
        deaths = [point for point in deaths if point.call == "fallocate"]
    faults, found = [], {}
    for k in range(8 if ALL else 1):
        death = Fault(deaths[len(deaths) * (2 * k + 1) // (16 if ALL else 2)], KILL)
        (tmp_path / f"count-{k}").mkdir()
        points_found = reached(tmp_path / f"count-{k}", PLAIN, death)
        recovery = [point for point in to_fail(points_found) if point.number <= 10]  # later calls are ordinary jobs
        chosen = recovery[k::8] if ALL else few(recovery)[::4]
        faults += [(death, Fault(point, (KILL, FULL, BROKEN)[n % 3])) for n, point in enumerate(chosen)]
        found |= points_found
    try_all(PLAIN, found, faults)


# The audit can fail.


def test_the_audit_finds_a_second_payment(folders: Folders, sandbox: Sandbox) -> None:
    for _ in range(2):
        folders.prompt("text", ORDERS["text"].content)
        assert Running(folders, "once").wait() == 0
    with pytest.raises(AssertionError, match="text was paid twice"):
        Audit(folders, sandbox.report(), {"text": ORDERS["text"]}, 1).check()


@pytest.mark.parametrize(
    "forgery",
    [
        "DELETE FROM attempts",
        "UPDATE attempts SET charged = 'no'",
        "UPDATE attempts SET credits = credits + 1",
        "UPDATE attempts SET credits = NULL",
        "UPDATE attempts SET source = 'other.prompt.txt'",
    ],
)
def test_the_audit_finds_a_ledger_that_differs_from_the_count_of_the_api(
    folders: Folders, sandbox: Sandbox, forgery: str
) -> None:
    folders.prompt("text", ORDERS["text"].content)
    assert Running(folders, "once").wait() == 0
    audit = Audit(folders, sandbox.report(), {"text": ORDERS["text"]}, 0)
    audit.check()
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database, database:
        database.execute(forgery)
    with pytest.raises(AssertionError):
        audit.check()
