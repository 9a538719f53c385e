"""The configuration of a model family: a frozen dataclass whose fields are validated against their annotations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, ClassVar, Literal

import numpy as np

from ..errors import UserError
from ..nn.stems import halvings
from ..schema import Checked, Count, Positive, Rate, Size
from ..sides import ImageSize, Padding, PatchSize, both

__all__ = ["BackboneConfig", "Config", "Count", "ImageSize", "Patch", "PatchSize", "Positive", "Rate", "Size", "StageConfig", "ratio_of"]

Patch = tuple[PatchSize, PatchSize, Padding]  # (size, stride, padding) in pixels


def ratio_of(hidden: int, dim: int) -> float:
    """The factor for which int(dim · factor) is `hidden`."""
    ratio = hidden / dim
    return ratio if int(dim * ratio) == hidden else float(np.nextafter(ratio, np.inf))


@dataclass(frozen=True)
class Config(Checked):
    """Base class of the configurations: the fields common to all families. All fields are validated against their annotations, with the
    ranges `Size`, `Count`, `Positive` and `Rate` of `minivit/schema.py`. Raises UserError."""

    image_size: ImageSize = 224  # pixels: (rows, columns), or one number for a square
    in_channels: Size = 3  # colours
    num_classes: Size = 1000  # output size of the head
    dtype: Literal["float32", "float64"] = "float32"  # of parameters and activations

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The shape of one image, (in_channels, rows, columns)."""
        return self.in_channels, *both(self.image_size)


@dataclass(frozen=True)
class StageConfig(Config):
    """Configuration of a family that can be a stage of a cascade (`models/cascade/dynamic.py`)."""

    # Fields that the cascade's options may set although its patches decide them too: `patch_fields` receives these options.
    patch_options: ClassVar[tuple[str, ...]] = ()

    # Channels that a cascade appends to the input of each channel MLP.
    extra_channels: Count = field(default=0, metadata={"stage_only": True})

    @classmethod
    def stage_defaults(cls, decided: Mapping[str, Any]) -> dict[str, Any]:
        """Default fields of a cascade stage, derived from the fields set by the cascade; the cascade's options override them."""
        return {}

    @classmethod
    def patch_fields(cls, patch: Patch, options: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a stage with this patch. options: those of the cascade."""
        raise NotImplementedError


@dataclass(frozen=True)
class BackboneConfig(StageConfig):
    """Configuration of a family that splits images into patches once."""

    patch_size: PatchSize = 16  # pixels: (rows, columns), or one number for both; must divide image_size if patch_stride is None
    patch_stride: PatchSize | None = None  # pixels from one patch to the next, at most patch_size; None: patch_size
    patch_padding: Padding = 0  # pixels of zeros around the image
    stem: Literal["patch", "convolution"] = "patch"  # a projection of patches, or convolutions (`nn/stems.py`; DeepViT has its own)
    stem_width: Size = 24  # channels of the first convolution of the stem

    def __post_init__(self) -> None:
        super().__post_init__()
        # Between patches further apart, there would be pixels that the model never sees, in an image of any size.
        for stride, size in zip(both(self.patch_stride or 1), both(self.patch_size)):
            if stride > size:
                raise UserError(f"patch_stride must be at most patch_size: {stride} is more than {size}")
        if self.stem == "convolution":
            self.check_convolution_stem()

    def check_convolution_stem(self) -> None:
        """Raises UserError if the convolutions cannot be made for these patches."""
        if halvings(self.patch_size) is None or self.patch_stride is not None or self.patch_padding != 0:
            raise UserError(
                f"stem='convolution' takes a patch_size that is a power of 2, no patch_stride and no patch_padding, not {self.patch_size}"
            )

    @property
    def patch_values(self) -> int:
        """How many numbers a patch holds, which are the inputs of its projection."""
        return self.in_channels * prod(both(self.patch_size))

    @classmethod
    def patch_fields(cls, patch: Patch, options: Mapping[str, Any]) -> dict[str, Any]:
        return dict(zip(("patch_size", "patch_stride", "patch_padding"), patch))
