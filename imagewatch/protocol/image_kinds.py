"""What a file may be, by its name and its first bytes. Pure."""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import Literal

Kind = Literal["png", "jpeg", "webp"]

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
"""Other suffixes of image files. Its content decides whether such a file can be sent."""

IMAGE_ENDINGS = IMAGE_SUFFIXES | FOREIGN_SUFFIXES
"""All suffixes by which a file is taken for an image."""

TEXT_SAMPLE = 8 * 1024
"""Bytes from the beginning of a file that are enough for `could_be_image`."""

SNIFF_BYTES = 12
"""Bytes from the beginning of a file that are enough for `sniff`."""

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_HEIC = re.compile(rb"hei[cfmsx]|hev[cmsx]")
_HTML = (b"<!doctype html", b"<html", b"<head", b"<body")
_IMAGES = frozenset({"GIF", "HEIC", "SVG", "PDF"})
_XML = (b"<?xml", b"<!--")
_IN_CHARACTERS = (b"%!PS", b"data:image/", b"iVBORw0KGgo", b"/9j/", b"UklGR")
"""How other images begin that are written in characters: PostScript, base64."""
_SHORTEST_MAGIC = (b"\x89PNG", b"\xff\xd8")
"""By so little are files recognized that are just arriving; no text begins like this."""
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


def sniff(head: bytes) -> Kind | None:
    """Return the kind by its magic bytes; the first `SNIFF_BYTES` of a file are enough."""
    if head.startswith(PNG_MAGIC):
        return "png"
    if head.startswith(b"\xff\xd8\xff"):
        return "jpeg"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    return None


def has_image_ending(name: str) -> bool:
    """Return whether a file name ends like that of an image, in upper or lower case."""
    head, dot, suffix = name.rstrip().rpartition(".")
    return bool(head and dot) and suffix.lower() in IMAGE_ENDINGS


def could_be_image(head: bytes) -> bool:
    """Return whether a file may be meant as an image, whatever its name: True unless it is plain text.

    Text is what has no control characters but white space, in UTF-8 or an older encoding, or in UTF-16 or UTF-32 with
    a byte order mark. An image that is written in characters (SVG, base64) is an image.

    Args:
        head: The first bytes of the file: all of them, or at least `TEXT_SAMPLE`. An empty file may be anything;
            it is not called an image.
    """
    if sniff(head) is not None or head.startswith(_SHORTEST_MAGIC):
        return True
    return head.startswith(_IN_CHARACTERS) or foreign(head) in _IMAGES or not _is_text(head)


def _is_text(head: bytes) -> bool:
    for mark, encoding in _BOMS:
        if head.startswith(mark):
            # A character that the end of the sample cuts in two is left out.
            decoded = codecs.getincrementaldecoder(encoding)("replace").decode(head[len(mark) :])
            return all(unicodedata.category(each) not in _NO_TEXT or each in _SPACES for each in decoded)
    return not head.rstrip(b"\x1a").translate(None, _NO_CONTROLS)


def foreign(head: bytes) -> str | None:
    """Name what is often found in place of a supported image.

    Args:
        head: The first bytes of a file; 512 are plenty, a dozen do for most.

    Returns:
        ``GIF``, ``HEIC``, ``SVG``, ``PDF`` or ``HTML page``; None when it is supported or anything else.
    """
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head[4:8] == b"ftyp" and _HEIC.search(head, 8, 128):
        return "HEIC"
    if head.startswith(b"%PDF-"):
        return "PDF"
    text = head[:4096].removeprefix(codecs.BOM_UTF8).lstrip().lower()
    if text.startswith((b"<svg", b"<!doctype svg")) or (text.startswith(_XML) and b"<svg" in text):
        return "SVG"
    return "HTML page" if text.startswith(_HTML) or (text.startswith(_XML) and b"<html" in text) else None
