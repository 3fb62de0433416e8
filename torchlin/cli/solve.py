"""`torchlin solve`: the objective of `fit`, minimised by the certified full-batch solvers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix

from torchlin.cli.certificates import described, fits_in_memory, split_arrays
from torchlin.cli.fullbatch import FullBatchCLI
from torchlin.cli.training import completed, show_run
from torchlin.data import DataError
from torchlin.folder import (
    CONFIG,
    METRICS,
    MOST_CLASSES,
    draw,
    finite,
    number_folder,
    open_folder,
    rows_to_csv,
    save_pictures,
    write_result,
)
from torchlin.heads import LinearHead, Standardization
from torchlin.losses import LOSS_REGISTRY, Loss, balanced_weight, trained_spec
from torchlin.metrics import StageMetrics
from torchlin.penalties import L2, PENALTY_REGISTRY, Penalty
from torchlin.solvers import NotConvergedError, PathResult, Solution, solve, solve_path
from torchlin.solvers.state import Progress
from torchlin.storage import replace_file

_STRENGTH = 1e-3


def solve_run(rest: list[str]) -> None:
    """`torchlin solve` with the arguments `rest`."""
    SolveCLI(["solve", *completed("solve", rest)], _Solver)


class _Solver(Trainer):
    """Gives the command its name."""

    def solve(self, model: LightningModule, datamodule: LightningDataModule | None = None) -> None:
        """Minimise the objective of `fit` to a certified optimum."""


@dataclass
class Solved:
    """A solution as a run folder takes it."""

    solution: Solution
    loss: Loss
    penalty: Penalty | None

    @property
    def standardization(self) -> Standardization:
        return Standardization(*(t.float() for t in self.solution.standardization))

    def to_head(self) -> LinearHead:
        head = self.solution.to_head()
        head.info = {"loss": trained_spec(self.loss)}
        return head


class SolveCLI(FullBatchCLI):
    """The options of the solver beside fit's."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {"solve": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run", type=str | None, default=None, help="Run folder to write.")
        parser.add_argument("--path", action="store_true", help="Choose the strength of the penalty from a grid.")
        parser.add_argument("--num", type=int, default=30, help="How many strengths (with --path).")
        parser.add_argument("--ratio", type=float, default=1e-4, help="Smallest strength over the largest.")
        parser.add_argument("--folds", type=int | None, default=None, help="Choose by k-fold cross-validation.")
        parser.add_argument("--criterion", type=Literal["accuracy", "loss"], default="accuracy", help="Choose by this.")
        parser.add_argument("--tol", type=float, default=1e-4, help="Relative gap to certify.")
        parser.add_argument("--max_passes", type=float, default=1000.0, help="Passes over the data for one strength.")
        parser.add_argument("--device", type=str | None, default=None, help="Where to compute, for example cuda.")
        self.take_sizes_from_data(parser)

    def before_instantiate_classes(self) -> None:
        super().before_instantiate_classes()
        if self.options().folds is not None and not self.options().path:
            raise ValueError("--folds chooses a strength, which needs --path")

    def solve(self, **kwargs: Any) -> None:
        options, data = self.options(), self.datamodule
        if ignored := self.ignored():
            print(f"no effect on solve: {', '.join(ignored)}")
        if not hasattr(data, "sizes"):
            raise TypeError(
                f"solve needs a data module that knows its sizes, as torchlin's do; {type(data).__name__} has none"
            )
        data.prepare_data()
        data.setup("fit")
        if not fits_in_memory(data, ["train", "val"]):
            raise DataError(
                "the training data do not fit in memory: use torchlin.solve on a memory-mapped tensor, or fit"
            )
        x, y = split_arrays(data, ["train"])
        held = split_arrays(data, ["val"]) if data.sizes["val"] else None
        loss = self._loss(y)
        try:
            solved, rows, path = self._path(x, y, held, loss) if options.path else self._single(x, y, loss)
        except NotConvergedError as error:
            reached = error.solution
            raise ValueError(
                f"the gap is {reached.gap:.2g} after {reached.passes:g} passes, but --tol is {options.tol:g}: "
                f"give a larger --max_passes (now {options.max_passes:g}) or --tol"
            ) from None
        self._write(solved, rows, path, (x, y), held)

    def _loss(self, y: Tensor) -> Loss:
        """The classifier's loss, "balanced" come to numbers."""
        loss: Loss = self.model.loss
        if self.model.hparams["class_weight"] != "balanced":
            return loss
        k = int(self.model.hparams["num_classes"])
        weight = balanced_weight(torch.bincount(y.long(), minlength=k))
        return LOSS_REGISTRY.make({**LOSS_REGISTRY.spec(loss), "weight": weight.tolist()})

    def _single(self, x: Tensor, y: Tensor, loss: Loss) -> tuple[Solved, list[dict[str, float]], PathResult | None]:
        options, penalty = self.options(), self.model.penalty
        if penalty is None:
            penalty = L2(_STRENGTH)
            print(f"no penalty given, so l2 with strength {_STRENGTH:g}: --model.penalty sets another, --path searches")
        solution = solve(
            x, y, loss, penalty if penalty.strength > 0 else None, num_classes=self.datamodule.num_classes,
            tol=options.tol, max_passes=options.max_passes, device=options.device, report=_Line().progress,
        )  # fmt: skip
        _Line().end()
        rows = [
            {"epoch": i, "passes": p.passes, "seconds": p.seconds, "train_objective": p.objective, "gap": p.gap}
            for i, p in enumerate(solution.history)
        ]
        return Solved(solution, loss, penalty), [finite(row) for row in rows], None

    def _path(
        self, x: Tensor, y: Tensor, held: tuple[Tensor, Tensor] | None, loss: Loss
    ) -> tuple[Solved, list[dict[str, float]], PathResult | None]:
        options = self.options()
        if held is None and options.folds is None:
            raise ValueError("--path chooses on a validation split, but the data have none: give --folds 5")
        if options.folds is not None and held is not None:  # every sample is left out once
            x, y, held = torch.cat((x, held[0])), torch.cat((y, held[1])), None

        line = _Line()
        path = solve_path(
            x, y, loss, self.family, num=options.num, ratio=options.ratio, validation=held, folds=options.folds,
            criterion=options.criterion, seed=getattr(self.datamodule, "seed", 0),
            num_classes=self.datamodule.num_classes, tol=options.tol, max_passes=options.max_passes,
            device=options.device, report=line.strength,
        )  # fmt: skip
        line.end()
        assert path.index is not None
        assert path.chosen is not None
        strength = path.strengths[path.index]
        edge = f", at the edge of the grid: try another --ratio (now {options.ratio:g})" if path.at_edge else ""
        print(
            f"chosen: strength {strength:.3g}, {path.index + 1} of {len(path.strengths)}{edge}; "
            f"{path.passes:g} passes, {path.seconds:.1f} s"
        )
        rows = [
            {
                "epoch": float(i), "strength": s, "train_objective": path.solutions[i].objective,
                "gap": path.solutions[i].gap, "passes": path.solutions[i].passes, "nonzero": path.nonzero[i],
                "train_accuracy": path.train_accuracy[i], "val_accuracy": path.val_accuracy[i],
                "val_loss": path.val_loss[i],
            }
            for i, s in enumerate(path.strengths)
        ]  # fmt: skip
        return Solved(path.chosen, loss, self.family(strength)), rows, path

    def _write(
        self,
        solved: Solved,
        rows: list[dict[str, float]],
        path: PathResult | None,
        train: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor] | None,
    ) -> None:
        options, data = self.options(), self.datamodule
        k, head, solution = data.num_classes, solved.to_head().cpu(), solved.solution
        metrics = {f"train_{name}": value for name, value in _measured(head, solved.loss, *train, k)[0].items()}
        metrics |= {"train_objective": solution.objective, "nonzero": float((solution.weight != 0).double().mean())}
        confusion = None
        if held is not None:
            # A refit has seen the validation data; what is reported of them is what the choice was made on.
            unseen = head if path is None or path.index is None else path.solutions[path.index].to_head().cpu()
            measured, confusion = _measured(unseen, solved.loss, *held, k)
            metrics |= {f"val_{name}": value for name, value in measured.items()}
        if path is not None and path.index is not None and options.folds is not None:
            metrics |= {"val_accuracy": path.val_accuracy[path.index], "val_loss": path.val_loss[path.index]}
            metrics.pop("val_balanced_accuracy", None)
            confusion = None
        if data.sizes["test"]:
            measured, _ = _measured(head, solved.loss, *split_arrays(data, ["test"]), k)
            metrics |= {f"test_{name}": value for name, value in measured.items()}
        seen = ["train", "val"] if path is not None and data.sizes["val"] else ["train"]
        found = solution.certificate
        certificate = {
            "objective": found.primal, "dual": found.dual if math.isfinite(found.dual) else None, "gap": found.gap,
            "measure": found.measure, "reason": found.reason, "tol": options.tol,
        }  # fmt: skip
        facts = {
            "certificate": certificate, "trained_on": seen, "passes": solution.passes, "seconds": solution.seconds,
            "metrics": finite(metrics),
        }  # fmt: skip
        name = f"{getattr(data, 'name', None) or 'data'}-{solved.loss.name}"
        folder = number_folder(name) if options.run is None else open_folder(options.run)
        replace_file(folder / CONFIG, self._config_with(solved.penalty).encode())
        replace_file(folder / METRICS, rows_to_csv(rows).encode())
        written = write_result(folder, solved, data, facts)
        draw(folder, written, solved.standardization.std, [], confusion)
        _draw_progress(path, solution, folder)
        print(described(found))
        show_run(folder, data, f"of the head written, on {' and '.join(seen)}" if path is not None else "of the head")

    def _config_with(self, penalty: Penalty | None) -> str:
        """config.yaml, with the penalty that it came to."""
        plain = yaml.safe_load(self._config_text())
        plain["model"]["penalty"] = None if penalty is None else PENALTY_REGISTRY.spec(penalty)
        text: str = yaml.safe_dump(plain, sort_keys=False)
        return text


