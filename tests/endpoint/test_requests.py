"""What is sent, byte for byte; what is never sent; and the names under which results are published."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import shutil
import socket
import struct
import tempfile
import zlib
from pathlib import Path

import pytest
from PIL import Image
from support.daemon import KEY
from support.scripted import Scripted, completed, drop, no_secret, over, paid, refused, response, small_image
from support.station import Station

from imagewatch import __version__
from imagewatch.commands.check import files as explained

IMAGE = small_image()


@pytest.fixture(autouse=True)
def _no_secret(tmp_path, capfd):
    yield
    no_secret(tmp_path, KEY, "".join(capfd.readouterr()))


@pytest.fixture
def at(tmp_path, sandbox):
    """Create a station with its own settings."""
    with contextlib.ExitStack() as stack:

        def new_station(**settings):
            return stack.enter_context(contextlib.closing(Station(tmp_path, sandbox.base_url, **settings)))

        yield new_station


@pytest.fixture
def sent(tmp_path):
    """Send one prompt; return the head and the body that arrived, and the job's id."""

    def send(originals, **settings):
        received = []

        def script(exchange):
            received.append(exchange.request())
            exchange.send(response(paid(IMAGE)))

        with (
            Scripted(script) as server,
            contextlib.closing(Station(tmp_path, server.base_url, **settings)) as station,
        ):
            drop(station, originals)
            (outcome,) = station.work()
            assert outcome.destination == "outbox", outcome.message
            over(station)
        head, body = received[0]
        line, *headers = head.decode("ascii").split("\r\n")
        assert line == "POST /v1/images/generations HTTP/1.1"
        pairs = [header.split(": ", 1) for header in headers]
        named = {name.lower(): value for name, value in pairs}
        assert len(named) == len(pairs)  # none twice
        return named, body, outcome.job

    return send


def invalid(station, sandbox, originals, stem="x"):
    """Process the prompts; check that the prompt was refused without a call; return the error file."""
    drop(station, originals)
    (outcome,) = station.work()
    error = refused(station, stem, originals)
    assert error["charged"] == outcome.charged == "no"
    assert error["attempts"] == 0
    assert "sent" not in error["times"]
    assert "correct" in error["next"]
    (row,) = station.ledger.rows()
    assert (row["outcome"], row["charged"], row["attempt"]) == ("invalid", "no", 0)
    assert sandbox.report()["requests"] == 0
    return error


# Bytes on the wire


def test_the_headers_are_exactly_these(sent):
    headers, body, job = sent({"x.prompt.txt": "a cat", "x.png": IMAGE})
    host = headers.pop("host")
    assert host.startswith("127.0.0.1:")
    assert headers.pop("connection", "close") in {"close", "keep-alive"}
    assert headers == {
        "user-agent": f"imagewatch/{__version__}",
        "authorization": f"Bearer {KEY}",
        "content-type": "application/json",
        "content-length": str(len(body)),
        "accept": "application/json",
        "accept-encoding": "identity",
        "idempotency-key": job,
    }


def test_a_cookie_of_a_response_is_not_sent_with_the_next_request(tmp_path):
    heads = []

    def script(exchange):
        heads.append(exchange.request()[0])
        exchange.send(response(paid(IMAGE), b"Set-Cookie: session=1"))

    with Scripted(script, script) as server, contextlib.closing(Station(tmp_path, server.base_url)) as station:
        for name in ("x", "y"):
            drop(station, {f"{name}.prompt.txt": f"a cat {name}"})
            station.work()
    assert len(heads) == 2
    assert b"cookie" not in heads[1].lower()


def test_the_body_is_exactly_what_the_contract_says(sent):
    front = '+++\nprovider = "gemini"\nmodel = "m\\"1"\nn = 2\n'
    front += 'size = "1024x1024"\nquality = "low"\noutput_format = "png"\nseed = -5\n+++\n'
    text = 'a "cat" \\ with\tΩ and \U0001f600\nsecond line'
    _, body, _ = sent({"x.prompt.txt": front + text, "x.png": IMAGE})
    assert json.loads(body) == {
        "provider": "gemini",
        "model": 'm"1',
        "n": 2,
        "size": "1024x1024",
        "quality": "low",
        "output_format": "png",
        "seed": -5,
        "prompt": text,
        "input_images": ["data:image/png;base64," + base64.b64encode(IMAGE).decode()],
    }


