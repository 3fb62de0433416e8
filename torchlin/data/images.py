"""Finding image files, and decoding one of them."""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import io
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    ImageOps,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)
from torch import Tensor
from torch.nn import functional as F

from torchlin.data.errors import DataError
from torchlin.data.headers import Plain, plain_image

Color = Literal["rgb", "gray"]
Pixels = npt.NDArray[np.uint8]

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
# By content, whatever the file's name: Pillow knows formats (EPS) for which it would start another program. Imported
# by name, since Pillow registers a format no sooner than its plugin is loaded.
_PLUGINS = (
    BmpImagePlugin,
    GifImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)
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
_TORCHVISION_LIBRARIES = ("image_stable", "image")  # from 0.29 on, and before
_SMALL = 2**16  # bytes; nothing shorter is read from a file than it holds
_RESIZE = (
    "JPEG decoded at 1/4 or 1/8 where its sides stay at least as long, "
    "shorter side by bilinear with antialiasing (JPEG: torch's, others: Pillow's), then centre crop"
)


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


class FoundFile(NamedTuple):
    """One image file as a folder lists it.

    Attributes:
        path: where it is.
        name: relative to some folder above it, with "/" between the parts on every system.
        size: in bytes; -1 for a link that leads nowhere.
        mtime_ns: when it was last changed, in nanoseconds since 1970.
    """

    path: str
    name: str
    size: int
    mtime_ns: int


def scan_images(folder: Path, prefix: str = "") -> list[FoundFile]:
    """List the image files below `folder`, by suffix, in an order that is the same on every system.

    Args:
        folder: where to look; links are followed.
        prefix: put before each file's name, which is otherwise relative to `folder`.
    """
    return sorted(_walk(str(folder), prefix, set()), key=lambda found: found.name.split("/"))


def list_images(folder: Path) -> list[Path]:
    """List the image files below `folder` as `scan_images` does, their paths alone."""
    return [Path(found.path) for found in scan_images(folder)]


def _walk(folder: str, prefix: str, seen: set[str]) -> Iterator[FoundFile]:
    real = os.path.realpath(folder)
    if real in seen:  # a link to a folder above it
        return
    seen.add(real)
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_clutter(entry.name):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, f"{prefix}{entry.name}/", seen)
            elif has_image_suffix(entry.name) and (entry.is_file() or entry.is_symlink()):
                size, mtime_ns = _size_and_time(entry)
                yield FoundFile(entry.path, prefix + entry.name, size, mtime_ns)


