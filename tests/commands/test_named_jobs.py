"""Jobs by name: the same name is one job, whatever became of it, and wherever a process ended."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.daemon import TESTS
from support.endpoint import unique_png

from imagewatch.commands.allowed_images import AllowedImages
from imagewatch.commands.named_jobs import NamedJobs
from imagewatch.config.load import load
from imagewatch.protocol import notice
from imagewatch.protocol.names import NOTES, SUFFIX
from imagewatch.system.errors import BadRequest, SpoolError, UsageError
from imagewatch.system.untrusted import RefusedError

RUNNER = str(TESTS / "support/named_runner.py")
TEXT = "A cat"
FOLDERS = ("inbox", "outbox", "errors", "archive")


class Watched:
    """A watched folder without a daemon, and the jobs in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in FOLDERS:
            (root / name).mkdir(parents=True)
        self.inbox = root / "inbox"
        self.seconds = 0.0
        self.jobs = self.again()

    def again(self, folder: str = "") -> NamedJobs:
        """The same folders for another process."""
        config = load(None, {"HOME": "/nonexistent", "IMAGEWATCH_FOLDERS__ROOT": str(self.root)})
        images = AllowedImages([str(self.root)], 1 << 20)
        return NamedJobs(config, folder, images, blind=True, clock=lambda: time.time() + self.seconds)

    def create(self, name: str = "cat", text: str = TEXT, images: tuple[str, ...] = (), **options: Any) -> str:
        return self.jobs.create(name, text, options, images).state

    def dropped(self) -> list[str]:
        return sorted(path.name for path in self.inbox.iterdir() if path.name[0] != ".")

    def claim(self, name: str = "cat") -> Path:
        """Take a prompt out of the inbox as the daemon does."""
        target = self.root / f".claimed-{name}"
        (self.inbox / f"{name}{SUFFIX}").rename(target)
        return target

    def finish(self, name: str = "cat", kind: str = "receipt", text: str = TEXT, tag: str = "", **more: str) -> Path:
        digest = hashlib.sha256(text.encode()).hexdigest()
        facts = {"source": f"{name}{SUFFIX}", "prompt_sha256": digest, "charged": "yes", "message": "no", **more}
        lines = [f"{key} = {json.dumps(value)}" for key, value in facts.items()]
        folder = "outbox" if kind == "receipt" else "errors"
        path = self.root / folder / f"{name}{tag}.{kind}.toml"
        table = f'\n[[images]]\nfile = "{name}{tag}.png"\nmime = "image/png"\n' if kind == "receipt" else ""
        path.write_text("\n".join(lines) + table)
        return path

    def note(self, name: str = "cat") -> dict[str, Any]:
        return json.loads((self.inbox / NOTES / f"{name}.json").read_text())

    def status(self, *in_flight: str, state: Any = "running") -> None:
        files = tuple(notice.FileInFlight(name=name) for name in in_flight)
        busy = notice.InFlight(count=len(files), files=files)
        written = notice.Notice(
            version="1",
            state=state,
            written_at=notice.at(time.time() + self.seconds),
            next_writing_at=notice.at(time.time() + self.seconds + 60),
            in_flight=busy,
        )
        (self.root / notice.JSON).write_bytes(notice.encode(written))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path / "watched")


# The same name


def waiting(watched: Watched) -> None:
    """Its prompt is in the inbox."""


def claimed(watched: Watched) -> None:
    watched.claim()


def completed(watched: Watched) -> None:
    watched.claim()
    watched.finish()


def completed_under_another_name(watched: Watched) -> None:
    (watched.root / "outbox/cat.receipt.toml").write_text('source = "other.prompt.txt"\n')
    watched.claim()
    watched.finish(tag=".7f3a")


def failed(watched: Watched) -> None:
    watched.claim()
    watched.finish(kind="error", charged="no")


def archived(watched: Watched) -> None:
    watched.claim().rename(watched.root / f"archive/cat{SUFFIX}")


