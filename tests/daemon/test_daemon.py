"""The daemon from outside: a real process, real folders, a real endpoint, real signals."""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import os
import shutil
import signal
import socket
import threading
from typing import TYPE_CHECKING

import pytest
from PIL import Image
from support.daemon import HURRIED, KEY, Folders, command, stopped, until
from support.ports import free_port

from imagewatch.daemon.systemd import Notify
from imagewatch.journal.holds import Holds
from imagewatch.protocol.reasons import Reason
from imagewatch.sandbox import Sandbox

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_png = io.BytesIO()
Image.new("RGB", (64, 64), (58, 110, 150)).save(_png, "png")
IMAGE = _png.getvalue()
DECLARES_NOTHING = "+++\ninput_images = []\n+++\n"
UNPRIVILEGED_ID = 65534
UNPRIVILEGED = """
import os, sys
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon
import encodings.idna, httpcore, imagewatch.endpoint.client  # the interpreter itself may be where only root may read

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
config = load(None, os.environ)
log.configure("info", "json")
sys.exit(Daemon(config, os.environ).run())
"""
"""A daemon that is not root."""


@pytest.fixture
def settling(tmp_path, sandbox) -> Folders:
    """Folders of a daemon with a short settle time."""
    return Folders(tmp_path, sandbox.base_url, inbox__settle_seconds="1.2")


@pytest.fixture
def patient(tmp_path, sandbox) -> Folders:
    """Folders of a daemon with a long settle time: what it completes was claimed immediately."""
    return Folders(tmp_path, sandbox.base_url, inbox__settle_seconds="3600")


def over(folders: Folders, *stems: str) -> None:
    """Wait until these prompts are over, and no others."""
    until(lambda: set(folders.finished()) == set(stems))


def prompts(sandbox: Sandbox) -> list[str]:
    return [call["prompt"] for call in sandbox.report()["calls"]]


def pause(seconds: float) -> None:
    """Be as slow as a slow sender."""
    threading.Event().wait(seconds)


# Claiming


def test_a_prompt_that_is_renamed_into_the_inbox_is_completed(folders, run, sandbox):
    daemon = run(folders)
    folders.prompt("cat", "A cat")
    over(folders, "cat")
    assert folders.receipt("cat")["credits_charged"] == sandbox.report()["credits"]
    assert daemon.stop() == 0
    assert (folders.names("inbox"), folders.names("archive")) == ([], ["cat.prompt.txt"])
    assert folders.leftovers() == []


@pytest.mark.parametrize("how", ["written in place", "copied", "hard-linked", "appended in two steps"])
def test_however_a_prompt_is_dropped_it_is_sent_whole_and_once(settling, run, sandbox, tmp_path, how):
    run(settling)
    source, target = tmp_path / "source", settling.inbox / "cat.prompt.txt"
    source.write_text("A cat, and a dog")
    if how == "written in place":
        target.write_text("A cat, and a dog")
    elif how == "copied":
        shutil.copy2(source, target)
    elif how == "hard-linked":
        target.hardlink_to(source)
    else:
        target.write_text("A cat")
        with target.open("a") as file:
            file.write(", and a dog")
    over(settling, "cat")
    assert prompts(sandbox) == ["A cat, and a dog"]


def test_half_a_prompt_of_a_slow_writer_is_never_sent(settling, run, sandbox):
    run(settling)
    with (settling.inbox / "cat.prompt.txt").open("w") as file:
        for word in ["A cat ", "on a ", "mat, ", "at dusk"]:
            file.write(word)
            file.flush()
            pause(0.4)
    over(settling, "cat")
    assert prompts(sandbox) == ["A cat on a mat, at dusk"]


def test_half_a_prompt_is_never_sent_without_change_events_either(tmp_path, run, sandbox):
    polled = Folders(
        tmp_path, sandbox.base_url, inbox__settle_seconds="1.2", inbox__watch="poll", inbox__rescan_seconds="0.1"
    )
    run(polled)
    with (polled.inbox / "cat.prompt.txt").open("w") as file:
        for word in ["A cat ", "on a ", "mat, ", "at dusk"]:
            file.write(word)
            file.flush()
            pause(0.4)
    over(polled, "cat")
    assert prompts(sandbox) == ["A cat on a mat, at dusk"]


def test_an_image_that_follows_its_prompt_within_settle_seconds_belongs_to_it(settling, run, sandbox):
    daemon = run(settling)
    settling.prompt("cat", "Make it night")
    pause(0.4)
    settling.drop("cat.png", IMAGE)
    over(settling, "cat")
    (call,) = sandbox.report()["calls"]
    assert (call["provider"], len(call["inputs"])) == ("gemini", 1)
    assert daemon.stop() == 0
    assert settling.names("archive") == ["cat.png", "cat.prompt.txt"]


