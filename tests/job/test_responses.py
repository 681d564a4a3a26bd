"""Every response of the API, through the real worker: destination, charge and message; never paid twice."""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import json
import os
import re
import time
from urllib.parse import quote

import pytest
from support.daemon import KEY
from support.scripted import (
    Scripted,
    completed,
    drop,
    no_secret,
    over,
    paid,
    refused,
    responding,
    response,
    returned,
    small_image,
)
from support.station import Distrustful, Station

from imagewatch.config.key import Key
from imagewatch.endpoint.client import Client
from imagewatch.job import steps
from imagewatch.job.outcome import End
from imagewatch.job.worker import Worker
from imagewatch.journal.holds import Holds
from imagewatch.journal.prices import Asked
from imagewatch.protocol.reasons import Reason
from imagewatch.sandbox import TAGS
from imagewatch.system.errors import ConfigError, Problem, SpoolError

IMAGE = small_image()

# tag, status, code, message of the API, the reason for a hold, a word of the next step
REFUSED = [
    ("400", 400, "moderation_blocked", "Your request was rejected by the safety system", None, "fix the cause"),
    ("401", 401, None, "Unauthorized", "key", "key"),
    ("402", 402, "not-enough-credits", "Not enough credits: estimated to cost 134", "credits", "add credits"),
    ("403", 403, "forbidden", "Forbidden", "key", "key"),
    ("404", 404, None, "Not Found", "endpoint", "base_url"),
    ("409", 409, "conflict", "Conflict", None, "the API failed; move the prompt back"),
    ("413", 413, "payload_too_large", "Payload too large", None, "fix the cause"),
    ("422", 422, None, "n: Number must be at most 4", None, "fix the cause"),
    ("429-quota", 429, None, "You have exceeded your quota", "quota", "quota"),
    ("500", 500, None, "The provider failed", None, "the API failed; move the prompt back"),
    ("302", 302, None, "HTTP 302", "endpoint", "base_url"),
    ("307", 307, None, "HTTP 307", "endpoint", "base_url"),
    ("308", 308, None, "HTTP 308", "endpoint", "base_url"),
]
# tag, status, code, message: a proxy responded, or the effect of the request is unknown
UNCLEAR = [
    ("408", 408, None, "Request timed out"),
    ("500-empty", 500, None, "HTTP 500 without a message"),
    ("502", 502, None, "Bad gateway"),
    ("503", 503, None, "Service Unavailable"),
    ("503-interrupted", 503, "cloud_api_deployment_interrupted", "A deployment interrupted this"),
    ("504", 504, None, "Gateway time-out"),
    ("520", 520, None, "Web server returned an unknown error"),
    ("521", 521, None, "Web server is down"),
    ("522", 522, None, "Connection timed out"),
    ("523", 523, None, "Origin is unreachable"),
    ("524", 524, None, "A timeout occurred"),
]
WITHOUT_RESPONSE = ["drop", "reset", "drop-headers"]
# tag, file ending of the raw response, content, remark, credits in the result file
UNREADABLE = [
    ("b64, truncate", "json", b'"b64_json"', "cut short", None),
    ("not-json", "bin", b"<!DOCTYPE html>", "not a JSON object", None),
    ("not-object", "json", b'["no object"]', "not a JSON object", None),
    ("no-images", "json", b'"images": []', "asked for 1, got 0", 134),
    ("fewer", "json", b'"images": []', "asked for 1, got 0", 134),
    ("bad-base64", "json", b"*", "base64 is broken", 134),
    ("not-picture", "json", b'"b64_json"', "HTML", 134),
    ("svg", "json", b'"b64_json"', "SVG", 134),
]
# tag, names, asked, got, remark
FLAWED = [
    ("fewer", ["x-1.jpg"], 1, "asked for 2, got 1"),
    ("bad-base64", ["x-1.jpg", "x-2.jpg"], 1, "image 2: the base64 is broken"),
    ("bad-picture", ["x-1.jpg", "x-2.jpg"], 2, "image 2: cut short"),
    ("not-picture", ["x-1.jpg", "x-2.bin"], 1, "image 2: not an image: its content is HTML"),
    ("svg", ["x-1.jpg", "x-2.bin"], 1, "image 2: not an image: its content is SVG"),
]
BUSY = [("429", 4), ("429-plain", 4), ("503-shutdown", 4)]
GOOD = ["no-billing", "gzip", "wrong-mime", "b64", "slow", "trickle", "trickle-headers", "bad-picture", "url", "big"]
GOOD.append("credentials")
ELSEWHERE = {"once", "times"} | {name for name in TAGS if name.startswith("url")}  # and test_downloads


def ask(station, tag="", front="", stem="x"):
    """Drop a prompt with an image; the tag in its text chooses the response."""
    fence = f"+++\n{front}\n+++\n" if front else ""
    text = f"{fence}a cat" + (f" [sandbox: {tag}]" if tag else "")
    originals = {f"{stem}.prompt.txt": text, f"{stem}.png": IMAGE}
    drop(station, originals)
    return originals