def removed(watched: Watched) -> None:
    watched.claim().unlink()


def long_gone(watched: Watched) -> None:
    watched.claim().unlink()
    watched.seconds = 10 * 86_400
    watched.status()


def canceled(watched: Watched) -> None:
    watched.jobs.cancel("cat")


@pytest.mark.parametrize("status", ["none", "stopped", "earlier"])
def test_a_prompt_that_waited_for_days_and_was_claimed_just_now_is_not_missing(watched, status):
    watched.create()
    if status == "earlier":
        watched.status()
    watched.claim()
    watched.seconds = 10 * 86_400
    if status == "earlier":  # time has passed: it was written before the claim
        folder = watched.inbox.stat()
        os.utime(watched.inbox, (folder.st_atime, time.time() + watched.seconds))
        watched.status()
    if status == "stopped":
        watched.status(state="stopped")
    assert watched.jobs.find("cat").state == "in_progress"


@pytest.mark.parametrize(
    ("event", "state"),
    [
        (waiting, "waiting"),
        (claimed, "in_progress"),
        (completed, "completed"),
        (completed_under_another_name, "completed"),
        (failed, "failed"),
        (archived, "results_moved"),
        (removed, "in_progress"),
        (long_gone, "missing"),
        (canceled, "canceled"),
    ],
)
def test_a_name_is_never_used_for_a_second_prompt(watched, event, state):
    assert watched.create() == "waiting"
    event(watched)
    before = watched.dropped()
    assert watched.create() == state
    watched.jobs = watched.again()
    assert watched.create() == state
    assert watched.dropped() == before
    assert watched.jobs.find("cat").state == state


@pytest.mark.parametrize("event", [waiting, claimed, completed, failed, canceled])
@pytest.mark.parametrize("other", [{"text": "A dog"}, {"n": 2}, {"images": ("cat.png",)}])
def test_a_name_that_was_used_for_something_else_is_refused(watched, event, other):
    (watched.root / "cat.png").write_bytes(unique_png("a"))
    watched.create()
    event(watched)
    before = watched.dropped()
    with pytest.raises(BadRequest, match="an earlier request has this name") as caught:
        watched.create(**other)
    assert "another name" in caught.value.problems[0].hint
    assert watched.dropped() == before


@pytest.mark.parametrize("place", ["inbox", "outbox", "errors", "archive", "in flight"])
def test_a_name_that_another_sender_has_used_is_refused(watched, place):
    if place == "inbox":
        (watched.inbox / f"cat{SUFFIX}").write_text("of a person")
    elif place == "archive":
        (watched.root / f"archive/cat{SUFFIX}").write_text("of a person")
    elif place == "in flight":
        watched.status(f"cat{SUFFIX}")
    else:
        watched.finish(kind="receipt" if place == "outbox" else "error", text="of a person")
    before = watched.dropped()
    with pytest.raises(BadRequest):
        watched.create()
    assert watched.dropped() == before
    assert not (watched.inbox / NOTES).exists()


def test_a_result_of_another_text_is_not_that_of_this_request(watched):
    watched.create()
    watched.claim()
    watched.finish(text="An earlier cat")
    assert watched.jobs.find("cat").state == "in_progress"
    watched.finish(tag=".7f3a")
    assert watched.jobs.find("cat").result_file.endswith("cat.7f3a.receipt.toml")
    assert watched.jobs.find("cat").images == (f"{watched.root}/outbox/cat.7f3a.png",)


def test_a_result_of_another_prompt_with_a_similar_name_is_not_that_of_this_request(watched):
    watched.create()
    watched.claim()
    watched.finish("cat.7f3a")
    assert watched.jobs.find("cat").state == "in_progress"


def test_a_failed_prompt_that_a_person_puts_back_is_in_progress_again(watched):
    watched.create()
    watched.claim()
    watched.finish(kind="error", charged="no")
    watched.status(f"cat{SUFFIX}")
    assert watched.jobs.find("cat").state == "in_progress"
    watched.status()
    assert watched.jobs.find("cat").state == "failed"


