"""Every configuration that comes with the package runs, on generated data of the kind it is for."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from training import RUN_FILES, write_photos, write_table

from torchlin import load_head
from torchlin.cli import main
from torchlin.cli.configs import config_folder, config_names, find_config

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*")

CONFIGS = sorted(config_folder().glob("*.yaml"))
PROBES = [path for path in CONFIGS if "backbone" in path.read_text(encoding="utf-8")]


def options_for(config: Path, tmp_path: Path, side: int = 6) -> list[str]:
    """What the command line has to add, by the kind of data."""
    kind = yaml.safe_load(config.read_text(encoding="utf-8"))["data"]["class_path"]
    if kind.endswith("ImageFolderDataModule"):
        counts = {f"{split}/{name}": n for split, n in (("train", 20), ("test", 5)) for name in ("cat", "dog", "eel")}
        return ["--data.root", str(write_photos(tmp_path / "photos", counts, size=(side, side)))]
    if kind.endswith("FeaturesDataModule"):
        return ["--data.path", str(write_table(tmp_path / "table.csv", names=("sour", "sweet")))]
    return []


def test_there_are_configurations() -> None:
    assert {path.stem for path in CONFIGS} == set(config_names())
    assert len(CONFIGS) >= 7


@pytest.mark.parametrize("config", [path for path in CONFIGS if path not in PROBES], ids=lambda path: path.stem)
def test_a_configuration_trains_by_its_name(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = options_for(config, tmp_path)
    assert main(["fit", "--config", config.stem, *options, "--trainer.max_epochs=1", "--run=mine"]) == 0
    assert {path.name for path in (tmp_path / "mine").iterdir()} == RUN_FILES
    info = load_head("mine").info
    model = yaml.safe_load(config.read_text(encoding="utf-8"))["model"]
    assert info["loss"]["name"] == (model["loss"] if isinstance(model["loss"], str) else model["loss"]["name"])
    assert (info["penalty"] is None) == ("penalty" not in model)


@pytest.mark.parametrize("config", PROBES, ids=lambda path: path.stem)
def test_a_configuration_probes_by_its_name(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = [*options_for(config, tmp_path, side=9), "--patches=6", "--recipe.epochs=1", "--run=mine"]
    assert main(["probe", "--config", config.stem, *options]) == 0
    assert "13 heads" in load_head("mine").info["chosen"]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_configuration_leaves_the_place_of_the_data_to_the_command_line(config: Path) -> None:
    text = config.read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert not {"root", "path"} & set(content["data"].get("init_args", {}))
    assert text.startswith("#")
    assert "DigitsDataModule" in text or "--data." in text


def test_a_file_goes_before_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("digits-softmax")).samefile(config_folder() / "digits-softmax.yaml")
    Path("digits-softmax").write_text("model: {loss: hinge}\n")
    assert find_config("digits-softmax") == "digits-softmax"
    with pytest.raises(ValueError, match="did you mean 'digits-softmax'"):
        find_config("digit-softmax")
