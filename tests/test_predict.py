"""Labelling image files: the table, its order, and files that are none."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from training import write_photos, write_table

from torchlin import LinearHead, load_head
from torchlin.cli import main, messages
from torchlin.data import DataError, decoding
from torchlin.predict import predict_images

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*")

NAMES = ['cat, "big"', "dog"]  # names that a CSV has to quote
Predict = Callable[..., tuple[int, list[dict[str, str]], str]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos/ and a run for each of three losses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("predict"))
        write_photos(Path("photos"), dict.fromkeys(NAMES, 12))
        for loss in ("logistic", "softmax", "hinge"):
            options = ["--data.root=photos", f"--model.loss={loss}", f"--run=runs/{loss}", "--trainer.max_epochs=3"]
            assert main(["fit", *options]) == 0
        return Path.cwd()


@pytest.fixture
def predict(trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Predict:
    monkeypatch.chdir(trained)

    def call(*arguments: str | Path) -> tuple[int, list[dict[str, str]], str]:
        capsys.readouterr()
        code = main(["predict", *(str(word) for word in arguments)])
        out, err = capsys.readouterr()
        return code, list(csv.DictReader(io.StringIO(out))), err

    return call


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def photos(*names: str) -> list[Path]:
    return [Path("photos") / name for name in names]


def test_rows_come_in_the_order_of_the_files(predict: Predict) -> None:
    files = photos("dog/3.png", f"{NAMES[0]}/10.png", "dog/1.png", f"{NAMES[0]}/2.png")
    code, rows, err = predict("--run=softmax", *files)
    assert code == 0
    assert not err
    assert list(rows[0]) == ["file", "label", "score", "probability"]
    assert [row["file"] for row in rows] == [str(path) for path in files]
    assert [row["label"] for row in rows] == [path.parent.name for path in files]


def test_scores_and_probabilities_are_those_of_the_head(predict: Predict) -> None:
    files = photos("dog/3.png", f"{NAMES[0]}/10.png")
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files])
    for loss in ("softmax", "logistic", "hinge"):
        head = load_head(Path("runs") / loss)
        scores = head(pixels).detach()
        if loss == "logistic":
            scores = torch.cat((-scores, scores), 1)
            expected = torch.sigmoid(scores).amax(1)  # P(y = 1) = σ(z) and P(y = 0) = σ(−z)
        else:
            expected = scores.softmax(1).amax(1)
        code, rows, _ = predict("--run", loss, "--scores", *files)
        assert code == 0
        assert list(rows[0]) == ["file", "label", "score", "probability", *NAMES]
        for row, score, probability in zip(rows, scores, expected, strict=True):
            assert float(row["score"]) == pytest.approx(float(score.max()), rel=1e-4)
            assert [float(row[name]) for name in NAMES] == pytest.approx(score.tolist(), rel=1e-4)
            assert row["label"] == NAMES[int(score.argmax())]
            if loss == "hinge":
                assert row["probability"] == ""
            else:
                assert float(row["probability"]) == pytest.approx(float(probability), rel=1e-4)


def test_a_folder_stands_for_its_images_by_name(predict: Predict, tmp_path: Path) -> None:
    for name in ("b.png", "a.png", "c.png"):
        Image.new("RGB", (4, 3), "white").save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    code, rows, _ = predict("--run=softmax", tmp_path, *photos("dog/0.png"))
    assert code == 0
    assert [Path(row["file"]).name for row in rows] == ["a.png", "b.png", "c.png", "0.png"]


def test_the_newest_run_is_the_default_and_batches_change_nothing(predict: Predict) -> None:
    files = photos(*(f"dog/{i}.png" for i in range(5)))
    default = predict(*files)[1]
    assert default == predict("--run=hinge", *files)[1]
    assert default == predict("--batch_size=2", *files)[1]


def test_output_goes_to_a_file(predict: Predict, tmp_path: Path) -> None:
    code, rows, err = predict("--run=softmax", "--output", tmp_path / "out.csv", *photos("dog/0.png"))
    assert code == 0
    assert rows == []
    assert "1 images labelled" in err
    with (tmp_path / "out.csv").open(newline="", encoding="utf-8") as stream:
        assert [row["label"] for row in csv.DictReader(stream)] == ["dog"]
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_a_resized_run_resizes_what_it_labels(trained: Path, predict: Predict, tmp_path: Path) -> None:
    options = ["--data.root=photos", "--data.image_size=3", "--data.color=gray", f"--run={tmp_path / 'small'}"]
    assert main(["fit", *options, "--trainer.max_epochs=2"]) == 0
    Image.new("RGB", (90, 60), "white").save(tmp_path / "large.png")
    code, rows, _ = predict("--run", tmp_path / "small", tmp_path / "large.png")
    assert code == 0
    assert rows[0]["label"] in NAMES


def _refused(result: tuple[int, list[dict[str, str]], str], *words: str) -> None:
    code, rows, err = result
    assert code == 2
    assert rows == []
    assert err.startswith("torchlin: error: ")
    assert err.count("\n") == 1
    for word in words:
        assert word in err


def test_bad_files_write_nothing(predict: Predict, tmp_path: Path) -> None:
    good, bad, large = *photos("dog/0.png"), tmp_path / "bad.png", tmp_path / "large.png"
    bad.write_text("no image")
    Image.new("RGB", (9, 9)).save(large)
    out = tmp_path / "out.csv"
    for arguments in ([], ["--output", out], ["--batch_size=1", "--output", out]):
        _refused(predict("--run=softmax", *arguments, good, bad), "bad.png", "not an image")
        _refused(predict("--run=softmax", *arguments, good, large), "large.png", "9×9", "4×3")
        _refused(predict("--run=softmax", *arguments, good, tmp_path / "none.png"), "none.png", "no such file")
    (tmp_path / "empty").mkdir()
    _refused(predict("--run=softmax", tmp_path / "empty"), "empty: no images found")
    assert not out.exists()

    bad2 = tmp_path / "bad2.png"
    bad2.write_text("")
    code, rows, err = predict("--run=softmax", bad, good, bad2)  # a list of files may take several lines
    assert (code, rows) == (2, [])
    assert "bad.png" in err
    assert "bad2.png" in err


@pytest.fixture
def mixed(trained: Path, tmp_path: Path) -> Path:
    """A folder of 1 good image, a bad one, 70 good ones, and three bad ones: empty, of another size, no image."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i in range(75):
        Image.new("RGB", (4, 3), (i, 0, 255 - i)).save(folder / f"{i:02}.png")
    (folder / "01.png").write_text("no image")
    (folder / "72.png").write_bytes(b"")
    Image.new("RGB", (9, 9)).save(folder / "73.png")
    (folder / "74.png").write_text("no image")
    return folder


