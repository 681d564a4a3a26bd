"""Is this a whole PNG, JPEG or WebP, and how large: judged from the bytes, without decoding a pixel.

Both the pictures people drop and the pictures that are answered come from outside, so no decoder touches
them here: the container is walked from end to end, which finds what really happens to files (cut short, a
byte flipped, an HTML page under the name ``cat.png``) and bounds the pixel count by the header. What is
inside the compressed data is not looked at. One buffer of 256 KiB whatever the file, each byte read once,
and the number of Python-level steps is capped, so that a hostile file costs no more than an honest one.
"""

from __future__ import annotations

import codecs
import contextlib
import re
import struct
import unicodedata
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO

Kind = Literal["png", "jpeg", "webp"]
Fault = Literal["", "damage", "size", "form"]
"""What sort of problem a picture has: it is damaged, it has too many pixels, or few programs can read its form."""

MAX_PIXELS = 100_000_000
"""More than this, by the header, is a problem: a few bytes may not claim gigabytes of pixels."""

MAX_SCANS = 100
"""More scans than this in a JPEG are a problem: a decoder visits all pixels once for each, and a scan may be 20 bytes.

Encoders write 1 scan (baseline), up to 4 (one for each component), 10 (progressive) or 18 (progressive, CMYK). Scan
scripts written by hand stay far below 100. With 10,000 scans, half a megabyte of 12 million pixels takes over a minute.
"""

IMAGE_SUFFIXES = frozenset({"png", "jpg", "jpeg", "webp"})
"""The usual file name suffixes of what can be sent, lower case and without the dot."""

FOREIGN_SUFFIXES = frozenset(
    (  # noqa: SIM905  a hundred quoted strings would be harder to read
        # Other names of JPEG files; "mpo" and "jps" have a second view behind the first one.
        "jfi jfif jif jpe jps mpo pjp pjpeg thm "
        "ai apng avif avifs bmp bpg cur dds dib djv djvu emf eps exr farbfeld ff flif gif hdr heic heics heif heifs "
        "hif icns ico insp iff ilbm j2c j2k jls jp2 jpf jph jpm jpx jxl jxr kra ora pam pbm pcx pdf pfm pgm pict "
        "pnm ppm ps psb psd qoi sgi svg svgz tga tif tiff wbmp wdp wmf xbm xcf xpm "
        # Camera raw.
        "3fr arw cr2 cr3 crw dcr dng erf fff gpr iiq k25 kdc mef mos mrw nef nrw orf ori pef ptx raf raw rw2 rwl "
        "sr2 srf srw x3f"
    ).split()
) | {
    # What browsers call an image whose address ended in ".jpg:large".
    f"{usual}{mark}{size}"
    for usual in sorted(IMAGE_SUFFIXES)
    for mark in "_-:"
    for size in ("large", "medium", "orig", "small", "thumb")
}
"""Other suffixes of image files. Whether such a file can be sent is for its content to say."""

IMAGE_ENDINGS = IMAGE_SUFFIXES | FOREIGN_SUFFIXES
"""All suffixes by which a file is taken for an image."""

TEXT_SAMPLE = 8 * 1024
"""Bytes from the beginning of a file that are enough for `could_be_image`."""

_PIECE = 256 * 1024
_MAX_STEPS = 250_000  # chunks or segments; with the usual 8 KiB in each this is a PNG of 2 GB
SNIFF_BYTES = 12
"""Bytes from the beginning of a file that are enough for `sniff`."""

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_PNG_MAX_LENGTH = 2**31 - 1
_PNG_PALETTE = 3
_PNG_DEPTHS = {0: {1, 2, 4, 8, 16}, 2: {8, 16}, _PNG_PALETTE: {1, 2, 4, 8}, 4: {8, 16}, 6: {8, 16}}
"""Bits of a sample, by color type."""

