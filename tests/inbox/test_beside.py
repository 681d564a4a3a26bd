"""Files beside a prompt that may be meant as its images: it is not paid for without them, and they stay."""

from __future__ import annotations

import io
import json
import os
import time
from typing import Any

import pytest
from PIL import Image
from support.daemon import Folders, command, until

from imagewatch.protocol.names import MOST_SIMILAR


def status(folders: Folders) -> dict[str, Any]:
    return json.loads((folders.state / "status.json").read_text())


def encoded(kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (16, 16), (58, 110, 150)).save(file, kind)
    return file.getvalue()


JPEG = encoded()
MP4 = b"\0\0\0\x18ftypmp42\0\0\0\0mp42isom"
UTF16 = "Notes\n".encode("utf-16")

NOT_USED = {
    "a motion photo of a phone": ("cat", "cat.MP.jpg", JPEG),
    "an ending that was added again": ("cat", "cat.jpg.jpg", JPEG),
    "beside the name of the prompt": ("side", "side.prompt.jpg", JPEG),
    "an upper-case letter": ("cased", "Cased.PNG", JPEG),
    "a copy": ("dup", "dup (copy).png", JPEG),
    "a copy by a German Windows": ("cat", "cat \u2013 Kopie.jpg", JPEG),
    "a copy in Portuguese": ("cat", "cat - C\u00f3pia.jpg", JPEG),
    "a copy in Russian": ("cat", "cat \u2014 \u043a\u043e\u043f\u0438\u044f.jpg", JPEG),
    "a copy in Japanese": ("cat", "cat - \u30b3\u30d4\u30fc.jpg", JPEG),
    "a copy in Chinese": ("cat", "cat - \u526f\u672c (2).jpg", JPEG),
    "a number after another sign": ("under", "under_1.png", JPEG),
    "the file that the prompt is named after": ("photo.jpg", "photo.jpg", JPEG),
    "a copy of the file that the prompt is named after": ("photo.jpg", "photo (1).jpg", JPEG),
    "an unknown ending": ("cat", "cat.unknown", JPEG),
    "no ending": ("cat", "cat", JPEG),
    "a video": ("cat", "cat.mp4", MP4),
    "a document": ("cat", "cat.docx", b"PK\x03\x04" + bytes(range(256))),
    "an image that is written as text": ("cat", "cat.b64", b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUg"),
    "an image in name only": ("cat", "cat-2.png", b"not an image"),
}


@pytest.mark.parametrize(("stem", "name", "content"), NOT_USED.values(), ids=NOT_USED.keys())
def test_a_prompt_beside_a_file_that_may_be_meant_is_refused_unpaid_and_the_file_stays(
    station, sandbox, stem, name, content
):
    station.drop(name, content)
    station.prompt(stem, "Make it night")
    (outcome,) = station.work()
    assert (outcome.destination, outcome.charged, sandbox.report()["requests"]) == ("errors", "no", 0)
    error = station.error(stem)
    assert f"{name}: may be meant as an image" in error["message"]
    assert "list the images in input_images, or write input_images = []" in error["message"]
    assert [one["dropped_as"] for one in error["originals"]] == [f"{stem}.prompt.txt"]
    assert station.names("inbox") == [name]
    assert (station.inbox / name).read_bytes() == content


def test_both_ways_out_that_the_error_file_names_lead_out(station, sandbox):
    for stem, images in (("with", '["with.MP.jpg"]'), ("without", "[]")):
        station.drop(f"{stem}.MP.jpg", JPEG)
        station.prompt(stem, "Make it night")
        station.work()
        assert station.error(stem)["charged"] == "no"
        station.prompt(stem, f"+++\ninput_images = {images}\n+++\nMake it night")
        (outcome,) = station.work()
        assert outcome.destination == "outbox", outcome.message
    assert [len(call["inputs"]) for call in sandbox.report()["calls"]] == [1, 0]
    assert station.names("inbox") == ["without.MP.jpg"]


def test_after_the_file_was_removed_the_same_prompt_is_sent(station, sandbox):
    station.drop("cat-2.png", JPEG)
    station.prompt("cat", "A cat")
    station.work()
    (station.inbox / "cat-2.png").unlink()
    (station.errors / "cat.prompt.txt").rename(station.inbox / "cat.prompt.txt")
    (outcome,) = station.work()
    assert (outcome.destination, sandbox.report()["requests"]) == ("outbox", 1)


USED = ["cat.mpo", "cat.pjpeg", "cat.jpg_large", "cat.jfif", "cat.jpe", "cat.heic", "cat.GIF", "cat.3.Tiff"]


@pytest.mark.parametrize("name", USED)
def test_a_jpeg_with_any_ending_of_an_image_is_the_image_of_its_prompt(station, sandbox, name):
    station.drop(name, JPEG)
    station.prompt("cat", "Make it night")
    (outcome,) = station.work()
    assert outcome.destination == "outbox", outcome.message
    assert [one["mime"] for one in station.receipt("cat")["inputs"]] == ["image/jpeg"]
    assert len(sandbox.report()["calls"][0]["inputs"]) == 1


@pytest.mark.parametrize(("name", "content"), [("cat.gif", b"GIF89a...."), ("cat.pdf", b"%PDF-1.7\n%\xe2\xe3")])
def test_an_image_of_a_kind_that_cannot_be_sent_goes_to_errors_with_its_prompt(station, sandbox, name, content):
    station.drop(name, content)
    station.prompt("cat", "Make it night")
    (outcome,) = station.work()
    assert (outcome.charged, sandbox.report()["requests"]) == ("no", 0)
    assert name in station.error("cat")["message"]
    assert "png, jpg and webp are supported" in station.error("cat")["message"]
    assert station.names("errors") == sorted([name, "cat.error.toml", "cat.prompt.txt"])


MEANS_NOTHING = {
    "cat.txt": b"A cat, too",
    "cat.log": "gesehen: Kätzchen".encode("latin-1"),
    "cat.json": b'{"title": "cat"}',
    "cat.xmp": b"<x:xmpmeta xmlns:x='adobe:ns:meta/'/>",
    "cat.html": b"<!doctype html><p>cat",
    "cat.receipt.toml": b"schema = 1\n",
    "cat.notes.txt": UTF16,
    "cat.prompt.md": b"# A cat",
    "cat.jpg~": JPEG,
    "cat.jpg.bak": JPEG,
    "cat.jpg_original": JPEG,
    ".cat-2.jpg": JPEG,
    "catalog.jpg": JPEG,
    "cat-2026.jpg": JPEG,
    "other.jpg": JPEG,
}


@pytest.mark.parametrize(("name", "content"), MEANS_NOTHING.items(), ids=MEANS_NOTHING.keys())
def test_a_prompt_beside_a_plain_text_or_a_backup_is_sent(station, sandbox, name, content):
    station.drop(name, content)
    station.prompt("cat", "A cat")
    (outcome,) = station.work()
    assert (outcome.destination, sandbox.report()["requests"]) == ("outbox", 1), outcome.message
    assert name in station.names("inbox")


def test_a_file_of_another_prompt_is_not_meant_for_this_one(station, sandbox):
    """By its name, or since the other one names it; in whatever order they are checked."""
    for name in ("cat.1.jpg", "dog-2.jpg", "cow-2.jpg"):
        station.drop(name, JPEG)
    declares = '+++\ninput_images = ["{}"]\n+++\nMake it night'
    texts = {"zebra": declares.format("dog-2.jpg"), "cat": "A cat", "cat.1": "Make it night"}
    texts |= {"dog": "A dog", "cow": "A cow", "ant": declares.format("cow-2.jpg")}
    for stem in ("cat", "dog", "zebra", "cat.1", "ant", "cow"):
        station.prompt(stem, texts[stem])
    outcomes = {outcome.source: outcome.destination for outcome in station.work()}
    assert outcomes == {f"{stem}.prompt.txt": "outbox" for stem in texts}
    assert sorted(len(call["inputs"]) for call in sandbox.report()["calls"]) == [0, 0, 0, 1, 1, 1]


def test_links_count_wherever_they_lead(station, sandbox, tmp_path):
    (tmp_path / "plain.txt").write_text("text")
    (station.inbox / "cat.link").symlink_to(tmp_path / "plain.txt")
    (station.inbox / "dog (1).jpg").symlink_to("nowhere")
    (station.inbox / "cow.jpg").symlink_to(tmp_path / "plain.txt")
    for stem in ("cat", "dog", "cow"):
        station.prompt(stem, "Make it night")
    assert {outcome.charged for outcome in station.work()} == {"no"}
    assert sandbox.report()["requests"] == 0
    for stem, name in (("cat", "cat.link"), ("dog", "dog (1).jpg"), ("cow", "cow.jpg")):
        assert name in station.error(stem)["message"]
    assert set(station.names("inbox")) == {"cat.link", "dog (1).jpg"}


def test_a_folder_or_a_pipe_without_the_name_of_an_image_is_none(station, sandbox):
    (station.inbox / "cat.parts").mkdir()
    os.mkfifo(station.inbox / "cat.pipe")
    station.prompt("cat", "A cat")
    (outcome,) = station.work()
    assert (outcome.destination, sandbox.report()["requests"]) == ("outbox", 1)


def test_beside_very_many_such_files_a_prompt_is_refused_and_none_is_opened(station, sandbox):
    for number in range(MOST_SIMILAR + 5):
        station.drop(f"cat.{number}.log", "text")
    station.prompt("cat", "A cat")
    station.drop("dog.log", "text")
    station.prompt("dog", "A dog")
    outcomes = {outcome.source: outcome for outcome in station.work()}
    assert outcomes["dog.prompt.txt"].destination == "outbox"
    assert sandbox.report()["requests"] == 1
    *named, last = station.error("cat")["problems"]
    assert len([problem for problem in named if "may be meant as an image" in problem]) == 10
    assert f"{MOST_SIMILAR - 10} more such files" in last


# The daemon, and what people read


def test_a_file_that_comes_while_its_prompt_waits_for_its_turn_is_seen_in_time(tmp_path, sandbox, run):
    folders = Folders(tmp_path, sandbox.base_url, inbox__rescan_seconds="3600")
    daemon = run(folders)
    daemon.wait_for("started")
    assert command(folders, "hold", "later").returncode == 0
    folders.prompt("cat", "A cat")
    until(lambda: status(folders)["waiting"]["ready"] == 1)
    folders.drop("cat.MP.jpg", JPEG)
    until(lambda: "cat.MP.jpg" in status(folders)["ignored"]["files"])
    assert command(folders, "release").returncode == 0
    until(lambda: folders.finished() == {"cat": "errors"})
    assert sandbox.report()["requests"] == 0


def test_check_and_estimate_name_the_file_and_both_ways_out(station):
    station.drop("cat.MP.jpg", JPEG)
    station.drop("cat.log", "text")
    station.prompt("cat", "A cat")
    for name in ("check", "estimate"):
        lines = command(station, name).stdout.splitlines()
        (line,) = [line for line in lines if "cat.prompt.txt" in line and "therefore refused" not in line]
        assert "cat.MP.jpg: may be meant as an image, and is not used" in line
        assert name == "estimate" or "input_images = []" in line
    lines = command(station, "check").stdout.splitlines()
    assert [line.split()[0] for line in lines if "A cat" in line or "cat" in line.split()[1]] == [
        "refuse",
        "ignore",
        "ignore",
    ]
    assert any("which does not name it and is therefore refused" in line for line in lines)


def test_a_claim_remembers_the_files_and_is_refused_after_a_crash_too(station, sandbox):
    station.drop("cat.MP.jpg", JPEG)
    station.prompt("cat", "A cat")
    (candidate,) = station.scan.scan_all(time.monotonic(), time.time()).ready
    claim = candidate.claim(station.spool.new_job(), time.time())
    station.spool.record(claim.job).begin(claim)
    assert station.spool.originals.claim(claim)
    (station.inbox / "cat.MP.jpg").unlink()
    (outcome,) = station.recover()
    assert (outcome.charged, sandbox.report()["requests"]) == ("no", 0)
    assert "cat.MP.jpg" in station.error("cat")["message"]


def test_a_prompt_that_is_deleted_into_the_bin_of_its_share_is_not_paid_for_and_status_shows_why(folders, sandbox, run):
    daemon = run(folders)
    daemon.wait_for("started")
    assert command(folders, "hold", "later").returncode == 0
    path = folders.prompt("team/cat", "A cat")
    until(lambda: status(folders)["waiting"]["ready"] == 1)
    (folders.inbox / "@Recycle").mkdir()
    path.rename(folders.inbox / "@Recycle/cat.prompt.txt")
    folders.prompt("@home/dog", "A dog")
    folders.prompt("team/cow", "A cow")
    assert command(folders, "release").returncode == 0
    until(lambda: folders.finished() == {"cow": "outbox"})
    until(lambda: len(status(folders)["ignored"]["files"]) == 2)
    assert sandbox.report()["requests"] == 1
    named = status(folders)["ignored"]["files"]
    assert "recycle bin" in named["@Recycle"]
    assert "begins with @, #, ~ or $" in named["@home"]
    assert "never entered" in command(folders, "status").stdout
    assert daemon.stop() == 0
    assert [line["file"] for line in daemon.events("ignored")] == ["@home"]
