"""The gallery without a browser: jobs on the page, files beside it, and files it does not touch."""

from __future__ import annotations

import base64
import contextlib
import grp
import hashlib
import io
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import pytest
import tomli_w
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageChops, ImageStat
from support.daemon import Running, until

from imagewatch.config.load import load
from imagewatch.gallery import Gallery
from imagewatch.gallery.decoder import Decoder, Patience
from imagewatch.system.errors import SpoolError, UsageError
from imagewatch.system.text import whole

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from support.station import Station

HOSTILE = "</script><script>pwned()</script><img src=x onerror=pwned()>\"'&amp;<!--"


def plain_image(color: object = "teal", size: tuple[int, int] = (640, 480), kind: str = "png", **how: Any) -> bytes:
    out = io.BytesIO()
    Image.new(how.pop("mode", "RGB"), size, color).save(out, kind, **how)
    return out.getvalue()


class Shelf:
    """The folders of finished jobs, filled by the tests."""

    def __init__(self, root: Path) -> None:
        self.root = root
        for name in ("outbox", "errors", "archive"):
            (root / name).mkdir(parents=True)

    def environ(self, **settings: str) -> dict[str, str]:
        given_ = {f"IMAGEWATCH_{name.upper()}": value for name, value in settings.items()}
        state = str(self.root.parent / "state")
        return {"IMAGEWATCH_FOLDERS__ROOT": str(self.root), "IMAGEWATCH_FOLDERS__STATE": state, **given_}

    def gallery(self, output: str | None = None, **settings: str) -> Gallery:
        return Gallery(load(None, self.environ(**settings)), output)

    def put(self, path: str, content: bytes) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)

    def completed(self, stem: str, *images: bytes, folder: str = "", **more: Any) -> None:
        """Put a receipt and its images into the outbox."""
        place = f"outbox/{folder}/" if folder else "outbox/"
        names = [f"{stem}.png"] if len(images) == 1 else [f"{stem}-{k}.png" for k in range(1, len(images) + 1)]
        for name, content in zip(names, images, strict=True):
            self.put(place + name, content)
        tables = [
            {"file": name, "mime": "image/png", "bytes": len(content), "width": 640, "height": 480, "sha256": ""}
            for name, content in zip(names, images, strict=True)
        ]
        result_file = {
            "source": f"{stem}.prompt.txt",
            "charged": "yes",
            "prompt": f"a {stem}",
            "images": tables,
            **more,
        }
        self.put(f"{place}{stem}.receipt.toml", tomli_w.dumps(result_file).encode())

    def failed(self, stem: str, **more: Any) -> None:
        result_file = {"source": f"{stem}.prompt.txt", "charged": "no", "message": "no", **more}
        self.put(f"errors/{stem}.error.toml", tomli_w.dumps(result_file).encode())

    @property
    def data(self) -> dict[str, Any]:
        return page_data(self.root / "gallery.html")

    @property
    def jobs(self) -> list[dict[str, Any]]:
        return self.data["shown"]["jobs"]

    @property
    def thumbs(self) -> list[str]:
        return sorted(path.name for path in (self.root / "gallery_files").glob("*.webp"))


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "watched")


