"""A response whose images are decoded while it arrives: nothing of it is lost, and it is read as if it were raw."""

from __future__ import annotations

import base64
import contextlib
import errno
import functools
import io
import itertools
import json
import math
import os
import random
import shutil
import tempfile
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from endpoint.test_api import FLUX, GEMINI, OPENAI, SPELLINGS, cuts, mutations, pieces_of, scraps
from imagewatch.endpoint.decode import read
from imagewatch.endpoint.frames import Decoded, texts
from imagewatch.endpoint.pictures import Pictures
from imagewatch.endpoint.saved_answer import Answer, Sink, save_part
from imagewatch.protocol.values import Head, Tail
from imagewatch.system.disk import Disk
from imagewatch.system.errors import SpoolError

LIMIT = 50 << 20
CANONICAL = base64.b64encode(bytes(range(255)) * 2).decode()
TEXTS = [
    CANONICAL,
    CANONICAL[:-4] + "/w==",
    CANONICAL[:-4] + "//8=",
    CANONICAL[:-4] + "/x==",  # bits that are not used
    CANONICAL[:-4] + "/w",
    CANONICAL[:-4] + "/w=",
    CANONICAL + "====",
    CANONICAL[:20] + "QQ==" + CANONICAL,
    CANONICAL[:21] + "\n" + CANONICAL[21:],
    CANONICAL[:40] + "%2B" + CANONICAL[40:],
    "data:image/png;base64," + CANONICAL,
    base64.urlsafe_b64encode(bytes(range(255))).decode(),
    CANONICAL[:30] + "\u00e9" + CANONICAL[30:],
    "\n" + CANONICAL,
    "=" + CANONICAL,
    "AAA",
    "",
]
"""Base64, canonical and not, and what is none."""

strings = st.sampled_from(TEXTS) | st.binary(max_size=40).map(lambda content: base64.b64encode(content).decode())
entries = st.one_of(
    st.builds(lambda text: {"b64_json": text, "mime_type": "image/png"}, strings),
    st.builds(lambda text: {"url": "data:image/png;base64," + text}, strings),
    st.builds(lambda text: {"image": {"data": "iVBORw0KGg" + text}}, strings),
    st.builds(lambda text: {"b64_json": text, "url": "https://images.example/x.png"}, strings),
    st.just({"url": "https://images.example/x.png"}),
)
responses = st.builds(
    lambda spelling, images: spelling({"images": images, "billing": {"credits_charged": 1}}),
    st.sampled_from(list(SPELLINGS.values())),
    st.lists(entries, max_size=6),
)
fragments = scraps.map(lambda middle: b'{"images":[{' + middle + b'}],"billing":{"credits_charged":1}}')


@st.composite
def changed(draw):
    """A good response with damage somewhere."""
    raw = json.dumps(draw(st.sampled_from([GEMINI, FLUX, OPENAI]))).encode()
    for place, length, insert in draw(mutations):
        at = int(place * len(raw))
        raw = raw[:at] + insert + raw[at + length :]
    return raw


bodies = responses | fragments | changed() | st.binary(max_size=300)


