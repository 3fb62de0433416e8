"""Decoding one image file: every odd format, with the pixels that must come out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torchvision import transforms

from torchlin.data import DataError
from torchlin.data.decoding import decode_chunks, decode_files
from torchlin.data.images import PixelFormat, decode_image, list_images

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GRAY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)


def luma(rgb: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(rgb).convert("L"))[None]


def over_white(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return (rgb * share + 255 * (1 - share)).transpose(2, 0, 1)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".ppm", ".tif"])
def test_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    pixels = decode_image(path, "rgb")
    assert (pixels.dtype, pixels.shape) == (np.uint8, (3, 5, 7))
    np.testing.assert_array_equal(pixels, RGB.transpose(2, 0, 1))
    np.testing.assert_array_equal(decode_image(str(path), "gray"), luma(RGB))


def test_gray_is_the_weighted_sum(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    expected = RGB @ np.array([0.299, 0.587, 0.114])
    np.testing.assert_allclose(decode_image(tmp_path / "a.png", "gray")[0], expected, atol=0.51)


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp"])
def test_lossy_formats_are_close(tmp_path: Path, suffix: str) -> None:
    flat = np.full((16, 16, 3), (200, 60, 30), dtype=np.uint8)
    Image.fromarray(flat).save(tmp_path / f"a{suffix}", quality=95)
    np.testing.assert_allclose(decode_image(tmp_path / f"a{suffix}", "rgb").transpose(1, 2, 0), flat, atol=4)


def test_gray_file(tmp_path: Path) -> None:
    Image.fromarray(GRAY).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", "gray"), GRAY[None])
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", "rgb"), np.stack([GRAY] * 3))


def test_one_bit(tmp_path: Path) -> None:
    bits = GRAY > 127
    Image.fromarray(bits).save(tmp_path / "a.png")
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", "gray"), bits[None] * 255)


def test_alpha_is_laid_on_white(tmp_path: Path) -> None:
    alpha = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
    alpha[0, :2] = 0, 255
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "a.png")
    pixels = decode_image(tmp_path / "a.png", "rgb")
    np.testing.assert_allclose(pixels, over_white(RGB, alpha), atol=1)
    assert pixels[:, 0, 0].tolist() == [255, 255, 255]
    assert pixels[:, 0, 1].tolist() == RGB[0, 1].tolist()


def test_gray_with_alpha(tmp_path: Path) -> None:
    alpha = np.zeros((5, 7), dtype=np.uint8)
    alpha[:, :3] = 255
    Image.fromarray(np.dstack([GRAY, alpha]), mode=None).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "LA"
    expected = np.where(alpha == 255, GRAY, 255)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", "gray"), expected[None])


@pytest.mark.parametrize("transparent", [None, 1])
def test_palette(tmp_path: Path, transparent: int | None) -> None:
    indices = RNG.integers(0, 3, (5, 7), dtype=np.uint8)
    palette = np.array([[10, 20, 30], [200, 100, 0], [5, 250, 90]], dtype=np.uint8)
    image = Image.fromarray(indices).convert("P")
    image.putdata(indices.ravel().tolist())
    image.putpalette(palette.ravel().tolist())
    options = {} if transparent is None else {"transparency": transparent}
    image.save(tmp_path / "a.png", **options)
    with Image.open(tmp_path / "a.png") as stored:
        assert stored.mode == "P"
    if transparent is not None:
        palette[transparent] = 255
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", "rgb"), palette[indices].transpose(2, 0, 1))


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    values = np.array([[0, 255, 256, 257], [32768, 65279, 65280, 65535]], dtype=np.uint16)
    expected = np.array([[0, 0, 1, 1], [128, 254, 255, 255]], dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "a.tif")
    big_endian = b"P5 4 2 65535\n" + values.astype(">u2").tobytes()
    (tmp_path / "a.ppm").write_bytes(big_endian)
    for name in ("a.png", "a.tif", "a.ppm"):
        np.testing.assert_array_equal(decode_image(tmp_path / name, "gray"), expected[None])
        np.testing.assert_array_equal(decode_image(tmp_path / name, "rgb"), np.stack([expected] * 3))


def test_big_endian_sixteen_bit_tiff(tmp_path: Path) -> None:
    values = RNG.integers(0, 65536, (5, 7), dtype=np.uint16)
    Image.frombytes("I;16B", (7, 5), values.astype(">u2").tobytes()).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(decode_image(tmp_path / "a.tif", "gray"), (values >> 8)[None])


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_are_refused(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((2, 2), dtype=dtype)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: cannot be decoded \(32-bit pixels, mode '[IF]'"):
        decode_image(tmp_path / "a.tif", "rgb")


def test_cmyk_jpeg(tmp_path: Path) -> None:
    flat = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    flat.save(tmp_path / "a.jpg", quality=95)
    pixels = decode_image(tmp_path / "a.jpg", "rgb")
    np.testing.assert_allclose(pixels[:, 8, 8], [255, 0, 0], atol=4)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [
        (1, lambda a: a),
        (2, lambda a: a[:, ::-1]),
        (3, lambda a: a[::-1, ::-1]),
        (4, lambda a: a[::-1]),
        (5, lambda a: a.transpose(1, 0, 2)),
        (6, lambda a: np.rot90(a, -1)),
        (7, lambda a: np.rot90(a, 2).transpose(1, 0, 2)),
        (8, lambda a: np.rot90(a)),
    ],
)
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int, turned, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / f"a{suffix}", exif=exif)
    np.testing.assert_array_equal(decode_image(tmp_path / f"a{suffix}", "rgb").transpose(1, 2, 0), turned(RGB))


def test_exif_rotated_photograph(tmp_path: Path) -> None:
    halves = np.zeros((16, 32, 3), dtype=np.uint8)
    halves[:, 16:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to see it upright
    Image.fromarray(halves).save(tmp_path / "a.jpg", exif=exif, quality=95)
    pixels = decode_image(tmp_path / "a.jpg", "gray")
    assert pixels.shape == (1, 32, 16)
    assert pixels[0, 4].max() < 10
    assert pixels[0, 28].min() > 245


def test_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "lime", "blue")]
    for suffix, options in ((".gif", {}), (".webp", {"lossless": True}), (".png", {})):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **options)
        assert decode_image(tmp_path / f"a{suffix}", "rgb")[:, 2, 2].tolist() == [255, 0, 0]


def test_colour_profile_is_not_applied(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(decode_image(tmp_path / "a.png", "rgb"), RGB.transpose(2, 0, 1))


def test_one_pixel(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (1, 2, 3)).save(tmp_path / "a.png")
    assert decode_image(tmp_path / "a.png", "rgb").tolist() == [[[1]], [[2]], [[3]]]
    assert decode_image(tmp_path / "a.png", "rgb", image_size=2).tolist() == [[[1, 1]] * 2, [[2, 2]] * 2, [[3, 3]] * 2]


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (41, 97), (16, 16), (8, 30)])
def test_resizing_is_torchvisions(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (*shape, 3), dtype=np.uint8))
    image.save(tmp_path / "a.png")
    stock = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])(image)
    pixels = decode_image(tmp_path / "a.png", "rgb", image_size=16)
    np.testing.assert_array_equal(pixels, np.asarray(stock).transpose(2, 0, 1))


def test_file_content_decides_not_its_name(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "b.jpg")
    np.testing.assert_array_equal(decode_image(tmp_path / "b.jpg", "rgb"), RGB.transpose(2, 0, 1))


def write_bad_files(folder: Path) -> dict[str, str]:
    """Write files that cannot be read; return the reason that must be named for each."""
    Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    Image.fromarray(RGB).save(folder / "whole.png")
    png = (folder / "whole.png").read_bytes()
    (folder / "whole.png").unlink()
    (folder / "truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "truncated.png").write_bytes(png[:-30])
    (folder / "header.png").write_bytes(png[:20])
    (folder / "text.jpg").write_text("not at all an image")
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "postscript.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\nshowpage\n")
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    return {
        "truncated.jpg": "truncated",
        "truncated.png": "",
        "header.png": "",
        "text.jpg": "not an image",
        "zero.jpg": "empty file",
        "postscript.jpg": "not an image",
        "dangling.png": "No such file",
    }


def test_bad_files_are_named_with_their_reason(tmp_path: Path) -> None:
    for name, reason in write_bad_files(tmp_path).items():
        with pytest.raises(DataError) as caught:
            decode_image(tmp_path / name, "rgb")
        assert str(caught.value).startswith(f"{tmp_path / name}: ")
        assert reason in str(caught.value)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.png: No such file"):
        decode_image(tmp_path / "none.png", "rgb")
    with pytest.raises(DataError, match=r"Is a directory|Permission denied"):
        decode_image(tmp_path, "rgb")
    Image.fromarray(RGB).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    if os.access(tmp_path / "a.png", os.R_OK):
        pytest.skip("this user may read every file")
    with pytest.raises(DataError, match="Permission denied"):
        decode_image(tmp_path / "a.png", "rgb")


def test_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(DataError, match=r"a\.png: cannot be decoded \(Image size \(35 pixels\) exceeds limit"):
        decode_image(tmp_path / "a.png", "rgb")


def test_many_files_keep_their_order(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.png" for i in range(200)]
    for i, path in enumerate(paths):
        Image.new("L", (2, 2), i).save(path)
    images = decode_files(paths, PixelFormat((1, 2, 2), "gray"))
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert images[:, 0, 0, 0].tolist() == list(range(200))
    assert decode_files([], PixelFormat((1, 2, 2), "gray")).shape == (0, 1, 2, 2)


def test_all_bad_files_are_listed_at_once(tmp_path: Path) -> None:
    bad = write_bad_files(tmp_path)
    Image.fromarray(RGB).save(tmp_path / "good.png")
    with pytest.raises(DataError) as caught:
        decode_files(list_images(tmp_path), PixelFormat((3, 5, 7), "rgb"), where="photos/")
    lines = str(caught.value).splitlines()
    assert lines[0] == "photos/: 7 of 8 images cannot be read; repair or remove these files"
    assert [line.strip().split(": ")[0] for line in lines[1:]] == [str(tmp_path / name) for name in sorted(bad)]


def test_a_long_list_of_bad_files_is_cut_and_counted(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i:03}.png" for i in range(150)]
    for path in paths:
        path.touch()
    with pytest.raises(DataError) as caught:
        decode_files(paths, PixelFormat((3, 5, 7), "rgb"))
    lines = str(caught.value).splitlines()
    assert lines[0] == "images: 150 of 150 images cannot be read; repair or remove these files"
    assert len(lines) == 22
    assert lines[20].strip() == f"{paths[19]}: empty file"
    assert lines[21].strip() == "and 130 more"


def test_images_of_another_size_may_count_as_bad(tmp_path: Path) -> None:
    for i in range(130):
        Image.new("L", (3, 3) if i in (0, 64, 129) else (2, 2), i).save(tmp_path / f"{i:03}.png")
    (tmp_path / "130.png").touch()
    paths, small = list_images(tmp_path), PixelFormat((1, 2, 2), "gray")
    chunks = list(decode_chunks(paths, small, other_sizes="bad"))
    bad = [file for chunk in chunks for file in chunk.bad]
    assert [file.place for file in bad] == [0, 64, 129, 130]
    assert bad[1].reason.startswith(f"{paths[64]}: image is 3×3 pixels (width × height)")
    values = np.concatenate([chunk.pixels for chunk in chunks])[:, 0, 0, 0].tolist()
    assert values == [i for i in range(129) if i not in (0, 64)]
    with pytest.raises(DataError, match=r"000\.png: image is 3×3 pixels"):
        list(decode_chunks(paths, small))


def test_one_bad_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(DataError) as caught:
        decode_files([tmp_path / "a.png"], PixelFormat((3, 5, 7), "rgb"), where="x/")
    assert str(caught.value) == (f"x/: 1 of 1 images cannot be read; repair or remove {tmp_path / 'a.png'}: empty file")


def test_pixel_format_survives_json() -> None:
    for pixel_format in (PixelFormat((3, 5, 7), "rgb"), PixelFormat((1, 8, 8), "gray", 8)):
        assert PixelFormat.from_info(pixel_format.to_info()) == pixel_format
    rule = PixelFormat((1, 8, 8), "gray", 8).to_info()["resize"]
    for word in ("1/4 or 1/8", "bilinear", "torch's", "Pillow's", "centre crop"):
        assert word in rule


def test_listing_is_recursive_sorted_and_skips_clutter(tmp_path: Path) -> None:
    wanted = ["B.JPG", "a b/c'd.png", "a.webp", "deep/er/x.tiff", "naïve/Ω\n1.gif", "z.bmp"]
    clutter = [".hidden.png", ".git/x.png", "__MACOSX/._a.png", "Thumbs.db", "desktop.ini", "notes.txt", "a.png.txt"]
    for name in wanted + clutter:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    os.symlink(tmp_path, tmp_path / "deep" / "loop")
    assert [path.relative_to(tmp_path).as_posix() for path in list_images(tmp_path)] == sorted(
        wanted, key=lambda name: name.split("/")
    )
