"""Resizing of position embeddings with the weights of `kernels/resample.py`: a resized checkpoint gives the same outputs as in timm."""

from __future__ import annotations

from math import isqrt, prod

import numpy as np

from ..errors import UserError
from ..kernels.resample import matrices, resample_grid
from ..sides import Sides, both


def fitted(
    state: dict[str, np.ndarray], name: str, shape: tuple[int, ...], grid: tuple[int, int], prefix: int, method: str
) -> dict[str, np.ndarray]:
    """`state` with the embedding `name` resized to the model's, which has this shape (1, prefix + patches, C).

    One that is missing, fits, or has another number of axes or channels, stays as it is: loading it tells what is wrong.
    """
    given = state.get(name)
    if given is None or given.shape == shape or given.shape[::2] != shape[::2]:
        return state
    return state | {name: resize(given, grid, prefix, method)}


def resize(positions: np.ndarray, grid: Sides, prefix: int, method: str, old: tuple[int, int] | None = None) -> np.ndarray:
    """Resize positions (1, prefix + patches, C) to another grid (rows, columns); the first `prefix` (class tokens) are unchanged.

    old: their grid; None: a square.
    method: of `axis_matrix`; timm uses "bicubic_antialias", Google's code "bilinear", DeiT and T2T "bicubic".
    Raises UserError if the number of the others is not that of the grid.
    """
    prefix = int(prefix)
    patches = positions.shape[1] - prefix
    old = old or both(isqrt(max(patches, 0)))
    if patches < 1 or prod(old) != patches:
        hint = (
            ": a DeiT with two tokens needs distillation='head'" if prefix == 1 and isqrt(max(patches - 1, 0)) ** 2 == patches - 1 else ""
        )
        raise UserError(
            f"position embedding of {positions.shape[1]} tokens: less {prefix} for the class token, {patches} is no square{hint}"
        )
    resized = resample_grid(positions[:, prefix:].astype(np.float64), *matrices(old, both(grid), method))
    return np.concatenate([positions[:, :prefix], resized.astype(positions.dtype)], axis=1)