def _size_and_time(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        found = entry.stat()
    except OSError:
        return -1, 0
    return found.st_size, found.st_mtime_ns


def decode_image(
    path: str | os.PathLike[str], color: Color, image_size: int | None = None, max_pixels: int | None = None
) -> Pixels:
    """Decode one image file.

    - Turned upright by its EXIF orientation; the first frame of an animation.
    - Anything transparent (alpha channel, or a transparent palette entry) is laid on white.
    - 16-bit channels keep their high byte, ⌊v/256⌋: scaled, not clipped. 32-bit integer and float images are
      refused, because nothing says which values are black and white.
    - CMYK, palette and other modes by Pillow's own conversion, without colour profiles; grey is 0.299 R +
      0.587 G + 0.114 B.
    - Images are resized bilinearly with antialiasing, as torchvision's `Resize` and `CenterCrop` do with a Pillow
      image: to the bit, but for JPEG, where torch's faster arithmetic rounds some values the other way.
    - A JPEG that is to be made much smaller is decoded at 1/8 or 1/4 already, the smallest at which both sides are
      still at least `image_size`. (Not at 1/2, which is less exact and takes as long as the whole.)

    Plain JPEG and PNG files (`plain_image`), nearly all there are, take a shorter way than the rest:
    torchvision's decoder for JPEG at full size, Pillow's codecs without the rest of Pillow for the others. Which way
    depends on the file's content alone, and the pixels are the same. What the shorter way refuses, Pillow judges.

    Args:
        path: the file.
        color: "rgb" or "gray".
        image_size: see `PixelFormat`.
        max_pixels: images of more pixels are refused before they are decoded; None for Pillow's own limit,
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million unless changed).

    Returns:
        uint8 (C, H, W).

    Raises:
        DataError: the file is missing, unreadable, truncated, too large or no image; the message starts with the path.
    """
    limit = _PILLOW_LIMIT.value() if max_pixels is None else max_pixels
    try:
        data = _read(path)
        plain = plain_image(data)
        pixels = None
        if plain is not None:
            _check_limit(plain.width, plain.height, limit)
            pixels = _decode_plain(plain, color, image_size)
        if pixels is None:
            pixels = _decode_any(data, color, image_size, limit)
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    except _NoImage:
        raise DataError(f"{path}: {'not an image' if data else 'empty file'}") from None
    except _DAMAGE as error:
        raise DataError(f"{path}: cannot be decoded ({error or type(error).__name__})") from None
    return pixels


def image_shape(path: str | os.PathLike[str], color: Color, max_pixels: int | None = None) -> tuple[int, int]:
    """Height and width of one image file: from its header if it is a plain JPEG or PNG, which then is not decoded.

    Raises:
        DataError: see `decode_image`.
    """
    limit = _PILLOW_LIMIT.value() if max_pixels is None else max_pixels
    try:
        plain = plain_image(_read(path))
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if plain is not None and (limit is None or plain.width * plain.height <= limit):
        return plain.height, plain.width
    _, height, width = decode_image(path, color, None, max_pixels).shape
    return height, width


def decoder_versions() -> dict[str, str]:
    """What decides the pixels besides the files: the decoding libraries and their versions."""
    native = "none" if _torchvision_jpeg() is None else _torchvision_version()
    jpeg = features.version("libjpeg_turbo") or features.version("jpg") or "unknown"
    return {"pillow": PIL.__version__, "libjpeg": jpeg, "torchvision": native}


class _NoImage(Exception):
    """The content is that of no format that is read."""


class _PillowLimit:
    """Pillow's limit of size, lifted while any thread is inside; nothing but `_check_limit` is to judge.

    Pillow has a single limit for the process. From there to twice as much it warns, beyond it refuses, and some of its
    plugins ask it by themselves.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._kept: int | None = None

    def value(self) -> int | None:
        """The limit that holds when no thread is inside."""
        with self._lock:
            return self._kept if self._inside else Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._kept, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                Image.MAX_IMAGE_PIXELS = self._kept


_PILLOW_LIMIT = _PillowLimit()


def _read(path: str | os.PathLike[str]) -> bytearray:
    # As few calls as can be: each lets go of Python's lock, which for small files is most of the cost.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        data = bytearray(os.read(handle, _SMALL))
        if len(data) == _SMALL:
            while more := os.read(handle, 2**24):
                data += more
        return data
    finally:
        os.close(handle)


def _check_limit(width: int, height: int, limit: int | None) -> None:
    if limit is not None and width * height > limit:
        raise ValueError(
            f"Image size ({width * height} pixels) exceeds limit of {limit} pixels; "
            "if it is what it claims to be, raise max_pixels"
        )


@functools.cache
def _torchvision_jpeg() -> Callable[..., Tensor] | None:
    """torchvision's JPEG decoder, which takes a third of Pillow's time on a small file; None in builds without it.

    torchvision announces its removal, hence the operator itself: its public wrapper warns on every use. Only the
    library that holds it is loaded, as `import torchvision.io` does, too, but after a second's worth of other modules.
    Its PNG decoder is not used: damaged files crash the process.
    """
    try:
        for name in _TORCHVISION_LIBRARIES:
            library = PathFinder.find_spec(name, [str(_torchvision_folder())])
            if library is not None and library.origin is not None:
                torch.ops.load_library(library.origin)
        operator: Callable[..., Tensor] = torch.ops.image.decode_jpeg
    except (ImportError, OSError, AttributeError):
        return None
    return operator


def _torchvision_folder() -> Path:
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torchvision is not installed")
    return Path(spec.origin).parent


def _torchvision_version() -> str:
    """`torchvision.__version__`, which tells builds apart (+cpu, +cu130) that are one to the package's metadata."""
    text = (_torchvision_folder() / "version.py").read_text(encoding="utf-8")
    found = re.search(r"""^__version__ = ['"](.+)['"]""", text, re.MULTILINE)
    return importlib.metadata.version("torchvision") if found is None else found[1]


def _decode_plain(plain: Plain, color: Color, image_size: int | None) -> Pixels | None:
    """Pixels (C, H, W) of a plain image, or None if it is damaged."""
    jpeg = plain.kind == "jpeg"
    scale = _jpeg_scale(plain.width, plain.height, image_size) if jpeg else 1
    decode = _torchvision_jpeg() if jpeg and scale == 1 else None
    mode = _MODES["gray" if plain.channels == 1 else "rgb"]
    size = (-(-plain.width // scale), -(-plain.height // scale))
    try:
        if decode is not None:
            # 0: the channels that the file has.
            planes = decode(torch.frombuffer(plain.stream, dtype=torch.uint8), 0, False)
            if color == "rgb" or len(planes) == 1:
                planes = planes.repeat(3, 1, 1) if color == "rgb" and len(planes) == 1 else planes
                return _resized_planes(planes, image_size)
            image = Image.fromarray(np.ascontiguousarray(planes.permute(1, 2, 0).numpy()))
        elif jpeg:
            image = Image.frombytes(mode, size, plain.stream, "jpeg", mode, "", scale, 0)
        else:
            image = Image.frombytes(mode, size, plain.stream, "zip", mode, 0)
    except (RuntimeError, ValueError, OSError, TypeError):
        return None
    return _finished(image, color, image_size, jpeg)


def _jpeg_scale(width: int, height: int, image_size: int | None) -> int:
    if image_size is None:
        return 1
    room = min(width, height) // image_size
    return next((scale for scale in (8, 4) if room >= scale), 1)


def _decode_any(data: bytearray, color: Color, image_size: int | None, limit: int | None) -> Pixels:
    with _PILLOW_LIMIT, _identified(bytes(data)) as file:
        _check_limit(*file.size, limit)
        jpeg = file.format == "JPEG"
        if jpeg:
            scale = _jpeg_scale(*file.size, image_size)
            file.draft(file.mode, (file.width // scale, file.height // scale))
        ImageOps.exif_transpose(file, in_place=True)
        return _finished(file, color, image_size, jpeg)


def _identified(data: bytes) -> ImageFile.ImageFile:
    """Open an image as `Image.open` would, but without its limit of size."""
    damage: Exception | None = None
    for name in _FORMATS:
        factory, accepts = Image.OPEN[name]
        # A text instead of True says why the format cannot be read here.
        if accepts is None or accepts(data[:16]) is True:
            try:
                return factory(io.BytesIO(data), "")
            except (SyntaxError, IndexError, TypeError, struct.error) as error:
                damage = error
    raise _NoImage from damage


def _finished(image: Image.Image, color: Color, image_size: int | None, jpeg: bool) -> Pixels:
    image = _in_color(image, color)
    if image_size is not None and not jpeg:
        image = _resized(image, image_size)
    pixels: Pixels = np.array(image)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return _resized_planes(torch.from_numpy(pixels), image_size) if jpeg else pixels


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
    scaled = _scaled_size(*image.size, size)
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = (round((side - size) / 2) for side in scaled)
    return image.crop((left, top, left + size, top + size))


def _resized_planes(planes: Tensor, size: int | None) -> Pixels:
    """`_resized` of a tensor (C, H, W) by torch, which takes half of Pillow's time and differs from it by at most 1."""
    if size is None:
        return _numpy(planes)
    height, width = planes.shape[1:]
    columns, rows = scaled = _scaled_size(width, height, size)
    # Not unsqueeze(0), after which torch does not see that each pixel's channels stand together, and copies.
    batch = planes.as_strided((1, *planes.shape), (planes.numel(), *planes.stride()))
    if scaled != (width, height):
        batch = F.interpolate(batch, (rows, columns), mode="bilinear", antialias=True)
    left, top = (round((side - size) / 2) for side in scaled)
    return _numpy(batch)[0, :, top : top + size, left : left + size]


def _scaled_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Width and height once the shorter side is `size`."""
    return (size, size * height // width) if width <= height else (size * width // height, size)


def _numpy(tensor: Tensor) -> Pixels:
    pixels: Pixels = tensor.numpy()
    return pixels
