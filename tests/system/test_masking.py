"""The key comes back in whatever form an endpoint likes to give it, and is in nothing that others can read."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import html
import io
import json
import lzma
import os
import re
import sqlite3
import time
import tracemalloc
import urllib.parse
import zlib
from pathlib import Path

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from support.daemon import KEY, Folders, command, until
from support.scripted import Scripted, completed, drop, paid, refused, responding, response, small_image
from support.station import Distrustful, Station

from imagewatch.config.key import Key
from imagewatch.config.schema import Endpoint
from imagewatch.endpoint.client import Client
from imagewatch.endpoint.frames import image_name
from imagewatch.endpoint.saved_answer import Answer
from imagewatch.system import log
from imagewatch.system.errors import SpoolError

IMAGE = small_image()
ASK = {"x.prompt.txt": "a cat"}


def each(form):
    """Write every character of the key in some form."""
    return "".join(form.format(ord(one)) for one in KEY)


JSON_FORMS = {
    "its hyphens escaped": KEY.replace("-", "\\u002d"),
    "its hyphens escaped in capitals": KEY.replace("-", "\\u002D"),
    "every character escaped": each("\\u{:04x}"),
    "every other character escaped": "".join(
        one if number % 2 else f"\\u{ord(one):04x}" for number, one in enumerate(KEY)
    ),
}
"""What a reader of JSON takes for the key itself."""
FORMS = {
    "as it is": KEY,
    **JSON_FORMS,
    "escaped in a text in a text": KEY.replace("-", "\\\\u002d"),
    "as in a URL": KEY.replace("-", "%2D"),
    "every character as in a URL": each("%{:02x}"),
    "as in a URL in a URL": KEY.replace("-", "%252d"),
    "as in HTML": KEY.replace("-", "&#45;"),
    "every character as in HTML": each("&#x{:x};"),
    "as in HTML in HTML": KEY.replace("-", "&amp;#45;"),
    "in base64": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
    "in base64 with a name before it": base64.b64encode(f"me:{KEY}!".encode()).decode(),
    "in hexadecimal digits": KEY.encode().hex(),
}


def readings(text):
    """All that a curious person makes of a text."""
    found = {text}
    for _ in range(3):
        for one in tuple(found):
            found.add(urllib.parse.unquote(one))
            found.add(html.unescape(one))
            found.add(re.sub(r"\\+u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), one))
            found.add(one.replace("\0", ""))
    for run in re.findall(r"[A-Za-z0-9+/_-]{16,}", text):
        whole = run.replace("-", "+").replace("_", "/")
        for first in range(4):
            piece = whole[first : first + (len(whole) - first) // 4 * 4]
            found.add(base64.b64decode(piece).decode("latin-1"))
    for run in re.findall(r"(?:[0-9a-fA-F]{2}){8,}", text):
        found.add(bytes.fromhex(run).decode("latin-1"))
    return found


def gives_away(content, secret=KEY):
    """Return whether another person finds the key in what they can read."""
    raw = content.encode() if isinstance(content, str) else content
    with contextlib.suppress(OSError, EOFError, zlib.error):
        raw += gzip.decompress(raw)
    return any(secret in reading for reading in readings(raw.decode("latin-1")))


def outputs(station):
    """All that leaves the process for others: the folders, and what the ledger and the status contain."""
    files = [path for path in station.root.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in files} | {"ledger": repr(station.ledger.rows())}


@contextlib.contextmanager
def served_by(tmp_path, *scripts, **settings):
    with (
        Scripted(*scripts) as server,
        contextlib.closing(Station(tmp_path, server.base_url, **settings)) as station,
    ):
        yield station


def found_in(station, outcome, capfd):
    """Everything in which the key is."""
    everything = outputs(station) | {"outcome": repr(outcome), "log": "".join(capfd.readouterr())}
    return [name for name, content in everything.items() if gives_away(content)]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("status", [b"400 Bad Request", b"402 Payment Required", b"502 Bad Gateway", b"200 OK"])
def test_a_key_that_comes_back_in_any_form_is_in_nothing_that_others_read(tmp_path, capfd, form, status):
    body = b'{"message": "%s is no key", "errorCode": "not-%s", "billing": {"transaction_id": "%s"}}'
    reply = responding(body % ((form.encode(),) * 3), b"x-request-id: " + form.encode(), status=status)
    with served_by(tmp_path, reply) as station:
        drop(station, ASK)
        (outcome,) = station.work()
        error = refused(station, "x", ASK, beside="json" if status == b"200 OK" else "")
        assert "***" in (error["message"] if status != b"200 OK" else error["billing"]["transaction_id"])
        assert found_in(station, outcome, capfd) == []


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_paid_response_that_repeats_the_key_everywhere_is_published_without_it(tmp_path, capfd, form):
    entry = {"b64_json": base64.b64encode(IMAGE).decode(), "mime_type": "image/KEY"}
    billing = {"credits_charged": 7, "transaction_id": "KEY", "a": [{"KEY": ["KEY"]}]}
    images = [entry, {"url": "https://10.0.0.1/KEY.png"}]
    body = json.dumps({"provider": "KEY", "model": "m KEY", "images": images, "billing": billing}).replace("KEY", form)
    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}
    with served_by(tmp_path, responding(body.encode())) as station:
        drop(station, originals)
        (outcome,) = station.work()
        receipt = completed(station, "x", originals, "x-1.png")
        assert (station.outbox / "x-1.png").read_bytes() == IMAGE
        assert "***" in receipt["model"]
        assert receipt["credits_charged"] == 7
        assert found_in(station, outcome, capfd) == []


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_what_comes_in_place_of_an_image_and_holds_the_key_is_not_published(tmp_path, capfd, form):
    originals = {"x.prompt.txt": "+++\nn = 2\n+++\na cat"}
    with served_by(tmp_path, responding(paid(IMAGE, b"not an image, " + form.encode()))) as station:
        drop(station, originals)
        (outcome,) = station.work()
        receipt = completed(station, "x", originals, "x-1.png")
        assert "it holds the API key and is not published" in receipt["problems"][0]
        assert found_in(station, outcome, capfd) == []


def deflated(body):
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


CODINGS = {
    "gzip": (b"gzip", gzip.compress),
    "deflate": (b"deflate", zlib.compress),
    "deflate without its frame": (b"deflate", deflated),
    "gzip of which nothing is said": (b"identity", gzip.compress),
    "something else that is said to be gzip": (b"gzip", lambda body: body),
}


@pytest.mark.parametrize("form", [KEY, *JSON_FORMS.values()], ids=["as it is", *JSON_FORMS])
@pytest.mark.parametrize(("name", "pack"), CODINGS.values(), ids=CODINGS)
@pytest.mark.parametrize("status", [b"400 Bad Request", b"200 OK"])
def test_a_key_in_a_compressed_response_is_in_nothing_that_others_read(tmp_path, capfd, form, name, pack, status):
    body = b'{"message": "Too many requests for %s", "model": "%s"}' % (form.encode(), form.encode())
    reply = responding(pack(body), b"Content-Encoding: " + name, status=status)
    with served_by(tmp_path, reply) as station:
        drop(station, ASK)
        (outcome,) = station.work()
        error = refused(station, "x", ASK, beside="json" if status == b"200 OK" else "")
        assert error["model" if status == b"200 OK" else "message"].endswith("***")
        assert found_in(station, outcome, capfd) == []
        if status == b"200 OK":
            copy = json.loads((station.errors / "x.answer.json").read_bytes())
            assert copy["message"] == "Too many requests for ***"


@pytest.mark.parametrize("status", [b"400 Bad Request", b"200 OK"])
def test_messages_in_a_coding_that_we_cannot_read_are_not_repeated_and_the_response_is_kept_apart(
    tmp_path, capfd, status
):
    # A Brotli stream of one block that is not compressed: who has the tool for it reads the key.
    body = f'{{"message": "{KEY}"}}'.encode()
    reply = responding(b"\x8b\x0d\x80" + body + b"\x03", b"Content-Encoding: br", status=status)
    with served_by(tmp_path, reply) as station:
        drop(station, ASK)
        (outcome,) = station.work()
        error = refused(station, "x", ASK, beside="bin" if status == b"200 OK" else "")
        assert "'br'" in error["message"]
        assert found_in(station, outcome, capfd) == []
        if status == b"200 OK":
            assert b"kept in the state folder" in (station.errors / "x.answer.bin").read_bytes()
            (kept,) = (station.state / "answers").glob("*.answer.1")
            assert b"message" in kept.read_bytes()


PACKED = {
    "gzip in gzip": lambda body: gzip.compress(gzip.compress(body)),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
}


@pytest.mark.parametrize("pack", PACKED.values(), ids=PACKED)
def test_a_compressed_file_in_place_of_a_response_is_kept_apart(tmp_path, capfd, pack):
    with served_by(tmp_path, responding(pack(f'{{"message": "{KEY}"}}'.encode()))) as station:
        drop(station, ASK)
        (outcome,) = station.work()
        refused(station, "x", ASK, beside="bin")
        assert found_in(station, outcome, capfd) == []
        copy = (station.errors / "x.answer.bin").read_bytes()
        assert b"kept in the state folder" in copy
        assert len(copy) < 200


@pytest.mark.parametrize("form", [KEY, *JSON_FORMS.values()], ids=["as it is", *JSON_FORMS])
@pytest.mark.parametrize("size", [1, 7])
def test_a_key_that_comes_in_pieces_is_in_no_file_at_all(tmp_path, form, size):
    body = b'{"a": "' + b"y" * 1000 + form.encode() + b"z" * 1000 + b'"}'
    pieces = [body[at : at + size] for at in range(0, len(body), size)]

    def script(exchange):
        exchange.request()
        exchange.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        exchange.send(b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n")

    with served_by(tmp_path, script) as station:
        drop(station, ASK)
        station.work()
        refused(station, "x", ASK, beside="json")
        found = [path for path in tmp_path.rglob("*") if path.is_file() and gives_away(path.read_bytes())]
        assert found == []
        assert (station.errors / "x.answer.json").read_bytes() == body.replace(form.encode(), b"***")


@pytest.mark.parametrize("length", [8, len(KEY) // 2, len(KEY) - 1])
def test_a_key_in_the_middle_of_which_a_response_breaks_off_is_masked_as_far_as_it_came(tmp_path, length):
    def script(exchange):
        exchange.request()
        exchange.send(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n" + b'{"a": "' + KEY[:length].encode())

    with served_by(tmp_path, script) as station:
        drop(station, ASK)
        station.work()
        assert (station.errors / "x.answer.json").read_bytes() == b'{"a": "***'


def test_a_paid_response_without_the_key_is_kept_byte_for_byte(tmp_path):
    odd = '\\u0073\\/%73&#45;&amp;\\\\u002d\\"' + KEY[:-1] + "\\u0000" + KEY[1:]
    body = ('{"images": [], "a": "' + odd * 200 + base64.b64encode(os.urandom(600_000)).decode() + '"}').encode()
    with served_by(tmp_path, responding(body)) as station:
        drop(station, ASK)
        station.work()
        refused(station, "x", ASK, beside="json")
        assert (station.errors / "x.answer.json").read_bytes() == body


def test_an_image_whose_base64_is_escaped_as_php_does_it_is_published_as_it_is(tmp_path):
    escaped = base64.b64encode(IMAGE).replace(b"/", b"\\/")
    assert b"\\/" in escaped
    with served_by(tmp_path, responding(b'{"images": [{"b64_json": "' + escaped + b'"}]}')) as station:
        drop(station, ASK)
        station.work()
        completed(station, "x", ASK, "x.png")
        assert (station.outbox / "x.png").read_bytes() == IMAGE


def test_what_came_of_a_response_is_on_the_disk_to_its_last_byte_while_the_endpoint_sends_nothing_more(tmp_path):
    body, seen = paid(IMAGE), []

    def is_saved(path):
        def image_path(number):
            return str(path.with_name(path.name.replace("answer.1.part", image_name(number))))

        with contextlib.suppress(SpoolError):  # it has not begun
            return b"".join(Answer(str(path), image_path=image_path).chunks()) == body
        return False

    def script(exchange):
        exchange.request()
        exchange.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)
        until(lambda: any(is_saved(path) for path in tmp_path.glob("state/answers/*.answer.1.part")))
        seen.append(True)

    with served_by(tmp_path, script) as station:
        drop(station, ASK)
        station.work()
        assert seen == [True]
        completed(station, "x", ASK, "x.png")


# The commands


@pytest.mark.parametrize("form", [KEY, each("\\u{:04x}"), FORMS["in base64"]])
def test_once_and_its_status_do_not_repeat_the_key(tmp_path, form):
    def script(exchange):
        exchange.request()
        exchange.send(response(b'{"message": "no credits for %s"}' % form.encode(), status=b"402 Payment Required"))

    with Scripted(script) as server:
        folders = Folders(tmp_path, server.base_url)
        folders.prompt("x", "a cat")
        done = command(folders, "once", "--json")
    assert "***" in done.stdout
    files = [folders.state / "status.json", folders.errors / "x.error.toml"]
    with contextlib.closing(sqlite3.connect(folders.state / "ledger.sqlite3")) as ledger:
        rows = repr(ledger.execute("SELECT * FROM attempts").fetchall())
    for content in (done.stdout, done.stderr, rows, *(path.read_text() for path in files)):
        assert not gives_away(content)
    assert not gives_away(command(folders, "status", "--json").stdout)


def test_a_balance_whose_names_hold_the_key_is_not_shown_with_it():
    key = "sk_let_test_abcdefghi"
    names = ("total_balance", f"{key}_balance", key.replace("k", "\\u006b") + "_balance")
    body = ", ".join(f'"{name}": 3' for name in names)
    with Scripted(responding(f"{{{body}}}".encode())) as server:
        client = Client(Endpoint(base_url=server.base_url), lambda: Key(key))
        with contextlib.closing(client):
            assert client.balance() == {"total_balance": 3}


@pytest.fixture
def _log_restored():
    before = structlog.get_config()
    yield
    structlog.configure(**before)


@pytest.mark.usefixtures("_log_restored")
@pytest.mark.parametrize("form", ["json", "console"])
def test_whatever_is_logged_after_a_key_was_sent_does_not_hold_it(station, form):
    drop(station, ASK)
    station.work()
    out = io.StringIO()
    log.configure("info", form, out)
    structlog.get_logger().info(f"said {KEY}", reason=f"{KEY}!", **{KEY: ["a", {"b": KEY}]})
    try:
        int(f"met {KEY}")
    except ValueError:
        structlog.get_logger().exception("a bug")
    assert out.getvalue().count("***") >= 5
    assert KEY not in out.getvalue()


# Keys that are not of ordinary length


@contextlib.contextmanager
def served_with(key, tmp_path, *scripts):
    with served_by(tmp_path, *scripts) as station:
        client = Client(station.config().endpoint, lambda: Key(key))
        with contextlib.closing(client):
            station.worker = Distrustful(station.spool, client, station.journal, station.config())
            yield station


@pytest.mark.parametrize(
    ("key", "said", "shown"),
    [
        ("any", "Too many requests; anything goes", "Too many requests; anything goes"),
        ("any", "any is no key, nor any-one", "*** is no key, nor ***-one"),
        ("hunter2", "h\\u0075nter2 is no key", "*** is no key"),
        ("password", "mypassword1 is wrong", "my***1 is wrong"),
    ],
)
def test_a_short_key_is_masked_in_a_refusal_but_never_as_a_part_of_a_word(tmp_path, key, said, shown):
    def script(exchange):
        exchange.request()
        exchange.send(b"HTTP/1.1 400 Bad\r\nTransfer-Encoding: chunked\r\n\r\n")
        exchange.send(b"".join(b"1\r\n%c\r\n" % one for one in f'{{"message": "{said}"}}'.encode()) + b"0\r\n\r\n")

    with served_with(key, tmp_path, script) as station:
        drop(station, ASK)
        (outcome,) = station.work()
        assert outcome.message == shown


def test_a_key_of_eight_characters_is_masked_in_what_is_reported_of_a_paid_response_and_not_in_its_images(tmp_path):
    key = base64.b64encode(IMAGE)[20:28].decode()
    with served_with(key, tmp_path, responding(paid(IMAGE, model=f"flux {key}"))) as station:
        drop(station, ASK)
        station.work()
        assert completed(station, "x", ASK, "x.png")["model"] == "flux ***"
        assert (station.outbox / "x.png").read_bytes() == IMAGE


# The form itself

ESCAPES = [
    "{0}",
    "\\u{1:04x}",
    "\\u{1:04X}",
    "\\\\u{1:04x}",
    "\\u{{{1:x}}}",
    "\\x{1:02x}",
    "%{1:02x}",
    "%25{1:02X}",
    "&#{1};",
    "&#x{1:x};",
]
# Without what escapes are made of: there, whose a character is can be a matter of taste.
secrets = st.text(
    st.characters(min_codepoint=0x21, max_codepoint=0x7E, exclude_characters="\\%&#;"), min_size=16, max_size=60
)
around = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=50)


@given(secrets, around, around, st.data())
def test_whatever_is_escaped_the_secret_goes_and_the_rest_stays(secret, before, after, data):
    before, after = before.rstrip("\\%&#;0123456789abcdefABCDEFux"), after.lstrip(";")
    form = "".join(data.draw(st.sampled_from(ESCAPES)).format(one, ord(one)) for one in secret)
    masked = Key(secret).mask(f"{before}{form}{after}")
    if f"{before}{secret}{after}".find(secret) == len(before) and secret not in after:
        assert masked == f"{before}***{after}"
    assert secret not in masked or secret in f"{before}***{after}"
    assert Key(secret).secret.content(f"{before}{form}{after}".encode()) == masked.encode()


def test_nothing_that_can_be_sent_makes_masking_slow():
    key, began = Key(KEY), time.process_time()
    for piece in (
        b"\\",
        b"\\u0073",
        b"%",
        b"%2525",
        b"&",
        b"&amp;",
        b"&#0000",
        b"\0",
        KEY[:-1].encode(),
        b"\\u006b\\u",
    ):
        content = piece * (200_000 // len(piece))
        assert key.secret.content(content) == content
        assert key.mask(content.decode()) == content.decode()
    assert time.process_time() - began < 20


def test_millions_of_escapes_take_little_memory_and_hide_no_key():
    key, escaped = Key(KEY), "\\u0073" * 100_000
    text = escaped + each("%{:02x}") + escaped
    tracemalloc.start()
    masked = key.mask(text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert masked == f"{escaped}***{escaped}"
    assert peak < 20_000_000


@pytest.mark.parametrize("before", range(131_072 - 70, 131_072, 3))
def test_a_key_is_found_wherever_it_is_in_a_long_text(before):
    form = each("\\u{:04x}")
    assert Key(KEY).mask("x" * before + form + "y" * 200_000) == "x" * before + "***" + "y" * 200_000


def test_the_package_has_one_place_where_text_of_a_response_is_decoded():
    """What is decoded elsewhere would not be masked."""
    package = Path(__file__).parents[2] / "imagewatch"
    places = [*(package / "job").glob("*.py"), *(package / "daemon").glob("*.py"), package / "endpoint/pictures.py"]
    for path in places:
        own = {"redelivery", "handover", "lost_jobs", "result_files", "common_folder", "two_hosts", "notice_record"}
        if path.stem in own:
            continue  # they decode what a daemon has written down, or the ledger has recorded
        text = path.read_text().replace("dump(sent).decode()", "")  # what was sent, for the journal
        assert not re.search(r"\.decode\(|json\.loads|msgspec\.json", text), path.name