_STUFFED, _TEM, _SOI, _EOI, _SOS, _FILL = 0x00, 0x01, 0xD8, 0xD9, 0xDA, 0xFF
_DHT, _DQT, _APP1 = 0xC4, 0xDB, 0xE1
_STANDALONE = frozenset({_TEM, *range(0xD0, 0xD8)})
# C4, C8 and CC are tables and extensions that sit among the numbers of the frame headers.
_FRAMES = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
# No decoder can pass these over: whether a length follows is not known.
_UNKNOWN = frozenset({*range(0x02, 0xC0), *range(0xF0, 0xFE)}) - _FRAMES
_RARE_FRAMES = {
    **dict.fromkeys((0xC3, 0xC7, 0xCB, 0xCF), "a lossless JPEG"),
    **dict.fromkeys((0xC5, 0xC6, 0xCD, 0xCE), "a hierarchical JPEG"),
    0xF7: "a JPEG-LS image",
}
_DEPTH = 8  # bits of a sample in all JPEGs that are in use
_COMPONENTS = frozenset({1, 3, 4})  # grey; YCbCr or RGB; CMYK or YCCK
_SAMPLING = frozenset({1, 2, 3, 4})
# As libjpeg does: whatever is no marker is passed over until there is one. FF before it are fill bytes.
_MARKER = re.compile(rb"\xff[^\x00\xff]")

# Inside a scan FF is data when 00 follows, and RSTn and TEM do not end it. With every byte mapped to
# its class, the end of a scan is one `find` whatever the data is; a loop over each FF would be slow
# exactly for the files that are made to be slow.
_GOES_ON, _ENDS = b"\x00", b"\x01"
_CLASSES = bytes(
    _FILL if code == _FILL else (_GOES_ON if code in {_STUFFED, *_STANDALONE} else _ENDS)[0] for code in range(256)
)
_SCAN_END = bytes([_FILL]) + _ENDS

_EXIF = b"Exif\0\0"
_ORIENTATION = 0x0112
_MOST_EXIF = 64 * 1024
"""Bytes of EXIF data that are read; a JPEG cannot have more in one piece."""

_WEBP_FIRST = frozenset({b"VP8 ", b"VP8L", b"VP8X"})
_WEBP_PICTURES = frozenset({b"VP8 ", b"VP8L", b"ANMF"})
_PRINTABLE = re.compile(rb"[ -~]{4}")
_WEBP_HEADER = 16  # the longest chunk header that is read (ANMF); the others need 10 and 5 bytes

_CUT: dict[Kind, str] = {
    "png": "cut short: no IEND chunk",
    "jpeg": "cut short: no EOI marker",
    "webp": "cut short",
}
_MIMES: dict[Kind, str] = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}
_EXTENSIONS: dict[Kind, str] = {"png": "png", "jpeg": "jpg", "webp": "webp"}

