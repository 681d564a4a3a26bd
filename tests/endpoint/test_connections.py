"""Broken connections: a request that was not sent completely is free and waits; otherwise its charge is unknown."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpcore
import pytest
from httpcore._backends.sync import SyncStream
from support.daemon import KEY, REMOTE_NAME
from support.scripted import (
    Scripted,
    completed,
    drop,
    heavy,
    no_secret,
    over_tls,
    paid,
    refused,
    responding,
    response,
    returned,
    small_image,
    through_proxy,
    tunnel,
)
from support.station import Station

from imagewatch.config.key import Key
from imagewatch.config.schema import Endpoint
from imagewatch.endpoint.body import Body
from imagewatch.endpoint.client import Client
from imagewatch.job.outcome import End

IMAGE = small_image()
SMALL = {"x.prompt.txt": "a cat", "x.png": IMAGE}
LARGE_BYTES = 12_000_000  # more than the buffers of both ends hold


@pytest.fixture(autouse=True)
def _no_secret(tmp_path, capfd):
    yield
    no_secret(tmp_path, KEY, "".join(capfd.readouterr()))


@pytest.fixture(scope="module")
def large():
    return {"x.prompt.txt": "a cat", "x.png": heavy(LARGE_BYTES)}


@contextlib.contextmanager
def at(tmp_path, base_url, **settings):
    if "endpoint__deadline_seconds" in settings:
        settings = {"endpoint__connect_timeout_seconds": "1", **settings}  # it may not be longer
    with contextlib.closing(Station(tmp_path, base_url, **settings)) as station:
        yield station


@contextlib.contextmanager
def served_by(tmp_path, *scripts, receive_bytes=None, **settings):
    with (
        Scripted(*scripts, receive_bytes=receive_bytes) as server,
        at(tmp_path, server.base_url, **settings) as station,
    ):
        station.server = server
        yield station


def unreachable(station, originals, *texts):
    """Process the prompts; check that there was nothing but a reason to wait."""
    drop(station, originals)
    (outcome,) = station.work()
    returned(station, originals)
    assert outcome.end is End.RETURNED
    assert outcome.reason.kind == "unreachable"
    for text in texts:
        assert text in outcome.reason.message
    assert station.ledger.rows() == [] or {row["charged"] for row in station.ledger.rows()} == {"no"}
    return outcome


def charge_unknown(station, originals, *texts):
    """Process the prompts; check that the job ended with an unknown charge."""
    drop(station, originals)
    (outcome,) = station.work()
    error = refused(station, "x", originals)
    assert error["charged"] == outcome.charged == "unknown"
    assert "may have been charged" in error["message"]
    for text in texts:
        assert text in error["message"]
    assert "balance" in error["next"]
    (row,) = station.ledger.rows()
    assert (row["outcome"], row["charged"]) == ("unknown", "unknown")
    assert station.server.connections == 1
    return error


def silent(exchange):
    """Read a request, and never respond."""
    exchange.request()
    exchange.linger()


def published(station, image):
    """Process the prompts; check that this image was published."""
    drop(station, SMALL)
    (outcome,) = station.work()
    assert (outcome.destination, outcome.charged) == ("outbox", "yes")
    assert (station.outbox / "x.png").read_bytes() == image


# Nothing was sent


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def test_a_refused_connection_leaves_the_prompt_in_the_inbox(tmp_path):
    with at(tmp_path, f"http://127.0.0.1:{free_port()}") as station:
        unreachable(station, SMALL, "cannot be reached", "refused")


def test_a_name_that_does_not_resolve_leaves_the_prompt_in_the_inbox(tmp_path):
    with at(tmp_path, "https://imagewatch-test.invalid") as station:
        unreachable(station, SMALL, "https://imagewatch-test.invalid cannot be reached")


def test_tls_to_a_port_without_tls_leaves_the_prompt_in_the_inbox(tmp_path):
    def script(exchange):
        hello = exchange.connection.recv(65536)
        assert KEY.encode() not in hello
        exchange.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    with Scripted(script) as server, at(tmp_path, f"https://127.0.0.1:{server.port}") as station:
        unreachable(station, SMALL, "cannot be reached", "SSL")


def test_a_tls_handshake_that_never_ends_leaves_the_prompt_in_the_inbox(tmp_path):
    settings = {"endpoint__connect_timeout_seconds": "0.2"}
    with (
        Scripted(lambda exchange: exchange.linger()) as server,
        at(tmp_path, f"https://127.0.0.1:{server.port}", **settings) as station,
    ):
        unreachable(station, SMALL, "cannot be reached", "timed out")


def test_a_connection_that_is_never_accepted_leaves_the_prompt_in_the_inbox(tmp_path):
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        address = listener.getsockname()
        for _ in range(4):  # until its queue is full
            filler = stack.enter_context(socket.socket())
            filler.settimeout(0)
            filler.connect_ex(address)
        settings = {"endpoint__connect_timeout_seconds": "0.2"}
        with at(tmp_path, f"http://127.0.0.1:{address[1]}", **settings) as station:
            unreachable(station, SMALL, "cannot be reached", "timed out")


def test_a_proxy_that_refuses_to_connect_leaves_the_prompt_in_the_inbox_and_never_gets_the_key(tmp_path, monkeypatch):
    heads = []

    def script(exchange):
        heads.append(exchange.head())
        exchange.send(response(b"", status=b"502 Bad Gateway"))

    with Scripted(script) as proxy:
        through_proxy(monkeypatch, proxy)
        with at(tmp_path, f"https://{REMOTE_NAME}") as station:
            unreachable(station, SMALL, "cannot be reached", "502")
    assert heads[0].startswith(b"CONNECT imagewatch-test.invalid:443 ")
    assert KEY.encode() not in heads[0]


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_a_proxy_of_the_environment_is_not_used_for_a_loopback_endpoint(tmp_path, sandbox, monkeypatch, variable):
    with Scripted() as proxy:
        monkeypatch.setenv(variable, proxy.base_url)
        with at(tmp_path, sandbox.base_url) as station:
            drop(station, {"x.prompt.txt": "a cat"})  # flux: its image is downloaded by url
            station.work()
            completed(station, "x", {"x.prompt.txt": "a cat"}, "x.jpg")
    assert proxy.connections == 0


# Not sent completely


def cut_off(station, originals, attempts, *texts):
    """Process the prompts; check that each attempt counted and was free, and the last one was no reason to wait."""
    drop(station, originals)
    (outcome,) = station.work()
    error = refused(station, "x", originals)
    assert (error["charged"], error["attempts"], "status" in error) == ("no", attempts, False)
    assert (outcome.reason.kind, outcome.answered) == ("broken", False)
    for text in ("while the request was sent", "nothing was charged", *texts):
        assert text in error["message"]
    assert "fewer or smaller images" in error["next"]
    assert [row["charged"] for row in station.ledger.rows()] == ["no"] * attempts
    assert station.server.connections == attempts


def resetting(exchange):
    exchange.body(exchange.head(), most=100_000)
    exchange.reset()


@pytest.mark.parametrize("script", [resetting, lambda exchange: exchange.head()], ids=["reset", "closed"])
@pytest.mark.parametrize("attempts", [1, 3])
def test_an_upload_that_is_cut_off_each_time_fails_after_its_attempts_and_was_free(tmp_path, large, script, attempts):
    with served_by(tmp_path, *[script] * attempts, retry__attempts=str(attempts)) as station:
        cut_off(station, large, attempts)


def test_an_upload_that_is_cut_off_once_is_completed_and_paid_once(tmp_path, large):
    with served_by(tmp_path, lambda exchange: exchange.head(), responding(paid(IMAGE))) as station:
        drop(station, large)
        (outcome,) = station.work()
        assert (outcome.destination, outcome.charged) == ("outbox", "yes")
        assert completed(station, "x", large, "x.png")["attempts"] == 2
        assert station.server.connections == 2


def test_a_server_that_never_reads_the_body_was_sent_no_complete_request(tmp_path, large):
    def script(exchange):
        exchange.head()
        exchange.linger()

    settings = {"endpoint__deadline_seconds": "1.5", "retry__attempts": "1"}
    with served_by(tmp_path, script, receive_bytes=8192, **settings) as station:
        cut_off(station, large, 1, "deadline_seconds")


def test_a_server_that_reads_slowly_past_the_deadline_was_sent_no_complete_request(tmp_path, large):
    received = []

    def script(exchange):
        head = exchange.head()
        exchange.body(head, most=1_000_000)
        exchange.pause(2)
        received.append(exchange.drain())

    settings = {"endpoint__deadline_seconds": "1.5", "retry__attempts": "1"}
    with served_by(tmp_path, script, receive_bytes=8192, **settings) as station:
        cut_off(station, large, 1, "deadline_seconds")
        station.server.wait_for(1)
    assert received[0] < LARGE_BYTES


@pytest.mark.parametrize("drains", [False, True])
@pytest.mark.parametrize(
    ("status", "kind"), [(b"413 Payload Too Large", None), (b"401 Unauthorized", "key"), (b"400 Bad Request", None)]
)
def test_a_response_before_the_body_was_read_counts_as_the_response(tmp_path, large, drains, status, kind):
    def script(exchange):
        exchange.head()
        exchange.send(response(b'{"message": "not that"}', b"Connection: close", status=status))
        exchange.connection.shutdown(socket.SHUT_WR)
        if drains:
            exchange.drain()

    with served_by(tmp_path, script) as station:
        drop(station, large)
        (outcome,) = station.work()
        error = refused(station, "x", large)
        assert (error["charged"], error["status"], error["message"]) == ("no", int(status[:3]), "not that")
        assert (outcome.reason and outcome.reason.kind) == kind
        assert station.server.connections == 1


def test_an_input_that_changes_while_it_is_sent_stops_the_request(tmp_path, large):
    received = []

    def script(exchange):
        head = exchange.head()
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        (claimed,) = (tmp_path / "watched/inbox/.imagewatch").glob("*/x.png")
        with open(claimed, "r+b") as file:
            file.seek(-40, os.SEEK_END)
            file.write(b"\1")
        received.append((length, exchange.drain()))

    with served_by(tmp_path, script, receive_bytes=8192) as station:
        drop(station, large)
        (outcome,) = station.work()
        assert outcome.end is End.RETURNED
        assert outcome.reason is None
        assert station.names("inbox") == sorted(large)
        assert station.leftovers() == []
        assert [row for row in station.ledger.rows() if row["charged"] != "no"] == []
        station.server.wait_for(1)
    ((length, came),) = received
    assert came < length


@pytest.mark.parametrize("change", ["shorter", "removed"])
def test_an_input_that_is_cut_or_removed_stops_the_request(tmp_path, large, change):
    received = []
    originals = {**large, "x.2.png": IMAGE}

    def script(exchange):
        head = exchange.head()
        length = int(head.lower().partition(b"content-length:")[2].split()[0])
        (claim,) = (tmp_path / "watched/inbox/.imagewatch").glob("*/")
        if change == "removed":
            (claim / "x.2.png").unlink()
        else:
            os.truncate(claim / "x.png", LARGE_BYTES - 1000)
        received.append((length, exchange.drain()))

    with served_by(tmp_path, script, receive_bytes=8192) as station:
        drop(station, originals)
        (outcome,) = station.work()
        assert outcome.end is End.RETURNED
        assert station.leftovers() == []
        station.server.wait_for(1)
    ((length, came),) = received
    assert came < length


# Sent completely


@pytest.mark.parametrize("rude", [False, True])
def test_the_charge_is_unknown_if_the_connection_ends_exactly_after_the_last_byte(tmp_path, large, rude):
    bodies = []

    def script(exchange):
        _, body = exchange.request()
        bodies.append(body)
        if rude:
            exchange.reset()

    with served_by(tmp_path, script) as station:
        charge_unknown(station, large, "no response came")
    assert bodies[0].endswith(b"]}")


def test_the_charge_is_unknown_at_the_deadline_if_a_server_reads_and_never_responds(tmp_path):
    with served_by(tmp_path, silent, endpoint__deadline_seconds="1.5") as station:
        charge_unknown(station, SMALL, "not finished after 1.5 seconds")


def stop_after_sending(monkeypatch, seconds):
    """Stop the daemon for so long right after the last byte of a request."""
    pieces = Body.__iter__

    def stopping(body):
        yield from pieces(body)
        threading.Event().wait(seconds)

    monkeypatch.setattr(Body, "__iter__", stopping)


@pytest.fixture
def stopped_after_sending(monkeypatch):
    """The daemon is stopped right after the last byte of a request, and continues when the deadline has passed."""
    stop_after_sending(monkeypatch, 1.6)


def test_a_response_that_arrived_while_its_read_was_given_up_is_published(tmp_path, monkeypatch):
    """With TLS, a read that was stopped until its time was over ends without a look at what has arrived."""
    read, calls = SyncStream.read, []

    def stopped(stream, most, timeout=None):
        calls.append(timeout)
        if len(calls) == 1:
            threading.Event().wait(3)
            raise httpcore.ReadTimeout("timed out")
        return read(stream, most, timeout)

    monkeypatch.setattr(SyncStream, "read", stopped)
    with served_by(tmp_path, responding(paid(IMAGE)), endpoint__deadline_seconds="1.5") as station:
        published(station, IMAGE)


@pytest.mark.usefixtures("stopped_after_sending")
@pytest.mark.parametrize("originals", [{"x.prompt.txt": "a cat"}, SMALL], ids=["a text", "with an image"])
def test_the_charge_is_unknown_if_the_deadline_passes_right_after_the_last_byte(tmp_path, originals):
    with served_by(tmp_path, silent, endpoint__deadline_seconds="1.5") as station:
        charge_unknown(station, originals, "not finished after 1.5 seconds")


def test_the_charge_is_unknown_whatever_fails_after_the_last_byte(tmp_path, monkeypatch):
    pieces = Body.__iter__

    def failing(body):
        yield from pieces(body)
        raise OSError("the disk failed")

    monkeypatch.setattr(Body, "__iter__", failing)

    with served_by(tmp_path, silent) as station:
        charge_unknown(station, SMALL, "no response came: the disk failed")


@pytest.mark.usefixtures("stopped_after_sending")
@pytest.mark.parametrize("image", [IMAGE, heavy(300_000)], ids=["small", "large"])
def test_a_response_that_had_arrived_when_the_deadline_passed_is_published(tmp_path, image):
    def script(exchange):
        exchange.request()
        exchange.send(response(paid(image)))

    with served_by(tmp_path, script, endpoint__deadline_seconds="1.5") as station:
        published(station, image)


def test_a_response_of_which_a_part_arrived_while_the_daemon_was_stopped_is_read_to_its_end(tmp_path, monkeypatch):
    """The server sends the rest as soon as there is room, after the deadline."""
    stop_after_sending(monkeypatch, 2.3)
    image = heavy(3_000_000)

    def script(exchange):
        exchange.request()
        exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16384)
        exchange.send(response(paid(image)))

    with served_by(tmp_path, script, endpoint__deadline_seconds="1") as station:
        published(station, image)


@pytest.mark.usefixtures("stopped_after_sending")
def test_a_response_in_very_many_pieces_that_had_arrived_when_the_deadline_passed_is_published(tmp_path):
    image = heavy(100_000)
    body = paid(image)

    def script(exchange):
        exchange.request()
        pieces = [body[at : at + 100] for at in range(0, len(body), 100)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")

    with served_by(tmp_path, script, endpoint__deadline_seconds="1.5") as station:
        published(station, image)


def test_the_charge_is_unknown_at_the_read_timeout_if_a_server_reads_and_never_responds(tmp_path):
    with served_by(tmp_path, silent, endpoint__timeout_seconds="1") as station:
        charge_unknown(station, SMALL, "timed out")


def test_the_charge_is_unknown_if_a_server_never_reads_a_small_request(tmp_path):
    with served_by(tmp_path, lambda exchange: exchange.linger(), endpoint__deadline_seconds="1.5") as station:
        charge_unknown(station, SMALL, "deadline_seconds")


def test_the_charge_is_unknown_if_headers_trickle_past_the_deadline(tmp_path):
    def script(exchange):
        exchange.request()
        exchange.trickle(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000, 0.02)

    with served_by(tmp_path, script, endpoint__deadline_seconds="1.5", endpoint__timeout_seconds="5") as station:
        charge_unknown(station, SMALL, "deadline_seconds")


TLS_SETTINGS = {"endpoint__connect_timeout_seconds": "1", "endpoint__deadline_seconds": "1"}


@pytest.mark.parametrize("proxied", [False, True])
def test_the_charge_is_unknown_if_headers_trickle_over_tls_past_the_deadline(
    tmp_path, monkeypatch, certificate, proxied
):
    heard_out = []

    def script(exchange):
        exchange.request()
        exchange.trickle(b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 25, 0.02)
        heard_out.append(exchange)

    with Scripted((tunnel if proxied else over_tls)(certificate.context, script)) as server:
        through_proxy(monkeypatch, server)
        host = REMOTE_NAME if proxied else f"127.0.0.1:{server.port}"
        with at(tmp_path, f"https://{host}", endpoint__ca_file=certificate.path, **TLS_SETTINGS) as station:
            station.server = server
            charge_unknown(station, SMALL, "deadline_seconds")
        server.wait_for(1)
    assert heard_out == []


def test_the_charge_is_unknown_at_the_deadline_after_endless_interim_responses(tmp_path):
    def script(exchange):
        exchange.request()
        exchange.trickle(b"HTTP/1.1 102 Processing\r\n\r\n" * 1000, 0.002)

    with served_by(tmp_path, script, endpoint__deadline_seconds="1.5", endpoint__timeout_seconds="5") as station:
        charge_unknown(station, SMALL, "deadline_seconds")


NONSENSE = {
    # More than the 100 kB a head may have while it is incomplete and one read of 256 kB together: however it is cut up.
    "a header flood": b"HTTP/1.1 200 OK\r\n" + b"X-Flood: " + b"y" * 1_000_000 + b"\r\n\r\n",
    "no HTTP": b"220 mail.example ESMTP\r\n",
    "bytes": bytes(range(256)),
    "a broken status": b"HTTP/1.1 2x0 OK\r\n\r\n",
    "a broken header": b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabc",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Type: app",
    "an interim answer alone": b"HTTP/1.1 100 Continue\r\n\r\n",
}


@pytest.mark.parametrize("reply", NONSENSE.values(), ids=NONSENSE)
def test_the_charge_is_unknown_if_the_response_is_not_http(tmp_path, reply):
    def script(exchange):
        exchange.request()
        exchange.send(reply)
        exchange.connection.shutdown(socket.SHUT_WR)
        exchange.drain()

    with served_by(tmp_path, script) as station:
        charge_unknown(station, SMALL, "the request was sent, but no response came")


def test_the_charge_is_unknown_after_an_unrequested_upgrade(tmp_path):
    def script(exchange):
        exchange.request()
        exchange.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n")

    with served_by(tmp_path, script) as station:
        drop(station, SMALL)
        station.work()
        assert refused(station, "x", SMALL)["charged"] == "unknown"


# With a response


BODY = paid(IMAGE)
HEAD = b"HTTP/1.1 200 OK\r\n"
PROPER = {
    "interim responses": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n" + response(BODY),
    "without a length": HEAD + b"\r\n" + BODY,
    "by HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\n" + BODY,
    "in chunks": HEAD
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x;a=b\r\n%s\r\n" % (len(BODY[k : k + 7]), BODY[k : k + 7]) for k in range(0, len(BODY), 7))
    + b"0\r\nTrailer: x\r\n\r\n",
    "with long headers": HEAD + b"X-Long: " + b"y" * 60_000 + b"\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY,
    "with more after it": response(BODY) + b"HTTP/1.1 500 Oops\r\n\r\n",
    "with its length twice": HEAD + b"Content-Length: %d\r\n" % len(BODY) * 2 + b"\r\n" + BODY,
    "with a length that does not count": HEAD
    + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY),
}


@pytest.mark.parametrize("reply", PROPER.values(), ids=PROPER)
def test_a_response_may_be_framed_in_any_way(tmp_path, reply):
    def script(exchange):
        exchange.request()
        exchange.send(reply)

    with served_by(tmp_path, script) as station:
        drop(station, SMALL)
        (outcome,) = station.work()
        receipt = completed(station, "x", SMALL, "x.png")
        assert "problems" not in receipt
        assert (station.outbox / "x.png").read_bytes() == IMAGE
        assert (outcome.charged, outcome.credits) == ("yes", 7)
        assert station.server.connections == 1


def test_a_long_response_in_pieces_is_read_to_its_end_and_no_further(tmp_path):
    image = heavy(2_000_000)
    body = paid(image)

    def script(exchange):
        exchange.request()
        exchange.send(HEAD + b"Content-Length: %d\r\n\r\n" % len(body))
        exchange.trickle(body[:3], 0.02)
        exchange.send(body[3:700_000])
        exchange.trickle(body[700_000:700_003], 0.02)
        exchange.send(body[700_003:] + b"more")

    with served_by(tmp_path, script) as station:
        drop(station, SMALL)
        station.work()
        assert "problems" not in completed(station, "x", SMALL, "x.png")
        assert (station.outbox / "x.png").read_bytes() == image


def test_a_response_byte_by_byte_is_read_to_its_end(tmp_path):
    def script(exchange):
        exchange.request()
        exchange.trickle(response(BODY), 0.0005)

    with served_by(tmp_path, script, endpoint__timeout_seconds="5") as station:
        drop(station, SMALL)
        station.work()
        assert "problems" not in completed(station, "x", SMALL, "x.png")


FRAMES = {
    "with a length": lambda body: HEAD + b"Content-Length: %d\r\n\r\n" % len(body),
    "without a length": lambda _: HEAD + b"\r\n",
    "in chunks": lambda body: HEAD + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(body),
}


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
def test_a_body_that_trickles_past_the_deadline_counts_as_charged_and_its_received_part_is_kept(tmp_path, frame):
    body = paid(small_image(size=(300, 300)))

    def script(exchange):
        exchange.request()
        exchange.send(frame(body) + body[:50])
        exchange.trickle(body[50:-1], 0.02)

    with served_by(tmp_path, script, endpoint__deadline_seconds="1.5", endpoint__timeout_seconds="5") as station:
        drop(station, SMALL)
        station.work()
        error = refused(station, "x", SMALL, beside="json")
        assert error["charged"] == "yes"
        assert "cut short" in error["problems"][0]
        assert "deadline_seconds" in error["problems"][0]
        raw = (station.errors / "x.answer.json").read_bytes()
        assert body.startswith(raw)
        assert len(raw) > 50


@pytest.mark.parametrize("frame", FRAMES.values(), ids=FRAMES)
@pytest.mark.parametrize("rude", [False, True])
def test_the_complete_images_of_an_incomplete_body_are_published(tmp_path, frame, rude):
    body = paid(IMAGE, IMAGE)
    half = body[: body.rindex(b"b64_json") + 30]
    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}

    def script(exchange):
        exchange.request()
        exchange.send(frame(body) + half)
        if rude:
            exchange.reset()

    with served_by(tmp_path, script) as station:
        drop(station, originals)
        (outcome,) = station.work()
        receipt = completed(station, "x", originals, "x-1.png")
        assert (receipt["asked"], receipt["got"], outcome.charged) == (2, 1, "yes")
        assert receipt["problems"]
        assert (station.outbox / "x-1.png").read_bytes() == IMAGE


def test_a_redirect_is_never_followed_by_the_paid_call(tmp_path):
    with Scripted() as other:
        for number, status in enumerate((b"301 a", b"302 b", b"303 c", b"307 d", b"308 e")):
            reply = responding(b"", b"Location: " + other.base_url.encode() + b"/v1", status=status)
            with served_by(tmp_path / str(number), reply) as station:
                drop(station, SMALL)
                (outcome,) = station.work()
                assert refused(station, "x", SMALL)["charged"] == "no"
                assert outcome.reason.kind == "endpoint"
    assert other.connections == 0


def test_a_redirect_to_an_invalid_url_is_only_a_redirect(tmp_path):
    with served_by(tmp_path, responding(b"", b"Location: http://[::1", status=b"302 Found")) as station:
        drop(station, SMALL)
        (outcome,) = station.work()
        error = refused(station, "x", SMALL)
    assert (error["charged"], outcome.reason and outcome.reason.kind) == ("no", "endpoint")


# Never the connection of another request


class Keeping(BaseHTTPRequestHandler):
    """Responds to each request and offers to keep the connection."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.server.handlers.append(self)  # one for each connection
        self.send_response(200)
        self.send_header("content-length", "5")
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, *_):
        """Log nothing."""


class Busy(ThreadingHTTPServer):
    request_queue_size = 200


@pytest.fixture
def hasty():
    """Let threads switch much more often than usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty")
def test_requests_that_end_at_the_same_time_each_have_a_connection_of_their_own():
    with Busy(("127.0.0.1", 0), Keeping) as server:
        server.handlers = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        with contextlib.closing(Client(Endpoint(base_url=url), lambda: Key(KEY))) as client:
            got = []

            def fetch_some() -> None:
                for _ in range(60):
                    client.fetch(f"{url}/x", got.append, 1000, 60.0)

            with ThreadPoolExecutor(16) as pool:
                for done in [pool.submit(fetch_some) for _ in range(16)]:
                    done.result()
        server.shutdown()
        assert b"".join(got) == b"hello" * 960
        assert len(set(server.handlers)) == 960, "two requests shared a connection"
