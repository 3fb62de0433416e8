"""`LinearClassifier` in a Trainer: options, learning rates, coordinates, penalties, metrics, and errors."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from plain import classes_of, each_loss
from sklearn.metrics import accuracy_score, balanced_accuracy_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from training import Blobs, KnownBlobs, Raise, blobs, quiet_trainer

from torchlin import (
    L1,
    L2,
    PENALTIES,
    DivergenceError,
    HingeLoss,
    LinearClassifier,
    LinearHead,
    LogisticLoss,
    Loss,
    RunFolder,
    SoftmaxLoss,
    Standardization,
    load_head,
)
from torchlin.data import DigitsDataModule
from torchlin.losses import LOSS_REGISTRY
from torchlin.metrics import StageMetrics

pytestmark = pytest.mark.filterwarnings(r"error:::torchlin\..*", "ignore:.*does not have many workers")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the classifier tells the user."""
    lines: list[str] = []
    monkeypatch.setattr("torchlin.classifier.rank_zero_info", lines.append)
    return lines


def fitted(data: Blobs, epochs: int = 2, classes: int = 3, precision: Any = None, **options: Any) -> LinearClassifier:
    trainer_options = {k: options.pop(k) for k in ("accumulate_grad_batches", "limit_train_batches") if k in options}
    model = LinearClassifier(5, classes, **options)
    quiet_trainer(epochs, precision=precision, **trainer_options).fit(model, data)
    return model


# With what people put around it.


@pytest.mark.parametrize("cls", each_loss())
def test_fits_with_early_stopping_checkpoints_clipping_accumulation_mixed_precision_and_a_logger(
    cls: type[Loss], tmp_path: Path
) -> None:
    classes = classes_of(cls)
    best = ModelCheckpoint(tmp_path / "best", monitor="val_accuracy", mode="max")
    trainer = quiet_trainer(
        8,
        [EarlyStopping("val_loss", patience=3), best],
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        precision="bf16-mixed",
        logger=TensorBoardLogger(tmp_path / "logs"),
        log_every_n_steps=1,
    )
    data = KnownBlobs(classes)
    model = LinearClassifier(5, classes, loss=cls.name)
    trainer.fit(model, data)
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.9
    assert list((tmp_path / "logs").rglob("events*"))
    assert best.best_model_score is not None
    again = LinearClassifier.load_from_checkpoint(best.best_model_path, weights_only=True)
    (metrics,) = quiet_trainer(precision="bf16-mixed").validate(again, data, verbose=False)
    assert metrics["val_accuracy"] == float(best.best_model_score)


def test_digits_are_learned_and_learned_the_same_twice() -> None:
    heads, data = [], DigitsDataModule()
    for _ in range(2):
        model = LinearClassifier(64, 10)
        trainer = quiet_trainer(10)
        trainer.fit(model, DigitsDataModule())
        heads.append(model.to_head())
    assert torch.equal(heads[0].weight, heads[1].weight)
    (metrics,) = trainer.test(model, data, verbose=False)
    assert metrics["test_accuracy"] > 0.9
    x, _ = next(iter(data.test_dataloader()))
    assert x.dtype == torch.uint8
    torch.testing.assert_close(heads[1](x), model(x))


# Options.


@pytest.mark.parametrize(
    "loss", ["hinge", {"name": "hinge", "margin": 1.0}, HingeLoss(), HingeLoss(margin=1.0)], ids=str
)
@pytest.mark.parametrize("penalty", [{"name": "l1", "strength": 0.25}, L1(0.25)], ids=str)
def test_names_mappings_and_objects_are_kept_as_the_same_mapping(loss: Any, penalty: Any) -> None:
    model = LinearClassifier(5, 3, loss=loss, penalty=penalty)
    assert model.hparams["loss"] == {"name": "hinge"}
    assert model.hparams["penalty"] == {"name": "l1", "strength": 0.25}


