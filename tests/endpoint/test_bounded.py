"""An API or an image host that sends endlessly: the request ends in time and keeps no core busy."""

from __future__ import annotations

import contextlib
import gzip
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib

import pytest
from httpcore import HTTP11Connection
from support.daemon import KEY, TESTS
from support.scripted import Scripted, drop, heavy, paid, refused, small_image
from support.station import Station

from imagewatch.config.key import Key
from imagewatch.config.schema import Endpoint
from imagewatch.endpoint import call, client
from imagewatch.endpoint.client import Client
from imagewatch.endpoint.download import FetchError
from imagewatch.system.errors import Unavailable

ASK = {"x.prompt.txt": "a cat"}
OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
HEADS = {
    "interim answers": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "interim answers with headers": (b"", b"HTTP/1.1 103 Early Hints\r\nLink: </x>; rel=preload\r\n\r\n"),
    "headers": (OK, b"X: y\r\n"),
    "a header": (OK + b"X: ", b"yyyyyyyy"),
    "an interim answer of headers": (b"HTTP/1.1 103 Early Hints\r\n", b"X: y\r\n"),
    "blank lines": (b"", b"\r\n"),
}
"""A response: its beginning, and the data that follows endlessly."""
BODIES = {
    "a byte in each chunk": (CHUNKED, b"1\r\nx\r\n"),
    "a byte in each chunk and much beside it": (CHUNKED, b"1;" + b"y" * 1000 + b"\r\nx\r\n"),
}


