# ruff: noqa: F811  fixtures of other files
"""``imagewatch db recover``: a database that was replaced by an earlier copy gets its rows back from the folders."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, LoggedDaemon, Running, command, until

from shared.test_common_inbox import RUNNER, team  # noqa: F401  a fixture
from shared.test_daemons import member, replace_by_earlier  # noqa: F401  a fixture

if TYPE_CHECKING:
    from collections.abc import Callable

    from support.postgres import Server

    from imagewatch.sandbox import Sandbox


def recovered(folders: Folders, *options: str, code: int = 0) -> str:
    done = command(folders, "db", "recover", *options)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def history(folders: Folders) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(command(folders, "history", "--json").stdout)
    return found


def claims(folders: Folders) -> list[str]:
    return [name for name in folders.names("inbox") if name.startswith(".imagewatch/")]


def run_to_the_end(folders: Folders, count: int, run: Callable[..., LoggedDaemon]) -> LoggedDaemon:
    daemon = run(folders, script=RUNNER)
    until(lambda: len(folders.finished()) == count and folders.names("inbox") == [], timeout=60)
    return daemon


def complete(folders: Folders, stem: str, run: Callable[..., LoggedDaemon]) -> None:
    """Let a daemon of a common inbox process a prompt, and stop it."""
    daemon = run(folders, script=RUNNER)
    folders.prompt(stem, "a cat")
    until(lambda: stem in folders.finished() and folders.names("inbox") == [], timeout=60)
    assert daemon.stop() == 0


# A daemon with an inbox of its own


def test_a_completed_job_whose_rows_are_lost_counts_again_and_the_daemon_starts(
    member: Callable[..., Folders], sandbox: Sandbox, postgres: Server, database: str
) -> None:
    folders = member("one")
    folders.prompt("dog", "a dog")
    assert Running(folders, "once").wait() == 0

    def completed() -> None:
        folders.prompt("anna/cat", "a cat")
        assert Running(folders, "once").wait() == 0

    replace_by_earlier(postgres, database, completed)
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
    member: Callable[..., Folders], sandbox: Sandbox, postgres: Server, database: str
) -> None:
    folders = member("one")
    folders.prompt("dog", "a dog")
    assert Running(folders, "once").wait() == 0

    def failed() -> None:
        folders.prompt("cat", "a cat [sandbox: 400]")
        folders.prompt("bad", "---\nquality: hgih\n---\na cat")
        Running(folders, "once").wait()

    replace_by_earlier(postgres, database, failed)
    recovered(folders, "--yes")
    assert {row["source"]: row["outcome"] for row in history(folders)} == {
        "dog.prompt.txt": "completed",
        "cat.prompt.txt": "refused",
        "bad.prompt.txt": "invalid",
    }


def test_a_request_in_flight_whose_rows_are_lost_is_an_unknown_charge(
    member: Callable[..., Folders], sandbox: Sandbox, postgres: Server, database: str
) -> None:
    folders = member("one")
    folders.prompt("cat", "a cat")
    assert Running(folders, "once").wait() == 0

    def dropped_and_killed() -> None:
        sandbox.hold()
        folders.prompt("dog", "a dog")
        daemon = Running(folders, "run")
        assert sandbox.wait_for_requests(2, 20)
        daemon.kill()
        sandbox.release()

    replace_by_earlier(postgres, database, dropped_and_killed)
    recovered(folders, "--yes")
    Running(folders, "once").wait()
    assert folders.error("dog")["charged"] == "unknown"
    assert {row["outcome"] for row in history(folders)} == {"completed", "unknown"}
    assert sandbox.report()["requests"] == 2


def test_a_job_that_was_in_flight_in_the_copy_gets_the_result_of_its_receipt(
    member: Callable[..., Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    folders = member("one", shared__lease_seconds="10")
    sandbox.hold()
    daemon = run(folders)
    folders.prompt("cat", "a cat")
    assert sandbox.wait_for_requests(1, 20)

    def completed() -> None:
        sandbox.release()
        until(lambda: folders.names("archive") == ["cat.prompt.txt"], timeout=60)
        assert daemon.stop() == 0

    replace_by_earlier(postgres, database, completed)
    until(lambda: command(folders, "db", "recover", "--yes").returncode == 0, timeout=60)
    assert Running(folders, "once").wait() == 0
    assert folders.finished() == {"cat": "outbox"}
    assert [(row["outcome"], row["credits"]) for row in history(folders)] == [("completed", 30)]
    assert sandbox.report()["requests"] == 1


def test_it_is_refused_while_the_daemon_runs(member: Callable[..., Folders], run: Callable[..., LoggedDaemon]) -> None:
    folders = member("one")
    run(folders)
    assert "is running" in recovered(folders, "--yes", code=75)


# A common inbox


@pytest.fixture
def two(team: Callable[..., Folders], run: Callable[..., LoggedDaemon]) -> tuple[Folders, Folders]:
    """Two daemons, each of which has completed a prompt."""
    one, other = team("one"), team("two")
    complete(one, "first", run)
    complete(other, "second", run)
    return one, other


def stopped_before_its_first_byte(folders: Folders) -> None:
    """Let a prompt be claimed, and kill the daemon before it sends anything."""
    daemon = Running(folders, script=str(Path(RUNNER).with_name("recover_runner.py")))
    assert daemon.wait() == -signal.SIGKILL, daemon.output


def test_a_claimed_prompt_of_which_nothing_was_sent_goes_back_into_its_folder(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    one, other = two

    def claimed() -> None:
        one.prompt("anna/cat", "a cat")
        stopped_before_its_first_byte(one)
        assert [name for name in claims(one) if name.endswith("cat.prompt.txt")]

    replace_by_earlier(postgres, database, claimed)
    assert "goes back into the inbox" in recovered(one, "--yes")
    assert one.names("inbox") == ["anna/cat.prompt.txt"]
    recovered(other, "--yes")
    run_to_the_end(other, 3, run)
    assert sandbox.report()["requests"] == 3
    assert one.receipt("anna/cat")["charged"] == "yes"


def test_without_the_note_of_its_folder_it_goes_into_the_inbox_itself(
    two: tuple[Folders, Folders], postgres: Server, database: str
) -> None:
    one, _ = two

    def claimed() -> None:
        one.prompt("anna/cat", "a cat")
        stopped_before_its_first_byte(one)
        next((one.inbox / ".imagewatch").glob("*/claim.json")).write_bytes(b"")

    replace_by_earlier(postgres, database, claimed)
    assert "its sub-folder is not known" in recovered(one, "--yes")
    assert one.names("inbox") == ["cat.prompt.txt"]


def test_a_witnessed_request_is_never_sent_again(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    one, other = two

    def sent_and_killed() -> None:
        sandbox.hold()
        one.prompt("anna/cat", "a cat")
        daemon = run(one, script=RUNNER)
        assert sandbox.wait_for_requests(3, 20)
        daemon.kill()
        sandbox.release()

    replace_by_earlier(postgres, database, sent_and_killed)
    assert "its request was sent" in recovered(other, "--yes")
    assert "lacks no job" in recovered(other, "--yes")
    run_to_the_end(other, 3, run)
    assert one.error("anna/cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 3
    assert {row["outcome"] for row in history(other)} == {"completed", "unknown"}


def test_a_response_in_a_claim_folder_is_published_by_another_daemon(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    one, other = two

    def answered_and_killed() -> None:
        one.prompt("anna/cat", "a cat")
        daemon = Running(one, "decide", script=str(Path(RUNNER).with_name("recover_runner.py")))
        assert daemon.wait() == -signal.SIGKILL, daemon.output

    replace_by_earlier(postgres, database, answered_and_killed)
    recovered(other, "--yes")
    run_to_the_end(other, 3, run)
    assert one.receipt("anna/cat")["charged"] == "yes"
    assert sandbox.report()["requests"] == 3
    assert {row["outcome"] for row in history(other)} == {"completed"}


def test_originals_of_a_published_job_are_archived(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    one, other = two

    def published_and_killed() -> None:
        one.prompt("anna/cat", "a cat")
        daemon = Running(one, "keep", script=str(Path(RUNNER).with_name("recover_runner.py")))
        assert daemon.wait() == -signal.SIGKILL, daemon.output
        assert one.receipt("anna/cat")["charged"] == "yes"

    replace_by_earlier(postgres, database, published_and_killed)
    recovered(other, "--yes")
    run_to_the_end(other, 3, run)
    assert one.names("archive") == ["anna/cat.prompt.txt", "first.prompt.txt", "second.prompt.txt"]
    assert sandbox.report()["requests"] == 3
    assert [row["credits"] for row in history(other)] == [one.receipt("first")["credits_charged"]] * 3


def test_a_job_that_the_copy_has_as_claimed_is_not_taken_for_canceled(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    one, other = two
    one.prompt("cat", "a cat")
    stopped_before_its_first_byte(one)

    def sent_and_killed() -> None:
        sandbox.hold()
        daemon = run(one, script=RUNNER)
        assert sandbox.wait_for_requests(3, 20)
        daemon.kill()
        sandbox.release()

    replace_by_earlier(postgres, database, sent_and_killed)
    assert "was seen" in recovered(other, "--yes", code=75)  # in the copy the daemon that was killed has just run
    until(lambda: command(other, "db", "recover", "--yes").returncode == 0, timeout=60)
    run_to_the_end(other, 3, run)
    assert one.error("cat")["charged"] == "unknown"
    assert sandbox.report()["requests"] == 3


def test_it_is_refused_while_another_daemon_of_the_inbox_runs(
    two: tuple[Folders, Folders], run: Callable[..., LoggedDaemon]
) -> None:
    one, other = two
    run(one, script=RUNNER)
    assert "one" in recovered(other, "--yes", code=75)


def test_a_daemon_of_another_host_needs_it_too(
    two: tuple[Folders, Folders],
    sandbox: Sandbox,
    postgres: Server,
    database: str,
    run: Callable[..., LoggedDaemon],
) -> None:
    one, other = two

    def completed() -> None:
        complete(one, "third", run)
        complete(other, "fourth", run)

    replace_by_earlier(postgres, database, completed)
    recovered(one, "--yes")
    assert run(one).stop() == 0
    refused = Running(other, "run")
    assert refused.wait() == 69
    assert "imagewatch db recover" in refused.output
    recovered(other, "--yes")
    assert run(other).stop() == 0
    assert len(history(one)) == 4
    assert sandbox.report()["requests"] == 4
