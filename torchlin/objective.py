"""F(W, b) = (1/N) Σ L_i + λ R(W): the one place where the data term and the penalty are added."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from torchlin.losses import Loss
from torchlin.optim import PenalizedHead
from torchlin.penalties import Penalty


@dataclass(frozen=True)
class Objective:
    """What is minimised: a loss and a penalty (None for no penalty). The bias is never penalised."""

    loss: Loss
    penalty: Penalty | None = None

    def penalty_value(self, head: PenalizedHead) -> Tensor:
        """λ R over the penalised part of the head's weight, a scalar."""
        penalized = head.penalized(head.weight)
        return penalized.new_zeros(()) if self.penalty is None else self.penalty.value(penalized)

    def value(self, data_term: Tensor, head: PenalizedHead) -> Tensor:
        """F, given the data term (1/N) Σ L_i of whatever data it was averaged over."""
        return data_term + self.penalty_value(head)
