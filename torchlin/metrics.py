"""What is counted during a stage: one torchmetrics object, on the device, without a synchronisation per step."""

from __future__ import annotations

import torch
from torch import Tensor
from torchmetrics import Metric

from torchlin.losses import Loss


class StageMetrics(Metric):
    """Loss, accuracy and balanced accuracy of one pass over data.

    The state is a few counters per class. (torchmetrics' own per-class counters call bincount, which synchronises a
    GPU at every step.) Summed over processes, so the results are those of the whole data.
    """

    full_state_update = False
    loss_sum: Tensor
    weight_sum: Tensor
    correct: Tensor
    support: Tensor
    seen: Tensor
    first_bad: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        # float64 would be exact longer, but MPS has none; a float32 sum of batch losses is exact enough to log.
        self.add_state("loss_sum", torch.zeros(()), "sum")
        self.add_state("weight_sum", torch.zeros(()), "sum")
        self.add_state("correct", torch.zeros(num_classes, dtype=torch.long), "sum")
        self.add_state("support", torch.zeros(num_classes, dtype=torch.long), "sum")
        self.add_state("seen", torch.zeros((), dtype=torch.long), "sum")
        self.add_state("first_bad", torch.full((), -1, dtype=torch.long), "max")

    def update(self, predicted: Tensor, target: Tensor, loss_mean: Tensor, loss: Loss) -> None:
        """Count one batch: predicted and true classes (n,), and the mean loss of the batch.

        The mean is weighted by the batch's N = Σ w_y, so that the result is the mean over all samples.
        """
        weights, counts = loss.sample_weights(target)
        total = weights.sum().to(loss_mean.dtype)
        target = torch.where(counts, target.long(), 0)
        self.first_bad = torch.where((self.first_bad < 0) & ~loss_mean.isfinite(), self.seen, self.first_bad)
        self.seen = self.seen + 1
        self.loss_sum = self.loss_sum + loss_mean * total
        self.weight_sum = self.weight_sum + total
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