@pytest.mark.parametrize("cls", PENALTIES)
def test_hyperparameters_are_plain_and_make_the_same_classifier(cls: Any) -> None:
    weight = torch.tensor([1.0, 2.0, 0.5])
    model = LinearClassifier(5, 3, loss=HingeLoss(margin=2.0), penalty=cls(0.125), lr=0.5, class_weight=weight)
    plain = json.loads(json.dumps(dict(model.hparams)))
    again = LinearClassifier(**plain)
    assert dict(again.hparams) == dict(model.hparams) == plain
    assert again.penalty == cls(0.125)
    assert isinstance(again.loss, HingeLoss)
    assert again.loss.margin == 2.0
    assert again.loss.weight is not None
    assert again.loss.weight.tolist() == [1.0, 2.0, 0.5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "cross_entropy"}, "unknown loss 'cross_entropy' .did you mean 'softmax'"),
        ({"loss": "svm"}, "did you mean 'hinge'"),
        ({"loss": {"name": "hinge", "margn": 2}}, "did you mean 'margin'"),
        ({"loss": {"name": "hinge", "reduction": "sum"}}, "reduction is 'mean', got 'sum'"),
        ({"penalty": {"name": "lasso", "strength": 1}}, "did you mean 'l1'"),
        ({"penalty": {"name": "l1", "strength": -1}}, "got -1"),
        ({"penalty": {"name": "elastic_net", "strength": 1, "alpha": 2}}, "between 0 and 1, got 2"),
        ({"penalty": "l2"}, "needs strength"),
        ({"optimizer": "admw"}, "unknown optimizer 'admw' .did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"lr": 0.0}, "lr is a positive number, got 0.0"),
        ({"lr": float("nan")}, "lr is a positive number"),
        ({"momentum": 1.0}, r"momentum is in \[0, 1\), got 1.0"),
        ({"class_weight": "balance"}, "class_weight is 'balanced'"),
        ({"class_weight": [1.0, 2.0]}, "class_weight has 2 entries for num_classes=3"),
        ({"class_weight": [1.0, 2.0, -1.0]}, "finite and not negative"),
        ({"class_weight": [1.0, 2.0, 1.0], "loss": SoftmaxLoss(weight=[1.0, 1.0, 2.0])}, "given twice"),
        ({"num_classes": 1}, "num_classes is at least 2, got 1"),
        ({"in_features": 0}, "in_features is at least 1"),
        ({"loss": "logistic"}, "separates 2 classes, but there are num_classes=3"),
    ],
)
def test_an_option_that_cannot_be_meant_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearClassifier(**{"in_features": 5, "num_classes": 3, **options})


def test_the_users_loss_object_is_left_as_it_was() -> None:
    loss = SoftmaxLoss()
    fitted(KnownBlobs(), loss=loss, class_weight=[1.0, 2.0, 3.0])
    assert loss.validate
    assert loss.weight is None


class OwnLoss(SoftmaxLoss):
    name = "own"


def test_a_loss_of_ones_own_trains_is_kept_by_its_path_and_takes_class_weights() -> None:
    model = fitted(KnownBlobs(), loss=OwnLoss(label_smoothing=0.1), class_weight="balanced")
    assert model.hparams["loss"] == {"name": f"{__name__}.OwnLoss", "label_smoothing": 0.1}
    assert isinstance(model.loss, OwnLoss)
    assert model.loss.label_smoothing == 0.1
    assert isinstance(LinearClassifier(**model.hparams).loss, OwnLoss)


# Learning rate and schedule.


@pytest.mark.parametrize("data", [KnownBlobs, Blobs])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("cls", each_loss())
def test_a_rate_that_is_not_given_is_printed_and_safe(
    cls: type[Loss], optimizer: str, data: type[Blobs], said: list[str]
) -> None:
    classes = classes_of(cls)
    module = data(classes)
    for split in (module.train, module.val):
        split[0] *= 100  # features of any scale
    model = LinearClassifier(5, classes, loss=cls.name, optimizer=optimizer)
    trainer = quiet_trainer(30)
    trainer.fit(model, module)
    (line,) = [line for line in said if "lr=" in line]
    assert cls.name in line
    assert float(line.partition("lr=")[2].partition(",")[0]) > 0
    assert float(trainer.callback_metrics["train_loss"]) < 100
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.8


