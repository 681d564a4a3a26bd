# ruff: noqa: RUF001  the multiplication sign is what people are shown
from __future__ import annotations

import codecs
import io
import random
import struct
import tracemalloc
import zlib

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow
from PIL import PngImagePlugin

from imagewatch.protocol import image_reader
from imagewatch.protocol.image_kinds import (
    FOREIGN_SUFFIXES,
    IMAGE_ENDINGS,
    IMAGE_SUFFIXES,
    TEXT_SAMPLE,
    could_be_image,
    foreign,
    has_image_ending,
    sniff,
)
from imagewatch.protocol.image_reader import MAX_PIXELS, PIECE
from imagewatch.protocol.images import Image, inspect
from imagewatch.protocol.jpeg import MAX_SCANS

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"


def sample(mode, size=(23, 17)):
    """A gradient: compresses to little, yet has no two equal rows."""
    width, height = size
    grey = Pillow.frombytes("L", size, bytes((7 * x + 13 * y) % 256 for y in range(height) for x in range(width)))
    if mode == "RGBA":
        colour = grey.convert("RGB")
        colour.putalpha(grey)
        return colour
    return grey.convert(mode)


def encoded(kind, mode="RGB", **options):
    file = io.BytesIO()
    sample(mode).save(file, kind, **options)
    return file.getvalue()


def with_exif(kind):
    exif = Pillow.Exif()
    exif[0x010E] = "a description, long enough to be cut in the middle"
    exif[0x0112] = 6
    return encoded(kind, exif=exif.tobytes())


def with_text():
    text = PngImagePlugin.PngInfo()
    text.add_text("parameters", "a cat")
    text.add_itxt("Title", "Katze", zip=True)
    return encoded("PNG", pnginfo=text)


def animated(kind):
    file = io.BytesIO()
    frames = [sample("RGB").rotate(90 * turn) for turn in range(3)]
    frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=50)
    return file.getvalue()


def chunk(name, data=b""):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def ihdr(width, height, rest=b"\x08\x02\x00\x00\x00"):
    return chunk(b"IHDR", struct.pack(">II", width, height) + rest)


def png(*chunks):
    return PNG_MAGIC + b"".join(chunks)


def interlaced():
    # Pillow reads Adam7 but does not write it: seven passes of one 8x8 grey image, all filter 0.
    rows = b"".join(
        (b"\0" + bytes(width)) * height for width, height in [(1, 1), (1, 1), (2, 1), (2, 2), (4, 2), (4, 4), (8, 4)]
    )
    return png(ihdr(8, 8, b"\x08\x00\x00\x00\x01"), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND"))


def segment(code, data=b""):
    return bytes([0xFF, code]) + struct.pack(">H", 2 + len(data)) + data


def frame(width, height, code=0xC0):
    return segment(code, struct.pack(">BHHB", 8, height, width, 1) + b"\x01\x11\x00")


SCAN = segment(0xDA, b"\x01\x01\x00\x00\x3f\x00")


def jpeg(*parts, end=b"\xff\xd9"):
    return b"\xff\xd8" + b"".join(parts) + end


def riff(*chunks, size=None):
    body = b"WEBP" + b"".join(chunks)
    return b"RIFF" + struct.pack("<I", len(body) if size is None else size) + body


def piece(name, data=b""):
    return name + struct.pack("<I", len(data)) + data + bytes(len(data) % 2)


def three(number):
    return number.to_bytes(3, "little")


def canvas(width, height):
    return piece(b"VP8X", bytes(4) + three(width - 1) + three(height - 1))


def lossy(width, height):
    return piece(b"VP8 ", b"\x10\x00\x00\x9d\x01\x2a" + struct.pack("<HH", width, height) + bytes(5))


def lossless(width, height):
    return piece(b"VP8L", b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14) + bytes(5))


