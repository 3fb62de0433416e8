"""A frozen network, seen as features of images."""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import re
import urllib.error
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, cast, get_args, runtime_checkable

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from torchlin.data.loading import Inputs
from torchlin.patches import PatchFeatures
from torchlin.probe.preprocess import Preprocess, of_timm, of_torchvision
from torchlin.registry import nearest
from torchlin.version import __version__

Pooling = Literal["avg", "max", "cls", "flatten"]
PATCHES = "PatchFeatures"
_READ = "features"


@runtime_checkable
class Learner(Protocol):
    """A backbone that is learned from the images themselves, such as `PatchFeatures`."""

    out_features: int

    def fit(self, images: Inputs) -> object: ...

    def options(self) -> dict[str, Any]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> object: ...


class Reader(nn.Module):
    """A network up to one of its layers, whose output is pooled to one row per image: (b, …) → (b, p).

    Args:
        network: the network.
        layer: the name of a module inside it whose output is read; None for the output of the whole network.
        pooling: "avg" or "max" over places (b, c, h, w) or tokens (b, t, c); "cls" takes the first token; "flatten"
            keeps all numbers. Rows (b, p) stay as they are.
        select: the key or the index to take where the output is a dict or a tuple.

    Raises:
        ValueError: no such layer (the nearest is named), an unknown pooling; from `forward`, a dict or a tuple without
            `select`, or an output that is not one of these.
    """

    def __init__(
        self, network: nn.Module, layer: str | None = None, pooling: Pooling = "avg", select: str | int | None = None
    ) -> None:
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling is one of {', '.join(get_args(Pooling))}, got {pooling!r}")
        self.layer, self.pooling, self.select = layer, pooling, select
        self.network = network if layer is None else _up_to(network, layer)

    def forward(self, x: Tensor) -> Tensor:
        out = self.network(x)
        return self._pooled(self._selected(out[_READ] if self.layer is not None else out))

    def _selected(self, out: Any) -> Tensor:
        where = "the backbone" if self.layer is None else f"layer {self.layer!r}"
        if isinstance(out, Tensor):
            return out
        if isinstance(out, Mapping):
            keys: list[Any] = list(out)
        elif isinstance(out, (tuple, list)):
            keys = list(range(len(out)))
        else:
            raise ValueError(f"{where} returns {type(out).__name__}, which holds no features: read another layer")
        chosen = next((key for key in keys if str(key) == str(self.select)), None)
        if chosen is None:
            kind = "a dict with the keys" if isinstance(out, Mapping) else "a tuple with the places"
            given = "" if self.select is None else f", not {self.select!r}"
            raise ValueError(f"{where} returns {kind} {', '.join(map(str, keys))}{given}: choose one with select")
        return self._selected(out[chosen]) if not isinstance(out[chosen], Tensor) else cast("Tensor", out[chosen])

    def _pooled(self, out: Tensor) -> Tensor:
        if out.dim() == 2 or self.pooling == "flatten":
            return out.flatten(1)
        if self.pooling == "cls":
            if out.dim() != 3:
                raise ValueError(f"pooling 'cls' takes tokens (b, t, c), got {tuple(out.shape)}: use 'avg'")
            return out[:, 0]
        if out.dim() not in (3, 4):
            raise ValueError(f"an output of shape {tuple(out.shape)} cannot be pooled: use pooling='flatten'")
        rows = out.flatten(2) if out.dim() == 4 else out.transpose(1, 2)
        return rows.mean(2) if self.pooling == "avg" else rows.amax(2)


class _Hooked(nn.Module):
    """A network that also hands out what one of its modules returned; for networks that cannot be traced."""

    def __init__(self, network: nn.Module, layer: str) -> None:
        super().__init__()
        self.network, self.layer = network, layer

    def forward(self, x: Tensor) -> dict[str, Any]:
        seen: list[Any] = []
        module = self.network.get_submodule(self.layer)
        handle = module.register_forward_hook(lambda _, __, out: seen.append(out))
        try:
            self.network(x)
        finally:
            handle.remove()
        if not seen:
            raise ValueError(f"layer {self.layer!r} is not used when the backbone runs: read another")
        return {_READ: seen[-1]}