class Place:
    """A folder with one response and its images."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.path = str(self.folder / "answer.1")

    def image_path(self, number):
        return str(self.folder / f"answer.image.{number}")

    def sink(self, disk=None, **more):
        return Sink(disk or Disk(), self.path, image_path=self.image_path, **more)

    def save(self, pieces, status=200, **more):
        sink = self.sink(**more)
        sink.start(Head(status=status))
        for piece in pieces:
            sink.write(piece)
        sink.finish(Tail(complete=True))
        return self.answer()

    def answer(self, path=None):
        return Answer(path or self.path, image_path=self.image_path)

    def decoded(self, pieces, *, encoding=""):
        """What is read, and the bytes of each good image.

        Of a broken one the pieces decide how much there is, and how its problem is worded.
        """
        made = {}

        def create(number):
            made[number] = self.folder / f"made.{number}"
            return made[number].open("wb")

        reading = read(pieces, encoding=encoding, limit=LIMIT, create=create)
        good = [got for got in reading.images if got.decoded is not None and not got.problem]
        for got in reading.images:
            got.problem = str(bool(got.problem))
        found = [made[got.decoded] if got.saved is None else self.image_path(got.saved) for got in good]
        return reading, [Path(path).read_bytes() for path in found]


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


def body_of(answer, size=1000):
    return b"".join(answer.chunks(size))


@given(bodies, cuts)
@settings(max_examples=400, deadline=None)
def test_every_byte_of_a_response_can_be_read_again_and_its_images_are_those_of_the_raw_response(raw, places):
    with tempfile.TemporaryDirectory() as folder:
        place = Place(folder)
        answer = place.save(pieces_of(raw, places))
        assert body_of(answer) == raw
        assert body_of(answer, 5) == raw
        assert answer.sample(64) == raw[:64]
        assert place.decoded(answer.pieces()) == place.decoded([raw])
        assert place.decoded(answer.pieces(), encoding="gzip") == place.decoded([raw], encoding="gzip")


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 7, 191, 1000])
@pytest.mark.parametrize("text", TEXTS)
def test_the_size_of_the_pieces_in_which_base64_arrives_does_not_matter(place, text, step):
    raw = json.dumps({"images": [{"b64_json": text}, {"b64_json": CANONICAL}]}).encode()
    answer = place.save(raw[k : k + step] for k in range(0, len(raw), step))
    assert body_of(answer) == raw
    assert place.decoded(answer.pieces()) == place.decoded([raw])


def test_the_bytes_of_an_image_are_in_its_file_and_not_in_that_of_the_response(place):
    images = [random.Random(k).randbytes(3000 + k) for k in range(3)]
    raw = json.dumps({"images": [{"b64_json": base64.b64encode(image).decode()} for image in images]}).encode()
    answer = place.save(pieces_of(raw, [0.1, 0.5, 0.7]))
    assert [Path(place.image_path(k)).read_bytes() for k in range(3)] == images
    assert Path(place.path).stat().st_size < 600
    assert [piece.number for piece in answer.pieces() if isinstance(piece, Decoded)] == [0, 1, 2]
    assert not list(place.folder.glob("made.*"))


@pytest.mark.parametrize("text", ["QUJD", "QUI=", "QQ==", CANONICAL])
def test_an_image_is_decoded_wherever_the_response_is_cut_in_two(place, text):
    raw = json.dumps({"images": [{"url": "https://images.example/x.png"}, {"b64_json": text}]}).encode()
    for cut in range(len(raw)):
        (image,) = [piece for piece in place.save([raw[:cut], raw[cut:]]).pieces() if isinstance(piece, Decoded)]
        assert (image.number, Path(image.path).read_bytes()) == (0, base64.b64decode(text))


def test_an_image_that_is_not_canonical_to_its_end_is_decoded_to_another_file(place):
    raw = json.dumps({"images": [{"b64_json": CANONICAL + "\nQUJD"}]}).encode()
    answer = place.save([raw])
    assert Path(place.image_path(0)).read_bytes() == base64.b64decode(CANONICAL)
    reading, images = place.decoded(answer.pieces())
    assert ([got.saved for got in reading.images], images) == ([None], [base64.b64decode(CANONICAL + "QUJD")])


@pytest.mark.parametrize("status", [199, 300, 402, 503])
def test_a_response_that_is_not_paid_is_saved_as_it_came(place, status):
    raw = json.dumps(GEMINI).encode()
    answer = place.save([raw], status)
    assert raw in Path(place.path).read_bytes()
    assert [path.name for path in place.folder.iterdir()] == ["answer.1"]
    assert body_of(answer) == raw


def test_a_response_that_an_earlier_version_saved_is_read(place):
    raw = json.dumps(OPENAI).encode()
    Path(place.path).write_bytes(b'{"status":200,"headers":{"date":"x"}}\n' + raw + b'\n{"complete":true}')
    answer = place.answer()
    assert (answer.head, answer.tail) == (Head(status=200, headers={"date": "x"}), Tail(complete=True))
    assert body_of(answer) == raw
    assert len(place.decoded(answer.pieces())[1]) == 2


class Stopped(Place):
    """What was on the disk when the process was killed."""

    def __init__(self, folder, place):
        super().__init__(folder)
        shutil.copytree(place.folder, folder, dirs_exist_ok=True)
        self.part = self.path + ".part"

    def body(self):
        return body_of(self.answer(self.part))

    def saved(self):
        save_part(Disk(), self.path, Tail(complete=False, reason="cut"), self.image_path)
        return self.answer()


@given(bodies, cuts)
@settings(max_examples=150, deadline=None)
def test_all_that_came_before_a_kill_is_read_except_the_last_group_of_an_image(raw, places):
    with tempfile.TemporaryDirectory() as folder:
        place, came = Place(f"{folder}/first"), b""
        place.folder.mkdir()
        sink = place.sink()
        sink.start(Head(status=200))
        for number, piece in enumerate(pieces_of(raw, places)):
            sink.write(piece)
            came += piece
            stopped = Stopped(f"{folder}/{number}", place)
            assert raw.startswith(stopped.body())
            assert len(stopped.body()) >= len(came) - 7
            answer = stopped.saved()
            assert body_of(answer) == body_of(stopped.answer())
            assert raw.startswith(body_of(answer))
            assert len(body_of(answer)) >= len(came) - 7
            assert answer.tail == Tail(complete=False, reason="cut")
            assert stopped.decoded(answer.pieces()) == stopped.decoded([body_of(answer)])
        sink.close()


MIXED = json.dumps(
    {"images": [{"b64_json": "QUJDQQ=="}, {"b64_json": "QUJD REVG"}, {"b64_json": "QUJDREVG"}], "x": "raw 5\n"}
).encode()


def test_a_file_that_was_cut_at_any_byte_has_the_beginning_of_the_body(place):
    place.save(pieces_of(MIXED, [0.2, 0.3, 0.31, 0.5, 0.8]))
    whole = Path(place.path).read_bytes()
    first, last = whole.index(b"\n") + 1, whole.rindex(b"\n")
    found = []
    for cut in range(first, last + 1):
        Path(place.path).write_bytes(whole[:cut])
        answer = place.answer()
        assert not answer.tail.complete
        found.append(body_of(answer))
        assert MIXED.startswith(found[-1])
        os.rename(place.path, place.path + ".part")
        save_part(Disk(), place.path, Tail(complete=False, reason="cut"), place.image_path)
        assert (body_of(place.answer()), place.answer().tail.reason) == (found[-1], "cut")
    assert (found[0], found[-1]) == (b"", MIXED)
    assert all(len(a) <= len(b) for a, b in itertools.pairwise(found))
    gained = sum(len(b) - len(a) == 1 for a, b in itertools.pairwise(found))
    assert gained >= len(MIXED) - len("QUJDQQ==" + "QUJD" + "QUJDREVG")  # of raw frames, each byte counts


def test_an_image_that_was_cut_at_any_byte_is_the_beginning_of_what_came(place):
    raw = json.dumps({"images": [{"b64_json": CANONICAL}]}).encode()
    place.save([raw[:100], raw[100:]])
    whole = Path(place.path).read_bytes()
    begun = whole.index(b"image 0\n") + len(b"image 0\n")
    content = Path(place.image_path(0)).read_bytes()
    before = raw.index(CANONICAL.encode())
    for cut in range(len(content) + 1):
        Path(place.image_path(0)).write_bytes(content[:cut])
        Path(place.path).write_bytes(whole[:begun])
        found = body_of(place.answer())
        assert raw.startswith(found)
        assert len(found) == before + cut // 3 * 4


def test_a_response_that_was_complete_without_its_name_stays_complete(place):
    raw = json.dumps(OPENAI).encode()
    answer = place.save([raw])
    os.rename(place.path, place.path + ".part")
    save_part(Disk(), place.path, Tail(complete=False), place.image_path)
    assert place.answer().tail == answer.tail == Tail(complete=True)
    assert body_of(place.answer()) == raw


# Images that are not what they were


def pictures(place, answer):
    made = Pictures(Disk(), None, LIMIT, monotonic=lambda: 0.0, wait=pytest.fail)

    def path(name):
        return str(place.folder / name)

    return made.collect(path, made.read(path, answer))


def two_images(place):
    images = [b"\x89PNG\r\n\x1a\n" + random.Random(k).randbytes(90) for k in range(2)]
    entries = [{"b64_json": base64.b64encode(image).decode()} for image in images]
    return images, place.save([json.dumps({"images": entries}).encode()])


def test_the_pictures_are_the_files_into_which_they_were_decoded(place):
    images, answer = two_images(place)
    found = pictures(place, answer)
    assert [(place.folder / picture.source).read_bytes() for picture in found] == images
    assert [picture.source for picture in found] == ["answer.image.0", "answer.image.1"]
    assert not any(picture.broken for picture in found)


@pytest.mark.parametrize(
    ("change", "problem", "size"),
    [
        (lambda path: path.unlink(), "its file was removed or replaced", 0),
        (lambda path: (path.unlink(), path.symlink_to("answer.1")), "its file was removed or replaced", 0),
        (lambda path: (path.unlink(), os.mkfifo(path)), "its file was removed or replaced", 0),
        (lambda path: os.truncate(path, 50), "its file has 50 bytes instead of 98", 50),
        (lambda path: path.write_bytes(bytes(99)), "its file has 99 bytes instead of 98", 99),
    ],
)
def test_an_image_whose_file_was_changed_has_a_problem_and_the_others_have_none(place, change, problem, size):
    images, answer = two_images(place)
    change(Path(place.image_path(0)))
    first, second = pictures(place, answer)
    assert (first.problem, first.size, first.good) == (problem, size, False)
    assert (place.folder / second.source).read_bytes() == images[1]
    assert not second.broken


def test_of_an_image_that_is_too_short_no_byte_is_invented(place):
    images, answer = two_images(place)
    os.truncate(place.image_path(0), 50)
    first, second = base64.b64encode(images[0][:48]), base64.b64encode(images[1])
    assert body_of(answer) == b'{"images": [{"b64_json": "%s"}, {"b64_json": "%s"}]}' % (first, second)


def test_an_image_in_a_file_is_read_wherever_in_a_body_it_is(place):
    path = place.folder / "image"
    path.write_bytes(b"ABCDEF")
    image = Decoded(0, 6, 6, str(path), lambda: io.FileIO(path))
    for first, rest in ((b'"QUJD', b'"'), (b'"', b'QUJD"'), (b"", b""), (b'"\\u0051UJD', b'"')):
        pieces = [b'{"images":[{"b64_json":' + first, image, rest, b"}]}"]
        assert place.decoded(pieces) == place.decoded(texts(pieces))
    pieces = [b'{"images":[{"b64_json":"', image, image, b'"}]}']
    assert place.decoded(pieces) == place.decoded(texts(pieces))


# Cost


class Noted(Disk):
    """A disk that notes what is synced."""

    def __init__(self):
        self.synced = []

    def sync(self, file, path):
        self.synced.append(os.path.basename(path))
        super().sync(file, path)

    def sync_folder(self, path):
        self.synced.append("folder")
        super().sync_folder(path)


def test_a_response_is_durable_after_its_images(place):
    disk = Noted()
    place.save([json.dumps(GEMINI).encode()], disk=disk)
    assert disk.synced == ["answer.image.0", "folder", "answer.1.part", "folder"]


def test_a_response_has_its_last_line_only_when_its_images_are_durable(place):
    class Looking(Disk):
        """A disk that notes whether the response has its last line when an image is synced."""

        def sync(self, file, path):
            if "image" in path:
                found.append(b"complete" in Path(f"{place.path}.part").read_bytes())
            super().sync(file, path)

    found = []
    answer = place.save([json.dumps(GEMINI).encode()], disk=Looking())
    assert (found, answer.tail.complete) == ([False], True)


def test_a_last_line_that_the_disk_refuses_at_first_is_written_to_the_same_file(place):
    class Full(Disk):
        """A disk that is full once, when the last line is written."""

        def unreserve(self, file):
            inodes.append(os.fstat(file.fileno()).st_ino)
            if len(inodes) == 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            super().unreserve(file)

    inodes = []
    with contextlib.closing(place.sink(Full(), wait=lambda _: None)) as sink:
        sink.until = math.inf
        sink.start(Head(status=200))
        sink.write(MIXED)
        sink.finish(Tail(complete=True))
    assert len(inodes) == 2
    assert len(set(inodes)) == 1
    answer = place.answer()
    assert (body_of(answer), answer.tail.complete) == (MIXED, True)


def test_the_part_of_a_response_that_came_before_a_kill_gets_its_name_after_its_images_are_durable(place):
    with contextlib.closing(place.sink()) as sink:
        sink.start(Head(status=200))
        sink.write(MIXED[:-20])
    disk = Noted()
    save_part(disk, place.path, Tail(complete=False), place.image_path)
    assert disk.synced == [*(f"answer.image.{k}" for k in range(2)), "folder", "answer.1.part", "folder"]


def test_a_response_that_broke_off_in_an_image_keeps_all_that_came(place):
    for size in range(20, 60):
        assert body_of(place.save([MIXED[:size]])) == MIXED[:size]


def test_a_response_of_whole_images_can_be_left_to_its_reader(place):
    disk = Noted()
    answer = place.save([json.dumps(GEMINI).encode()], disk=disk, defers_sync=True)
    assert disk.synced == ["answer.image.0", "folder"]
    answer.make_durable(disk)
    assert disk.synced[2:] == ["answer.1", "folder"]


@pytest.mark.parametrize(
    ("response", "is_complete"),
    [
        (GEMINI, False),
        (FLUX, True),
        ({"images": [{"b64_json": CANONICAL + "\n"}]}, True),
        ({"images": [{"b64_json": CANONICAL}, {"b64_json": ""}]}, True),
        ({"images": [{"b64_json": CANONICAL}] * 5}, True),
        ({"images": [{"b64_json": CANONICAL}, {"url": "data:image/png;base64," + CANONICAL}]}, True),
        ({}, True),
    ],
)
def test_any_other_response_is_durable_when_it_has_its_name(place, response, is_complete):
    disk = Noted()
    sink = place.sink(disk, defers_sync=True)
    sink.start(Head(status=200))
    sink.write(json.dumps(response).encode())
    sink.finish(Tail(complete=is_complete))
    assert disk.synced[-2:] == ["answer.1.part", "folder"]


def test_a_response_with_an_image_that_has_no_file_is_durable_when_it_has_its_name(place):
    disk = Noted()
    place.image_path = lambda number: str(place.folder / f"missing/{number}")
    place.save([json.dumps(GEMINI).encode()], disk=disk, defers_sync=True)
    assert disk.synced == ["answer.1.part", "folder"]


class Unsynced(Disk):
    """A disk on which the first sync of the file of the response fails, though a second one would not report that."""

    def __init__(self):
        self.inodes = []

    def sync(self, file, path):
        self.inodes.append(os.fstat(file.fileno()).st_ino)
        if len(self.inodes) == 1:
            raise OSError("not written")
        super().sync(file, path)


def test_a_response_whose_late_sync_failed_is_written_to_another_file(place):
    answer, disk = place.save([MIXED]), Unsynced()
    with pytest.raises(OSError, match="not written"):
        answer.make_durable(disk)
    answer.make_durable(disk)
    assert disk.inodes[0] not in disk.inodes[1:]
    assert body_of(place.answer()) == MIXED


class Named(Disk):
    """A disk on which nothing can be synced any more once the response has its name."""

    fails = False

    def replace(self, source, target):
        super().replace(source, target)
        self.fails = True

    def sync(self, file, path):
        self._try()
        super().sync(file, path)

    def sync_folder(self, path):
        self._try()
        super().sync_folder(path)

    def _try(self):
        if self.fails:
            raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_a_response_that_has_its_name_stays_whole_though_its_folder_cannot_be_synced(place):
    waits = []
    with contextlib.closing(place.sink(Named(), wait=waits.append, now=lambda: sum(waits), defers_sync=True)) as sink:
        sink.until = 3.0
        sink.start(Head(status=200))
        sink.write(MIXED)
        with pytest.raises(SpoolError):
            sink.finish(Tail(complete=False, reason="cut"))
    assert waits
    assert body_of(place.answer()) == MIXED


class Moving(Disk):
    """A disk of which a person moves the folder of the response away, right after that has its name."""

    def replace(self, source, target):
        super().replace(source, target)
        if not os.path.exists(f"{os.path.dirname(target)}.away"):
            os.rename(os.path.dirname(target), f"{os.path.dirname(target)}.away")


def test_a_response_whose_folder_is_moved_away_when_it_has_its_name_is_written_again(place):
    restore = functools.partial(os.makedirs, place.folder, exist_ok=True)
    with contextlib.closing(place.sink(Moving(), restore=restore)) as sink:
        sink.until = math.inf
        sink.start(Head(status=400))
        sink.write(b"not that")
        sink.finish(Tail(complete=True, reason=""))
    assert body_of(place.answer()) == b"not that"


def test_a_large_image_takes_no_memory(place):
    text = base64.b64encode(random.Random(0).randbytes(300_000))

    def pieces():
        yield b'{"images":[{"b64_json":"'
        yield from itertools.repeat(text, 100)
        yield b'"}]}'

    tracemalloc.start()
    answer = place.save(pieces())
    size = sum(map(len, answer.chunks()))
    place_of_image = Path(place.image_path(0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (size, place_of_image.stat().st_size) == (100 * len(text) + 28, 30_000_000)
    assert peak < 4_000_000


def test_many_raw_frames_take_no_memory(place):
    raw = json.dumps({"images": [{"b64_json": "\n" + CANONICAL * 100}]}).encode()
    tracemalloc.start()
    answer = place.save(raw[k : k + 7] for k in range(0, len(raw), 7))
    assert body_of(answer) == raw
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2_000_000
