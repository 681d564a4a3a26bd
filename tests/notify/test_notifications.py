"""A daemon notifies: which events there are, what is in them, and what a receiver that fails changes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import signal
import sqlite3
import stat
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import KEY, Folders, command, until
from support.receiver import as_json

from imagewatch.config.schema import Limits, Notify
from imagewatch.journal.journal import Journal
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.notify.notifier import Notifier

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.daemon import LoggedDaemon
    from support.receiver import Receiver

    from imagewatch.sandbox import Sandbox


WRONG = "+++\ncolour = 1\n+++\nnever sent"


def rows(folders: Folders, table: str) -> list[tuple[Any, ...]]:
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        return database.execute(f"SELECT * FROM {table}").fetchall()


# Jobs


def test_each_job_sends_one_event_with_its_result_file(notified: Folders, receiver: Receiver) -> None:
    notified.prompt("sub/cat", "a cat")
    notified.prompt("bad", "nothing nice [sandbox: 400]")
    notified.prompt("lost", "a boat [sandbox: 502]")
    notified.prompt("wrong", WRONG)
    assert command(notified, "once").returncode == 1
    pages = {page["event"] + " " + (page.get("receipt") or page["error"])["source"]: page for page in receiver.pages()}
    assert set(pages) == {
        "completed sub/cat.prompt.txt",
        "failed bad.prompt.txt",
        "unknown lost.prompt.txt",
        "failed wrong.prompt.txt",
    }
    receipt = (notified.outbox / "sub/cat.receipt.toml").read_text()
    assert pages["completed sub/cat.prompt.txt"]["receipt"] == as_json(receipt)
    for stem, name in {"bad": "failed", "lost": "unknown", "wrong": "failed"}.items():
        error = (notified.errors / f"{stem}.error.toml").read_text()
        assert pages[f"{name} {stem}.prompt.txt"]["error"] == as_json(error)
    assert len({page["event_id"] for page in receiver.pages()}) == 4
    assert rows(notified, "events") == []


def test_an_event_is_sent_only_when_its_result_file_can_be_read(notified: Folders, receiver: Receiver) -> None:
    there: list[bool] = []

    def look(post: Any) -> None:
        there.append((notified.outbox / f"{post.page['receipt']['source'].split('.')[0]}.receipt.toml").exists())

    receiver.answer = look  # type: ignore[assignment]
    for number in range(8):
        notified.prompt(f"cat{number}", f"a cat {number}")
    assert command(notified, "once").returncode == 0
    assert there == [True] * 8


def test_the_text_of_an_event_is_one_line_for_a_phone(notified: Folders, receiver: Receiver) -> None:
    notified.prompt("cat", "+++\nn = 2\n+++\na cat")
    notified.prompt("dog\u202e\n", "a dog [sandbox: 400]")
    command(notified, "once")
    texts = {page["title"]: page["text"] for page in receiver.pages()}
    assert texts["imagewatch: completed"] == "cat.prompt.txt: 2 images, 60 credits"
    assert texts["imagewatch: failed"].startswith("dog\\u202e\\n.prompt.txt: Your request was rejected")
    assert texts["imagewatch: failed"].endswith("; next: fix the cause, then move the prompt back into the inbox")


def test_a_redelivery_sends_no_event(notified: Folders, receiver: Receiver) -> None:
    os.utime(notified.prompt("cat", "a cat"), ns=(10**18, 10**18))
    assert command(notified, "once").returncode == 0
    os.utime(notified.prompt("cat", "a cat"), ns=(10**18, 10**18))
    assert command(notified, "once").returncode == 0
    assert receiver.names() == ["completed"]
    assert notified.names("inbox") == []


def test_without_a_receiver_nothing_is_written(folders: Folders) -> None:
    folders.prompt("cat", "a cat")
    folders.prompt("broke", "no credits [sandbox: 402]")
    assert command(folders, "once", IMAGEWATCH_LIMITS__CREDITS_PER_DAY="31").returncode in {1, 69}
    assert rows(folders, "events") == rows(folders, "announced") == []
    assert json.loads((folders.state / "status.json").read_text())["notifications"] is None


def test_no_payload_has_the_key_though_a_prompt_has_it(notified: Folders, receiver: Receiver) -> None:
    notified.prompt("cat", f"a cat with a sign that says {KEY}")
    notified.prompt("wrong", f'+++\nmodel = "{KEY}"\n+++\nnever sent')
    command(notified, "once")
    assert len(receiver.posts) == 2
    for post in receiver.posts:
        assert KEY.encode() not in post.body
        assert KEY not in str(post.headers)


def test_no_payload_has_the_key_though_it_is_sent_after_a_restart(notified: Folders, receiver: Receiver) -> None:
    receiver.answer = lambda _: 500
    notified.prompt("cat", f"a cat with a sign that says {KEY}")
    command(notified, "once")
    assert receiver.accepted == []
    forget_waits(notified)
    receiver.answer = lambda _: None
    assert command(notified, "once").returncode == 0
    (post,) = receiver.accepted
    assert b"a sign that says ***" in post.body


def forget_waits(folders: Folders) -> None:
    """Make every event due."""
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as database:
        database.execute("UPDATE events SET next_at = 0")
        database.commit()


# Caps


def test_a_cap_that_is_nearly_spent_sends_one_event_in_its_period(notified: Folders, receiver: Receiver) -> None:
    notified.environ |= {"IMAGEWATCH_LIMITS__CREDITS_PER_DAY": "100", "IMAGEWATCH_LIMITS__CREDITS_PER_MONTH": "1000"}
    notified.environ["IMAGEWATCH_LIMITS__ASSUMED_CREDITS"] = "1"
    for stem in ("one", "two"):
        notified.prompt(stem, f"a cat {stem}")
        assert command(notified, "once").returncode == 0
    assert receiver.names() == ["completed", "completed"]  # 60 of 100 credits
    notified.environ["IMAGEWATCH_LIMITS__CREDITS_PER_DAY"] = "110"
    notified.prompt("three", "a cat three")
    assert command(notified, "once").returncode == 0
    (cap,) = [page for page in receiver.pages() if page["event"] == "cap"]
    assert cap["cap"] | {"ends": ""} == {"setting": "limits.credits_per_day", "credits": 110, "spent": 90, "ends": ""}
    assert re.fullmatch(r"20..-..-..T00:00:00Z", cap["cap"]["ends"])
    notified.prompt("wrong", WRONG)
    command(notified, "once")
    assert receiver.names().count("cap") == 1


def budgets(folders: Folders, **credits_: int) -> None:
    """Write the daily budgets of folders into the configuration file."""
    path = folders.root.parent / "imagewatch.toml"
    path.write_text("".join(f"[budgets.{name}]\ncredits_per_day = {most}\n" for name, most in credits_.items()))
    folders.environ |= {"IMAGEWATCH_CONFIG": str(path), "IMAGEWATCH_LIMITS__ASSUMED_CREDITS": "30"}


def test_each_budget_that_is_nearly_spent_and_the_hold_of_each_folder_have_events_of_their_own(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    budgets(notified, anna=60, bob=30, carol=1000)
    for stem in ("anna/1", "bob/1", "carol/1"):
        notified.prompt(stem, "a cat")
    daemon = run(notified)
    receiver.wait_for(4)  # three images, and all of bob's credits
    for stem in ("anna/2", "anna/3", "bob/2", "carol/2"):
        notified.prompt(stem, "a dog")
    receiver.wait_for(9)  # two images more, all of anna's credits, and both folders wait
    caps = [page["cap"] | {"ends": ""} for page in receiver.pages() if page["event"] == "cap"]
    assert caps == [
        {"setting": "budgets.bob.credits_per_day", "credits": 30, "spent": 30, "ends": ""},
        {"setting": "budgets.anna.credits_per_day", "credits": 60, "spent": 60, "ends": ""},
    ]
    held = {page["hold"]["folder"]: page for page in receiver.pages() if page["event"] == "held"}
    assert {name: (page["hold"]["kind"], page["hold"]["provider"]) for name, page in held.items()} == {
        "anna": ("cap", None),
        "bob": ("cap", None),
    }
    assert held["anna"]["event_id"] != held["bob"]["event_id"]
    assert held["anna"]["text"].startswith("on hold (cap, folder anna): budgets.anna.credits_per_day is 60")
    budgets(notified, anna=60, bob=1000, carol=1000)
    daemon.process.send_signal(signal.SIGHUP)
    receiver.wait_for(11)
    released = [page for page in receiver.pages() if page["event"] == "released"]
    assert [page["hold"]["folder"] for page in released] == ["bob"]
    assert released[0]["text"] == "no longer on hold (cap, folder bob)"
    assert daemon.stop() == 0
    assert sorted(receiver.names()) == ["cap"] * 2 + ["completed"] * 6 + ["held"] * 2 + ["released"]


def test_a_reload_neither_ends_nor_repeats_the_hold_of_prompts_that_still_wait_at_a_cap(
    notified: Folders, sandbox: Sandbox, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    budgets(notified, anna=30)
    notified.environ["IMAGEWATCH_LIMITS__CONCURRENCY"] = "1"
    notified.prompt("anna/1", "a cat")
    daemon = run(notified)
    receiver.wait_for(2)  # an image, and all of anna's credits
    notified.prompt("anna/2", "a dog")
    receiver.wait_for(3)
    sandbox.hold()
    notified.prompt("carol/1", "a boat")
    assert sandbox.wait_for_requests(2, 20)  # the only slot is busy
    for count in (1, 2):
        daemon.process.send_signal(signal.SIGHUP)
        daemon.wait_for("reloaded", count)
    notified.prompt("carol/2", "a house")
    until(lambda: "carol/2.prompt.txt" in (notified.root / "imagewatch-status.txt").read_text())
    sandbox.release()
    receiver.wait_for(5)
    budgets(notified, anna=100)
    daemon.process.send_signal(signal.SIGHUP)
    receiver.wait_for(7)
    assert daemon.stop() == 0
    assert sorted(receiver.names()) == ["cap", *["completed"] * 4, "held", "released"]


def test_after_a_reload_a_hold_ends_for_prompts_that_were_removed_or_fit_though_all_slots_are_busy(
    notified: Folders, sandbox: Sandbox, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    budgets(notified, anna=30, bob=30)
    notified.environ["IMAGEWATCH_LIMITS__CONCURRENCY"] = "1"
    for stem in ("anna/1", "anna/2", "bob/1", "bob/2"):
        notified.prompt(stem, f"a cat {stem}")
    daemon = run(notified)
    receiver.wait_for(6)  # two images, all credits of both, and both folders wait
    sandbox.hold()
    notified.prompt("carol/1", "a boat")
    assert sandbox.wait_for_requests(3, 20)
    (notified.inbox / "anna/2.prompt.txt").unlink()
    budgets(notified, anna=30, bob=100)
    daemon.process.send_signal(signal.SIGHUP)
    receiver.wait_for(8)
    released = [page["hold"]["folder"] for page in receiver.pages() if page["event"] == "released"]
    assert sorted(released) == ["anna", "bob"]
    sandbox.release()
    receiver.wait_for(10)
    assert daemon.stop() == 0
    assert receiver.names().count("held") == 2


# Holds


def test_a_hold_sends_its_begin_and_its_end_once(
    notified: Folders, receiver: Receiver, hurried: Callable[..., LoggedDaemon]
) -> None:
    notified.prompt("broke", "a cat [sandbox: once 402]")
    daemon = hurried(notified)
    held, failed = sorted(receiver.wait_for(2), key=lambda page: page["event"], reverse=True)
    assert (held["event"], failed["event"]) == ("held", "failed")
    assert held["hold"]["kind"] == "credits"
    assert held["hold"]["next"].startswith("add credits to the account")
    assert held["hold"]["next_try_at"] >= held["hold"]["since"]
    notified.prompt("next", "a dog")
    receiver.wait_for(4)
    assert sorted(receiver.names()[2:]) == ["completed", "released"]
    (released,) = [page["hold"] for page in receiver.pages() if page["event"] == "released"]
    assert (released["kind"], released["since"]) == ("credits", held["hold"]["since"])
    assert daemon.stop() == 0
    assert rows(notified, "announced") == []


def test_a_busy_api_sends_no_event_of_a_hold(notified: Folders, receiver: Receiver) -> None:
    notified.prompt("cat", "a cat [sandbox: once 429-plain]")
    notified.prompt("dog", "a dog")
    assert command(notified, "once", IMAGEWATCH_LIMITS__REQUESTS_PER_MINUTE="60").returncode == 0
    assert receiver.names() == ["completed", "completed"]


def test_a_hold_that_lasts_over_a_restart_is_reported_once_and_its_end_too(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    first = run(notified)
    assert command(notified, "hold", "cleaning").returncode == 0
    (held,) = receiver.wait_for(1)
    assert (held["hold"]["kind"], held["hold"]["reason"]) == ("manual", "cleaning")
    first.wait_for("notified")  # it is recorded: else it would be sent again
    first.kill()
    second = run(notified)
    second.wait_for("held")
    notified.prompt("wrong", WRONG)  # something is done again
    second.kill()
    assert command(notified, "release").returncode == 0
    script = tmp_path / "without_grace.py"
    script.write_text(WITHOUT_GRACE)
    third = run(notified, script=str(script))
    receiver.wait_for(3)
    third.stop()
    assert sorted(receiver.names()) == ["failed", "held", "released"]


def test_a_hold_that_ended_while_no_daemon_ran_is_reported_later(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    daemon = run(notified)
    assert command(notified, "hold").returncode == 0
    daemon.wait_for("notified")  # it is recorded: else it would be sent again
    daemon.kill()
    assert command(notified, "release").returncode == 0
    script = tmp_path / "without_grace.py"
    script.write_text(WITHOUT_GRACE)
    again = run(notified, script=str(script))
    _, released = receiver.wait_for(2)
    assert (released["event"], released["hold"]["kind"]) == ("released", "manual")
    again.stop()


WITHOUT_GRACE = """
import os, sys
from imagewatch.config.load import load
from imagewatch.daemon import announcements
from imagewatch.daemon.loop import Daemon
from imagewatch.system import log

