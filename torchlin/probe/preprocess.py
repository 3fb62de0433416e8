"""From decoded pixels to what a network takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

_MODES = ("nearest", "nearest-exact", "bilinear", "bicubic")


class Preprocess(nn.Module):
    """Images uint8 (b, C, H, W) → what the network takes: resized, cropped, scaled and normalised.

        x = (v/255 − mean) / std

    after the shorter side was resized to `resize` pixels and the square of `crop` pixels around the centre was cut
    out. Without `mean` and `std` the pixels stay as they are, in uint8. The arithmetic is torchvision's, so that its
    weights see what they were trained on.

    Args:
        resize: pixels of the shorter side; None for none.
        crop: side of the square; None for none.
        mean, std: one number per channel, of x/255.
        interpolation: "bilinear", "bicubic", "nearest" or "nearest-exact", antialiased.

    Raises:
        ValueError: sizes below 1, a crop larger than the shorter side, mean without std, an unknown interpolation.
    """

    def __init__(
        self,
        resize: int | None = None,
        crop: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        interpolation: str = "bilinear",
    ) -> None:
        super().__init__()
        for name, size in (("resize", resize), ("crop", crop)):
            if size is not None and size < 1:
                raise ValueError(f"preprocess: {name} is a number of pixels, at least 1, got {size}")
        if resize is not None and crop is not None and crop > resize:
            raise ValueError(f"preprocess: a crop of {crop} pixels does not fit into a shorter side of {resize}")
        if (mean is None) != (std is None):
            raise ValueError("preprocess: mean and std come together, one number per channel each")
        if mean is not None and std is not None and not (len(mean) == len(std) and all(s > 0 for s in std)):
            raise ValueError(f"preprocess: one mean and one std > 0 per channel, got {list(mean)} and {list(std)}")
        if interpolation not in _MODES:
            raise ValueError(f"preprocess: interpolation is one of {', '.join(_MODES)}, got {interpolation!r}")
        self.resize, self.crop, self.interpolation = resize, crop, interpolation
        self.mean = None if mean is None else [float(m) for m in mean]
        self.std = None if std is None else [float(s) for s in std]

    def forward(self, images: Tensor) -> Tensor:
        if self.resize is not None:
            images = TF.resize(images, [self.resize], InterpolationMode(self.interpolation), antialias=True)
        if self.crop is not None:
            images = TF.center_crop(images, [self.crop])
        if self.mean is None:
            return images
        normalised: Tensor = TF.normalize(TF.convert_image_dtype(images, torch.float32), self.mean, self.std)
        return normalised

    def to_info(self) -> dict[str, Any]:
        """The arguments, as plain JSON values."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "mean": self.mean,
            "std": self.std,
            "interpolation": self.interpolation,
        }

    @classmethod
    def from_info(cls, info: Mapping[str, Any]) -> Preprocess:
        """The inverse of `to_info`."""
        known = cls().to_info()
        if unknown := [key for key in info if key not in known]:
            raise ValueError(f"preprocess has no option {unknown[0]!r}; options: {', '.join(known)}")
        return cls(**{**known, **info})

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in self.to_info().items() if value is not None)


def of_torchvision(weights: Any) -> Preprocess:
    """The preprocessing that belongs to a member of a torchvision weights enum.

    Raises:
        ValueError: its transforms are not those of an image classifier.
    """
    preset = weights.transforms()
    names = ("resize_size", "crop_size", "mean", "std", "interpolation")
    if not all(hasattr(preset, name) for name in names):
        raise ValueError(f"the transforms of {weights} are not those of an image classifier: give preprocess yourself")
    resize, crop, mean, std, interpolation = (getattr(preset, name) for name in names)
    return Preprocess(resize[0], crop[0], mean, std, interpolation.value)


def of_timm(config: Mapping[str, Any]) -> Preprocess:
    """The preprocessing of timm's data configuration (`timm.data.resolve_model_data_config`)."""
    crop = int(config["input_size"][-1])
    resize = math.floor(crop / float(config.get("crop_pct", 1.0)))
    return Preprocess(resize, crop, config["mean"], config["std"], config.get("interpolation", "bilinear"))
