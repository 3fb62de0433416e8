"""The short way to the pixels of plain files: the same pixels and the same verdicts as Pillow's, and faster."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import warnings
import zlib
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torch.nn import functional as F
from torchvision import transforms
from torchvision.io.image import _has_image_ops

from torchlin.data import DataError, images
from torchlin.data.headers import plain_image
from torchlin.data.images import decode_image

RNG = np.random.default_rng(0)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    coarse = RNG.integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height)).convert(mode)


def by_pillow(path: Path, color: str, image_size: int | None = None) -> np.ndarray:
    """Pixels (C, H, W) by the rules of `decode_image`, for opaque images, in nothing but public functions."""
    with Image.open(path) as file:
        jpeg = file.format == "JPEG"
        if image_size is not None and min(file.size) >= 4 * image_size:
            file.draft(file.mode, (image_size, image_size))
        image = ImageOps.exif_transpose(file).convert("RGB" if color == "rgb" else "L")
    if image_size is not None:
        width, height = image.size
        short, long = min(image.size), max(image.size)
        scaled = image_size * long // short
        size = (image_size, scaled) if width <= height else (scaled, image_size)
        left, top = (round((side - image_size) / 2) for side in size)
        if jpeg:
            planes = torch.from_numpy(np.array(image, ndmin=3).reshape(height, width, -1)).permute(2, 0, 1)[None]
            planes = F.interpolate(planes, size[::-1], mode="bilinear", antialias=True)[0]
            return planes[:, top : top + image_size, left : left + image_size].numpy()
        image = image if size == image.size else image.resize(size, Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + image_size, top + image_size))
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


@pytest.mark.parametrize("color", ["rgb", "gray"])
@pytest.mark.parametrize("image_size", [None, 8, 40])
@pytest.mark.parametrize("native", [True, False], ids=["torchvision", "without torchvision"])
def test_plain_files_give_pillows_pixels(
    tmp_path: Path, color: str, image_size: int | None, native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not native:
        monkeypatch.setattr(images, "_torchvision_jpeg", lambda: None)
    path = tmp_path / "a"
    options = [
        {"subsampling": sub, "progressive": progressive, "quality": quality, "restart_marker_blocks": restart}
        for sub in (0, 1, 2)
        for progressive in (False, True)
        for quality, restart in ((30, 0), (95, 2))
    ]
    for width, height in ((1, 1), (16, 8), (33, 17), (101, 150)):
        for mode in ("RGB", "L"):
            for option in options:
                picture(width, height, mode).save(path, "JPEG", **option)
                assert plain_image(path.read_bytes()) is not None
                np.testing.assert_array_equal(decode_image(path, color, image_size), by_pillow(path, color, image_size))
            picture(width, height, mode).save(path, "PNG")
            assert plain_image(path.read_bytes()) is not None
            np.testing.assert_array_equal(decode_image(path, color, image_size), by_pillow(path, color, image_size))


def test_torchvision_decodes_plain_jpegs_where_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not _has_image_ops():
        pytest.skip("torchvision was built without a JPEG decoder")
    picture(9, 9).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "_decode_any", lambda *_: pytest.fail("took the long way"))
    monkeypatch.setattr(Image, "frombytes", lambda *_: pytest.fail("took Pillow's codec"))
    assert decode_image(tmp_path / "a.jpg", "rgb").shape == (3, 9, 9)


DECODED = """
import sys
path, torchvision_is = sys.argv[1:]
if torchvision_is == "imported before":
    import torchvision
if torchvision_is == "missing":
    sys.modules["torchvision"] = None
before = "torchvision" in sys.modules
from torchlin.data import images
pixels = images.decode_image(path, "rgb")
print(pixels.sum(), images.decoder_versions()["torchvision"])
assert ("torchvision" in sys.modules) == before
if torchvision_is == "imported after":
    import torchvision
    assert (torchvision.io.decode_jpeg(torchvision.io.read_file(path)).numpy() == pixels).all()
