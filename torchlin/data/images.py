"""Finding image files, and decoding one of them."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from torchlin.data.errors import DataError

Color = Literal["rgb", "gray"]
Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# By content, whatever the file's name: Pillow knows formats (EPS) for which it would start another program.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MODES = {"rgb": "RGB", "gray": "L"}
_CLUTTER = {"__macosx", "thumbs.db", "desktop.ini"}
# What Pillow's parsers raise on damaged headers is not specified; OSError is handled beside these.
_DAMAGE = (
    ValueError,
    TypeError,
    SyntaxError,
    LookupError,
    EOFError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)
_RESIZE = "shorter side by Pillow bilinear with antialiasing, then centre crop"


@dataclass(frozen=True)
class PixelFormat:
    """What all images of a data set look like once decoded.

    Attributes:
        shape: (C, H, W).
        color: "rgb" (C = 3) or "gray" (C = 1).
        image_size: images are resized so that the shorter side has this many pixels, then cropped to a square
            around the centre; None if they are taken as they are and must have `shape`.
    """

    shape: tuple[int, int, int]
    color: Color
    image_size: int | None = None

    def to_info(self) -> dict[str, Any]:
        """Return the `input_info` of a data module: plain JSON values."""
        return {
            "kind": "pixels",
            "shape": list(self.shape),
            "color": self.color,
            "image_size": self.image_size,
            "resize": None if self.image_size is None else _RESIZE,
        }

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> PixelFormat:
        """Read an `input_info` back, so that a new image is decoded like the training images."""
        channels, height, width = info["shape"]
        return cls((channels, height, width), info["color"], info["image_size"])


def is_clutter(name: str) -> bool:
    """Tell whether a file or folder is one that operating systems leave behind, or hidden."""
    return name.startswith(".") or name.lower() in _CLUTTER


def has_image_suffix(name: str) -> bool:
    """Tell whether a file name ends like one of the formats that are read."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def list_images(folder: Path) -> list[Path]:
    """List the image files below `folder`, by suffix, in an order that is the same on every system."""
    found = _walk(folder, set())
    return sorted(found, key=lambda path: path.parts)


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above it
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(Path(entry.path), seen)
            elif has_image_suffix(entry.name) and (entry.is_file() or entry.is_symlink()):
                yield Path(entry.path)


def decode_image(path: str | os.PathLike[str], color: Color, image_size: int | None = None) -> Pixels:
    """Decode one image file with Pillow.

    - Turned upright by its EXIF orientation; the first frame of an animation.
    - Anything transparent (alpha channel, or a transparent palette entry) is laid on white.
    - 16-bit channels keep their high byte, ⌊v/256⌋: scaled, not clipped. 32-bit integer and float images are
      refused, because nothing says which values are black and white.
    - CMYK, palette and other modes by Pillow's own conversion, without colour profiles; grey is 0.299 R +
      0.587 G + 0.114 B.

    Args:
        path: the file.
        color: "rgb" or "gray".
        image_size: see `PixelFormat`.

    Returns:
        uint8 (C, H, W).

    Raises:
        DataError: the file is missing, unreadable, truncated or no image; the message starts with the path.
    """
    try:
        with Image.open(path, formats=_FORMATS) as file:
            ImageOps.exif_transpose(file, in_place=True)
            image = _in_color(file, color)
            pixels = np.array(image if image_size is None else _resized(image, image_size))
    except UnidentifiedImageError:
        reason = "not an image" if os.path.getsize(path) else "empty file"
        raise DataError(f"{path}: {reason}") from None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be decoded ({error or type(error).__name__})") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def _in_color(image: Image.Image, color: Color) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"32-bit pixels, mode {image.mode!r}, have no known range; save 8 or 16 bits")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    mode = _MODES[color]
    return image if image.mode == mode else image.convert(mode)


def _resized(image: Image.Image, size: int) -> Image.Image:
    width, height = image.size
    short, long = min(width, height), max(width, height)
    scaled = (size, size * long // short) if width <= height else (size * long // short, size)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in scaled)
    return image.crop((left, top, left + size, top + size))
