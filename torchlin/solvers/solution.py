"""What a solver hands out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torchlin.heads import LinearHead, Standardization
from torchlin.solvers.certificate import Certificate
from torchlin.solvers.state import Progress


class NotConvergedError(RuntimeError):
    """The tolerance was not met; `solution` is what was reached."""

    def __init__(self, message: str, solution: Solution) -> None:
        super().__init__(message)
        self.solution = solution


@dataclass(frozen=True)
class Solution:
    """A minimiser of F and the proof of how good it is.

    Attributes:
        weight: (k, p) on raw input; bias: (k,) on raw input.
        objective: F, in the standardised coordinates in which the penalty lives.
        gap: the certified relative gap, in the unit of `tol`.
        passes: products with X̃ and with X̃ᵀ, half a pass each; the Gram matrix is not in it.
        seconds: wall-clock, everything included.
        converged: gap ≤ tol.
        history: (passes, seconds, objective, gap) after every pass.
    """

    weight: Tensor
    bias: Tensor
    objective: float
    gap: float
    passes: float
    seconds: float
    converged: bool
    history: tuple[Progress, ...]
    certificate: Certificate
    standardization: Standardization
    loss: str

    @torch.no_grad()
    def to_head(self, dtype: torch.dtype = torch.float32) -> LinearHead:
        """A `LinearHead` on raw input."""
        k, p = self.weight.shape
        head = LinearHead(p, k, device=self.weight.device, dtype=dtype)
        head.weight.copy_(self.weight)
        head.bias.copy_(self.bias)
        head.info = {"loss": self.loss}
        return head