BAD = ("01.png", "72.png", "73.png", "74.png")


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1024])
def test_all_bad_files_of_all_batches_are_listed(
    predict: Predict, mixed: Path, tmp_path: Path, batch_size: int
) -> None:
    out = tmp_path / "out.csv"
    code, rows, err = predict("--run=softmax", f"--batch_size={batch_size}", "--output", out, mixed)
    assert (code, rows) == (2, [])
    lines = err.splitlines()
    assert lines[0] == "torchlin: error: images: 4 of 75 images cannot be labelled; repair or remove these files"
    assert [Path(line.strip().split(": ")[0]).name for line in lines[1:]] == list(BAD)
    assert not out.exists()


@pytest.mark.parametrize("batch_size", [1, 7, 64, 1024])
def test_bad_files_may_be_skipped(predict: Predict, mixed: Path, batch_size: int) -> None:
    good = [path for path in sorted(mixed.iterdir()) if path.name not in BAD]
    expected = predict("--run=softmax", "--scores", *good)[1]
    arguments = ["--run=softmax", "--scores", "--on_error=skip", f"--batch_size={batch_size}", mixed]
    with pytest.warns(UserWarning, match="left out 4 of 75 images that cannot be labelled\n") as caught:
        code, rows, _ = predict(*arguments)
    assert code == 0
    assert [row["file"] for row in rows] == [str(path) for path in good]
    for row, other in zip(rows, expected, strict=True):
        assert row["label"] == other["label"]
        for name in NAMES:
            assert float(row[name]) == pytest.approx(float(other[name]), rel=1e-4)
    named = str(caught[0].message).splitlines()[1:]
    assert [Path(line.strip().split(": ")[0]).name for line in named] == list(BAD)