@pytest.mark.parametrize("limits", [{"max_epochs": 3}, {"max_epochs": -1, "max_steps": 7}], ids=str)
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_the_cosine_schedule_ends_at_zero_with_the_run(limits: dict[str, int], accumulate: int) -> None:
    model = LinearClassifier(5, 3, lr=0.5)
    rates: list[float] = []
    steps = limits.get("max_steps", -1)
    trainer = quiet_trainer(limits["max_epochs"], max_steps=steps, accumulate_grad_batches=accumulate)
    step = model.optimizer_step

    def recording(*args: Any, **kwargs: Any) -> None:
        rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        step(*args, **kwargs)

    model.optimizer_step = recording  # type: ignore[method-assign]
    trainer.fit(model, KnownBlobs())
    assert rates[0] == 0.5
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.15
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0, abs=1e-9)


def test_the_constant_schedule_keeps_the_rate_and_the_cosine_needs_an_end() -> None:
    trainer = quiet_trainer(3)
    trainer.fit(LinearClassifier(5, 3, lr=0.5, schedule="constant"), KnownBlobs())
    assert trainer.optimizers[0].param_groups[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="schedule='cosine' needs an end"):
        quiet_trainer(-1).fit(LinearClassifier(5, 3, lr=0.5), KnownBlobs())


# Coordinates.


def test_training_on_raw_input_is_training_on_standardised_data() -> None:
    data = KnownBlobs(batch_size=10, dtype=torch.float64)
    model = fitted(data, epochs=3, precision="64-true", lr=0.05, schedule="constant", loss="squared_hinge")

    mean, std = (t.double() for t in data.standardization)
    plain = nn.Linear(5, 3).double()
    with torch.no_grad():
        plain.weight.zero_()
        plain.bias.zero_()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for x, y in data.train_dataloader():
            optimizer.zero_grad()
            (3 * nn.functional.multi_margin_loss(plain((x - mean) / std), y, p=2)).backward()
            optimizer.step()

    x = data.test[0]
    torch.testing.assert_close(model(x), plain((x - mean) / std), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.to_head()(x), plain((x - mean) / std), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(model.standardization.mean, mean)


def test_data_without_a_standardization_train_as_they_come_and_it_is_said(said: list[str]) -> None:
    model = fitted(Blobs(), lr=0.01)
    assert said == ["torchlin: the data offer no standardization; training on the features as they come"]
    assert torch.equal(model.standardization.mean, torch.zeros(5))
    assert torch.equal(model.standardization.std, torch.ones(5))


def test_bare_loaders_train() -> None:
    data = Blobs()
    trainer = quiet_trainer(5)
    trainer.fit(LinearClassifier(5, 3), data.train_dataloader(), data.val_dataloader())
    assert float(trainer.callback_metrics["val_accuracy"]) > 0.9


def test_set_head_keeps_the_scores_whatever_the_coordinates() -> None:
    data = KnownBlobs()
    model = fitted(data)
    head = LinearHead(5, 3, init="normal")
    model.set_head(head)
    torch.testing.assert_close(model(data.test[0]), head(data.test[0]))
    assert not torch.equal(model.standardization.mean, torch.zeros(5))
    with pytest.raises(ValueError, match="the head has 5 features and 4 scores, this classifier 5 and 3"):
        model.set_head(LinearHead(5, 4))


# Labels.


@pytest.mark.parametrize("split", ["train", "val", "test"])
@pytest.mark.parametrize("cls", each_loss())
def test_a_label_that_is_no_class_stops_the_first_epoch(cls: type[Loss], split: str) -> None:
    classes = classes_of(cls)
    data = Blobs(classes)
    getattr(data, split)[1][20] = classes
    model, trainer = LinearClassifier(5, classes, loss=cls.name, lr=0.01), quiet_trainer(num_sanity_val_steps=0)
    with pytest.raises(ValueError, match=rf"target\[4\] = {classes} is not a class"):
        trainer.test(model, data) if split == "test" else trainer.fit(model, data)


@pytest.mark.parametrize("cls", each_loss())
def test_float_labels_are_refused(cls: type[Loss]) -> None:
    data = Blobs(classes_of(cls))
    data.val[1] = data.val[1].float()
    with pytest.raises(TypeError, match="float32"):
        quiet_trainer().fit(LinearClassifier(5, classes_of(cls), loss=cls.name, lr=0.01), data)


def test_labels_are_looked_at_once_and_never_where_the_data_counted_them() -> None:
    for data, expected in ((Blobs(), [True] * 5 + [False] * 5), (KnownBlobs(), [False] * 10)):
        looked: list[bool] = []

        class Watched(LinearClassifier):
            def training_step(self, batch: Any, batch_idx: int, looked: list[bool] = looked) -> Tensor:
                loss = super().training_step(batch, batch_idx)
                looked.append(self.loss.validate)
                return loss

        quiet_trainer(2).fit(Watched(5, 3, lr=0.01), data)
        assert looked == expected


def test_another_number_of_classes_than_the_data_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="the data have 3 classes, this classifier num_classes=4"):
        fitted(KnownBlobs(), classes=4)