def _up_to(network: nn.Module, layer: str) -> nn.Module:
    names = [name for name, _ in network.named_modules() if name]
    if layer not in names:
        top = [name for name, _ in network.named_children()]
        raise ValueError(
            f"{type(network).__name__} has no layer {layer!r}{nearest(layer, names)}; its first ones: {', '.join(top)}"
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on what train mode would do, which a frozen network is never in
        try:
            # Runs no more than the layer needs.
            extractor: nn.Module = create_feature_extractor(network, {layer: _READ})
        except Exception:  # whatever symbolic tracing meets in somebody's forward
            return _Hooked(network, layer)
    return extractor


class Backbone(nn.Module):
    """A frozen network as features of images: uint8 (b, C, H, W) → (b, p), in eval mode and without gradients.

    No call changes it: `train()` leaves it in eval mode, so that no batch normalisation drifts, its parameters
    require no gradient, and `forward` runs under `torch.inference_mode`. `attach_head` gives a copy for training.

    Args:
        network: any module. For torchvision's and timm's by name see `load_backbone`.
        preprocess: from pixels to what the network takes.
        layer, pooling, select: see `Reader`.
        name: for people, run folders and the cache.
        source: what `load_backbone` was given, so that a run folder can find the network again; None for a network that
            a script made.
    """

    def __init__(
        self,
        network: nn.Module,
        preprocess: Preprocess | None = None,
        *,
        layer: str | None = None,
        pooling: Pooling = "avg",
        select: str | int | None = None,
        name: str | None = None,
        source: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if preprocess is None and not isinstance(network, Learner):
            raise ValueError(
                f"nothing says how images become the input of {name or type(network).__name__}: give preprocess, for "
                "example Preprocess(resize=256, crop=224, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))"
            )
        self.preprocess = preprocess or Preprocess()
        network.eval().requires_grad_(False)
        self.reader = Reader(network, layer, pooling, select)
        self.name = name or type(network).__name__
        self.source = None if source is None else dict(source)
        self.learner: Learner | None = network if isinstance(network, Learner) else None
        super().train(False)

    def train(self, mode: bool = True) -> Backbone:
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Features (b, p) of images uint8 (b, C, H, W)."""
        with torch.inference_mode():
            x = self.preprocess(images)
            with _explained(self.name, x):
                rows: Tensor = self.reader(x)
        return rows.to(torch.float32, copy=True)  # outside, so that a head may be trained on it

    def info(self) -> dict[str, Any]:
        """What it is, as plain JSON values."""
        reader = self.reader
        return {
            "name": self.name, "layer": reader.layer, "pooling": reader.pooling, "select": reader.select,
            "preprocess": self.preprocess.to_info(), "source": self.source,
        }  # fmt: skip

    def fingerprint(self) -> str:
        """SHA-256 of the weights and of how they are read; of a learner, of what it will be learned with."""
        digest = hashlib.sha256()
        known = {key: value for key, value in self.info().items() if key != "source"}
        kind = type(self.learner or self.reader.network)
        digest.update(json.dumps([f"{kind.__module__}.{kind.__qualname__}", known], sort_keys=True).encode())
        if self.learner is not None:
            # Defaults may change from version to version.
            digest.update(json.dumps([__version__, self.learner.options()], sort_keys=True).encode())
        else:
            for name, tensor in sorted(self.reader.network.state_dict().items()):
                digest.update(repr((name, tuple(tensor.shape), str(tensor.dtype))).encode())
                digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


@contextmanager
def _explained(name: str, x: Tensor) -> Iterator[None]:
    """What a network says of images that are too small, or of another number of channels, in words."""
    try:
        yield
    except RuntimeError as error:
        text = str(error)
        sizes = "can't be greater than actual input size|Output size is too small|output size is too small"
        if re.search(sizes, text):
            raise ValueError(
                f"{name}: images of {x.shape[2]}×{x.shape[3]} pixels are smaller than it accepts: resize them larger, "
                "with preprocess or image_size"
            ) from error
        if re.search(r"expected input.* to have \d+ channels", text):
            wanted = cast("re.Match[str]", re.search(r"to have (\d+) channels", text))[1]
            raise ValueError(f"{name}: takes images of {wanted} channels, got {x.shape[1]}: see color") from error
        raise


# By name.


def load_backbone(
    name: str,
    *,
    weights: str | None = None,
    layer: str | None = None,
    pooling: Pooling = "avg",
    select: str | int | None = None,
    preprocess: Preprocess | Mapping[str, Any] | None = None,
    patches: int = 1600,
    flip: bool = True,
    seed: int = 0,
) -> Backbone:
    """A frozen backbone by name.

    Args:
        name: a torchvision model ("resnet18"), "timm/…" (if timm is installed), the import path of a module class or of
            a function that makes one ("package.module.Name"), or "PatchFeatures", which is learned from the images.
        weights: the name of a member of the torchvision model's weights enum ("DEFAULT", "IMAGENET1K_V1"); "DEFAULT"
            for timm's own; the path of a checkpoint (.pth, .pt, .safetensors); or None for random weights drawn with
            `seed`.
        layer: the module whose output is read; None for what goes into the last linear layer of torchvision's and
            timm's classifiers, and for the output of other modules.
        pooling, select: see `Reader`.
        preprocess: by default that of the weights; needed where they are random or come from a checkpoint.
        patches, flip: of PatchFeatures.
        seed: of random weights, and of PatchFeatures.

    Raises:
        ValueError: an unknown model, layer or weights (the nearest is named), no preprocessing, a checkpoint with
            missing or unexpected keys (named), one that holds code, weights that cannot be downloaded.
        FileNotFoundError: no such checkpoint.
    """
    if preprocess is not None and not isinstance(preprocess, Preprocess):
        preprocess = Preprocess.from_info(preprocess)
    source = {"name": name, "weights": weights, "seed": seed}
    if name == PATCHES:
        if weights is not None or layer is not None:
            raise ValueError(f"{PATCHES} is learned from the images: it takes neither weights nor layer")
        network: nn.Module = PatchFeatures(patches, flip=flip, seed=seed)
        return Backbone(network, preprocess, name=PATCHES, source={**source, "patches": patches, "flip": flip})
    with _seeded(seed):
        if name.startswith("timm/"):
            network, own = _timm(name.removeprefix("timm/"), weights, headless=layer is None)
        elif "." in name:
            network, own = _imported(name), None
        else:
            network, own = _torchvision(name, weights)
    by_name = "." not in name and not name.startswith("timm/")
    classifier = _last_linear(network) if by_name else None
    if weights is not None and _is_path(weights):
        checkpoint = Path(weights).expanduser()
        # A classifier of other classes than torchvision's is no obstacle: it is not used.
        _load_checkpoint(network, checkpoint, name, unused=classifier)
        source["weights"] = str(checkpoint.resolve())
    elif weights is not None and "." in name:
        raise ValueError(f"{name}: weights is the path of a checkpoint, got {weights!r}")
    if layer is None and by_name:
        if classifier is None:
            raise ValueError(f"{name} ends in no linear layer: name the layer to read")
        parent, _, attribute = classifier.rpartition(".")
        setattr(network.get_submodule(parent), attribute, nn.Identity())
    return Backbone(network, preprocess or own, layer=layer, pooling=pooling, select=select, name=name, source=source)


def _is_path(weights: str) -> bool:
    return Path(weights).suffix in (".pth", ".pt", ".bin", ".ckpt", ".safetensors") or "/" in weights


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _torchvision(name: str, weights: str | None) -> tuple[nn.Module, Preprocess | None]:
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise ValueError(
            f"unknown backbone {name!r}{nearest(name, [*known, PATCHES])}; known: torchvision's classification models "
            f"such as resnet18 and vit_b_16, timm/NAME, {PATCHES}, or the import path of a module"
        )
    enum = models.get_model_weights(name)
    if weights is None or _is_path(weights):
        return models.get_model(name, weights=None), None
    if weights not in enum.__members__:
        raise ValueError(
            f"{name} has no weights {weights!r}{nearest(weights, enum.__members__)}; known: "
            f"{', '.join(enum.__members__)}, or the path of a checkpoint"
        )
    member = enum[weights]
    return _downloaded(lambda: models.get_model(name, weights=member), member.url), of_torchvision(member)


def _downloaded(make: Callable[[], nn.Module], url: str) -> nn.Module:
    place = Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name
    try:
        return make()
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        reason = getattr(error, "reason", error)
        raise ValueError(
            f"the weights cannot be downloaded ({reason}): put the file {place.name} into {place.parent}, or give the "
            "path of a checkpoint as weights"
        ) from None


def _timm(name: str, weights: str | None, headless: bool) -> tuple[nn.Module, Preprocess]:
    try:
        timm = importlib.import_module("timm")
    except ImportError:
        raise ValueError(f"timm/{name} needs timm: pip install timm") from None
    if not timm.is_model(name):
        raise ValueError(f"timm has no model {name!r}{nearest(name, timm.list_models())}")
    if weights is not None and weights != "DEFAULT" and not _is_path(weights):
        raise ValueError(f"weights of a timm model are 'DEFAULT', the path of a checkpoint or none, got {weights!r}")
    try:
        whole = timm.create_model(name, pretrained=weights == "DEFAULT")
    except OSError as error:
        raise ValueError(
            f"the weights of timm/{name} cannot be downloaded ({error}): give the path of a checkpoint as weights"
        ) from None
    if headless:
        whole.reset_classifier(0)
    return whole, of_timm(timm.data.resolve_model_data_config(whole))


def _imported(path: str) -> nn.Module:
    module, _, attribute = path.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), attribute)
    except ImportError as error:
        raise ValueError(f"{path}: {module} cannot be imported ({error})") from None
    except AttributeError:
        names = dir(importlib.import_module(module))
        raise ValueError(f"{module} has no {attribute!r}{nearest(attribute, names)}") from None
    network = made() if not isinstance(made, nn.Module) else made
    if not isinstance(network, nn.Module):
        raise ValueError(f"{path} makes a {type(network).__name__}, not a torch.nn.Module")
    return network


def _last_linear(network: nn.Module) -> str | None:
    linear = [path for path, module in network.named_modules() if isinstance(module, nn.Linear)]
    return linear[-1] if linear else None


def _load_checkpoint(network: nn.Module, path: Path, name: str, unused: str | None) -> None:
    """Weights from a file of tensors; those of the module `unused` may be missing or of another shape."""
    if not path.is_file():
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path}: no such checkpoint{nearest(path.name, siblings)}")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path}: holds more than tensors, and unpickling it would run code: save it anew with "
            "torch.save(model.state_dict(), …) or as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, LookupError) as error:
        raise ValueError(f"{path}: damaged, no weights can be read from it ({error})") from None
    for key in ("state_dict", "model"):  # as training scripts wrap it
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds no state_dict, a mapping from names to tensors")
    ignored = f"{unused}." if unused is not None else "\0"
    state = {_plain(key): value for key, value in state.items()}
    state = {key: value for key, value in state.items() if not key.startswith(ignored)}
    wanted = {key: value for key, value in network.state_dict().items() if not key.startswith(ignored)}
    missing, unexpected = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [k for k in wanted if k in state and state[k].shape != wanted[k].shape]
    if missing or unexpected or shapes:
        parts = [
            f"{what} {_some(keys)}"
            for what, keys in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
            if keys
        ]
        raise ValueError(f"{path}: not a checkpoint of {name}: {'; '.join(parts)}")
    network.load_state_dict(state, strict=False)  # what may be missing was checked above


def _plain(key: str) -> str:
    """A parameter's name without what DataParallel and torch.compile put before it."""
    return key.removeprefix("_orig_mod.").removeprefix("module.").removeprefix("_orig_mod.")


def _some(keys: list[str], most: int = 5) -> str:
    return ", ".join(keys[:most]) + (f" and {len(keys) - most} more" if len(keys) > most else "")