def test_options_that_are_not_set_are_not_sent(sent):
    _, body, _ = sent({"x.prompt.txt": "a cat"})
    assert json.loads(body) == {"provider": "flux", "prompt": "a cat"}


@pytest.mark.parametrize("extra", range(4))
def test_the_length_is_right_whatever_the_size_of_the_images(sent, extra):
    image = small_image()
    padded = image + b""  # the sizes come from the image's own dimensions
    for width in range(40 + extra, 400):
        padded = small_image(size=(width, 30))
        if len(padded) % 3 == extra % 3:
            break
    headers, body, _ = sent({"x.prompt.txt": "Ω", "x.png": padded, "x.1.png": image})
    assert int(headers["content-length"]) == len(body)
    first, second = json.loads(body)["input_images"]
    assert base64.b64decode(first.partition(",")[2]) == padded
    assert base64.b64decode(second.partition(",")[2]) == image


def test_fourteen_inputs_arrive_as_they_were_dropped_and_in_their_order(station, sandbox):
    images = {"x.png": small_image(color=(0, 0, 0))}
    for number in range(1, 14):
        kind = ("PNG", "JPEG", "WEBP")[number % 3]
        ending = ("png", "jpg", "webp")[number % 3]
        images[f"x.{number}.{ending}"] = small_image(kind, color=(number, 0, 0))
    originals = {"x.prompt.txt": "a cat", **images}
    drop(station, originals)
    station.work()
    receipt = completed(station, "x", originals, "x.jpg")
    hashes = [hashlib.sha256(content).hexdigest() for content in images.values()]
    (call,) = sandbox.report()["calls"]
    assert call["inputs"] == hashes
    assert [item["sha256"] for item in receipt["inputs"]] == hashes
    assert [item["file"] for item in receipt["inputs"]] == list(images)


def test_declared_inputs_are_sent_in_the_order_of_the_prompt(station, sandbox):
    images = {f"{name}.png": small_image(color=(number, 0, 0)) for number, name in enumerate("cab")}
    originals = {"x.prompt.txt": '+++\ninput_images = ["b.png", "c.png", "a.png"]\n+++\na cat', **images}
    drop(station, originals)
    station.work()
    completed(station, "x", originals, "x.jpg")
    names = ["b.png", "c.png", "a.png"]
    assert sandbox.report()["calls"][0]["inputs"] == [hashlib.sha256(images[name]).hexdigest() for name in names]


def test_an_empty_list_of_inputs_means_none_even_with_an_image_beside_the_prompt(station, sandbox):
    drop(station, {"x.prompt.txt": "+++\ninput_images = []\n+++\na cat", "x.png": IMAGE})
    station.work()
    assert sandbox.report()["calls"][0]["inputs"] == []
    assert station.names("inbox") == ["x.png"]


@pytest.mark.parametrize(
    ("name", "kind", "mime"), [("x.png", "JPEG", "jpeg"), ("x.JPG", "WEBP", "webp"), ("x.webp", "PNG", "png")]
)
def test_the_type_of_an_input_follows_its_content_not_its_name(sent, name, kind, mime):
    _, body, _ = sent({"x.prompt.txt": "a cat", name: small_image(kind)})
    (url,) = json.loads(body)["input_images"]
    assert url.startswith(f"data:image/{mime};base64,")


