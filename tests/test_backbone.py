"""Frozen networks: what they read, that nothing changes them, and every name that can be wrong."""

from __future__ import annotations

import pickle
import sys
import types
import urllib.error
from pathlib import Path
from typing import Any

import nets
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision import models
from torchvision.transforms import InterpolationMode
from torchvision.transforms._presets import ImageClassification

from torchlin import Backbone, Preprocess
from torchlin.probe import load_backbone
from torchlin.probe.preprocess import of_timm, of_torchvision

PLAIN = {"resize": None, "crop": None, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
LITTLE = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def images(n: int = 4, size: tuple[int, int] = (16, 16), channels: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, channels, *size), generator=generator, dtype=torch.uint8)


def hooked(network: nn.Module, layer: str, x: Tensor) -> Tensor:
    """The plain way: a forward hook on a network in eval mode."""
    seen: list[Tensor] = []
    handle = network.get_submodule(layer).register_forward_hook(lambda _, __, out: seen.append(out))
    with torch.no_grad():
        network.eval()(x)
    handle.remove()
    return seen[0]


def test_features_are_those_of_a_forward_hook() -> None:
    backbone = load_backbone("resnet18", layer="avgpool", preprocess={**PLAIN, "resize": 32}, seed=3)
    torch.manual_seed(3)
    network = models.resnet18()
    x = backbone.preprocess(images())
    torch.testing.assert_close(backbone(images()), hooked(network, "avgpool", x).flatten(1), rtol=0, atol=0)
    whole = load_backbone("resnet18", preprocess={**PLAIN, "resize": 32}, seed=3)
    torch.testing.assert_close(whole(images()), backbone(images()), rtol=0, atol=0)
    deep = load_backbone("resnet18", layer="layer3", preprocess={**PLAIN, "resize": 32}, seed=3)
    torch.testing.assert_close(deep(images()), hooked(network, "layer3", x).mean((2, 3)))


@pytest.mark.parametrize("pooling", ["avg", "max", "flatten"])
def test_pooling_over_places(pooling: Any) -> None:
    network = nets.Small()
    out = hooked(network, "stem", LITTLE(images()))
    expected = {"avg": out.mean((2, 3)), "max": out.amax((2, 3)), "flatten": out.flatten(1)}[pooling]
    torch.testing.assert_close(Backbone(network, LITTLE, layer="stem", pooling=pooling)(images()), expected)


def test_pooling_over_tokens() -> None:
    tokens = LITTLE(images()).flatten(2).transpose(1, 2)
    for pooling, expected in (("avg", tokens.mean(1)), ("cls", tokens[:, 0]), ("max", tokens.amax(1))):
        torch.testing.assert_close(Backbone(nets.Tokens(), LITTLE, pooling=pooling)(images()), expected)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"pooling 'cls' takes tokens"):
        Backbone(nets.Small(), LITTLE, layer="stem", pooling="cls")(images())
    with pytest.raises(ValueError, match="pooling is one of avg, max, cls, flatten, got 'mean'"):
        Backbone(nets.Small(), LITTLE, pooling="mean")  # type: ignore[arg-type]


def test_a_network_that_cannot_be_traced_is_read_all_the_same() -> None:
    network = nets.Branching()
    expected = hooked(network, "stem", LITTLE(images())).mean((2, 3))
    torch.testing.assert_close(Backbone(network, LITTLE, layer="stem")(images()), expected)