def test_another_number_of_features_than_the_data_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="in_features=6"):
        quiet_trainer().fit(LinearClassifier(6, 3), KnownBlobs())
    with pytest.raises(ValueError, match=r"in_features=6, which fits neither the last dimension .* \(16, 5\)"):
        quiet_trainer().fit(LinearClassifier(6, 3), Blobs())


# Class weights.


def _unbalanced(counts: tuple[int, ...]) -> KnownBlobs:
    data = KnownBlobs(len(counts))
    x, _ = blobs(sum(counts), len(counts))
    data.train = [x, torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))]
    return data


def test_balanced_is_the_same_as_the_weights_it_stands_for() -> None:
    data = _unbalanced((40, 20, 12))
    by_name = fitted(data, class_weight="balanced", lr=0.05)
    by_hand = fitted(data, class_weight=[72 / 120, 72 / 60, 72 / 36], lr=0.05)
    unweighted = fitted(data, lr=0.05)
    assert torch.equal(by_name.to_head().weight, by_hand.to_head().weight)
    assert not torch.equal(by_name.to_head().weight, unweighted.to_head().weight)
    assert by_name.hparams["class_weight"] == "balanced"


def test_balanced_weights_stay_with_the_checkpoint_and_the_head(tmp_path: Path) -> None:
    data = _unbalanced((40, 20, 12))
    model, trainer = LinearClassifier(5, 3, class_weight="balanced"), quiet_trainer()
    trainer.fit(model, data)
    (expected,) = trainer.test(model, data, verbose=False)
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    loaded = LinearClassifier.load_from_checkpoint(tmp_path / "model.ckpt", weights_only=True)
    taken = LinearClassifier(5, 3, class_weight="balanced")
    taken.set_head(model.to_head())
    for other in (loaded, taken):
        (metrics,) = quiet_trainer().test(other, data, verbose=False)
        assert metrics == pytest.approx(expected)


def test_balanced_needs_counts() -> None:
    with pytest.raises(ValueError, match="class_weight='balanced' needs the class counts"):
        fitted(Blobs(), class_weight="balanced")