_FOREIGN_MAGIC = (
    (0, b"GIF87a", "GIF"),
    (0, b"GIF89a", "GIF"),
    (8, b"CR\x02", "camera raw"),
    (0, b"II*\x00", "TIFF"),
    (0, b"MM\x00*", "TIFF"),
    (0, b"II+\x00", "TIFF"),
    (0, b"MM\x00+", "TIFF"),
    (0, b"8BPS", "Photoshop"),
    (0, b"\x00\x00\x01\x00", "ICO"),
    (0, b"\x00\x00\x02\x00", "ICO"),
    (0, b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (0, b"\xff\x0a", "JPEG XL"),
    (0, b"\x00\x00\x00\x0cjP  \r\n\x87\n", "JPEG 2000"),
    (0, b"\xff\x4f\xff\x51", "JPEG 2000"),
    (0, b"II\xbc", "JPEG XR"),
    (0, b"FUJIFILMCCD-RAW", "camera raw"),
    (0, b"qoif", "QOI"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"DDS ", "DDS"),
    (0, b"gimp xcf", "GIMP"),
    (0, b"%!PS", "PostScript"),
    (0, b"%PDF-", "PDF"),
    (0, b"PK\x03\x04", "ZIP archive"),
    (0, b"\x1f\x8b", "gzip archive"),
    (8, b"AVI ", "AVI video"),
    (8, b"WAVE", "WAV sound"),
    (0, b"\x1aE\xdf\xa3", "Matroska or WebM video"),
    (0, b"data:image/", "base64 text"),
    (0, b"iVBORw0KGgo", "base64 text"),
    (0, b"/9j/", "base64 text"),
    (0, b"UklGR", "base64 text"),
)
# The size field of a BMP's second header: "BM" alone also begins words.
_BMP_HEADERS = frozenset({12, 16, 40, 52, 56, 64, 108, 124})
_BRANDS = (
    (frozenset({b"avif", b"avis"}), "AVIF"),
    (frozenset({b"crx "}), "camera raw"),
    (
        frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"}),
        "HEIC",
    ),
)
_SHORTEST_MAGIC = (b"\x89PNG", b"\xff\xd8")
"""By so little are files recognized that are just arriving; no text begins like this."""
_TEXTS = frozenset({"HTML page", "JSON", "XML"})
_BOMS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_SPACES = "\b\t\n\v\f\r\x1b\x1a"
"""Control characters that occur in texts: ESC changes colors and, in ISO 2022, alphabets; SUB ends texts of DOS."""
_NO_CONTROLS = bytes({*range(0x20, 0x100), *_SPACES.encode()} - {0x7F, 0x1A})
_NO_TEXT = frozenset({"Cc", "Cn", "Co", "Cs"})
_JSON_OPENINGS = (b'{"', b"{}", b"[{", b'["', b"[[", b"[]")


class _BrokenError(Exception):
    """The walk found a fault; the message is the problem as shown to people."""

    fault: Fault = "damage"


class _CutError(_BrokenError):
    """The file ended where the walk needed more."""


class _SizeError(_BrokenError):
    """There are too many pixels."""

    fault = "size"


class _FormError(_BrokenError):
    """The file may be as it was made, but few programs can read it, or none."""

    fault = "form"


@dataclass(frozen=True)
class Image:
    """What the bytes of a picture say about themselves.

    Attributes:
        kind: By content, never by name.
        width: In pixels, from the header; 0 when the header could not be read.
        height: Likewise.
        problem: Empty when structurally whole, else what is wrong.
        fault: What sort of problem that is.
        orientation: How it is to be turned when it is shown, 1 to 8, by its EXIF data; 1 is not at all.
    """

    kind: Kind
    width: int
    height: int
    problem: str
    fault: Fault = field(default="", compare=False)
    orientation: int = field(default=1, compare=False)

    @property
    def mime(self) -> str:
        """The media type, e.g. ``image/jpeg``."""
        return _MIMES[self.kind]

    @property
    def extension(self) -> str:
        """The usual file name suffix without the dot: ``png``, ``jpg`` or ``webp``."""
        return _EXTENSIONS[self.kind]


class _Size:
    """What the headers say as soon as they were read; it outlives a walk that fails later."""

    def __init__(self) -> None:
        self.width = 0
        self.height = 0
        self.known = False
        self.orientation = 1
        self.components: dict[int, int] = {}  # of a JPEG: the number of the quantization table of each color channel
        self.tables: set[int] = set()  # of a JPEG: the quantization tables that were there

    def set(self, width: int, height: int) -> None:
        """Take the dimensions, or refuse them and end the walk.

        Raises:
            _BrokenError: There are no pixels.
            _SizeError: There are too many.
        """
        self.width, self.height, self.known = width, height, True
        shown = f"{width}×{height} pixels"  # noqa: RUF001  read by people
        if not width or not height:
            raise _BrokenError(f"{shown} is no picture")
        if width * height > MAX_PIXELS:
            raise _SizeError(f"{shown} is more than {MAX_PIXELS:,}")


class _Reader:
    """Reads a file forward through one buffer, each byte at most once.

    What may be asked for at once is bounded by the callers (a few bytes); long stretches go through `crc`,
    `skip_to` and `to_scan_end`, which never hold more than a buffer.
    """

    def __init__(self, file: IO[bytes], update: Callable[[bytes], object] | None) -> None:
        self.size = file.seek(0, 2)
        file.seek(0)
        self._file = file
        self._update = update
        self._steps = 0
        self._piece = b""
        self._classes = b""  # of the whole piece, made once: many short scans must not map it again
        self._start = 0  # where in the file the piece begins
        self._at = 0  # the next byte in the piece

    @property
    def position(self) -> int:
        """The place in the file of the next byte."""
        return self._start + self._at

    def _more(self) -> None:
        """Read on and keep what is not consumed yet."""
        rest = self._piece[self._at :]
        self._start += self._at
        self._at = 0
        self._piece = rest
        self._classes = b""
        fresh = self._file.read(_PIECE)
        if not fresh:
            raise _CutError
        if self._update is not None:
            self._update(fresh)
        self._piece = rest + fresh if rest else fresh

    def head(self, count: int) -> bytes:
        """Return the first bytes without consuming them; fewer when the file is shorter."""
        try:
            while len(self._piece) < count:
                self._more()
        except _CutError:
            pass
        return self._piece[:count]

    def step(self) -> None:
        """Count one chunk or segment.

        Raises:
            _FormError: There are more than any real picture has.
        """
        self._steps += 1
        if self._steps > _MAX_STEPS:
            raise _FormError(f"made of more than {_MAX_STEPS:,} parts")

    def take(self, count: int) -> bytes:
        """Return and consume exactly this many bytes."""
        while len(self._piece) - self._at < count:
            self._more()
        self._at += count
        return self._piece[self._at - count : self._at]

    def skip_to(self, position: int) -> None:
        """Go forward to a place in the file; only its end is checked, nothing is read that nobody wants."""
        if position > self.size:
            raise _CutError
        while self._update is not None and position > self._start + len(self._piece):
            self._at = len(self._piece)
            self._more()
        if position <= self._start + len(self._piece):
            self._at = position - self._start
            return
        self._file.seek(position)
        self._piece = self._classes = b""
        self._start, self._at = position, 0

    def crc(self, count: int, value: int) -> int:
        """Consume this many bytes and return the CRC-32 that continues ``value`` over them."""
        if self.position + count > self.size:
            raise _CutError  # said at once: no need to read gigabytes up to the missing end
        while count:
            if self._at == len(self._piece):
                self._more()
            with memoryview(self._piece) as whole, whole[self._at : self._at + count] as part:
                value = zlib.crc32(part, value)
                self._at += len(part)
                count -= len(part)
        return value

    def rest(self) -> None:
        """Read what is left of the file for somebody who wants all of it."""
        with contextlib.suppress(_CutError):  # it has become shorter
            while self._update is not None and self._start + len(self._piece) < self.size:
                self._at = len(self._piece)
                self._more()

    def to_marker(self, *, anywhere: bool) -> None:
        """Go to the FF of the next marker of a JPEG.

        Args:
            anywhere: Pass over whatever is none; else only over fill bytes.

        Raises:
            _BrokenError: There is something else.
        """
        start = self.position
        while not (found := _MARKER.search(self._piece, self._at)):
            if not anywhere and self._piece[self._at :].strip(b"\xff"):
                break
            # An FF at the very end is judged together with the byte that follows it.
            self._at = max(self._at, len(self._piece) - self._piece.endswith(b"\xff"))
            self._more()
        if not anywhere and (not found or self._piece[self._at : found.start()].strip(b"\xff")):
            raise _BrokenError(f"no marker at byte {start:,}, where a segment should begin")
        self._at = found.start() if found else self._at

    def to_scan_end(self) -> None:
        """Go to the FF of the marker that ends the entropy-coded data."""
        while True:
            if not self._classes:
                self._classes = self._piece.translate(_CLASSES)
            found = self._classes.find(_SCAN_END, self._at)
            if found >= 0:
                self._at = found
                return
            # An FF at the very end is judged together with the byte that follows it.
            self._at = max(self._at, len(self._piece) - self._piece.endswith(b"\xff"))
            self._more()


def inspect(file: IO[bytes], update: Callable[[bytes], object] | None = None) -> Image | None:
    """Judge a file by its bytes.

    Args:
        file: Open for reading in binary and seekable; it is read from its start wherever it stands, and
            left anywhere.
        update: Called with all its bytes in order, to hash them in the same pass; that of a ``hashlib`` object.

    Returns:
        What was found, with the first problem, or None when it is neither PNG nor JPEG nor WebP.

    Raises:
        OSError: Reading failed.
    """
    reader = _Reader(file, update)
    kind = sniff(reader.head(SNIFF_BYTES))
    image = None if kind is None else _judged(reader, kind)
    reader.rest()
    return image


def _judged(reader: _Reader, kind: Kind) -> Image:
    size = _Size()
    problem = ""
    fault: Fault = ""
    try:
        if kind == "png":
            _walk_png(reader, size)
        elif kind == "jpeg":
            _walk_jpeg(reader, size)
        else:
            _walk_webp(reader, size)
    except _BrokenError as broken:
        problem, fault = str(broken) or _CUT[kind], broken.fault
    return Image(kind, size.width, size.height, problem, fault, size.orientation)


def sniff(head: bytes) -> Kind | None:
    """Return the kind by its magic bytes; the first `SNIFF_BYTES` of a file are enough."""
    if head.startswith(_PNG_MAGIC):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return None


def has_image_ending(name: str) -> bool:
    """Tell whether a file name ends like that of an image, in upper or lower case."""
    head, dot, suffix = name.rstrip().rpartition(".")
    return bool(head and dot) and suffix.lower() in IMAGE_ENDINGS


def could_be_image(head: bytes) -> bool:
    """Tell whether a file may be meant as an image, whatever its name: True unless it is plain text.

    Text is what has no control characters but white space, in UTF-8 or an older encoding, or in UTF-16 or UTF-32 with
    a byte order mark. An image that is written in characters (SVG, base64) is an image.

    Args:
        head: The first bytes of the file: all of them, or at least `TEXT_SAMPLE`. Of an empty file nothing can be said;
            it is not called an image.
    """
    if sniff(head) is not None or head.startswith(_SHORTEST_MAGIC):
        return True
    kind = foreign(head)
    if kind is not None and kind not in _TEXTS:
        return True
    return not _is_text(head)


def _is_text(head: bytes) -> bool:
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            # A character that the end of the sample cuts in two is left out.
            decoded = codecs.getincrementaldecoder(encoding)("replace").decode(head[len(mark) :])
            return all(unicodedata.category(each) not in _NO_TEXT or each in _SPACES for each in decoded)
    return not head.rstrip(b"\x1a").translate(None, _NO_CONTROLS)


def foreign(head: bytes) -> str | None:
    """Name what is not a supported picture but was recognised.

    Args:
        head: The first bytes of a file; 512 are plenty, a dozen do for most.

    Returns:
        A name for messages ("GIF", "HEIC", "HTML page", …), or None when it is supported or unknown.
    """
    if sniff(head) is not None:
        return None
    if head[4:8] == b"ftyp":
        return _foreign_brand(head)
    if head[:2] == b"BM" and int.from_bytes(head[14:18], "little") in _BMP_HEADERS:
        return "BMP"
    for offset, magic, name in _FOREIGN_MAGIC:
        if head.startswith(magic, offset):
            return name
    return _foreign_text(head)


def _foreign_brand(head: bytes) -> str:
    """Tell the pictures in an ISO media file from the videos by the brands it declares."""
    length = min(int.from_bytes(head[:4], "big"), len(head), 128)
    # "mif1" only says "some picture" and may stand first in an AVIF as well as in a HEIC.
    brands = {head[8:12]} | {head[at : at + 4] for at in range(16, length - 3, 4)}
    for known, name in _BRANDS:
        if brands & known:
            return name
    return "MP4 or QuickTime video"


def _foreign_text(head: bytes) -> str | None:
    """Recognise the texts that are found under the names of pictures: error pages above all."""
    text = head[:4096].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "HTML page"
    if text.startswith((b"<svg", b"<!doctype svg")):
        return "SVG"
    if text.startswith((b"<?xml", b"<!--")):
        if b"<svg" in text:
            return "SVG"
        return "HTML page" if b"<html" in text else "XML"
    if b"".join(text[:64].split()).startswith(_JSON_OPENINGS):
        return "JSON"
    return None


def _walk_png(reader: _Reader, size: _Size) -> None:
    """Walk the chunks of a PNG up to IEND; what follows it is nobody's business."""
    reader.take(len(_PNG_MAGIC))
    seen: set[bytes] = set()
    name = b""
    while name != b"IEND":
        reader.step()
        length, name = struct.unpack(">I4s", reader.take(8))
        if not name.isalpha():  # ASCII letters only, for bytes: safe to show from here on
            raise _BrokenError("a chunk has no proper name")
        shown = name.decode("ascii")
        if name == b"CgBI" and not seen:
            raise _FormError("a PNG that was made for iOS only (CgBI)")
        if not size.known and name != b"IHDR":
            raise _BrokenError(f"begins with chunk {shown}, not IHDR")
        _check_png_length(shown, length, again=size.known)
        head = reader.take(length) if name == b"IHDR" or (name == b"eXIf" and length <= _MOST_EXIF) else b""
        crc = reader.crc(length - len(head), zlib.crc32(head, zlib.crc32(name)))
        if reader.take(4) != crc.to_bytes(4, "big"):
            raise _BrokenError(f"chunk {shown} has a wrong checksum")
        if name == b"IHDR":
            needs_palette = _read_png_header(head, size)
        elif name == b"eXIf":
            size.orientation = _orientation(head)
        elif name == b"IDAT" and needs_palette and b"PLTE" not in seen:
            raise _BrokenError("no palette: no PLTE chunk before IDAT")
        seen.add(name)
    if b"IDAT" not in seen:
        raise _BrokenError("no pixels: no IDAT chunk")


def _read_png_header(header: bytes, size: _Size) -> bool:
    """Take the dimensions; tell whether the colors come from a palette."""
    width, height = struct.unpack_from(">II", header)
    depth, color, compression, filtering, interlacing = header[8:]
    if max(width, height) > _PNG_MAX_LENGTH:
        raise _FormError(f"an impossible PNG header: {width}×{height} pixels")  # noqa: RUF001  read by people
    size.set(width, height)
    if depth not in _PNG_DEPTHS.get(color, ()):
        raise _FormError(f"an impossible PNG header: color type {color} with bit depth {depth}")
    if compression or filtering or interlacing > 1:
        raise _FormError(
            f"an impossible PNG header: compression {compression}, filter {filtering}, interlacing {interlacing}"
        )
    return color == _PNG_PALETTE


def _check_png_length(name: str, length: int, *, again: bool) -> None:
    """Refuse the lengths that the format rules out, and a second header."""
    if length > _PNG_MAX_LENGTH:
        raise _BrokenError(f"chunk {name} has an impossible length")
    fixed = {"IHDR": 13, "IEND": 0}.get(name)
    if fixed is not None and length != fixed:
        raise _BrokenError(f"chunk {name} is {length:,} bytes long, not {fixed}")
    if name == "IHDR" and again:
        raise _BrokenError("a second IHDR chunk")


def _walk_jpeg(reader: _Reader, size: _Size) -> None:
    """Walk the segments and scans of a JPEG up to EOI; phones append more, which is left alone."""
    reader.take(2)
    scans = 0
    while (code := _next_marker(reader, in_head=not scans)) != _EOI:
        if code in _STANDALONE:
            continue
        if code == _SOI:
            # Two files run together, the first cut short.
            raise _BrokenError("a second picture begins before this one ends")
        if code in _UNKNOWN:
            raise _BrokenError(f"marker {code:02X}, which no decoder knows")
        length = int.from_bytes(reader.take(2), "big")
        end = reader.position - 2 + length
        _read_segment(reader, size, code, length)
        scans += code == _SOS
        if scans > MAX_SCANS:
            raise _FormError(f"more than {MAX_SCANS} scans, encoders write up to 18")
        reader.skip_to(end)
        if code == _SOS:
            reader.to_scan_end()
    if not scans:
        raise _BrokenError("no pixels: no scan before EOI")


def _read_segment(reader: _Reader, size: _Size, code: int, length: int) -> None:
    """Read what is of interest in a segment; the rest of it is for the caller to skip."""
    if code in _FRAMES:
        _read_frame(reader, size, code, length)
    elif code == _SOS:
        _read_scan(reader, size, length)
    elif length < 2:  # noqa: PLR2004  the length counts its own two bytes
        raise _BrokenError(f"segment {code:02X} has an impossible length")
    elif code == _DHT:
        _check_huffman(reader.take(length - 2))
    elif code == _DQT:
        size.tables.update(_quantization(reader.take(length - 2)))
    elif code == _APP1 and length > 2 + len(_EXIF) and reader.take(len(_EXIF)) == _EXIF:
        size.orientation = _orientation(reader.take(length - 2 - len(_EXIF)))


def _check_huffman(tables: bytes) -> None:
    """Refuse Huffman tables that no decoder takes: by them a damaged head shows."""
    at = 0
    while at < len(tables):
        counts = tables[at + 1 : at + 17]
        symbols = tables[at + 17 : at + 17 + sum(counts)]
        if tables[at] & 0xEC or len(symbols) != sum(counts) or len(counts) != 16 or not _are_codes(counts):  # noqa: PLR2004
            raise _BrokenError("a Huffman table that no decoder takes")
        if not tables[at] >> 4 and symbols and max(symbols) > 15:  # noqa: PLR2004  a class: sizes of differences
            raise _BrokenError("a Huffman table that no decoder takes")
        at += 17 + len(symbols)


def _are_codes(counts: bytes) -> bool:
    """Tell whether there can be so many codes of each length; one of ones alone is not allowed."""
    code = 0
    for length, count in enumerate(counts, 1):
        code += count
        if count and code >= 1 << length:
            return False
        code <<= 1
    return True


def _quantization(tables: bytes) -> Iterator[int]:
    """Yield the numbers of quantization tables; refuse what no decoder takes."""
    at = 0
    while at < len(tables):
        if tables[at] & 0xEC:  # precision of 8 or 16 bits, and a number
            break
        yield tables[at] & 3
        at += 1 + 64 * (1 + (tables[at] >> 4))
    if at != len(tables):
        raise _BrokenError("a quantization table that no decoder takes")


def _next_marker(reader: _Reader, *, in_head: bool) -> int:
    """Return the code of the next marker, over any fill bytes before it.

    Before the first scan cameras and Photoshop leave other bytes between segments, too. All decoders that descend from
    libjpeg pass them over, so every viewer opens such files. After it nobody does, and they are a sign of damage.
    """
    reader.step()
    reader.to_marker(anywhere=in_head)
    return reader.take(2)[1]


def _read_frame(reader: _Reader, size: _Size, code: int, length: int) -> None:
    """Read the dimensions from a frame header."""
    if size.known:
        # Which one counts depends on the decoder, so the pixel count would be anybody's guess.
        raise _BrokenError("a second frame header")
    depth, height, width, components = struct.unpack(">BHHB", reader.take(6))
    if code in _RARE_FRAMES:
        raise _FormError(_RARE_FRAMES[code])
    if not components or length != 8 + 3 * components:
        raise _BrokenError("a frame header with an impossible length")
    size.set(width, height)
    if depth != _DEPTH:
        raise _FormError(f"a {depth}-bit JPEG")
    if components not in _COMPONENTS:
        raise _FormError(f"a JPEG with {components} color channels")
    for name, sampling, table in struct.iter_unpack("BBB", reader.take(3 * components)):
        size.components[name] = table
        if sampling >> 4 not in _SAMPLING or sampling & 15 not in _SAMPLING or table > 3:  # noqa: PLR2004
            raise _BrokenError("a frame header with an impossible color channel")


def _orientation(exif: bytes) -> int:
    """Return the orientation from EXIF data, 1 to 8; 1 where there is none or it cannot be read."""
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(at: int, count: int) -> int:
        found = exif[at : at + count]
        return int.from_bytes(found, order) if len(found) == count else 0

    first = number(4, 4)
    for entry in range(min(number(first, 2), 1000)):
        at = first + 2 + 12 * entry
        if number(at, 2) == _ORIENTATION:
            found = number(at + 8, 2)
            return found if found in range(1, 9) else 1
    return 1


def _read_scan(reader: _Reader, size: _Size, length: int) -> None:
    """Check the header of a scan."""
    if not size.known:
        raise _BrokenError("a scan before any frame header")
    components = reader.take(1)[0]
    if components not in _SAMPLING or length != 6 + 2 * components:  # one to four of them, too
        raise _BrokenError("a scan header with an impossible length")
    for name in reader.take(2 * components)[::2]:
        if name not in size.components:
            raise _BrokenError("a scan of a color channel that is not there")
        if size.tables and size.components[name] not in size.tables:
            raise _BrokenError("no quantization table for a color channel")


def _walk_webp(reader: _Reader, size: _Size) -> None:
    """Walk the chunks of a WebP as far as its RIFF header says; the file may be longer."""
    end = 8 + int.from_bytes(reader.take(12)[4:8], "little")
    if end > reader.size:
        raise _BrokenError(f"cut short: {reader.size:,} of {end:,} bytes")
    pixels = False
    while reader.position < end:
        reader.step()
        if end - reader.position < 8:  # noqa: PLR2004  name and length
            raise _BrokenError("loose bytes after the last chunk")
        name, length = struct.unpack("<4sI", reader.take(8))
        after = reader.position + length
        if after > end:
            raise _BrokenError("a chunk is longer than the file says it is")
        if not _PRINTABLE.fullmatch(name):
            raise _BrokenError("a chunk has no proper name")
        if not size.known and name not in _WEBP_FIRST:
            raise _BrokenError("does not begin with a VP8, VP8L or VP8X chunk")
        _read_webp_chunk(reader, size, name, length)
        pixels = pixels or name in _WEBP_PICTURES
        # Chunks are padded to even lengths; some writers leave the last pad byte out.
        reader.skip_to(min(after + length % 2, end))
    if not pixels:
        raise _BrokenError("no pixels: no VP8, VP8L or ANMF chunk")


def _read_webp_chunk(reader: _Reader, size: _Size, name: bytes, length: int) -> None:
    """Read what is of interest in a chunk; the rest of it is for the caller to skip."""
    end = reader.position + length
    head = reader.take(min(length, _WEBP_HEADER)) if name in _WEBP_FIRST or name in _WEBP_PICTURES else b""
    if name in _WEBP_FIRST or name in _WEBP_PICTURES:
        _read_webp_header(name, head, size)
    if name in _WEBP_PICTURES:
        _check_webp_end(reader, end, _zeros_by_encoders(name, head))
    elif name == b"EXIF" and length <= _MOST_EXIF:
        size.orientation = _orientation(reader.take(length).removeprefix(_EXIF))


def _zeros_by_encoders(name: bytes, head: bytes) -> int:
    """Return how many zeros an encoder may write at the end of pixels: a plain area is nothing but zeros.

    Measured with the usual encoder: lossy 16, and one for each 360 pixels; lossless, in its fastest setting, one for
    each 10. Its fastest lossy setting, which nobody has by default, may write more and is then refused.
    """
    _, _, width, height = _webp_fields(name, head)
    return 16 + width * height // (256 if name == b"VP8 " else 8)  # the frames of an animation may be either


def _check_webp_end(reader: _Reader, end: int, allowed: int) -> None:
    """Refuse pixels that end in more zeros than an encoder writes.

    A transfer that reserves the room first leaves zeros in place of what did not come, and no checksum shows it.
    """
    if end - allowed <= reader.position:
        return
    reader.skip_to(end - allowed - 1)
    while reader.position < end:
        if any(reader.take(min(end - reader.position, _PIECE))):
            return
    raise _BrokenError(
        "cut short: only zeros at the end of its pixels (if it opens all the same, save it with another program)"
    )


def _read_webp_header(name: bytes, head: bytes, size: _Size) -> None:
    """Take the dimensions from the first header, and hold the later ones to them.

    A small canvas must not vouch for a huge frame: the pixel count is bounded by the first header only.
    """
    x, y, width, height = _webp_fields(name, head)
    if not size.known:
        size.set(width, height)
    elif name == b"ANMF":
        if x + width > size.width or y + height > size.height:
            raise _BrokenError("a frame reaches out of the canvas")
    elif (width, height) != (size.width, size.height):
        raise _BrokenError("canvas and picture differ in size")


def _webp_fields(name: bytes, head: bytes) -> tuple[int, int, int, int]:
    """Return left, top, width and height from the beginning of a chunk."""

    def three(at: int) -> int:
        return int.from_bytes(head[at : at + 3], "little")

    if name == b"ANMF" and len(head) >= 16:  # noqa: PLR2004  position, size, duration, flags
        return 2 * three(0), 2 * three(3), three(6) + 1, three(9) + 1
    if name == b"VP8X" and len(head) >= 10:  # noqa: PLR2004  flags, canvas
        return 0, 0, three(4) + 1, three(7) + 1
    if name == b"VP8L" and len(head) >= 5 and head[0] == 0x2F:  # noqa: PLR2004  signature, 14 + 14 bits
        bits = int.from_bytes(head[1:5], "little")
        return 0, 0, (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if name == b"VP8 " and len(head) >= 10 and head[3:6] == b"\x9d\x01\x2a":  # noqa: PLR2004  tag, start code
        width, height = struct.unpack_from("<HH", head, 6)
        return 0, 0, width & 0x3FFF, height & 0x3FFF  # the upper two bits are a scale for display
    raise _BrokenError(f"the {name.decode('ascii').strip()} header cannot be read")
