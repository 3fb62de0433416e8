"""Telling from its first bytes whether a file is an image of the plainest kind, which any decoder reads alike.

Nothing is decoded here. A file that is not recognised is not wrong: it is one that needs a closer look.
"""

from __future__ import annotations

import zlib
from typing import NamedTuple

# Start-of-frame markers: baseline, extended and progressive, all Huffman coded.
_FRAMES = (0xC0, 0xC1, 0xC2)
# Tables, restart intervals, JFIF, colour profiles, comments and the like: none changes a pixel. Left out on purpose
# are APP1 (EXIF and XMP, which may turn the image) and APP14 (Adobe, which may say what the colours mean).
_HARMLESS = {0xC4, 0xDB, 0xDD, 0xFE, 0xE0, *range(0xE2, 0xEE), 0xEF}
_LUMA_SAMPLINGS = (0x11, 0x21, 0x22)
_PNG_START = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"
_PNG_HARMLESS = {b"gAMA", b"cHRM", b"sRGB", b"iCCP", b"pHYs", b"tIME", b"bKGD", b"sBIT", b"IDAT"}


class Plain(NamedTuple):
    """An image of 8 bits per channel, upright and opaque.

    Attributes:
        kind: "jpeg" or "png".
        width, height: in pixels.
        channels: 1 for grey, 3 for red, green and blue.
        stream: what a decoder of that kind reads: the whole file for JPEG, the compressed rows for PNG.
    """

    kind: str
    width: int
    height: int
    channels: int
    stream: bytes | bytearray


def plain_image(data: bytes | bytearray) -> Plain | None:
    """Return what is in `data`, a whole file, if it is a plain JPEG or PNG; None if it is anything else."""
    try:
        if data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9"):
            return _plain_jpeg(data)
        if data.startswith(_PNG_START):
            return _plain_png(data)
    except IndexError:
        pass
    return None


def _plain_jpeg(data: bytes | bytearray) -> Plain | None:
    at = 2
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _FRAMES:
            return _jpeg_frame(data, at)
        if marker not in _HARMLESS:
            return None
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return None


def _jpeg_frame(data: bytes | bytearray, at: int) -> Plain | None:
    bits, channels = data[at + 4], data[at + 9]
    height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
    samplings = tuple(data[at + 11 + 3 * i] for i in range(channels))
    usual = channels == 1 or (channels == 3 and samplings[0] in _LUMA_SAMPLINGS and samplings[1:] == (0x11, 0x11))
    return Plain("jpeg", width, height, channels, data) if bits == 8 and width and height and usual else None


def _plain_png(data: bytes | bytearray) -> Plain | None:
    if len(data) < 29:
        return None  # Pillow says what is missing
    bits, color, *methods = data[24:29]
    if bits != 8 or color not in (0, 2) or any(methods):
        return None
    at = 8
    kind = b"IHDR"
    rows = []
    # To the very end: what turns an image may also stand behind its pixels.
    while kind == b"IHDR" or kind in _PNG_HARMLESS:
        stop = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if zlib.crc32(data[at + 4 : stop - 4]).to_bytes(4, "big") != data[stop - 4 : stop]:
            return None
        if kind == b"IDAT":
            rows.append(bytes(data[at + 8 : stop - 4]))
        at = stop
        kind = bytes(data[at + 4 : at + 8])
    if kind != b"IEND" or at + 12 != len(data):
        return None
    width, height = int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    return Plain("png", width, height, 3 if color == 2 else 1, b"".join(rows)) if width and height else None
