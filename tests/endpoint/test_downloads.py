"""Images by url: downloaded immediately, without the key, from public hosts only, and published as they were served."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import os
import select
import subprocess
import sys
import tracemalloc
import zlib

import pytest
from support.daemon import KEY, REMOTE_NAME, Folders, report_output
from support.scripted import (
    Scripted,
    completed,
    drop,
    no_secret,
    over_tls,
    paid,
    refused,
    responding,
    response,
    small_image,
    through_proxy,
    tunnel,
)
from support.station import Distrustful, Station

from imagewatch.config.key import Key
from imagewatch.config.schema import Endpoint
from imagewatch.endpoint import connection as network
from imagewatch.endpoint import pictures
from imagewatch.endpoint.client import Client
from imagewatch.endpoint.download import FetchError
from imagewatch.sandbox import Sandbox
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

IMAGE = small_image()
ASK = {"x.prompt.txt": "a cat"}


@pytest.fixture(autouse=True)
def _no_secret(tmp_path, capfd):
    yield
    no_secret(tmp_path, KEY, "".join(capfd.readouterr()))


def ask(station, tag, front=""):
    originals = {"x.prompt.txt": f"+++\n{front}\n+++\na cat [sandbox: {tag}]"}
    drop(station, originals)
    return originals


class Clock:
    """A clock that only waits move forward."""

    def __init__(self):
        self.now = 1_800_000_000.0
        self.waits = []

    def __call__(self):
        return self.now

    def wait(self, seconds):
        self.waits.append(seconds)
        self.now += seconds


@contextlib.contextmanager
def responding_with(tmp_path, *images, clock=None, **settings):
    """A station whose API responds to one request with these images or urls."""
    with (
        Scripted(responding(paid(*images))) as server,
        contextlib.closing(Station(tmp_path, server.base_url, **settings)) as station,
    ):
        if clock is not None:
            station.worker = Distrustful(
                station.spool, station.client, station.journal, station.config(), monotonic=clock, wait=clock.wait
            )
        yield station


def fetched(station, *names):
    drop(station, ASK)
    station.work()
    return completed(station, "x", ASK, *names)


def not_fetched(station, *texts):
    """Process the prompts; check that the charged response is beside the error file."""
    drop(station, ASK)
    station.work()
    error = refused(station, "x", ASK, beside="json")
    assert error["charged"] == "yes"
    assert b'"url"' in (station.errors / "x.answer.json").read_bytes()
    for text in texts:
        assert text in error["problems"][0]
    return error


# The sandbox's image host


@pytest.mark.parametrize(
    ("tag", "delivered"), [("url", 2), ("url-flaky", 2), ("url-redirect", 2), ("url-huge 1", 2), ("url, gzip", 2)]
)
def test_images_by_url_are_published_as_they_were_served(station, sandbox, tag, delivered):
    originals = ask(station, tag, 'provider = "openai"\nn = 2')
    (outcome,) = station.work()
    ending = "png"
    receipt = completed(station, "x", originals, f"x-1.{ending}", f"x-2.{ending}")
    assert "problems" not in receipt
    (call,) = sandbox.report()["calls"]
    assert [image["sha256"] for image in receipt["images"]] == call["images"]
    for image in receipt["images"]:
        assert hashlib.sha256((station.outbox / image["file"]).read_bytes()).hexdigest() == image["sha256"]
    assert outcome.charged == "yes"
    report = sandbox.report()
    assert (report["requests"], report["charged"], report["delivered"]) == (1, 1, delivered)
    assert report["bearer_at_image_host"] == 0


@pytest.mark.parametrize(
    ("tag", "texts"),
    [
        ("url-404", ["/delivery/", "HTTP 404"]),
        ("url-expired", ["/delivery/", "HTTP 403"]),
        ("url-file", ["file:", "only http or https URLs without a user name"]),
        ("url-private", ["http://10.0.0.1/x.png", "the address is not public"]),
    ],
)
def test_an_image_that_cannot_be_downloaded_counts_as_charged_and_its_response_is_kept(station, sandbox, tag, texts):
    originals = ask(station, tag)
    (outcome,) = station.work()
    error = refused(station, "x", originals, beside="json")
    assert (error["charged"], error["credits_charged"]) == ("yes", 30)
    for text in texts:
        assert text in error["problems"][0]
    assert "do not send it again" in error["next"]
    assert b'"url"' in (station.errors / "x.answer.json").read_bytes()
    (row,) = station.ledger.rows()
    assert (row["outcome"], row["charged"], row["credits"], row["got"]) == ("completed", "yes", 30, 0)
    report = sandbox.report()
    assert (report["requests"], report["charged"], report["bearer_at_image_host"]) == (1, 1, 0)
    assert outcome.charged == "yes"


def test_an_image_over_the_limit_is_not_downloaded_to_its_end(tmp_path, sandbox):
    with contextlib.closing(Station(tmp_path, sandbox.base_url, endpoint__max_response_bytes="500000")) as station:
        originals = ask(station, "url-huge 3")
        station.work()
        error = refused(station, "x", originals, beside="json")
        assert "larger than 500,000 bytes" in error["problems"][0]
        assert error["charged"] == "yes"


# Which hosts are asked, and what is sent to them


def host(*replies):
    """An image host that gives these responses, one for each connection, and keeps the headers of the requests."""
    heads = []

    def script_for(reply):
        def script(exchange):
            heads.append(exchange.head())
            exchange.send(reply)

        return script

    server = Scripted(*map(script_for, replies))
    server.heads = heads
    return server


def moved(url):
    return response(b"", b"Location: " + url.encode(), status=b"302 Found")


def test_the_key_never_reaches_an_image_host_nor_the_target_of_its_redirect(tmp_path):
    with (
        host(response(IMAGE)) as second,
        host(moved(second.base_url + "/b?sig=2")) as first,
        responding_with(tmp_path, first.base_url + "/a?sig=1") as station,
    ):
        fetched(station, "x.png")
    heads = first.heads + second.heads
    assert [head.split(b" ")[1] for head in heads] == [b"/a?sig=1", b"/b?sig=2"]
    for head in heads:
        assert KEY.encode() not in head
        assert b"authorization" not in head.lower()
        assert b"idempotency" not in head.lower()
        assert b"user-agent: imagewatch/" in head.lower()
        assert b"cookie" not in head.lower()


def test_an_image_on_the_host_of_the_api_is_downloaded_without_the_key(tmp_path):
    heads = []

    def image_route(exchange):
        heads.append(exchange.head())
        exchange.send(response(IMAGE))

    def paid_route(exchange):
        exchange.request()
        url = f"http://127.0.0.1:{exchange.connection.getsockname()[1]}/x.png?sig=1"
        exchange.send(response(paid(url), b"Set-Cookie: session=1"))

    with (
        Scripted(paid_route, image_route) as server,
        contextlib.closing(Station(tmp_path, server.base_url)) as station,
    ):
        fetched(station, "x.png")
    assert KEY.encode() not in heads[0]
    assert b"cookie" not in heads[0].lower()


@pytest.mark.parametrize(
    "target",
    [
        "file:///etc/passwd",
        "ftp://127.0.0.1/x",
        "http://169.254.169.254/latest?sig=1",
        "http://10.0.0.1/",
        "http://[fd00::1]/",
        "http://[::ffff:10.0.0.1]/",
        "http://user:word@127.0.0.1/",
        "http://:word@127.0.0.1/",
        "gopher://x",
        "https://",
    ],
)
@pytest.mark.parametrize("redirected", [False, True])
def test_nothing_is_downloaded_from_a_url_that_is_not_allowed(tmp_path, target, redirected):
    with host(moved(target)) if redirected else contextlib.nullcontext() as first:
        url = first.base_url + "/a?sig=1" if redirected else target
        clock = Clock()
        with responding_with(tmp_path, url, clock=clock) as station:
            not_fetched(station)
    assert clock.waits == []


def test_redirects_are_followed_only_a_few_times(tmp_path):
    replies = []

    def script(exchange):
        exchange.head()
        replies.append(exchange)
        exchange.send(moved(f"/{len(replies)}?sig=1"))

    with Scripted(*[script] * 4) as server, responding_with(tmp_path, server.base_url + "/0?sig=0") as station:
        not_fetched(station, "too many redirects")
    assert len(replies) == 4


REMOTE = Endpoint(base_url=f"https://{REMOTE_NAME}", connect_timeout_seconds=2.0)


@pytest.mark.parametrize("url", ["http://images.example/x", "https://127.0.0.1:1/x", "https://[::1]:1/x"])
def test_a_remote_api_cannot_cause_a_download_by_plain_http_or_from_this_machine(tmp_path, url):
    with (
        contextlib.closing(Client(REMOTE, lambda: Key(KEY))) as client,
        open(tmp_path / "f", "w+b") as file,
        pytest.raises(FetchError) as caught,
    ):
        client.fetch(url, file.write, 1000, 30)
    assert caught.value.final


def test_private_addresses_can_be_allowed(tmp_path):
    endpoint = Endpoint(base_url=REMOTE.base_url, connect_timeout_seconds=2.0, allow_private_downloads=True)
    hellos = []

    def script(exchange):
        hellos.append(exchange.connection.recv(65536))

    with Scripted(script) as server, contextlib.closing(Client(endpoint, lambda: Key(KEY))) as client:
        with open(tmp_path / "f", "w+b") as file, pytest.raises(FetchError) as caught:
            client.fetch(f"https://localhost:{server.port}/x", file.write, 1000, 30)
        server.wait_for(1)
    assert not caught.value.final
    assert hellos[0]


# Further attempts


def test_a_download_that_breaks_off_is_tried_again_because_it_is_free(tmp_path):
    replies = (
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + IMAGE[:20],
        response(b"", status=b"500 Oops"),
        b"nonsense\r\n\r\n",
        response(IMAGE),
    )
    clock = Clock()
    with (
        host(*replies) as images,
        responding_with(tmp_path, images.base_url + "/x?sig=1", clock=clock) as station,
    ):
        receipt = fetched(station, "x.png")
    assert "problems" not in receipt
    assert (tmp_path / "watched/outbox/x.png").read_bytes() == IMAGE
    assert clock.waits == sorted(clock.waits)
    assert len(clock.waits) == 4


def test_a_host_that_closes_the_connection_immediately_is_tried_again_and_is_not_a_disk_error(tmp_path, monkeypatch):
    connect, rude = network._connection, []

    def connected(found, *rest):
        """Check the connection only after its other end has reset it."""
        first = found[0][4][1] in rude
        if first:
            rude.clear()  # ignore the result: the connection may be reset before it is established
        connection = connect(found, *rest)
        if first:
            poll = select.poll()
            poll.register(connection, 0)
            assert poll.poll(20_000)
        return connection

    monkeypatch.setattr(network, "_connection", connected)
    with (
        Scripted(lambda exchange: exchange.reset(), at_once) as images,
        responding_with(tmp_path, images.base_url + "/x?sig=1", clock=Clock()) as station,
    ):
        rude.append(images.port)
        assert "problems" not in fetched(station, "x.png")
    assert images.connections == 2


class Full(Disk):
    """A disk that is full at the first attempt to write a downloaded image."""

    full = True

    def create(self, path, mode=0o600):
        file = super().create(path, mode)
        if self.full and ".fetched." in path:
            self.full = False
            file.close()
            return open("/dev/full", "wb", buffering=0)
        return file


def test_a_full_disk_is_not_an_error_of_the_host(tmp_path):
    with (
        host(response(IMAGE), response(IMAGE)) as images,
        Scripted(responding(paid(images.base_url + "/x?sig=1"))) as server,
        contextlib.closing(Station(tmp_path, server.base_url, disk=Full())) as station,
    ):
        drop(station, ASK)
        with pytest.raises(SpoolError, match="No space left"):
            station.work()
        station.recover()
        completed(station, "x", ASK, "x.png")


def test_a_host_that_refuses_is_asked_three_times(tmp_path):
    refusals = [response(b"", status=b"404 Not Found")] * 3
    clock = Clock()
    with host(*refusals) as images, responding_with(tmp_path, images.base_url + "/x?sig=1", clock=clock) as station:
        not_fetched(station, "HTTP 404")
    assert len(clock.waits) == 2


def test_a_host_that_is_unreachable_is_tried_until_the_url_has_expired(tmp_path):
    with Scripted() as closed:
        pass
    clock = Clock()
    with responding_with(tmp_path, closed.base_url + "/x?sig=1", clock=clock) as station:
        not_fetched(station, "refused")
    assert 580 <= sum(clock.waits) <= 600


def test_an_image_is_tried_again_though_the_daemon_was_stopped_for_long_during_the_first_attempt(tmp_path):
    clock, other = Clock(), small_image(color=(200, 0, 0))
    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}

    def stopped(exchange):
        exchange.head()
        clock.now += 700
        exchange.reset()

    def good(exchange):
        exchange.head()
        exchange.send(response(other))

    with (
        Scripted(stopped, good) as images,
        responding_with(tmp_path, IMAGE, images.base_url + "/x?sig=1", clock=clock) as station,
    ):
        drop(station, originals)
        station.work()
        assert "problems" not in completed(station, "x", originals, "x-1.png", "x-2.png")


def test_the_images_of_a_job_share_the_time_until_their_urls_have_expired(tmp_path):
    with Scripted() as closed:
        pass
    clock = Clock()
    with responding_with(tmp_path, *[closed.base_url + "/x?sig=1"] * 3, clock=clock) as station:
        not_fetched(station, "refused")
    assert 580 <= sum(clock.waits) <= 600


def test_an_image_of_a_good_host_does_not_wait_for_one_of_a_bad_host(tmp_path):
    with Scripted() as closed:
        pass
    clock, asked = Clock(), []

    def good(exchange):
        asked.append(list(clock.waits))
        exchange.head()
        exchange.send(response(IMAGE))

    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}
    with (
        Scripted(good) as images,
        responding_with(tmp_path, closed.base_url + "/a?sig=1", images.base_url + "/b?sig=1", clock=clock) as station,
    ):
        drop(station, originals)
        station.work()
        receipt = completed(station, "x", originals, "x-2.png")
    assert asked == [[]]
    assert "refused" in receipt["problems"][0]
    assert sum(clock.waits) > 500  # the bad one was tried for the full time


def test_only_the_images_that_failed_are_downloaded_again(tmp_path):
    urls, replies = [], {b"/b": [b"", response(b"", status=b"503 Busy")], b"/c": [response(b"", status=b"404 No")] * 3}

    def script(exchange):
        urls.append(exchange.head().split(b" ")[1])
        exchange.send(replies[urls[-1]].pop(0) if replies.get(urls[-1]) else response(IMAGE))

    originals = {"x.prompt.txt": "+++\nn = 3\n+++\na cat"}
    clock = Clock()
    with (
        Scripted(*[script] * 7) as images,
        responding_with(tmp_path, *(f"{images.base_url}/{name}" for name in "abc"), clock=clock) as station,
    ):
        drop(station, originals)
        station.work()
        receipt = completed(station, "x", originals, "x-1.png", "x-2.png")
    assert urls == [b"/a", b"/b", b"/c", b"/b", b"/c", b"/b", b"/c"]
    assert "HTTP 404" in receipt["problems"][0]
    assert clock.waits == sorted(clock.waits)


def test_a_slow_host_gets_no_more_than_its_share_of_the_time(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "_FETCH_SECONDS", 2.0)
    monkeypatch.setattr(pictures, "_LEAST_SECONDS", 0.1)
    urls = []

    def script(exchange):
        urls.append(exchange.head().split(b" ")[1])
        if urls[-1] == b"/slow":
            exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(IMAGE))
            exchange.trickle(IMAGE, 0.05)
        exchange.send(response(IMAGE))

    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}
    with (
        Scripted(*[script] * 4) as images,
        responding_with(tmp_path, f"{images.base_url}/slow", f"{images.base_url}/good") as station,
    ):
        drop(station, originals)
        station.work()
        receipt = completed(station, "x", originals, "x-2.png")
    assert urls[:2] == [b"/slow", b"/good"]
    assert "not finished after" in receipt["problems"][0]
    assert "deadline_seconds" not in receipt["problems"][0]


def test_a_clock_that_is_set_forward_does_not_end_the_attempts(tmp_path):
    wall = Clock()
    with (
        host(response(b"", status=b"503 Busy"), response(IMAGE)) as images,
        responding_with(tmp_path, images.base_url + "/x?sig=1") as station,
    ):
        parts = station.spool, station.client, station.journal, station.config()
        # While the first attempt fails, at any time of the clock.
        station.worker = Distrustful(*parts, clock=lambda: wall.wait(3600) or wall.now, wait=lambda _: None)
        assert "problems" not in fetched(station, "x.png")


def slowly(exchange, *, sized=True):
    """Serve an image byte by byte, which takes longer than the deadlines of these tests."""
    exchange.head()
    exchange.send(b"HTTP/1.1 200 OK\r\n" + (b"Content-Length: %d\r\n" % len(IMAGE) if sized else b"") + b"\r\n")
    exchange.trickle(IMAGE, 0.03)


def at_once(exchange):
    """Serve an image."""
    exchange.head()
    exchange.send(response(IMAGE))


@pytest.mark.parametrize("sized", [False, True])
def test_a_download_past_the_deadline_is_cut_and_tried_again(tmp_path, sized):
    settings = {"endpoint__connect_timeout_seconds": "1", "endpoint__deadline_seconds": "1.5"}
    with (
        Scripted(lambda exchange: slowly(exchange, sized=sized), at_once) as images,
        responding_with(tmp_path, images.base_url + "/x?sig=1", clock=Clock(), **settings) as station,
    ):
        assert "problems" not in fetched(station, "x.png")
    assert images.connections == 2


TLS_SETTINGS = {"endpoint__connect_timeout_seconds": "1", "endpoint__deadline_seconds": "1"}


def test_a_download_over_tls_past_the_deadline_is_cut_and_tried_again(tmp_path, certificate):
    scripts = [over_tls(certificate.context, script) for script in (slowly, at_once)]
    with Scripted(*scripts) as images:
        url, settings = f"https://127.0.0.1:{images.port}/x?sig=1", {"endpoint__ca_file": certificate.path}
        with responding_with(tmp_path, url, clock=Clock(), **TLS_SETTINGS, **settings) as station:
            assert "problems" not in fetched(station, "x.png")
    assert images.connections == 2


def test_a_download_through_a_proxy_is_cut_when_its_time_is_over(tmp_path, monkeypatch, certificate):
    with Scripted(tunnel(certificate.context, slowly)) as proxy:
        through_proxy(monkeypatch, proxy)
        endpoint = Endpoint(base_url=REMOTE.base_url, connect_timeout_seconds=2.0, ca_file=certificate.path)
        with (
            contextlib.closing(Client(endpoint, lambda: Key(KEY))) as client,
            open(tmp_path / "f", "w+b") as file,
            pytest.raises(FetchError, match="not finished after 1 seconds"),
        ):
            client.fetch(REMOTE.base_url + "/x?sig=1", file.write, 1000, 1)


def test_the_deadline_also_applies_to_the_second_image_on_a_kept_connection(tmp_path):
    def twice(exchange):
        at_once(exchange)
        slowly(exchange)

    settings = {"endpoint__connect_timeout_seconds": "1", "endpoint__deadline_seconds": "1.5"}
    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}
    with (
        Scripted(twice, slowly, at_once) as images,
        responding_with(tmp_path, *[images.base_url + "/x?sig=1"] * 2, clock=Clock(), **settings) as station,
    ):
        drop(station, originals)
        station.work()
        assert "problems" not in completed(station, "x", originals, "x-1.png", "x-2.png")
    assert images.connections == 3


def raw_deflate(content):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(content) + packer.flush()


@pytest.mark.parametrize(
    ("coding", "pack"),
    [
        (b"gzip", gzip.compress),
        (b"x-gzip", gzip.compress),
        (b"GZIP", gzip.compress),
        (b"deflate", zlib.compress),
        (b"deflate", raw_deflate),
        (b"gzip", bytes),
        (b"aws-chunked", bytes),
        (b"br", bytes),
        (b"utf-8", bytes),
    ],
    ids="gzip x-gzip capitals zlib raw-deflate only-says-gzip aws-chunked only-says-br utf-8".split(),  # noqa: SIM905
)
def test_an_image_that_its_host_compressed_is_published_uncompressed(tmp_path, coding, pack):
    reply = response(pack(IMAGE), b"Content-Encoding: " + coding)
    with host(reply) as images, responding_with(tmp_path, images.base_url + "/x?sig=1") as station:
        receipt = fetched(station, "x.png")
        assert "problems" not in receipt
        assert (station.outbox / "x.png").read_bytes() == IMAGE


@pytest.mark.parametrize("coding", [b"br", b"zstd", b"gzip, br"])
def test_an_image_in_an_unrequested_coding_is_not_downloaded(tmp_path, coding):
    reply = response(b"\x28\xb5\x2f\xfd" + IMAGE, b"Content-Encoding: " + coding)
    with host(reply) as images, responding_with(tmp_path, images.base_url + "/x?sig=1") as station:
        not_fetched(station, f"has the encoding {coding.decode()!r}", "was not requested")
    assert images.connections == 1


def test_a_compressed_image_that_grows_beyond_the_limit_is_not_downloaded_to_its_end(tmp_path):
    bomb = gzip.compress(IMAGE + bytes(300_000_000), 1)
    assert len(bomb) < 2_000_000
    reply, settings = response(bomb, b"Content-Encoding: gzip"), {"endpoint__max_response_bytes": "1000000"}
    tracemalloc.start()
    try:
        with host(reply) as images, responding_with(tmp_path, images.base_url + "/x?sig=1", **settings) as station:
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            not_fetched(station, "larger than 1,000,000 bytes")
            assert tracemalloc.get_traced_memory()[1] - before < 20_000_000
    finally:
        tracemalloc.stop()
    assert images.connections == 1


def test_a_damaged_compressed_image_is_tried_again(tmp_path):
    packed = bytearray(gzip.compress(IMAGE))
    packed[-6] ^= 1
    replies = [response(content, b"Content-Encoding: gzip") for content in (bytes(packed), gzip.compress(IMAGE))]
    clock = Clock()
    with host(*replies) as images, responding_with(tmp_path, images.base_url + "/x?sig=1", clock=clock) as station:
        assert "problems" not in fetched(station, "x.png")
    assert images.connections == 2


def test_one_image_that_cannot_be_downloaded_does_not_cost_the_others(tmp_path):
    originals = {"x.prompt.txt": "+++\nn = 3\n+++\na cat"}
    with (
        host(response(IMAGE)) as images,
        responding_with(tmp_path, images.base_url + "/a?sig=1", "file:///etc/passwd", IMAGE) as station,
    ):
        drop(station, originals)
        station.work()
        receipt = completed(station, "x", originals, "x-1.png", "x-3.png")
    assert (receipt["asked"], receipt["got"]) == (3, 2)
    assert receipt["problems"][0].startswith("image 2: file:")


def test_a_page_instead_of_an_image_is_not_published_as_one(tmp_path):
    with (
        host(response(b"<!DOCTYPE html><p>no", b"Content-Type: image/png")) as images,
        responding_with(tmp_path, images.base_url + "/x?sig=1") as station,
    ):
        not_fetched(station, "HTML")


# Large responses


MB = 1_000_000
MOST_GROWTH = 30 * MB


def peak(folders):
    """Process the inbox in a process of its own; return its peak memory, bytes."""
    program = [sys.executable, "-m", "imagewatch", "once"]
    environ = {"PATH": os.environ["PATH"], "HOME": str(folders.root), **folders.environ}
    with (folders.root / "log").open("wb") as log:
        process = subprocess.Popen(program, env=environ, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    report_output(program, process.returncode, (folders.root / "log").read_text())
    assert process.returncode == 0
    return usage.ru_maxrss * 1024


def test_a_response_of_300_megabytes_is_published_completely_in_little_memory(tmp_path):
    with Sandbox(key=KEY) as sandbox:
        small, large = Folders(tmp_path / "small", sandbox.base_url), Folders(tmp_path / "large", sandbox.base_url)
        small.prompt("x", '+++\nprovider = "gemini"\nn = 4\n+++\na cat')
        large.prompt("x", '+++\nprovider = "gemini"\nn = 4\n+++\na cat [sandbox: big 74]')
        growth = peak(large) - peak(small)
        served = next(call["images"] for call in sandbox.report()["calls"] if "big" in call["prompt"])
    receipt = large.receipt("x")
    assert "problems" not in receipt
    assert [image["sha256"] for image in receipt["images"]] == served
    assert sum(image["bytes"] for image in receipt["images"]) > 4 * 74 * MB
    for image in receipt["images"]:
        with (large.outbox / image["file"]).open("rb") as file:
            assert hashlib.file_digest(file, "sha256").hexdigest() == image["sha256"]
    assert large.leftovers() == []
    assert growth < MOST_GROWTH
    for name in large.names("outbox"):
        (large.outbox / name).unlink()  # pytest keeps the folders of its last runs
