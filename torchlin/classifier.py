"""`LinearClassifier`: a head, a loss and a penalty as a LightningModule."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from torchlin.autograd import known_signature
from torchlin.fused import total_and_scores
from torchlin.heads import LinearHead, Standardization, StandardizedHead
from torchlin.loss import Loss, Total
from torchlin.losses import LOSS_REGISTRY, balanced_weight, trained_spec
from torchlin.metrics import StageMetrics
from torchlin.objective import Objective
from torchlin.optim import apply_penalty
from torchlin.penalties import PENALTY_REGISTRY, Penalty
from torchlin.registry import nearest

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adagrad": torch.optim.Adagrad,
}
SCHEDULES = ("cosine", "constant")

# How often training looks whether the loss is still finite: each look is one synchronisation of the device.
_CHECK_EVERY = 100


class DivergenceError(FloatingPointError):
    """Training produced a NaN or infinite loss."""


@runtime_checkable
class Resumable(Protocol):
    """A loader that can go on inside an epoch: torchlin's are, and torchdata's `StatefulDataLoader`."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any], /) -> None: ...


class LinearClassifier(LightningModule):
    """A linear classifier to give to a `Trainer`: scores z = Wx + b, minimising F = (1/N) Σ L_i + λ R(W).

    If the data module offers `standardization` (torchlin's do), W and b are trained in standardised coordinates
    x̃ = (x − μ)/σ. That is folded into the weights: the input stays raw, here and in everything handed out (`forward`,
    `to_head()`, the run folder).

    Logged per epoch: `train_loss`, `train_accuracy`, `train_objective` (the loss plus the penalty), `nonzero` (share of
    W), and for validation and test `{val,test}_loss`, `…_accuracy`, `…_balanced_accuracy` (mean recall of the classes).

    Args:
        in_features: numbers per sample; the command line takes it from the data.
        num_classes: number of classes; the command line takes it from the data.
        loss: a name (perceptron, hinge, crammer_singer, squared_hinge, softmax, logistic), a mapping with options such
            as {name: hinge, margin: 1.0}, or a `Loss`.
        penalty: none, a mapping such as {name: l1, strength: 0.001} (l2, l1, elastic_net), or a `Penalty`.
        optimizer: sgd, adam, adamw, rmsprop or adagrad. For anything else subclass and override
            `configure_optimizers`; the penalty still applies.
        lr: learning rate; if not given, a safe one is derived from the loss and the data, and printed.
        momentum: of sgd and rmsprop; the others have none.
        schedule: "cosine" lowers the learning rate to 0 over the whole run, "constant" keeps it.
        class_weight: "balanced" (N / (num_classes · count)), one weight per class, or none.

    Raises:
        ValueError: an unknown name (the nearest one is suggested) or an option out of range.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        loss: dict[str, Any] | str | Loss = "softmax",
        penalty: dict[str, Any] | str | Penalty | None = None,
        optimizer: str = "sgd",
        lr: float | None = None,
        momentum: float = 0.9,
        schedule: str = "cosine",
        class_weight: Literal["balanced"] | list[float] | Tensor | None = None,
    ) -> None:
        super().__init__()
        # A copy, because fitting sets its class weights and switches its checks off.
        self.loss: Loss = copy.deepcopy(LOSS_REGISTRY.make(loss))
        self.penalty = None if penalty is None else PENALTY_REGISTRY.make(penalty)
        if isinstance(class_weight, Tensor):
            class_weight = cast("list[float]", class_weight.tolist())
        self._check_options(num_classes, optimizer, lr, momentum, schedule, class_weight)
        # Plain values only: a checkpoint then loads with weights_only=True, and without torchlin's classes.
        plain = {
            "in_features": in_features,
            "num_classes": num_classes,
            "loss": LOSS_REGISTRY.spec(self.loss),
            "penalty": None if self.penalty is None else PENALTY_REGISTRY.spec(self.penalty),
            "optimizer": optimizer,
            "lr": lr,
            "momentum": momentum,
            "schedule": schedule,
            "class_weight": class_weight,
        }
        self._set_hparams(plain)
        self._hparams_initial = self._hparams
        self._hparams_name = "kwargs"
        self.objective = Objective(self.loss, self.penalty)
        # Private, because its parameters are in standardised coordinates; `to_head()` hands out the raw head.
        self._head = StandardizedHead(in_features, self.loss.outputs(num_classes))
        if class_weight != "balanced" and class_weight is not None:
            self._weigh_classes(torch.tensor(class_weight))
        self._train_metrics, self._val_metrics, self._test_metrics = (
            StageMetrics(num_classes, self.loss.ignore_index) for _ in range(3)
        )
        self._checked: set[str] = set()  # the stages whose labels are known to be classes, or to be ignored
        self._all_count = False  # whether no training label is to be ignored
        self._penalized: torch.optim.Optimizer | None = None
        self._resumed: dict[str, Any] = {}  # what a checkpoint says that can be used no sooner than at the start
        # The losses of the training steps that nobody has looked at yet; one tensor, see `StageMetrics`.
        self._recent = torch.empty(_CHECK_EVERY)
        self._unseen = 0
        self._mean_weight: float | None = None  # Σ w_y / n over the training data, where its class counts are known

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "_current_fx_name":
            # Lightning notes here, forty times a step, which hook runs; nn.Module would search all it holds each time.
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    def _check_options(
        self,
        num_classes: int,
        optimizer: str,
        lr: float | None,
        momentum: float,
        schedule: str,
        class_weight: str | list[float] | None,
    ) -> None:
        for kind, name, known in (("optimizer", optimizer, list(OPTIMIZERS)), ("schedule", schedule, list(SCHEDULES))):
            if name not in known:
                raise ValueError(f"unknown {kind} {name!r}{nearest(name, known)}; known: {', '.join(known)}")
        if num_classes < 2:
            raise ValueError(f"num_classes is at least 2, got {num_classes}")
        if lr is not None and not (math.isfinite(lr) and lr > 0):
            raise ValueError(f"lr is a positive number, got {lr}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is in [0, 1), got {momentum}")
        if isinstance(class_weight, str) and class_weight != "balanced":
            raise ValueError(f"class_weight is 'balanced', one weight per class or none, got {class_weight!r}")
        if isinstance(class_weight, list) and len(class_weight) != num_classes:
            raise ValueError(f"class_weight has {len(class_weight)} entries for num_classes={num_classes}")
        if class_weight is not None and self.loss.weight is not None:
            raise ValueError("class weights are given twice: by class_weight and by the loss's own weight")
        if self.loss.reduction != "mean":
            raise ValueError(f"the objective averages the loss: reduction is 'mean', got {self.loss.reduction!r}")

    def forward(self, x: Tensor) -> Tensor:
        """Scores on raw input, (n, outputs)."""
        scores: Tensor = self._head(x)
        return scores

    def to_head(self) -> LinearHead:
        """A plain `LinearHead` with the same scores, on raw input: what to import into a larger model."""
        head = self._head.fold()
        head.info = {**self._head.info, "loss": trained_spec(self.loss)}
        return head

    @torch.no_grad()
    def set_head(self, head: LinearHead) -> None:
        """Take over the scores of a raw head, in the coordinates this classifier has, and what "balanced" came to.

        Raises:
            ValueError: another number of features or classes.
        """
        if head.weight.shape != self._head.weight.shape:
            raise ValueError(
                f"the head has {head.in_features} features and {head.out_features} scores, this classifier "
                f"{self._head.in_features} and {self._head.out_features}: it is from other data or another loss"
            )
        here = self.standardization
        self._head.restandardize(Standardization(torch.zeros_like(here.mean), torch.ones_like(here.std)))
        self._head.weight.copy_(head.weight)
        self._head.bias.zero_()
        if head.bias is not None:
            self._head.bias.copy_(head.bias)
        self._head.restandardize(here)
        self._head.info = dict(head.info)
        weight = head.info.get("loss", {}).get("weight")
        if weight is not None and self.hparams["class_weight"] == "balanced":
            self._weigh_classes(torch.tensor(weight))

    @property
    def standardization(self) -> Standardization:
        """μ and σ that are folded into the head, (in_features,); 0 and 1 if the features are taken as they come."""
        return Standardization(self._head.mean.clone(), self._head.std.clone())

    # Fitting.

    def setup(self, stage: str) -> None:
        self._checked, self._all_count = set(), False
        if stage != "fit":
            return
        self._unseen = 0
        self._mean_weight = None  # that of the data of an earlier fit would weigh these wrongly
        data = self._data()
        standardization = getattr(data, "standardization", None)
        if standardization is None:
            rank_zero_info("torchlin: the data offer no standardization; training on the features as they come")
        else:
            self._head.restandardize(standardization)
        counts = getattr(data, "class_counts", None)
        if counts is not None:
            self._use_counts(counts)
            self._checked = {"train"}
            sizes = getattr(data, "sizes", None)
            within = 0 <= self.loss.ignore_index < len(counts)
            self._all_count = sizes is not None and int(counts.sum()) == sizes["train"] and not within
        elif self.hparams["class_weight"] == "balanced":
            raise ValueError(
                "class_weight='balanced' needs the class counts of the training data: use a data module with "
                "class_counts, or give one weight per class"
            )
        elif self.loss.weight is not None:
            rank_zero_info("torchlin: the data offer no class_counts; each batch is averaged over its own weights")

    def _data(self) -> object:
        # Trainer.datamodule exists at run time only; a fit on bare loaders has none.
        return getattr(self.trainer, "datamodule", None)

    def _use_counts(self, counts: Tensor) -> None:
        num_classes = self.hparams["num_classes"]
        if len(counts) != num_classes:
            raise ValueError(f"the data have {len(counts)} classes, this classifier num_classes={num_classes}")
        present = counts[counts > 0]
        if self.hparams["class_weight"] == "balanced":
            self._weigh_classes(balanced_weight(counts).float())
        elif self.loss.weight is None and len(present) and present.max() > 10 * present.min():
            rank_zero_warn(
                f"the largest class has {int(present.max())} training samples, the smallest {int(present.min())}: "
                "consider class_weight='balanced', and watch val_balanced_accuracy"
            )
        if self.loss.weight is not None and len(present):
            self._mean_weight = float((counts * self.loss.weight.cpu().double()).sum() / counts.sum()) or None

    def _weigh_classes(self, weight: Tensor) -> None:
        options = {**LOSS_REGISTRY.spec(self.loss), "weight": weight}
        options.pop("name")
        # Built anew, so that the weights pass the checks of the constructor.
        self.loss = type(self.loss)(**options).to(self.device)
        self.objective = Objective(self.loss, self.penalty)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # What a run that stopped inside an epoch needs to go on as if it had not.
        if self._trainer is not None and self.trainer.training:
            checkpoint["train_counters"] = self._train_metrics.counters()
            loader = self.trainer.train_dataloader
            if isinstance(loader, Resumable):
                checkpoint["train_loader"] = loader.state_dict()
        if self.loss.weight is not None:  # what "balanced" came to cannot be found again without the training data
            checkpoint["class_weight"] = self.loss.weight

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        known = ("epoch", "train_counters", "train_loader")
        self._resumed = {key: checkpoint[key] for key in known if key in checkpoint}
        if self._trainer is not None and self.trainer.training and self.trainer.precision == "64-true":
            self.double()  # Lightning does so when it has loaded the weights, which are then rounded
        if self.hparams["class_weight"] == "balanced" and "class_weight" in checkpoint:
            self._weigh_classes(checkpoint["class_weight"])

    def configure_optimizers(self) -> Any:
        rate = self.hparams["lr"] or self._safe_rate()
        name, momentum = self.hparams["optimizer"], self.hparams["momentum"]
        options: dict[str, Any] = {"momentum": momentum} if name in ("sgd", "rmsprop") else {}
        # One kernel for the whole step. Under clipping Lightning refuses it, as it may hide what the gradients are.
        if name in ("sgd", "adam", "adamw") and self.device.type in ("cpu", "cuda"):
            options["fused"] = not self.trainer.gradient_clip_val
        # AdamW's default weight decay would be a second penalty.
        optimizer = OPTIMIZERS[name](self.parameters(), lr=rate, weight_decay=0, **options)
        if self.hparams["schedule"] == "constant":
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if not math.isfinite(steps):
            raise ValueError(
                "schedule='cosine' needs an end: give the Trainer max_epochs or max_steps, or use 'constant'"
            )
        # LambdaLR keeps no length in its state, so a run that is resumed with more epochs still ends at 0.
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(min(1.0, step / steps)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _safe_rate(self) -> float:
        """1 / (curvature of the loss · mean ‖[x̃ 1]‖²): on average at most 1/L for the gradient of a mini-batch."""
        standardization = getattr(self._data(), "standardization", None)
        if standardization is not None:
            squared_norm = float(self._head.in_features)  # a standardised feature has mean square 1, a constant one 0
        else:
            self.trainer.fit_loop.setup_data()
            with isolate_rng():
                x = self._head.features(_first_input(cast("Iterable[Any]", self.trainer.train_dataloader)))
            squared_norm = float(x.double().square().sum(-1).mean())
        if self.hparams["optimizer"] not in ("sgd", "rmsprop"):
            # The adaptive ones move every weight by about lr: a tenth of the weight that moves a score by one.
            return self._announce(0.1 / max(1.0, squared_norm) ** 0.5)
        curvature = self.loss.curvature(self.hparams["num_classes"])
        return self._announce(1 / (curvature * (squared_norm + 1)))

    def _announce(self, rate: float) -> float:
        rate = float(f"{rate:.2g}")
        rank_zero_info(f"torchlin: lr={rate:g}, derived from the {self.loss.name} loss and the data (set lr to choose)")
        return rate

    def on_train_start(self) -> None:
        self._recent = torch.empty(_CHECK_EVERY, device=self.device)
        # No sooner: setting up the optimizer asks for the loader before Lightning knows where the run is to go on.
        resumed, self._resumed = self._resumed, {}
        loader = self.trainer.train_dataloader
        if "train_loader" in resumed and isinstance(loader, Resumable):
            loader.load_state_dict(resumed["train_loader"])
        # Of an epoch that had no batch left Lightning makes the next one.
        if "train_counters" in resumed and resumed.get("epoch") == self.current_epoch:
            self._train_metrics.restore(resumed["train_counters"], here=self.trainer.is_global_zero)

    def on_fit_start(self) -> None:
        self._attach_penalty()
        # A batch as float32 takes megabytes, which glibc would get from the system and give back at every step, and
        # that takes longer than to use them. Once a block of nearly 32 MiB was freed, it keeps what is smaller.
        torch.empty(2**25 - 2**16, dtype=torch.uint8)

    def _attach_penalty(self) -> None:
        # Also at every training step, for a subclass that overrides on_fit_start and forgets this one's.
        if self.penalty is None or self._penalized is self.trainer.optimizers[0]:
            return
        self.trainer.fit_loop.setup_data()
        batches = self.trainer.num_training_batches
        window = max(1, math.ceil(batches / self.trainer.accumulate_grad_batches)) if math.isfinite(batches) else 1000
        holders = [o for o in self.trainer.optimizers if _holds(o, self._head.weight)]
        if not holders:
            raise ValueError("no optimizer of configure_optimizers holds the head: build it from self.parameters()")
        apply_penalty(holders[0], self._head, self.penalty, window=window)
        self._penalized = self.trainer.optimizers[0]

    @known_signature
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self._attach_penalty()
        total, _ = self._step(batch, "train")
        if self._unseen == len(self._recent):
            self._check_finite()
        self._recent[self._unseen] = total.loss.detach()
        self._unseen += 1
        weight: Tensor | float = total.weight
        if self.loss.weight is not None and self._mean_weight is not None:
            # F divides by the Σ w_y of the whole data, and only with its mean do the steps of an epoch add up to the
            # gradient of F: divided by that of the batch, a rare class in a small batch would lose its weight.
            weight = self._mean_weight * total.counting
        processes = self.trainer.world_size
        if processes > 1:
            # The strategy averages the gradients of the processes, whose shares of the batch need not be equal.
            weight = torch.as_tensor(weight, dtype=total.loss.dtype, device=total.loss.device) / processes
            torch.distributed.all_reduce(weight)
        if isinstance(weight, Tensor):
            return total.loss / torch.where(weight > 0, weight, 1)
        return total.loss / (weight or 1)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: torch.optim.Optimizer) -> None:
        # What `zero_grad` does, without what it does for profilers: a twentieth of the time of a step.
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None

    def validation_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predicted classes, (n,)."""
        return self._step(batch, "val")[1]

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """The predicted classes, (n,)."""
        return self._step(batch, "test")[1]

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Scores, (n, outputs); a batch is inputs, or (inputs, target)."""
        x = batch[0] if isinstance(batch, (tuple, list)) else batch
        return cast("Tensor", self(x))

    def _step(self, batch: Any, stage: str) -> tuple[Total, Tensor]:
        """The loss of the batch, and the predicted classes (n,)."""
        x, y = batch
        # Labels that nobody counted are looked at in the first pass over them: each look synchronises the device.
        self.loss.validate = stage not in self._checked
        all_count = self._all_count and stage == "train"
        if type(self).forward is LinearClassifier.forward:
            total, scores = total_and_scores(self._head, x, y, self.loss, all_count=all_count)
        else:
            scores = self(x)
            total = self.loss.total(scores, y, all_count=all_count)
        predicted = self.loss.predict(scores.detach())
        self._stage(stage).add(predicted, y, total)
        return total, predicted

    def _stage(self, stage: str) -> StageMetrics:
        metrics: StageMetrics = getattr(self, f"_{stage}_metrics")
        return metrics

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % _CHECK_EVERY == 0:
            self._check_finite()

    def _check_finite(self) -> None:
        """Look at the losses since the last look, and at the weights."""
        unseen, self._unseen = self._unseen, 0
        if not unseen:
            return
        finite = self._recent[:unseen].isfinite()
        sound = finite.all() & self._head.weight.detach().sum().isfinite()
        if self.trainer.world_size > 1:  # all stop, or none
            torch.distributed.all_reduce(sound := sound.float(), torch.distributed.ReduceOp.MIN)
        if bool(sound):
            return
        first = int((~finite).float().argmax()) if not bool(finite.all()) else unseen
        ago = math.ceil((unseen - first) / self.trainer.accumulate_grad_batches)
        group = self.trainer.optimizers[0].param_groups[0]
        rate = group.get("initial_lr", group["lr"])  # what was asked for, before a schedule lowered it
        raise DivergenceError(
            f"training diverged at step {self.trainer.global_step - ago} (epoch {self.current_epoch}): the objective "
            f"is not finite with lr={rate:.3g}; leave lr out for a safe one, use a smaller one, or look for NaN in the "
            "data"
        )

    def on_train_epoch_end(self) -> None:
        self._check_finite()
        values = self._logged("train")
        with torch.no_grad():
            values["train_objective"] = self.objective.value(values["train_loss"], self._head).float()
            values["nonzero"] = (self._head.weight != 0).float().mean()
        values.pop("train_balanced_accuracy")
        self.log_dict(values)
        self._checked.add("train")

    def on_validation_epoch_end(self) -> None:
        values = self._logged("val")
        self.log("val_accuracy", values.pop("val_accuracy"), prog_bar=True)
        self.log_dict(values)
        if not self.trainer.sanity_checking:
            self._checked.add("val")

    def on_test_epoch_end(self) -> None:
        self.log_dict(self._logged("test"))

    def _logged(self, stage: str) -> dict[str, Tensor]:
        metrics = self._stage(stage)
        metrics.count()
        values = {f"{stage}_{name}": value for name, value in metrics.compute().items()}
        metrics.reset()
        return values


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _holds(optimizer: torch.optim.Optimizer, weight: Tensor) -> bool:
    return any(p is weight for group in optimizer.param_groups for p in group["params"])


def _first_input(loader: Iterable[Any]) -> Tensor:
    batch = next(iter(loader))
    x = batch[0] if isinstance(batch, (tuple, list)) else batch
    if not isinstance(x, Tensor):
        raise TypeError(f"a training batch is (inputs, target) with tensors, got {type(x).__name__} for the inputs")
    return x
