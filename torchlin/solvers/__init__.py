"""Full-batch minimisers."""

from torchlin.solvers.descent import Trace, gradient_descent

__all__ = ["Trace", "gradient_descent"]