@pytest.mark.parametrize(
    ("front", "image", "provider"),
    [
        ("", False, "flux"),
        ("", True, "gemini"),
        ('size = "1024x1024"', False, "openai"),
        ('quality = "low"', False, "openai"),
        ('output_format = "webp"', False, "openai"),
        ('quality = "low"', True, "gemini"),
        ('provider = "auto"', True, "gemini"),
        ('provider = "flux"\nquality = "low"', True, "flux"),
        ("n = 2\nseed = 3", False, "flux"),
    ],
)
def test_the_provider_is_chosen_as_the_skill_advises(station, sandbox, front, image, provider):
    drop(station, {"x.prompt.txt": f"+++\n{front}\n+++\na cat", **({"x.png": IMAGE} if image else {})})
    station.work()
    (call,) = sandbox.report()["calls"]
    assert (call["provider"], call["status"]) == (provider, 200)


def test_front_matter_overrides_the_preset_and_the_preset_overrides_the_defaults(at, sandbox):
    station = at(
        defaults__n="3",
        defaults__seed="1",
        presets__poster__n="2",
        presets__poster__quality="low",
        presets__icon__quality="high",
    )
    station.prompt("poster/deep/x", "+++\nseed = 9\n+++\na cat")
    station.prompt("poster/y", '+++\npreset = "icon"\n+++\na cat')
    station.prompt("deep/poster/z", "a cat")
    station.work()
    assert station.receipt("poster/deep/x")["request"] == {"provider": "openai", "n": 2, "quality": "low", "seed": 9}
    assert station.receipt("poster/y")["request"] == {"provider": "openai", "n": 3, "quality": "high", "seed": 1}
    assert station.receipt("deep/poster/z")["request"] == {"provider": "flux", "n": 3, "seed": 1}
    assert sandbox.report()["charged"] == 3


# Refused without a call


def test_all_problems_of_a_prompt_are_reported_together(station, sandbox):
    front = '+++\nn = 5\nqality = "low"\nprovider = "dalle"\npreset = 3\n+++\na cat'
    error = invalid(station, sandbox, {"x.prompt.txt": front})
    assert len(error["problems"]) == 4
    assert 'did you mean "quality"?' in str(error["problems"])


@pytest.mark.parametrize(
    "text",
    [
        b"\xff\xfe\x00",
        b"caf\xe9",
        b"a\0b",
        b" \n",
        b"x" * 32_001,
        b"x" * 300_000,
        b"---\nn: 2\n---\na cat",
        b"+++\nn = 2\na cat",
        b'+++\npreset = "none"\n+++\na cat',
        b'+++\ninput_images = ["../x.png"]\n+++\na cat',
        b'+++\ninput_images = ["/etc/passwd"]\n+++\na cat',
    ],
)
def test_a_prompt_that_cannot_be_sent_is_refused(station, sandbox, text):
    invalid(station, sandbox, {"x.prompt.txt": text})


@pytest.mark.parametrize(
    ("settings", "front", "texts"),
    [
        ({"limits__providers": '["flux"]'}, 'provider = "openai"', "limits.providers"),
        ({"limits__providers": '["openai"]'}, "", "limits.providers"),
        ({"limits__models": '["flux-2-pro"]'}, 'model = "dear"', "limits.models"),
        ({"limits__qualities": '["low"]'}, 'quality = "high"', "limits.qualities"),
        ({"limits__max_n": "1"}, "n = 2", "limits.max_n"),
        ({"limits__max_prompt_chars": "4"}, "", "5 characters"),
    ],
)
def test_the_limits_of_a_shared_folder_are_checked(at, sandbox, settings, front, texts):
    error = invalid(at(**settings), sandbox, {"x.prompt.txt": f"+++\n{front}\n+++\na cat"})
    assert texts in error["message"]


@pytest.mark.parametrize("name", ["x.gif", "x.heic", "x.1.tiff", "x.SVG"])
def test_a_file_of_another_kind_is_refused_with_the_accepted_kinds(station, sandbox, name):
    error = invalid(station, sandbox, {"x.prompt.txt": "a cat", "x.png": IMAGE, name: b"GIF89a"})
    assert name in error["message"]
    assert "png, jpg and webp" in error["message"]