class Around(LightningModule):
    """Somebody's module with a backbone in it, trained by Lightning."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(12, 2)

    def training_step(self, batch: Any) -> Tensor:
        assert not any(module.training for module in self.backbone.modules())
        return self.head(self.backbone(batch[0])).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0, weight_decay=0.1)


def test_nothing_changes_a_backbone() -> None:
    backbone = Backbone(nets.Small(), LITTLE)
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    assert len(before) == 7  # with the statistics of the batch normalisation
    features = backbone(images())
    backbone.train()
    module = Around(backbone)
    module.train()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(max_epochs=2, accelerator="cpu", **quiet)  # type: ignore[arg-type]
    trainer.fit(module, DataLoader(TensorDataset(images(8)), batch_size=4))
    assert module.head.weight.grad is not None
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not any(p.requires_grad for p in backbone.parameters())
    assert torch.equal(backbone(images()), features)
    assert not features.requires_grad


def test_what_returns_several_things_says_how_to_choose() -> None:
    with pytest.raises(ValueError, match="returns a dict with the keys out, aux: choose one with select"):
        Backbone(nets.Several(), LITTLE)(images())
    with pytest.raises(ValueError, match="a dict with the keys out, aux, not 'logits': choose"):
        Backbone(nets.Several(), LITTLE, select="logits")(images())
    with pytest.raises(ValueError, match="returns a tuple with the places 0, 1"):
        Backbone(nets.Several(), LITTLE, select="aux")(images())
    assert Backbone(nets.Several(), LITTLE, select="out")(images()).shape == (4, 12)


def test_images_that_do_not_fit_are_explained() -> None:
    with pytest.raises(ValueError, match="images of 5×6 pixels are smaller than it accepts"):
        Backbone(nets.Valid(), LITTLE, name="valid")(images(size=(5, 6)))
    gray = Preprocess(mean=(0.5,), std=(0.5,))
    with pytest.raises(ValueError, match="valid: takes images of 3 channels, got 1"):
        Backbone(nets.Valid(), gray, name="valid")(images(channels=1))


def test_preprocessing_is_required_and_checked() -> None:
    with pytest.raises(ValueError, match="nothing says how images become the input of Small: give preprocess"):
        Backbone(nets.Small())
    with pytest.raises(ValueError, match="nothing says how images become the input of resnet18"):
        load_backbone("resnet18")
    for options, message in (
        ({"resize": 0}, "resize is a number of pixels, at least 1, got 0"),
        ({"resize": 8, "crop": 9}, "a crop of 9 pixels does not fit"),
        ({"mean": [0.5]}, "mean and std come together"),
        ({"mean": [0.5], "std": [0.0]}, "one mean and one std > 0 per channel"),
        ({"interpolation": "cubic"}, "interpolation is one of"),
        ({"size": 8}, "has no option 'size'"),
    ):
        with pytest.raises(ValueError, match=message):
            Preprocess.from_info(options)
    assert Preprocess.from_info(LITTLE.to_info()).to_info() == LITTLE.to_info()


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
def test_preprocessing_of_weights_is_torchvisions_to_the_bit(mode: InterpolationMode) -> None:
    preset = ImageClassification(crop_size=24, resize_size=28, interpolation=mode)
    ours = of_torchvision(types.SimpleNamespace(transforms=lambda: preset))
    for size in ((40, 55), (20, 20)):
        assert torch.equal(ours(images(size=size)), preset(images(size=size)))
    with pytest.raises(ValueError, match="not those of an image classifier"):
        of_torchvision(types.SimpleNamespace(transforms=lambda: nn.Identity()))


def test_preprocessing_of_timm() -> None:
    config = {"input_size": (3, 224, 224), "crop_pct": 0.875, "mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = of_timm({**config, "interpolation": "bicubic"})
    assert (found.resize, found.crop, found.interpolation) == (256, 224, "bicubic")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet81"}, "unknown backbone 'resnet81' \\(did you mean 'resnet18'\\?\\)"),
        ({"name": "patchfeatures"}, "did you mean 'PatchFeatures'"),
        ({"name": "resnet18", "layer": "avgpol"}, "ResNet has no layer 'avgpol' \\(did you mean 'avgpool'\\?\\)"),
        ({"name": "resnet18", "weights": "DEFALT"}, "no weights 'DEFALT' \\(did you mean 'DEFAULT'\\?\\); known"),
        ({"name": "PatchFeatures", "layer": "x"}, "takes neither weights nor layer"),
        ({"name": "nets.Smal"}, "nets has no 'Smal' \\(did you mean 'Small'\\?\\)"),
        ({"name": "nowhere.Small"}, "nowhere cannot be imported"),
        ({"name": "nets.not_a_network"}, "makes a str, not a torch.nn.Module"),
        ({"name": "nets.Small", "weights": "DEFAULT"}, "weights is the path of a checkpoint"),
    ],
)
def test_names_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_backbone(preprocess=PLAIN, **options)


def test_timm_is_asked_for_only_where_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match="timm/resnet18 needs timm: pip install timm"):
        load_backbone("timm/resnet18")


def test_timm_models_by_name() -> None:
    pytest.importorskip("timm")
    backbone = load_backbone("timm/resnet18", seed=1)
    assert backbone.preprocess.crop == 224
    assert backbone(images(1)).shape == (1, 512)
    with pytest.raises(ValueError, match="timm has no model 'resnet81'"):
        load_backbone("timm/resnet81")


def test_import_paths_make_modules() -> None:
    assert load_backbone("nets.Small", preprocess=PLAIN)(images()).shape == (4, 12)


@pytest.fixture
def state() -> dict[str, Tensor]:
    torch.manual_seed(5)
    return models.resnet18(num_classes=7).state_dict()


@pytest.mark.parametrize("form", ["plain.pth", "wrapped.pt", "module.pth", "tensors.safetensors"])
def test_checkpoints_in_every_form(form: str, state: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / form
    if form == "tensors.safetensors":
        save_file(state, path)
    else:
        prefix = "module." if form == "module.pth" else ""
        content: Any = {prefix + key: value for key, value in state.items()}
        torch.save({"state_dict": content, "epoch": 3} if form == "wrapped.pt" else content, path)
    backbone = load_backbone("resnet18", weights=str(path), preprocess={**PLAIN, "resize": 32})
    network = models.resnet18(num_classes=7)
    network.load_state_dict(state)
    expected = hooked(network, "avgpool", backbone.preprocess(images())).flatten(1)
    torch.testing.assert_close(backbone(images()), expected, rtol=0, atol=0)


def test_checkpoints_that_do_not_fit(state: dict[str, Tensor], tmp_path: Path) -> None:
    def load(name: str) -> None:
        load_backbone("resnet18", weights=str(tmp_path / name), preprocess=PLAIN)

    with pytest.raises(FileNotFoundError, match=r"none.pth: no such checkpoint"):
        load("none.pth")
    other = {**state, "extra.weight": torch.zeros(1), "conv1.weight": torch.zeros(1)}
    del other["bn1.weight"]
    torch.save(other, tmp_path / "other.pth")
    message = "missing bn1.weight; unexpected extra.weight; of another shape conv1.weight"
    with pytest.raises(ValueError, match=message):
        load("other.pth")
    (tmp_path / "damaged.pth").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(ValueError, match=r"damaged.pth: damaged"):
        load("damaged.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds no state_dict"):
        load("list.pth")


class Evil:
    def __reduce__(self) -> Any:
        return sys.exit, ("code was run",)


def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path: Path) -> None:
    torch.save({"weights": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="unpickling it would run code"):
        load_backbone("resnet18", weights=str(tmp_path / "evil.pth"), preprocess=PLAIN)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="unpickling it would run code"):
        load_backbone("resnet18", weights=str(tmp_path / "plain.pt"), preprocess=PLAIN)


def test_without_a_network_it_says_where_to_put_the_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    message = r"no route to host\): put the file resnet18-f37072fd.pth into .*checkpoints"
    with pytest.raises(ValueError, match=message):
        load_backbone("resnet18", weights="DEFAULT")


def test_the_fingerprint_knows_weights_and_reading() -> None:
    def of(**options: Any) -> str:
        torch.manual_seed(0)
        return Backbone(nets.Small(), options.pop("preprocess", LITTLE), **options).fingerprint()

    assert of() == of()
    others = [of(layer="stem"), of(pooling="max"), of(preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3))]
    torch.manual_seed(1)
    others.append(Backbone(nets.Small(), LITTLE).fingerprint())
    assert len({of(), *others}) == 5
