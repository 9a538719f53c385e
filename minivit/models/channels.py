"""Patch projections for images of another number of channels, by timm's rule."""

from __future__ import annotations

import numpy as np


def convert(weight: np.ndarray, channels: int) -> np.ndarray:
    """Convert a convolution (dim, C, P, P) to `channels` input channels; anything else, and one that has them, is returned unchanged.

    For one channel the weights of all C are summed: a gray image gives what it gave as an image of C equal channels. For any other number
    they repeat in turn, scaled by C / channels, so that the sum of a constant image stays about the same.
    """
    if weight.ndim != 4 or weight.shape[1] in (0, channels):
        return weight
    C = weight.shape[1]
    wide = weight.astype(np.float64)
    converted = wide.sum(1, keepdims=True) if channels == 1 else wide[:, np.arange(channels) % C] * (C / channels)
    return converted.astype(weight.dtype)
