"""Labelling image files: the table, its order, and files that are none."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training import write_photos, write_table

from torchlin import LinearHead, load_head
from torchlin.cli import main
from torchlin.data import DataError
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
    _refused(predict("--run=softmx", *photos("dog/0.png")), "softmx: no such run folder", "did you mean 'softmax'")


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
    with pytest.raises(ValueError, match="not trained on images"):
        predict_images(LinearHead(3, 2), [])
    with pytest.raises(DataError, match=r"nowhere.png: no such file or folder"):
        predict_images(head, ["nowhere.png"])