@pytest.mark.parametrize(("counts", "warns"), [((60, 6, 30), False), ((61, 6, 30), True), ((61, 0, 30), False)])
def test_a_class_more_than_ten_times_another_is_warned_of(
    counts: tuple[int, ...], warns: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = _unbalanced(counts)
    warned: list[str] = []
    monkeypatch.setattr("torchlin.classifier.rank_zero_warn", warned.append)
    fitted(data, epochs=1)
    fitted(data, epochs=1, class_weight="balanced")
    fitted(data, epochs=1, class_weight=[1.0, 2.0, 3.0])
    assert len(warned) == warns
    if warns:
        assert "61 training samples, the smallest 6: consider class_weight='balanced'" in warned[0]


# Penalties.


def test_l1_gives_exact_zeros_and_their_share_is_logged() -> None:
    data, trainer = KnownBlobs(), quiet_trainer(10)
    model = LinearClassifier(5, 3, penalty={"name": "l1", "strength": 0.02})
    trainer.fit(model, data)
    weight = model.to_head().weight.detach()
    zeros = int((weight == 0).sum())
    assert 0 < zeros < weight.numel()
    assert float(trainer.callback_metrics["nonzero"]) == pytest.approx(1 - zeros / weight.numel())
    standardised = weight * model.standardization.std
    logged = {k: float(v) for k, v in trainer.callback_metrics.items()}
    assert logged["train_objective"] - logged["train_loss"] == pytest.approx(0.02 * float(standardised.abs().sum()))


@pytest.mark.parametrize(
    ("optimizer", "lr"), [("sgd", 1.0), ("adam", 0.1), ("adamw", 0.1), ("rmsprop", 0.1), ("adagrad", 1.0)]
)
def test_a_penalty_never_touches_the_bias(optimizer: str, lr: float) -> None:
    data = _unbalanced((48, 16, 8))
    data.batch_size = 72
    model = fitted(data, 60, penalty=L1(100.0), optimizer=optimizer, lr=lr, momentum=0.5)
    head = model.to_head()
    assert int(head.weight.count_nonzero()) == 0
    torch.testing.assert_close(head.bias.softmax(0), torch.tensor([48, 16, 8]) / 72, rtol=0, atol=0.02)


def test_penalties_work_with_accumulation() -> None:
    model = fitted(KnownBlobs(), 20, penalty=L1(100.0), accumulate_grad_batches=2)
    assert int(model.to_head().weight.count_nonzero()) == 0


class OwnOptimizer(LinearClassifier):
    def configure_optimizers(self) -> Any:
        groups = [{"params": self.parameters(), "weight_decay": 0.0}, {"params": [nn.Parameter(torch.ones(1))]}]
        return torch.optim.AdamW(groups, lr=0.05)


class DefaultOptimizer(LinearClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.05)


class NoOptimizer(LinearClassifier):
    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.05)


def test_the_penalty_applies_under_an_optimizer_of_ones_own() -> None:
    model = OwnOptimizer(5, 3, penalty=L1(100.0))
    quiet_trainer(10).fit(model, KnownBlobs())
    assert int(model.to_head().weight.count_nonzero()) == 0
    DefaultOptimizer(5, 3)  # no penalty, no objection
    quiet_trainer(1).fit(DefaultOptimizer(5, 3), KnownBlobs())


@pytest.mark.parametrize("penalty", [L1(0.1), L2(0.1)], ids=str)
def test_weight_decay_under_a_penalty_is_an_error(penalty: Any) -> None:
    message = r"weight_decay=0.01 \(AdamW's default\) on head.weight under L\d\(strength=0.1\): give the head its own"
    with pytest.raises(ValueError, match=message):
        quiet_trainer().fit(DefaultOptimizer(5, 3, penalty=penalty), KnownBlobs())


def test_an_optimizer_without_the_head_is_an_error() -> None:
    with pytest.raises(ValueError, match="no optimizer of configure_optimizers holds the head"):
        quiet_trainer().fit(NoOptimizer(5, 3, penalty=L1(0.1)), KnownBlobs())


