"""Position embeddings on another grid.

Each method is a separable linear map, R · grid · Rᵀ, with the weights PyTorch's `interpolate(align_corners=False)` uses, so that a resized
checkpoint computes what it computes in timm:

    "bicubic_antialias"   Keys' cubic, a = -1/2, widened by the factor of a reduction, cut and normalised at the border: timm's
    "bicubic"             Keys' cubic, a = -3/4, never widened, positions beyond the border taken from it: DeiT's, T2T's
    "bilinear"            the triangle, likewise: timm's import of Google's files
"""
from __future__ import annotations

from math import floor, isqrt

import numpy as np

from ..errors import UserError


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' convolution kernel (1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def resize_matrix(old: int, new: int, method: str) -> np.ndarray:
    """R (new, old): the resized row is R @ row."""
    matrix = np.zeros((new, old))
    for i in range(new):
        centre = (i + 0.5) * old / new                  # in units of old pixels, whose centres are at 1/2, 3/2, ...
        if method == "bicubic_antialias":
            width = max(old / new, 1.0)
            first, last = max(int(centre - 2 * width + 0.5), 0), min(int(centre + 2 * width + 0.5), old)
            weights = _cubic((np.arange(first, last) + 0.5 - centre) / width, -0.5)
            matrix[i, first:last] = weights / weights.sum()
        elif method == "bicubic":
            taps = floor(centre - 0.5) + np.arange(-1, 3)
            np.add.at(matrix[i], taps.clip(0, old - 1), _cubic(taps + 0.5 - centre, -0.75))
        elif method == "bilinear":
            taps = floor(centre - 0.5) + np.arange(2)
            np.add.at(matrix[i], taps.clip(0, old - 1), 1 - np.abs(taps + 0.5 - centre))
        else:
            raise ValueError(f"no method {method!r}")
    return matrix


def resize(positions: np.ndarray, grid: int, prefix: int, method: str) -> np.ndarray:
    """Positions (1, prefix + old², C) -> (1, prefix + grid², C); the `prefix` first, of class tokens and the like, stay as they are.

    Raises UserError where the others are no square.
    """
    number, channels = positions.shape[1] - prefix, positions.shape[2]
    old = isqrt(max(number, 0))
    if old < 1 or old * old != number:
        raise UserError(f"position embedding of {positions.shape[1]} tokens: less {prefix} for the class token, {number} is no square")
    matrix = resize_matrix(old, grid, method)           # (grid, old)
    square = positions[0, prefix:].reshape(old, old, channels).astype(np.float64)
    resized = np.einsum("ia,jb,abc->ijc", matrix, matrix, square, optimize=True).reshape(1, grid * grid, channels)
    return np.concatenate([positions[:, :prefix], resized.astype(positions.dtype)], axis=1)