def test_line_ends_and_blanks_do_not_hide_the_result(watched):
    watched.create(text="\r\n A cat\r\non a mat \n")
    watched.claim()
    watched.finish(text="A cat\non a mat")
    assert watched.jobs.find("cat").state == "completed"


def test_each_sub_folder_has_names_of_its_own(watched):
    watched.create()
    watched.jobs = watched.again("agents")
    assert watched.create(text="Another cat") == "waiting"
    assert (watched.inbox / "agents" / f"cat{SUFFIX}").exists()
    assert watched.again().find("cat").state == "waiting"


def test_what_is_refused_leaves_its_name_free_and_nothing_in_the_inbox(watched):
    with pytest.raises(BadRequest, match="family"):
        watched.create(model="best")
    with pytest.raises(BadRequest):
        watched.create(text=" \n")
    assert watched.dropped() == []
    assert watched.create() == "waiting"
    assert {path.name for path in watched.inbox.iterdir()} == {NOTES, f"cat{SUFFIX}"}


def test_a_prompt_that_cannot_be_dropped_leaves_its_name_free(watched):
    (watched.root / "cat.png").write_bytes(unique_png("a"))
    (watched.inbox / "cat.in1.png").write_bytes(b"of a person")
    with pytest.raises(BadRequest, match=r"cat\.in1\.png"):
        watched.create(images=("cat.png",))
    assert list((watched.inbox / NOTES).iterdir()) == []
    (watched.inbox / "cat.in1.png").unlink()
    assert watched.create(images=("cat.png",)) == "waiting"
    assert watched.dropped() == ["cat.in1.png", f"cat{SUFFIX}"]


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 60_000, b"\xff", b'{"staged": "../../x"}', b"x" * (1 << 17)])
def test_a_note_that_cannot_be_read_counts_as_a_used_name(watched, content):
    watched.create("other")
    (watched.inbox / NOTES / "cat.json").write_bytes(content)
    with pytest.raises(SpoolError):
        watched.create()
    assert watched.dropped() == [f"other{SUFFIX}"]


@pytest.mark.parametrize("mode", [0o1777, 0o3770, 0o2770])
def test_who_may_not_remove_the_prompts_of_others_may_not_remove_their_notes(watched, mode):
    watched.inbox.chmod(mode)
    watched.create()
    assert (watched.inbox / NOTES).stat().st_mode & 0o7777 == mode


def test_a_link_in_the_place_of_the_notes_is_not_followed(watched, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (watched.inbox / NOTES).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpoolError):
        watched.create()
    assert (watched.dropped(), list((tmp_path / "elsewhere").iterdir())) == ([], [])


# Several processes, and processes that are killed


class Claimer:
    """Claims each prompt as soon as it is in the inbox, as a daemon does, and counts."""

    def __init__(self, inbox: Path) -> None:
        self.inbox = inbox
        self.claimed: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.scan()

    def scan(self) -> None:
        for path in self.inbox.glob(f"[!.]*{SUFFIX}"):
            path.unlink()
            self.claimed.append(path.name)

    def stop(self) -> list[str]:
        self._stop.set()
        self._thread.join()
        self.scan()
        return sorted(self.claimed)