def anmf(x, y, width, height):
    where = three(x // 2) + three(y // 2) + three(width - 1) + three(height - 1)
    return piece(b"ANMF", where + bytes(4) + lossy(width, height))


REAL = {
    "png rgb": ("png", encoded("PNG")),
    "png rgba": ("png", encoded("PNG", "RGBA")),
    "png palette": ("png", encoded("PNG", "P", transparency=3)),
    "png grey": ("png", encoded("PNG", "L", dpi=(300, 300))),
    "png grey and alpha": ("png", encoded("PNG", "LA")),
    "png 1 bit": ("png", encoded("PNG", "1")),
    "png 16 bit": ("png", encoded("PNG", "I;16")),
    "png with text": ("png", with_text()),
    "png with exif": ("png", with_exif("PNG")),
    "png animated": ("png", animated("PNG")),
    "jpeg baseline": ("jpeg", encoded("JPEG")),
    "jpeg progressive": ("jpeg", encoded("JPEG", progressive=True)),
    "jpeg grey": ("jpeg", encoded("JPEG", "L")),
    "jpeg cmyk": ("jpeg", encoded("JPEG", "CMYK")),
    "jpeg with exif": ("jpeg", with_exif("JPEG")),
    "jpeg with restart markers": ("jpeg", encoded("JPEG", restart_marker_blocks=1)),
    "jpeg with all": (
        "jpeg",
        encoded("JPEG", progressive=True, restart_marker_rows=1, comment=b"hi", quality=100),
    ),
    "jpeg progressive cmyk": ("jpeg", encoded("JPEG", "CMYK", progressive=True)),
    "webp lossy": ("webp", encoded("WEBP")),
    "webp lossless": ("webp", encoded("WEBP", lossless=True)),
    "webp lossy alpha": ("webp", encoded("WEBP", "RGBA")),
    "webp lossless alpha": ("webp", encoded("WEBP", "RGBA", lossless=True)),
    "webp with exif": ("webp", with_exif("WEBP")),
    "webp animated": ("webp", animated("WEBP")),
}
real = pytest.mark.parametrize(("kind", "data"), REAL.values(), ids=REAL)


def inspected(data):
    return inspect(io.BytesIO(data))


def problem(data):
    found = inspected(data)
    assert found is not None
    return found.problem


class Counting(io.BytesIO):
    """Counts what is read of it."""

    total = 0

    def read(self, size=-1):
        data = super().read(size)
        self.total += len(data)
        return data


@real
def test_a_real_image_is_whole_and_its_dimensions_are_right(kind, data):
    assert inspected(data) == Image(kind, 23, 17, "")


def test_an_interlaced_png_is_whole():
    Pillow.open(io.BytesIO(interlaced())).load()
    assert inspected(interlaced()) == Image("png", 8, 8, "")


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (300, 2), (16383, 1), (255, 257)])
@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("JPEG", {}), ("WEBP", {}), ("WEBP", {"lossless": True})])
def test_width_and_height_are_not_confused_and_not_off_by_one(size, kind, options):
    file = io.BytesIO()
    sample("RGB", size).save(file, kind, **options)
    found = inspect(file)
    assert (found.width, found.height, found.problem) == (*size, "")


@real
def test_no_proper_prefix_is_whole(kind, data):
    for length in range(len(data)):
        found = inspected(data[:length])
        assert found is None or (found.kind == kind and found.problem), length


@real
def test_bytes_after_the_end_are_tolerated(kind, data):
    for more in (b"\0", b"\r\n", b"\xff", data, b"MotionPhoto" * 9000):
        assert inspected(data + more) == Image(kind, 23, 17, "")


@real
def test_the_position_of_the_file_makes_no_difference(kind, data):
    file = io.BytesIO(data)
    for position in (0, 5, len(data), len(data) + 99):
        file.seek(position)
        assert inspect(file) == Image(kind, 23, 17, "")


@real
def test_a_file_that_hands_out_few_bytes_at_a_time_is_checked_the_same(kind, data):
    class Short(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    assert inspect(Short(data)) == Image(kind, 23, 17, "")


@pytest.mark.parametrize("extra", range(12))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_nothing_changes_where_one_buffer_ends_and_the_next_begins(monkeypatch, kind, extra):
    monkeypatch.setattr(image_reader, "PIECE", 16 + extra)
    data = encoded(kind, restart_marker_blocks=1) if kind == "JPEG" else encoded(kind)
    assert problem(data) == ""
    assert problem(data[:-1])


@pytest.mark.parametrize(
    ("kind", "mime", "extension"),
    [("png", "image/png", "png"), ("jpeg", "image/jpeg", "jpg"), ("webp", "image/webp", "webp")],
)
def test_each_kind_has_its_media_type_and_its_suffix(kind, mime, extension):
    found = inspected(encoded(kind))
    assert (found.mime, found.extension) == (mime, extension)
    assert found.extension in IMAGE_SUFFIXES


def test_any_flipped_bit_in_a_png_is_noticed():
    data = REAL["png palette"][1]
    for at in range(len(data)):
        for bit in range(8):
            found = inspected(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            assert found is None or found.problem, (at, bit)


def test_a_flipped_byte_is_named_with_its_chunk():
    data = bytearray(encoded("PNG"))
    data[data.index(b"IDAT") + 20] ^= 1
    assert inspected(bytes(data)) == Image("png", 23, 17, "chunk IDAT has a wrong checksum")


def test_dimensions_are_not_believed_when_the_checksum_of_the_header_is_wrong():
    data = bytearray(encoded("PNG"))
    data[19] ^= 1
    assert inspected(bytes(data)) == Image("png", 0, 0, "chunk IHDR has a wrong checksum")


HEAD, PIXELS, END = ihdr(2, 2), chunk(b"IDAT", b"pixels"), chunk(b"IEND")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (png(HEAD, PIXELS), "cut short: no IEND chunk"),
        (png(HEAD, END), "no IDAT chunk"),
        (png(PIXELS, HEAD, END), "begins with chunk IDAT, not IHDR"),
        (png(HEAD, HEAD, PIXELS, END), "a second IHDR chunk"),
        (png(chunk(b"IHDR", bytes(12)), PIXELS, END), "chunk IHDR is 12 bytes long, not 13"),
        (png(HEAD, PIXELS, chunk(b"IEND", b"x")), "chunk IEND is 1 bytes long, not 0"),
        (png(HEAD, b"\x80\0\0\0IDAT"), "chunk IDAT has an impossible length"),
        (png(HEAD, b"\x7f\xff\xff\xffIDAT"), "cut short: no IEND chunk"),
        (png(HEAD, chunk(b"\x1b[2J")), "a chunk has an invalid name"),
        (png(ihdr(0, 5), PIXELS, END), "0×5 pixels"),
        (png(ihdr(65535, 65535), PIXELS, END), "65535×65535 pixels is more than 100,000,000"),
        (png(ihdr(2**31 - 1, 2**31 - 1), PIXELS, END), "is more than"),
        (png(ihdr(2**32 - 1, 1), PIXELS, END), "an impossible PNG header: 4294967295×1 pixels"),
        (png(ihdr(2, 2, b"\3\2\0\0\0"), PIXELS, END), "an impossible PNG header: color type 2 with bit depth 3"),
        (png(ihdr(2, 2, b"\x10\3\0\0\0"), PIXELS, END), "color type 3 with bit depth 16"),
        (png(ihdr(2, 2, b"\x08\5\0\0\0"), PIXELS, END), "color type 5 with bit depth 8"),
        (png(ihdr(2, 2, b"\x08\2\1\0\0"), PIXELS, END), "compression 1, filter 0, interlacing 0"),
        (png(ihdr(2, 2, b"\x08\2\0\1\0"), PIXELS, END), "compression 0, filter 1, interlacing 0"),
        (png(ihdr(2, 2, b"\x08\2\0\0\2"), PIXELS, END), "compression 0, filter 0, interlacing 2"),
        (png(ihdr(2, 2, b"\x08\3\0\0\0"), PIXELS, END), "no palette"),
        (png(chunk(b"CgBI", bytes(4)), HEAD, PIXELS, END), "made for iOS only"),
    ],
)
def test_what_is_wrong_with_a_png_is_said(data, words):
    assert words in problem(data)