"""
WITH_DECODER = ["not imported", "imported before", "imported after"]


@pytest.mark.parametrize("torchvision_is", [*WITH_DECODER, "missing", "without libraries", "damaged"])
def test_the_decoder_is_loaded_without_torchvision(tmp_path: Path, torchvision_is: str) -> None:
    if torchvision_is in WITH_DECODER and not _has_image_ops():
        pytest.skip("torchvision was built without a JPEG decoder")
    jpeg, package = tmp_path / "a.jpg", tmp_path / "torchvision"
    Image.linear_gradient("L").resize((9, 9)).convert("RGB").save(jpeg)
    path = list(sys.path)
    if torchvision_is in ("without libraries", "damaged"):
        package.mkdir()
        (package / "__init__.py").touch()
        path.insert(0, str(tmp_path))
    if torchvision_is == "damaged":
        for name in images._TORCHVISION_LIBRARIES:
            (package / f"{name}{EXTENSION_SUFFIXES[-1]}").write_text("no library")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-W", "ignore", "-c", DECODED, str(jpeg), torchvision_is]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    version = torchvision.__version__ if torchvision_is in WITH_DECODER else "none"
    assert done.stdout.split() == [str(by_pillow(jpeg, "rgb").sum()), version]


def test_a_torchvision_whose_decoder_is_another_is_survived(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed(data: object) -> None:
        raise TypeError(data)

    picture(9, 9).save(tmp_path / "a.jpg")
    monkeypatch.setattr(images, "_torchvision_jpeg", lambda: changed)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.jpg", "rgb"), by_pillow(tmp_path / "a.jpg", "rgb"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_size", [None, 16])
def test_a_turned_photograph(tmp_path: Path, orientation: int, image_size: int | None) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.jpg", "a.png"):
        picture(90, 60).save(tmp_path / name, exif=exif)
        assert plain_image((tmp_path / name).read_bytes()) is None
        expected = by_pillow(tmp_path / name, "rgb", image_size)
        np.testing.assert_array_equal(decode_image(tmp_path / name, "rgb", image_size), expected)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "I;16"])
def test_what_is_not_plain_is_left_to_pillow(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(RNG.integers(0, 2**16, (3, 3), dtype=np.uint16)) if mode == "I;16" else picture(3, 3, mode)
    image.save(tmp_path / "a.png")
    assert plain_image((tmp_path / "a.png").read_bytes()) is None
    picture(3, 3, "CMYK").save(tmp_path / "a.jpg")
    assert plain_image((tmp_path / "a.jpg").read_bytes()) is None


@pytest.mark.parametrize("side", [63, 127, 128, 255, 256, 511, 512, 1030])
def test_scaled_decoding_keeps_enough_pixels(tmp_path: Path, side: int) -> None:
    """A wedge of grey comes out as Pillow's own, whichever of 1, 1/4, 1/8 was taken."""
    wedge = np.repeat(np.linspace(0, 255, side).astype(np.uint8)[None], side, axis=0)
    Image.fromarray(wedge).save(tmp_path / "a.jpg", quality=100)
    plain = plain_image((tmp_path / "a.jpg").read_bytes())
    scale = images._jpeg_scale(plain.width, plain.height, 64)
    assert scale == {63: 1, 127: 1, 128: 1, 255: 1, 256: 4, 511: 4, 512: 8, 1030: 8}[side]
    expected = np.asarray(Image.fromarray(wedge).resize((64, 64), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(decode_image(tmp_path / "a.jpg", "gray", 64)[0], expected.astype(int), atol=3)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (41, 61), (16, 16), (8, 30), (150, 63)])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_jpeg_decoded_whole_is_resized_as_torchvision_does_but_for_rounding(
    tmp_path: Path, shape: tuple[int, int], mode: str, orientation: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    noise = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8)).convert(mode)
    noise.save(tmp_path / "a.jpg", quality=95, exif=exif if orientation > 1 else b"")
    with Image.open(tmp_path / "a.jpg") as file:
        upright = ImageOps.exif_transpose(file).convert("RGB")
    stock = np.asarray(transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])(upright), dtype=int)
    off = np.abs(decode_image(tmp_path / "a.jpg", "rgb", 16) - stock.transpose(2, 0, 1))
    assert off.max() <= 1
    assert off.mean() < 0.2