@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (b"GIF89a....", "GIF"),
        (b"<html>", "HTML"),
        (IMAGE[:-5], "not a whole image"),
        (IMAGE[:30] + b"\xff" + IMAGE[31:], "not a whole image"),
    ],
)
def test_an_input_that_is_not_a_complete_image_is_refused(station, sandbox, content, texts):
    error = invalid(station, sandbox, {"x.prompt.txt": "a cat", "x.png": content})
    assert texts in error["message"]
    assert "x.png" in error["message"]


def encoded(kind, size=(24, 16), **options):
    file = io.BytesIO()
    Image.new("RGB", size, (10, 20, 30)).save(file, kind, **options)
    return file.getvalue()


def turned(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


OTHER_NAMES = [
    *(("JPEG", "image/jpeg", f"a.{ending}") for ending in "jfif jpe pjpeg jpg_large heic png JPG gif pdf bin".split()),  # noqa: SIM905
    *(("PNG", "image/png", f"a.{ending}") for ending in ("jpg", "tiff", "PNG")),
    *(("WEBP", "image/webp", f"a.{ending}") for ending in ("jpeg", "avif")),
    ("JPEG", "image/jpeg", "a"),
]


@pytest.mark.parametrize(("kind", "mime", "name"), OTHER_NAMES, ids=[f"{row[0]} {row[2]}" for row in OTHER_NAMES])
def test_a_supported_image_with_any_file_ending_is_sent_with_the_type_of_its_content(
    station, sandbox, kind, mime, name
):
    content = encoded(kind)
    originals = {"x.prompt.txt": f'+++\ninput_images = ["{name}"]\n+++\na cat', name: content}
    drop(station, originals)
    station.work()
    receipt = completed(station, "x", originals, "x.jpg")
    assert [(item["file"], item["mime"]) for item in receipt["inputs"]] == [(name, mime)]
    assert "orientation" not in receipt["inputs"][0]
    (call,) = sandbox.report()["calls"]
    assert call["inputs"] == [hashlib.sha256(content).hexdigest()]


def test_a_jpeg_with_data_after_its_end_is_sent_unchanged(station, sandbox):
    file = io.BytesIO()
    frames = [Image.new("RGB", (24, 16), color) for color in ("red", "blue")]
    frames[0].save(file, "MPO", save_all=True, append_images=frames[1:])
    originals = {"x.prompt.txt": '+++\ninput_images = ["a.mpo"]\n+++\na cat', "a.mpo": file.getvalue()}
    drop(station, originals)
    station.work()
    (item,) = completed(station, "x", originals, "x.jpg")["inputs"]
    assert (item["mime"], item["bytes"]) == ("image/jpeg", len(file.getvalue()))


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "BMP", "PDF", "AVIF", "HEIC"])
@pytest.mark.parametrize("ending", ["png", "jfif"])
def test_an_image_of_another_kind_is_refused_with_any_file_ending_and_the_accepted_kinds_are_named(
    station, sandbox, kind, ending
):
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" if kind == "HEIC" else encoded(kind)
    text = f'+++\ninput_images = ["a.{ending}"]\n+++\na cat'
    error = invalid(station, sandbox, {"x.prompt.txt": text, f"a.{ending}": content})
    named = kind if kind in {"GIF", "PDF", "HEIC"} else "not a PNG, JPEG or WebP image"
    assert f"a.{ending}: its content is {named}" in error["message"]
    assert "png, jpg and webp" in error["message"]
    assert error["charged"] == "no"