def flood(first, rest):
    """Return a script that sends data endlessly, as fast as it is read."""

    def script(exchange):
        exchange.request()
        exchange.send(first)
        piece = rest * (65536 // len(rest) + 1)
        while True:
            exchange.send(piece)
            sent.append(len(piece))

    sent = script.sent = []
    return script


@pytest.fixture
def byte_by_byte(certificate):
    """The address of a fast server that makes one read necessary for each byte."""
    keys = (certificate.path, certificate.path.replace("certificate.pem", "key.pem"))
    program = [sys.executable, str(TESTS / "support/hostile.py"), *keys]
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        yield f"https://127.0.0.1:{process.stdout.readline().strip()}"
        process.kill()


SMALL_READ = 64 * 1024
"""With one byte in each chunk, the work for what is read in one go ends before the time is looked at: it is to be short
on a slow machine, too, so that what is measured is the deadline."""


class Effort:
    """The cost of a block: seconds, and CPU seconds of this thread; the server is another one."""

    def __enter__(self):
        self._began, self._worked = time.monotonic(), time.thread_time()
        return self

    def __exit__(self, *_):
        self.seconds, self.work = time.monotonic() - self._began, time.thread_time() - self._worked


@contextlib.contextmanager
def served_by(tmp_path, script, **settings):
    settings = {"endpoint__connect_timeout_seconds": "1", **settings}
    with (
        Scripted(script) as server,
        contextlib.closing(Station(tmp_path, server.base_url, **settings)) as station,
    ):
        drop(station, ASK)
        yield station


@pytest.mark.parametrize(("first", "rest"), HEADS.values(), ids=HEADS)
def test_a_response_with_endless_headers_is_abandoned_long_before_the_deadline(tmp_path, first, rest):
    with served_by(tmp_path, flood(first, rest), endpoint__deadline_seconds="60") as station:
        with Effort() as effort:
            station.work()
        assert refused(station, "x", ASK)["charged"] == "unknown"
        assert effort.seconds < 20
        assert effort.work < 5


@pytest.mark.parametrize(("first", "rest"), BODIES.values(), ids=BODIES)
def test_a_response_that_is_mostly_framing_is_cut(tmp_path, monkeypatch, first, rest):
    monkeypatch.setattr(call, "_MOST_FRAMING_BYTES", 1_000_000)
    with served_by(tmp_path, flood(first, rest), endpoint__deadline_seconds="60") as station:
        with Effort() as effort:
            station.work()
        error = refused(station, "x", ASK, beside="bin")
        assert "pieces are too small" in error["problems"][0]
        assert error["charged"] == "yes"
        assert effort.seconds < 30
        assert effort.work < 10


@pytest.mark.parametrize(("first", "rest"), BODIES.values(), ids=BODIES)
def test_an_endless_fast_response_ends_at_the_deadline_and_not_later(tmp_path, monkeypatch, first, rest):
    monkeypatch.setattr(call, "_MOST_FRAMING_BYTES", 10**12)
    monkeypatch.setattr(HTTP11Connection, "READ_NUM_BYTES", SMALL_READ)
    with served_by(tmp_path, flood(first, rest), endpoint__deadline_seconds="1.5") as station:
        with Effort() as effort:
            station.work()
        error = refused(station, "x", ASK, beside="bin")
        assert "not finished after 1.5 seconds (deadline_seconds)" in error["problems"][0]
        assert effort.seconds < 4.5


def test_a_response_of_one_byte_per_read_keeps_no_core_busy_and_ends_at_the_deadline(
    tmp_path, byte_by_byte, certificate
):
    settings = {"endpoint__deadline_seconds": "5", "endpoint__connect_timeout_seconds": "4"}
    with contextlib.closing(Station(tmp_path, byte_by_byte, endpoint__ca_file=certificate.path, **settings)) as station:
        drop(station, ASK)
        with Effort() as effort:
            station.work()
        assert "deadline_seconds" in refused(station, "x", ASK, beside="bin")["problems"][0]
    assert 4 < effort.seconds < 9
    assert effort.work < 1


def test_a_charged_response_of_one_byte_per_chunk_is_read_to_its_end(tmp_path):
    image = small_image(size=(200, 200))
    body = paid(image)

    def script(exchange):
        exchange.request()
        exchange.send(CHUNKED + b"".join(b"1\r\n%c\r\n" % one for one in body) + b"0\r\n\r\n")

    with served_by(tmp_path, script) as station:
        station.work()
        assert (station.outbox / "x.png").read_bytes() == image


class Late(call.Call):
    """A call whose deadline passes when the first part of the body has arrived."""

    def took(self, size):
        super().took(size)
        self.at = time.monotonic()


def test_a_charged_response_that_has_arrived_at_the_deadline_is_complete(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "Call", Late)
    body = paid(small_image())

    def script(exchange):
        exchange.request()
        pieces = [body[at : at + 7] for at in range(0, len(body), 7)]
        exchange.send(CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")

    with served_by(tmp_path, script) as station:
        station.work()
        assert "problems" not in station.receipt("x")


def test_a_charged_response_that_came_byte_by_byte_and_has_arrived_at_the_deadline_is_complete(tmp_path, monkeypatch):
    whole = OK + b"\r\n" + paid(heavy(20_000))
    small, sent = threading.Event(), threading.Event()

    class Stopped(call.Call):
        """A call whose deadline passes after very many small reads, when all the rest has arrived."""

        def took(self, size):
            super().took(size)
            if self._small > call._MOST_SMALL + 1 and not small.is_set():
                small.set()
                assert sent.wait(10)
                self.at = time.monotonic()

    def script(exchange):
        exchange.request()
        at = 0
        while at < len(whole) and not small.wait(0.0003):
            exchange.send(whole[at : at + 1])
            at += 1
        exchange.send(whole[at:])
        exchange.connection.shutdown(socket.SHUT_WR)
        sent.set()

    monkeypatch.setattr(client, "Call", Stopped)
    with served_by(tmp_path, script) as station:
        station.work()
        assert "problems" not in station.receipt("x")


@pytest.mark.parametrize("status", [b"400 Bad Request", b"502 Bad Gateway"])
def test_of_an_endless_refusal_only_the_useful_part_is_read(tmp_path, status):
    script = flood(b"HTTP/1.1 " + status + b"\r\n\r\n", b"no ")
    with served_by(tmp_path, script, endpoint__deadline_seconds="60") as station:
        with Effort() as effort:
            (outcome,) = station.work()
        assert outcome.message.startswith("no no no")
        assert effort.seconds < 20
        assert sum(script.sent) < 50_000_000  # the buffers of both ends besides what was read
        assert station.leftovers() == []


# Compressed


def bomb(size):
    """Return zeros, compressed to a thousandth."""
    packer, piece = zlib.compressobj(level=9, wbits=31), bytes(1 << 20)
    return b"".join([*(packer.compress(piece) for _ in range(size >> 20)), packer.flush()])


@pytest.mark.parametrize("status", [b"200 OK", b"400 Bad Request"])
def test_a_compressed_response_has_the_same_limit_as_any_other(tmp_path, status):
    packed = bomb(64 << 20)

    def script(exchange):
        exchange.request()
        head = b"HTTP/1.1 %s\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n"
        exchange.send(head % (status, len(packed)) + packed)

    with served_by(tmp_path, script, endpoint__max_response_bytes="3000000") as station:
        tracemalloc.start()
        with Effort() as effort:
            station.work()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        is_paid = status == b"200 OK"
        error = refused(station, "x", ASK, beside="bin" if is_paid else "")
        assert error["charged"] == ("yes" if is_paid else "no")
        if is_paid:
            assert "larger than max_response_bytes (3,000,000)" in error["problems"][0]
            assert (station.errors / "x.answer.bin").stat().st_size == 3_000_000
        assert effort.work < 5
        assert peak < 20_000_000


def test_a_compressed_response_without_content_is_cut(tmp_path):
    start = gzip.compress(b"")[:10]
    script = flood(OK + b"Content-Encoding: gzip\r\n\r\n" + start, b"\0\0\0\xff\xff")  # blocks of no bytes
    settings = {"endpoint__deadline_seconds": "60", "endpoint__max_response_bytes": "1000000"}
    with served_by(tmp_path, script, **settings) as station:
        with Effort() as effort:
            station.work()
        assert refused(station, "x", ASK, beside="bin")["charged"] == "yes"
        assert effort.seconds < 20
        assert effort.work < 10


def test_the_images_of_a_damaged_compressed_response_are_published(tmp_path):
    image = small_image()
    packed = gzip.compress(paid(image))[:-8] + b"\0" * 8  # its checksum and its length

    def script(exchange):
        exchange.request()
        exchange.send(OK + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)

    with served_by(tmp_path, script) as station:
        station.work()
        assert (station.outbox / "x.png").read_bytes() == image
        assert "damaged" in station.receipt("x")["problems"][0]


@pytest.mark.parametrize("coding", [b"gzip", b"deflate", b"br", b"gzip, gzip", b"nonsense"])
@pytest.mark.parametrize("body", [small_image(), b"\x1f\x8b no", b"OK", b"\0" * 9])
def test_a_charged_response_in_another_encoding_than_its_header_says_is_kept_unchanged(tmp_path, coding, body):
    def script(exchange):
        exchange.request()
        exchange.send(OK + b"Content-Encoding: %s\r\nContent-Length: %d\r\n\r\n" % (coding, len(body)) + body)

    with served_by(tmp_path, script) as station:
        station.work()
        assert refused(station, "x", ASK, beside="bin")["charged"] == "yes"
        (kept,) = (station.state / "answers").glob("*.answer.1")
        assert b"\n" + body + b"\n" in kept.read_bytes()


# Images by url, and the balance


def fetch(script, *, seconds=30.0, limit=1_000_000):
    came = []
    with Scripted(script) as server:
        endpoint = Endpoint(base_url=server.base_url)
        with (
            contextlib.closing(Client(endpoint, lambda: Key(KEY))) as fetching,
            Effort() as effort,
            pytest.raises(FetchError) as caught,
        ):
            fetching.fetch(server.base_url + "/x.png", came.append, limit, seconds)
    return str(caught.value), effort, sum(map(len, came))


@pytest.mark.parametrize(("first", "rest"), HEADS.values(), ids=HEADS)
def test_a_download_with_endless_headers_is_abandoned(first, rest):
    _, effort, _ = fetch(flood(first, rest))
    assert effort.seconds < 20
    assert effort.work < 5


@pytest.mark.parametrize(("first", "rest"), BODIES.values(), ids=BODIES)
def test_an_endless_fast_download_ends_at_its_deadline_and_not_later(monkeypatch, first, rest):
    monkeypatch.setattr(call, "_MOST_FRAMING_BYTES", 10**12)
    monkeypatch.setattr(HTTP11Connection, "READ_NUM_BYTES", SMALL_READ)
    message, effort, _ = fetch(flood(first, rest), seconds=1.5, limit=100_000_000)
    assert "not finished after 1.5 seconds" in message
    assert effort.seconds < 4.5


def test_a_download_of_one_byte_per_read_keeps_no_core_busy(byte_by_byte, certificate):
    endpoint = Endpoint(base_url=byte_by_byte, ca_file=certificate.path)
    with (
        contextlib.closing(Client(endpoint, lambda: Key(KEY))) as fetching,
        Effort() as effort,
        pytest.raises(FetchError, match="not finished after 5 seconds"),
    ):
        fetching.fetch(f"{byte_by_byte}/x.png", lambda _: None, 100_000_000, 5)
    assert effort.work < 1


def test_a_name_server_that_never_responds_takes_no_longer_than_the_download_may():
    released, asked = threading.Event(), []

    def resolve(host, *_, **__):
        asked.append(host)
        released.wait(20)
        return []

    fetching = Client(Endpoint(), lambda: Key(KEY), resolve=resolve)
    with (
        contextlib.closing(fetching),
        Effort() as effort,
        pytest.raises(FetchError, match=r"not finished after 1\.5 seconds"),
    ):
        fetching.fetch("https://images.example/x.png", lambda _: None, 1000, 1.5)
    released.set()
    assert asked == ["images.example"]
    assert effort.seconds < 4.5


def test_an_endless_download_exceeds_the_limit():
    message, effort, size = fetch(flood(OK + b"\r\n", b"x" * 1000), limit=1_000_000)
    assert "larger than 1,000,000 bytes" in message
    assert effort.seconds < 20
    assert size <= 1_000_000


@pytest.mark.parametrize(("first", "rest"), [*HEADS.values(), *BODIES.values()], ids=[*HEADS, *BODIES])
def test_an_endless_balance_is_not_available(first, rest):
    with Scripted(flood(first, rest)) as server:
        asking = Client(Endpoint(base_url=server.base_url, timeout_seconds=2.0), lambda: Key(KEY))
        with contextlib.closing(asking), Effort() as effort, pytest.raises(Unavailable):
            asking.balance()
    assert effort.seconds < 4