@torch.no_grad()
def _measured(head: LinearHead, loss: Loss, x: Tensor, y: Tensor, classes: int) -> tuple[Mapping[str, float], Tensor]:
    """Loss, accuracy and mean recall of the classes that occur, and the confusion matrix (k, k)."""
    metrics, confusion = StageMetrics(classes, loss.ignore_index), torch.zeros(0)
    scores = torch.cat([head(block) for block in x.split(8192)])
    predicted = loss.predict(scores)
    metrics.add(predicted, y, loss.total(scores, y))
    metrics.count()
    if classes <= MOST_CLASSES:
        confusion = multiclass_confusion_matrix(predicted, y, classes, ignore_index=loss.ignore_index)
    return {name: float(value) for name, value in metrics.compute().items()}, confusion


def _draw_progress(path: PathResult | None, solution: Solution, folder: Path) -> None:
    from torchlin import report  # here, because matplotlib takes a while to load

    drawn = {"curves.png": report.plot_gap(solution)}
    if path is not None:
        drawn["path.png"] = report.plot_path(path)
    save_pictures(folder, drawn)


class _Line:
    """One line on the terminal that is written over: the gap falling. Nothing where nobody watches."""

    def __init__(self) -> None:
        self.shown = sys.stderr.isatty()

    def progress(self, at: Progress) -> None:
        self._write(f"pass {at.passes:g}  objective {at.objective:.6g}  gap {at.gap:.2e}  {at.seconds:.1f} s")

    def strength(self, strength: float, found: Solution) -> None:
        self._write(f"strength {strength:.3g}  objective {found.objective:.6g}  gap {found.gap:.2e}")

    def _write(self, text: str) -> None:
        if self.shown:
            print(f"\r{text:<78}", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self.shown:
            print("\r" + 78 * " " + "\r", end="", file=sys.stderr, flush=True)