JPEGS = {name: data for name, (kind, data) in REAL.items() if kind == "jpeg"}


def head_of(data):
    """The segments before the first scan, its own header left out, and the rest."""
    segments, at = [], 2
    while data[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        segments.append(data[at:end])
        at = end
    return segments, data[at:]


# No FF: in the middle of a head it would begin a marker, for every decoder.
strays = st.binary(max_size=12).map(lambda data: data.replace(b"\xff", b"\xfe")) | st.sampled_from(
    [b"\xff\x00", b"\xff"]
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(JPEGS.values())), st.lists(strays, min_size=12, max_size=12), st.data())
def test_stray_bytes_in_the_head_of_a_jpeg_are_passed_over_as_decoders_do_and_a_cut_is_found(data, between, draw):
    segments, rest = head_of(data)
    assert len(segments) < len(between)
    with_strays = b"\xff\xd8" + b"".join(part + stray for part, stray in zip(segments, between, strict=False)) + rest
    assert inspected(with_strays) == Image("jpeg", 23, 17, "")
    cut = draw.draw(st.integers(3, len(with_strays) - 1))
    assert problem(with_strays[:cut])


def test_a_camera_jpeg_with_a_second_image_behind_it_is_whole():
    file = io.BytesIO()
    sample("RGB").save(file, "MPO", save_all=True, append_images=[sample("RGB").rotate(180)])
    assert file.getvalue().count(b"\xff\xd8\xff") == 2
    assert inspected(file.getvalue()) == Image("jpeg", 23, 17, "")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_how_a_image_is_to_be_turned_is_reported(kind):
    assert inspected(with_exif(kind)).orientation == 6
    assert inspected(encoded(kind)).orientation == 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(("written", "expected"), [(1, 1), (3, 3), (8, 8), (0, 1), (9, 1), (700, 1)])
def test_an_orientation_that_cannot_be_is_none(order, written, expected):
    mark = b"II*\0\x08\0\0\0" if order == "<" else b"MM\0*\0\0\0\x08"
    entries = struct.pack(order + "HHHIHH", 1, 0x0112, 3, 1, written, 0)
    for end in range(len(mark + entries) + 1):
        data = jpeg(segment(0xE1, b"Exif\0\0" + (mark + entries)[:end]), FRAME, SCAN, b"abc")
        found = inspected(data)
        assert found.problem == ""
        assert found.orientation in {1, expected}
    assert found.orientation == expected


C2PA = bytes.fromhex("63327061 00110010 800000AA 00389B71")


def superbox(kind=C2PA, label=b"c2pa", *, is_large=False):
    """A JUMBF box with its description and nothing else, as content credentials have it."""
    described = b"jumd" + kind + b"\3" + label + b"\0"
    content = struct.pack(">I", 4 + len(described)) + described
    if is_large:  # its length has eight bytes
        return struct.pack(">I4sQ", 1, b"jumb", 16 + len(content)) + content
    return struct.pack(">I4s", 8 + len(content), b"jumb") + content


def app11(box, number=1, mark=b"JP"):
    return segment(0xEB, mark + struct.pack(">HI", 7, number) + box)


