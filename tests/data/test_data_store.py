"""The pixel store: built once, found again, rebuilt when it must be, and never left or opened in part."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from torchlin.data import DataError, ImageFolderDataModule, decoding, store
from torchlin.data.store import cache_folder

Grow = Callable[[Mapping[str, int]], Path]

# What the subprocesses below run: one `setup`, on a sign, and slowed down so that there is time to interfere.
SCRIPT = """
import sys, time
from torchlin.data import ImageFolderDataModule, decoding
decode = decoding.decode_image
def slow(*arguments):
    time.sleep({delay})
    return decode(*arguments)
decoding.decode_image = slow
module = ImageFolderDataModule({root!r})
print("ready", flush=True)
sys.stdin.readline()
module.setup("fit")
print(module.sizes["train"], int(module._arrays["train"].inputs.long().sum()), flush=True)
"""


def started(root: Path, processes: int) -> list[subprocess.Popen[str]]:
    """Processes that begin their `setup` at the same time."""
    command = [sys.executable, "-c", SCRIPT.format(root=str(root), delay=0.04)]
    pipe = subprocess.PIPE
    running = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(processes)]
    for process in running:
        assert process.stdout.readline() == "ready\n", process.communicate()[1]
    for process in running:
        process.stdin.write("go\n")
        process.stdin.flush()
    return running


def in_memory(module: ImageFolderDataModule, split: str = "train") -> list[torch.Tensor]:
    """Pixels and targets of a split, also where it is decoded on demand."""
    inputs, targets = module._arrays[split]
    return [inputs if isinstance(inputs, torch.Tensor) else inputs.index_select(0, torch.arange(len(targets))), targets]


def arrays(root: Path, **options: object) -> dict[str, list[torch.Tensor]]:
    module = ImageFolderDataModule(str(root), **options)
    module.setup("fit")
    return {split: in_memory(module, split) for split in module._arrays}


def stores(cache: Path) -> list[Path]:
    return sorted(path for path in cache.iterdir() if path.name != ".locks")


def decoded(root: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> list[str]:
    """Set a module up and return which files that decoded."""
    seen: list[str] = []
    decode = decoding.decode_image

    def spy(path: Path, *rest: object) -> np.ndarray:
        seen.append(Path(path).relative_to(root).as_posix())
        return decode(path, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(decoding, "decode_image", spy)
        arrays(root, **options)
    return sorted(seen)


@pytest.mark.parametrize("options", [{}, {"color": "gray"}, {"image_size": 2}, {"image_size": 7, "color": "gray"}])
def test_same_pixels_as_in_memory_when_built_and_when_opened_again(
    grow: Grow, cache: Path, options: dict[str, object]
) -> None:
    root = grow({"train/cat": 70, "train/dog": 3, "val/dog": 2, "test/cat": 1})
    plain = arrays(root, cache=False, **options)
    assert list(cache.iterdir()) == []
    for _ in range(2):
        cached = arrays(root, **options)
        assert cached.keys() == plain.keys() == {"train", "val", "test"}
        for split, parts in plain.items():
            assert all(torch.equal(a, b) for a, b in zip(parts, cached[split], strict=True))
            assert [part.dtype for part in cached[split]] == [torch.uint8, torch.int64]


def test_a_module_trains_the_same_cached_or_not(grow: Grow) -> None:
    root = str(grow({"cat": 20, "dog": 20}))
    one, other = (ImageFolderDataModule(root, cache=cache, batch_size=7) for cache in (True, False))
    for (x, y), (u, v) in zip(one.train_dataloader(), other.train_dataloader(), strict=True):
        assert torch.equal(x, u)
        assert torch.equal(y, v)
    assert torch.equal(one.standardization.mean, other.standardization.mean)
    assert one.fingerprint == other.fingerprint


def test_second_setup_decodes_nothing(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow({"train/cat": 3, "train/dog": 3, "test/dog": 2})
    assert len(decoded(root, monkeypatch)) == 8
    assert decoded(root, monkeypatch) == []
    assert decoded(root, monkeypatch, seed=3, val_fraction=0.5, batch_size=2) == []
    assert len(decoded(root, monkeypatch, color="gray")) == 8
    assert len(decoded(root, monkeypatch, image_size=2)) == 8
    assert decoded(root, monkeypatch) == []


def test_what_is_in_a_store(grow: Grow, cache: Path) -> None:
    root = grow({"cat": 2, "dog": 3})
    arrays(root)
    (folder,) = stores(cache)
    assert sorted(path.name for path in folder.iterdir()) == ["files.json", "manifest.json", "pixels.u8", "targets.i64"]
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["shape"] == [3, 4, 3]
    assert manifest["class_names"] == ["cat", "dog"]
    assert set(manifest["decoder"]) == {"pillow", "libjpeg", "torchvision"}
    assert manifest["bytes"] == {"pixels.u8": 5 * 36, "targets.i64": 40, "files.json": manifest["bytes"]["files.json"]}
    assert json.loads((folder / "files.json").read_text()) == ["cat/0.png", "cat/1.png"] + [
        f"dog/{i}.png" for i in range(3)
    ]
    pixels = np.fromfile(folder / "pixels.u8", np.uint8).reshape(5, 3, 4, 3)
    np.testing.assert_array_equal(pixels[4], np.asarray(Image.open(root / "dog/2.png")).transpose(2, 0, 1))
    assert np.fromfile(folder / "targets.i64", "<i8").tolist() == [0, 0, 1, 1, 1]


def test_writing_to_the_array_does_not_reach_the_store(grow: Grow) -> None:
    root = grow({"cat": 2, "dog": 3})
    before = arrays(root)["train"][0].clone()
    arrays(root)["train"][0].fill_(7)
    assert torch.equal(arrays(root)["train"][0], before)


def change(root: Path) -> None:
    Image.new("RGB", (3, 4), (1, 2, 3)).save(root / "train/cat/0.png")


def touch(root: Path) -> None:
    os.utime(root / "train/cat/0.png", ns=(0, 1))


def add(root: Path) -> None:
    shutil.copy(root / "train/cat/0.png", root / "train/dog/new.png")


def delete(root: Path) -> None:
    (root / "train/cat/1.png").unlink()


def move(root: Path) -> None:
    (root / "train/cat/1.png").rename(root / "train/dog/one.png")


@pytest.mark.parametrize("edit", [change, touch, add, delete, move])
def test_a_changed_folder_is_noticed(
    grow: Grow, cache: Path, edit: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = grow({"train/cat": 3, "train/dog": 3, "test/dog": 2})
    arrays(root)
    edit(root)
    again = decoded(root, monkeypatch)
    assert len(again) in (5, 6, 7)
    assert all(name.startswith("train/") for name in again), "the other split's store still holds"
    assert len(stores(cache)) == 2
    for cached, plain in zip(arrays(root)["train"], arrays(root, cache=False)["train"], strict=True):
        assert torch.equal(cached, plain)


def test_a_new_class_is_noticed_by_all_splits(grow: Grow) -> None:
    root = grow({"train/cat": 3, "train/dog": 3, "test/dog": 2})
    assert arrays(root)["test"][1].tolist() == [1, 1]
    shutil.copytree(root / "train/dog", root / "train/ant")
    assert arrays(root)["test"][1].tolist() == [2, 2]


def damaged(folder: Path, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", ["pixels.u8", "targets.i64", "files.json", "manifest.json"])
@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff" * 40])
def test_a_damaged_store_is_built_again(
    grow: Grow, cache: Path, name: str, content: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = grow({"cat": 2, "dog": 3})
    before = arrays(root)["train"][0].clone()
    (folder,) = stores(cache)
    damaged(folder, name, content)
    assert len(decoded(root, monkeypatch)) == 5
    assert decoded(root, monkeypatch) == []
    assert stores(cache) == [folder]
    assert torch.equal(arrays(root)["train"][0], before)


@pytest.mark.parametrize(
    ("key", "value"), [("format", 0), ("format", 99), ("shape", [3, 3, 4]), ("class_names", ["a", "b"]), ("decoder", 1)]
)
def test_a_store_that_says_otherwise_is_built_again(
    grow: Grow, cache: Path, key: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = grow({"cat": 2, "dog": 3})
    arrays(root)
    (folder,) = stores(cache)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    assert len(decoded(root, monkeypatch)) == 5


def test_a_short_array_is_noticed(grow: Grow, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow({"cat": 2, "dog": 3})
    arrays(root)
    (folder,) = stores(cache)
    os.truncate(folder / "pixels.u8", 179)
    assert len(decoded(root, monkeypatch)) == 5


def test_another_decoder_gets_a_store_of_its_own(grow: Grow, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow({"cat": 2, "dog": 3})
    arrays(root)
    monkeypatch.setattr(store, "decoder_versions", lambda: {"pillow": "0"})
    assert len(decoded(root, monkeypatch)) == 5
    assert len(stores(cache)) == 2


def test_equal_folder_names_do_not_collide(grow: Grow, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow({"cat": 2, "dog": 3})
    shutil.copytree(root, tmp_path / "copy" / "photos")
    arrays(root)
    assert len(decoded(tmp_path / "copy" / "photos", monkeypatch)) == 5
    assert decoded(root, monkeypatch) == []
    os.symlink(root, tmp_path / "link")
    assert decoded(tmp_path / "link", monkeypatch) == []


def test_names_in_any_alphabet(grow: Grow, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["a b", "quote's \"", "日本", "line\nbreak", "*[x]?"]
    root = grow(dict.fromkeys(names, 2)).rename(cache.parent / f"{cache.name} '\n目.* ")
    (root / "日本/0.png").rename(root / "日本/Ω\n'\".png")
    shutil.copy(root / "日本/1.png", os.fsencode(root / "日本") + b"/\xff.png")
    plain = arrays(root, cache=False)["train"]
    for _ in range(2):
        for cached, other in zip(arrays(root)["train"], plain, strict=True):
            assert torch.equal(cached, other)
    assert len(plain[0]) == 11
    assert decoded(root, monkeypatch) == []
    assert len(stores(cache)) == 1


def test_where_the_cache_is(grow: Grow, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cache_folder() == cache
    assert cache_folder("~/x") == Path.home() / "x"
    monkeypatch.setenv("TORCHLIN_CACHE", "")
    assert cache_folder().name == "torchlin"
    arrays(grow({"cat": 2, "dog": 3}), cache_dir=str(tmp_path / "deep" / "er"))
    assert len(stores(tmp_path / "deep" / "er")) == 1
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_used(grow: Grow, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/: the cache folder cannot be used .*cache_dir or TORCHLIN_CACHE, or"):
        arrays(grow({"cat": 2, "dog": 3}), cache_dir=str(tmp_path / "file"))


@pytest.mark.slow
def test_killed_while_building(grow: Grow, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow({"cat": 150, "dog": 150})
    (process,) = started(root, 1)
    while not list(cache.glob("*.building-*/pixels.u8")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (left,) = stores(cache)
    assert ".building-" in left.name
    assert len(decoded(root, monkeypatch)) == 300
    (folder,) = stores(cache)
    assert ".building-" not in folder.name
    assert torch.equal(arrays(root)["train"][0], arrays(root, cache=False)["train"][0])


@pytest.mark.slow
def test_two_processes_build_one_store(grow: Grow, cache: Path) -> None:
    root = grow({"cat": 100, "dog": 100})
    processes = started(root, 2)
    results = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    total = int(arrays(root, cache=False)["train"][0].long().sum())
    assert [out.splitlines()[-1] for out, _ in results] == [f"180 {total}"] * 2
    waited = [err.count("another process is building this store; waiting for it") for _, err in results]
    assert sorted(waited) == [0, 1]
    assert len(stores(cache)) == 1


def test_disk_full(grow: Grow, cache: Path) -> None:
    resource = pytest.importorskip("resource")
    root = grow({"cat": 100, "dog": 100})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        # A limit on the size of a file is the nearest that a test can come to a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        with pytest.raises(DataError) as caught:
            arrays(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    text = str(caught.value)
    assert text.startswith(f"{cache}/: no room for the decoded images, which need 0.0 MB (")
    assert text.endswith(
        "choose another folder with cache_dir or TORCHLIN_CACHE, or decode every batch anew with cache=False"
    )
    assert stores(cache) == []
    assert len(arrays(root)["train"][0]) == 200


@pytest.mark.parametrize("reserves", [True, False])
def test_disk_full_shows_early_or_when_writing(
    grow: Grow, cache: Path, reserves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    root = grow({"cat": 2, "dog": 2})
    if reserves:
        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
        monkeypatch.setattr(decoding, "decode_image", lambda *_: pytest.fail("decoded although the disk is full"))
    else:
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        arrays(root)
    assert stores(cache) == []


def spoil(root: Path) -> list[str]:
    """Put one of each kind of bad file into `root`; return their names in order."""
    folder = root / "cat"
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (4, 3, 3), dtype=np.uint8)).save(folder / "half.jpg")
    os.truncate(folder / "half.jpg", (folder / "half.jpg").stat().st_size // 2)
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("no image")
    os.symlink(folder / "nowhere.png", folder / "dangling.png")
    (folder / "folder.jpg").mkdir()  # a folder is no bad file, whatever its name
    return ["cat/dangling.png", "cat/empty.png", "cat/half.jpg", "cat/text.jpg"]


@pytest.mark.parametrize("cached", [True, False])
def test_bad_files_stop_the_run(grow: Grow, cache: Path, cached: bool) -> None:
    root = grow({"cat": 3, "dog": 3})
    bad = spoil(root)
    for _ in range(2):
        with pytest.raises(DataError) as caught:
            arrays(root, cache=cached)
        lines = str(caught.value).splitlines()
        assert lines[0] == f"{root}/: 4 of 10 images cannot be read; repair or remove these files"
        assert [line.strip().split(": ")[0] for line in lines[1:]] == [str(root / name) for name in bad]
        assert not cached or stores(cache) == []


@pytest.mark.parametrize("cached", [True, False])
def test_bad_files_are_left_out(grow: Grow, cached: bool) -> None:
    root = grow({"cat": 3, "dog": 70})
    clean = arrays(root, cache=False)["train"]
    bad = spoil(root)
    for _ in range(2):
        module = ImageFolderDataModule(str(root), on_error="skip", cache=cached)
        assert module.skipped_files == []
        with pytest.warns(
            UserWarning, match=r"left out 4 of 77 images that cannot be read, such as .*dangling\.png: No"
        ):
            module.setup("fit")
        assert module.skipped_files == bad
        for a, b in zip(in_memory(module), clean, strict=True):
            assert torch.equal(a, b)


def test_a_store_without_the_bad_files_is_not_one_with_all(
    grow: Grow, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = grow({"cat": 3, "dog": 3})
    (root / "cat" / "bad.png").touch()
    with pytest.warns(UserWarning, match="left out 1 of 7"):
        arrays(root, on_error="skip")
    with monkeypatch.context() as patch:  # the stored list is enough to stop
        patch.setattr(decoding, "decode_image", lambda *_: pytest.fail("decoded again"))
        with pytest.raises(DataError, match=r"1 of 7 images cannot be read; repair or remove .*bad\.png: empty file"):
            arrays(root)
    shutil.copy(root / "cat/0.png", root / "cat/bad.png")
    assert len(decoded(root, monkeypatch, on_error="skip")) == 7
    assert len(stores(cache)) == 1


def test_a_file_that_was_left_out_and_can_be_read_now(grow: Grow, monkeypatch: pytest.MonkeyPatch) -> None:
    root = grow({"cat": 3, "dog": 3})
    Image.new("L", (20, 20)).save(root / "cat" / "big.png")
    with pytest.warns(
        UserWarning, match=r"big\.png: cannot be decoded \(Image size \(400 pixels\) exceeds limit of 399"
    ):
        assert len(arrays(root, image_size=2, max_pixels=399, on_error="skip")["train"][0]) == 6
    assert len(decoded(root, monkeypatch, image_size=2, max_pixels=400, on_error="skip")) == 7
    assert decoded(root, monkeypatch, image_size=2) == []


def test_a_class_of_which_nothing_is_left(grow: Grow) -> None:
    root = grow({"train/cat": 3, "train/dog": 1, "test/dog": 1})
    (root / "train/dog/0.png").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="left out"),
        pytest.raises(DataError, match="no image of class 'dog' can be re"),
    ):
        arrays(root, on_error="skip")


def test_an_image_of_another_size_leaves_no_store(grow: Grow, cache: Path) -> None:
    root = grow({"cat": 3, "dog": 3})
    Image.new("RGB", (9, 9)).save(root / "dog" / "1.png")
    with pytest.raises(DataError, match=r"1\.png: image is 9×9 pixels"):
        arrays(root, on_error="skip")
    assert stores(cache) == []


def test_bad_arguments(grow: Grow) -> None:
    root = str(grow({"cat": 1, "dog": 1}))
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'skip', got 'ignore'"):
        ImageFolderDataModule(root, on_error="ignore")
    with pytest.raises(ValueError, match="max_pixels must be an integer of at least 1, got 0"):
        ImageFolderDataModule(root, max_pixels=0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_reading_a_large_store_takes_no_memory_of_its_own(tmp_path: Path, cache: Path) -> None:
    side, count = 1000, 100
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (side, side), (9, 9, 9)).save(tmp_path / "photos" / name / "0.png")
        for i in range(1, count // 2):
            shutil.copy(tmp_path / "photos" / name / "0.png", tmp_path / "photos" / name / f"{i}.png")

    def own_memory() -> int:
        status = Path("/proc/self/status").read_text().split("RssAnon:")[1]
        return int(status.split()[0]) * 1024

    module = ImageFolderDataModule(str(tmp_path / "photos"), val_fraction=0)
    before = own_memory()
    module.setup("fit")
    assert sum(int(x.sum()) for x, _ in zip(*[module._arrays["train"].inputs.split(10)] * 2, strict=True)) == (
        9 * 3 * side * side * count
    )
    assert own_memory() - before < 100e6
    assert (stores(cache)[0] / "pixels.u8").stat().st_size == 3 * side * side * count


@pytest.mark.skipif(sys.platform != "linux", reason="sparse files and overcommitting as on Linux")
def test_a_store_larger_than_memory_can_be_mapped(tmp_path: Path) -> None:
    shape = (10_000_000, 3, 64, 64)
    with (tmp_path / "pixels.u8").open("wb") as file:
        try:
            file.truncate(int(np.prod(shape, dtype=np.int64)))
        except OSError:
            pytest.skip("no sparse files here")
    pixels = store.mapped(tmp_path / "pixels.u8", shape, torch.uint8)
    assert pixels.shape == shape
    assert int(pixels[-1].sum()) == 0
