"""The losses as functions: `hinge_loss(scores, target, *, margin=1.0, …)`, one for every class of `LOSSES`.

The options are those of the class, whose docstring is the function's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from torchlin.losses import LOSSES, Loss
from torchlin.registry import nearest


def _function(cls: type[Loss]) -> Callable[..., Tensor]:
    plain = cls()  # stateless, so one serves all calls without options: making one costs 12 µs

    def loss_function(scores: Tensor, target: Tensor, **options: Any) -> Tensor:
        loss = cls(**options) if options else plain
        value: Tensor = loss(scores, target)
        return value

    first = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation="Tensor")
        for name in ("scores", "target")
    ]
    options = inspect.signature(cls).parameters.values()
    # What help() and editors show; a function's own dictionary is where `inspect` looks for it.
    loss_function.__dict__["__signature__"] = inspect.Signature([*first, *options], return_annotation="Tensor")
    loss_function.__name__ = loss_function.__qualname__ = f"{cls.name}_loss"
    loss_function.__doc__ = cls.__doc__
    return loss_function


_FUNCTIONS = {f"{cls.name}_loss": _function(cls) for cls in LOSSES}
globals().update(_FUNCTIONS)
__all__ = list(_FUNCTIONS)


def __getattr__(name: str) -> Callable[..., Tensor]:
    # Reached for unknown names only; it also tells type checkers what the generated names are.
    raise AttributeError(f"torchlin.functional has no {name!r}{nearest(name, __all__)}; it has {', '.join(__all__)}")