def row_of(station):
    (row,) = station.ledger.rows()
    return row


@contextlib.contextmanager
def served_by(tmp_path, *scripts, **settings):
    with (
        Scripted(*scripts) as server,
        contextlib.closing(Station(tmp_path, server.base_url, **settings)) as station,
    ):
        yield station


@pytest.fixture(autouse=True)
def _no_secret(tmp_path, capfd):
    yield
    no_secret(tmp_path, KEY, "".join(capfd.readouterr()))


def test_every_tag_of_the_sandbox_is_in_one_of_these_tables():
    tables = [
        REFUSED,
        UNCLEAR,
        [(tag,) for tag in WITHOUT_RESPONSE],
        UNREADABLE,
        FLAWED,
        BUSY,
        [(tag,) for tag in GOOD],
    ]
    asked = {word for table in tables for row in table for word in row[0].split(", ")}
    assert asked | ELSEWHERE == set(TAGS)


# Free


@pytest.mark.parametrize(("tag", "status", "code", "message", "kind", "advice"), REFUSED, ids=[r[0] for r in REFUSED])
def test_a_refusal_is_free_and_its_error_file_has_the_message_of_the_api(
    station, sandbox, tag, status, code, message, kind, advice
):
    originals = ask(station, tag)
    (outcome,) = station.work()

    error = refused(station, "x", originals)
    assert error["charged"] == "no"
    assert error["message"].startswith(message)
    assert (error["status"], error.get("code")) == (status, code)
    assert error.get("credits_required") == (134 if tag == "402" else None)
    assert advice in error["next"]
    assert error["attempts"] == 1
    assert (outcome.end, outcome.destination, outcome.charged) == (End.OVER, "errors", "no")
    assert (outcome.reason and outcome.reason.kind) == kind
    row = row_of(station)
    assert (row["outcome"], row["charged"], row["credits"], row["status"]) == ("refused", "no", None, status)
    assert row["code"] == (code or "")
    assert row["message"] == error["message"]
    report = sandbox.report()
    assert (report["requests"], report["charged"], report["redirected"]) == (1, 0, 0)


def test_a_used_up_quota_is_reported_with_the_time_to_wait(station, sandbox):
    ask(station, "429-quota")
    (outcome,) = station.work()
    assert outcome.reason.seconds == 60


@pytest.mark.parametrize("tag", [row[0] for row in REFUSED if row[4]])
def test_only_the_first_prompt_shows_a_refusal_that_concerns_every_prompt(station, sandbox, tag):
    station.worker = Distrustful(
        station.spool, station.client, station.journal, station.config(), may_report=Holds().may_report
    )
    ask(station, tag, stem="a")
    (first,) = station.work()
    originals = ask(station, tag, stem="b")
    (second,) = station.work()

    assert first.end is End.OVER
    assert second.end is End.RETURNED
    assert second.reason.kind == first.reason.kind
    assert station.names("inbox") == sorted(originals)
    assert (station.inbox / "b.png").read_bytes() == IMAGE
    assert station.finished() == {"a": "errors"}
    assert station.leftovers() == []
    assert sandbox.report()["charged"] == 0


def test_a_key_that_the_api_does_not_accept_is_refused(station, sandbox):
    sandbox.key = "sk-let-another-key-entirely"
    originals = ask(station)
    (outcome,) = station.work()
    error = refused(station, "x", originals)
    assert (error["status"], error["charged"], outcome.reason.kind) == (401, "no", "key")
    assert "key" in error["next"]


def test_without_a_usable_key_nothing_is_sent(station, sandbox):
    def no_key():
        raise ConfigError([Problem("endpoint.api_key_file", "is not there", "make it")])

    client = Client(station.config().endpoint, no_key)
    station.worker = Distrustful(station.spool, client, station.journal, station.config())
    originals = ask(station)
    (outcome,) = station.work()
    client.close()
    returned(station, originals)
    assert (outcome.end, outcome.reason.kind) == (End.RETURNED, "key")
    assert station.ledger.rows() == []
    assert sandbox.report()["requests"] == 0


def test_a_refusal_for_lack_of_credits_says_what_one_request_costs(station, sandbox):
    sandbox.balance = 100
    originals = ask(station)
    station.work()
    error = refused(station, "x", originals)
    assert (error["status"], error["credits_required"]) == (402, 134)
    assert sandbox.balance == 100