def page_data(path: Path) -> dict[str, Any]:
    """The data in a page."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text(), re.DOTALL)
    assert found
    return json.loads(found[1])


def command(environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "imagewatch", "gallery", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": "/nonexistent", **environ},
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )


# Content of the page


def test_the_page_shows_completed_and_failed_jobs(station: Station):
    station.drop("edit.png", plain_image("navy"))
    station.prompt("edit", "make it blue")
    station.prompt("four", '+++\nprovider = "gemini"\nn = 4\n+++\na robot')
    station.work()
    station.prompt("typo", '+++\nqualtiy = "high"\n+++\na cat')
    station.prompt("a/b/broke", "[sandbox: 402] a cathedral")
    station.work()

    done = command(station.environ)

    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"Wrote {station.root}/gallery.html: 2 completed, 2 failed.\n"
    jobs = {job["name"]: job for job in page_data(station.root / "gallery.html")["shown"]["jobs"]}
    assert set(jobs) == {"edit", "four", "typo", "broke"}
    receipt = station.receipt("edit")
    edit = jobs["edit"]
    shown = {"completed": True, "prompt": "make it blue", "provider": "gemini", "charged": "yes"}
    assert {name: edit[name] for name in shown} == shown
    assert (edit["credits"], edit["model"], edit["job"]) == (
        receipt["credits_charged"],
        receipt["model"],
        receipt["job"],
    )
    assert edit["at"] == int(receipt["times"]["published"].timestamp() * 1000)
    assert [one["href"] for one in edit["inputs"]] == ["archive/edit.png"]
    assert (station.root / edit["images"][0]["href"]).stat().st_size == edit["images"][0]["bytes"]
    assert len(jobs["four"]["images"]) == 4
    assert (jobs["broke"]["folder"], jobs["broke"]["charged"], jobs["broke"]["status"]) == ("a/b", "no", 402)
    assert "add credits" in jobs["broke"]["next"]
    # It was never sent, so its error file has no prompt; the prompt is beside it.
    assert jobs["typo"]["prompt"].endswith("a cat")
    assert "qualtiy" in jobs["typo"]["message"]
    thumbs = {path.name for path in (station.root / "gallery_files").glob("*.webp")}
    assert thumbs == {one["thumb"] for job in jobs.values() for one in (*job.get("images", []), *job.get("inputs", []))}


def test_the_newest_job_comes_first(shelf: Shelf):
    for name, hour in (("old", 1), ("new", 9), ("middle", 5)):
        shelf.failed(name)
        with (shelf.root / f"errors/{name}.error.toml").open("a") as file:
            file.write(f"\n[times]\npublished = 2027-03-01T0{hour}:00:00Z\n")
    shelf.gallery().write()
    assert [job["name"] for job in shelf.jobs] == ["new", "middle", "old"]


def test_two_edits_of_one_name_each_keep_their_own_input(station: Station):
    for color in ("red", "blue"):
        station.drop("cat.png", plain_image(color))
        station.prompt("cat", f'+++\nprovider = "gemini"\n+++\nmore {color}')
        station.work()
    Gallery(station.config()).write()
    jobs = page_data(station.root / "gallery.html")["shown"]["jobs"]
    shown = {job["prompt"]: (station.root / unquote(job["inputs"][0]["href"])).read_bytes() for job in jobs}
    assert shown == {"more red": plain_image("red"), "more blue": plain_image("blue")}


def test_an_input_that_was_not_kept_is_named_nevertheless(shelf: Shelf):
    inputs = [{"file": "boat.png", "bytes": 9}]
    shelf.completed("cat", plain_image(), inputs=inputs)
    shelf.gallery().write()
    assert shelf.jobs[0]["inputs"] == [{"name": "boat.png", "bytes": 9, "problem": "is missing from the archive"}]
    shelf.gallery(folders__archive="delete").write()
    assert shelf.jobs[0]["inputs"] == [{"name": "boat.png", "bytes": 9, "problem": "was not kept"}]


def test_a_job_whose_image_was_removed_stays_on_the_page(shelf: Shelf):
    shelf.completed("cat", plain_image())
    (shelf.root / "outbox/cat.png").unlink()
    shelf.gallery().write()
    assert shelf.jobs[0]["images"][0]["problem"] == "is missing from the outbox"


def test_folders_that_do_not_exist_yet_give_an_empty_page(tmp_path: Path):
    tmp_path.joinpath("new").mkdir()
    done = command(
        {"IMAGEWATCH_FOLDERS__ROOT": str(tmp_path / "new"), "IMAGEWATCH_FOLDERS__STATE": str(tmp_path / "s")}
    )
    assert done.returncode == 0
    assert page_data(tmp_path / "new/gallery.html")["shown"]["jobs"] == []
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["gallery.html", "gallery_files"]


def test_a_page_at_another_path_creates_no_folder(shelf: Shelf):
    done = command(shelf.environ(), "--output", str(shelf.root / "typo/deep/gallery.html"))
    assert (done.returncode, f"no such folder: {shelf.root / 'typo/deep'}" in done.stderr) == (64, True)
    assert "create it first" in done.stderr
    assert not (shelf.root / "typo").exists()


def test_without_any_folders_nothing_is_created(tmp_path: Path):
    done = command(
        {"IMAGEWATCH_FOLDERS__ROOT": str(tmp_path / "typo"), "IMAGEWATCH_FOLDERS__STATE": str(tmp_path / "s")}
    )
    assert (done.returncode, f"no such folder: {tmp_path / 'typo'}" in done.stderr) == (74, True)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_may_not_be_read_is_reported_and_skipped(shelf: Shelf):
    shelf.completed("cat", plain_image())
    locked = shelf.root / "outbox/private"
    locked.mkdir(mode=0)
    if os.access(locked, os.R_OK):
        pytest.skip("this user may read everything")
    written = shelf.gallery().write()
    locked.chmod(0o700)
    assert written.completed == 1
    assert written.notes == [f"{locked}: cannot be read: Permission denied"]
    assert shelf.data["shown"]["notes"] == written.notes


# Untrusted result files


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"not TOML at all", "Expected '='"),
        (b"\xff\xfe", "is not UTF-8"),
        (
            b'source = 7\ncharged = "yes"\n',
            "is not a result file of imagewatch: Expected `str`, got `int` - at `$.source`",
        ),
        (b'source = "cat"\ncharged = "perhaps"\n', "Invalid enum value 'perhaps'"),
        (b'charged = "yes"\n', "missing required field `source`"),
        (b'source = "cat"\ncharged = "no"\nstatus = 0x' + b"f" * 5000 + b"\n", "status"),
        (b"x = " + b"[" * 5000, "is nested too deeply"),
        (b"'\"'" + b".a" * 20_000 + b".'\"' = 1\n", "has more than 1000 dots"),
        (b"x = 1\n" * 50_000, "is larger than 256 KiB"),
    ],
)
def test_a_result_file_that_cannot_be_read_is_shown_as_unreadable(shelf: Shelf, content: bytes, why: str):
    shelf.put("outbox/cat.receipt.toml", content)
    shelf.completed("dog", plain_image())
    shelf.gallery().write()
    cat, dog = sorted(shelf.jobs, key=lambda job: job["name"])
    assert (cat["name"], dog["name"]) == ("cat", "dog")
    assert cat["message"].startswith("cat.receipt.toml cannot be read: ")
    assert why in cat["message"]


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**80), 2**80) | st.floats() | st.text() | st.datetimes(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
RESULT_FILE = {
    "source": st.text(),
    "charged": st.sampled_from(["yes", "no", "unknown"]),
    "job": st.text(),
    "credits_charged": st.floats() | st.integers(),
    "request": st.dictionaries(st.text(), anything, max_size=3),
    "times": st.dictionaries(st.sampled_from(["published", "sent", "answered"]), st.datetimes()),
    "inputs": st.lists(st.fixed_dictionaries({"file": st.text(), "bytes": st.integers(-5, 5)}), max_size=3),
    "images": st.lists(st.fixed_dictionaries({"file": st.text(), "width": st.integers()}), max_size=3),
    "problems": anything,
    "prompt": st.text(),
}


@settings(max_examples=150, deadline=None)
@given(result_file=st.fixed_dictionaries({}, optional=RESULT_FILE))
def test_the_page_is_written_whatever_a_result_file_contains(tmp_path_factory, result_file: dict[str, Any]):
    shelf = Shelf(tmp_path_factory.mktemp("any") / "watched")

    def tame(value: Any) -> Any:  # what TOML can represent
        if isinstance(value, dict):
            return {tame(name): tame(inner) for name, inner in value.items() if inner is not None}
        if isinstance(value, list):
            return [tame(inner) for inner in value if inner is not None]
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value

    shelf.put("outbox/cat.receipt.toml", tomli_w.dumps(tame(result_file)).encode())
    assert shelf.gallery().write().completed == 1
    assert len(shelf.jobs) == 1


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", "a/../../secret.png", "..", "", "x\0y"])
def test_a_result_file_cannot_name_a_file_outside_its_folder(shelf: Shelf, name: str):
    secret = plain_image()
    shelf.put("secret.png", secret)
    entry = {"file": name, "bytes": len(secret)}
    shelf.put("outbox/cat.receipt.toml", tomli_w.dumps({"source": "c", "charged": "yes", "images": [entry]}).encode())
    shelf.gallery().write()
    assert "href" not in shelf.jobs[0]["images"][0]
    assert shelf.thumbs == []


@pytest.mark.timeout(20)
def test_a_name_longer_than_any_file_name_causes_no_delay(shelf: Shelf):
    for stem in ("a", "b"):
        shelf.failed(stem, job="20260101T000000-7f3a", inputs=[{"file": "x" * 240_000, "bytes": 1}])
    shelf.gallery().write()
    assert {job["name"] for job in shelf.jobs} == {"a", "b"}
    assert "href" not in shelf.jobs[0]["inputs"][0]


def test_neither_links_nor_pipes_are_opened(shelf: Shelf, tmp_path: Path):
    secret = plain_image()
    (tmp_path / "private.png").write_bytes(secret)
    shelf.completed("cat", secret)
    (shelf.root / "outbox/cat.png").unlink()
    (shelf.root / "outbox/cat.png").symlink_to(tmp_path / "private.png")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.receipt.toml").write_text('source = "x"\ncharged = "yes"\n')
    (shelf.root / "outbox/linked").symlink_to(tmp_path / "elsewhere")
    (shelf.root / "outbox/y.receipt.toml").symlink_to(tmp_path / "elsewhere/x.receipt.toml")
    os.mkfifo(shelf.root / "outbox/z.receipt.toml")
    (tmp_path / "diary.txt").write_text("dear diary")
    shelf.failed("dog")
    (shelf.root / "errors/dog.prompt.txt").symlink_to(tmp_path / "diary.txt")
    shelf.failed("elk")
    os.mkfifo(shelf.root / "errors/elk.prompt.txt")
    shelf.gallery().write()
    assert {job["name"] for job in shelf.jobs} == {"cat", "dog", "elk"}
    assert "diary" not in (shelf.root / "gallery.html").read_text()
    [cat] = [job for job in shelf.jobs if job["name"] == "cat"]
    assert "href" not in cat["images"][0]
    assert shelf.thumbs == []


def test_a_name_that_is_not_utf8_has_a_url_that_works(shelf: Shelf):
    content = plain_image()
    name = os.fsdecode(b"caf\xe9 %41#?.png")
    (shelf.root / "outbox" / name).write_bytes(content)
    entry = {"file": whole(name), "bytes": len(content)}  # as receipts write it
    shelf.put("outbox/c.receipt.toml", tomli_w.dumps({"source": "c", "charged": "yes", "images": [entry]}).encode())
    shelf.gallery().write()
    [shown] = shelf.jobs[0]["images"]
    assert shown["href"] == "outbox/caf%E9%20%2541%23%3F.png"
    assert shelf.thumbs == [shown["thumb"]]


# No text becomes markup


def hostile(shelf: Shelf) -> None:
    """Fill the folders with names and texts that try to be script."""
    name = HOSTILE.replace("/", "\\")
    shelf.completed(
        "cat", plain_image(), folder=name, prompt=HOSTILE, provider=HOSTILE, model=HOSTILE, code=HOSTILE, job=HOSTILE
    )
    shelf.completed(
        name, plain_image(), billing={HOSTILE: HOSTILE}, request={HOSTILE: HOSTILE}, problems=[HOSTILE, HOSTILE]
    )
    shelf.failed(name, message=HOSTILE, next=HOSTILE, problems=[HOSTILE, HOSTILE], code=HOSTILE, source=HOSTILE)
    shelf.put(f"errors/{name}2.error.toml", HOSTILE.encode())
    shelf.completed("dog", b"", inputs=[{"file": HOSTILE, "problem": HOSTILE}])


def test_no_text_of_other_people_is_markup(shelf: Shelf):
    hostile(shelf)
    shelf.gallery().write()
    text = (shelf.root / "gallery.html").read_text()
    assert text.count("<script") == text.count("</script") == 2
    assert "onerror=pwned" not in text.replace("\\u003cimg src=x onerror=pwned", "")
    assert HOSTILE in {job.get("prompt") for job in shelf.jobs}


def test_a_title_of_markup_is_text(tmp_path: Path):
    shelf = Shelf(tmp_path / "<b>&amp;")
    shelf.gallery().write()
    assert "<title>Gallery · &lt;b&gt;&amp;amp;</title>" in (shelf.root / "gallery.html").read_text()


def test_the_policy_lets_our_own_script_and_style_run_and_nothing_else(shelf: Shelf):
    shelf.gallery().write()
    text = (shelf.root / "gallery.html").read_text()
    found = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)
    assert found
    rules = dict(rule.strip().split(" ", 1) for rule in found[1].split(";"))
    assert rules["default-src"] == "'none'"
    for rule, pattern in (("script-src", r"<script>(.*?)</script>"), ("style-src", r"<style>(.*?)</style>")):
        [content] = re.findall(pattern, text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[rule] == f"'sha256-{digest}'"


def test_the_page_contains_no_network_address(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    addresses = re.findall(r"[a-z]+://[^\s\"'<]*", (shelf.root / "gallery.html").read_text())
    assert addresses == ["http://www.w3.org/2000/svg"]  # a namespace, which browsers do not load


# Thumbnails


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def vast(side: int) -> bytes:
    """A small PNG of very many black pixels, which are declared transparent."""
    packed = zlib.compressobj()
    rows = [packed.compress(bytes(1 + 3 * side)) for _ in range(side)]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)) + chunk(b"tRNS", bytes(6))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"".join(rows) + packed.flush()) + chunk(b"IEND", b"")


def bomb(width: int, height: int) -> bytes:
    """A complete PNG of a few bytes that claims to be enormous."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def lying() -> bytes:
    """A PNG with a complete structure and invalid pixels."""
    return bomb(300, 300)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (bomb(8000, 8000), "too large for a thumbnail: 8000 x 8000"),
        (bomb(60000, 60000), "too large for a thumbnail: 60000 x 60000"),
        (plain_image(size=(5000, 4001), kind="webp"), "too large for a thumbnail: 5000 x 4001"),
        (plain_image()[:-20], "cut short"),
        (b"GIF89a", "not a PNG, JPEG or WebP"),
        (b"<svg onload='pwned()'/>", "not a PNG, JPEG or WebP"),
        (b"", "not a PNG, JPEG or WebP"),
        (lying(), "cannot be"),
    ],
)
def test_an_image_without_a_thumbnail_shows_the_reason_instead(shelf: Shelf, content: bytes, why: str):
    shelf.completed("bad", content)
    shelf.completed("good", plain_image())
    shelf.gallery().write()
    bad, good = sorted(shelf.jobs, key=lambda job: job["name"])
    assert why in bad["images"][0]["problem"]
    assert "thumb" not in bad["images"][0]
    assert bad["images"][0]["href"] == "outbox/bad.png"
    assert shelf.thumbs == [good["images"][0]["thumb"]]