WITH_CREDENTIALS = {
    "png": png(HEAD, chunk(b"caBX", superbox()), PIXELS, END),
    "png, after the pixels": png(HEAD, PIXELS, chunk(b"caBX", superbox()), END),
    "jpeg": jpeg(app11(superbox()), frame(2, 3), SCAN, b"abc"),
    "jpeg, large box": jpeg(app11(superbox(is_large=True)), frame(2, 3), SCAN, b"abc"),
    "jpeg, two segments": jpeg(app11(superbox()), app11(superbox()[:8] + b"more", 2), frame(2, 3), SCAN, b"abc"),
    "jpeg, after another box": jpeg(app11(superbox(b"jpeg 360 images!")), app11(superbox()), frame(2, 3), SCAN, b"abc"),
    "jpeg, before the end": jpeg(frame(2, 3), SCAN, b"abc", app11(superbox())),
    "webp": riff(canvas(5, 7), lossy(5, 7), piece(b"C2PA", superbox())),
}
WITHOUT_CREDENTIALS = {
    "png, empty": png(HEAD, chunk(b"caBX"), PIXELS, END),
    "png, in a text": png(HEAD, chunk(b"tEXt", b"caBX\0" + superbox()), PIXELS, END),
    "png, behind the image": png(HEAD, PIXELS, END, chunk(b"caBX", superbox())),
    "jpeg, another box": jpeg(app11(superbox(b"jpeg 360 images!")), frame(2, 3), SCAN, b"abc"),
    "jpeg, not a box": jpeg(app11(superbox(), mark=b"XX"), frame(2, 3), SCAN, b"abc"),
    "jpeg, only its later part": jpeg(app11(superbox(), 2), frame(2, 3), SCAN, b"abc"),
    "jpeg, another segment": jpeg(segment(0xE2, b"JP\0\1\0\0\0\1" + superbox()), frame(2, 3), SCAN, b"abc"),
    "jpeg, empty": jpeg(segment(0xEB), frame(2, 3), SCAN, b"abc"),
    "webp, empty": riff(canvas(5, 7), lossy(5, 7), piece(b"C2PA")),
    "webp, another name": riff(canvas(5, 7), lossy(5, 7), piece(b"c2pa", superbox())),
    **{name: data for name, (_, data) in REAL.items()},
}


@pytest.mark.parametrize("data", WITH_CREDENTIALS.values(), ids=WITH_CREDENTIALS)
def test_content_credentials_in_an_image_are_found(data):
    assert inspected(data).problem == ""
    assert inspected(data).has_credentials


@pytest.mark.parametrize("data", WITHOUT_CREDENTIALS.values(), ids=WITHOUT_CREDENTIALS)
def test_what_is_no_content_credentials_is_not_taken_for_them(data):
    assert inspected(data).problem == ""
    assert not inspected(data).has_credentials


def test_to_find_content_credentials_no_byte_is_read_twice():
    for data in WITH_CREDENTIALS.values():
        file = Counting(data)
        inspect(file)
        assert file.total <= len(data)
        for end in range(len(data)):
            assert problem(data[:end]) if inspected(data[:end]) else True


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_odd_content_credentials_never_harm_the_image(content):
    for data in (content, b"JP\0\1\0\0\0\1" + content, superbox()[:20] + content):
        assert problem(jpeg(segment(0xEB, data), FRAME, SCAN, b"abc")) == ""
        assert problem(png(HEAD, chunk(b"caBX", data), PIXELS, END)) == ""
        assert problem(riff(canvas(5, 7), lossy(5, 7), piece(b"C2PA", data))) == ""


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_odd_exif_data_never_harms_the_image(exif):
    assert problem(jpeg(segment(0xE1, b"Exif\0\0" + exif), FRAME, SCAN, b"abc")) == ""
    assert problem(png(HEAD, chunk(b"eXIf", exif), PIXELS, END)) == ""
    assert problem(riff(canvas(5, 7), lossy(5, 7), piece(b"EXIF", exif))) == ""


@pytest.mark.parametrize("options", [{}, {"lossless": True}, {"quality": 100}], ids=["lossy", "lossless", "best"])
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
def test_a_webp_whose_tail_is_zeros_is_not_whole(mode, options):
    noise = Pillow.frombytes("RGB", (64, 48), random.Random(4).randbytes(64 * 48 * 3)).convert(mode)
    file = io.BytesIO()
    noise.save(file, "WEBP", **options)
    data = file.getvalue()
    allowed = 16 + 64 * 48 // (8 if "lossless" in options else 256)
    passed = [cut for cut in range(12, len(data)) if not problem(data[:cut] + bytes(len(data) - cut))]
    # What is so near the end that an encoder may have written it. The rest is found, wherever it was cut.
    assert all(len(data) - cut <= allowed + 2 for cut in passed)
    assert len(passed) < 0.07 * len(data)