@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        (b'{"message": "No"}', "No", None),
        (b'{"error": {"message": "Nested", "type": "t"}}', "Nested", "t"),
        (b'{"detail": "Detail"}', "Detail", None),
        (b'{"issues": [{"path": ["a", 0], "message": "bad"}, {"message": "worse"}, 3]}', "a.0: bad; worse; 3", None),
        (b'{"message": 3}', '{"message": 3}', None),
        (b'{"message": ""}', '{"message": ""}', None),
        (b"plain words\n", "plain words", None),
        (b"<html><title>A\n  page</title>", "A page", None),
        (b"<html><p>x", "a web page instead of a response", None),
        (b"", "HTTP 400 without a message", None),
        (b"\xff\xfe\x00", "\ufffd\ufffd\\x00", None),
        (b'{"message": "\\u001b[31mred\\u202e\\nnext"}', "\\x1b[31mred\\u202e\\nnext", None),
        (b'{"message": "m", "code": "\\u001b[2J"}', "m", "\\x1b[2J"),
        (b'{"message": "%s"}' % (b"x" * 10_000), "x" * 2000 + "…", None),
        (b'{"message": "m", "code": "%s"}' % (b"c" * 10_000), "m", "c" * 200 + "…"),
        (b"[" * 50_000, "[" * 2000, None),
        (b'{"credits_required": ' + b"9" * 5000 + b"}", None, None),
        (b"9" * 5000, "9" * 2000, None),
    ],
)
def test_the_message_is_found_in_any_shape_and_cannot_harm_a_terminal(tmp_path, body, message, code):
    with served_by(tmp_path, responding(body, status=b"400 Bad Request")) as station:
        originals = ask(station)
        station.work()
        error = refused(station, "x", originals)
    assert (error["charged"], error["status"], error.get("code")) == ("no", 400, code)
    assert message is None or error["message"] == message
    assert error["message"].isprintable()
    assert len(error["message"]) <= 2001


@pytest.mark.parametrize("status", [b"401 Unauthorized", b"400 Bad Request", b"502 Bad Gateway", b"200 OK"])
def test_a_key_that_a_server_repeats_is_not_written_to_disk(tmp_path, status):
    echo = b"y" * 1000 + b'wrong key "Bearer ' + KEY.encode() + b'"' + b"z" * 1000

    def script(exchange):
        exchange.request()
        exchange.send(b"HTTP/1.1 %s\r\nx-request-id: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % (status, KEY.encode()))
        pieces = [echo[at : at + 7] for at in range(0, len(echo), 7)]  # the key comes in pieces
        exchange.send(b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")

    with served_by(tmp_path, script) as station:
        ask(station)
        (outcome,) = station.work()
        assert KEY not in repr(outcome)
        assert station.error("x")["ids"]["x-request-id"] == "***"
        if status == b"200 OK":
            assert (station.errors / "x.answer.bin").read_bytes() == echo.replace(KEY.encode(), b"***")


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%s\r\n",  # where a length should be
        b"HTTP/1.1 200 OK\r\nwrong key: %s\r\n\r\n",
        b"wrong key %s\r\n\r\n",
        b"y" * 250 + b"%s\r\n\r\n",  # the message ends within the key
    ],
)
def test_an_error_of_the_network_library_about_a_broken_response_never_contains_the_key(tmp_path, capfd, reply):
    def script(exchange):
        exchange.request()
        exchange.send(reply % KEY.encode())

    with served_by(tmp_path, script) as station:
        ask(station)
        (outcome,) = station.work()
        no_secret(tmp_path, KEY[:8], repr(outcome) + "".join(capfd.readouterr()))
        assert "***" in station.error("x")["message"]


@contextlib.contextmanager
def served_with(key, tmp_path, *scripts, **settings):
    with served_by(tmp_path, *scripts, **settings) as station:
        client = Client(station.config().endpoint, lambda: Key(key))
        with contextlib.closing(client):
            station.worker = Distrustful(station.spool, client, station.journal, station.config())
            yield station


@pytest.mark.parametrize(
    "status", [b"401 Unauthorized", b"400 Bad Request", b"302 Found", b"500 No", b"502 Bad Gateway"]
)
def test_a_short_key_that_a_refusal_repeats_is_not_written_to_disk(tmp_path, capfd, status):
    header = responding(b'{"message": "hunter2 is no key", "code": "not-hunter2"}', b"cf-ray: hunter2", status=status)
    with served_with("hunter2", tmp_path, header) as station:
        ask(station)
        (outcome,) = station.work()
        assert outcome.message.startswith("*** is no key")
        assert (station.error("x")["code"], row_of(station)["code"]) == ("not-***", "not-***")
        no_secret(tmp_path, "hunter2", repr(outcome) + "".join(capfd.readouterr()))


def test_an_image_that_contains_a_short_key_by_chance_is_published_unchanged(tmp_path):
    body = paid(IMAGE)
    key = base64.b64encode(IMAGE)[20:35].decode()
    with served_with(key, tmp_path, responding(body)) as station:
        originals = ask(station)
        station.work()
        completed(station, "x", originals, "x.png")
        assert (station.outbox / "x.png").read_bytes() == IMAGE


# Free and transient


