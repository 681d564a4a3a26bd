"""The status files in the folders: what people who only have the folders find there, and when it is written."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import jsonschema
import pytest
from support.daemon import KEY, Folders, LoggedDaemon, command, until

from imagewatch.daemon.folder_status import FolderStatus
from imagewatch.daemon.parts import Parts
from imagewatch.journal.holds import Holds
from imagewatch.protocol import notice
from imagewatch.protocol.reasons import Reason
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from imagewatch.protocol.notice import Notice
    from imagewatch.sandbox import Sandbox

    Run = Callable[..., LoggedDaemon]

SCHEMA = json.loads((Path(__file__).parents[2] / "schemas/imagewatch-status.schema.json").read_text())
HOSTILE = "x\n\x1b[2J\u202egpj<script>alert(1)</script>\x85"


def page_in(folder: Path) -> Notice:
    found = notice.read(folder)
    assert found is not None
    jsonschema.validate(json.loads((folder / notice.JSON).read_bytes()), SCHEMA)
    return found


def shown(folders: Folders) -> str:
    return (folders.root / notice.TEXT).read_text()


def says(folders: Folders, *texts: str) -> None:
    """Wait until the text for people has all of these in it."""
    path = folders.root / notice.TEXT
    until(lambda: path.exists() and all(text in path.read_text() for text in texts), saw=lambda: shown(folders))


# When it is written


class Kept:
    """The status files of a daemon that does not run, with clocks that the test moves."""

    def __init__(self, folders: Folders) -> None:
        self.folders = folders
        self.now = 1000.0
        self.wall = 1_800_000_000.0
        config = folders.config()
        self.parts = Parts(config, folders.environ, Disk(), Holds(), lambda: self.wall, lambda: self.now)
        self.parts.spool.prepare()
        self.parts.configure(config)
        self.parts.admission.start()
        self.status = FolderStatus(self.parts, processor=lambda: 0.0)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        self.wall += seconds

    def update(self, state: str = "running", in_flight: dict[str, str] | None = None) -> None:
        self.status.update(state, in_flight or {}, {})

    def hold(self) -> None:
        self.parts.control.hold("lunch")
        self.parts.admission.follow()

    @property
    def page(self) -> Notice:
        return page_in(self.folders.root)

    @property
    def written_at(self) -> float:
        return self.page.written_at.timestamp()


@pytest.fixture
def kept(folders: Folders) -> Iterator[Kept]:
    made = Kept(folders)
    yield made
    made.parts.close()


def test_without_a_change_nothing_is_written_for_an_hour(kept: Kept) -> None:
    kept.update()
    began = kept.written_at
    assert kept.page.next_writing_at == notice.at(began + 3600)
    kept.passes(3599)
    assert not kept.status.is_due()
    kept.update()
    assert kept.written_at == began
    kept.passes(1)
    assert kept.status.is_due()
    kept.update()
    assert kept.written_at == began + 3600


def test_while_the_queue_is_on_hold_it_is_written_every_five_minutes(kept: Kept) -> None:
    kept.hold()
    kept.update()
    assert (kept.page.state, kept.page.next_writing_at) == ("on_hold", notice.at(kept.wall + 300))
    assert kept.status.due == kept.now + 300


def test_while_a_prompt_is_in_flight_it_is_written_every_five_minutes(kept: Kept) -> None:
    kept.update(in_flight={"0" * 16: "cat.prompt.txt"})
    assert kept.page.next_writing_at == notice.at(kept.wall + 300)
    assert [one.name for one in kept.page.in_flight.files] == ["cat.prompt.txt"]


def test_while_a_prompt_waits_it_is_written_every_five_minutes_and_afterwards_every_hour(
    folders: Folders, run: Run
) -> None:
    path = folders.drop("cat.prompt.txt", "")
    run(folders)
    for text, seconds in (("Not ready yet:", 300), ("Waiting: no prompts.", 3600)):
        says(folders, text)
        page = page_in(folders.root)
        assert page.next_writing_at is not None
        assert (page.next_writing_at - page.written_at).total_seconds() == seconds
        path.unlink(missing_ok=True)


def test_a_change_is_written_at_most_a_second_later_and_not_earlier(kept: Kept) -> None:
    kept.update()
    kept.passes(0.4)
    kept.hold()
    kept.update()
    assert kept.page.state == "running"
    assert kept.status.due == 1001.0
    kept.passes(0.6)
    assert kept.status.is_due()
    kept.update()
    assert kept.page.state == "on_hold"


def test_the_end_is_written_immediately_and_its_time_stays(kept: Kept) -> None:
    kept.update()
    kept.passes(0.1)
    kept.update("stopping", {"0" * 16: "cat.prompt.txt"})
    stopped = kept.page
    assert (stopped.state, stopped.next_writing_at, stopped.in_flight.count) == ("stopped", None, 1)
    kept.passes(30)
    kept.update("stopped")
    assert (kept.page.stopped_at, kept.page.in_flight.count) == (stopped.stopped_at, 0)


def test_a_machine_that_slept_is_late_by_the_wall_clock(kept: Kept) -> None:
    kept.update()
    kept.now += 10
    kept.wall += 4000
    assert kept.status.is_due()


def test_the_same_hold_is_not_a_change_however_the_clocks_differ(kept: Kept) -> None:
    kept.parts.admission.refused(Reason("unreachable", "no route"), kept.now)
    kept.update()
    assert kept.page.holds[0].next_try_at is not None
    before = kept.page
    kept.now += 5
    kept.wall += 6.5
    kept.update()
    assert kept.page == before


def test_a_hold_that_lasts_over_a_restart_keeps_its_beginning(folders: Folders, kept: Kept) -> None:
    kept.hold()
    kept.update()
    later = Kept(folders)
    later.wall += 7200
    later.update()
    assert [hold.since for hold in later.page.holds] == [hold.since for hold in kept.page.holds]
    assert later.page.holds[0].since == notice.at(kept.wall)
    later.parts.close()


# What a person with only a file manager finds


def test_a_mistyped_name_is_named_with_the_right_one_and_leaves_the_file_when_it_is_renamed(
    folders: Folders, run: Run
) -> None:
    folders.drop("anna/cat.prompt.txt.txt", "a secret cat")
    run(folders)
    says(folders, "  anna/cat.prompt.txt.txt\n", "What to do: rename cat.prompt.txt.txt to cat.prompt.txt\n")
    (one,) = page_in(folders.root).ignored.files
    assert (one.name, one.next) == ("anna/cat.prompt.txt.txt", "rename cat.prompt.txt.txt to cat.prompt.txt")
    assert "Windows may not show the last .txt" in one.message
    (folders.inbox / "anna/cat.prompt.txt.txt").rename(folders.inbox / "anna/cat.prompt.txt")
    until(lambda: folders.finished() == {"cat": "outbox"})
    until(lambda: "cat.prompt.txt.txt" not in shown(folders))


def test_an_empty_prompt_is_named_with_what_to_do(folders: Folders, run: Run) -> None:
    path = folders.inbox / "cat.prompt.txt"
    path.touch()
    run(folders)
    says(folders, "Not ready yet:\n  cat.prompt.txt\n", "What to do: write the prompt into the file and save it")
    (one,) = page_in(folders.root).waiting.files
    assert (one.why, one.since) == ("empty", notice.at(path.stat().st_ctime))


def test_a_hold_is_named_with_its_reason_its_time_and_what_to_do(folders: Folders, run: Run) -> None:
    folders.prompt("cat", "[sandbox: 402] a secret cat")
    run(folders)
    says(folders, "imagewatch is ON HOLD", "the account has too few credits", "Next try at ", "add credits")
    folders.prompt("dog", "a secret dog")
    says(folders, "Ready (waits for the end of the hold):\n  dog.prompt.txt\n")
    page = page_in(folders.root)
    (hold,) = page.holds
    assert (page.state, hold.kind, hold.provider, hold.folder) == ("on_hold", "credits", None, None)
    assert hold.since is not None
    assert hold.next_try_at is not None
    assert hold.since < hold.next_try_at


def test_a_cap_of_one_provider_is_named_and_the_queue_runs(tmp_path: Path, sandbox: Sandbox, run: Run) -> None:
    folders = Folders(tmp_path, sandbox.base_url, limits__credits_per_day="40", limits__assumed_credits="30")
    folders.prompt("a", "a cat")
    folders.prompt("b", "a cat")
    run(folders)
    says(folders, "imagewatch is running", "only prompts for flux", "At a limit, the oldest first")
    page = page_in(folders.root)
    assert (page.state, page.holds[0].provider, page.waiting.count) == ("running", "flux", 1)
    assert not any(number in shown(folders) for number in (" 30", " 40", "credits_per_day"))


def test_at_its_end_the_daemon_writes_that_it_is_stopped(folders: Folders, run: Run) -> None:
    daemon = run(folders)
    says(folders, "imagewatch is running", "is NOT running: ask the administrator to start it")
    command(folders, "hold", "out of office")
    folders.prompt("cat", "a secret cat")
    says(folders, "Ready (waits for the end of the hold):\n  cat.prompt.txt\n")
    daemon.stop()
    says(folders, "imagewatch is STOPPED since ", "Ready (waits until imagewatch is started):\n  cat.prompt.txt\n")
    page = page_in(folders.root)
    assert (page.state, page.next_writing_at) == ("stopped", None)


def test_a_status_that_a_killed_daemon_left_is_overdue_after_its_time(folders: Folders, run: Run) -> None:
    daemon = run(folders)
    says(folders, "imagewatch is running")
    daemon.kill()
    page = page_in(folders.root)
    assert not page.is_overdue(time.time())
    assert page.is_overdue(time.time() + 3700)


def test_a_redelivery_is_named(tmp_path: Path, sandbox: Sandbox, run: Run) -> None:
    folders = Folders(tmp_path, sandbox.base_url)
    path = folders.prompt("cat", "a cat")
    status = path.stat()
    run(folders)
    until(lambda: folders.finished() == {"cat": "outbox"} and not path.exists())
    again = folders.inbox / ".cat.part"
    again.write_text("a cat")
    os.utime(again, ns=(status.st_mtime_ns, status.st_mtime_ns))
    again.rename(path)
    says(folders, "Delivered again and therefore not sent", "  cat.prompt.txt (at ")
    page = page_in(folders.root)
    assert (page.redelivered.count, page.redelivered.files[0].name) == (1, "cat.prompt.txt")


def test_many_prompts_of_one_person_do_not_hide_the_file_of_another(folders: Folders, run: Run) -> None:
    run(folders)
    command(folders, "hold")
    for number in range(300):
        folders.prompt(f"anna/{number}", "a cat")
    folders.drop("ben/dog.prompt.txt", "")
    folders.drop("ben/dog.prmpt.txt", "a dog")
    until(lambda: page_in(folders.root).waiting.count == 301)
    says(folders, "  ben/dog.prompt.txt\n", "  anna: 300\n", "  ben: 1\n", "rename dog.prmpt.txt to dog.prompt.txt")
    page = page_in(folders.root)
    assert len(page.waiting.files) == 100
    assert "ben/dog.prompt.txt" in {one.name for one in page.waiting.files}
    times = [one.since.timestamp() for one in page.waiting.files if one.since]
    assert times == sorted(times)


def test_what_is_secret_is_not_in_it(folders: Folders, run: Run) -> None:
    run(folders)
    command(folders, "hold", "waiting for the key " + KEY)
    folders.prompt("cat", "a secret cat")
    folders.drop(f"{KEY}.prompt.txt.txt", "a secret dog")
    says(folders, "  cat.prompt.txt", "***.prompt.txt.txt", "waiting for the key ***")
    for name in (notice.TEXT, notice.JSON):
        content = (folders.root / name).read_text()
        assert KEY not in content
        assert "secret" not in content


# Other users


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "file", "dangling link"])
def test_what_has_the_name_of_the_file_is_replaced_and_never_followed(
    kind: str, tmp_path: Path, folders: Folders, run: Run
) -> None:
    target = tmp_path / "target"
    if kind != "dangling link":
        target.write_text("precious")
    for name in (notice.TEXT, notice.JSON):
        path = folders.root / name
        if kind == "hard link":
            path.hardlink_to(target)
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "file":
            path.write_text("imagewatch is fine")
        else:
            path.symlink_to(target)
    run(folders)
    says(folders, "imagewatch is running")
    assert page_in(folders.root).state == "running"
    assert not (folders.root / notice.TEXT).is_symlink()
    assert not target.exists() if kind == "dangling link" else target.read_text() == "precious"


def test_a_folder_in_the_place_of_the_file_is_logged_once_and_the_daemon_continues(folders: Folders, run: Run) -> None:
    (folders.root / notice.TEXT).mkdir()
    daemon = run(folders)
    folders.prompt("cat", "a cat")
    until(lambda: folders.finished() == {"cat": "outbox"})
    (failed,) = daemon.events("status_failed")
    assert f"a folder is in the place of {folders.root / notice.TEXT}" in failed["reason"]
    assert failed["next"] == "remove the folder that has the name of the status file"
    assert page_in(folders.root).state == "running", "the other file is written"
    until(lambda: "not written: a folder is in the place of" in command(folders, "status").stdout)
    (folders.root / notice.TEXT).rmdir()
    folders.prompt("dog", "a dog")
    says(folders, "imagewatch is running")
    assert len(daemon.events("status_failed")) == 1


def test_a_folder_that_cannot_be_written_is_logged_and_the_daemon_continues(
    tmp_path: Path, sandbox: Sandbox, run: Run
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, folders__notice="/proc/imagewatch")
    daemon = run(folders)
    folders.prompt("cat", "a cat")
    until(lambda: folders.finished() == {"cat": "outbox"})
    assert len(daemon.events("status_failed")) == 1
    assert daemon.stop() == 0


def test_off_means_that_nothing_is_written(tmp_path: Path, sandbox: Sandbox, run: Run) -> None:
    folders = Folders(tmp_path, sandbox.base_url, folders__notice="off")
    run(folders).stop()
    assert not (folders.root / notice.TEXT).exists()
    assert json.loads((folders.state / "status.json").read_text())["notice"] is None


@pytest.mark.parametrize("place", ["off", "elsewhere", "the same by a link"])
def test_the_files_in_the_old_folder_are_removed_when_the_folder_changes(
    folders: Folders, tmp_path: Path, run: Run, place: str
) -> None:
    run(folders).stop()
    assert page_in(folders.root).state == "stopped"
    (tmp_path / "link").symlink_to(folders.root)
    places = {"elsewhere": str(tmp_path / "new"), "the same by a link": str(tmp_path / "link")}
    (tmp_path / "new").mkdir()
    folders.environ["IMAGEWATCH_FOLDERS__NOTICE"] = places.get(place, place)
    again = run(folders)
    again.wait_for("started")
    assert (folders.root / notice.TEXT).exists() is (place == "the same by a link")
    assert (folders.root / notice.JSON).exists() is (place == "the same by a link")
    assert again.stop() == 0
    assert (tmp_path / "new" / notice.JSON).exists() is (place == "elsewhere")


@pytest.mark.parametrize("owner", ["another daemon", "a link", "a folder"])
def test_files_in_the_old_folder_that_are_not_its_own_stay(
    folders: Folders, tmp_path: Path, run: Run, owner: str
) -> None:
    run(folders).stop()
    path = folders.root / notice.JSON
    before = path.read_bytes()
    path.unlink()
    if owner == "another daemon":
        path.write_bytes(before.replace(b'"stopped"', b'"running"'))
    elif owner == "a link":
        (tmp_path / "target").write_bytes(before)
        path.symlink_to(tmp_path / "target")
    else:
        path.mkdir()
    folders.environ["IMAGEWATCH_FOLDERS__NOTICE"] = "off"
    assert run(folders).stop() == 0
    assert os.path.lexists(path)
    assert not (folders.root / notice.TEXT).exists()


def test_files_in_an_old_folder_that_is_not_there_now_are_removed_by_a_later_start(
    tmp_path: Path, sandbox: Sandbox, run: Run
) -> None:
    old = tmp_path / "öld"
    old.mkdir()
    folders = Folders(tmp_path, sandbox.base_url, folders__notice=str(old))
    assert run(folders).stop() == 0
    old.rename(tmp_path / "unmounted")
    folders.environ["IMAGEWATCH_FOLDERS__NOTICE"] = str(folders.root)
    assert run(folders).stop() == 0
    (tmp_path / "unmounted").rename(old)
    assert run(folders).stop() == 0
    assert list(old.iterdir()) == []
    assert page_in(folders.root).state == "stopped"


def test_no_name_adds_a_line_or_changes_a_screen(folders: Folders, run: Run) -> None:
    folders.drop(f"{HOSTILE.replace('/', '')}.prompt.txt.txt", "x")
    folders.drop("\nimagewatch is STOPPED.\n.prompt.txt", "")
    os.close(os.open(os.fsencode(folders.inbox) + b"/\xff\xfe.prompt.txt.txt", os.O_CREAT))
    run(folders)
    says(folders, r"\nimagewatch is STOPPED.\n.prompt.txt", r"\x1b[2J\u202egpj<script>", r"\udcff\udcfe")
    text = shown(folders)
    assert [line for line in text.split("\n") if line.startswith("imagewatch is")][:1] == ["imagewatch is running."]
    assert "\nimagewatch is STOPPED" not in text
    assert text.replace("\n", "").isprintable()
    assert not set(b"<>&") & set((folders.root / notice.JSON).read_bytes())
    assert page_in(folders.root).ignored.count == 2


def test_a_temporary_file_of_a_killed_daemon_is_removed_and_that_of_a_user_stays(folders: Folders, run: Run) -> None:
    left = folders.root / ".iw-status.0123456789abcdef"
    left.write_text("half")
    (folders.root / ".iw-status.link").symlink_to(left)
    run(folders)
    says(folders, "imagewatch is running")
    assert not left.exists()
    assert (folders.root / ".iw-status.link").is_symlink()


def test_those_who_may_list_the_inbox_may_read_it_and_no_others(kept: Kept) -> None:
    root, inbox, outbox = kept.folders.root, kept.folders.inbox, kept.folders.outbox
    for mode_of_inbox, mode in ((0o3770, 0o640), (0o755, 0o644), (0o700, 0o600), (0o1733, 0o600)):
        inbox.chmod(mode_of_inbox)
        outbox.chmod(0o700)
        kept.passes(3600)
        kept.update()
        assert (root / notice.TEXT).stat().st_mode & 0o7777 == mode
        assert (root / notice.JSON).stat().st_mode & 0o7777 == mode
    outbox.chmod(0o750)
    kept.passes(3600)
    kept.update()
    assert (root / notice.TEXT).stat().st_mode & 0o7777 == 0o640


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to any group")
def test_it_has_the_group_of_the_inbox(kept: Kept) -> None:
    os.chown(kept.folders.inbox, -1, 61236)
    kept.folders.inbox.chmod(0o3770)
    kept.update()
    status = (kept.folders.root / notice.TEXT).stat()
    assert (status.st_gid, status.st_mode & 0o7777) == (61236, 0o640)


def test_the_mode_of_what_is_published_counts_if_it_is_set(tmp_path: Path, sandbox: Sandbox) -> None:
    folders = Folders(tmp_path, sandbox.base_url, outbox__file_mode="0604")
    kept = Kept(folders)
    kept.update()
    assert (folders.root / notice.TEXT).stat().st_mode & 0o7777 == 0o604
    kept.parts.close()


# Strange layouts


@pytest.mark.parametrize("place", ["inbox", "outbox"])
def test_in_the_inbox_or_the_outbox_it_is_no_prompt_and_not_shown(
    place: str, tmp_path: Path, sandbox: Sandbox, run: Run
) -> None:
    folders = Folders(tmp_path, sandbox.base_url, folders__notice=str(tmp_path / "watched" / place))
    where = folders.root / place
    daemon = run(folders)
    folders.prompt("imagewatch-status", "a cat")
    until(lambda: folders.finished() == {"imagewatch-status": "outbox"})
    until(lambda: page_in(where).in_flight.count == 0)
    assert sandbox.report()["requests"] == 1
    assert page_in(where).ignored.count == 0
    daemon.stop()
    assert not daemon.events("ignored")
    assert page_in(where).state == "stopped"
    checked = command(folders, "check", "--json").stdout
    assert "must end in exactly" not in checked
    assert command(folders, "gallery", "--output", str(tmp_path / "gallery.html")).returncode == 0
    html = (tmp_path / "gallery.html").read_text()
    assert "imagewatch-status.prompt.txt" in html or "a cat" in html
    assert "imagewatch-status.txt" not in html
    assert "imagewatch-status.json" not in html


def test_a_root_that_is_the_inbox_is_watched_and_has_its_status(tmp_path: Path, sandbox: Sandbox, run: Run) -> None:
    others: dict[str, Any] = {f"folders__{name}": str(tmp_path / name) for name in ("outbox", "errors", "archive")}
    folders = Folders(tmp_path, sandbox.base_url, folders__inbox=str(tmp_path / "watched"), **others)
    daemon = run(folders)
    until((folders.root / notice.TEXT).exists)
    (folders.root / "cat.prompt.txt").write_text("a cat")
    until((tmp_path / "outbox/cat.receipt.toml").exists)
    daemon.stop()
    page = page_in(folders.root)
    assert (page.state, page.ignored.count) == ("stopped", 0)
    assert not daemon.events("ignored")


def test_what_has_not_changed_is_not_written_again_after_an_update_that_came_too_early(kept: Kept) -> None:
    kept.update()
    written = kept.written_at
    kept.passes(0.5)
    kept.update()
    kept.passes(0.6)
    kept.update()
    assert kept.written_at == written


def test_a_problem_that_lasts_has_the_same_text_each_time_and_no_temporary_name(kept: Kept) -> None:
    kept.update()
    disk, texts = kept.status._disk, set()
    disk.create = _refused  # type: ignore[method-assign, assignment]
    for stem in ("a", "b", "c"):
        (kept.folders.inbox / f"{stem}.prompt.txt.txt").write_text("a cat")
        kept.passes(4000)
        kept.update()
        texts.add(kept.status.problem)
    (text,) = texts
    assert text.startswith("cannot create the file: Permission denied: ")
    assert ".iw-status." not in text


def _refused(path: str) -> IO[bytes]:
    raise SpoolError(f"cannot create the file: Permission denied: {path}", path=path, code=13)