@pytest.mark.parametrize("quality", [0, 80, 100])
@pytest.mark.parametrize(("lossless", "method"), [(False, 1), (False, 4), (False, 6), (True, 0), (True, 4), (True, 6)])
@pytest.mark.parametrize("size", [(1, 1), (300, 200), pytest.param((640, 480), marks=pytest.mark.slow)])
def test_a_plain_webp_is_whole_however_many_zeros_its_encoder_wrote(size, lossless, quality, method):
    width, height = size
    plain = Pillow.new("RGB", size, (255, 255, 255))
    half = plain.copy()
    noise = Pillow.frombytes("RGB", size, random.Random(6).randbytes(3 * width * height))
    half.paste(noise.crop((0, 0, width, -(-height // 2))), (0, 0))
    clear = Pillow.new("RGBA", size, (0, 0, 0, 0))
    clear.paste((1, 2, 3, 255), (0, 0, -(-width // 3), -(-height // 3)))
    for one in (plain, half, clear):
        file = io.BytesIO()
        one.save(file, "WEBP", lossless=lossless, quality=quality, method=method)
        assert inspect(file) == Image("webp", width, height, "")


FRAME = frame(2, 3)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(FRAME, SCAN, b"abc"),
        jpeg(b"\xff\xff\xff", FRAME[1:], b"\xff\xff", SCAN[1:], b"abc", b"\xff\xff\xff"),
        jpeg(FRAME, SCAN, b"a\xff\x00b\xff\xd0\xff\xd7\xff\xff\x00c\xff\x01"),
        jpeg(b"\xff\x01", segment(0xE1, b"\xff\xd9\xff\xd8"), FRAME, SCAN, b"abc"),
        jpeg(FRAME, SCAN, b"abc", segment(0xFE, b"\xff\xd9"), SCAN, b"abc"),
        jpeg(segment(0xC4), segment(0xC8), segment(0xCC), FRAME, SCAN, b"abc"),
        jpeg(segment(0xE0), b"abc", FRAME, SCAN, b"abc"),
        jpeg(segment(0xE0), b"\xff\x00", FRAME, b"\0\xff\xff\x00\0", SCAN, b"abc"),
        jpeg(b"\xff" * 300_000, FRAME, bytes(300_000), SCAN, b"abc"),
        jpeg(frame(2, 3, 0xC9), SCAN, b"abc"),
        jpeg(FRAME, SCAN, b"abc", segment(0xDC, b"\x00\x03")),
        jpeg(FRAME, segment(0xDA, b"\x01\x01\x00\x00\x3f\xff"), b"\xd9\xd9"),
    ],
    ids=[
        "plain",
        "fill bytes",
        "stuffed and standalone bytes in a scan",
        "markers within a segment",
        "tables between scans",
        "tables with numbers like frame headers",
        "stray bytes in the head",
        "stray bytes that look like pixels",
        "a flood of stray bytes",
        "arithmetic",
        "number of lines after the scan",
        "a scan header that ends in FF",
    ],
)
def test_a_jpeg_may_have_all_that_the_format_allows(data):
    assert inspected(data) == Image("jpeg", 2, 3, "")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (jpeg(FRAME, SCAN, b"abc", end=b""), "cut short: no EOI marker"),
        (jpeg(FRAME, SCAN, b"abc", end=b"\xff"), "cut short: no EOI marker"),
        (jpeg(FRAME, SCAN, b"abc", end=b"\xff\x00\xd9"), "cut short: no EOI marker"),
        (jpeg(segment(0xE1, bytes(50))[:-10], end=b""), "cut short: no EOI marker"),
        (jpeg(FRAME), "no scan before EOI"),
        (jpeg(), "no scan before EOI"),
        (jpeg(SCAN, b"abc"), "a scan before any frame header"),
        (jpeg(FRAME, FRAME, SCAN, b"abc"), "a second frame header"),
        (jpeg(FRAME, SCAN, b"abc", frame(9, 9)), "a second frame header"),
        (jpeg(FRAME, SCAN, b"abc", jpeg(FRAME, SCAN, b"abc")), "a second image begins"),
        (jpeg(FRAME, SCAN, b"abc", segment(0xFE), b"abc", SCAN, b"abc"), "no marker at byte 32"),
        (jpeg(FRAME, SCAN, b"abc", segment(0xFE), b"\xff\x00", SCAN, b"abc"), "no marker at byte 32"),
        (jpeg(segment(0xE0), b"abc", FRAME, end=b""), "cut short: no EOI marker"),
        (jpeg(segment(0xE0), b"abc" * 200_000, end=b""), "cut short: no EOI marker"),
        (jpeg(segment(0x3A), FRAME, SCAN, b"abc"), "marker 3A, which no decoder knows"),
        (jpeg(segment(0xC4, b"\x20" + bytes(16)), FRAME, SCAN), "a Huffman table"),
        (jpeg(segment(0xC4, b"\x00" + bytes(15)), FRAME, SCAN), "a Huffman table"),
        (jpeg(segment(0xC4, b"\x00\x02" + bytes(16)), FRAME, SCAN), "a Huffman table"),
        (jpeg(segment(0xC4, b"\x00\x02" + bytes(17)), FRAME, SCAN), "a Huffman table"),
        (jpeg(segment(0xC4, b"\x00\x01" + bytes(15) + b"\x10"), FRAME, SCAN), "a Huffman table"),
        (jpeg(segment(0xDB, b"\x01" + bytes(64)), FRAME, SCAN), "no quantization table for a color channel"),
        (jpeg(FRAME, segment(0xDA, b"\x01\x02\x00\x00\x3f\x00")), "a scan of a color channel that is not there"),
        (jpeg(segment(0xDB, bytes(64)), FRAME, SCAN), "a quantization table"),
        (jpeg(segment(0xDB, b"\x04" + bytes(64)), FRAME, SCAN), "a quantization table"),
        (jpeg(frame(2, 3, 0xC3), SCAN, b"abc"), "a lossless JPEG"),
        (jpeg(frame(2, 3, 0xCE), SCAN, b"abc"), "a hierarchical JPEG"),
        (jpeg(frame(2, 3, 0xF7), SCAN, b"abc"), "a JPEG-LS image"),
        (jpeg(frame(2, 3).replace(b"\x08\x00\x03", b"\x0c\x00\x03"), SCAN, b"abc"), "a 12-bit JPEG"),
        (jpeg(frame(2, 3).replace(b"\x11\x00", b"\x01\x00"), SCAN, b"abc"), "an impossible color channel"),
        (jpeg(segment(0xC0, b"\x08\0\x03\0\x02\x02" + b"\x01\x11\x00" * 2), SCAN), "2 color channels"),
        (jpeg(b"\xff\xe0\x00\x01", FRAME, SCAN, b"abc"), "segment E0 has an impossible length"),
        (jpeg(segment(0xC0, bytes(9)), SCAN), "a frame header with an impossible length"),
        (
            jpeg(FRAME, segment(0xDA, b"\x02\x01\x00\x00\x3f\x00"), b"abc"),
            "a scan header with an impossible length",
        ),
        (jpeg(frame(0, 3), SCAN, b"abc"), "0×3 pixels"),
        (jpeg(frame(65535, 65535), SCAN, b"abc"), "65535×65535 pixels is more than 100,000,000"),
    ],
)
def test_what_is_wrong_with_a_jpeg_is_said(data, words):
    assert words in problem(data)


@pytest.mark.parametrize(
    "data",
    [
        riff(lossy(5, 7)),
        riff(lossy(5 | 0x4000, 7 | 0xC000)),
        riff(lossless(5, 7)),
        riff(canvas(5, 7), piece(b"ICCP", b"odd"), lossy(5, 7), piece(b"EXIF", b"x")),
        riff(canvas(5, 7), piece(b"ANIM", bytes(6)), anmf(0, 0, 5, 7), anmf(2, 4, 3, 3)),
        riff(lossy(5, 7)[:-1]),
        riff(lossy(5, 7)) + b"more",
    ],
    ids=["lossy", "scaled", "lossless", "extended", "animated", "without the last pad byte", "longer file"],
)
def test_a_webp_may_have_all_that_the_format_allows(data):
    assert inspected(data) == Image("webp", 5, 7, "")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (riff(lossy(5, 7))[:-1], "cut short: 35 of 36 bytes"),
        (riff(lossy(5, 7), size=2**32 - 1), "cut short: 36 of 4,294,967,303 bytes"),
        (riff(size=0), "no VP8, VP8L or ANMF chunk"),
        (riff(canvas(5, 7), piece(b"EXIF")), "no VP8, VP8L or ANMF chunk"),
        (riff(piece(b"EXIF"), lossy(5, 7)), "does not begin with"),
        (riff(lossy(5, 7), b"tail"), "extra bytes after the last chunk"),
        (riff(lossy(5, 7), b"EXIF\xff\xff\xff\xff"), "a chunk is longer than the length in the header"),
        (riff(piece(b"VP8 ", bytes(10))), "the VP8 header cannot be read"),
        (riff(piece(b"VP8 ")), "the VP8 header cannot be read"),
        (riff(piece(b"VP8L", bytes(10))), "the VP8L header cannot be read"),
        (riff(piece(b"VP8X", bytes(9))), "the VP8X header cannot be read"),
        (riff(canvas(5, 7), piece(b"ANMF", bytes(15))), "the ANMF header cannot be read"),
        (riff(canvas(5, 7), lossy(16383, 16383)), "canvas and image differ in size"),
        (riff(canvas(5, 7), anmf(2, 0, 4, 7)), "a frame reaches out of the canvas"),
        (riff(lossy(0, 7)), "0×7 pixels"),
        (riff(lossy(16383, 16383)), "16383×16383 pixels is more than 100,000,000"),
        (riff(lossless(16384, 16384)), "16384×16384 pixels is more than 100,000,000"),
        (riff(canvas(65535, 65535), lossy(5, 7)), "65535×65535 pixels is more than 100,000,000"),
    ],
)
def test_what_is_wrong_with_a_webp_is_said(data, words):
    assert words in problem(data)


def test_the_bound_on_pixels_is_a_bound_on_the_product():
    assert problem(png(ihdr(MAX_PIXELS, 1), PIXELS, END)) == ""
    assert problem(png(ihdr(10_000, 10_000), PIXELS, END)) == ""
    assert problem(png(ihdr(10_000, 10_001), PIXELS, END)) == "10000×10001 pixels is more than 100,000,000"


def test_too_many_pixels_are_refused_with_the_dimensions_kept_for_the_message():
    found = inspected(png(ihdr(65535, 65535), PIXELS, END))
    assert (found.width, found.height) == (65535, 65535)


@pytest.mark.parametrize("data", [b"", b"\x89PNG", b"\xff\xd8", b"RIFF\x04\0\0\0WAVE", b"GIF89a", b"<html>"])
def test_what_is_none_of_the_three_kinds_is_none(data):
    assert inspected(data) is None
    assert sniff(data) is None


@settings(deadline=None)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_never_raise(data):
    inspected(data)
    sniff(data)
    foreign(data)


@given(
    st.sampled_from([PNG_MAGIC, b"\xff\xd8\xff", b"RIFF\x40\0\0\0WEBP", b"\0\0\0\x40ftyp"]),
    st.binary(max_size=300),
)
@example(b"\0\0\0\x40ftyp", b"")
def test_arbitrary_bytes_behind_a_right_beginning_never_raise(magic, data):
    found = inspected(magic + data)
    assert found is None or found.problem or found.width * found.height in range(1, MAX_PIXELS + 1)
    foreign(magic + data)


edits = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(list(REAL.values())), edits, st.integers(0, 3000))
def test_damaged_images_never_raise_and_are_read_at_most_once(original, changes, length):
    data = original[1]
    for at, removed, added in changes:
        start = at % len(data) if data else 0
        data = data[:start] + added + data[start + removed :]
    for version in (data, data[:length]):
        file = Counting(version)
        found = inspect(file)
        assert found is None or found.problem or found.width * found.height in range(1, MAX_PIXELS + 1)
        assert file.total <= len(version)