@pytest.mark.parametrize("tag", ["once 429", "times 3 429", "once 429-plain", "times 2 503-shutdown"])
def test_a_request_with_a_free_and_transient_error_is_sent_again_and_paid_once(station, sandbox, tag):
    originals = ask(station, tag)
    (outcome,) = station.work()

    receipt = completed(station, "x", originals, "x.jpg")
    refusals = int(tag.split()[1]) if tag.startswith("times") else 1
    assert receipt["attempts"] == refusals + 1
    assert (outcome.end, outcome.charged, outcome.credits) == (End.OVER, "yes", 134)
    rows = station.ledger.rows()
    assert [(row["outcome"], row["charged"]) for row in rows] == [("busy", "no")] * refusals + [("completed", "yes")]
    assert [row["attempt"] for row in rows] == list(range(1, refusals + 2))
    report = sandbox.report()
    assert (report["requests"], report["charged"]) == (refusals + 1, 1)
    assert {call["idempotency_key"] for call in report["calls"]} == {receipt["job"]}


@pytest.mark.parametrize(("tag", "attempts"), BUSY)
def test_a_prompt_fails_when_its_attempts_are_used_up(station, sandbox, tag, attempts):
    originals = ask(station, tag)
    station.work()

    error = refused(station, "x", originals)
    assert (error["charged"], error["attempts"]) == ("no", attempts)
    assert "busy" in error["next"]
    assert [row["charged"] for row in station.ledger.rows()] == ["no"] * attempts
    report = sandbox.report()
    assert (report["requests"], report["charged"]) == (attempts, 0)


def test_the_wait_before_another_attempt_is_what_the_api_asks_for(station, sandbox):
    ask(station, "once 429")
    candidate = station.scan.scan_all(0, 0).ready[0]
    outcome = station.worker.start(candidate.claim(station.spool.new_job(), 0.0))
    assert (outcome.end, outcome.reason.kind) == (End.DEFERRED, "busy")
    assert 1 <= outcome.delay <= 1.25
    assert outcome.reason.message == "Too many requests"
    again = station.worker.process(outcome.job)
    assert again.end is End.DEFERRED  # no response ended the wait
    assert sandbox.report()["requests"] == 1
    assert station.worker.process(outcome.job, is_resumed=True).end is End.OVER
    assert sandbox.report()["requests"] == 2


@pytest.mark.parametrize(
    ("header", "least"), [(b"7", 7), (b"99999", 3600), (b"-1", 0), (b"soon", 0), (b"Thu, 01 Jan 1970 00:00:00 GMT", 0)]
)
def test_a_retry_after_of_any_kind_is_bounded(tmp_path, header, least):
    reply = responding(b"{}", b"Retry-After: " + header, status=b"429 Too Many Requests")
    with served_by(tmp_path, reply) as station:
        ask(station)
        candidate = station.scan.scan_all(0, 0).ready[0]
        outcome = station.worker.start(candidate.claim(station.spool.new_job(), 0.0))
    assert outcome.end is End.DEFERRED
    assert least <= outcome.delay <= least * 1.25 + 0.1


# Charge unknown


@pytest.mark.parametrize(("tag", "status", "code", "message"), UNCLEAR, ids=[row[0] for row in UNCLEAR])
def test_after_a_response_that_proves_nothing_the_charge_is_unknown(station, sandbox, tag, status, code, message):
    originals = ask(station, tag)
    (outcome,) = station.work()

    error = refused(station, "x", originals)
    assert error["charged"] == "unknown"
    assert error["message"].startswith(message)
    assert (error["status"], error.get("code")) == (status, code)
    assert "balance" in error["next"]
    assert (outcome.charged, outcome.reason) == ("unknown", None)
    row = row_of(station)
    assert (row["outcome"], row["charged"], row["status"]) == ("unknown", "unknown", status)
    assert sandbox.report()["requests"] == 1


@pytest.mark.parametrize("tag", WITHOUT_RESPONSE)
def test_after_a_complete_request_without_a_response_the_charge_is_unknown(station, sandbox, tag):
    originals = ask(station, tag)
    (outcome,) = station.work()

    error = refused(station, "x", originals)
    assert error["charged"] == "unknown"
    assert "may have been charged" in error["message"]
    assert "status" not in error
    assert "sent" in error["times"]
    assert "answered" not in error["times"]
    assert "balance" in error["next"]
    assert outcome.charged == "unknown"
    row = row_of(station)
    assert (row["outcome"], row["charged"], row["status"]) == ("unknown", "unknown", 0)
    assert row["sent_at"]
    assert row["answered_at"] is None
    report = sandbox.report()
    assert (report["requests"], report["charged"]) == (1, 1)


# Charged


