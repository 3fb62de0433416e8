"""Linear probes: nothing is chosen on test images, nothing is computed twice, and the whole is one module."""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nets
import numpy as np
import pytest
import torch
from commands import Run, refused
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from training import write_photos, write_table

from torchlin import L1, Backbone, LinearProbe, Preprocess, ProbeResult, SoftmaxLoss, attach_head, load_head
from torchlin.data import DataError, DigitsDataModule, FeaturesDataModule, ImageFolderDataModule
from torchlin.probe import Recipe, load_backbone, load_probe

LITTLE = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
NAMES = ("ape", "bee", "cat", "dog", "eel", "fox")


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stripes of another direction and colour for every class, and noise: 12 × 11 pixels."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:11, :12]
    for split, count in (("train", 20), ("test", 5)):
        for label, name in enumerate(NAMES):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                angle = np.pi * (label % 3) / 3
                wave = np.sin(2.2 * (np.cos(angle) * x + np.sin(angle) * y) + rng.uniform(0, 6))
                colour = np.array([1.0, 0.3, -0.5] if label < 3 else [-0.5, 0.3, 1.0])
                pixels = 128 + 60 * wave[..., None] * colour + 10 * colour + 15 * rng.normal(size=(11, 12, 3))
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


def backbone(seed: int = 0) -> Backbone:
    torch.manual_seed(seed)
    return Backbone(nets.Small(), LITTLE)


def probed(photos: Path, cache: Path, **options: Any) -> ProbeResult:
    data = ImageFolderDataModule(str(photos), val_fraction=0.25, cache_dir=str(cache))
    options = {"num": 6, "tol": 1e-5, **options}
    return LinearProbe(options.pop("backbone", None) or backbone(), cache_dir=str(cache), **options).fit(data)


def pixels(photos: Path, split: str = "test") -> Tensor:
    """All images of a split, class after class."""
    files = [path for name in NAMES for path in sorted((photos / split / name).iterdir())]
    return torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in files])


def test_a_probe_is_the_certified_optimum_of_what_was_chosen(photos: Path, tmp_path: Path) -> None:
    result = probed(photos, tmp_path)
    assert result.sizes == {"train": 90, "val": 30, "test": 30}
    assert result.computed == 150
    path = result.choice.path
    assert path is not None
    assert path.chosen is not None
    assert all(s.gap <= 1e-5 for s in (*path.solutions, path.chosen))
    # An oracle for the refit: scikit-learn on all training features, standardised, at the λ chosen.
    network = backbone()
    x = network(pixels(photos, "train")).double().numpy()
    y = np.repeat(np.arange(6), 20)
    mean, std = x.mean(0), x.std(0)
    oracle = LogisticRegression(C=1 / (2 * 120 * result.penalty.strength), tol=1e-10, max_iter=10_000)  # type: ignore[union-attr]
    oracle.fit((x - mean) / std, y)
    held = network(pixels(photos)).double().numpy()
    with torch.no_grad():
        ours = result.head(torch.from_numpy(held).float()).softmax(1)
    np.testing.assert_allclose(ours.numpy(), oracle.predict_proba((held - mean) / std), atol=0.02)
    right = (oracle.predict((held - mean) / std) == np.repeat(np.arange(6), 5)).mean()
    assert abs(result.metrics["test_accuracy"] - right) <= 1 / 30
    assert set(result.per_class) == set(NAMES)
    assert result.metrics["test_top5_accuracy"] >= result.metrics["test_accuracy"]


def test_the_choice_does_not_look_at_test_images(photos: Path, tmp_path: Path) -> None:
    """With the test images gone or changed, the same head is chosen and trained."""
    import shutil

    first = probed(photos, tmp_path / "a")
    other = tmp_path / "photos"
    shutil.copytree(photos / "train", other / "train")
    without = probed(other, tmp_path / "b")
    assert torch.equal(first.head.weight, without.head.weight)
    assert torch.equal(first.head.bias, without.head.bias)
    assert first.choice.chosen == without.choice.chosen
    assert "test_accuracy" not in without.metrics
    assert without.confusion is None


