"""The payment data of a response: saved in receipt, error file and ledger, and shown with an unknown charge."""

from __future__ import annotations

import contextlib
import csv
import getpass
import io
import json
import os
import re
from typing import TYPE_CHECKING, Any

import pytest
from support.daemon import Folders, command
from support.scripted import Scripted, paid, responding, small_image
from support.station import Station

from imagewatch.config.schema import Limits
from imagewatch.journal.journal import Journal
from imagewatch.journal.row import Row
from imagewatch.journal.sqlite import SqliteDatabase
from imagewatch.protocol.values import Claim, dump, load

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

IMAGE = small_image()
BILLING = {"credits_charged": 7, "transaction_id": "tx-1", "new_credit_balance": 93.5, "more": [1, "x"]}


@contextlib.contextmanager
def served_by(tmp_path: Path, *scripts: Callable[..., Any], **settings: str) -> Iterator[Station]:
    with Scripted(*scripts) as server, contextlib.closing(Station(tmp_path, server.base_url, **settings)) as station:
        yield station


def history(folders: Folders) -> list[dict[str, Any]]:
    result = command(folders, "history", "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def lost(exchange: Any) -> None:
    """Read a request and close the connection without a response."""
    exchange.request()


def test_the_payment_is_in_the_receipt_as_received_and_in_the_ledger(tmp_path):
    with served_by(tmp_path, responding(paid(IMAGE, billing=BILLING))) as station:
        station.prompt("x", "a cat")
        station.work()
        assert station.receipt("x")["billing"] == BILLING
        (job,) = history(station)
        assert (job["credits"], job["transaction_id"], job["new_credit_balance"]) == (7, "tx-1", 93.5)
        result = command(station, "history", "--csv")
        (row,) = csv.DictReader(io.StringIO(result.stdout))
        assert (row["transaction_id"], row["new_credit_balance"]) == ("tx-1", "93.5")


def test_the_payment_for_a_response_without_an_image_is_in_its_error_file_and_in_the_ledger(tmp_path):
    with served_by(tmp_path, responding(paid(billing=BILLING))) as station:
        station.prompt("x", "a cat")
        station.work()
        error = station.error("x")
        assert (error["charged"], error["billing"]) == ("yes", BILLING)
        (job,) = history(station)
        assert (job["transaction_id"], job["new_credit_balance"]) == ("tx-1", 93.5)


@pytest.mark.parametrize(
    ("billing", "transaction", "balance"),
    [
        ({"transaction_id": 12345, "new_credit_balance": "93.5"}, "12345", 93.5),
        ({"transaction_id": None, "new_credit_balance": None}, "", None),
        ({"transaction_id": "x" * 5000, "new_credit_balance": -4}, "x" * 200, -4),
        ({"transaction_id": "\x1b[31m\ud800", "new_credit_balance": "-4.25"}, r"\x1b[31m", -4.25),
        ({"transaction_id": [1], "new_credit_balance": [1]}, "", None),
        ({"transaction_id": {"a": 1}, "new_credit_balance": {"a": 1}}, "", None),
        ({"transaction_id": True, "new_credit_balance": True}, "", None),
        ({"transaction_id": 1.5, "new_credit_balance": 10**400}, "", None),
        ({"transaction_id": 10**4000, "new_credit_balance": "nan"}, "", None),
        ({"transaction_id": "", "new_credit_balance": "inf"}, "", None),
        ({"transaction_id": 0, "new_credit_balance": "1e5"}, "0", None),
        ({"transaction_id": -1, "new_credit_balance": "٣"}, "-1", None),
        ({"new_credit_balance": float("nan")}, "", None),
        ({"new_credit_balance": float("inf")}, "", None),
        ({"new_credit_balance": "9" * 40}, "", 1e40),
        ({"new_credit_balance": "9" * 400}, "", None),
        ({"new_credit_balance": 2**63}, "", 2.0**63),
        ("none", "", None),
        (None, "", None),
    ],
)
def test_unusual_payment_data_never_costs_the_image(tmp_path, billing, transaction, balance):
    body = paid(IMAGE, billing=billing)
    with served_by(tmp_path, responding(body)) as station:
        station.prompt("x", "a cat")
        station.work()
        assert station.finished() == {"x": "outbox"}
        (job,) = history(station)
        assert job["transaction_id"].startswith(transaction)
        assert (len(job["transaction_id"]) < 210, job["new_credit_balance"]) == (True, balance)
        assert bool(job["transaction_id"]) == bool(transaction)


def test_a_refusal_has_no_payment(tmp_path):
    with served_by(tmp_path, responding(b'{"message": "no"}', status=b"400 Bad Request")) as station:
        station.prompt("x", "a cat")
        station.work()
        (job,) = history(station)
        assert (job["transaction_id"], job["new_credit_balance"]) == ("", None)


def test_the_balance_is_in_status_and_a_metric_with_its_time(tmp_path):
    scripts = [
        responding(paid(IMAGE, billing={"credits_charged": 7, "new_credit_balance": balance_after}))
        for balance_after in (93, 86)
    ]
    with Scripted(*scripts, responding(paid(IMAGE))) as server:
        folders = Folders(tmp_path, server.base_url)
        assert command(folders, "once").returncode == 0
        assert json.loads(command(folders, "status", "--json").stdout)["balance"] is None
        assert "  balance " not in command(folders, "status").stdout
        assert "imagewatch_balance" not in command(folders, "status", "--prometheus").stdout
        for stem in "abc":
            folders.prompt(stem, "a cat")
            assert command(folders, "once").returncode == 0
        result = json.loads(command(folders, "status", "--json").stdout)["balance"]
        assert result["credits"] == 86
        assert result["at"] == [job["answered_at"] for job in history(folders)][1]
        assert re.search(r"balance +86 credits, as of 20\d\d-", command(folders, "status").stdout)
        metrics = command(folders, "status", "--prometheus").stdout
        assert re.search(r"^imagewatch_balance_credits\{.*\} 86$", metrics, re.MULTILINE)
        assert re.search(r"^imagewatch_balance_timestamp_seconds\{.*\} 1\d+", metrics, re.MULTILINE)


def balance_after(credits_, balance):
    return responding(paid(IMAGE, billing={"credits_charged": credits_, "new_credit_balance": balance}))


def test_for_an_unknown_charge_the_balances_before_and_after_it_are_shown(tmp_path):
    with Scripted(balance_after(30, 100), lost, balance_after(30, 40)) as server:
        folders = Folders(tmp_path, server.base_url)
        for stem in "abc":
            folders.prompt(stem, "a cat")
            command(folders, "once")
            if stem == "b":
                result = command(folders, "history").stdout
                assert "balance before it: 100" in result
                assert "the balance after it is not known yet" in result
        jobs = {job["source"][0]: job for job in history(folders)}
        assert [(jobs[stem]["balance_before"], jobs[stem]["balance_after"]) for stem in "abc"] == [
            (None, None),
            (100, 40),
            (None, None),
        ]
        text = "other requests in between: 1, charged 30; unexplained difference: 30"
        assert text in command(folders, "history").stdout
        assert text in command(folders, "check", "--balance", LETTA_BASE_URL="http://127.0.0.1:9").stdout


@pytest.fixture
def journal(tmp_path):
    with contextlib.closing(Journal(SqliteDatabase(str(tmp_path / "ledger.sqlite3")), Limits(), float)) as opened:
        yield opened


def write(journal, job, sent_at, **fields):
    given = {"charged": "yes", "outcome": "completed", "credits": 10.0, "answered_at": sent_at + 1, **fields}
    journal.record(
        Row(job=job, attempt=1, source="x.prompt.txt", claimed_at=sent_at, sent_at=sent_at, provider="flux", **given)
    )


def unknown(journal, job, sent_at):
    write(journal, job, sent_at, charged="unknown", outcome="unknown", credits=None, answered_at=None)


def test_without_any_balance_none_is_shown_for_an_unknown_charge(journal):
    unknown(journal, "u", 100)
    assert journal.ledger.balances("u", 100).before is None
    write(journal, "a", 200, new_credit_balance=5.0)
    assert (journal.ledger.balances("u", 100).before, journal.ledger.balances("u", 100).after) == (None, 5)
    assert journal.ledger.balance() == (5, 201)


def test_the_nearest_balances_count_with_everything_that_happened_between_them(journal):
    for job, at, balance in (("a", 10, 500.0), ("b", 50, 400.0), ("e", 300, 300.0), ("f", 400, 200.0)):
        write(journal, job, at, new_credit_balance=balance)
    write(journal, "c", 150, credits=25.0)
    write(journal, "d", 160, credits=None)
    write(journal, "r", 170, charged="no", outcome="refused", credits=None)
    unknown(journal, "u", 100)
    unknown(journal, "v", 120)
    found = journal.ledger.balances("u", 100)
    assert (found.before, found.before_at, found.after, found.after_at) == (400, 51, 300, 301)
    assert (found.others, found.credits, found.unknown_cost) == (4, 35, 2)


# Owner


def test_the_owner_of_a_prompt_is_in_its_receipt_its_error_file_and_the_ledger(folders):
    folders.prompt("good", "a cat")
    folders.prompt("bad", "[sandbox: 400] a cat")
    folders.prompt("invalid", "+++\nn = 9\n+++\na cat")
    assert command(folders, "once").returncode == 1
    me = getpass.getuser()
    assert {folders.receipt("good")["owner"], folders.error("bad")["owner"], folders.error("invalid")["owner"]} == {me}
    assert {job["owner"] for job in history(folders)} == {me}
    (result,) = json.loads(command(folders, "history", "--by", "owner", "--json").stdout)
    assert (result["owner"], result["completed"], result["refused"]) == (me, 1, 2)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_an_owner_without_a_name_is_a_number(folders):
    os.chown(folders.prompt("x", "a cat"), 54321, -1)
    assert command(folders, "once").returncode == 0
    assert folders.receipt("x")["owner"] == "54321"
    folders.prompt("y", "a cat")
    assert command(folders, "once").returncode == 0
    owners = json.loads(command(folders, "history", "--by", "owner", "--json").stdout)
    assert {one["owner"]: one["completed"] for one in owners} == {"54321": 1, getpass.getuser(): 1}


def test_a_job_that_an_older_version_claimed_has_no_owner(folders):
    old = json.loads(dump(Claim(job="0" * 16, folder="", stem="x")))
    del old["owner"]
    assert load(json.dumps(old).encode(), Claim).owner == ""