def test_a_success_becomes_images_and_a_receipt(station, sandbox):
    originals = ask(station, front="n = 2")
    (outcome,) = station.work()

    receipt = completed(station, "x", originals, "x-1.jpg", "x-2.jpg")
    (call,) = sandbox.report()["calls"]
    for image, served in zip(receipt["images"], call["images"], strict=True):
        content = (station.outbox / image["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == image["sha256"] == served
        assert image["bytes"] == len(content)
        assert (image["mime"], image["width"], image["height"]) == ("image/jpeg", 512, 512)
    assert "problems" not in receipt
    assert receipt["prompt"] == "a cat"
    assert receipt["prompt_sha256"] == hashlib.sha256(b"a cat").hexdigest()
    assert receipt["request"] == {"provider": "gemini", "n": 2}
    assert receipt["billing"] == {"credits_charged": 268, "credits_per_image": 134}
    assert receipt["credits_charged"] == 268
    assert (receipt["provider"], receipt["model"]) == ("gemini", "gemini-3-pro-image")
    assert (receipt["asked"], receipt["got"], receipt["attempts"]) == (2, 2, 1)
    assert receipt["ids"]["x-request-id"].startswith("req_")
    times = [receipt["times"][name] for name in ("claimed", "sent", "answered", "published")]
    assert times == sorted(times)
    assert receipt["inputs"][0]["sha256"] == hashlib.sha256(IMAGE).hexdigest() == call["inputs"][0]
    assert call["idempotency_key"] == receipt["job"]
    assert (outcome.destination, outcome.charged, outcome.credits, outcome.answered) == ("outbox", "yes", 268, True)
    row = row_of(station)
    assert (row["outcome"], row["charged"], row["credits"], row["asked"], row["got"]) == ("completed", "yes", 268, 2, 2)
    assert sandbox.report()["credits"] == 268


@pytest.mark.parametrize(("tag", "ending", "inside", "remark", "cost"), UNREADABLE, ids=[row[0] for row in UNREADABLE])
def test_a_charged_response_without_an_image_is_kept_completely(station, sandbox, tag, ending, inside, remark, cost):
    originals = ask(station, tag)
    (outcome,) = station.work()

    error = refused(station, "x", originals, beside=ending)
    assert error["charged"] == "yes"
    assert any(remark in problem for problem in error["problems"])
    assert error["problems"][0] in error["message"]
    assert error["status"] == 200
    assert error.get("credits_charged") == cost
    assert "do not send it again" in error["next"]
    assert "imagewatch retry x reads the saved response again" in error["next"]
    assert inside in (station.errors / f"x.answer.{ending}").read_bytes()
    assert (outcome.destination, outcome.charged) == ("errors", "yes")
    row = row_of(station)
    assert (row["outcome"], row["charged"], row["credits"], row["got"]) == ("completed", "yes", cost, 0)
    assert row["message"] == "; ".join(error["problems"]), "the reason is in the history, too"
    report = sandbox.report()
    assert (report["requests"], report["charged"]) == (1, 1)


@pytest.mark.parametrize(("tag", "names", "got", "remark"), FLAWED, ids=[row[0] for row in FLAWED])
def test_good_images_are_published_beside_a_bad_one(station, sandbox, tag, names, got, remark):
    originals = ask(station, tag, "n = 2")
    (outcome,) = station.work()

    receipt = completed(station, "x", originals, *names)
    assert (receipt["asked"], receipt["got"]) == (2, got)
    assert any(problem.startswith(remark) for problem in receipt["problems"])
    assert ("asked for 2, got 1" in receipt["problems"]) == (got == 1)
    assert receipt["credits_charged"] == sandbox.report()["credits"] == outcome.credits == 268
    assert "problem" not in receipt["images"][0]
    assert all("problem" in image for image in receipt["images"][1:])
    served = sandbox.report()["calls"][0]["images"]
    for image, sha256 in zip(receipt["images"], served, strict=True):
        content = (station.outbox / image["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == image["sha256"]
        assert sha256 in {image["sha256"], None}
    assert row_of(station)["got"] == got


def test_an_incomplete_image_is_published_with_a_remark(station, sandbox):
    originals = ask(station, "bad-picture")
    station.work()
    receipt = completed(station, "x", originals, "x.jpg")
    assert receipt["problems"] == ["image 1: cut short: no EOI marker"]
    assert receipt["images"][0]["problem"]


def test_the_file_ending_follows_the_content_not_the_type_that_the_api_names(station, sandbox):
    originals = ask(station, "wrong-mime")
    station.work()
    (image,) = completed(station, "x", originals, "x.jpg")["images"]
    assert (image["mime"], image["declared_mime"]) == ("image/jpeg", "image/png")


def test_a_receipt_reports_the_content_credentials_of_an_image_and_the_image_is_published_unchanged(station, sandbox):
    originals = ask(station, "credentials")
    station.work()
    (image,) = completed(station, "x", originals, "x.png")["images"]
    assert image["content_credentials"] is True
    assert [image["sha256"]] == sandbox.report()["calls"][0]["images"]
    ask(station, stem="plain")
    station.work()
    assert "content_credentials" not in station.receipt("plain")["images"][0]


@pytest.mark.parametrize("tag", ["gzip", "b64", "slow 0.01", "trickle-headers 0.0001"])
def test_a_success_may_be_delivered_in_any_way(station, sandbox, tag):
    originals = ask(station, tag)
    station.work()
    receipt = completed(station, "x", originals, "x.jpg")
    assert "problems" not in receipt
    assert sandbox.report()["calls"][0]["images"] == [receipt["images"][0]["sha256"]]


def test_a_success_without_billing_has_an_unknown_cost(station, sandbox):
    originals = ask(station, "no-billing")
    (outcome,) = station.work()
    receipt = completed(station, "x", originals, "x.jpg")
    assert "billing" not in receipt
    assert "credits_charged" not in receipt
    assert outcome.credits is None
    assert row_of(station)["credits"] is None


@pytest.mark.parametrize(
    ("billing", "cost"),
    [
        ({"credits_charged": 1.5, "note": "x\u001b"}, 1.5),
        ({"credits_charged": 12.0}, 12),
        ({"credits_charged": "7"}, None),
        ({"credits_charged": True}, None),
        ({"credits_charged": None, "deep": {"a": [1, None, {"b": 2}]}}, None),
        ({"credits_charged": 10**400}, None),
        ("free", None),
        ([], None),
    ],
)
def test_unusual_billing_never_costs_the_image(tmp_path, billing, cost):
    with served_by(tmp_path, responding(paid(IMAGE, billing=billing))) as station:
        originals = ask(station)
        station.work()
        receipt = completed(station, "x", originals, "x.png")
        assert receipt.get("credits_charged") == cost
        assert row_of(station)["credits"] == cost


@pytest.mark.parametrize("header", ["-5", "-0.001", "-1e308", "-Infinity", "Infinity", "1e999", "NaN"])
def test_a_charge_that_cannot_be_counts_as_unknown_and_makes_no_room_under_a_cap(tmp_path, header):
    body = paid(IMAGE, billing={"credits_charged": "?"}).replace(b'"?"', header.encode())
    limits = {"limits__credits_per_day": "60", "limits__assumed_credits": "30"}
    with served_by(tmp_path, responding(body), responding(body), **limits) as station:
        for stem in "xyz":
            ask(station, stem=stem)
            outcomes = station.work()
        assert (outcomes[-1].end, outcomes[-1].reason.kind) == (End.RETURNED, "cap")
        assert [row["credits"] for row in station.ledger.rows()] == [None, None]
        receipt = station.receipt("x")
    assert (receipt["charged"], "credits_charged" in receipt) == ("yes", False)
    assert str(float(receipt["billing"]["credits_charged"])) == str(float(header))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"{}",
        b'{"images": null}',
        b'{"images": [null, 3, "x", [], {}]}',
        b'{"images": [{"b64_json": 3}, {"url": 4}, {"b64_json": ""}]}',
        b'{"images": [{"b64_json": "@0"}]}',
        b'{"images": [{"b64_json": "%s"}]}' % (b"!" * 100),
        b'{"images": ' + b"[" * 100_000,
        b'{"images": [], "n": ' + b"1" * 5000 + b"}",
        b"\x00\xff" * 100,
        b'{"images": [{"url": "http://[::1"}]}',
        b'{"images": [{"url": "\\ud800"}]}',
    ],
)
def test_any_charged_response_is_kept_byte_for_byte(tmp_path, body):
    with served_by(tmp_path, responding(body)) as station:
        ask(station)
        (outcome,) = station.work()
        over(station)
        assert station.error("x")["charged"] == outcome.charged == "yes"
        (raw,) = station.errors.glob("x.answer.*")
        assert raw.read_bytes() == body
        assert row_of(station)["charged"] == "yes"


@pytest.mark.parametrize("status", [b"200 OK", b"202 Accepted"])
@pytest.mark.parametrize(
    ("body", "message", "code"),
    [
        ({"error": {"message": "This was \u001b[31mblocked.", "code": "moderation_blocked"}}, "blocked.", "moderation"),
        ({"error": {"error": {"message": "Nested."}}}, "Nested.", None),
        ({"message": "Nothing came of it.", "images": []}, "Nothing came of it.", None),
    ],
)
def test_an_error_with_status_200_is_shown_with_its_message_and_counts_as_charged(
    tmp_path, status, body, message, code
):
    raw = json.dumps(body).encode()
    with served_by(tmp_path, responding(raw, status=status)) as station:
        originals = ask(station)
        (outcome,) = station.work()
        error = refused(station, "x", originals, beside="json")
        assert error["charged"] == outcome.charged == "yes"
        assert message in error["message"]
        assert "\x1b" not in error["message"]
        assert "charged for it" not in error["message"], "the message is only the one of the API"
        assert ("code" in error) == (code is not None)
        assert error.get("code", "").startswith(code or "")
        assert "do not send it again" in error["next"]
        assert (station.errors / "x.answer.json").read_bytes() == raw
        row = row_of(station)
        assert (row["charged"], row["code"]) == ("yes", error.get("code", ""))
        assert row["message"].startswith(error["message"])


def test_a_key_that_an_error_with_status_200_repeats_is_not_written_to_disk(tmp_path):
    body = json.dumps({"error": {"message": f"key {KEY} is blocked", "code": KEY}}).encode()
    with served_by(tmp_path, responding(body)) as station:
        ask(station)
        station.work()
        assert "is blocked" in station.error("x")["message"]
        no_secret(tmp_path, KEY, "")


@pytest.mark.parametrize(
    "entry",
    [
        {"url": "data:image/png;base64," + base64.b64encode(IMAGE).decode()},
        {"url": "data:image/png," + quote(IMAGE, safe="")},
        {"b64_json": base64.urlsafe_b64encode(IMAGE).decode().rstrip("=")},
        {"b64_json": "data:image/png;base64," + base64.encodebytes(IMAGE).decode()},
    ],
    ids=["data url", "data url in percent", "url-safe", "data url in b64_json"],
)
def test_an_image_is_published_in_any_usual_encoding(tmp_path, entry):
    body = json.dumps({"images": [entry], "billing": {"credits_charged": 7}}).encode()
    with served_by(tmp_path, responding(body)) as station:
        originals = ask(station)
        station.work()
        receipt = completed(station, "x", originals, "x.png")
        assert "problems" not in receipt
        assert (station.outbox / "x.png").read_bytes() == IMAGE
        assert (receipt["credits_charged"], receipt["charged"]) == (7, "yes")


def test_a_success_may_have_any_status_from_200_to_299(tmp_path):
    with served_by(tmp_path, responding(paid(IMAGE), status=b"201 Created")) as station:
        originals = ask(station)
        station.work()
        completed(station, "x", originals, "x.png")


def test_if_more_images_come_than_were_asked_for_all_are_published(tmp_path):
    with served_by(tmp_path, responding(paid(IMAGE, small_image("WEBP"), small_image("JPEG")))) as station:
        originals = ask(station)
        station.work()
        receipt = completed(station, "x", originals, "x-1.png", "x-2.webp", "x-3.jpg")
        assert receipt["problems"] == ["asked for 1, got 3"]


def test_a_response_over_the_limit_counts_as_charged_and_its_received_part_is_kept(tmp_path):
    body = paid(IMAGE)
    with served_by(tmp_path, responding(body), endpoint__max_response_bytes="100") as station:
        originals = ask(station)
        station.work()
        error = refused(station, "x", originals, beside="json")
        assert error["charged"] == "yes"
        assert "max_response_bytes (100)" in error["message"]
        assert (station.errors / "x.answer.json").read_bytes() == body[:100]


def test_the_images_before_a_cut_are_published(tmp_path):
    whole = paid(IMAGE, IMAGE)
    cut = whole[: whole.rindex(b'"b64_json"') + 40]

    def script(exchange):
        exchange.request()
        exchange.send(response(whole)[: -len(whole) + len(cut)])

    with served_by(tmp_path, script) as station:
        originals = ask(station, front="n = 2")
        station.work()
        receipt = completed(station, "x", originals, "x-1.png")
        assert (receipt["asked"], receipt["got"]) == (2, 1)
        assert re.search("cut short after", receipt["problems"][0])
        assert (station.outbox / "x-1.png").read_bytes() == IMAGE


class Slipping(Client):
    """A client with a bug: it fails at an unexpected place."""

    before = False

    def send(self, job, body, on_send, sink):
        if self.before:
            on_send()
        else:
            super().send(job, body, on_send, sink)
        raise RuntimeError("a slip")


@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_a_bug_while_sending_neither_loses_the_response_nor_reports_the_request_as_free(
    station, sandbox, before, image
):
    client = Slipping(station.config().endpoint, lambda: Key(KEY))
    client.before = before
    station.worker = Distrustful(station.spool, client, station.journal, station.config())
    originals = ask(station) if image else {"x.prompt.txt": "a cat"}
    drop(station, originals)
    station.work()
    client.close()
    if before:
        error = refused(station, "x", originals)
        assert error["charged"] == "unknown"
        assert "a slip" in error["message"]
    else:
        completed(station, "x", originals, "x.jpg")
        assert sandbox.report()["requests"] == 1


def test_a_bug_in_the_claim_of_a_recorded_prompt_ends_in_an_error_file(station, sandbox, monkeypatch):
    def slip(*_, **__):
        raise RuntimeError("a slip")

    monkeypatch.setattr(station.spool.originals, "claim", slip)
    originals = {"x.prompt.txt": "a cat"}
    drop(station, originals)
    station.work()
    assert "a slip" in station.error("x")["message"]
    assert (station.errors / "x.prompt.txt").read_text() == "a cat"
    assert (station.names("inbox"), station.leftovers(), sandbox.report()["requests"]) == ([], [], 0)


def test_a_prompt_that_the_rate_keeps_back_when_it_is_recorded_stays_claimed(tmp_path, sandbox):
    with contextlib.closing(Station(tmp_path, sandbox.base_url)) as station:
        spend, refusals = station.journal.spend, [Reason("rate", "limits.requests_per_minute is 1", seconds=0.0)]

        def refuse_once(row, asked, *, skip_repeated, claim=None):
            if refusals:
                station.journal.open(claim)
                return refusals.pop()
            return spend(row, asked, skip_repeated=skip_repeated, claim=claim)

        station.journal.spend = refuse_once
        station.prompt("cat", "a cat")
        (candidate,) = station.scan.scan_all(time.monotonic(), time.time()).ready
        outcome = station.worker.start(candidate.claim(station.spool.new_job(), time.time()))
        assert (outcome.end, outcome.reason.kind) == (End.DEFERRED, "rate")
        assert station.names("inbox") == [f".imagewatch/{outcome.job}/cat.prompt.txt"]
        assert station.worker.process(outcome.job, is_resumed=True).destination == "outbox"
        assert station.leftovers() == []


def test_prompts_that_together_have_reserved_more_than_is_left_do_not_wait_for_each_other(tmp_path):
    body = paid(IMAGE, billing={"credits_charged": 40})  # more than was assumed when all were claimed
    limits = {"limits__credits_per_day": "90", "limits__assumed_credits": "30"}
    with served_by(tmp_path, responding(body), responding(body), **limits) as station:
        worker = Worker(station.spool, station.client, station.journal, station.config())
        for stem in "abc":
            station.prompt(stem, "a cat")
        ready = station.scan.scan_all(time.monotonic(), time.time()).ready
        claims = {one.key[1]: one.claim(station.spool.new_job(), time.time()) for one in ready}
        for claim in claims.values():
            assert station.journal.open(claim, Asked.of({"provider": "flux"})) is None
        outcomes = {stem: worker.start(claims[stem]) for stem in "abc"}
        assert (outcomes["b"].end, outcomes["b"].reason.kind) == (End.DEFERRED, "reserved")
        assert [outcomes[stem].destination for stem in "ac"] == ["outbox", "outbox"]
        last = worker.process(claims["b"].job, is_resumed=True)
        assert (last.end, last.reason.kind) == (End.RETURNED, "cap")
        assert station.names("inbox") == ["b.prompt.txt"]


@pytest.mark.parametrize("image", [False, True])
def test_a_bug_while_a_prompt_is_read_ends_in_an_error_file(station, sandbox, monkeypatch, image):
    def slip(*_):
        raise RuntimeError("a slip")

    monkeypatch.setattr(steps, "build", slip)
    originals = ask(station) if image else {"x.prompt.txt": "a cat"}
    drop(station, originals)
    station.work()
    error = refused(station, "x", originals)
    assert (error["charged"], "a slip" in str(error["problems"])) == ("no", True)
    assert sandbox.report()["requests"] == 0


def test_a_claimed_prompt_that_cannot_be_checked_is_an_error_of_the_disk_and_not_of_the_network(tmp_path, sandbox):
    with contextlib.closing(Station(tmp_path, sandbox.base_url)) as station:
        station.spool.originals.matches_scan = broken_once(station.spool.originals.matches_scan)
        station.prompt("cat", "a cat")
        (outcome,) = station.work()
        assert (outcome.end, outcome.reason.kind) == (End.RETURNED, "disk")
        assert sandbox.report()["requests"] == 0
        station.work()
        assert station.finished() == {"cat": "outbox"}


def broken_once(call):
    """Let a disk fail the first time that something is asked."""
    calls = []

    def stumble(*values):
        calls.append(values)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO), "cat.prompt.txt")
        return call(*values)

    return stumble


