"""The feature store: computed once, resumed after any death with the same bytes, and every way it can go wrong."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from torchlin.data import DataError
from torchlin.data.cache import list_stores
from torchlin.data.feature_store import Images, Prepared, Stored, load_features

PIXELS = torch.arange(50 * 12, dtype=torch.int64).mul(37).remainder(256).to(torch.uint8).view(50, 3, 2, 2)
TARGETS = torch.arange(50) % 3


def flat(images: Tensor) -> Tensor:
    return images.flatten(1).float() / 7


def prepared(extractor: Callable[[Tensor], Tensor] = flat, extra: Mapping[str, Tensor] | None = None) -> Any:
    images = Images(PIXELS, TARGETS, lambda row: f"photos/{row}.png")
    return lambda kept: Prepared(images, extractor, extra or {})


def load(cache: Path, prepare: Any = None, **options: Any) -> Stored:
    facts = {"source": "photos", "backbone": options.pop("backbone", "abc")}
    return load_features("photos-train", facts, prepare or prepared(), cache, batch_size=8, **options)


def never(kept: Mapping[str, Tensor]) -> Prepared:
    raise AssertionError("the images were asked for")


def test_features_are_computed_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    first = load(tmp_path, report=lambda done, total: seen.append((done, total)))
    assert (first.computed, len(seen), seen[-1]) == (50, 7, (50, 50))
    torch.testing.assert_close(first.features, flat(PIXELS), rtol=0, atol=0)
    assert torch.equal(first.targets, TARGETS)
    second = load(tmp_path, never)
    assert second.computed == 0
    assert torch.equal(second.features, first.features)
    assert load(tmp_path, backbone="other").computed == 50
    assert load(tmp_path, dtype="bfloat16").features.dtype == torch.bfloat16
    infos = list_stores(tmp_path)
    assert [(info.source, info.images) for info in infos] == [("photos", 50)] * 3


def test_what_is_to_be_kept_is_found_again(tmp_path: Path) -> None:
    load(tmp_path, prepared(extra={"filters": torch.ones(3)}))
    assert torch.equal(load(tmp_path, never).extra["filters"], torch.ones(3))


def test_a_damaged_store_is_computed_anew(tmp_path: Path) -> None:
    load(tmp_path)
    (folder,) = (p for p in tmp_path.iterdir() if p.name.startswith("photos"))
    with (folder / "features.bin").open("ab") as file:
        file.write(b"0")
    assert load(tmp_path).computed == 50
    (folder / "manifest.json").write_text("{")
    assert load(tmp_path).computed == 50
    assert load(tmp_path, never).computed == 0


def test_an_extraction_that_fails_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchlin.data.feature_store._SAVE_EVERY", 0.0)
    calls: list[int] = []

    def failing(images: Tensor) -> Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise OSError("the disk went away")
        return flat(images)

    with pytest.raises(DataError, match="the disk went away"):
        load(tmp_path, prepared(failing, {"filters": torch.zeros(2)}))
    kept: list[Mapping[str, Tensor]] = []

    def again(known: Mapping[str, Tensor]) -> Prepared:
        kept.append(known)
        made: Prepared = prepared()(known)
        return made

    found = load(tmp_path, again)
    assert found.computed == 50 - 3 * 8
    assert torch.equal(kept[0]["filters"], torch.zeros(2))
    assert torch.equal(found.features, flat(PIXELS))


def test_features_that_are_not_finite_name_the_image(tmp_path: Path) -> None:
    def bad(images: Tensor) -> Tensor:
        rows = flat(images)
        rows[images.flatten(1)[:, 0] == PIXELS[21].flatten()[0]] = torch.inf
        return rows

    with pytest.raises(DataError, match=r"photos/21.png: the backbone's features of this image are not finite"):
        load(tmp_path, prepared(bad))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, error: Exception) -> None:
    sizes: list[int] = []

    def small(images: Tensor) -> Tensor:
        if len(images) > 2:
            raise error
        sizes.append(len(images))
        return flat(images)

    with pytest.warns(UserWarning, match="does not fit in memory: going on with") as caught:
        found = load(tmp_path, prepared(small))
    assert [str(w.message).split("with ")[-1] for w in caught] == ["4 at a time", "2 at a time"]
    assert max(sizes) == 2
    assert torch.equal(found.features, flat(PIXELS))

    def never_fits(images: Tensor) -> Tensor:
        raise error

    with pytest.warns(UserWarning, match="going on with 1 at a time"), pytest.raises(type(error)):
        load(tmp_path / "other", prepared(never_fits))


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path: Path) -> None:
    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        load(tmp_path, prepared(broken))
    with pytest.raises(ValueError, match=r"returns \(8, 3, 4\) for 8 images"):
        load(tmp_path, prepared(lambda images: images.flatten(2).float()))
    with pytest.raises(ValueError, match="dtype is one of float32, bfloat16, got 'int8'"):
        load(tmp_path, dtype="int8")


def test_a_cache_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/: the cache folder cannot be used .* choose another with cache_dir"):
        load(tmp_path / "file")


SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from data import test_data_feature_store as t
import torchlin.data.feature_store as s
s._SAVE_EVERY = {every}
calls = 0
def dying(images):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return t.flat(images)
t.load(Path({cache!r}), t.prepared(dying, {{"filters": torch.ones(2)}}))
"""


def contents(cache: Path) -> dict[str, bytes]:
    found = {}
    for path in sorted(cache.rglob("*")):
        if path.is_file() and ".locks" not in path.parts:
            content = path.read_bytes()
            if path.name == "manifest.json":
                content = json.dumps({**json.loads(content), "created": ""}).encode()
            found[str(path.relative_to(cache))] = content
    return found


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("every", [0.0, 100.0])
@pytest.mark.parametrize("at", [1, 2, 5, 7])
def test_sigkill_leaves_a_store_that_goes_on_to_the_same_bytes(tmp_path: Path, at: int, every: float) -> None:
    tests = str(Path(__file__).parents[1])
    script = SCRIPT.format(tests=tests, at=at, every=every, cache=str(tmp_path / "killed"))
    died = subprocess.run([sys.executable, "-c", script], check=False, timeout=120)
    assert died.returncode == -signal.SIGKILL
    extra = {"filters": torch.ones(2)}
    found = load(tmp_path / "killed", prepared(extra=extra))
    assert found.computed == 50 - (8 * (at - 1) if every == 0 else 0)
    load(tmp_path / "whole", prepared(extra=extra))
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