@settings(max_examples=400, deadline=None)
@given(st.sampled_from([*REAL.values(), ("", b"GIF89a, or anything else")]), edits, st.sampled_from([17, 64, 1 << 18]))
def test_who_wants_all_bytes_gets_them_once_in_order_and_the_same_result(original, changes, buffer):
    data = original[1]
    for at, removed, added in changes:
        start = at % len(data) if data else 0
        data = data[:start] + added + data[start + removed :]
    pieces = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(image_reader, "PIECE", buffer)
        assert inspect(io.BytesIO(data), pieces.append) == inspect(io.BytesIO(data))
    assert b"".join(pieces) == data


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(list(REAL.values())), min_size=2, max_size=4))
def test_of_images_run_together_the_first_one_counts(parts):
    assert inspected(b"".join(data for _, data in parts)) == Image(parts[0][0], 23, 17, "")


@pytest.mark.parametrize("name", [name for name, (kind, _) in REAL.items() if kind != "webp"])
def test_a_image_cut_short_and_begun_again_is_not_whole(name):
    # What a transfer leaves that was resumed from zero behind what was there. Where a stretch is skipped
    # by its length alone (the head of a JPEG, all of a WebP) such a seam cannot be seen.
    kind, data = REAL[name]
    pixels = data.index(b"\xff\xda") + 14 if kind == "jpeg" else 8
    for cut in range(pixels, len(data)):
        assert problem(data[:cut] + data), cut