def test_a_photograph_at_half_its_size_is_that_of_the_full_decoder(tmp_path: Path) -> None:
    """Where the sides are two to four times as long as asked for, nothing is lost to decoding at 1/2."""
    picture(200, 150).save(tmp_path / "a.jpg", quality=85)
    with Image.open(tmp_path / "a.jpg") as file:
        stock = np.asarray(transforms.Compose([transforms.Resize(64), transforms.CenterCrop(64)])(file), dtype=int)
    assert np.abs(decode_image(tmp_path / "a.jpg", "rgb", 64) - stock.transpose(2, 0, 1)).max() <= 1


RESIZED = """
import hashlib, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from torchlin.data.images import decode_image
pixels = [decode_image(path, "rgb", size).tobytes() for path in sys.argv[2:] for size in (16, 64, 224)]
print(hashlib.sha256(b"".join(pixels)).hexdigest())
"""


def test_pixels_are_the_same_on_any_processor_and_number_of_threads(tmp_path: Path) -> None:
    paths = []
    for i, (width, height, mode) in enumerate([(200, 150, "RGB"), (90, 131, "RGB"), (300, 300, "L")]):
        paths.append(str(tmp_path / f"{i}.jpg"))
        picture(width, height, mode).save(paths[-1])
    results = set()
    for capability, threads in (("default", 1), ("avx2", 2)):
        environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
        command = [sys.executable, "-c", RESIZED, str(threads), *paths]
        results.add(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
    assert len(results) == 1


def verdict(path: Path, image_size: int | None) -> np.ndarray | str:
    try:
        return decode_image(path, "rgb", image_size)
    except DataError as error:
        return str(error)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("image_size", [None, 16])
def test_damaged_files_get_pillows_verdict(
    tmp_path: Path,
    kind: str,
    image_size: int | None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    stream = io.BytesIO()
    picture(40, 40).save(stream, kind)
    good = stream.getvalue()
    path = tmp_path / "a"
    for i in range(400):
        bad = bytearray(good)
        if i % 4 == 0:
            del bad[int(RNG.integers(len(bad))) : -2 if i % 8 else None]
        else:
            bad[RNG.integers(len(bad))] = RNG.integers(256)
        path.write_bytes(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            short = verdict(path, image_size)
            with monkeypatch.context() as patch:
                patch.setattr(images, "plain_image", lambda _: None)
                long = verdict(path, image_size)
        np.testing.assert_array_equal(short, long)
    capfd.readouterr()  # libjpeg's own words about damaged files


def bomb(path: Path, side: int) -> None:
    """A file of a few kilobytes that claims, and holds, side² pixels of one bit."""
    with path.open("wb") as file:
        file.write(b"\x89PNG\r\n\x1a\n")
        rows = zlib.compress(bytes((1 + -(-side // 8)) * side), 1)
        header = side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"
        for kind, content in ((b"IHDR", header), (b"IDAT", rows), (b"IEND", b"")):
            file.write(len(content).to_bytes(4, "big") + kind + content)
            file.write(zlib.crc32(kind + content).to_bytes(4, "big"))


@pytest.mark.parametrize("side", [20_000, 10_000])
@pytest.mark.filterwarnings("error")
def test_decompression_bomb_is_refused_by_a_limit_that_can_be_raised(tmp_path: Path, side: int) -> None:
    bomb(tmp_path / "a.png", side)
    with pytest.raises(
        DataError, match=rf"a\.png: cannot be decoded \(Image size \({side**2} pixels\) exceeds limit of"
    ):
        decode_image(tmp_path / "a.png", "gray", 8)
    if side == 10_000:  # between once and twice Pillow's limit, where Pillow only warns
        with pytest.raises(DataError, match=r"raise max_pixels"):
            decode_image(tmp_path / "a.png", "gray", 8, max_pixels=side**2 - 1)
        assert decode_image(tmp_path / "a.png", "gray", 8, max_pixels=side**2).shape == (1, 8, 8)


@pytest.mark.parametrize("kind", ["BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("error")
def test_the_limit_is_the_same_for_all_formats(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    picture(30, 30).save(tmp_path / "a", kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    for options in ({}, {"max_pixels": 899}):
        with pytest.raises(DataError, match=r"Image size \(900 pixels\) exceeds limit of (100|899) pixels"):
            decode_image(tmp_path / "a", "rgb", **options)
    assert decode_image(tmp_path / "a", "rgb", max_pixels=900).shape == (3, 30, 30)
    assert Image.MAX_IMAGE_PIXELS == 100
