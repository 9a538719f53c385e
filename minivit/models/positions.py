"""Resizing of position embeddings with the weights of `kernels/resample.py`: a resized checkpoint gives the same outputs as in timm."""

from __future__ import annotations

from math import isqrt

import numpy as np

from ..errors import UserError
from ..kernels.resample import axis_matrix, resample_grid


def fitted(state: dict[str, np.ndarray], name: str, shape: tuple[int, ...], grid: int, prefix: int, method: str) -> dict[str, np.ndarray]:
    """`state` with the embedding `name` resized to the model's, which has this shape (1, prefix + grid², C).

    One that is missing, fits, or has another number of axes or channels, stays as it is: loading it tells what is wrong.
    """
    given = state.get(name)
    if given is None or given.shape == shape or given.shape[::2] != shape[::2]:
        return state
    return state | {name: resize(given, grid, prefix, method)}


def resize(positions: np.ndarray, grid: int, prefix: int, method: str) -> np.ndarray:
    """Resize positions (1, prefix + old², C) -> (1, prefix + grid², C); the first `prefix` (class tokens) are unchanged.

    method: of `axis_matrix`; timm uses "bicubic_antialias", Google's code "bilinear", DeiT and T2T "bicubic".
    Raises UserError if the number of the others is not a square.
    """
    prefix = int(prefix)
    patches = positions.shape[1] - prefix
    old = isqrt(max(patches, 0))
    if old < 1 or old * old != patches:
        raise UserError(f"position embedding of {positions.shape[1]} tokens: less {prefix} for the class token, {patches} is no square")
    resized = resample_grid(positions[:, prefix:].astype(np.float64), axis_matrix(old, grid, method))
    return np.concatenate([positions[:, :prefix], resized.astype(positions.dtype)], axis=1)