def test_a_second_probe_decodes_nothing_and_calls_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = probed(photos, tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was decoded, or the backbone called")

    for name in ("images.decode_image", "store.decode_chunks", "store.decode_image", "streaming.decode_image"):
        monkeypatch.setattr(f"torchlin.data.{name}", refuse)
    monkeypatch.setattr("torchlin.data.images._decode_plain", refuse)
    monkeypatch.setattr("torchlin.data.images._decode_any", refuse)
    monkeypatch.setattr(nets.Small, "forward", refuse)
    second = probed(photos, tmp_path)
    assert second.computed == 0
    assert torch.equal(second.head.weight, first.head.weight)
    assert second.metrics == first.metrics


def test_other_weights_and_changed_images_are_computed_anew(photos: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "photos"
    shutil.copytree(photos, copy)
    assert probed(copy, tmp_path / "cache").computed == 150
    assert probed(copy, tmp_path / "cache", backbone=backbone(1)).computed == 150
    changed = copy / "train" / "ape" / "0.png"
    Image.new("RGB", (12, 11)).save(changed)
    assert probed(copy, tmp_path / "cache").computed == 120  # the training images alone


def test_folds_and_l1_and_class_weights(photos: Path, tmp_path: Path) -> None:
    result = probed(photos, tmp_path, folds=3, penalty=L1, class_weight="balanced", num=4)
    assert result.choice.chosen_on == "3 folds"
    assert result.sizes == {"train": 120, "val": 0, "test": 30}
    assert bool((result.head.weight == 0).any())
    assert result.loss.weight is not None


def test_a_validation_split_of_the_data_is_chosen_on(tmp_path: Path) -> None:
    counts = {f"{split}/{name}": n for split, n in (("train", 12), ("val", 6), ("test", 3)) for name in NAMES[:2]}
    root = write_photos(tmp_path / "photos", counts, (8, 7))
    result = probed(root, tmp_path / "cache")
    assert result.sizes == {"train": 24, "val": 12, "test": 6}
    assert result.trained_on == ["train", "val"]


def test_sgd_trains_a_bank_and_the_best_head_again(photos: Path, tmp_path: Path) -> None:
    recipe = Recipe(learning_rates=(1e-4, 0.3, 1e38), epochs=15, batch_size=32)
    with pytest.warns(RuntimeWarning, match="1 of 3 heads diverged"):
        result = probed(photos, tmp_path, method="sgd", recipe=recipe)
    assert "of 3 heads, of which 1 diverged" in result.choice.chosen
    assert [row["diverged"] for row in result.choice.rows] == [0, 0, 1]
    assert result.metrics["val_accuracy"] > 0.6
    assert result.metrics["test_accuracy"] > 0.6
    assert bool(result.head.weight.isfinite().all())


def test_patches_are_learned_from_the_training_images_and_kept(photos: Path, tmp_path: Path) -> None:
    def network(patches: int = 8) -> Backbone:
        return load_backbone("PatchFeatures", patches=patches)

    first = probed(photos, tmp_path, backbone=network())
    fresh = network()
    second = probed(photos, tmp_path, backbone=fresh)
    assert second.computed == 0
    assert torch.equal(fresh(pixels(photos)), first.backbone(pixels(photos)))
    assert torch.equal(second.head.weight, first.head.weight)
    assert probed(photos, tmp_path, backbone=network(9)).computed == 150


@pytest.fixture(scope="module")
def result(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> ProbeResult:
    return probed(photos, tmp_path_factory.mktemp("cache"))


def test_the_attached_model_gives_the_probes_scores(photos: Path, result: ProbeResult) -> None:
    x = pixels(photos)
    model = attach_head(result.backbone, result)
    with torch.no_grad():
        expected = result.head(result.backbone(x))
        assert torch.equal(model(model.preprocess(x)), expected)
        again = attach_head(result.backbone, result.head)
        assert torch.equal(again(again.preprocess(x)), expected)
    accuracy = float((expected.argmax(1) == torch.arange(6).repeat_interleave(5)).double().mean())
    assert accuracy == pytest.approx(result.metrics["test_accuracy"])


def test_the_attached_model_trains_and_the_backbone_stays(photos: Path, result: ProbeResult) -> None:
    x, y = pixels(photos), torch.arange(6).repeat_interleave(5)
    before = {name: tensor.clone() for name, tensor in result.backbone.state_dict().items()}
    model = attach_head(result.backbone, result).train()
    assert all(module.training for module in model.modules())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    weight = model.reader.network.stem[0].weight.clone()  # type: ignore[index,union-attr]
    for _ in range(2):
        optimizer.zero_grad()
        SoftmaxLoss()(model(model.preprocess(x)), y).backward()
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(model.reader.network.stem[0].weight, weight)  # type: ignore[index,union-attr]
    for name, tensor in result.backbone.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_the_attached_model_compiles(photos: Path, result: ProbeResult) -> None:
    model = attach_head(result.backbone, result)
    x = model.preprocess(pixels(photos))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["small", "resnet18"])
def test_onnx_runtime_agrees(name: str, photos: Path, result: ProbeResult, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    if name == "small":
        model = attach_head(result.backbone, result)
    else:
        network = load_backbone("resnet18", layer="avgpool", preprocess={**LITTLE.to_info(), "resize": 32})
        model = attach_head(network, probed(photos, tmp_path / "cache", backbone=network))
    x = model.preprocess(pixels(photos)[:3])
    torch.onnx.export(
        model, (x,), tmp_path / "model.onnx", dynamo=True, external_data=False, verbose=False,
        dynamic_shapes={"x": {0: torch.export.Dim("batch")}},
    )  # fmt: skip
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(found), model(x), atol=1e-4, rtol=1e-4)


def test_a_head_of_another_backbone_is_refused(result: ProbeResult, tmp_path: Path) -> None:
    from torchlin import save_head

    info = {"backbone": {**result.backbone.info(), "fingerprint": ""}}
    save_head(result.head, tmp_path, class_names=NAMES, loss="softmax", info=info)
    attach_head(result.backbone, tmp_path)
    with pytest.raises(ValueError, match="trained with pooling='avg', but this backbone has 'max'"):
        attach_head(Backbone(nets.Small(), LITTLE, pooling="max"), tmp_path)
    with pytest.raises(ValueError, match="made by a script, which has to make it again"):
        load_probe(tmp_path)


def test_bad_input_is_named(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"takes a data module of torchlin.data"):
        LinearProbe(backbone()).fit(None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="these data are features"):
        LinearProbe(backbone()).fit(FeaturesDataModule(str(write_table(tmp_path / "table.csv"))))
    with pytest.raises(ValueError, match="give a val_fraction, or folds"):
        LinearProbe(backbone(), cache_dir=str(tmp_path)).fit(ImageFolderDataModule(str(photos), val_fraction=0))
    with pytest.raises(ValueError, match="method is 'solver' or 'sgd', got 'adam'"):
        LinearProbe(backbone(), method="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="recipe is for method='sgd'"):
        LinearProbe(backbone(), recipe=Recipe())
    with pytest.raises(TypeError, match=r"got Small: use torchlin\.Backbone"):
        LinearProbe(nets.Small())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="go with the name of a backbone"):
        LinearProbe(backbone(), layer="stem")
    for options, message in (
        ({"learning_rates": ()}, "learning_rates are positive numbers"),
        ({"strengths": (-1.0,)}, "strengths are numbers ≥ 0"),
        ({"epochs": 0}, "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe(**options)  # type: ignore[arg-type]


def test_an_image_with_features_that_are_no_numbers_is_named(tmp_path: Path) -> None:
    root = write_photos(tmp_path / "photos", {"train/ape": 6, "train/bee": 6}, (8, 7))
    Image.new("RGB", (8, 7)).save(root / "train" / "bee" / "3.png")
    network = Backbone(nets.Nan(), Preprocess(mean=(0.0,) * 3, std=(1.0,) * 3))
    with pytest.raises(DataError, match=r"bee.3.png: the backbone's features of this image are not finite"):
        probed(root, tmp_path / "cache", backbone=network)


# The command line.


def test_probe_and_predict_from_the_command_line(run: Run, photos: Path, tmp_path: Path) -> None:
    words = ("--backbone", "PatchFeatures", "--patches", "60", "--flip", "false", "--data.root", photos, "--num", "6")
    made = run("probe", *words)
    assert made.code == 0, made.err
    assert "chosen on 12 validation samples" in made.out
    assert "150 images through the backbone" in made.out
    folder = Path("runs/photos-PatchFeatures-1")
    info = json.loads((folder / "head.json").read_text())
    assert info["trained_on"] == ["train", "val"]
    assert info["metrics"]["test_accuracy"] > 0.9
    assert {p.name for p in folder.iterdir()} == {
        "backbone.safetensors", "config.yaml", "confusion.png", "head.json", "head.safetensors", "metrics.csv",
        "path.png",
    }  # fmt: skip
    again = run("probe", "--config", folder / "config.yaml")
    assert again.code == 0, again.err
    assert "all features from the cache" in again.out
    second = load_head("runs/photos-PatchFeatures-2")
    assert torch.equal(second.weight, load_head(folder).weight)
    labelled = run("predict", photos / "test" / "cat", "--run", folder)
    assert labelled.code == 0, labelled.err
    rows = [line.split(",") for line in labelled.out.splitlines()[1:]]
    assert [row[1] for row in rows].count("cat") >= 4
    model = load_probe(folder)
    with torch.no_grad():
        scores = model(model.preprocess(pixels(photos)[10:15]))
    assert [float(row[2]) for row in rows] == pytest.approx(scores.amax(1).tolist(), rel=1e-4)
    refused_test = run("test", "--run", folder)
    assert refused_test.code == 2
    assert "is a probe, measured once on the test images" in refused_test.err


def test_a_network_with_a_checkpoint_from_the_command_line(run: Run, photos: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(nets.Small().state_dict(), "small.pth")
    words = ("--backbone", "nets.Small", "--weights", "./small.pth", "--data.root", photos, "--num", "4")
    preprocess = ("--preprocess", "{resize: 9, crop: 8, mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}")
    made = run("probe", *words, *preprocess, "--layer", "stem", "--run", "runs/mine")
    assert made.code == 0, made.err
    config = (Path("runs/mine") / "config.yaml").read_text()
    assert "image_size: 9" in config  # images of any size, decoded as the network wants them
    labelled = run("predict", photos / "test" / "cat", "--run", "runs/mine")
    assert labelled.code == 0, labelled.err
    torch.manual_seed(1)
    torch.save(nets.Small().state_dict(), "small.pth")
    changed = run("predict", photos / "test" / "cat", "--run", "runs/mine")
    assert changed.code == 2
    assert "are no longer those that its head was trained on" in changed.err


def test_sgd_from_the_command_line(run: Run, photos: Path) -> None:
    words = ("--backbone", "PatchFeatures", "--patches", "8", "--data.root", photos, "--head", "sgd")
    made = run("probe", *words, "--recipe.epochs", "3", "--recipe.learning_rates", "[0.01, 0.1]")
    assert made.code == 0, made.err
    assert "of 2 heads" in made.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--backbone", "resnet81"), "unknown backbone 'resnet81' .did you mean 'resnet18'"),
        (("--backbone", "resnet18"), "give preprocess"),
        (("--backbon", "resnet18"), "has no option --backbon .did you mean '--backbone'"),
        (("--pooling", "mean"), "--pooling"),
        (("--head", "adam"), "--head"),
        (("--device", "cuda:99"), "--device cuda:99"),
        (("--patches", "0"), "patches is at least 1"),
        (("--data.root", "nowhere"), "nowhere/: no such folder"),
        (("--recipe.epochs", "x"), "recipe.epochs"),
        (("--preprocess", "{size: 3}"), "no option 'size'"),
    ],
)
def test_wrong_arguments_are_one_line(run: Run, words: tuple[str, ...], message: str) -> None:
    refused(run("probe", *words), message)


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import nets, torch
import torchlin.data.feature_store as s
from torchlin.cli import main
s._SAVE_EVERY = 0.0
forward, calls = nets.Small.forward, 0
def dying(self, x):
    global calls
    calls += 1
    if calls == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, x)
nets.Small.forward = dying
sys.exit(main({words!r}))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
def test_a_killed_probe_goes_on_to_the_same_bytes(photos: Path, tmp_path: Path) -> None:
    tests = str(Path(__file__).parent)
    features: dict[str, dict[str, bytes]] = {}
    for name, deaths in (("whole", (0,)), ("killed", (4, 3, 0))):
        words = [
            "probe", "--backbone", "nets.Small", "--preprocess", "{mean: [0.5, 0.5, 0.5], std: [0.2, 0.2, 0.2]}",
            "--data.root", str(photos), "--num", "4", "--image_batch", "16", "--run", str(tmp_path / name),
        ]  # fmt: skip
        for at in deaths:
            died = subprocess.run(
                [sys.executable, "-c", SCRIPT.format(tests=tests, at=at, words=words)],
                env={**os.environ, "TORCHLIN_CACHE": str(tmp_path / f"{name}-cache")},
                cwd=tmp_path, check=False, timeout=300, capture_output=True, text=True,
            )  # fmt: skip
            assert died.returncode == (-signal.SIGKILL if at else 0), died.stderr
        cache = tmp_path / f"{name}-cache"
        features[name] = {
            str(path.relative_to(cache)): path.read_bytes()
            for path in cache.rglob("*") if path.name in ("features.bin", "targets.i64")
        }  # fmt: skip
    assert features["killed"] == features["whole"]
    assert len(features["whole"]) == 6  # two of features, and the decoded images' targets
    a, b = load_head(tmp_path / "whole"), load_head(tmp_path / "killed")
    assert torch.equal(a.weight, b.weight)


def test_digits_are_images_too(tmp_path: Path) -> None:
    network = load_backbone("PatchFeatures", patches=8)
    result = LinearProbe(network, num=3, cache_dir=str(tmp_path), tol=1e-3).fit(DigitsDataModule())
    assert result.metrics["test_accuracy"] > 0.9


def test_the_benchmark_of_probes_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    script = Path(__file__).parents[1] / "scripts" / "bench_probe.py"
    monkeypatch.syspath_prepend(script.parent)
    counts = {f"{split}/{name}": 12 for split in ("train", "test") for name in NAMES[:3]}
    root = write_photos(tmp_path / "photos", counts, (32, 32))
    words = ["--root", str(root), "--threads", "1", "--patches", "4", "--path-patches", "4", "--num", "5"]
    monkeypatch.setattr("sys.argv", [str(script), *words, "--iterations", "20"])
    runpy.run_path(str(script), run_name="__main__")
    out = capsys.readouterr().out
    assert "torchlin, every gap at most" in out
    assert out.count("| scikit-learn, C = ") == 5
    assert "| test accuracy, 36 images |" in out
    monkeypatch.setattr("sys.argv", [str(script), "paths", "--root", str(root)])
    with pytest.raises(SystemExit):
        runpy.run_path(str(script), run_name="__main__")
    assert "unknown part 'paths'; known: path, accuracy" in capsys.readouterr().err