@pytest.mark.parametrize(
    ("kind", "mode", "color"),
    [
        *((kind, "RGB", "teal") for kind in ("png", "jpeg", "webp")),
        *((kind, "L", 90) for kind in ("png", "jpeg", "webp")),
        *((kind, "RGBA", (1, 2, 3, 90)) for kind in ("png", "webp")),
        ("png", "LA", (9, 90)),
        ("png", "P", 3),
        ("png", "1", 1),
        ("png", "I;16", 40_000),
        ("jpeg", "CMYK", (9, 9, 9, 9)),
    ],
)
def test_thumbnails_are_small_and_keep_shape_and_transparency(shelf: Shelf, kind: str, mode: str, color: object):
    shelf.completed("cat", plain_image(color, (1600, 800), kind, mode=mode))
    shelf.gallery().write()
    with Image.open(shelf.root / "gallery_files" / shelf.thumbs[0]) as small:
        assert (small.format, small.size) == ("WEBP", (320, 160))
        assert small.has_transparency_data == mode.endswith("A")


@pytest.mark.parametrize(
    ("mode", "kind", "how"),
    [
        ("P", "png", {}),
        ("P", "png", {"transparency": 0}),
        ("L", "png", {}),
        ("RGB", "png", {}),
        ("RGBA", "png", {}),
        ("CMYK", "jpeg", {}),
        ("RGBA", "webp", {"lossless": True}),
    ],
)
def test_a_large_image_that_is_reduced_in_strips_looks_the_same(tmp_path: Path, mode: str, kind: str, how: Any):
    small = Image.radial_gradient("L").resize((300, 250))
    if mode != "L":
        small = Image.merge("RGBA", [small, small.rotate(90, expand=True).resize(small.size), small, small])
    converted_image = small.convert("RGB")
    converted = {"P": lambda: converted_image.quantize(64), "CMYK": lambda: converted_image.convert("CMYK")}
    large = converted.get(mode, lambda: small.convert(mode))().resize((3003, 2501), Image.Resampling.NEAREST)
    path = tmp_path / "large"
    exif = Image.Exif()
    exif[0x0112] = 6
    large.save(path, kind, exif=exif, **how)
    with Image.open(path) as again:
        wanted = (
            again.convert("RGBA" if again.has_transparency_data else "RGB").resize((320, 267)).rotate(-90, expand=True)
        )
    with contextlib.closing(Decoder(Patience())) as decoder, path.open("rb") as file:
        content = decoder.shrink(file, 50_000_000)
    with Image.open(io.BytesIO(content)) as made:
        assert (made.size, made.has_transparency_data) == (wanted.size, wanted.mode == "RGBA")
        off = ImageChops.difference(made.convert("RGBa").convert("RGBA"), wanted.convert("RGBa").convert("RGBA"))
        assert max(ImageStat.Stat(off).mean) < 4


