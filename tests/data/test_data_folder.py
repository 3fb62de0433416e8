"""Image folders: layouts, classes by name, and what each broken folder is told."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchlin.data import DataError, ImageFolderDataModule, decoding
from torchlin.data.images import decode_image

Grow = Callable[[Mapping[str, int]], Path]


def message(root: Path | str, **options: object) -> str:
    with pytest.raises(DataError) as caught:
        ImageFolderDataModule(str(root), **options).setup("fit")
    return str(caught.value)


def images_of(loader: torch.utils.data.DataLoader) -> dict[bytes, int]:
    return {bytes(image.numpy()): int(label) for x, y in loader for image, label in zip(x, y, strict=True)}


def files_of(folder: Path, class_names: list[str]) -> dict[bytes, int]:
    return {decode_image(path, "rgb").tobytes(): class_names.index(path.parent.name) for path in folder.rglob("*.png")}


def test_only_classes(grow: Grow) -> None:
    root = grow({"dog": 10, "cat": 20})
    module = ImageFolderDataModule(str(root))
    assert module.name == "photos"
    assert module.class_names == ["cat", "dog"]
    assert (module.num_classes, module.in_features) == (2, 36)
    assert module.input_info["shape"] == [3, 4, 3]
    module.setup("fit")
    assert module.sizes == {"train": 27, "val": 3, "test": 0}
    assert module.class_counts.tolist() == [18, 9]
    assert module.test_dataloader() == []
    found = images_of(module.train_dataloader()) | images_of(module.val_dataloader())
    assert found == files_of(root, module.class_names)


def test_train_and_test(grow: Grow) -> None:
    root = grow({"train/cat": 10, "train/dog": 10, "test/dog": 3, "test/cat": 2})
    module = ImageFolderDataModule(str(root), val_fraction=0.2)
    assert module.sizes == {"train": 16, "val": 4, "test": 5}
    assert images_of(module.test_dataloader()) == files_of(root / "test", ["cat", "dog"])
    (x, y), *_ = module.test_dataloader()
    assert y.tolist() == [0, 0, 1, 1, 1]
    assert torch.equal(x[0], torch.from_numpy(decode_image(root / "test/cat/0.png", "rgb")))


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_own_validation_split_in_all_its_names(grow: Grow, val: str) -> None:
    root = grow({"train/cat": 4, "train/dog": 5, f"{val}/dog": 3, f"{val}/cat": 2})
    module = ImageFolderDataModule(str(root), val_fraction=0.5)
    assert module.sizes == {"train": 9, "val": 5, "test": 0}
    assert images_of(module.val_dataloader()) == files_of(root / val, ["cat", "dog"])


def test_missing_class_does_not_shift_labels(grow: Grow) -> None:
    root = grow({"train/a": 3, "train/b": 3, "train/c": 3, "val/c": 2, "test/b": 1, "test/a": 0})
    module = ImageFolderDataModule(str(root))
    assert set(images_of(module.val_dataloader()).values()) == {2}
    assert set(images_of(module.test_dataloader()).values()) == {1}


def test_hidden_and_system_files_are_neither_classes_nor_images(grow: Grow) -> None:
    root = grow({"train/cat": 3, "train/dog": 3, "train/.cache": 2, "__MACOSX/train/cat": 1, "train/__MACOSX": 1})
    (root / "train" / "cat" / "Thumbs.db").touch()
    (root / "train" / "cat" / "desktop.ini").touch()
    (root / "train" / "cat" / "._0.png").touch()
    (root / "train" / ".DS_Store").touch()
    module = ImageFolderDataModule(str(root), val_fraction=0)
    assert module.class_names == ["cat", "dog"]
    assert module.sizes["train"] == 6


def test_names_in_any_alphabet(grow: Grow) -> None:
    names = ["a b", "quote's", "日本", "ñandú", "line\nbreak"]
    module = ImageFolderDataModule(str(grow(dict.fromkeys(names, 3))))
    assert module.class_names == sorted(names)
    assert module.sizes["train"] + module.sizes["val"] == 15


def test_subfolders_of_a_class_count(grow: Grow) -> None:
    root = grow({"cat/indoor/old": 2, "cat/outdoor": 3, "dog": 4})
    module = ImageFolderDataModule(str(root), val_fraction=0)
    assert module.class_counts.tolist() == [5, 4]


def test_a_class_may_be_called_train(grow: Grow) -> None:
    assert ImageFolderDataModule(str(grow({"bus": 2, "train": 2, "car": 2}))).class_names == ["bus", "car", "train"]


def test_other_folders_beside_train_are_ignored(grow: Grow) -> None:
    module = ImageFolderDataModule(str(grow({"train/cat": 2, "train/dog": 2, "annotations": 1, "spare/x": 1})))
    assert module.class_names == ["cat", "dog"]
    assert module.sizes == {"train": 3, "val": 1, "test": 0}


def test_linked_class_folder(grow: Grow, tmp_path: Path) -> None:
    root = grow({"cat": 2, "dog": 2})
    shutil.move(root / "dog", tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", root / "dog")
    assert ImageFolderDataModule(str(root), val_fraction=0).class_counts.tolist() == [2, 2]


def test_image_size_and_color(grow: Grow) -> None:
    root = grow({"cat": 3, "dog": 3})
    Image.fromarray(np.full((30, 50, 3), 9, np.uint8)).save(root / "cat" / "big.png")
    module = ImageFolderDataModule(str(root), image_size=2, color="gray", val_fraction=0)
    assert module.in_features == 4
    assert (module.input_info["image_size"], module.input_info["color"]) == (2, "gray")
    batches = images_of(module.train_dataloader())
    assert batches[bytes([9] * 4)] == 0
    x, _ = next(iter(module.train_dataloader()))
    assert x.shape == (7, 1, 2, 2)


def test_splits_do_not_change_and_depend_on_the_seed(grow: Grow) -> None:
    root = str(grow({"cat": 30, "dog": 30}))
    vals = [images_of(ImageFolderDataModule(root, seed=seed).val_dataloader()) for seed in (0, 0, 1)]
    assert vals[0] == vals[1] != vals[2]
    assert list(vals[0].values()) == [0] * 3 + [1] * 3


def test_test_stage_decodes_the_test_split_only(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[Path] = []
    decode = decoding.decode_image

    def spy(path: Path, *rest: object) -> np.ndarray:
        decoded.append(Path(path))
        return decode(path, *rest)

    module = ImageFolderDataModule(str(grow({"train/cat": 2, "train/dog": 2, "test/cat": 1})))
    monkeypatch.setattr(decoding, "decode_image", spy)
    module.setup("test")
    assert [path.parent.parent.name for path in decoded] == ["test"]
    module.setup("fit")
    module.setup("fit")
    assert len(decoded) == 5


def test_fingerprint_is_of_names_and_sizes_and_portable(grow: Grow, tmp_path: Path) -> None:
    root = grow({"train/cat": 2, "train/dog": 2, "test/cat": 1})
    first = ImageFolderDataModule(str(root)).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", first)
    shutil.copytree(root, tmp_path / "copy" / "photos")
    assert ImageFolderDataModule(str(tmp_path / "copy" / "photos"), seed=4).fingerprint == first
    os.utime(root / "train" / "cat" / "0.png")
    assert ImageFolderDataModule(str(root)).fingerprint == first
    (root / "train" / "cat" / "0.png").rename(root / "train" / "cat" / "00.png")
    assert ImageFolderDataModule(str(root)).fingerprint != first


def test_progress_bar_on_a_terminal_for_many_images(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    root = str(grow({"cat": 6, "dog": 6}))
    for shown_from, shown in ((13, False), (12, True)):
        screen = Terminal()
        monkeypatch.setattr("sys.stderr", screen)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(decoding, "_PROGRESS_FROM", shown_from)
        ImageFolderDataModule(root, cache=False).setup("fit")
        assert ("decoding images" in screen.getvalue()) == shown


def test_missing_folder(grow: Grow) -> None:
    root = grow({"cat": 1})
    text = message(root.with_name("photo"))
    assert text.startswith(f"{root.with_name('photo')}/: no such folder (did you mean 'photos'?)")
    assert message(root / "none" / "deeper").startswith(f"{root / 'none' / 'deeper'}/: no such folder; ")


def test_file_instead_of_folder(grow: Grow) -> None:
    path = grow({"cat": 1}) / "cat" / "0.png"
    assert message(path).startswith(f"{path}: is a file, not a folder")


def test_folder_without_images(grow: Grow) -> None:
    root = grow({"cat": 0, "dog": 0})
    assert message(root).startswith(f"{root}/: no images found in 2 class folders (looked for .bmp .gif .jpeg")
    assert message(root / "cat").startswith(f"{root / 'cat'}/: no class folders and no images; put the images of")


def test_images_without_class_folders(grow: Grow) -> None:
    root = grow({"cat": 3})
    assert message(root / "cat").startswith(f"{root / 'cat'}/: images but no class folders; put the images of")


def test_empty_class_folder(grow: Grow) -> None:
    root = grow({"cat": 0, "dog": 2})
    assert message(root) == (
        f"{root}/: no images found in class folder 'cat' "
        "(looked for .bmp .gif .jpeg .jpg .png .ppm .tif .tiff .webp); remove the folder or add images"
    )


def test_single_class(grow: Grow) -> None:
    root = grow({"images/cat": 1, "images/dog": 1})
    text = message(root)
    assert text.startswith(f"{root}/: only one class folder, 'images'; at least two are needed")
    assert f"name {root / 'images'}/ instead" in text
    shutil.rmtree(root / "images" / "dog")
    assert message(root / "images").endswith("'cat'; at least two are needed")


@pytest.mark.parametrize("split", ["val", "test"])
def test_unknown_class(grow: Grow, split: str) -> None:
    root = grow({"train/cat": 2, "train/dog": 2, f"{split}/Cats": 1})
    assert message(root) == (
        f"{root / split}/: class 'Cats' is not among the 2 training classes (did you mean 'cat'?); "
        "rename or remove the folder"
    )


def test_split_without_images(grow: Grow) -> None:
    root = grow({"train/cat": 2, "train/dog": 2, "test/cat": 0})
    assert message(root).startswith(f"{root / 'test'}/: no images found (looked for")


def test_test_without_train(grow: Grow) -> None:
    root = grow({"test/cat": 2, "test/dog": 2})
    assert message(root) == (f"{root}/: has 'test' but no folder 'train'; put the training images in {root / 'train'}/")


def test_two_validation_folders(grow: Grow) -> None:
    root = grow({"train/a": 1, "train/b": 1, "val/a": 1, "valid/a": 1})
    assert message(root) == f"{root}/: 'val' and 'valid' both hold the val split; keep one"


def test_different_sizes(grow: Grow) -> None:
    root = grow({"cat": 3, "dog": 3})
    Image.new("RGB", (8, 6)).save(root / "cat" / "2.png")
    Image.new("RGB", (9, 9)).save(root / "dog" / "1.png")
    assert message(root) == (
        f"{root / 'cat' / '2.png'}: image is 8×6 pixels (width × height), the first training image is "
        "3×4; train with image_size to resize all images to one size"
    )


def test_file_that_is_no_image(grow: Grow) -> None:
    root = grow({"cat": 3, "dog": 3})
    (root / "cat" / "0.png").write_text("no image")
    assert message(root) == (
        f"{root}/: 1 of 6 images cannot be read; repair or remove {root / 'cat' / '0.png'}: not an image"
    )


def test_bad_files_of_all_splits_are_listed_together(grow: Grow) -> None:
    root = grow({"train/cat": 3, "train/dog": 3, "test/dog": 2})
    bad = [root / name for name in ("train/cat/1.png", "train/dog/0.png", "test/dog/1.png")]
    for path in bad:
        path.write_bytes(b"")
    lines = message(root).splitlines()
    assert lines[0] == f"{root}/: 3 of 8 images cannot be read; repair or remove these files"
    assert [line.strip() for line in lines[1:]] == [f"{path}: empty file" for path in bad]


def test_no_readable_image_at_all(grow: Grow) -> None:
    root = grow({"cat": 1, "dog": 1})
    for path in root.rglob("*.png"):
        path.write_bytes(b"")
    assert message(root) == f"{root}/: none of 2 images can be read, such as {root / 'cat' / '0.png'}"


def test_bad_arguments(grow: Grow) -> None:
    root = str(grow({"cat": 1, "dog": 1}))
    with pytest.raises(ValueError, match="color must be 'rgb' or 'gray', got 'grey'"):
        ImageFolderDataModule(root, color="grey")
    with pytest.raises(ValueError, match="image_size must be an integer of at least 1, got 0"):
        ImageFolderDataModule(root, image_size=0)


@pytest.mark.slow
def test_real_cifar10_folder() -> None:
    folder = os.environ.get("TORCHLIN_CIFAR10_FOLDER")
    if not folder or not Path(folder).is_dir():
        pytest.skip("TORCHLIN_CIFAR10_FOLDER names no folder of CIFAR-10 images")
    module = ImageFolderDataModule(folder)
    assert (module.num_classes, module.in_features) == (10, 3072)
    module.setup("fit")
    assert module.sizes == {"train": 45_000, "val": 5_000, "test": 10_000}
    assert module.class_counts.tolist() == [4_500] * 10
    assert len(module.test_dataloader()) == 79
    np.testing.assert_allclose(module.standardization.mean.view(3, -1).mean(1), [0.491, 0.482, 0.447], atol=0.002)