def test_an_input_is_reported_as_damaged_too_large_or_not_supported(station, sandbox):
    jpeg = encoded("JPEG")
    frame = jpeg.index(b"\xff\xc0")
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + IMAGE[24:29]
    inputs = {
        "cut.jpg": jpeg[:-2],
        "large.png": IMAGE[:12] + header + struct.pack(">I", zlib.crc32(header)) + IMAGE[33:],
        "lossless.jpg": jpeg[: frame + 1] + b"\xc3" + jpeg[frame + 2 :],
        "deep.jpg": jpeg[: frame + 4] + b"\x0c" + jpeg[frame + 5 :],
    }
    text = f"+++\ninput_images = {list(inputs)}\n+++\na cat"
    error = invalid(station, sandbox, {"x.prompt.txt": text, **inputs})
    cut, large, lossless, deep = error["problems"]
    assert cut == "cut.jpg: it is not a whole image: cut short: no EOI marker (drop it again)"
    assert large == "large.png: it is too large: 60000\u00d760000 pixels is more than 100,000,000 (make it smaller)"
    assert "lossless.jpg: it is not supported: a lossless JPEG (save it" in lossless
    assert "deep.jpg: it is not supported: a 12-bit JPEG (save it" in deep


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_an_image_with_an_orientation_tag_is_sent_as_stored_and_check_reports_it(station, sandbox, kind):
    content = encoded(kind, exif=turned(6))
    originals = {"x.prompt.txt": '+++\ninput_images = ["a.jpg", "b.png"]\n+++\na cat', "a.jpg": content, "b.png": IMAGE}
    drop(station, originals)
    reasons = [line.why for line in explained(station.config()) if line.what == "x.prompt.txt"]
    assert reasons == ["gemini, with a.jpg, b.png; sent as stored, without applying the EXIF orientation: a.jpg (6)"]
    station.work()
    receipt = completed(station, "x", originals, "x.jpg")
    assert [item.get("orientation") for item in receipt["inputs"]] == [6, None]
    assert [item["width"] for item in receipt["inputs"]] == [24, Image.open(io.BytesIO(IMAGE)).width]
    (call,) = sandbox.report()["calls"]
    assert call["inputs"][0] == hashlib.sha256(content).hexdigest()


def test_an_input_of_too_many_pixels_is_refused(station, sandbox):
    header = b"IHDR" + struct.pack(">II", 60_000, 60_000) + IMAGE[24:29]
    bomb = IMAGE[:12] + header + struct.pack(">I", zlib.crc32(header)) + IMAGE[33:]
    error = invalid(station, sandbox, {"x.prompt.txt": "a cat", "x.png": bomb})
    assert "60000" in error["message"].replace(",", "")


def test_an_input_of_more_scans_than_encoders_write_is_refused_and_not_sent(station, sandbox):
    header, scan = b"\xff\xc0\x00\x0b\x08\x00\x02\x00\x02\x01\x01\x11\x00", b"\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00"
    bomb = b"\xff\xd8" + header + (scan + b"x") * 101 + b"\xff\xd9"
    error = invalid(station, sandbox, {"x.prompt.txt": "a cat", "x.jpg": bomb})
    assert "x.jpg" in error["message"]
    assert "more than 100 scans" in error["message"]


def test_a_declared_input_that_never_comes_is_refused(at, sandbox):
    station = at(inbox__input_wait_seconds="0")
    text = '+++\ninput_images = ["a.png", "b.png"]\n+++\na cat'
    error = invalid(station, sandbox, {"x.prompt.txt": text, "a.png": IMAGE})
    assert "b.png: the file is not there" in error["message"]


def test_more_than_fourteen_inputs_are_refused(station, sandbox):
    images = {f"x.{number}.png": IMAGE for number in range(1, 16)}
    error = invalid(station, sandbox, {"x.prompt.txt": "a cat", **images})
    assert "15 images are more than 14" in error["message"]


def test_more_bytes_than_the_limit_are_refused(at, sandbox):
    station = at(limits__max_input_bytes=str(2 * len(IMAGE) - 1))
    error = invalid(station, sandbox, {"x.prompt.txt": "a cat", "x.png": IMAGE, "x.1.png": IMAGE})
    assert "limits.max_input_bytes" in error["message"]