PEAK = """
import os, pathlib, threading
from imagewatch.config.load import load
from imagewatch.gallery import Gallery

def memory(process):
    lines = pathlib.Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

def sample():
    while not over.wait(0.01):
        try:
            tasks = pathlib.Path("/proc/self/task").iterdir()
            every = [line for task in tasks for line in (task / "children").read_text().split()]
            peaks.append(sum(memory(process) for process in [os.getpid(), *every]))
        except OSError:  # one has just ended
            pass

over, peaks = threading.Event(), [0]
sampling = threading.Thread(target=sample)
sampling.start()
Gallery(load(None, os.environ)).write()
over.set()
sampling.join()
print(max(peaks))
"""
"""Writes a page and prints its peak memory, including its decoders, kB."""


def test_several_huge_images_take_no_more_memory_than_one(shelf: Shelf):
    content = vast(7000)
    for stem in ("a", "b", "c"):
        shelf.completed(stem, content)
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **shelf.environ()}
    peak = subprocess.run([sys.executable, "-c", PEAK], env=environ, capture_output=True, timeout=60, check=True).stdout
    assert len(shelf.thumbs) == 3
    assert 60_000 < int(peak) < 400_000


def test_a_small_image_is_not_enlarged(shelf: Shelf):
    shelf.completed("cat", plain_image(size=(40, 20)))
    shelf.gallery().write()
    with Image.open(shelf.root / "gallery_files" / shelf.thumbs[0]) as small:
        assert small.size == (40, 20)


