"""``imagewatch db recover``: a database that was replaced by an earlier copy gets its rows back from the folders."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import PATIENCE, Folders, LoggedDaemon, Running, command, until
from support.team import SHORT_DEADLINE

from shared.test_common_inbox import RUNNER

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox

    Made = Callable[..., Folders]
    Run = Callable[..., LoggedDaemon]
    Kill = Callable[..., None]
    Finish = Callable[[Folders, int], None]
    Replace = Callable[[Callable[[], None]], None]


def recovered(folders: Folders, *options: str, code: int = 0) -> str:
    done = command(folders, "db", "recover", *options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def history(folders: Folders) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command(folders, "history", "--json").stdout)
    return found


def claims(folders: Folders) -> list[str]:
    return [name for name in folders.names("inbox") if name.startswith(".imagewatch/")]


@pytest.fixture
def seen(postgres: Server, database: str) -> Callable[[str, float], None]:
    """Return a function that lets a daemon be one that was seen so many seconds ago."""
    update = "UPDATE imagewatch.instances SET seen_at = extract(epoch FROM clock_timestamp()) - %s WHERE name = %s"

    def act(name: str, seconds: float) -> None:
        postgres.psql(update, database.rpartition("/")[2], [seconds, name])

    return act


def complete(folders: Folders, stem: str, run: Run) -> None:
    """Let a daemon of a common inbox process a prompt, and stop it."""
    daemon = run(folders, script=RUNNER)
    folders.prompt(stem, "a cat")
    until(lambda: stem in folders.finished() and folders.names("inbox") == [])
    assert daemon.stop() == 0


# A daemon with an inbox of its own


def test_a_completed_job_whose_rows_are_lost_counts_again_and_the_daemon_starts(
    alone: Made, sandbox: Sandbox, replace_by_earlier: Replace
) -> None:
    folders = alone("one")
    folders.prompt("dog", "a dog")
    assert Running(folders, "once").wait() == 0

    def completed() -> None:
        folders.prompt("anna/cat", "a cat")
        assert Running(folders, "once").wait() == 0

    replace_by_earlier(completed)
    text = recovered(folders, code=1)
    assert "anna/cat.prompt.txt" in text
    assert "completed, 30 credits" in text
    assert "Nothing was changed" in text
    assert recovered(folders, code=1) == text
    recovered(folders, "--yes")
    rows = {row["source"]: row for row in history(folders)}
    receipt = folders.receipt("anna/cat")
    found = rows["anna/cat.prompt.txt"]
    assert (found["outcome"], found["credits"]) == ("completed", receipt["credits_charged"])
    assert "lacks no job" in recovered(folders, "--yes")
    assert len(history(folders)) == 2
    assert Running(folders, "once").wait() == 0
    assert sandbox.report()["requests"] == 2


def test_refused_and_invalid_jobs_count_again_with_their_outcome(
    alone: Made, sandbox: Sandbox, replace_by_earlier: Replace
) -> None:
    folders = alone("one")
    folders.prompt("dog", "a dog")
    assert Running(folders, "once").wait() == 0

    def failed() -> None:
        folders.prompt("cat", "a cat [sandbox: 400]")
        folders.prompt("bad", "---\nquality: hgih\n---\na cat")
        Running(folders, "once").wait()

    replace_by_earlier(failed)
    recovered(folders, "--yes")
    assert {row["source"]: row["outcome"] for row in history(folders)} == {
        "dog.prompt.txt": "completed",
        "cat.prompt.txt": "refused",
        "bad.prompt.txt": "invalid",
    }


def test_a_request_in_flight_whose_rows_are_lost_is_an_unknown_charge(
    alone: Made, sandbox: Sandbox, replace_by_earlier: Replace, kill_in_flight: Kill
) -> None:
    folders = alone("one")
    folders.prompt("cat", "a cat")
    assert Running(folders, "once").wait() == 0

    folders.prompt("dog", "a dog")
    replace_by_earlier(lambda: kill_in_flight(folders))
    recovered(folders, "--yes")
    Running(folders, "once").wait()
    assert folders.error("dog")["charged"] == "unknown"
    assert {row["outcome"] for row in history(folders)} == {"completed", "unknown"}
    assert sandbox.report()["requests"] == 2


def test_a_job_that_was_in_flight_in_the_copy_gets_the_result_of_its_receipt(
    alone: Made, sandbox: Sandbox, replace_by_earlier: Replace, run: Run
) -> None:
    folders = alone("one", shared__lease_seconds="10")
    sandbox.hold()
    daemon = run(folders)
    folders.prompt("cat", "a cat")
    assert sandbox.wait_for_requests(1, PATIENCE)

    def completed() -> None:
        sandbox.release()
        until(lambda: folders.names("archive") == ["cat.prompt.txt"])
        assert daemon.stop() == 0

    replace_by_earlier(completed)
    until(lambda: command(folders, "db", "recover", "--yes").returncode == 0)
    assert Running(folders, "once").wait() == 0
    assert folders.finished() == {"cat": "outbox"}
    assert [(row["outcome"], row["credits"]) for row in history(folders)] == [("completed", 30)]
    assert sandbox.report()["requests"] == 1


def test_what_was_paid_counts_again_also_while_another_job_of_its_name_is_not_over(
    alone: Made,
    sandbox: Sandbox,
    replace_by_earlier: Replace,
    kill_in_flight: Kill,
    seen: Callable[[str, float], None],
) -> None:
    folders = alone("one")
    folders.prompt("cat", "a cat in flight")
    kill_in_flight(folders)

    def paid() -> None:
        assert Running(folders, "once").wait() == 1
        for name in folders.names("errors"):
            (folders.errors / name).unlink()
        folders.prompt("cat", "a cat that is paid")
        killed_at("keep", folders)
        assert folders.receipt("cat")["charged"] == "yes"

    replace_by_earlier(paid)
    seen("one", 3600)
    text = recovered(folders, "--yes", code=1)
    assert "not done: a newer job of this name is not over" in text
    assert [row["credits"] for row in history(folders) if row["outcome"] == "completed"] == [30]
    Running(folders, "once").wait()
    assert folders.error("cat")["charged"] == "unknown"
    recovered(folders, "--yes")
    Running(folders, "once").wait()
    assert "cat.prompt.txt" in folders.names("archive")
    assert sorted(row["outcome"] for row in history(folders)) == ["completed", "unknown"]
    assert sandbox.report()["requests"] == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")
def test_a_receipt_of_another_user_proves_nothing(alone: Made, replace_by_earlier: Replace) -> None:
    folders = alone("one")

    def completed() -> None:
        folders.prompt("cat", "a cat")
        assert Running(folders, "once").wait() == 0

    replace_by_earlier(completed)
    os.chown(folders.outbox / "cat.receipt.toml", 12345, -1)
    assert "lacks no job" in recovered(folders, "--yes")
    assert history(folders) == []
    os.chown(folders.outbox / "cat.receipt.toml", os.geteuid(), -1)
    assert "cat.prompt.txt" in recovered(folders, "--yes")
    assert [row["outcome"] for row in history(folders)] == ["completed"]


def test_it_is_refused_while_the_daemon_runs(alone: Made, run: Run) -> None:
    folders = alone("one")
    run(folders)
    assert "is running" in recovered(folders, "--yes", code=75)


# A common inbox


@pytest.fixture
def two(team: Made, run: Run) -> tuple[Folders, Folders]:
    """Two daemons, each of which has completed a prompt."""
    one, other = team("one"), team("two")
    complete(one, "first", run)
    complete(other, "second", run)
    return one, other


@pytest.fixture
def finish(run: Run) -> Finish:
    """Return a function that starts a daemon and waits until it has finished so many prompts."""

    def act(folders: Folders, count: int) -> None:
        run(folders, script=RUNNER)
        until(lambda: len(folders.finished()) == count and folders.names("inbox") == [])

    return act


def give_up_soon(folders: Folders) -> None:
    """Let a daemon not wait for long for the response of one that was killed."""
    folders.environ |= {f"IMAGEWATCH_{name.upper()}": value for name, value in SHORT_DEADLINE.items()}


def killed_at(step: str, folders: Folders) -> None:
    """Run a daemon that is killed when a job gets to a step: ``spend``, before its first byte; ``decide``; ``keep``."""
    daemon = Running(folders, step, script=str(Path(RUNNER).with_name("recover_runner.py")))
    assert daemon.wait() == -signal.SIGKILL, daemon.output


def test_a_claimed_prompt_of_which_nothing_was_sent_goes_back_into_its_folder(
    two: tuple[Folders, Folders], sandbox: Sandbox, replace_by_earlier: Replace, finish: Finish
) -> None:
    one, other = two

    def claimed() -> None:
        one.prompt("anna/cat", "a cat")
        killed_at("spend", one)
        assert [name for name in claims(one) if name.endswith("cat.prompt.txt")]

    replace_by_earlier(claimed)
    assert "goes back into the inbox" in recovered(one, "--yes")
    assert one.names("inbox") == ["anna/cat.prompt.txt"]
    recovered(other, "--yes")
    finish(other, 3)
    assert sandbox.report()["requests"] == 3
    assert one.receipt("anna/cat")["charged"] == "yes"


def test_without_the_note_of_its_folder_it_goes_into_the_inbox_itself(
    two: tuple[Folders, Folders], replace_by_earlier: Replace
) -> None:
    one, _ = two

    def claimed() -> None:
        one.prompt("anna/cat", "a cat")
        killed_at("spend", one)
        next((one.inbox / ".imagewatch").glob("*/claim.json")).write_bytes(b"")

    replace_by_earlier(claimed)
    assert "its sub-folder is not known" in recovered(one, "--yes")
    assert one.names("inbox") == ["cat.prompt.txt"]


def test_a_witnessed_request_is_never_sent_again(
    two: tuple[Folders, Folders], sandbox: Sandbox, replace_by_earlier: Replace, kill_in_flight: Kill, finish: Finish
) -> None:
    one, other = two
    one.prompt("anna/cat", "a cat")
    replace_by_earlier(lambda: kill_in_flight(one, RUNNER))
    assert "its request was sent" in recovered(other, "--yes")
    assert "lacks no job" in recovered(other, "--yes")
    give_up_soon(other)
    finish(other, 3)
    assert one.error("anna/cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 3
    assert {row["outcome"] for row in history(other)} == {"completed", "unknown"}


def test_a_response_in_a_claim_folder_is_published_by_another_daemon(
    two: tuple[Folders, Folders], sandbox: Sandbox, replace_by_earlier: Replace, finish: Finish
) -> None:
    one, other = two
    one.prompt("anna/cat", "a cat")
    replace_by_earlier(lambda: killed_at("decide", one))
    recovered(other, "--yes")
    finish(other, 3)
    assert one.receipt("anna/cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 3
    assert {row["outcome"] for row in history(other)} == {"completed"}


def test_originals_of_a_published_job_are_archived(
    two: tuple[Folders, Folders], sandbox: Sandbox, replace_by_earlier: Replace, finish: Finish
) -> None:
    one, other = two

    def published_and_killed() -> None:
        one.prompt("anna/cat", "a cat")
        killed_at("keep", one)
        assert one.receipt("anna/cat")["charged"] == "yes"

    replace_by_earlier(published_and_killed)
    recovered(other, "--yes")
    finish(other, 3)
    assert one.names("archive") == ["anna/cat.prompt.txt", "first.prompt.txt", "second.prompt.txt"]
    assert sandbox.report()["requests"] == 3
    assert [row["credits"] for row in history(other)] == [one.receipt("first")["credits_charged"]] * 3


def test_a_job_that_the_copy_has_as_claimed_is_not_taken_for_canceled(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    replace_by_earlier: Replace,
    kill_in_flight: Kill,
    seen: Callable[[str, float], None],
    finish: Finish,
) -> None:
    one, other = two
    one.prompt("cat", "a cat")
    killed_at("spend", one)
    replace_by_earlier(lambda: kill_in_flight(one, RUNNER))
    seen("one", 0)
    assert "the daemon one on" in recovered(other, "--yes", code=75)
    until(lambda: command(other, "db", "recover", "--yes").returncode == 0)
    give_up_soon(other)
    finish(other, 3)
    assert one.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 3


def test_it_is_refused_while_another_daemon_of_the_inbox_runs(two: tuple[Folders, Folders], run: Run) -> None:
    one, other = two
    run(one, script=RUNNER)
    assert "the daemon one on" in recovered(other, "--yes", code=75)


def test_a_daemon_of_another_host_needs_it_too(
    two: tuple[Folders, Folders], sandbox: Sandbox, replace_by_earlier: Replace, run: Run
) -> None:
    one, other = two

    def completed() -> None:
        complete(one, "third", run)
        complete(other, "fourth", run)

    replace_by_earlier(completed)
    recovered(one, "--yes")
    assert run(one).stop() == 0
    refused = Running(other, "run")
    assert refused.wait() == 69
    assert "imagewatch db recover" in refused.output
    recovered(other, "--yes")
    assert run(other).stop() == 0
    assert len(history(one)) == 4
    assert sandbox.report()["requests"] == 4