def full_once(call):
    """Let a disk that is full be found the first time that something is written."""
    calls = []

    def stumble(*values, **named):
        calls.append(values)
        if len(calls) == 1:
            raise SpoolError("the ledger: full", path="ledger", code=errno.ENOSPC)
        return call(*values, **named)

    return stumble


def test_a_request_that_could_not_be_recorded_was_not_sent_and_was_free(tmp_path, sandbox):
    with contextlib.closing(Station(tmp_path, sandbox.base_url)) as station:
        station.journal.spend = full_once(station.journal.spend)
        station.prompt("cat", "a cat")
        (outcome,) = station.work()
        assert (outcome.end, outcome.reason.kind, "full" in outcome.reason.message) == (End.RETURNED, "disk", True)
        returned(station, {"cat.prompt.txt": "a cat"})
        assert sandbox.report()["requests"] == 0
        station.work()
        assert station.finished() == {"cat": "outbox"}
        assert sandbox.report()["requests"] == 1


def test_a_refusal_of_the_account_that_a_full_disk_kept_out_of_errors_is_shown_by_the_next_prompt(tmp_path, sandbox):
    with contextlib.closing(Station(tmp_path, sandbox.base_url)) as station:
        holds = Holds()
        station.journal.decide = full_once(station.journal.decide)
        station.worker = Distrustful(
            station.spool,
            station.client,
            station.journal,
            station.config(),
            may_report=holds.may_report,
            not_reported=holds.not_reported,
        )
        ask(station, "402", stem="a")
        with pytest.raises(SpoolError, match="full"):
            station.work()
        station.recover()
        assert station.finished() == {}
        ask(station, "402", stem="b")
        station.work()
        assert list(station.finished().values()) == ["errors"]
        assert sum(name.endswith(".prompt.txt") for name in station.names("inbox")) == 1
        assert station.leftovers() == []