def test_accumulated_batches_are_one_large_batch() -> None:
    options = {"precision": "64-true", "lr": 0.05, "schedule": "constant", "penalty": L1(0.01)}
    small = fitted(KnownBlobs(batch_size=6, dtype=torch.float64), 3, accumulate_grad_batches=4, **options)
    large = fitted(KnownBlobs(batch_size=24, dtype=torch.float64), 3, **options)
    torch.testing.assert_close(small.to_head().weight, large.to_head().weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(small.to_head().bias, large.to_head().bias, rtol=1e-12, atol=1e-12)


# Metrics.


@pytest.mark.parametrize("stage", ["train", "val", "test"])
@pytest.mark.parametrize("ignored", [-100, -1, 1])
@pytest.mark.parametrize("weight", [None, [0.5, 2.0, 1.25, 0.75]], ids=["", "weighted"])
@pytest.mark.parametrize("cls", each_loss())
def test_metrics_are_those_of_the_whole_data(
    cls: type[Loss], weight: list[float] | None, ignored: int, stage: str
) -> None:
    classes = classes_of(cls)
    loss = cls(weight=weight and weight[:classes], ignore_index=ignored)
    data = Blobs(classes, batch_size=12)
    x, y = getattr(data, stage)
    if ignored < 0:
        y[5:9] = ignored
    model, trainer = LinearClassifier(5, classes, loss=loss, lr=1e-30), quiet_trainer(1)
    head = LinearHead(5, cls.outputs(classes), init="normal")
    with torch.no_grad():
        head.weight.mul_(10)
    model.set_head(head)
    trainer.test(model, data, verbose=False) if stage == "test" else trainer.fit(model, data)

    counts = y != ignored
    scores = head(x)
    predicted = (scores[:, 0] > 0).long() if cls is LogisticLoss else scores.argmax(1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    assert logged[f"{stage}_loss"] == pytest.approx(float(loss(scores, y)), rel=1e-4)
    assert logged[f"{stage}_accuracy"] == pytest.approx(accuracy_score(y[counts], predicted[counts]))
    if stage != "train":
        # scikit-learn warns of predicted classes that do not occur.
        recalls = [float((predicted[y == c] == c).double().mean()) for c in y[counts].unique()]
        assert logged[f"{stage}_balanced_accuracy"] == pytest.approx(sum(recalls) / len(recalls))
        if set(predicted[counts].tolist()) <= set(y[counts].tolist()):
            expected = balanced_accuracy_score(y[counts], predicted[counts])
            assert logged[f"{stage}_balanced_accuracy"] == pytest.approx(expected)


def test_what_is_logged() -> None:
    trainer = quiet_trainer()
    model = LinearClassifier(5, 3)
    trainer.fit(model, KnownBlobs())
    splits = {f"{s}_{m}" for s in ("train", "val") for m in ("loss", "accuracy")}
    assert set(trainer.callback_metrics) == splits | {"val_balanced_accuracy", "train_objective", "nonzero"}
    (tested,) = trainer.test(model, KnownBlobs(), verbose=False)
    assert set(tested) == {"test_loss", "test_accuracy", "test_balanced_accuracy"}


def test_a_step_asks_the_device_for_no_value() -> None:
    # A meta tensor has no values: reading one raises.
    scores, target = torch.empty(8, 3, device="meta"), torch.empty(8, dtype=torch.long, device="meta")
    loss = SoftmaxLoss(weight=[1.0, 2.0, 0.5], validate=False).to("meta")
    metrics = StageMetrics(3).to("meta")
    for _ in range(100):  # more than are held before they are counted
        metrics.add(loss.predict(scores), target, loss.total(scores, target))
    metrics.count()
    assert metrics.compute()["accuracy"].is_meta
    with pytest.raises(RuntimeError):
        metrics.compute()["accuracy"].item()


def test_predict_step_takes_inputs_with_and_without_a_target() -> None:
    data = KnownBlobs()
    model = fitted(data)
    x, y = data.test
    for loader in (DataLoader(TensorDataset(x, y), 8), DataLoader(x, 8)):  # type: ignore[arg-type]
        batches = quiet_trainer().predict(model, loader)
        torch.testing.assert_close(torch.cat(batches), model(x).detach())  # type: ignore[arg-type]


# Divergence.


def test_training_that_diverges_says_where_and_what_to_try() -> None:
    message = r"training diverged at step (\d+) \(epoch 0\).*lr=1e\+09; leave lr out"
    with pytest.raises(DivergenceError, match=message):
        fitted(KnownBlobs(n=1000), lr=1e9, loss="squared_hinge")


def test_divergence_is_found_within_a_hundred_steps() -> None:
    data, model = KnownBlobs(n=8 * 16 * 10), LinearClassifier(5, 3, lr=1e9, loss="squared_hinge")
    data.batch_size = 8
    trainer = quiet_trainer()
    with pytest.raises(DivergenceError):
        trainer.fit(model, data)
    assert trainer.global_step == 100


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_in_the_data_is_found_at_its_step(accumulate: int) -> None:
    data = Blobs()
    data.train[0][40, 1] = float("nan")  # in the third batch of 16
    with pytest.raises(DivergenceError, match=rf"step {2 // accumulate} \(epoch 0\).*look for NaN in the data"):
        fitted(data, lr=0.01, accumulate_grad_batches=accumulate)


def test_an_error_of_a_callback_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="mine"):
        quiet_trainer(2, [Raise(RuntimeError("mine"), 0, 1)], enable_checkpointing=False).fit(
            LinearClassifier(5, 3), KnownBlobs()
        )


def test_every_loss_has_a_classifier() -> None:
    for cls in LOSS_REGISTRY.classes:
        model = LinearClassifier(5, classes_of(cls), loss=cls.name)
        assert model(torch.zeros(2, 5)).shape == (2, cls.outputs(classes_of(cls)))


# Class weights: the steps of an epoch minimise F, whatever the batch size.


class Rare(Blobs):
    """180 samples of one class and 20 of the other, with class counts and one feature that says nothing."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch
        self.train = (torch.zeros(200, 5), (torch.arange(200) % 10 == 0).long())

    @property
    def class_counts(self) -> Tensor:
        return torch.bincount(self.train[1])

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*self.train), self.batch)  # type: ignore[arg-type]


@pytest.mark.parametrize(("batch", "accumulate"), [(200, 1), (8, 1), (1, 1), (1, 8)])
def test_class_weights_minimise_the_same_objective_at_every_batch_size(batch: int, accumulate: int) -> None:
    data = Rare(batch)
    model = LinearClassifier(5, 2, class_weight=[1.0, 3.0], lr=0.3 if batch == 200 else 0.02 * accumulate, momentum=0.0)
    steps = {200: 60, 8: 30, 1: 12}[batch]
    quiet_trainer(steps, accumulate_grad_batches=accumulate, limit_val_batches=0).fit(model, data)
    bias = model.to_head().bias.detach()
    # With no features the minimiser gives the classes their weighted shares: 180 · 1 against 20 · 3.
    assert float(bias[1] - bias[0]) == pytest.approx(math.log(60 / 180), abs=0.12)


def test_a_subclass_that_forgets_super_keeps_its_penalty() -> None:
    class Forgetful(LinearClassifier):
        def on_fit_start(self) -> None:
            pass

    model = Forgetful(5, 3, penalty={"name": "l1", "strength": 100.0})
    quiet_trainer(1).fit(model, KnownBlobs())
    assert not model.to_head().weight.any()


def test_half_precision_far_from_zero_learns_as_in_float32() -> None:
    class Far(Blobs):
        def __init__(self) -> None:
            super().__init__()
            self.train, self.val = ((x + 1000, y) for x, y in (self.train, self.val))

        @property
        def standardization(self) -> Standardization:
            return Standardization(self.train[0].mean(0).float(), self.train[0].std(0, correction=0).float())

    losses = []
    for precision in ("32-true", "bf16-mixed"):
        trainer = quiet_trainer(3, precision=precision)
        trainer.fit(LinearClassifier(5, 3), Far())
        losses.append(float(trainer.callback_metrics["train_loss"]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


class Extra(LinearClassifier):
    def __init__(self, in_features: int, num_classes: int, loss: str = "hinge", extra: int = 3) -> None:
        super().__init__(in_features, num_classes, loss=loss)
        self.save_hyperparameters()


def test_a_subclass_may_save_its_own_hyperparameters(tmp_path: Path) -> None:
    quiet_trainer(1, [RunFolder(tmp_path / "run")]).fit(Extra(5, 3), KnownBlobs())
    assert load_head(tmp_path / "run").info["loss"] == {"name": "hinge"}
