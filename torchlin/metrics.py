"""What is counted during a stage: one torchmetrics object, on the device, without a synchronisation per step."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from torchlin.loss import Total

# Batches whose labels are held before they are counted together: counting then costs next to nothing per batch, and the
# labels of so many batches are small beside the inputs of one.
_HELD = 64


class StageMetrics(Metric):
    """Loss, accuracy and balanced accuracy of one pass over data.

    The state is a few counters per class. (torchmetrics' own per-class counters call bincount, which synchronises a
    GPU at every step.) Summed over processes, so the results are those of the whole data.

    Args:
        num_classes: number of classes.
        ignore_index: samples with this target do not count.
    """

    full_state_update = False
    loss_sum: Tensor
    weight_sum: Tensor
    correct: Tensor
    support: Tensor

    def __init__(self, num_classes: int, ignore_index: int = -100) -> None:
        super().__init__()
        # float64 would be exact longer, but MPS has none; a float32 sum of batch losses is exact enough to log.
        self.add_state("loss_sum", torch.zeros(()), "sum")
        self.add_state("weight_sum", torch.zeros(()), "sum")
        self.add_state("correct", torch.zeros(num_classes, dtype=torch.long), "sum")
        self.add_state("support", torch.zeros(num_classes, dtype=torch.long), "sum")
        self.ignore_index = ignore_index
        # Predicted and true classes that are not counted yet, (2, room). One tensor for all: small ones that stay
        # behind, batch after batch, in the gaps where the last batch was would keep the next from fitting there.
        self._held = torch.empty((2, 0), dtype=torch.long)
        self._filled = 0

    def add(self, predicted: Tensor, target: Tensor, total: Total) -> None:
        """Take in one batch: predicted and true classes (n,), and its loss."""
        # One by one, so that the sum does not depend on when somebody asks for the counters.
        self.loss_sum.add_(total.loss.detach())
        self.weight_sum.add_(total.weight)
        start, stop = self._filled, self._filled + len(target)
        if stop > self._held.shape[1]:
            self.count()
            start, stop = 0, len(target)
            if stop > self._held.shape[1] or self._held.device != target.device:
                self._held = torch.empty((2, _HELD * stop), dtype=torch.long, device=target.device)
        self._held[0, start:stop] = predicted
        self._held[1, start:stop] = target
        self._filled = stop

    def count(self) -> None:
        """Bring the counters up to date with the batches taken in."""
        if self._filled:
            predicted, target = self._held[:, : self._filled]
            self._filled = 0
            self.update(predicted, target)

    def update(self, predicted: Tensor, target: Tensor) -> None:
        """Count samples: predicted and true classes (n,)."""
        counts = target != self.ignore_index
        target = torch.where(counts, target.long(), 0)
        self.support.index_add_(0, target, counts.long())
        self.correct.index_add_(0, target, (counts & (predicted == target)).long())

    def compute(self) -> dict[str, Tensor]:
        """{"loss", "accuracy", "balanced_accuracy"}: micro accuracy, and the mean recall of the classes that occur."""
        support = self.support.double() if self.support.device.type != "mps" else self.support.float()
        present = self.support > 0
        recall = torch.where(present, self.correct / support.clamp(min=1), 0)
        return {
            "loss": self.loss_sum / torch.where(self.weight_sum > 0, self.weight_sum, 1),
            "accuracy": (self.correct.sum() / support.sum().clamp(min=1)).float(),
            "balanced_accuracy": (recall.sum() / present.sum().clamp(min=1)).float(),
        }

    def counters(self) -> dict[str, Tensor]:
        """What was counted so far, summed over processes."""
        self.count()
        counters = {name: getattr(self, name).clone() for name in self._defaults}
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for counter in counters.values():
                torch.distributed.all_reduce(counter)
        return counters

    def restore(self, counters: dict[str, Tensor], *, here: bool) -> None:
        """Go on from `counters`, in one process: elsewhere the counting starts at 0."""
        self.reset()
        for name, counter in counters.items():
            if here:
                setattr(self, name, counter.to(getattr(self, name)))

    def reset(self) -> None:
        self._filled = 0
        super().reset()
