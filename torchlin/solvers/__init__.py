"""Full-batch minimisers."""

from torchlin.solvers.certificate import Certificate
from torchlin.solvers.certify import certify
from torchlin.solvers.descent import Trace, gradient_descent
from torchlin.solvers.path import PathResult, solve_path
from torchlin.solvers.solution import NotConvergedError, Solution
from torchlin.solvers.solve import solve

__all__ = [
    "Certificate",
    "NotConvergedError",
    "PathResult",
    "Solution",
    "Trace",
    "certify",
    "gradient_descent",
    "solve",
    "solve_path",
]