announcements._GRACE_SECONDS = 0.0
log.configure("info", "json")
sys.exit(Daemon(load(None, os.environ), os.environ).run())
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to make a file immutable for this user")
def test_a_hold_because_the_ledger_cannot_be_written_is_reported_all_the_same(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(notified)
    with contextlib.closing(sqlite3.connect(notified.state / "ledger.sqlite3", isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        notified.prompt("cat", "a cat")
        daemon.wait_for("held")
        (held,) = receiver.wait_for(1)
        assert (held["event"], held["hold"]["kind"]) == ("held", "disk")
        other.execute("ROLLBACK")
    receiver.wait_for(3)
    assert sorted(receiver.names()[1:]) == ["completed", "released"]
    assert daemon.stop() == 0


# Delivery


def test_what_is_posted_is_signed_and_has_no_header_of_the_api_client(
    notified: Folders, receiver: Receiver, tmp_path: Path
) -> None:
    (tmp_path / "secret").write_text("a secret of ours\n")
    notified.environ["IMAGEWATCH_NOTIFY__SECRET_FILE"] = str(tmp_path / "secret")
    notified.prompt("cat", "a cat")
    assert command(notified, "once").returncode == 0
    (post,) = receiver.posts
    expected = hmac.new(b"a secret of ours", post.body, hashlib.sha256).hexdigest()
    assert post.headers["x-imagewatch-signature"] == f"sha256={expected}"
    assert post.headers["content-type"] == "application/json"
    names = {"accept", "accept-encoding", "connection", "content-length", "content-type", "host", "user-agent"}
    assert set(post.headers) == names | {"x-imagewatch-signature"}


def test_the_secret_may_be_a_systemd_credential(notified: Folders, receiver: Receiver, tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/notify_secret").write_text("from systemd")
    notified.environ["CREDENTIALS_DIRECTORY"] = str(tmp_path / "credentials")
    notified.prompt("cat", "a cat")
    assert command(notified, "once").returncode == 0
    (post,) = receiver.posts
    expected = hmac.new(b"from systemd", post.body, hashlib.sha256).hexdigest()
    assert post.headers["x-imagewatch-signature"] == f"sha256={expected}"


def test_nothing_is_posted_unsigned_if_the_secret_cannot_be_read(notified: Folders, receiver: Receiver) -> None:
    notified.environ["IMAGEWATCH_NOTIFY__SECRET_FILE"] = "/nonexistent/secret"
    notified.prompt("cat", "a cat")
    assert command(notified, "once").returncode == 0
    assert receiver.posts == []
    page = json.loads((notified.state / "status.json").read_text())["notifications"]
    assert (page["pending"], page["failed"]) == (1, 0)
    assert page["last_failure"] == "the file of the secret cannot be read: No such file or directory"


def test_a_redirect_is_not_followed(notified: Folders, receiver: Receiver) -> None:
    receiver.statuses, receiver.headers = [308], {"location": "/elsewhere"}
    notified.prompt("cat", "a cat")
    done = command(notified, "once")
    assert [post.path for post in receiver.posts][:1] == ["/hook"]
    assert all(post.path == "/hook" for post in receiver.posts)
    assert "redirects are not followed" in done.stderr


def test_a_receiver_that_fails_is_tried_again_with_the_same_id(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    receiver.statuses = [500]
    notified.prompt("cat", "a cat")
    daemon = run(notified)
    failed = daemon.wait_for("notify_failed")
    assert failed["reason"] == "the receiver responded with status 500"
    assert (failed["notification"], failed["target"], failed["tries"]) == ("completed", "url", 1)
    assert failed["source"] == "cat.prompt.txt"
    assert failed["next_try_at"]
    receiver.wait_for(1)  # five seconds later
    done = daemon.wait_for("notified")
    assert done["event_id"] == failed["event_id"] == receiver.posts[0].page["event_id"]
    assert done["event_id"] == receiver.posts[1].page["event_id"]
    assert done["tries"] == 2
    daemon.stop()


def test_events_wait_over_a_restart_and_status_shows_them(notified: Folders, receiver: Receiver) -> None:
    receiver.answer = lambda _: 503
    notified.prompt("cat", "a cat")
    assert command(notified, "once").returncode == 0
    page = json.loads(command(notified, "status", "--json").stdout)["notifications"]
    assert (page["pending"], page["failed"]) == (1, 0)
    assert page["oldest_since"]
    assert page["last_failure"] == "the receiver responded with status 503"
    shown = command(notified, "status").stdout
    assert re.search(r"notify +1 pending since 20.*; last failure: the receiver responded with status 503", shown)
    metrics = command(notified, "status", "--prometheus").stdout
    assert re.search(r"^imagewatch_pending_notifications\{.*\} 1$", metrics, re.MULTILINE)
    forget_waits(notified)
    receiver.answer = lambda _: None
    assert command(notified, "once").returncode == 0
    assert receiver.names() == ["completed"]
    assert json.loads(command(notified, "status", "--json").stdout)["notifications"]["pending"] == 0


def test_after_seven_days_an_event_is_given_up_and_status_says_so(notified: Folders, receiver: Receiver) -> None:
    receiver.answer = lambda _: 503
    notified.prompt("cat", "a cat")
    assert command(notified, "once").returncode == 0
    with contextlib.closing(sqlite3.connect(notified.state / "ledger.sqlite3")) as database:
        database.execute("UPDATE events SET next_at = 0, at = at - 7 * 86400")
        database.commit()
    done = command(notified, "once")
    (line,) = [json.loads(one) for one in done.stderr.splitlines() if '"notify_failed"' in one]
    assert line["level"] == "error"
    assert "next_try_at" not in line
    page = json.loads(command(notified, "status", "--json").stdout)["notifications"]
    assert (page["pending"], page["failed"]) == (0, 1)
    assert "1 given up" in command(notified, "status").stdout
    count = len(receiver.posts)
    command(notified, "once")
    assert len(receiver.posts) == count


def test_one_event_that_a_receiver_never_accepts_does_not_keep_back_the_others(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    receiver.answer = lambda post: 400 if b"wrong.prompt.txt" in post.body else None
    notified.prompt("wrong", WRONG)
    daemon = run(notified)
    daemon.wait_for("notify_failed")
    notified.prompt("cat", "a cat")
    receiver.wait_for(1)
    assert receiver.names() == ["completed"]
    daemon.stop()


def test_a_receiver_that_never_responds_delays_no_job(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    stop: list[bool] = []

    def hang(_: Any) -> None:
        until(lambda: bool(stop), timeout=60)

    receiver.answer = hang  # type: ignore[assignment]
    daemon = run(notified)
    notified.prompt("one", "a cat")
    until(lambda: receiver.posts)
    for number in range(5):
        notified.prompt(f"more{number}", f"a dog {number}")
    until(lambda: len(notified.finished()) == 6)
    assert not daemon.events("held")
    stop.append(True)
    receiver.wait_for(6)
    daemon.stop()


def test_a_command_that_hangs_delays_no_job_and_the_end_only_for_a_few_seconds(
    folders: Folders, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    number_of = tmp_path / "pid"
    folders.environ["IMAGEWATCH_NOTIFY__COMMAND"] = json.dumps(["sh", "-c", f"echo $$ > {number_of}; sleep 1000"])
    daemon = run(folders)
    for number in range(3):
        folders.prompt(f"cat{number}", f"a cat {number}")
    until(lambda: len(folders.finished()) == 3)
    assert daemon.stop() == 0
    assert len(rows(folders, "events")) == 3
    until(lambda: not Path(f"/proc/{int(number_of.read_text())}").exists(), what="the end of the command")


def test_the_command_gets_json_and_neither_key_nor_credentials(folders: Folders, tmp_path: Path) -> None:
    program = tmp_path / "receiver.py"
    program.write_text(
        f"#!{sys.executable}\n"
        "import json, os, sys\n"
        f"with open({str(tmp_path / 'got')!r}, 'a') as file:\n"
        "    file.write(json.dumps([json.load(sys.stdin), dict(os.environ), sys.argv[1:], os.getcwd()]) + '\\n')\n"
    )
    program.chmod(0o755)
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials/letta_api_key").write_text(KEY)
    folders.environ |= {
        "IMAGEWATCH_NOTIFY__COMMAND": f'["{program}", "an argument; echo $HOME"]',
        "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
        "LC_NOTE": f"{KEY}",
        "NOTIFY_SOCKET": "/nonexistent/socket",
    }
    folders.prompt("cat", "a cat")
    assert command(folders, "once").returncode == 0
    (line,) = (tmp_path / "got").read_text().splitlines()
    page, environ, arguments, where = json.loads(line)
    assert page["receipt"] == as_json((folders.outbox / "cat.receipt.toml").read_text())
    assert arguments == ["an argument; echo $HOME"]
    assert where == "/"
    assert environ["HOME"] == str(folders.root)
    assert not {name for name in environ if re.match("LETTA|IMAGEWATCH|CREDENTIALS|NOTIFY|LC_NOTE", name)}
    assert KEY not in line


def test_both_receivers_get_each_event_and_only_the_one_that_failed_gets_it_again(
    notified: Folders, receiver: Receiver, tmp_path: Path
) -> None:
    notified.environ["IMAGEWATCH_NOTIFY__COMMAND"] = "false"
    notified.prompt("cat", "a cat")
    assert command(notified, "once").returncode == 0
    assert receiver.names() == ["completed"]
    forget_waits(notified)
    notified.environ["IMAGEWATCH_NOTIFY__COMMAND"] = f"cp /dev/stdin {tmp_path / 'got'}"
    assert command(notified, "once").returncode == 0
    assert json.loads((tmp_path / "got").read_text()) == receiver.pages()[0]
    assert len(receiver.posts) == 1


# Another configuration


def test_a_reload_changes_the_receiver_and_what_waits_goes_to_the_new_one(
    folders: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon], tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    folders.environ["IMAGEWATCH_CONFIG"] = str(path)
    path.write_text('[notify]\ncommand = ["false"]\n')
    daemon = run(folders)
    folders.prompt("one", "a cat")
    daemon.wait_for("notify_failed")
    path.write_text(f'[notify]\nurl = "{receiver.url}"\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded")
    receiver.wait_for(1)
    path.write_text("")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded", 2)
    folders.prompt("two", "a dog")
    until(lambda: len(folders.finished()) == 2)
    path.write_text(f'[notify]\nurl = "{receiver.url}"\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.wait_for("reloaded", 3)
    folders.prompt("three", "a boat")
    receiver.wait_for(2)
    assert [page["receipt"]["source"] for page in receiver.pages()] == ["one.prompt.txt", "three.prompt.txt"]
    assert daemon.stop() == 0


def test_check_reports_what_is_wrong_with_the_receivers(notified: Folders, tmp_path: Path) -> None:
    def lines(**environ: str) -> list[tuple[str, str]]:
        more = {f"IMAGEWATCH_NOTIFY__{name.upper()}": value for name, value in environ.items()}
        found = json.loads(command(notified, "check", "--json", **more).stdout)["settings"]
        return [(line["verdict"], line["why"]) for line in found if line["what"] == "notify"]

    plain, secret = tmp_path / "plain", tmp_path / "secret"
    plain.write_text("#!/bin/sh\n")
    secret.write_text("secret")
    secret.chmod(0o600)
    unsigned = "not signed (a service may have the systemd credential notify_secret)"
    assert lines() == [("ok", f"url on 127.0.0.1, {unsigned}")]
    assert lines(secret_file=str(secret)) == [("ok", f"url on 127.0.0.1, signed with the secret in {secret}")]
    assert lines(command="true --token=hidden")[0] == ("ok", "command true")
    assert lines(command="no-such-program")[0][1].startswith("the command does not exist in PATH: no-such-program")
    assert lines(command=str(plain))[0] == ("bad", f"the command may not be executed: {plain} (run: chmod a+x {plain})")
    assert lines(command="/nonexistent")[0][0] == "bad"
    ((verdict, why),) = lines(secret_file="/nonexistent")
    assert (verdict, why.partition(": /nonexistent")[0]) == (
        "bad",
        "nothing is posted to the url on 127.0.0.1: the file of the secret cannot be read: No such file or directory",
    )
    assert lines(url="http://example.com/token")[0][0] == "warn"
    assert lines(url="https://example.com/token") == [("ok", f"url on example.com, {unsigned}")]
    secret.chmod(0o604)
    assert lines(secret_file=str(secret))[1] == (
        "warn",
        f"other users can read {secret} (mode 0604); run: chmod 600 {secret}",
    )
    assert stat.S_IMODE(secret.stat().st_mode) == 0o604
    assert command(notified, "check", IMAGEWATCH_NOTIFY__COMMAND="no-such-program").returncode == 78


@pytest.mark.parametrize(
    ("setting", "value", "problem"),
    [
        ("url", "ftp://example.com/token", "must begin with https:// or http:// and a host"),
        ("url", "example.com/token", "must begin with https:// or http:// and a host"),
        ("url", "https:///token", "must begin with https:// or http:// and a host"),
        ("url", "https://example.com/to ken", "must be ASCII without spaces"),
        ("url", "https://example.com:token/", "is not a URL"),
        ("url", "https://example.com/token#x", "must have no fragment and no backslash"),
        ("command", "[]", "is not a command with its arguments"),
        ("command", "[1, 2]", "is not a command with its arguments"),
        ("command", '"token', "is not a command with its arguments"),
        ("secret", "token", "unknown key"),
    ],
)
def test_a_wrong_setting_is_named_and_its_value_is_not_shown(
    folders: Folders, setting: str, value: str, problem: str
) -> None:
    done = command(folders, "check", **{f"IMAGEWATCH_NOTIFY__{setting.upper()}": value})
    assert done.returncode == 78
    assert problem in done.stderr
    assert f"IMAGEWATCH_NOTIFY__{setting.upper()}" in done.stderr
    assert "token" not in done.stdout + done.stderr


def test_no_line_of_the_log_has_the_url(notified: Folders, receiver: Receiver) -> None:
    receiver.statuses = [500] * 3
    notified.prompt("cat", "a cat")
    done = command(notified, "once")
    dead = command(notified, "once", IMAGEWATCH_NOTIFY__URL="http://127.0.0.1:9/hidden")
    for text in (done.stderr, dead.stderr, (notified.state / "status.json").read_text()):
        assert "/hook" not in text
        assert "/hidden" not in text


def test_once_ends_when_what_is_due_is_delivered(notified: Folders, receiver: Receiver) -> None:
    receiver.answer = lambda _: threading.Event().wait(0.5) or None
    for number in range(3):
        notified.prompt(f"cat{number}", f"a cat {number}")
    assert command(notified, "once").returncode == 0
    assert len(receiver.accepted) == 3


def test_a_ledger_that_is_locked_when_receivers_are_replaced_keeps_no_event_from_the_new_one(
    tmp_path: Path, receiver: Receiver
) -> None:
    path = str(tmp_path / "ledger.sqlite3")
    with contextlib.closing(Journal(SqliteDatabase(path), Limits(), lambda: 1000.0)) as journal:
        journal.events.configure(["command"])
        journal.events.stage("held", "hold:disk::", {"kind": "disk"})
        journal.requests.refuse({}, staged := journal.events.staged())
        journal.events.written(staged)
        tried = threading.Event()
        notifier = Notifier(journal.events, {}, lambda: None, time.monotonic)
        with contextlib.closing(sqlite3.connect(path)) as other, other:
            other.execute("BEGIN IMMEDIATE")
            take_over = journal.events.take_over

            def noted() -> None:
                try:
                    take_over()
                finally:
                    tried.set()

            journal.events.take_over = noted  # type: ignore[method-assign]
            notifier.configure(Notify(url=receiver.url), lambda: None)
            assert tried.wait(20)
        notifier.wake()
        assert receiver.wait_for(1)[0]["hold"] == {"kind": "disk"}
        notifier.close(5)


def test_the_end_of_a_hold_is_sent_though_another_ledger_was_accepted_meanwhile(
    notified: Folders, receiver: Receiver, run: Callable[..., LoggedDaemon]
) -> None:
    daemon = run(notified)
    notified.prompt("broke", "no credits [sandbox: 402]")
    receiver.wait_for(2)
    (notified.state / "ledger.sqlite3").unlink()
    notified.prompt("cat", "a cat")
    until(lambda: any(line["kind"] == "disk" for line in daemon.events("held")))
    command(notified, "release", "--accept-new-ledger")
    daemon.wait_for("ledger_accepted")
    command(notified, "release")
    until(lambda: "cat" in notified.finished())
    until(lambda: ("released", "credits") in holds(receiver), saw=lambda: str(holds(receiver)))
    assert len(holds(receiver)) == len(set(holds(receiver)))


def holds(receiver: Receiver) -> list[tuple[str, str]]:
    return [(page["event"], page["hold"]["kind"]) for page in receiver.pages() if "hold" in page]
