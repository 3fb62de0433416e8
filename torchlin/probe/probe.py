"""`LinearProbe`: from a frozen backbone and labelled images to a head, chosen without the test images."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torchmetrics.functional.classification import multiclass_accuracy, multiclass_confusion_matrix

from torchlin.data.base import ArrayDataModule, SplitName
from torchlin.data.errors import DataError
from torchlin.data.feature_store import Extractor, Images, Prepared, Stored, load_features
from torchlin.data.splits import stratified_split
from torchlin.data.store import cache_folder
from torchlin.heads import LinearHead, Standardization
from torchlin.losses import LOSS_REGISTRY, Loss, balanced_weight, trained_spec
from torchlin.penalties import L2, Penalty
from torchlin.probe.backbone import Backbone, load_backbone
from torchlin.probe.sgd import Recipe, train_bank
from torchlin.solvers import PathResult, solve_path

Method = Literal["solver", "sgd"]
Criterion = Literal["accuracy", "loss"]
# What `report` is told: what is being done, how much of it is done, and how much there is.
Report = Callable[[str, int, int], None]


class Choice(NamedTuple):
    """The head, and how it was chosen.

    Attributes:
        head: on raw features, trained on all training samples.
        standardization: μ and σ of the features that were folded into it.
        penalty: λR, or None.
        chosen: what was chosen, in words.
        chosen_on: on what, in words.
        val_accuracy: of the choice, by a head that had not seen the samples that it is measured on.
        path: the solutions along λ; None with SGD.
        rows: what was measured of every candidate.
    """

    head: LinearHead
    standardization: Standardization
    penalty: Penalty | None
    chosen: str
    chosen_on: str
    val_accuracy: float
    path: PathResult | None
    rows: list[dict[str, float]]


@dataclass
class ProbeResult:
    """What a linear probe found. A `Trained`, so that a run folder can be written from it.

    Attributes:
        backbone: frozen.
        choice: the head and how it was chosen.
        loss, penalty: of the head.
        class_names: in the order of the scores.
        metrics: train_accuracy, val_accuracy (what the choice was made by), and, where there are test images,
            test_accuracy and test_top5_accuracy (for more than 5 classes), measured once, at the end.
        per_class: the share of each class's test images that were classified rightly; empty without test images.
        confusion: test images by (true, predicted) class, (k, k); None without.
        trained_on: the splits that the head was trained on.
        sizes: samples in "train", "val" (those that the choice was made on) and "test".
        computed: how many images went through the backbone, the others being in the cache.
        seconds: wall-clock by part: "features", "head", "test".
    """

    backbone: Backbone
    choice: Choice
    loss: Loss
    penalty: Penalty | None
    class_names: list[str]
    metrics: dict[str, float]
    per_class: dict[str, float]
    confusion: Tensor | None
    trained_on: list[str]
    sizes: dict[str, int]
    computed: int
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def head(self) -> LinearHead:
        return self.choice.head

    @property
    def standardization(self) -> Standardization:
        return self.choice.standardization

    def to_head(self) -> LinearHead:
        return self.choice.head


class LinearProbe:
    """A linear classifier on the features of a frozen backbone.

        torchlin.LinearProbe("resnet18", weights="DEFAULT").fit(ImageFolderDataModule("photos", image_size=256))

    Features are computed once and kept in the cache, keyed by the backbone's weights, layer, pooling, preprocessing,
    precision and the data. The head is chosen on validation samples (the data's own validation split, a stratified
    share `val_fraction` of the training samples, or k-fold), trained again on all training and validation samples with
    what was chosen, and the test images are looked at once, after that.

    Args:
        backbone: a `Backbone`; or its name, to which the options of `load_backbone` may be added.
        weights, layer, pooling, select, preprocess, patches, flip: see `load_backbone`; only with a name.
        method: "solver" solves the convex problem along a path of λ, each certified; "sgd" trains a `HeadBank`, one
            head for each learning rate (and λ) of `recipe`.
        loss: a loss or its name.
        class_weight: one number per class, or "balanced" for N/(k·n_class); only with the name of a loss.
        penalty: λ ↦ penalty.
        strengths, num, ratio, folds, criterion, tol, max_passes: see `solve_path`; for "solver".
        recipe: see `Recipe`; for "sgd".
        batch_size: images per call of the backbone.
        dtype: of the features in the cache, "float32" or "bfloat16".
        cache_dir: see `ImageFolderDataModule`.
        device: where backbone and head are computed.
        seed: of random weights and of PatchFeatures.
        report: called with what is being done, how much of it is done and how much there is.

    Raises:
        ValueError: see `load_backbone`; an unknown method; options of a name beside a `Backbone`.
    """

    def __init__(
        self,
        backbone: Backbone | str,
        *,
        weights: str | None = None,
        layer: str | None = None,
        pooling: Literal["avg", "max", "cls", "flatten"] = "avg",
        select: str | int | None = None,
        preprocess: Any = None,
        patches: int = 1600,
        flip: bool = True,
        method: Method = "solver",
        loss: Loss | str = "softmax",
        class_weight: Sequence[float] | Literal["balanced"] | None = None,
        penalty: Callable[[float], Penalty] = L2,
        strengths: Sequence[float] | None = None,
        num: int = 14,
        ratio: float = 3e-6,
        folds: int | None = None,
        criterion: Criterion = "accuracy",
        tol: float = 1e-3,
        max_passes: float = 1000,
        recipe: Recipe | None = None,
        batch_size: int = 256,
        dtype: str = "float32",
        cache_dir: str | None = None,
        device: torch.device | str | None = None,
        seed: int = 0,
        report: Report | None = None,
    ) -> None:
        if method not in get_args(Method):
            raise ValueError(f"method is 'solver' or 'sgd', got {method!r}")
        if recipe is not None and method != "sgd":
            raise ValueError("recipe is for method='sgd'")
        if isinstance(backbone, str):
            backbone = load_backbone(
                backbone, weights=weights, layer=layer, pooling=pooling, select=select, preprocess=preprocess,
                patches=patches, flip=flip, seed=seed,
            )  # fmt: skip
        elif not isinstance(backbone, Backbone):
            made = "torchlin.Backbone(network, preprocess)"
            raise TypeError(f"backbone is a name or a Backbone, got {type(backbone).__name__}: use {made}")
        elif weights is not None or layer is not None or preprocess is not None:
            raise ValueError("weights, layer and preprocess go with the name of a backbone: this one has its own")
        self.backbone = backbone
        self.method: Method = method
        if class_weight is not None and not isinstance(loss, str):
            raise ValueError("class_weight goes with the name of a loss: a Loss has its own, SoftmaxLoss(weight=…)")
        self.loss, self.class_weight = LOSS_REGISTRY.make(loss), class_weight
        self.penalty = penalty
        self.strengths, self.num, self.ratio, self.folds = strengths, num, ratio, folds
        self.criterion: Criterion = criterion
        self.tol, self.max_passes = tol, max_passes
        self.recipe = recipe or Recipe()
        self.batch_size, self.dtype, self.cache_dir, self.device = batch_size, dtype, cache_dir, device
        self.report = report

    def fit(self, data: ArrayDataModule) -> ProbeResult:
        """Compute features, choose and train the head, and measure it once on the test images.

        Args:
            data: a data module of `torchlin.data` that holds images.

        Raises:
            TypeError: another data module.
            ValueError: features instead of images; no validation samples and no folds; images that the backbone does
                not take.
            DataError: features that are not finite (the image is named), or a cache that cannot be used.
            NotConvergedError: some λ was not solved to `tol`.
        """
        if not isinstance(data, ArrayDataModule):
            raise TypeError(
                f"a probe takes a data module of torchlin.data, whose images it knows again, got {type(data).__name__}"
            )
        if data.input_info["kind"] != "pixels":
            raise ValueError("a probe takes images, and these data are features: train on them with fit or solve")
        backbone = self.backbone.to(self.device) if self.device is not None else self.backbone
        source = FeatureSource(
            backbone, data, cache_folder(self.cache_dir), self.dtype, self.batch_size, self.device, self.report
        )
        started = time.perf_counter()
        x, y, held, names, computed = self._training(source, data)
        features_done = time.perf_counter()
        loss = self._loss(y, data.num_classes)
        choose = self._solved if self.method == "solver" else self._trained
        choice = choose(x, y, held, loss, data)
        head_done = time.perf_counter()
        metrics = {"train_accuracy": _accuracy(choice.head, x, y, loss), "val_accuracy": choice.val_accuracy}
        sizes = {
            "train": len(y) - (0 if held is None else len(held)),
            "val": 0 if held is None else len(held),
            "test": 0,
        }
        per_class: dict[str, float] = {}
        confusion = None
        if "test" in data.source_splits:
            test = source.load("test")
            computed += test.computed
            measured, per_class, confusion = _measured(choice.head, test, loss, data.class_names)
            metrics |= measured
            sizes["test"] = len(test.targets)
        ended = time.perf_counter()
        seconds = {
            "features": features_done - started, "head": head_done - features_done, "test": ended - head_done
        }  # fmt: skip
        return ProbeResult(
            backbone,
            choice,
            loss,
            choice.penalty,
            data.class_names,
            metrics,
            per_class,
            confusion,
            names,
            sizes,
            computed,
            seconds,
        )

    def _loss(self, y: Tensor, num_classes: int) -> Loss:
        if self.class_weight is None:
            return self.loss
        balanced = self.class_weight == "balanced"
        weight = balanced_weight(torch.bincount(y, minlength=num_classes)) if balanced else self.class_weight
        return LOSS_REGISTRY.make({"name": self.loss.name, "weight": torch.as_tensor(weight).tolist()})

    def _training(
        self, source: FeatureSource, data: ArrayDataModule
    ) -> tuple[Tensor, Tensor, Tensor | None, list[str], int]:
        """Features and targets of all samples but test samples, the rows to choose on, the splits, how many are new."""
        train = source.load("train")
        x, y, held = train.features, train.targets, None
        names, computed = ["train"], train.computed
        if "val" in data.source_splits:
            val = source.load("val")
            held = torch.arange(len(x), len(x) + len(val.features))
            x, y = torch.cat((x, val.features)), torch.cat((y, val.targets))
            names, computed = ["train", "val"], computed + val.computed
        elif data.val_fraction > 0:
            held = stratified_split(y, data.val_fraction, data.seed)[1]
            names = ["train", "val"] if len(held) else names
        if self.folds is not None:
            return x, y, None, names, computed
        if held is None or len(held) == 0:
            raise ValueError("the choice of a head needs validation samples: give a val_fraction, or folds")
        return x, y, held, names, computed

    def _solved(self, x: Tensor, y: Tensor, held: Tensor | None, loss: Loss, data: ArrayDataModule) -> Choice:
        path = solve_path(
            x, y, loss, self.penalty, strengths=self.strengths, num=self.num, ratio=self.ratio, validation=held,
            folds=self.folds, criterion=self.criterion, seed=data.seed, num_classes=data.num_classes, tol=self.tol,
            max_passes=self.max_passes, device=self.device, report=self._along(self.num),
        )  # fmt: skip
        assert path.chosen is not None
        assert path.index is not None
        on = f"{len(held):,} validation samples" if held is not None else f"{self.folds} folds"
        strength = path.strengths[path.index]
        edge = ", at the edge of the grid" if path.at_edge else ""
        head = path.chosen.to_head().cpu()
        head.info = {"loss": trained_spec(loss)}
        rows = [
            {
                "epoch": float(i), "strength": s, "train_objective": path.solutions[i].objective,
                "gap": path.solutions[i].gap, "passes": path.solutions[i].passes, "nonzero": path.nonzero[i],
                "train_accuracy": path.train_accuracy[i], "val_accuracy": path.val_accuracy[i],
                "val_loss": path.val_loss[i],
            }
            for i, s in enumerate(path.strengths)
        ]  # fmt: skip
        return Choice(
            head, Standardization(*(t.float().cpu() for t in path.chosen.standardization)), self.penalty(strength),
            f"strength {strength:.3g}, {path.index + 1} of {len(path.strengths)}{edge}", on,
            path.val_accuracy[path.index], path, rows,
        )  # fmt: skip

    def _along(self, num: int) -> Callable[[float, Any], None] | None:
        report, done = self.report, 0
        total = num if self.strengths is None else len(self.strengths)

        def told(strength: float, _: Any) -> None:
            nonlocal done
            done += 1
            if report is not None:
                report(f"strength {strength:.2g}", done, total)

        return told

    def _trained(self, x: Tensor, y: Tensor, held: Tensor | None, loss: Loss, data: ArrayDataModule) -> Choice:
        if held is None:
            raise ValueError("folds are for method='solver': give the data a val_fraction")
        found = train_bank(x, y, held, loss, self.penalty, self.recipe, data.num_classes, self.report)
        return Choice(
            found.head, found.standardization, found.penalty, found.chosen, f"{len(held):,} validation samples",
            found.val_accuracy, None, found.rows,
        )  # fmt: skip


class FeatureSource:
    """The features of the splits of some data, from the cache where it has them."""

    def __init__(
        self,
        backbone: Backbone,
        data: ArrayDataModule,
        cache: Path,
        dtype: str,
        batch_size: int,
        device: torch.device | str | None,
        report: Report | None,
    ) -> None:
        self.backbone, self.data, self.cache = backbone, data, cache
        self.dtype, self.batch_size, self.device, self.report = dtype, batch_size, device, report
        # The weights that there are now: a learner's own come later.
        self._fingerprint = backbone.fingerprint()

    def load(self, split: SplitName) -> Stored:
        """Features and targets of a split of the source; of a learner, after it was learned from the training images.

        Raises:
            DataError: see `load_features`.
        """
        backbone, data = self.backbone, self.data
        facts = {
            "source": f"{data.name}-{split}", "data": data.state_of(split), "backbone": self._fingerprint
        }  # fmt: skip
        if backbone.learner is not None:
            facts["learned_on"] = data.state_of("train")

        def prepare(kept: Mapping[str, Tensor]) -> Prepared:
            inputs, targets = data.arrays(split)
            images = Images(inputs, targets, lambda row: data.name_of(split, row))
            if split == "train" and backbone.learner is not None:
                self._learn(kept, images)
                return Prepared(images, self._extractor(), backbone.learner.state_dict())
            return Prepared(images, self._extractor(), {})

        def told(done: int, total: int) -> None:
            if self.report is not None:
                self.report(f"features of {split}", done, total)

        stored = load_features(
            f"{data.name}-{split}-{backbone.name}", facts, prepare, self.cache, dtype=self.dtype,
            batch_size=self.batch_size, report=told,
        )  # fmt: skip
        if stored.extra and backbone.learner is not None:
            backbone.learner.load_state_dict(stored.extra)
        return stored

    def _learn(self, kept: Mapping[str, Tensor], images: Images) -> None:
        learner = self.backbone.learner
        assert learner is not None
        if kept:
            learner.load_state_dict(dict(kept))
            return
        if self.report is not None:
            self.report(f"learning {self.backbone.name}", 0, 1)
        learner.fit(images.inputs)

    def _extractor(self) -> Extractor:
        known = (t.device for t in (*self.backbone.parameters(), *self.backbone.buffers()))
        device = torch.device(self.device) if self.device is not None else next(known, torch.device("cpu"))
        backbone = self.backbone.to(device)  # also what it has only just learned

        def extract(images: Tensor) -> Tensor:
            rows: Tensor = backbone(images.to(device))
            return rows.cpu()

        return extract


def _scores(head: LinearHead, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.cat([head(block.float()) for block in x.split(8192)])


def _accuracy(head: LinearHead, x: Tensor, y: Tensor, loss: Loss) -> float:
    return float((loss.predict(_scores(head, x)) == y).double().mean())


def _measured(
    head: LinearHead, test: Stored, loss: Loss, class_names: list[str]
) -> tuple[dict[str, float], dict[str, float], Tensor]:
    k, y = len(class_names), test.targets
    if not len(y):
        raise DataError("the test split holds no samples")
    scores = _scores(head, test.features)
    predicted = loss.predict(scores)
    metrics = {
        "test_accuracy": float((predicted == y).double().mean()),
        "test_loss": float(loss.value(scores.double(), y).mean()),
    }
    if k > 5 and scores.shape[1] == k:
        metrics["test_top5_accuracy"] = float(multiclass_accuracy(scores, y, k, average="micro", top_k=5))
    confusion = multiclass_confusion_matrix(predicted, y, k)
    totals = confusion.sum(1)
    per_class = {
        name: float(confusion[i, i] / totals[i]) for i, name in enumerate(class_names) if int(totals[i])
    }  # fmt: skip
    return metrics, per_class, confusion