def runner(watched: Watched, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, RUNNER, str(watched.root), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(TESTS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_several_processes_that_use_the_same_names_at_the_same_time_drop_each_once(watched):
    names = [f"cat-{number}" for number in range(60)]
    processes = [runner(watched, "race", *names) for _ in range(4)]
    claimer = Claimer(watched.inbox)
    try:
        for process in processes:
            assert process.stdout.readline() == "ready\n"
        for process in processes:
            process.stdin.write("\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=60) for process in processes]
    finally:
        dropped = claimer.stop()
    assert dropped == sorted(name + SUFFIX for name in names)
    for out, err in outputs:
        states = dict(line.split(": ", 1) for line in out.splitlines())
        assert set(states) == set(names), err
        assert set(states.values()) <= {"waiting", "in_progress"}


def run_killed(watched: Watched, number: int, later: float = 0.0) -> tuple[int, str]:
    process = runner(watched, "kill", str(number), str(later), "cat")
    out, err = process.communicate(timeout=60)
    assert process.returncode in {0, -signal.SIGKILL}, err
    return process.returncode, out


def prompts(watched: Watched) -> int:
    """Claim what was dropped; return how many prompts that were."""
    found = list(watched.inbox.glob(f"[!.]*{SUFFIX}"))
    for path in found:
        path.unlink()
    return len(found)


@pytest.mark.slow
def test_a_server_that_is_killed_at_any_step_has_dropped_its_prompt_or_the_same_call_drops_it(tmp_path):
    steps = int(run_killed(Watched(tmp_path / "whole"), 0)[1].splitlines()[-1])
    assert steps > 8
    sums = []
    for number in range(1, steps + 1):
        watched = Watched(tmp_path / str(number))
        assert run_killed(watched, number)[0] == -signal.SIGKILL
        first = prompts(watched)
        watched.seconds = 100.0
        assert watched.create() in ({"waiting"} if first == 0 else {"in_progress"})
        sums.append((first, prompts(watched)))
    assert set(sums) == {(0, 1), (1, 0)}


@pytest.mark.slow
def test_a_server_that_is_killed_while_it_cleans_up_after_another_leads_to_no_second_prompt(tmp_path):
    steps = int(run_killed(Watched(tmp_path / "whole"), 0)[1].splitlines()[-1])
    interrupted = None
    for number in range(1, steps + 1):  # the last step at which a note is there and its prompt is not
        watched = Watched(tmp_path / f"a{number}")
        run_killed(watched, number)
        if (watched.inbox / NOTES / "cat.json").exists() and not watched.dropped():
            interrupted = number
    assert interrupted is not None
    for number in range(1, 40):
        watched = Watched(tmp_path / f"b{number}")
        run_killed(watched, interrupted)
        code, _ = run_killed(watched, number, 100.0)
        first = prompts(watched)
        watched.seconds = 200.0
        watched.create()
        assert first + prompts(watched) <= 1
        if code == 0:
            break
    assert code == 0
    assert first == 1


def test_a_prompt_that_is_being_dropped_by_another_process_is_waited_for(watched):
    watched.create()
    staged = watched.inbox / watched.note()["staged"]
    (watched.inbox / f"cat{SUFFIX}").rename(staged)
    assert watched.create() == "in_progress"
    assert watched.dropped() == []
    watched.seconds = 61.0
    assert watched.jobs.find("cat").state == "not_dropped"
    assert watched.create() == "waiting"
    assert watched.dropped() == [f"cat{SUFFIX}"]
    assert not staged.exists()


def test_a_prompt_that_was_never_dropped_is_shown_as_that_also_after_other_senders_have_cleaned_up(
    watched, monkeypatch
):
    (watched.root / "cat.png").write_bytes(unique_png("a"))
    watched.create(images=("cat.png",))
    staged = watched.inbox / watched.note()["staged"]
    (watched.inbox / f"cat{SUFFIX}").rename(staged)
    image = staged.with_name(staged.name.replace(SUFFIX, ".1.png"))
    (watched.inbox / "cat.in1.png").rename(image)
    monkeypatch.setattr("imagewatch.commands.drop._STALE_SECONDS", 0.0)
    watched.create("dog")
    assert not image.exists()  # which may be large
    watched.seconds = 10 * 86_400
    watched.status()
    assert watched.jobs.find("cat").state == "not_dropped"
    assert watched.create(images=("cat.png",)) == "waiting"
    assert not staged.exists()


def test_a_note_of_an_earlier_version_is_read(watched):
    watched.create()
    path = watched.inbox / NOTES / "cat.json"
    path.write_text(json.dumps(watched.note() | {"staged": f".submit-{'0' * 16}{SUFFIX}"}))
    assert watched.create() == "waiting"


# Canceling


def test_canceling_takes_the_prompt_and_its_images_out_of_the_inbox(watched):
    (watched.root / "cat.png").write_bytes(unique_png("a"))
    watched.create(images=("cat.png",))
    (watched.inbox / "cat.in2.png").write_bytes(b"of a person")
    assert watched.jobs.cancel("cat").state == "canceled"
    assert watched.jobs.cancel("cat").state == "canceled"
    assert {path.name for path in watched.inbox.iterdir()} == {NOTES, "cat.in2.png"}


@pytest.mark.parametrize(("event", "state"), [(claimed, "in_progress"), (completed, "completed"), (failed, "failed")])
def test_a_claimed_prompt_is_not_canceled(watched, event, state):
    watched.create()
    event(watched)
    assert watched.jobs.cancel("cat").state == state
    assert not watched.note()["is_canceled"]


def test_the_prompt_of_another_sender_is_not_canceled(watched):
    (watched.inbox / f"cat{SUFFIX}").write_text("of a person")
    with pytest.raises(BadRequest):
        watched.jobs.cancel("cat")
    assert watched.dropped() == [f"cat{SUFFIX}"]


@pytest.mark.parametrize("event", [claimed, completed, failed, archived])
def test_the_prompt_of_another_sender_that_has_the_name_later_is_not_canceled(watched, event):
    watched.create()
    event(watched)
    later = watched.inbox / f"cat{SUFFIX}"
    later.write_text("of a person")
    assert watched.jobs.cancel("cat").state == "waiting"
    assert later.read_text() == "of a person"
    assert not watched.note()["is_canceled"]


def test_with_a_note_that_another_user_changed_no_other_file_is_removed(watched):
    (watched.root / "cat.png").write_bytes(unique_png("a"))
    watched.create(images=("cat.png",))
    (watched.inbox / "dog.in1.png").write_bytes(b"of a person")
    note = watched.note() | {"images": ["dog.in1.png", "../cat.png", "cat.in1.png/../dog.in1.png", "cat.png", ""]}
    (watched.inbox / NOTES / "cat.json").write_text(json.dumps(note))
    assert watched.jobs.cancel("cat").state == "canceled"
    assert (watched.root / "cat.png").exists()
    assert watched.dropped() == ["cat.in1.png", "dog.in1.png"]


# Which images may be sent


@pytest.fixture
def outside(watched: Watched, tmp_path: Path) -> Path:
    """A folder that is not allowed, with an image and a secret, and ways to it from inside."""
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "photo.png").write_bytes(unique_png("private"))
    (folder / "shadow").write_text("root:secret:1::::::\n")
    (watched.root / "link.png").symlink_to(folder / "photo.png")
    (watched.root / "way").symlink_to(folder)
    (watched.root / ".hidden").mkdir()
    (watched.root / ".hidden/photo.png").write_bytes(unique_png("hidden"))
    (watched.root / ".photo.png").write_bytes(unique_png("hidden"))
    return folder


@pytest.mark.parametrize(
    "name",
    [
        "{outside}/photo.png",
        "{outside}/shadow",
        "{outside}/missing.png",
        "/etc/shadow",
        "/etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "link.png",
        "way/photo.png",
        "../outside/photo.png",
        "outbox/../../outside/photo.png",
        "{root}/../outside/photo.png",
        "{root}-2/photo.png",
        ".hidden/photo.png",
        ".photo.png",
        "inbox/.imagewatch/x/photo.png",
        "{root}",
        "",
        ".",
        "a\0b.png",
        "\ud800.png",
        "~/photo.png/../../../outside/photo.png",
    ],
)
def test_an_image_outside_the_allowed_folders_is_refused_with_the_same_reason_whether_it_exists_or_not(
    watched, outside, name
):
    (Path(f"{watched.root}-2")).mkdir()
    (Path(f"{watched.root}-2") / "photo.png").write_bytes(unique_png("neighbor"))
    with pytest.raises(BadRequest) as caught:
        watched.create(images=(name.format(outside=outside, root=watched.root),))
    assert [problem.reason for problem in caught.value.problems] == ["is not in a folder from which images may be sent"]
    assert watched.dropped() == []
    assert not (watched.inbox / NOTES).exists()


def test_a_file_that_is_no_image_is_not_sent_and_not_shown(watched):
    (watched.root / "notes.png").write_text("root:secret:1::::::\n")
    (watched.root / "half.png").write_bytes(unique_png("a")[:-5])
    (watched.root / "folder.png").mkdir()
    os.mkfifo(watched.root / "pipe.png")
    for name in ("notes.png", "half.png", "folder.png", "pipe.png", "missing.png"):
        with pytest.raises(BadRequest) as caught:
            watched.create(images=(name,))
        assert "secret" not in str(caught.value)
    assert watched.dropped() == []


def test_a_folder_that_becomes_a_link_between_check_and_copy_is_not_followed(watched, outside):
    (watched.root / "mine").mkdir()
    (watched.root / "mine/photo.png").write_bytes(unique_png("mine"))
    images = AllowedImages([str(watched.root)], 1 << 20)
    (path,) = images.find(["mine/photo.png"])
    (watched.root / "mine").rename(watched.root / "was-mine")
    (watched.root / "mine").symlink_to(outside)
    with pytest.raises(OSError):  # noqa: PT011  a link, by whatever reason
        images.open(path)
    with pytest.raises(RefusedError):
        images.open(str(outside / "photo.png"))
    with pytest.raises(OSError):  # noqa: PT011  a link again
        images.open(str(watched.root / "link.png"))


def test_an_image_larger_than_the_limit_is_not_read(watched):
    with (watched.root / "huge.png").open("wb") as file:
        file.write(unique_png("a"))
        file.truncate(1 << 40)
    with pytest.raises(BadRequest, match="larger than"):
        watched.create(images=("huge.png",))


@pytest.mark.parametrize("name", ["photo.png", "{root}/photo.png", "outbox/../photo.png", "inner.png"])
def test_an_image_in_an_allowed_folder_is_sent_also_through_a_link_within_it(watched, name):
    (watched.root / "photo.png").write_bytes(unique_png("a"))
    (watched.root / "inner.png").symlink_to(watched.root / "photo.png")
    assert watched.create(images=(name.format(root=watched.root),)) == "waiting"
    assert (watched.inbox / "cat.in1.png").read_bytes() == unique_png("a")


def test_an_allowed_folder_may_be_a_link_of_the_administrator(watched, outside):
    images = AllowedImages([str(watched.root / "way")], 1 << 20)
    (path,) = images.find(["photo.png"])
    with images.open(path) as file:
        assert file.read() == (outside / "photo.png").read_bytes()
    assert images.find([str(outside / "photo.png")]) == (path,)


def test_an_allowed_folder_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(UsageError, match="missing"):
        AllowedImages([str(tmp_path / "missing")], 1)


@given(st.lists(st.sampled_from(["..", ".", "a", "", "way", "link.png", ".hidden", "outbox", "/", "~"]), max_size=8))
def test_no_combination_of_names_leads_out_of_the_allowed_folder(tmp_path_factory, parts):
    top = tmp_path_factory.getbasetemp() / "combinations"
    if not top.exists():
        (top / "watched/outbox").mkdir(parents=True)
        (top / "outside/a").mkdir(parents=True)
        (top / "watched/way").symlink_to(top / "outside")
        (top / "watched/link.png").symlink_to(top / "outside/a")
    images = AllowedImages([str(top / "watched")], 1)
    try:
        (path,) = images.find(["/".join(parts)])
    except BadRequest:
        return
    assert path.startswith(f"{top}/watched/")
    assert ".." not in path.split("/")