def test_images_that_are_there_belong_to_a_prompt_that_comes_by_rename_however_short_the_settle_time(
    folders, run, sandbox
):
    run(folders)
    folders.drop("cat.png", IMAGE)
    folders.drop("cat.1.png", IMAGE)
    folders.prompt("cat", "Make it night")
    over(folders, "cat")
    assert len(sandbox.report()["calls"][0]["inputs"]) == 2


def test_sub_folders_are_mirrored_new_ones_too(folders, run, tmp_path):
    folders.prompt("old/a/one", "One")
    daemon = run(folders)
    folders.prompt("new/b/two", "Two")
    outside = tmp_path / "album"
    (outside / "c").mkdir(parents=True)
    (outside / "three.prompt.txt").write_text("Three")
    (outside / "c/four.prompt.txt").write_text("Four")
    outside.rename(folders.inbox / "album")
    over(folders, "one", "two", "three", "four")
    assert daemon.stop() == 0
    receipts = [name for name in folders.names("outbox") if name.endswith(".toml")]
    assert receipts == [f"{path}.receipt.toml" for path in ("album/c/four", "album/three", "new/b/two", "old/a/one")]
    assert folders.names("archive") == [name.replace(".receipt.toml", ".prompt.txt") for name in receipts]


def test_a_folder_that_is_named_like_a_preset_applies_it(folders, run, sandbox, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text('[presets.poster]\nprovider = "openai"\nsize = "1024x1536"\n')
    run(folders, "--config", str(config))
    folders.prompt("poster/cat", "A cat")
    folders.prompt("plain/dog", "A dog")
    over(folders, "cat", "dog")
    assert {call["prompt"]: call["provider"] for call in sandbox.report()["calls"]} == {
        "A cat": "openai",
        "A dog": "flux",
    }


def test_prompts_that_are_there_at_the_start_are_completed(patient, run):
    for stem in ("one", "two", "a/three"):
        patient.prompt(stem, DECLARES_NOTHING + stem)
    for path in patient.inbox.rglob("*.prompt.txt"):
        os.utime(path, (0, 0))
    patient.environ["IMAGEWATCH_INBOX__SETTLE_SECONDS"] = "0.1"
    run(patient)
    over(patient, "one", "two", "three")


def test_an_inbox_without_change_events_is_scanned_regularly(tmp_path, run, sandbox):
    polled = Folders(tmp_path, sandbox.base_url, inbox__watch="poll", inbox__rescan_seconds="0.2")
    daemon = run(polled)
    polled.prompt("a/b/cat", "A cat")
    over(polled, "cat")
    assert daemon.events("started")[0]["mode"] == "poll"


def test_a_renamed_prompt_with_its_declared_images_is_claimed_immediately(patient, run, sandbox):
    run(patient)
    patient.drop("logo.png", IMAGE)
    patient.drop("other.png", IMAGE)
    patient.prompt("cat", '+++\ninput_images = ["other.png", "logo.png"]\n+++\nMake it night')
    over(patient, "cat")
    assert len(sandbox.report()["calls"][0]["inputs"]) == 2


def test_a_renamed_prompt_that_declares_no_images_is_claimed_immediately_without_its_sibling(patient, run, sandbox):
    daemon = run(patient)
    patient.drop("cat.png", IMAGE)
    patient.prompt("cat", DECLARES_NOTHING + "A cat")
    over(patient, "cat")
    assert sandbox.report()["calls"][0]["inputs"] == []
    assert daemon.stop() == 0
    assert patient.names("inbox") == ["cat.png"]


def test_a_prompt_waits_for_a_declared_image_until_it_is_whole(patient, run, sandbox):
    daemon = run(patient)
    patient.prompt("cat", '+++\ninput_images = ["logo.png"]\n+++\nMake it night')
    with (patient.inbox / "logo.png").open("wb") as file:
        file.write(IMAGE[:-20])
        file.flush()
        patient.prompt("dog", DECLARES_NOTHING + "A dog")  # is finished only after another scan
        over(patient, "dog")
        file.write(IMAGE[-20:])
    over(patient, "cat", "dog")
    assert daemon.events("failed") == []
    assert len(sandbox.report()["calls"][1]["inputs"]) == 1


def test_a_declared_image_that_never_comes_is_an_error_with_its_name_and_no_request(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, inbox__input_wait_seconds="0.5")
    run(folders)
    folders.prompt("cat", '+++\ninput_images = ["logo.png"]\n+++\nMake it night')
    over(folders, "cat")
    assert "logo.png" in folders.error("cat")["message"]
    assert sandbox.report()["requests"] == 0


# Not claiming


def test_an_editor_at_work_delays_its_prompt_and_no_other(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    swap = folders.inbox / ".cat.prompt.txt.swp"
    swap.write_bytes(b"b0VIM 9.0")
    run(folders)
    folders.prompt("cat", "A cat")
    folders.prompt("dog", "A dog")
    over(folders, "dog")
    swap.unlink()
    over(folders, "cat", "dog")


def test_a_prompt_that_is_removed_before_its_claim_is_cancelled(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="1")
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("first", "First")
    assert sandbox.wait_for_requests(1, 20)
    folders.prompt("second", "Second").unlink()
    folders.prompt("third", "Third")
    sandbox.release()
    over(folders, "first", "third")
    assert daemon.stop() == 0
    assert prompts(sandbox) == ["First", "Third"]
    assert folders.leftovers() == []


def test_an_empty_file_waits_and_is_claimed_when_it_has_a_text(settling, run, sandbox):
    run(settling)
    path = settling.prompt("cat", "")
    settling.prompt("dog", "A dog")
    over(settling, "dog")
    path.write_text("A cat")
    over(settling, "cat", "dog")
    assert prompts(sandbox) == ["A dog", "A cat"]


def test_near_misses_links_and_pipes_are_named_once_in_the_log_and_stay(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.1")
    (tmp_path / "real.txt").write_text("A cat")
    (folders.inbox / "link.prompt.txt").symlink_to(tmp_path / "real.txt")
    os.mkfifo(folders.inbox / "pipe.prompt.txt")
    for name in ("cat.prompt.txt.txt", "dog.Prompt.TXT"):
        folders.drop(name, "A cat")
    daemon = run(folders)
    for number in range(3):
        folders.prompt(f"good{number}", "Good")
        until(lambda number=number: len(folders.finished()) == number + 1)
    assert daemon.stop() == 0
    named = [line["file"] for line in daemon.events("ignored")]
    assert sorted(named) == ["cat.prompt.txt.txt", "dog.Prompt.TXT", "link.prompt.txt", "pipe.prompt.txt"]
    assert sandbox.report()["requests"] == 3
    assert (folders.inbox / "link.prompt.txt").is_symlink()


@pytest.fixture
def unprivileged(open_path, sandbox) -> Folders:
    """Folders of a daemon that is not root: root may read everything."""
    folders = Folders(open_path, sandbox.base_url)
    folders.state.mkdir()
    if os.geteuid() == 0:
        for path in (folders.state, folders.root, *folders.root.iterdir()):
            os.chown(path, UNPRIVILEGED_ID, UNPRIVILEGED_ID)
    return folders


def test_a_prompt_that_may_not_be_read_stays_is_named_and_is_completed_when_it_may(unprivileged, run, tmp_path):
    script = tmp_path / "unprivileged.py"
    script.write_text(UNPRIVILEGED)
    path = unprivileged.prompt("cat", "A cat")
    path.chmod(0)
    daemon = run(unprivileged, script=str(script))
    assert daemon.wait_for("ignored") == {
        **daemon.wait_for("ignored"),
        "file": "cat.prompt.txt",
        "reason": "the daemon may not read it",
    }
    path.chmod(0o644)
    unprivileged.prompt("dog", "A dog", 0o644)
    over(unprivileged, "cat", "dog")


def test_a_file_that_the_daemon_may_not_read_makes_only_its_own_prompt_invalid(unprivileged, run, tmp_path, sandbox):
    """A user who puts it there could put an image there, too; no other prompt waits for it or pays for it."""
    script = tmp_path / "unprivileged.py"
    script.write_text(UNPRIVILEGED)
    unprivileged.drop("cat.secret", "text").chmod(0)
    unprivileged.drop("dog.readable", "text").chmod(0o644)
    for stem in ("cat", "dog", "other/cow"):
        unprivileged.prompt(stem, f"A {stem}", 0o644)
    (unprivileged.inbox / "other").chmod(0o777)
    run(unprivileged, script=str(script))
    until(lambda: len(unprivileged.finished()) == 3)
    assert unprivileged.finished() == {"cat": "errors", "dog": "outbox", "cow": "outbox"}
    assert "cat.secret" in unprivileged.error("cat")["message"]
    assert sandbox.report()["requests"] == 2


def test_a_prompt_in_a_folder_closed_to_the_daemon_stays_is_named_and_delays_no_other(unprivileged, run, tmp_path):
    script = tmp_path / "unprivileged.py"
    script.write_text(UNPRIVILEGED)
    path = unprivileged.prompt("mine/cat", "A cat")
    path.chmod(0o644)
    path.parent.chmod(0o555)
    daemon = run(unprivileged, script=str(script))
    event = daemon.wait_for("ignored")
    assert (event["file"], event["reason"]) == ("mine/cat.prompt.txt", "the daemon may not move files out of mine")
    unprivileged.prompt("dog", "A dog", 0o644)
    over(unprivileged, "dog")
    assert not daemon.events("held")
    path.parent.chmod(0o777)
    unprivileged.prompt("fox", "A fox", 0o644)  # so that there is another scan
    over(unprivileged, "cat", "dog", "fox")


def test_the_same_name_again_while_the_first_is_in_flight_completes_both(folders, run, sandbox):
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", "The first")
    assert sandbox.wait_for_requests(1, 20)
    folders.prompt("cat", "The second")
    sandbox.release()
    until(lambda: len(folders.finished()) == 2)
    assert daemon.stop() == 0
    assert folders.receipt("cat")["prompt"] == "The first"
    (other,) = set(folders.finished()) - {"cat"}
    assert folders.receipt(other)["prompt"] == "The second"
    assert other == f"cat.{folders.receipt(other)['job'][: len(other) - 4]}"
    assert prompts(sandbox) == ["The first", "The second"]
    assert folders.names("archive") == [f"{other}.prompt.txt", "cat.prompt.txt"]


def test_an_inbox_that_is_deleted_and_created_again_is_watched_again(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="0.2")
    daemon = run(folders)
    folders.prompt("one", "One")
    over(folders, "one")
    folders.remove_inbox()
    assert daemon.wait_for("held")["kind"] == "disk"
    folders.inbox.mkdir()
    folders.prompt("two", "Two")
    over(folders, "one", "two")
    daemon.wait_for("released")
    folders.prompt("sub/three", "Three")
    over(folders, "one", "two", "three")


def test_a_folder_that_is_replaced_by_another_of_its_name_is_watched_again(folders, run, tmp_path):
    folders.prompt("sub/one", "One")
    run(folders)
    over(folders, "one")
    (folders.inbox / "sub").rename(tmp_path / "away")
    (folders.inbox / "sub").mkdir()
    folders.prompt("sub/two", "Two")
    over(folders, "one", "two")
    folders.prompt("sub/three", "Three")
    over(folders, "one", "two", "three")


# One daemon


@pytest.mark.parametrize("same", ["inbox and state", "inbox", "state"])
def test_a_second_daemon_on_the_same_folders_exits_with_75_and_claims_nothing(folders, run, tmp_path, sandbox, same):
    run(folders)
    other = Folders(tmp_path / "other", sandbox.base_url)
    if "inbox" in same:
        other.environ["IMAGEWATCH_FOLDERS__INBOX"] = str(folders.inbox)
    if "state" in same:
        other.environ["IMAGEWATCH_FOLDERS__STATE"] = str(folders.state)
    second = run(other, watching=False)
    assert second.end() == 75
    assert second.events("started") == []
    folders.prompt("cat", "A cat")
    over(folders, "cat")


# Signals


def test_after_sigterm_what_was_sent_is_finished_nothing_is_claimed_and_the_exit_code_is_0(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="2")
    for number in range(4):
        folders.prompt(f"p{number}", f"Number {number}")
    sandbox.hold()
    daemon = run(folders)
    assert sandbox.wait_for_requests(2, 20)
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.wait_for("shutdown")["in_flight"] == 2
    folders.prompt("late", "Too late")
    sandbox.release()
    assert daemon.end() == 0
    assert sandbox.report()["requests"] == 2
    assert len(folders.finished()) == 2
    assert len(folders.names("inbox")) == 3
    assert folders.leftovers() == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_kills_and_the_next_start_reports_the_request_as_unknown(folders, run, sandbox, second):
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for("shutdown")
    threading.Event().wait(
        0.6
    )  # before that, the other kind of signal may come from a program that passes on the first one
    assert daemon.stop(second) == -second
    sandbox.release()
    run(folders)
    over(folders, "cat")
    assert (folders.error("cat")["charged"], folders.names("errors")) == (
        "unknown",
        ["cat.error.toml", "cat.prompt.txt"],
    )
    assert sandbox.report()["requests"] == 1


def test_ctrl_c_and_sigterm_at_the_same_time_finish_what_was_sent(folders, run, sandbox):
    daemon = run(folders)
    sandbox.hold()
    folders.prompt("cat", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    with stopped(daemon):  # both are there when it continues
        daemon.process.send_signal(signal.SIGINT)
        daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for("shutdown")
    sandbox.release()
    assert daemon.end() == 0
    assert folders.finished() == {"cat": "outbox"}


def test_a_signal_that_another_thread_gets_ends_it_immediately(folders, run):
    daemon = run(folders)
    threading.Event().wait(2)  # at rest its main thread waits for half a minute
    threads = [int(name) for name in os.listdir(f"/proc/{daemon.process.pid}/task")]
    other = next(thread for thread in threads if thread != daemon.process.pid)
    assert ctypes.CDLL(None).tgkill(daemon.process.pid, other, signal.SIGTERM) == 0
    until(lambda: daemon.events("shutdown"), 10)
    assert daemon.end() == 0


def test_ctrl_c_ends_it_like_sigterm(folders, run):
    daemon = run(folders)
    assert daemon.stop(signal.SIGINT) == 0
    assert folders.leftovers() == []


def test_a_kill_at_rest_loses_nothing(folders, run):
    daemon = run(folders)
    assert daemon.stop(signal.SIGKILL) == -signal.SIGKILL
    folders.prompt("cat", "A cat")
    run(folders)
    over(folders, "cat")


def test_sighup_uses_a_changed_configuration_and_keeps_the_old_one_if_it_is_wrong(folders, run, sandbox, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("")
    daemon = run(folders, "--config", str(config))
    config.write_text('[defaults]\nprovider = "openai"\n[log]\nlevel = "debug"\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    folders.prompt("one", "One")
    over(folders, "one")
    daemon.wait_for("step")  # the level of the log is part of the configuration

    config.write_text('[defaults]\nprovidr = "gemini"\n')
    daemon.process.send_signal(signal.SIGHUP)
    assert "providr" in daemon.wait_for("reload_failed")["reason"]
    folders.prompt("two", "Two")
    over(folders, "one", "two")

    config.write_text(f'[folders]\narchive = "{tmp_path / "elsewhere"}"\n[log]\nlevel = "error"\nformat = "console"\n')
    daemon.process.send_signal(signal.SIGHUP)
    assert "[folders]" in daemon.wait_for("reload_failed", 2)["reason"]
    assert daemon.events("text") == [], "the form of the log is part of the old configuration"
    assert daemon.stop() == 0
    assert daemon.events("shutdown"), "and so is its level"
    assert [call["provider"] for call in sandbox.report()["calls"]] == ["openai", "openai"]
    assert folders.names("archive") == ["one.prompt.txt", "two.prompt.txt"]


def test_a_reload_that_changes_the_shared_database_is_refused(folders, run, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text("")
    daemon = run(folders, "--config", str(config))
    config.write_text('[shared]\ndatabase = "service=imagewatch"\n')
    daemon.process.send_signal(signal.SIGHUP)
    assert "a change of [shared] needs a restart" in daemon.wait_for("reload_failed")["reason"]
    folders.prompt("one", "One")
    over(folders, "one")


def test_sighup_in_a_working_folder_that_was_removed_keeps_the_old_configuration(folders, run, tmp_path):
    here, script = tmp_path / "here", tmp_path / "here.py"
    here.mkdir()
    (here / "imagewatch.toml").touch()
    script.write_text("import os, sys\nfrom imagewatch.commands.main import main\nos.chdir(sys.argv.pop(1))\nmain()\n")
    daemon = run(folders, str(here), "run", script=str(script))
    (here / "imagewatch.toml").unlink()
    here.rmdir()
    daemon.process.send_signal(signal.SIGHUP)
    assert "current folder was removed" in daemon.wait_for("reload_failed")["reason"]
    folders.prompt("one", "One")
    over(folders, "one")
    assert daemon.stop() == 0


def test_sighup_ends_a_hold_because_the_configuration_may_have_been_its_cause(folders, run, sandbox):
    daemon = run(folders)
    sandbox.key = "another key"
    folders.prompt("one", "One")
    daemon.wait_for("held")
    folders.prompt("two", "Two")
    sandbox.key = KEY
    daemon.process.send_signal(signal.SIGHUP)
    over(folders, "one", "two")
    assert folders.finished() == {"one": "errors", "two": "outbox"}


# Holds


def test_without_credits_one_job_reports_it_and_the_other_prompts_stay_until_there_are_credits(
    tmp_path, hurried, sandbox
):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="4")
    sandbox.balance = 0
    for number in range(20):
        folders.prompt(f"p{number:02}", f"Number {number}")
    daemon = hurried(folders)
    daemon.wait_for("held", 2)  # a probe was refused, too
    (shown,) = folders.finished()
    assert folders.finished() == {shown: "errors"}
    assert (folders.error(shown)["status"], folders.error(shown)["charged"]) == (402, "no")
    assert folders.error(shown)["credits_required"] > 0
    sandbox.balance = None
    until(lambda: len(folders.finished()) == 20)
    assert list(folders.finished().values()).count("errors") == 1
    daemon.wait_for("released")
    assert daemon.stop() == 0
    assert (folders.names("inbox"), folders.leftovers()) == ([], [])
    assert sandbox.report()["charged"] == 19


def test_a_response_to_a_request_from_before_a_hold_does_not_end_it(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="4")
    for number in range(3):
        folders.prompt(f"slow{number}", f"[sandbox: slow {1 + number / 2}] A slow one")
    daemon = run(folders)
    assert sandbox.wait_for_requests(3, 20)
    folders.prompt("poor", "[sandbox: 402] A poor one")
    daemon.wait_for("held")
    for number in range(4):
        folders.prompt(f"more{number}", "[sandbox: 402] Another poor one")
    until(lambda: len(folders.finished()) == 4)
    folders.prompt("last", "A last one")
    assert daemon.stop() == 0
    assert sorted(folders.finished().values()) == ["errors", "outbox", "outbox", "outbox"]
    assert len(folders.names("inbox")) == 5
    assert sandbox.report()["requests"] == 4


def test_with_a_rejected_key_one_job_reports_it_and_the_others_are_completed_with_the_right_one(
    folders, hurried, sandbox
):
    sandbox.key = "another key"
    for number in range(8):
        folders.prompt(f"p{number}", f"Number {number}")
    daemon = hurried(folders)
    assert daemon.wait_for("held")["kind"] == "key"
    sandbox.key = KEY
    until(lambda: len(folders.finished()) == 8)
    (error,) = [stem for stem, destination in folders.finished().items() if destination == "errors"]
    assert (folders.error(error)["status"], folders.error(error)["charged"]) == (401, "no")
    assert KEY not in json.dumps(daemon.lines)


def test_without_a_key_every_prompt_stays_in_the_inbox(folders, hurried, sandbox, tmp_path):
    del folders.environ["LETTA_API_KEY"]
    folders.environ["IMAGEWATCH_ENDPOINT__API_KEY_FILE"] = str(tmp_path / "key")
    folders.prompt("cat", "A cat")
    daemon = hurried(folders)
    event = daemon.wait_for("held")
    assert (event["kind"], event["next"]) == ("key", "name a file that the daemon's user can read")
    (tmp_path / "key").write_text(KEY)
    (tmp_path / "key").chmod(0o600)
    over(folders, "cat")
    assert folders.finished() == {"cat": "outbox"}


SLOW_REPORT = """
import threading, time
from imagewatch.daemon.report import Report

write_if_due = Report.write_if_due

def slowly(report):
    write_if_due(report)
    ends = max((hold.until for hold in holds.all()), default=0.0)
    if report.due is None or report.due > ends:  # else it is written again before, and holds are looked at then
        threading.Event().wait(max(ends - time.monotonic(), 0.0))

Report.write_if_due = slowly
"""
"""With a disk so slow that each hold has ended when the status is written."""


def test_a_hold_that_ends_while_the_status_is_written_is_noticed_immediately(tmp_path, run):
    port = free_port()
    folders = Folders(tmp_path, f"http://127.0.0.1:{port}", inbox__rescan_seconds="86400")
    folders.prompt("cat", "A cat")
    script = tmp_path / "slow.py"
    script.write_text(SLOW_REPORT + HURRIED)
    daemon = run(folders, "0.3", script=str(script))
    daemon.wait_for("held", 4)
    with Sandbox(port=port, key=KEY):
        over(folders, "cat")
        assert daemon.stop() == 0


def test_while_the_endpoint_cannot_be_reached_prompts_stay_and_are_completed_when_it_can(tmp_path, hurried):
    port = free_port()
    folders = Folders(tmp_path, f"http://127.0.0.1:{port}")
    for number in range(6):
        folders.prompt(f"p{number}", f"Number {number}")
    daemon = hurried(folders)
    assert daemon.wait_for("held", 2)["kind"] == "unreachable"
    until(lambda: len(folders.names("inbox")) == 6)
    assert folders.finished() == {}
    with Sandbox(port=port, key=KEY) as late:
        until(lambda: len(folders.finished()) == 6)
        assert (late.report()["charged"], set(folders.finished().values())) == (6, {"outbox"})
        assert daemon.stop() == 0
    assert folders.leftovers() == []


def test_a_busy_endpoint_slows_the_whole_queue(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__concurrency="1", retry__max_seconds="5")
    folders.prompt("first", "[sandbox: once 429] First")
    daemon = run(folders)
    daemon.wait_for("held")
    for number in range(3):
        folders.prompt(f"p{number}", f"Number {number}")
    until(lambda: len(folders.finished()) == 4)
    calls = sandbox.report()["calls"]
    assert [call["status"] for call in calls] == [429, 200, 200, 200, 200]
    assert calls[1]["at"] - calls[0]["at"] >= 1.0, "Retry-After was 1"
    assert folders.receipt("first")["attempts"] == 2


def test_with_too_little_free_space_nothing_is_claimed_and_the_hold_is_logged_once(tmp_path, run, sandbox):
    folders = Folders(tmp_path, sandbox.base_url, limits__min_free_bytes=str(1 << 60), inbox__rescan_seconds="0.1")
    folders.prompt("one", "One")
    daemon = run(folders)
    held = daemon.wait_for("held")
    assert (held["kind"], "min_free_bytes" in held["reason"]) == ("disk", True)
    folders.prompt("two", "Two")
    assert daemon.stop() == 0
    assert folders.names("inbox") == ["one.prompt.txt", "two.prompt.txt"]
    assert (len(daemon.events("held")), sandbox.report()["requests"]) == (1, 0)
    assert folders.leftovers() == []


def test_each_refused_probe_doubles_the_wait_up_to_a_quarter_of_an_hour():
    holds, now = Holds(first_seconds=15), 0.0
    waits = []
    for _ in range(8):
        hold = holds.add(Reason("credits", "none left"), now)
        waits.append(hold.until - now)
        now = hold.until
    assert waits == [15, 30, 60, 120, 240, 480, 900, 900]


def test_requests_refused_at_the_same_time_for_the_same_reason_make_one_hold():
    holds = Holds(first_seconds=15)
    first = holds.add(Reason("credits", "none left"), 100.0)
    assert holds.add(Reason("credits", "none left"), 100.5) is first
    assert holds.waiting(114.9) is first
    assert (holds.waiting(115.0), holds.probing()) == (None, True)


def test_a_response_ends_the_holds_that_began_before_its_request_but_never_one_for_our_own_disk():
    holds = Holds(first_seconds=15)
    assert [holds.may_report("credits"), holds.may_report("credits")] == [True, False]
    for kind in ("credits", "disk"):
        holds.add(Reason(kind, "…"), 100.0)
    assert holds.disproved(began=99.0) == []
    assert [hold.kind for hold in holds.disproved(began=115.0)] == ["credits"]
    assert (holds.may_report("credits"), holds.has("disk")) == (True, True)
    assert [hold.kind for hold in holds.clear("disk")] == ["disk"]


# The service manager


class Manager:
    """What systemd does: a datagram socket and a name in the environment."""

    def __init__(self, folder: Path, folders: Folders) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(folder / "notify"))
        self.socket.settimeout(20)
        folders.environ["NOTIFY_SOCKET"] = str(folder / "notify")

    def receive(self) -> dict[str, str]:
        return dict(line.split("=", 1) for line in self.socket.recv(4096).decode().split("\n"))

    def receive_until(self, name: str) -> dict[str, str]:
        """Wait for a message with this field; fail with the messages that came."""
        received: list[dict[str, str]] = []
        try:
            while not received or name not in received[-1]:
                received.append(self.receive())
        except TimeoutError:
            message = f"waited for a message with {name}, but there were only: {received}"
            raise AssertionError(message) from None
        return received[-1]


@pytest.fixture
def manager(tmp_path, folders) -> Iterator[Manager]:
    listening = Manager(tmp_path, folders)
    with contextlib.closing(listening.socket):
        yield listening


def test_the_service_manager_is_notified_of_readiness_and_of_the_end(folders, run, manager, sandbox):
    daemon = run(folders)
    ready = manager.receive_until("READY")
    assert (ready["READY"], str(folders.inbox) in ready["STATUS"]) == ("1", True)
    assert (
        json.loads((folders.state / "status.json").read_text())["state"] == "running"
    )  # ``status`` shows it from now on
    sandbox.hold()
    folders.prompt("cat", "A cat")
    assert sandbox.wait_for_requests(1, 20)
    daemon.process.send_signal(signal.SIGTERM)
    stopping = manager.receive_until("STOPPING")
    assert (stopping["STOPPING"], "1 in flight" in stopping["STATUS"]) == ("1", True)
    sandbox.release()
    assert daemon.end() == 0


def test_only_a_scan_of_the_inbox_resets_the_watchdog(folders, run, manager):
    folders.environ["WATCHDOG_USEC"] = "400000"
    daemon = run(folders)
    for _ in range(3):
        assert manager.receive_until("WATCHDOG") == {"WATCHDOG": "1"}
    folders.remove_inbox()
    daemon.wait_for("held")
    manager.socket.settimeout(0)
    with contextlib.suppress(BlockingIOError):
        while True:  # what was sent before is still in the socket
            manager.receive()
    manager.socket.settimeout(1.0)
    with contextlib.suppress(TimeoutError):
        while True:
            assert "WATCHDOG" not in manager.receive(), "the watchdog is reset, but nothing is scanned"
    assert daemon.process.poll() is None


INBOX_GONE_AT_FIRST = """
import os
from imagewatch.system import log
from imagewatch.config.load import load
from imagewatch.daemon.loop import Daemon

config = load(None, os.environ)

class Unlucky(Daemon):
    away = config.folders.inbox + ".away"

    def _scan(self):
        if self.away:
            os.rename(config.folders.inbox, self.away)
            self.away = ""
        super()._scan()

log.configure("info", "json")
Unlucky(config, os.environ).run()
"""
"""A daemon whose inbox is moved when all folders have been proved, right before its first scan."""


def test_a_daemon_that_cannot_scan_is_not_ready_before_it_can(folders, run, manager, tmp_path):
    script = tmp_path / "unlucky.py"
    script.write_text(INBOX_GONE_AT_FIRST)
    daemon = run(folders, script=str(script), watching=False)
    assert daemon.wait_for("held")["kind"] == "disk"
    folders.inbox.with_name("inbox.away").rename(folders.inbox)
    received = [manager.receive()]
    while "READY" not in received[-1]:
        received.append(manager.receive())
    assert {"WATCHDOG": "1"} in received  # it has scanned the inbox


def test_readiness_is_not_lost_when_the_manager_is_busy(manager, folders):
    with contextlib.suppress(BlockingIOError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.settimeout(0)
        while True:  # until the manager's queue is full
            other.sendto(b"STATUS=others", folders.environ["NOTIFY_SOCKET"])
    ready = threading.Thread(target=Notify(folders.environ).send, kwargs={"READY": "1"})
    ready.start()
    ready.join(0.3)  # let it hit the full queue
    assert manager.receive_until("READY") == {"READY": "1"}
    ready.join()


def test_a_folder_with_a_hostile_name_is_reported_to_the_manager_in_one_line(tmp_path, run, sandbox):
    folders = Folders(tmp_path / "a\nREADY=0\x1b", sandbox.base_url)
    manager = Manager(tmp_path, folders)
    with contextlib.closing(manager.socket):
        run(folders)
        ready = manager.receive_until("READY")
    assert (ready["READY"], "a\\nREADY=0\\x1b" in ready["STATUS"]) == ("1", True)


def test_a_service_manager_that_receives_nothing_does_not_stop_the_daemon(folders, run, tmp_path):
    folders.environ["NOTIFY_SOCKET"] = str(tmp_path / "nobody")
    run(folders)
    folders.prompt("cat", "A cat")
    over(folders, "cat")


# Many


def test_of_many_prompts_at_the_same_time_each_is_sent_once(folders, run, sandbox):
    daemon = run(folders)
    for number in range(150):
        folders.prompt(f"{number % 7}/p{number:03}", f"[sandbox: b64] Number {number}")
    until(lambda: len(folders.finished()) == 150)
    assert daemon.stop() == 0
    assert sorted(prompts(sandbox)) == sorted(f"[sandbox: b64] Number {number}" for number in range(150))
    assert (folders.names("inbox"), folders.leftovers()) == ([], [])


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"IMAGEWATCH_ENDPOINT__CA_FILE": "/etc/hostname"}, "endpoint.ca_file"),
        ({"HTTPS_PROXY": "carrier-pigeon://proxy:1"}, "the proxy cannot be used"),
    ],
    ids=["certificates", "a proxy"],
)
def test_a_daemon_that_could_never_send_reports_it_and_ends_before_it_is_ready(tmp_path, variables, named):
    folders = Folders(tmp_path, "https://api.invalid")
    folders.prompt("cat", "A cat")
    ended = command(folders, "run", **variables)
    assert ended.returncode == 78
    assert named in ended.stderr
    assert "watching" not in ended.stderr
    assert folders.names("inbox") == ["cat.prompt.txt"]
