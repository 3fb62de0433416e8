"""Small networks for probes, at module level so that they can be found by their import path."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Small(nn.Module):
    """Batch normalisation, dropout and a counter, all of which a training mode would move."""

    def __init__(self, width: int = 12, channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.pool(self.stem(x)).flatten(1))


class Several(Small):
    """Returns a dict, as segmentation networks do."""

    def forward(self, x: Tensor) -> Any:
        return {"out": super().forward(x), "aux": (self.stem(x), x)}


class Tokens(nn.Module):
    """(b, tokens, width), as transformers do."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Valid(nn.Module):
    """Accepts images of 7 × 7 pixels or more."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 7)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Branching(Small):
    """A forward that symbolic tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) > 0 else -x)


class Nan(Small):
    """NaN for black images."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return torch.where(x.flatten(1).amax(1, keepdim=True) <= 0, torch.nan, z)


def not_a_network() -> str:
    return "network"
