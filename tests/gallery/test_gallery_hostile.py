"""The gallery with folders that other users write to: what it opens and links, and the cost of an image."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import tomli_w
from PIL import Image
from support.daemon import until

from gallery.test_gallery import Shelf, chunk, command, page_data, plain_image
from imagewatch.config.load import load
from imagewatch.gallery import Gallery
from imagewatch.gallery.decoder import UNPRIVILEGED_ID, Patience

if TYPE_CHECKING:
    from collections.abc import Iterator

USER, OTHER = 54321, 54322
"""Users that are in no passwd file, with a group each."""
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(tmp_path / "watched")


def job(shelf: Shelf, stem: str) -> dict[str, Any]:
    """Return the page's data of a job."""
    [found] = [one for one in shelf.jobs if one["name"] == stem]
    return found


# Cost of an image


def segment(code: int, content: bytes) -> bytes:
    return bytes([0xFF, code]) + struct.pack(">H", 2 + len(content)) + content


def scans(width: int, height: int, count: int) -> bytes:
    """A complete progressive JPEG in gray with tiny scans, each of which makes a decoder visit all pixels."""
    blocks = -(-width // 8) * -(-height // 8)
    bits = ("0" + "1" * 14) * -(-blocks // 32767)  # "these 32767 blocks are unchanged"
    bits += "1" * (-len(bits) % 8)
    nothing = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    parts = [
        segment(0xDB, bytes([0] + [1] * 64)),
        segment(0xC2, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00"),
        segment(0xC4, b"\x00\x01" + bytes(16)),
        segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0"),
        segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes(blocks // 8 + 1),
        (segment(0xDA, b"\x01\x01\x00\x01\x3f\x10") + nothing) * (count - 1),
    ]
    return b"\xff\xd8" + b"".join(parts) + b"\xff\xd9"


SLOW = scans(7000, 7000, 100)
"""The largest allowed number of scans and pixels: three seconds for a decoder."""
SLUGGISH = scans(3000, 3000, 100)
"""Half a second."""


@pytest.mark.timeout(60)
def test_thousands_of_scans_do_not_keep_the_page_from_being_written(shelf: Shelf):
    shelf.completed("bomb", scans(4000, 3000, 20_000))
    shelf.completed("good", plain_image())
    done = command(shelf.environ())
    assert (done.returncode, done.stderr) == (0, "")
    assert "more than 100 scans" in job(shelf, "bomb")["images"][0]["problem"]
    assert shelf.thumbs == [job(shelf, "good")["images"][0]["thumb"]]


def test_an_image_that_takes_too_long_is_abandoned_and_the_others_get_thumbnails(shelf: Shelf):
    for stem, content in (("a", plain_image()), ("slow", SLOW), ("z", plain_image("red"))):
        shelf.completed(stem, content)
    before = children()  # such as a server of other tests
    Gallery(load(None, shelf.environ()), patience=Patience(processor=0.2)).write()
    assert job(shelf, "slow")["images"][0]["problem"] == "takes more than 0.2 s to decode"
    assert len(shelf.thumbs) == 2
    assert set(children()) <= set(before)


def test_an_image_of_any_shape_within_the_time_limit_is_shown(shelf: Shelf):
    shelf.completed("slow", SLUGGISH)
    shelf.gallery().write()
    assert shelf.thumbs == [job(shelf, "slow")["images"][0]["thumb"]]


def test_an_abandoned_image_costs_the_next_run_nothing_until_it_changes(shelf: Shelf):
    counted: list[tuple[int, int]] = []

    def write() -> None:
        counted.clear()
        Gallery(load(None, shelf.environ()), patience=Patience(processor=0.2)).write(lambda *one: counted.append(one))

    shelf.completed("slow", SLOW)
    write()
    assert counted == [(1, 1)]
    write()
    assert counted == []
    assert job(shelf, "slow")["images"][0]["problem"] == "takes more than 0.2 s to decode"
    shelf.completed("slow", plain_image())
    write()
    assert counted == [(1, 1)]
    assert [path.suffix for path in (shelf.root / "gallery_files").iterdir() if "stamp" not in path.name] == [".webp"]


def test_another_version_tries_again_images_that_an_older_one_abandoned(shelf: Shelf):
    shelf.completed("bad", plain_image()[:-20])
    shelf.gallery().write()
    [note] = (shelf.root / "gallery_files").glob("*.txt")
    first, _, reason = note.read_text().partition("\n")
    assert (first.split()[0], reason) == ("imagewatch", "cut short: no IEND chunk")
    note.write_text("imagewatch 0, Pillow 0\nwas not understood then")
    shelf.gallery().write()
    assert job(shelf, "bad")["images"][0]["problem"] == "cut short: no IEND chunk"


def test_a_file_that_cannot_be_read_now_is_tried_again_by_the_next_run(shelf: Shelf):
    shelf.completed("slow", SLUGGISH)
    Gallery(load(None, shelf.environ()), patience=Patience(clock=0.1)).write()
    assert job(shelf, "slow")["images"][0]["problem"] == "was not decoded within 0.1 s"
    assert list((shelf.root / "gallery_files").glob("*.txt")) == []
    shelf.gallery().write()
    assert len(shelf.thumbs) == 1


def test_the_page_is_written_before_many_slow_images_are_done(shelf: Shelf):
    for stem in ("a", "b", "c"):
        shelf.completed(stem, plain_image())
    seen: list[list[str]] = []

    def check_page(done: int, total: int) -> None:
        if (shelf.root / "gallery.html").exists():
            seen.append(sorted(one["images"][0].get("problem", "") for one in shelf.jobs))

    Gallery(load(None, shelf.environ()), seconds=0).write(check_page)
    waiting = "its thumbnail is not created yet"
    assert seen == [["", waiting, waiting], ["", "", waiting]]
    assert len(shelf.thumbs) == 3


def frames(kind: str, count: int) -> bytes:
    """An animation with very many frames of one pixel."""
    if kind == "png":
        size = struct.pack(">IIIIHHBB", 1, 1, 0, 0, 1, 10, 0, 0)
        pixel = zlib.compress(bytes(4))
        later = b"".join(
            chunk(b"fcTL", struct.pack(">I", 2 * k + 1) + size) + chunk(b"fdAT", struct.pack(">I", 2 * k + 2) + pixel)
            for k in range(count)
        )
        header = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0))
        start = chunk(b"acTL", struct.pack(">II", count + 1, 0)) + chunk(b"fcTL", bytes(4) + size)
        return b"\x89PNG\r\n\x1a\n" + header + start + chunk(b"IDAT", pixel) + later + chunk(b"IEND", b"")
    still = plain_image(size=(1, 1), kind="webp", lossless=True)[12:]
    frame = bytes(6) + bytes(6) + b"\x0a\0\0\0" + still
    one = b"ANMF" + struct.pack("<I", len(frame)) + frame + bytes(len(frame) % 2)
    body = b"WEBP" + b"VP8X" + struct.pack("<I", 10) + b"\x02" + bytes(9) + b"ANIM" + struct.pack("<I", 6) + bytes(6)
    body += one * count
    return b"RIFF" + struct.pack("<I", len(body)) + body


def with_chunk(name: bytes, content: bytes) -> bytes:
    """An image with one more chunk of text or colors before its pixels."""
    whole = plain_image()
    return whole[:33] + chunk(name, content) + whole[33:]


BOMB = zlib.compress(bytes(100_000_000), 9)
EXIF = segment(0xE1, b"Exif\0\0" + bytes(65_000))
BOMBS = {
    "PNG of 100,000 frames": (frames("png", 100_000), ""),
    "WebP of 100,000 frames": (frames("webp", 100_000), ""),
    "PNG with a text of 100 MB": (with_chunk(b"zTXt", b"comment\0\0" + BOMB), "Decompressed"),
    "PNG with a text of 100 MB in Unicode": (with_chunk(b"iTXt", b"comment\0\1\0\0\0" + BOMB), "Decompressed"),
    "PNG with colors of 100 MB": (with_chunk(b"iCCP", b"colours\0\0" + BOMB), "Decompressed"),
    "PNG with pixels of 100 MB": (with_chunk(b"IDAT", BOMB), ""),
    "JPEG with camera data 300 times": (
        plain_image(kind="jpeg")[:2] + EXIF * 300 + plain_image(kind="jpeg")[2:],
        "",
    ),
    "JPEG cut short": (plain_image(kind="jpeg")[:-2], "cut short"),
    "WebP cut short": (plain_image(kind="webp")[:-2], "cut short"),
    "GIF": (plain_image(kind="gif"), "not a PNG, JPEG or WebP"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(60)
def test_a_decompression_bomb_costs_only_its_own_thumbnail(shelf: Shelf, name: str):
    content, why = BOMBS[name]
    shelf.completed("bomb", content)
    shelf.completed("good", plain_image())
    done = command(shelf.environ())
    assert (done.returncode, done.stderr) == (0, "")
    assert why in job(shelf, "bomb")["images"][0].get("problem", "")
    assert job(shelf, "good")["images"][0]["thumb"] in shelf.thumbs
    assert bool(why) == (len(shelf.thumbs) == 1)


def test_a_file_of_more_bytes_than_pixels_can_need_is_not_read(shelf: Shelf):
    shelf.completed("hole", plain_image())
    size = 200_000_001
    os.truncate(shelf.root / "outbox/hole.png", size)
    result_file = tomli_w.dumps({"source": "h", "charged": "yes", "images": [{"file": "hole.png", "bytes": size}]})
    shelf.put("outbox/hole.receipt.toml", result_file.encode())
    shelf.gallery().write()
    assert shelf.jobs[0]["images"][0]["problem"] == "too large for a thumbnail: 200 MB"


# The process that decodes


def children(parent: int | None = None) -> list[int]:
    """The child processes of a process."""
    tasks = Path(f"/proc/{parent or os.getpid()}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


STOPPING = """
import sys
from imagewatch.commands.main import main
from imagewatch.gallery import decoder

decoder._PROGRAM = '''
import os, signal, sys
_, user, *sys.path = sys.argv
from imagewatch.gallery import shrink
answer = shrink._answer
def stop_first(*image):
    os.kill(os.getpid(), signal.SIGSTOP)
    return answer(*image)
shrink._answer = stop_first
shrink.main(int(user))
'''
sys.argv[1:] = ["gallery"]
main()
"""
"""The command with a decoder that stops when it has an image, until it is continued."""


@pytest.fixture
def decoding(shelf: Shelf) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A command that processes a slow image, and its decoder, which is stopped with the image."""
    shelf.completed("slow", SLOW)
    environ = {
        "PATH": os.environ["PATH"],
        "HOME": "/nonexistent",
        "LETTA_API_KEY": "sk-let-0123456789",
        **shelf.environ(),
    }
    at_work = subprocess.Popen([sys.executable, "-c", STOPPING], env=environ, stdout=subprocess.PIPE)
    until(lambda: any(is_stopped(child) for child in children(at_work.pid)))
    (decoder,) = children(at_work.pid)
    yield at_work, decoder
    if at_work.poll() is None and decoder in children(at_work.pid):
        os.kill(decoder, signal.SIGKILL)
    at_work.kill()
    at_work.communicate()


def is_stopped(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def limits(process: int) -> dict[str, str]:
    lines = Path(f"/proc/{process}/limits").read_text().splitlines()[1:]
    return {line[:26].strip(): line[26:47].strip() for line in lines}


def is_confined(process: int) -> bool:
    """Return whether a decoder has dropped its rights, its user last."""
    with contextlib.suppress(OSError):
        has_user = os.geteuid() != 0 or os.stat(f"/proc/{process}").st_uid == UNPRIVILEGED_ID
        return has_user and limits(process)["Max file size"] == "0"
    return False


def test_a_decoder_has_little_memory_no_files_and_not_the_key(decoding):
    _, decoder = decoding
    assert limits(decoder)["Max address space"] == str(640 << 20)
    assert limits(decoder)["Max core file size"] == "0"
    assert b"LETTA_API_KEY" not in Path(f"/proc/{decoder}/environ").read_bytes()
    assert len(list(Path(f"/proc/{decoder}/fd").iterdir())) <= 4  # its parent, nothing twice, the image
    if os.geteuid() == 0:
        assert set(os.stat(f"/proc/{decoder}")[4:6]) == {UNPRIVILEGED_ID}


def test_a_killed_decoder_costs_one_thumbnail_until_the_next_run(shelf: Shelf, decoding):
    at_work, decoder = decoding
    os.kill(decoder, signal.SIGKILL)
    assert at_work.wait(40) == 0
    assert job(shelf, "slow")["images"][0]["problem"] == "cannot be decoded: the decoder ended with signal 9"
    assert list((shelf.root / "gallery_files").glob("*.txt")) == []  # the next run tries again


def test_a_decoder_does_not_outlive_the_command(decoding):
    at_work, decoder = decoding
    at_work.kill()
    at_work.wait()
    with contextlib.suppress(ProcessLookupError):
        os.kill(decoder, signal.SIGCONT)
    until(lambda: not is_confined(decoder), 60)


def test_a_module_in_the_current_folder_is_not_imported(shelf: Shelf, tmp_path: Path):
    shelf.completed("cat", plain_image())
    trap = tmp_path / "trap"
    (trap / "PIL").mkdir(parents=True)
    for name in ("PIL/__init__.py", "struct.py", "imagewatch.py", "sitecustomize.py"):
        (trap / name).write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')\n")
    program = shutil.which("imagewatch", path=os.path.dirname(sys.executable))
    assert program
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **shelf.environ()}
    subprocess.run([program, "gallery"], env=environ, cwd=trap, check=True, capture_output=True, timeout=40)
    assert len(shelf.thumbs) == 1
    assert not (tmp_path / "sprung").exists()


# Links of a receipt


def forged(shelf: Shelf, name: str, content: bytes, folder: str = "outbox") -> None:
    """Put a file into a folder, and a result file that lists it as an image of a job."""
    shelf.put(f"{folder}/{name}", content)
    entry = {"file": name, "bytes": len(content)}
    result_file = {"source": "forged.prompt.txt", "charged": "yes", "images": [entry], "inputs": [entry]}
    ending = "receipt" if folder == "outbox" else "error"
    shelf.put(f"{folder}/forged.{ending}.toml", tomli_w.dumps(result_file).encode())


NO_IMAGES = [
    "x.html",
    "x.HTM",
    "x.xhtml",
    "x.svg",
    "x.svgz",
    "x.js",
    "x.mjs",
    "x.pdf",
    "x.png.html",
    "x.gif",
    "png",
    "x.",
]


@pytest.mark.parametrize("folder", ["outbox", "errors"])
@pytest.mark.parametrize("name", NO_IMAGES)
def test_a_forged_result_file_links_only_to_names_of_images(shelf: Shelf, name: str, folder: str):
    forged(shelf, name, plain_image(), folder)
    shelf.gallery().write()
    shown = shelf.jobs[0]["inputs" if folder == "errors" else "images"][0]
    assert shown["problem"] == "does not have the name of a PNG, JPEG or WebP file"
    assert not {"href", "thumb"} & shown.keys()
    assert shelf.thumbs == []


@pytest.mark.parametrize("name", ["x.png", "x.PNG", "x.jpg", "x.jpeg", "x.webp", "x.html.png"])
def test_files_with_the_name_of_an_image_are_linked(shelf: Shelf, name: str):
    forged(shelf, name, plain_image())
    shelf.gallery().write()
    assert shelf.jobs[0]["images"][0]["href"] == f"outbox/{name}"


def test_an_invalid_result_file_is_not_linked(shelf: Shelf):
    shelf.put("outbox/forged.receipt.toml", b"<!doctype html><script>pwned()</script>")
    shelf.completed("good", plain_image())
    shelf.gallery().write()
    assert [job(shelf, stem).get("unreadable", False) for stem in ("forged", "good")] == [True, False]


# Opened files


def private(path: Path, content: bytes) -> Path:
    """Create a file that only its owner may read."""
    path.write_bytes(content)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o620, 0o640])
def test_a_hard_link_to_a_private_image_is_neither_linked_nor_shown_as_a_thumbnail(
    shelf: Shelf, tmp_path: Path, mode: int
):
    forged(shelf, "cat.png", plain_image())
    secret = private(tmp_path / "secret.png", plain_image())
    secret.chmod(mode)
    group = shelf.root.stat().st_gid + 1
    if mode == 0o640 and os.geteuid() != 0:
        pytest.skip("only root can give a file to another group")
    if os.geteuid() == 0:
        os.chown(secret, -1, group)
    (shelf.root / "outbox/cat.png").unlink()
    (shelf.root / "outbox/cat.png").hardlink_to(secret)
    shelf.gallery().write()
    shown = shelf.jobs[0]["images"][0]
    assert shown["problem"] == "is a hard link to a private file"
    assert not {"href", "thumb"} & shown.keys()
    assert shelf.thumbs == []


def test_a_hard_link_to_a_private_text_is_neither_a_prompt_nor_a_result_file(shelf: Shelf, tmp_path: Path):
    diary = private(tmp_path / "diary.toml", b'source = "dear diary"\ncharged = "no"\nmessage = "dear diary"\n')
    shelf.failed("dog")
    (shelf.root / "errors/dog.prompt.txt").hardlink_to(diary)
    (shelf.root / "errors/elk.error.toml").hardlink_to(diary)
    (shelf.root / "outbox/elk.receipt.toml").hardlink_to(diary)
    shelf.gallery().write()
    assert "dear" not in (shelf.root / "gallery.html").read_text()


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_a_hard_link_of_a_backup_changes_nothing(shelf: Shelf, tmp_path: Path, mode: int):
    shelf.completed("cat", plain_image())
    for path in list((shelf.root / "outbox").iterdir()):
        path.chmod(mode)
        (tmp_path / path.name).hardlink_to(path)
    shelf.gallery().write()
    assert len(shelf.thumbs) == 1
    assert shelf.jobs[0]["prompt"] == "a cat"


def exchange(one: Path, other: Path) -> None:
    assert ctypes.CDLL(None).renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


@pytest.mark.timeout(100)
def test_a_folder_that_is_repeatedly_replaced_by_a_link_reveals_nothing(shelf: Shelf, tmp_path: Path):
    """A race: the files of the private folder have the names and sizes of those in the outbox."""
    private_folder = tmp_path / "private"
    other = Shelf(tmp_path / "other")
    for where, colour, prompt in ((shelf, "teal", "an open cat"), (other, "tomato", "a quiet one")):
        for stem in "abcdefgh":
            where.completed(stem, plain_image(colour).ljust(4096, b"\0"), folder="sub", prompt=prompt)
    (other.root / "outbox/sub").rename(private_folder)
    link = shelf.root / "outbox/.link"
    link.symlink_to(private_folder)
    over = threading.Event()

    def storm() -> None:
        while not over.is_set():
            exchange(link, shelf.root / "outbox/sub")
            over.wait(0.0003)

    raging = threading.Thread(target=storm)
    raging.start()
    try:
        for _ in range(60):
            shutil.rmtree(shelf.root / "gallery_files", ignore_errors=True)
            shelf.gallery().write()
            assert "quiet" not in (shelf.root / "gallery.html").read_text()
            for name in shelf.thumbs:
                with Image.open(shelf.root / "gallery_files" / name) as small:
                    red, _, blue = small.convert("RGB").getpixel((9, 9))
                    assert red < blue, "a private image was published"
    finally:
        over.set()
        raging.join()


def test_endlessly_nested_folders_are_reported_and_cost_little(shelf: Shelf):
    shelf.completed("cat", plain_image())
    folder = os.open(shelf.root / "outbox", os.O_RDONLY)
    for _ in range(150):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(folder)
    written = shelf.gallery().write()
    assert written.completed == 1
    [note] = written.notes
    assert note.endswith(f"{'/d' * 100}: is 100 folders deep; the folders in it are not shown")


def test_with_a_flood_of_result_files_the_newest_are_on_the_page(shelf: Shelf):
    shelf.completed("new", plain_image())
    flood = tomli_w.dumps({"source": "x", "charged": "yes", "problems": ["<" * 4000] * 60}).encode()
    for k in range(30):
        shelf.put(f"outbox/flood-{k}.receipt.toml", flood)
        os.utime(shelf.root / f"outbox/flood-{k}.receipt.toml", (1, 1))
    written = shelf.gallery().write()
    assert "new" in {one["name"] for one in shelf.jobs}
    [note] = written.notes
    assert note.endswith("older receipts and error files are not shown: there are too many")
    assert int(note.split()[0]) == 31 - len(shelf.jobs) > 10


# Root


@pytest.fixture
def owned(open_path: Path) -> Shelf:
    """Folders of another user."""
    shelf = Shelf(open_path / "watched")
    shelf.completed("cat", plain_image(), folder="sub")
    for path in (shelf.root, *shelf.root.rglob("*")):
        os.chown(path, USER, USER)
    shelf.root.chmod(0o2750)
    return shelf


AS_USER = """
import os, sys
from imagewatch.commands.main import load_command, main

load_command("gallery")  # the interpreter itself may lie where only root may read

user = int(sys.argv.pop(1))
os.setgroups([])
os.setresgid(user, user, 0)
os.setresuid(user, user, 0)
main()
"""


def owners(shelf: Shelf) -> set[int]:
    return {path.lstat().st_uid for path in (shelf.root / "gallery.html", *files(shelf))}


def files(shelf: Shelf) -> list[Path]:
    folder = shelf.root / "gallery_files"
    return [folder, *folder.iterdir()]


@as_root
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o000])
def test_files_that_root_writes_belong_to_the_owner_of_the_folder_and_its_readers_can_read_them(
    owned: Shelf, umask: int
):
    before = os.umask(umask)
    try:
        done = command(owned.environ())
    finally:
        os.umask(before)
    assert (done.returncode, done.stderr) == (0, "")
    assert owners(owned) == {USER}
    assert len(owned.thumbs) == 1
    modes = {stat.S_IMODE(path.stat().st_mode) & 0o777 for path in files(owned)[1:]}
    assert modes == {0o640}
    assert stat.S_IMODE(files(owned)[0].stat().st_mode) & 0o777 == 0o750


@as_root
def test_the_service_can_use_files_that_root_wrote(owned: Shelf):
    assert command(owned.environ()).returncode == 0
    owned.completed("dog", plain_image())
    environ = {"PATH": os.environ["PATH"], "HOME": "/nonexistent", **owned.environ()}
    service = [sys.executable, "-c", AS_USER, str(USER), "gallery"]
    done = subprocess.run(service, env=environ, capture_output=True, text=True, timeout=40, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert {one["name"] for one in owned.jobs} == {"cat", "dog"}
    assert owners(owned) == {USER}


@as_root
def test_in_a_folder_of_root_the_page_belongs_to_the_owner_of_the_outbox(owned: Shelf):
    os.chown(owned.root, 0, USER)
    owned.root.chmod(0o2770)
    assert command(owned.environ()).returncode == 0
    assert owners(owned) == {USER}


@as_root
def test_before_the_first_job_files_that_root_writes_belong_to_the_owner_of_the_folder(owned: Shelf):
    shutil.rmtree(owned.root / "outbox")
    assert command(owned.environ()).returncode == 0
    assert owners(owned) == {USER}


@as_root
def test_where_the_owner_of_the_outbox_may_not_write_the_page_is_roots(owned: Shelf, tmp_path: Path):
    done = command(owned.environ(), "--output", str(tmp_path / "page.html"))
    assert done.returncode == 0
    assert (tmp_path / "page.html").stat().st_uid == 0
    assert len(page_data(tmp_path / "page.html")["shown"]["jobs"]) == 1


@as_root
def test_root_writes_nothing_in_the_folder_of_a_user_who_may_not_read_the_outbox(owned: Shelf, open_path: Path):
    os.chown(open_path, OTHER, OTHER)
    (owned.root / "outbox").chmod(0o750)
    done = command(owned.environ(), "--output", str(open_path / "page.html"))
    assert done.returncode == 64
    assert f"the folder's owner (user number {OTHER}) may not read the outbox: {open_path}" in done.stderr
    assert "choose another place with --output" in done.stderr
    assert [path.name for path in open_path.iterdir()] == ["watched"]
    (owned.root / "outbox").chmod(0o755)
    owned.root.chmod(0o755)
    assert command(owned.environ(), "--output", str(open_path / "page.html")).returncode == 0
    assert (open_path / "page.html").stat().st_uid == OTHER


@as_root
def test_root_does_not_read_for_the_page_what_its_owner_may_not_read(owned: Shelf):
    owned.completed("secret", plain_image(), folder="sub")
    for name in ("secret.png", "secret.receipt.toml"):
        (owned.root / "outbox/sub" / name).chmod(0o600)
    assert command(owned.environ()).returncode == 0
    assert job(owned, "secret")["message"] == "secret.receipt.toml cannot be read: Permission denied"
    assert len(owned.thumbs) == 1


@as_root
def test_thumbnails_of_another_user_are_reported_with_the_next_step(owned: Shelf):
    shutil.rmtree(owned.root / "gallery_files", ignore_errors=True)
    (owned.root / "gallery_files").mkdir(mode=0o755)
    done = command(owned.environ())
    assert done.returncode == 74
    assert f"permission denied: {owned.root}/gallery_files" in done.stderr
    assert f"rm -r {owned.root}/gallery_files" in done.stderr


# Repeated runs


def test_another_run_does_not_write_a_page_that_would_be_the_same(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    before = (shelf.root / "gallery.html").stat()
    shelf.gallery().write()
    assert (shelf.root / "gallery.html").stat().st_mtime_ns == before.st_mtime_ns
    shelf.completed("dog", plain_image())
    shelf.gallery().write()
    assert {one["name"] for one in shelf.jobs} == {"cat", "dog"}


def test_incomplete_files_of_killed_runs_are_removed_an_hour_later(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    names = {f".{kind}77.tmp" for kind in ("", f"{'0' * 24}.webp.", f"{'0' * 24}.txt.")}
    for name in names:
        shelf.put(f"gallery_files/{name}", b"half")
    shelf.completed("dog", plain_image())
    shelf.gallery().write()
    assert names <= {path.name for path in (shelf.root / "gallery_files").iterdir()}
    for name in names:
        os.utime(shelf.root / "gallery_files" / name, (1, 1))
    shelf.completed("elk", plain_image())
    shelf.gallery().write()
    assert not names & {path.name for path in (shelf.root / "gallery_files").iterdir()}


def test_a_page_that_was_removed_or_damaged_is_written_again(shelf: Shelf):
    shelf.completed("cat", plain_image())
    shelf.gallery().write()
    page = shelf.root / "gallery.html"
    whole = page.read_bytes()
    for damaged in (whole[:-100], whole.replace(b"a cat", b"a dog"), b"<!doctype html><!-- imagewatch gallery -->"):
        page.write_bytes(damaged)
        shelf.gallery().write()
        assert json.loads(json.dumps(shelf.jobs))[0]["prompt"] == "a cat"
    for path in (page, next((shelf.root / "gallery_files").glob("stamp-*"))):
        path.unlink()
        shelf.gallery().write()
        assert (shelf.root / "gallery_files" / shelf.data["stamp"]).exists()