def test_a_thumbnail_is_upright_and_contains_no_camera_data(shelf: Shelf):
    exif = Image.Exif()
    exif[0x0112] = 6  # a rotation by 90 degrees
    exif[0x010F] = "a camera"
    shelf.completed("cat", plain_image(size=(1600, 800), kind="jpeg", exif=exif))
    shelf.gallery().write()
    with Image.open(shelf.root / "gallery_files" / shelf.thumbs[0]) as small:
        assert small.size == (160, 320)
        assert not small.getexif()


def test_only_new_images_get_a_new_thumbnail(shelf: Shelf):
    shelf.completed("cat", plain_image("red"))
    shelf.completed("dog", plain_image("blue"))
    shelf.gallery().write()
    before = {name: (shelf.root / "gallery_files" / name).stat().st_mtime_ns for name in shelf.thumbs}
    shelf.completed("cow", plain_image("green"))
    counted: list[tuple[int, int]] = []
    shelf.gallery().write(lambda done, total: counted.append((done, total)))
    assert counted == [(1, 1)]
    assert len(shelf.thumbs) == 3
    assert (
        before.items()
        <= {name: (shelf.root / "gallery_files" / name).stat().st_mtime_ns for name in shelf.thumbs}.items()
    )


def test_a_replaced_image_gets_another_thumbnail(shelf: Shelf):
    shelf.completed("cat", plain_image("red"))
    shelf.gallery().write()
    [before] = shelf.thumbs
    shelf.completed("cat", plain_image("blue", size=(641, 480)))
    shelf.gallery().write()
    [after] = shelf.thumbs
    assert after != before
    with Image.open(shelf.root / "gallery_files" / after) as small:
        assert small.convert("RGB").getpixel((5, 5))[2] > 200