def test_skipped_files_are_named_on_standard_error(trained: Path, mixed: Path) -> None:
    command = [sys.executable, "-m", "torchlin", "predict", "--run=runs/softmax", "--on_error=skip", str(mixed)]
    done = subprocess.run(command, cwd=trained, env=environment(), capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1 + 71
    assert done.stderr.startswith("torchlin: warning: left out 4 of 75 images that cannot be labelled\n")
    for name in BAD:
        assert str(mixed / name) in done.stderr


LOADED = """
import sys
import torchlin.predict
from torchlin.cli import main
code = main(sys.argv[1:])
print(code, *sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(("arguments", "code"), [("good", 0), ("nowhere.png", 2), ("--score good", 2)])
def test_nothing_heavy_is_loaded(trained: Path, tmp_path: Path, arguments: str, code: int) -> None:
    """Neither for labels nor for messages: what training needs takes longer to load than most folders to label."""
    (tmp_path / "good").mkdir()
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (4, 3), "white").save(tmp_path / "good" / name)
    rest = ["predict", f"--run={trained / 'runs' / 'softmax'}", "--output=out.csv", *arguments.split()]
    command = [sys.executable, "-c", LOADED, *rest]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert {str(code), "torch"} <= loaded
    heavy = {"lightning", "pytorch_lightning", "torchvision", "torchmetrics", "jsonargparse", "matplotlib", "sklearn"}
    assert not heavy & loaded


def test_nothing_but_bad_files_is_an_error(predict: Predict, tmp_path: Path) -> None:
    (tmp_path / "bad.png").write_text("no image")
    _refused(predict("--run=softmax", "--on_error=skip", tmp_path), "none of 1 images can be labelled", "not an image")
    _refused(predict("--run=softmax", "--on_error=skip", tmp_path / "none.png"), "none.png: no such file")


def test_max_pixels_raises_and_lowers_the_limit(predict: Predict, monkeypatch: pytest.MonkeyPatch) -> None:
    file = photos("dog/0.png")[0]
    _refused(predict("--run=softmax", "--max_pixels=11", file), "12 pixels", "limit of 11", "raise max_pixels")
    assert predict("--run=softmax", "--max_pixels=12", file)[0] == 0
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    _refused(predict("--run=softmax", file), "limit of 5")
    assert predict("--run=softmax", "--max_pixels=12", file)[0] == 0


def test_no_more_than_a_batch_is_in_memory(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(500):
        Image.new("RGB", (4, 3), (i % 256, 0, 0)).save(tmp_path / f"{i:03}.png")
    head = load_head(trained / "runs" / "softmax")
    decoded, ahead, sizes = [0], [], []
    decode, score = decoding.decode_image, head.forward

    def counted(*arguments: Any) -> Any:
        decoded[0] += 1
        return decode(*arguments)

    def seen(images: torch.Tensor) -> torch.Tensor:
        ahead.append(decoded[0] - sum(sizes))
        sizes.append(len(images))
        return score(images)

    monkeypatch.setattr(decoding, "decode_image", counted)
    monkeypatch.setattr(decoding, "available_cores", lambda: 1)
    monkeypatch.setattr(decoding, "_CHUNK", 4)
    monkeypatch.setattr(head, "forward", seen)
    rows = predict_images(head, [tmp_path], batch_size=30)
    assert [row[0] for row in rows] == [str(tmp_path / f"{i:03}.png") for i in range(500)]
    assert sizes == [30] * 16 + [20]
    assert max(ahead) <= 30 + (4 + 2) * 4  # a batch, and the chunks of the decoder


def test_names_are_those_of_pathlib(predict: Predict, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(trained / "photos" / "dog")
    code, rows, _ = predict("--run", trained / "runs" / "softmax", ".")
    assert code == 0
    assert [row["file"] for row in rows] == sorted(path.name for path in Path().iterdir())


def test_an_existing_output_survives_a_failure(predict: Predict, tmp_path: Path) -> None:
    out = tmp_path / "out.csv"
    out.write_text("mine")
    _refused(predict("--run=softmax", "--output", out, tmp_path / "none.png"), "none.png")
    assert out.read_text() == "mine"
    target = tmp_path / "no folder" / "out.csv"
    _refused(predict("--run=softmax", "--output", target, *photos("dog/0.png")), str(target), "cannot be written")


def test_options_that_are_none(predict: Predict) -> None:
    _refused(predict(), "IMAGES")
    _refused(predict("--score", "x.png"), "predict has no option --score", "did you mean '--scores'")
    _refused(predict("--batch_size=0", *photos("dog/0.png")), "batch_size is at least 1, got 0")
    _refused(predict("--batch_size=many", *photos("dog/0.png")), "batch_size", "many")
    _refused(predict("--max_pixels=0", *photos("dog/0.png")), "max_pixels is at least 1, got 0")
    _refused(predict("--on_error=ignore", *photos("dog/0.png")), "on_error", "ignore", "stop", "skip")
    _refused(predict("--run=softmx", *photos("dog/0.png")), "softmx: no such run folder", "did you mean 'softmax'")


def test_a_mistyped_option_suggests_any_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--help"]) == 0
    shown = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    assert shown == set(messages._known_options("predict"))
    assert main(["predict", "--max_pixel=3", "x.png"]) == 2
    assert "did you mean '--max_pixels'" in capsys.readouterr().err


def test_a_head_of_a_table_labels_no_images(predict: Predict, tmp_path: Path) -> None:
    table = write_table(tmp_path / "taste.csv")
    assert main(["fit", "--data.path", str(table), f"--run={tmp_path / 'run'}", "--trainer.max_epochs=1"]) == 0
    _refused(predict("--run", tmp_path / "run", *photos("dog/0.png")), "not trained on images")


def test_the_function_takes_a_head(trained: Path) -> None:
    head = load_head(trained / "runs" / "logistic")
    rows = predict_images(head, [trained / "photos" / "dog" / "0.png"])
    assert len(rows) == 1
    assert rows[0][1] == "dog"
    assert predict_images(head, []) == []
    with pytest.raises(ValueError, match="on_error must be 'stop' or 'skip', got 'ignore'"):
        predict_images(head, [], on_error="ignore")
    with pytest.raises(ValueError, match="not trained on images"):
        predict_images(LinearHead(3, 2), [])
    with pytest.raises(DataError, match=r"nowhere.png: no such file or folder"):
        predict_images(head, ["nowhere.png"])
