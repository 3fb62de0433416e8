"""A better lower bound from all dual points seen, without another pass over the data."""

from __future__ import annotations

import torch
from torch import Tensor


class Bundle:
    """The best convex combination of the last dual points under an L2 penalty.

    D is concave in the score gradients: for c in the simplex

        D(Σ c_t g_t) ≥ Σ c_t a_t − ‖Σ c_t V_t‖²/(4λ)

    where a_t is all of D(g_t) but the penalty's part. Only a_t and V_t (k, p) are kept. Where the minimiser sits in a
    corner of the loss, single gradients jump from one side to the other and their average is what the optimum needs.

    Reference: Kiwiel, Math. Programming 46 (1990), on aggregation in bundle methods.
    """

    def __init__(self, strength: float, size: int = 40) -> None:
        self.strength, self.size = strength, size
        self._values: list[float] = []
        self._gradients: list[Tensor] = []
        self._products = torch.zeros(0, 0, dtype=torch.float64)
        self._coefficients = torch.zeros(0, dtype=torch.float64)

    def add(self, value: float, v: Tensor) -> float:
        """The bound, now that a_t = `value` and V_t = `v` are known too."""
        if len(self._values) == self.size:
            self._drop(int(self._coefficients.argmin()))
        self._values.append(value)
        self._gradients.append(v)
        n = len(self._values)
        products = torch.zeros(n, n, dtype=torch.float64)
        products[:-1, :-1] = self._products
        row = torch.tensor([float((v * other).sum()) for other in self._gradients], dtype=torch.float64)
        products[-1], products[:, -1] = row, row
        self._products = products
        self._coefficients = torch.cat((self._coefficients, torch.zeros(1, dtype=torch.float64)))
        if n == 1:
            self._coefficients[0] = 1
        return self._maximise()

    def _drop(self, index: int) -> None:
        # What is left out stays in the others' sum, so that the bound never falls.
        kept = [i for i in range(len(self._values)) if i != index]
        self._values = [self._values[i] for i in kept]
        self._gradients = [self._gradients[i] for i in kept]
        self._products = self._products[kept][:, kept]
        rest = self._coefficients[kept]
        self._coefficients = rest / rest.sum()

    def _maximise(self) -> float:
        """max over the simplex of ⟨a, c⟩ − cᵀPc/(4λ), by moving weight between pairs (SMO)."""
        a = torch.tensor(self._values, dtype=torch.float64).tolist()
        p, c = self._products.tolist(), self._coefficients.tolist()
        n, half = len(a), 1 / (2 * self.strength)
        slope = [a[i] - half * sum(p[i][j] * c[j] for j in range(n)) for i in range(n)]
        scale = max(abs(v) for v in a) + 1e-300
        for _ in range(2000):
            up = max(range(n), key=slope.__getitem__)
            down = min((i for i in range(n) if c[i] > 0), key=slope.__getitem__)
            rise = slope[up] - slope[down]
            if rise <= 1e-9 * scale:
                break
            curvature = half * (p[up][up] + p[down][down] - 2 * p[up][down])
            step = c[down] if curvature * c[down] <= rise else rise / curvature
            c[up] += step
            c[down] = 0.0 if step == c[down] else c[down] - step
            for i in range(n):
                slope[i] -= half * step * (p[i][up] - p[i][down])
        self._coefficients = torch.tensor(c, dtype=torch.float64)
        quadratic = float(self._coefficients @ self._products @ self._coefficients)
        linear: float = sum(x * y for x, y in zip(a, c, strict=True))
        return linear - quadratic / (4 * self.strength)
