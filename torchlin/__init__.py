"""torchlin: linear classifiers in PyTorch.

Heads, losses with hand-written gradients and penalties load with `import torchlin`; what needs Lightning, torchvision
or matplotlib loads when its name is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from torchlin import functional
from torchlin.bank import HeadBank
from torchlin.features import FeatureMatrix
from torchlin.heads import LinearHead, Standardization, absorb_bias, append_one, split_bias
from torchlin.losses import (
    LOSSES,
    CrammerSingerLoss,
    HingeLoss,
    LogisticLoss,
    Loss,
    PerceptronLoss,
    SoftmaxLoss,
    SquaredHingeLoss,
)
from torchlin.objective import Objective
from torchlin.optim import apply_penalty
from torchlin.patches import PatchFeatures
from torchlin.penalties import L1, L2, PENALTIES, ElasticNet, Penalty
from torchlin.registry import nearest
from torchlin.solvers import (
    Certificate,
    NotConvergedError,
    PathResult,
    Solution,
    certify,
    gradient_descent,
    solve,
    solve_path,
)
from torchlin.storage import load_head, save_head
from torchlin.version import __version__

if TYPE_CHECKING:
    from torchlin import data, estimators, report
    from torchlin.classifier import DivergenceError, LinearClassifier
    from torchlin.probe import Backbone, LinearProbe, Preprocess, ProbeResult, attach_head
    from torchlin.progress import ProgressBar
    from torchlin.run import RunFolder

_LAZY = {
    "Backbone": "torchlin.probe",
    "LinearProbe": "torchlin.probe",
    "Preprocess": "torchlin.probe",
    "ProbeResult": "torchlin.probe",
    "attach_head": "torchlin.probe",
    "LinearClassifier": "torchlin.classifier",
    "DivergenceError": "torchlin.classifier",
    "ProgressBar": "torchlin.progress",
    "RunFolder": "torchlin.run",
}
_LAZY_MODULES = ("data", "estimators", "report")

__all__ = [
    "L1",
    "L2",
    "LOSSES",
    "PENALTIES",
    "Backbone",
    "Certificate",
    "CrammerSingerLoss",
    "DivergenceError",
    "ElasticNet",
    "FeatureMatrix",
    "HeadBank",
    "HingeLoss",
    "LinearClassifier",
    "LinearHead",
    "LinearProbe",
    "LogisticLoss",
    "Loss",
    "NotConvergedError",
    "Objective",
    "PatchFeatures",
    "PathResult",
    "Penalty",
    "PerceptronLoss",
    "Preprocess",
    "ProbeResult",
    "ProgressBar",
    "RunFolder",
    "SoftmaxLoss",
    "Solution",
    "SquaredHingeLoss",
    "Standardization",
    "__version__",
    "absorb_bias",
    "append_one",
    "apply_penalty",
    "attach_head",
    "certify",
    "data",
    "estimators",
    "functional",
    "gradient_descent",
    "load_head",
    "report",
    "save_head",
    "solve",
    "solve_path",
    "split_bias",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name in _LAZY_MODULES:
        return importlib.import_module(f"torchlin.{name}")
    raise AttributeError(f"module 'torchlin' has no attribute {name!r}{nearest(name, __all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
