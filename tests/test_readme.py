"""Everything the README shows runs as written, in the order of the page."""

import re
import runpy
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import torchlin
from torchlin.cli import main
from torchlin.cli.configs import config_names

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the page takes for granted: photos, a table, and a head on resnet18's 512 features."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for name, level in (("cat", 60), ("dog", 160)):
            target = folder / "photos" / split / name
            target.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(level - 40, level + 40, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.png")
    rows = [f"{a:.3f},{b:.3f},{int(a + b > 0)}" for a, b in rng.normal(size=(60, 2))]
    (folder / "tumours.csv").write_text("size,texture,target\n" + "\n".join(rows) + "\n")
    head = torchlin.LinearHead(512, 3, init="normal")
    torchlin.save_head(head, folder / "runs" / "resnet-features", class_names=["a", "b", "c"], loss="softmax")
    return folder


@pytest.mark.parametrize(
    ("language", "code"), BLOCKS, ids=[f"{i}-{language}" for i, (language, _) in enumerate(BLOCKS)]
)
def test_block_runs(language: str, code: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    if language == "python":
        script = workplace / "block.py"
        script.write_text(code, encoding="utf-8")
        runpy.run_path(str(script), run_name="__main__")
        return
    commands = [shlex.split(line, comments=True) for line in code.splitlines() if line.startswith("torchlin ")]
    for command in commands:
        assert main(command[1:]) == 0, command


def test_commands_of_the_top_are_those_that_ci_runs() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    top = BLOCKS[0][1]
    assert top.splitlines() == ["pip install . && torchlin fit", 'pip install -e ".[test]" && pytest']
    for command in ('pip install --quiet -e ".[test]"', "\npytest\n", "pip install --quiet .", "torchlin fit"):
        assert command in script


def test_names_every_configuration() -> None:
    assert [name for name in config_names() if f"`{name}`" not in README] == []


def test_table_of_losses_is_complete() -> None:
    assert [cls.name for cls in torchlin.LOSSES if f"| `{cls.name}`" not in README] == []


def test_swapped_head_classifies_images(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = [code for language, code in BLOCKS if "model.fc" in code]
    monkeypatch.chdir(workplace)
    names: dict[str, object] = {}
    exec(code, names)
    model = names["model"]
    assert isinstance(model, torch.nn.Module)
    features = torch.nn.Sequential(*list(model.children())[:-1])
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = torchlin.load_head("runs/resnet-features")(features(image))
        torch.testing.assert_close(model(image), expected)


def test_changelog_speaks_of_this_version() -> None:
    assert f"## {torchlin.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "version" in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dynamic"]
