"""The first layers of a model: patches as in ViT, or convolutions in their place. `layers.py` has the base class and the patches."""

from __future__ import annotations

from math import log2
from typing import Any

from ..sides import Sides, both
from ..tensor import Tensor
from .convolution import Conv2d, convolve_all
from .initialisers import Initialiser, lecun_normal, on_convolutions
from .layers import BatchNorm, PatchEmbed, Sequential, Stem, check_images


def stem_of(config: Any) -> Stem:
    """The stem that a configuration (`models.config.BackboneConfig`) asks for."""
    return ConvolutionStem(config) if config.stem == "convolution" else PatchEmbed.of(config)


def halvings(patch_size: Sides) -> tuple[int, int] | None:
    """How many times rows and columns are halved to make a patch one number; None where halving does not."""
    found = [int(log2(side)) for side in both(patch_size)]
    return (found[0], found[1]) if [2**times for times in found] == list(both(patch_size)) else None


class ConvolutionStem(Stem):
    """3×3 convolutions in place of the patch projection: (B, in_channels, H, W) -> (B, N, dim) (2106.14881, section 4).

    The first keeps the size of the images and has `stem_width` channels; each further one halves the map, until a pixel of it stands for a
    patch, and has twice the channels, the last one `dim`. All but the last are followed by batch normalisation and ReLU. The image may have
    any size: at its lower and right edges, patches may be incomplete.
    """

    first = "convs.0.weight"
    no_muon = (first,)

    def __init__(self, config: Any) -> None:
        dtype = config.dtype
        self.shape, times = config.image_shape, halvings(config.patch_size)
        rows, columns = (-(-image // patch) for image, patch in zip(both(config.image_size), both(config.patch_size)))
        self.grid = rows, columns
        assert times is not None  # the configuration checks it
        channels, layers = config.in_channels, list[Any]()
        for i in range(1 + max(times)):
            last = i == max(times)
            width = config.dim if last else config.stem_width * 2**i
            stride = tuple(1 + (0 < i <= halved) for halved in times)
            layers.append(Conv2d(channels, width, 3, stride, padding=1, bias=last, dtype=dtype))
            layers += [] if last else [BatchNorm(width, dtype=dtype), None]  # None stands for the ReLU
            channels = width
        self.convs = Sequential(*layers)

    def initialisers(self) -> dict[str, Initialiser]:
        return {"*.weight": on_convolutions(lecun_normal)}

    def forward(self, images: Tensor) -> Tensor:
        check_images(images, self.shape)
        x = convolve_all(self.convs.layers, images.transpose(0, 2, 3, 1), "relu")  # (B, rows, columns, dim)
        return x.reshape(len(x), -1, x.shape[3])