FLOODS = {
    "png chunks": png(HEAD, chunk(b"IDAT") * 300_000, END),
    "jpeg segments": jpeg(segment(0xE0) * 300_000, FRAME, SCAN),
    "jpeg scans of nothing": jpeg(b"\xff\x01" * 300_000, FRAME, SCAN),
    "webp chunks": riff(canvas(5, 7), piece(b"EXIF") * 300_000, lossy(5, 7)),
}


@pytest.mark.parametrize("data", FLOODS.values(), ids=FLOODS)
def test_a_flood_of_tiny_parts_is_ended(data):
    file = Counting(data)
    assert inspect(file).problem == "made of more than 250,000 parts"
    assert file.total <= len(data)


def test_a_jpeg_of_more_scans_than_encoders_write_is_a_problem():
    assert problem(jpeg(FRAME, (SCAN + b"x") * MAX_SCANS)) == ""
    for count in (MAX_SCANS + 1, 300_000):
        flood = Counting(jpeg(FRAME, (SCAN + b"x") * count))
        found = inspect(flood)
        assert (found.width, found.height) == (2, 3)
        assert found.problem == "more than 100 scans, encoders write up to 18"
        assert flood.total <= len(flood.getvalue())


def test_the_bound_on_scans_is_far_above_what_an_encoder_writes():
    most = max(data.count(b"\xff\xda") for kind, data in REAL.values() if kind == "jpeg")
    assert most == 18
    assert 5 * most <= MAX_SCANS


@pytest.mark.parametrize("scan", [b"\xff\x00", b"\xff\xd0", b"\xff\xff", b"ab"])
def test_what_may_be_in_a_scan_may_be_there_millions_of_times(scan):
    assert problem(jpeg(FRAME, SCAN, scan * 2_000_000)) == ""


@pytest.mark.parametrize(
    "data",
    [
        png(HEAD, chunk(b"IDAT", bytes(6_000_001)), chunk(b"IDAT", bytes(9_000)) * 300, END),
        png(HEAD, b"\x7f\xff\xff\xffIDAT" + bytes(8_000_000)),
        jpeg(segment(0xE1, bytes(65_533)) * 30, FRAME, (SCAN + b"\xff\x00a" * 1_000_000) * 2),
        jpeg(b"\xff" * 200_000, FRAME, SCAN, b"\xff" * 8_000_000),
        riff(canvas(5, 7), piece(b"ICCP", bytes(4_000_000)), lossy(5, 7)),
    ],
    ids=["png", "png with a huge length", "jpeg", "jpeg of fill bytes", "webp"],
)
def test_memory_does_not_grow_with_the_file(tmp_path, data):
    path = tmp_path / "large"
    path.write_bytes(data)
    with path.open("rb") as file:
        tracemalloc.start()
        try:
            assert inspect(file) is not None
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert peak < 3.2 * PIECE < len(data) / 2


def test_an_error_of_the_disk_is_passed_on():
    class Failing(io.BytesIO):
        def read(self, _size=-1):
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output error"):
        inspect(Failing(b"x"))


@pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "ICO", "PDF", "JPEG2000", "DDS", "AVIF"])
def test_images_of_other_kinds_are_not_supported_and_the_usual_ones_are_named(kind):
    file = io.BytesIO()
    try:
        sample("RGB", (32, 32)).save(file, kind)
    except (KeyError, OSError):
        pytest.skip(f"this build of Pillow does not write {kind}")
    assert foreign(file.getvalue()[:64]) == (kind if kind in {"GIF", "PDF"} else None)
    assert could_be_image(file.getvalue()[:TEXT_SAMPLE])
    assert inspect(file) is None


@pytest.mark.parametrize(
    ("head", "name"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "HEIC"),
        (b"\xef\xbb\xbf\r\n <!DOCTYPE html><p>", "HTML page"),
        (b"<?xml version='1.0'?><html xmlns='x'>", "HTML page"),
        (b"<?xml version='1.0'?>\n<!-- made --><svg ", "SVG"),
        (b"<SVG xmlns='x'>", "SVG"),
    ],
)
def test_what_is_found_under_the_names_of_images_is_named(head, name):
    assert foreign(head) == name


@pytest.mark.parametrize(
    "head",
    [
        *(b"", b"BMW is a car, said the man", b"hello", b"[hello", b"\0" * 64, b'{\n  "error": 1}', b"PK\x03\x04\x14"),
        *(b"II*\0\x08\0\0\0", b"RIFF\x24\0\0\0WAVEfmt ", b"<?xml version='1.0'?><Error><Code>AccessDenied"),
        *(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", b"\0\0\0\x18ftypisom\0\0\x02\0isomiso2", b"iVBORw0KGgoAAAAN"),
    ],
)
def test_what_is_not_recognised_has_no_name(head):
    assert foreign(head) is None


@real
def test_a_supported_image_is_not_foreign(kind, data):
    assert foreign(data) is None
    assert sniff(data[:12]) == kind


def test_the_suffixes_are_lower_case_without_a_dot_and_in_one_set_only():
    for suffix in IMAGE_SUFFIXES | FOREIGN_SUFFIXES:
        assert suffix == suffix.lower().strip(". ")
    assert not IMAGE_SUFFIXES & FOREIGN_SUFFIXES
    assert {
        "gif",
        "heic",
        "heif",
        "avif",
        "bmp",
        "tif",
        "tiff",
        "svg",
        "ico",
        "psd",
        "jxl",
        "jp2",
    } < FOREIGN_SUFFIXES
    assert not {"txt", "prompt", "toml"} & IMAGE_ENDINGS


@pytest.mark.parametrize(
    "name",
    [
        *("cat.png", "Cat.JPG", "cat.jfif", "cat.jpe", "cat.pjpeg", "cat.mpo", "cat.jpg_large", "cat.jpg-large"),
        *("cat.png:orig", "cat.pdf", "IMG_1.HEIC", "cat.png ", "a.b.webp", "cat.prompt.jpg", "cat.tiff", "x.cr3"),
    ],
)
def test_a_name_ends_like_that_of_an_image(name):
    assert has_image_ending(name)


@pytest.mark.parametrize("name", ["", "png", ".png", "cat.txt", "cat.prompt.txt", "cat.pngx", "cat.mp4", "cat.png~"])
def test_a_name_does_not_end_like_that_of_an_image(name):
    assert not has_image_ending(name)


TEXTS = [
    b"a cat\n",
    "Größe\tin cm\r\n".encode(),
    "Größe – “fünf”".encode("cp1252"),
    "日本語テキスト".encode("shift-jis"),
    "日本".encode("iso-2022-jp"),
    "日本".encode("utf-8-sig"),
    "Größe 日本".encode("utf-16"),
    codecs.BOM_UTF16_BE + "Größe 日本".encode("utf-16-be"),
    "日本".encode("utf-32"),
    b"from a diskette\r\n\x1a",
    b"\x1b[31mred\x1b[0m",
    b"<!doctype html><title>404</title>",
    b'{"title": "IMG_1.jpg"}',
    b'<?xml version="1.0"?><x:xmpmeta/>',
    ("日本" * TEXT_SAMPLE).encode(),
    ("日本" * TEXT_SAMPLE).encode("utf-16"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_plain_text_is_no_image_wherever_the_sample_of_it_ends(text):
    assert not could_be_image(b"")
    for end in (*range(1, min(len(text), 80)), TEXT_SAMPLE - 1, TEXT_SAMPLE):
        assert not could_be_image(text[:end])


@real
def test_a_image_could_be_an_image_however_short_the_sample(kind, data):
    for end in range({"png": 4, "jpeg": 2, "webp": 12}[kind], 40):
        assert could_be_image(data[:end])


@settings(deadline=None)
@given(st.binary(min_size=400, max_size=1000))
def test_what_is_neither_text_nor_known_could_be_an_image(data):
    assert could_be_image(b"\0" + data)
    assert could_be_image(data + b"\0")


@pytest.mark.parametrize(
    "data",
    [
        *(b"GIF89a", b"%PDF-1.7\n", b"<svg xmlns=''/>", b'<?xml version="1.0"?><svg/>', b"iVBORw0KGgoAAAANSUhEUg"),
        *(b"data:image/png;base64,AAAA", b"\0\0\0\x18ftypheic", b"\xff\xfe" + bytes(range(256)), b"%!PS-Adobe"),
    ],
)
def test_an_image_of_any_kind_could_be_an_image(data):
    assert could_be_image(data)