def test_a_thumbnail_that_a_power_cut_emptied_is_created_again(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    [name] = shelf.thumbs
    (shelf.root / "gallery_files" / name).write_bytes(b"")
    shelf.gallery().write()
    with Image.open(shelf.root / "gallery_files" / name) as small:
        assert small.size == (320, 240)


def test_thumbnails_of_removed_images_are_removed_and_other_files_stay(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    for name in ("holiday.webp", "stamp.svg"):
        shelf.put(f"gallery_files/{name}", b"mine")
    (shelf.root / "outbox/cat.png").unlink()
    shelf.gallery().write()
    left = {path.name for path in (shelf.root / "gallery_files").iterdir()}
    assert left == {"holiday.webp", "stamp.svg", shelf.data["stamp"]}


# Path of the page


def test_the_gallery_changes_nothing_in_the_folders(shelf: Shelf):
    shelf.completed("cat", plain_image(), folder="a")
    shelf.failed("dog")

    def everything() -> dict[str, tuple[int, int]]:
        found = [
            path
            for name in ("outbox", "errors", "archive")
            for path in [shelf.root / name, *(shelf.root / name).rglob("*")]
        ]
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}

    before = everything()
    shelf.gallery().write()
    assert everything() == before


@pytest.mark.parametrize("folder", ["inbox", "outbox", "errors", "archive", "state"])
def test_the_page_may_not_be_among_the_files_of_jobs(shelf: Shelf, folder: str):
    where = shelf.root.parent / "state" if folder == "state" else shelf.root / folder
    done = command(shelf.environ(), "--output", str(where / "deep/gallery.html"))
    assert done.returncode == 64
    assert f"the page may not be in the folder {folder}: " in done.stderr
    assert "choose another place with --output" in done.stderr
    assert not (where / "deep").exists()


def test_the_thumbnails_may_not_be_among_the_files_of_jobs_either(tmp_path: Path):
    environ = {"IMAGEWATCH_FOLDERS__ROOT": str(tmp_path), "IMAGEWATCH_FOLDERS__STATE": str(tmp_path / "s")}
    config = load(None, {**environ, "IMAGEWATCH_FOLDERS__ERRORS": str(tmp_path / "gallery_files")})
    with pytest.raises(UsageError, match="may not be in the folder errors"):
        Gallery(config)


def test_a_link_into_the_outbox_is_refused_too(shelf: Shelf):
    (shelf.root / "door").symlink_to(shelf.root / "outbox")
    with pytest.raises(UsageError, match="may not be in the folder outbox"):
        shelf.gallery(str(shelf.root / "door/gallery.html"))


@pytest.mark.parametrize("content", [b"", b"<!doctype html><title>Holidays</title>", b"\x89PNG"])
def test_a_file_that_is_not_a_page_of_ours_is_never_replaced(shelf: Shelf, content: bytes):
    shelf.put("gallery.html", content)
    done = command(shelf.environ())
    assert done.returncode == 64
    assert "the file already exists and is not a gallery" in done.stderr
    assert (shelf.root / "gallery.html").read_bytes() == content


def test_a_pipe_or_a_link_at_the_path_of_the_page_stays_and_is_not_waited_for(shelf: Shelf, tmp_path: Path):
    page = shelf.root / "gallery.html"
    os.mkfifo(page)
    done = command(shelf.environ())
    assert (done.returncode, "the file already exists and is not a gallery" in done.stderr) == (64, True)
    assert page.is_fifo()
    shelf.gallery(str(tmp_path / "older.html")).write()
    page.unlink()
    page.symlink_to(tmp_path / "older.html")
    assert command(shelf.environ()).returncode == 64
    assert page.is_symlink()


def test_an_older_page_of_ours_is_replaced(shelf: Shelf):
    shelf.gallery().write()
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    assert len(shelf.jobs) == 1


def test_a_page_at_another_path_links_to_the_images(shelf: Shelf, tmp_path: Path):
    shelf.completed("cat", plain_image(), folder="a b")
    (tmp_path / "pages").mkdir()
    done = command(shelf.environ(), "--output", str(tmp_path / "pages/look at this.html"))
    assert done.returncode == 0
    data = page_data(tmp_path / "pages/look at this.html")
    href = unquote(data["shown"]["jobs"][0]["images"][0]["href"])
    assert (tmp_path / "pages" / href).resolve() == shelf.root / "outbox/a b/cat.png"
    assert data["files"] == "look%20at%20this_files"
    assert list((tmp_path / "pages/look at this_files").glob("*.webp"))


def test_a_link_in_the_place_of_the_thumbnails_is_not_followed(shelf: Shelf, tmp_path: Path):
    (tmp_path / "elsewhere").mkdir()
    (shelf.root / "gallery_files").symlink_to(tmp_path / "elsewhere")
    shelf.completed("cat", plain_image())
    with pytest.raises(SpoolError, match="a link is where a folder should be"):
        shelf.gallery().write()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_the_page_can_be_read_by_those_who_may_read_the_outbox(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery(outbox__file_mode="0640", outbox__folder_mode="2750").write()
    files = shelf.root / "gallery_files"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (shelf.root / "gallery.html", *files.iterdir())}
    assert set(modes.values()) == {0o640}
    assert len(modes) == 3
    assert stat.S_IMODE(files.stat().st_mode) == 0o2750


def test_the_page_belongs_to_the_group_of_the_outbox(shelf: Shelf):
    root = os.geteuid() == 0
    others = [one for one in grp.getgrall() if one.gr_gid != os.getegid() and (root or one.gr_gid in os.getgroups())]
    if not others:
        pytest.skip("this user has only one group")
    shelf.completed("cat", plain_image())
    shelf.gallery(outbox__group=others[0].gr_name).write()
    files = [shelf.root / "gallery.html", *(shelf.root / "gallery_files").iterdir()]
    assert {path.stat().st_gid for path in files} == {others[0].gr_gid}


def test_no_incomplete_file_remains(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    names = {path.name for path in shelf.root.rglob("*") if path.is_file()}
    assert names == {"gallery.html", "cat.png", "cat.receipt.toml", shelf.data["stamp"], *shelf.thumbs}


# Updates


def test_watching_shows_a_new_job_and_ends_on_ctrl_c(station: Station, start: Callable[..., Running]):
    page = station.root / "gallery.html"
    watching = start(station, "gallery", "--watch")
    until(page.exists)
    station.prompt("a/cat", "a cat")
    station.work()
    until(lambda: [job["name"] for job in page_data(page)["shown"]["jobs"]] == ["cat"])
    stamp = page_data(page)["stamp"]
    until(lambda: [path.name for path in (station.root / "gallery_files").glob("stamp-*")] == [stamp])
    assert watching.stop(signal.SIGINT) == 0
    assert watching.output.splitlines()[0] == f"Wrote {page}: 0 completed, 0 failed."


def test_a_page_that_would_be_the_same_is_not_written_again(shelf: Shelf):
    shelf.completed("cat", plain_image())
    gallery = shelf.gallery()
    gallery.write()
    before = (shelf.root / "gallery.html").stat().st_mtime_ns
    shelf.put("outbox/unrelated.txt", b"")
    assert gallery.outdated()
    assert gallery.refresh() is None
    assert not gallery.outdated()
    assert (shelf.root / "gallery.html").stat().st_mtime_ns == before


def test_a_new_folder_and_an_input_that_is_archived_late_appear_on_the_page(shelf: Shelf):
    content = plain_image()
    shelf.completed("cat", content, inputs=[{"file": "in.png", "bytes": len(content)}], folder="a")
    gallery = shelf.gallery()
    gallery.write()
    shelf.put("archive/a/in.png", content)
    assert gallery.outdated()
    assert gallery.refresh()
    assert shelf.jobs[0]["inputs"][0]["href"] == "archive/a/in.png"
    shelf.completed("dog", content, folder="b/c")
    assert gallery.outdated()
    assert gallery.refresh()
    assert {job["name"] for job in shelf.jobs} == {"cat", "dog"}


def test_while_a_share_is_unmounted_the_last_page_stays(shelf: Shelf):
    shelf.completed("cat", plain_image())
    gallery = shelf.gallery()
    gallery.write()
    (shelf.root / "outbox").rename(shelf.root / "away")
    assert gallery.outdated()
    assert gallery.refresh() is None
    assert [job["name"] for job in shelf.jobs] == ["cat"]
    assert shelf.thumbs
    (shelf.root / "away").rename(shelf.root / "outbox")
    shelf.completed("dog", plain_image())
    assert gallery.refresh()
    assert {job["name"] for job in shelf.jobs} == {"cat", "dog"}