def test_a_link_as_input_is_refused_and_its_target_stays_secret(station, sandbox, tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(IMAGE)
    (station.inbox / "x.png").symlink_to(secret)
    station.prompt("x", "a cat")
    station.work()
    over(station)
    assert station.error("x")["message"].startswith("x.png: it is a link")
    assert os.readlink(station.errors / "x.png") == str(secret)
    assert station.names("errors") == ["x.error.toml", "x.png", "x.prompt.txt"]
    assert sandbox.report()["requests"] == 0


@pytest.mark.parametrize("kind", ["FIFO", "socket"])
def test_an_input_that_is_not_a_regular_file_is_refused(station, sandbox, kind, monkeypatch):
    monkeypatch.chdir(station.inbox)  # the name of a socket is short
    if kind == "FIFO":
        os.mkfifo("x.png")
    else:
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as listener:
            listener.bind("x.png")
    station.prompt("x", "a cat")
    station.work()
    over(station)
    assert station.error("x")["charged"] == "no"
    assert station.error("x")["message"].startswith("x.png: ")
    assert os.path.lexists(station.errors / "x.png")
    assert sandbox.report()["requests"] == 0


@pytest.mark.parametrize("kind", ["link", "FIFO", "folder", "empty"])
def test_a_prompt_that_is_not_a_regular_file_with_text_stays_in_the_inbox(station, sandbox, tmp_path, kind):
    path = station.inbox / "x.prompt.txt"
    other = tmp_path / "other"
    other.write_text("a cat")
    {
        "link": lambda: path.symlink_to(other),
        "FIFO": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "empty": path.touch,
    }[kind]()
    assert station.work() == []
    assert os.path.lexists(path)
    assert sandbox.report()["requests"] == 0


@pytest.fixture
def plain_user(sandbox):
    """A station of a user without root rights, even if the tests run as root."""
    folder = Path(tempfile.mkdtemp())
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.setresuid(65534, 65534, 0)
    try:
        with contextlib.closing(Station(folder, sandbox.base_url)) as station:
            yield station
    finally:
        if root:
            os.setresuid(0, 0, 0)
        shutil.rmtree(folder)


def test_a_prompt_with_an_image_that_may_not_be_read_stays_in_the_inbox(plain_user, sandbox):
    (plain_user.inbox / "x.png").write_bytes(IMAGE)
    (plain_user.inbox / "x.png").chmod(0)
    plain_user.prompt("x", "a cat")
    assert plain_user.work() == []
    assert plain_user.names("inbox") == ["x.png", "x.prompt.txt"]
    assert sandbox.report()["requests"] == 0
    (plain_user.inbox / "x.png").chmod(0o600)
    plain_user.work()
    assert plain_user.receipt("x")["inputs"][0]["file"] == "x.png"


def test_a_prompt_that_may_not_be_read_stays_in_the_inbox(plain_user, sandbox):
    plain_user.prompt("x", "a cat").chmod(0)
    assert plain_user.work() == []
    assert plain_user.names("inbox") == ["x.prompt.txt"]


# Names


def published(station, stem="x"):
    """The names in the outbox except the receipt, and the receipt of the only job."""
    (file,) = [name for name in station.names("outbox") if name.endswith(".receipt.toml")]
    base = file.removesuffix(".receipt.toml")
    receipt = station.receipt(base)
    names = [image["file"] for image in receipt["images"]]
    assert station.names("outbox") == sorted([*names, file])
    return base, names, receipt


@pytest.mark.parametrize("stem", ["x" * 244, "Ω" * 122, "\U0001f600" * 61], ids=["1 byte", "2 bytes", "4 bytes"])
@pytest.mark.parametrize("tag", ["", "[sandbox: 400]", "[sandbox: no-images]"])
def test_the_longest_names_reach_every_destination(station, sandbox, stem, tag):
    assert len(f"{stem}.prompt.txt".encode()) == 255
    drop(station, {f"{stem}.prompt.txt": f"+++\nn = 4\n+++\na cat {tag}", f"{stem}.png": IMAGE})
    station.work()
    over(station)
    names = [name for folder in ("outbox", "errors", "archive") for name in station.names(folder)]
    assert all(len(name.encode()) <= 255 for name in names)
    finished = station.finished()
    if tag:
        ((base, destination),) = finished.items()
        assert destination == "errors"
        assert station.error(base)["source"] == f"{stem}.prompt.txt"
        assert len(names) == (4 if "no-images" in tag else 3)
    else:
        base, images, receipt = published(station)
        assert images == [f"{base}-{number}.jpg" for number in range(1, 5)]
        assert receipt["source"] == f"{stem}.prompt.txt"
        assert station.names("archive") == [f"{stem}.png", f"{stem}.prompt.txt"]


@pytest.mark.parametrize(
    "stem", [os.fsdecode(b"caf\xe9"), "a\nb", "\x1b[31mred", "a\u202eb", "  ", "a b'\"$(x)", "-rf"]
)
@pytest.mark.parametrize("tag", ["", "[sandbox: 400]"])
def test_unusual_names_are_kept_unchanged_and_harm_no_terminal(station, sandbox, stem, tag):
    drop(station, {f"{stem}.prompt.txt": f"a cat {tag}", f"{stem}.png": IMAGE})
    (outcome,) = station.work()
    over(station)
    if tag:
        assert station.names("errors") == sorted([f"{stem}.error.toml", f"{stem}.png", f"{stem}.prompt.txt"])
        text = (station.errors / f"{stem}.error.toml").read_text(encoding="utf-8")
        assert outcome.destination == "errors"
    else:
        assert station.names("outbox") == sorted([f"{stem}.jpg", f"{stem}.receipt.toml"])
        assert station.names("archive") == sorted([f"{stem}.png", f"{stem}.prompt.txt"])
        text = (station.outbox / f"{stem}.receipt.toml").read_text(encoding="utf-8")
        assert outcome.destination == "outbox"
    assert "\x1b" not in text
    assert len(station.ledger.rows()) == 1


def existing(folder, *names):
    """Create files that belong to no job, and return a check that they are unchanged."""
    for name in names:
        (folder / name).write_bytes(b"theirs " + name.encode())

    def check():
        for name in names:
            assert (folder / name).read_bytes() == b"theirs " + name.encode()

    return check


@pytest.mark.parametrize("existing_name", ["x-1.jpg", "x-2.jpg", "x.receipt.toml"])
def test_if_one_name_exists_in_the_outbox_all_files_of_the_job_get_its_short_id(station, sandbox, existing_name):
    check = existing(station.outbox, existing_name)
    drop(station, {"x.prompt.txt": "+++\nn = 2\n+++\na cat"})
    (outcome,) = station.work()
    over(station)
    check()
    base = f"x.{outcome.job[:4]}"
    assert station.names("outbox") == sorted([existing_name, f"{base}-1.jpg", f"{base}-2.jpg", f"{base}.receipt.toml"])
    assert [image["file"] for image in station.receipt(base)["images"]] == [f"{base}-1.jpg", f"{base}-2.jpg"]


@pytest.mark.parametrize("existing_name", ["x.png", "x.prompt.txt", "x.error.toml", "x.answer.json"])
def test_if_one_name_exists_in_errors_all_files_of_the_job_get_its_short_id(station, sandbox, existing_name):
    check = existing(station.errors, existing_name)
    originals = {"x.prompt.txt": "a cat [sandbox: no-images]", "x.png": IMAGE}
    drop(station, originals)
    (outcome,) = station.work()
    over(station)
    check()
    base = f"x.{outcome.job[:4]}"
    ours = [f"{base}.png", f"{base}.prompt.txt", f"{base}.error.toml", f"{base}.answer.json"]
    assert station.names("errors") == sorted([existing_name, *ours])
    assert (station.errors / f"{base}.png").read_bytes() == IMAGE


@pytest.mark.parametrize("existing_name", ["x.png", "x.prompt.txt", "logo.png"])
def test_an_existing_name_in_the_archive_is_never_overwritten(station, sandbox, existing_name):
    check = existing(station.archive, existing_name)
    drop(
        station,
        {"x.prompt.txt": '+++\ninput_images = ["x.png", "logo.png"]\n+++\nc', "x.png": IMAGE, "logo.png": IMAGE},
    )
    (outcome,) = station.work()
    over(station)
    check()
    tag = outcome.job[:4]
    ours = [f"x.{tag}.png", f"x.{tag}.prompt.txt", f"logo.{tag}.png"]
    assert station.names("archive") == sorted([existing_name, *ours])
    assert station.names("outbox") == ["x.jpg", "x.receipt.toml"]


def test_if_the_name_with_the_short_id_exists_too_the_whole_id_is_used(station, sandbox):
    drop(station, {"x.prompt.txt": "a cat"})
    claim = station.scan.scan_all(0, 0).ready[0].claim("abcd000011112222", 0.0)
    check = existing(station.outbox, "x.jpg", "x.abcd.jpg")
    station.worker.start(claim)
    check()
    assert station.names("outbox") == sorted(
        ["x.jpg", "x.abcd.jpg", "x.abcd000011112222.jpg", "x.abcd000011112222.receipt.toml"]
    )


def test_a_name_that_appears_after_the_decision_is_not_overwritten(station, sandbox):
    checks = []

    def script(exchange):
        exchange.request()
        exchange.send(response(paid(IMAGE, small_image(color=(1, 1, 1)))))

    with (
        Scripted(script) as server,
        contextlib.closing(Station(station.root.parent / "b", server.base_url)) as other,
    ):
        deliver = other.spool.delivery.deliver

        def late(claim, decision, check):
            if not checks:
                checks.append(existing(other.outbox, "x-2.png"))
            return deliver(claim, decision, check)

        other.spool.delivery.deliver = late
        drop(other, {"x.prompt.txt": "a cat"})
        (outcome,) = other.work()
        over(other)
        checks[0]()
        ours = ["x-1.png", f"x-2.{outcome.job[:4]}.png"]
        assert other.names("outbox") == sorted([*ours, "x-2.png", "x.receipt.toml"])
        assert [image["file"] for image in other.receipt("x")["images"]] == ours


def test_the_images_of_x_and_of_x_1_have_different_names(station, sandbox):
    drop(station, {"x.prompt.txt": "+++\nn = 2\n+++\na cat"})
    (first,) = station.work()
    drop(station, {"x-1.prompt.txt": "a dog"})
    (second,) = station.work()
    over(station)
    base = f"x-1.{second.job[:4]}"
    assert station.names("outbox") == sorted(
        ["x-1.jpg", "x-2.jpg", "x.receipt.toml", f"{base}.jpg", f"{base}.receipt.toml"]
    )
    assert station.receipt("x")["job"] == first.job
    assert station.receipt(base)["source"] == "x-1.prompt.txt"
    served = [sha256 for call in sandbox.report()["calls"] for sha256 in call["images"]]
    ours = [hashlib.sha256((station.outbox / name).read_bytes()).hexdigest() for name in ("x-1.jpg", "x-2.jpg")]
    assert [*ours, hashlib.sha256((station.outbox / f"{base}.jpg").read_bytes()).hexdigest()] == served


def test_folders_are_mirrored_in_every_destination(station, sandbox):
    station.prompt("a/b/x", "a cat")
    station.prompt("a/y", "a cat [sandbox: 400]")
    station.work()
    assert station.names("outbox") == ["a/b/x.jpg", "a/b/x.receipt.toml"]
    assert station.names("errors") == ["a/y.error.toml", "a/y.prompt.txt"]
    assert station.names("archive") == ["a/b/x.prompt.txt"]
    assert station.receipt("a/b/x")["source"] == "a/b/x.prompt.txt"
    assert station.names("inbox") == []


def test_a_job_whose_inbox_is_removed_at_its_end_is_finished_and_the_inbox_is_not_created_again(station):
    station.prompt("x", "a cat")
    keep = station.spool.delivery.keep

    def replaced(claim, decision):
        keep(claim, decision)
        shutil.rmtree(station.inbox)

    station.spool.delivery.keep = replaced
    station.work()
    assert not station.inbox.exists()
    assert set(station.job_states().values()) == {"done"}
    station.inbox.mkdir()
    assert station.leftovers() == []
    assert station.names("archive") == ["x.prompt.txt"]
