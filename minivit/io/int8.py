"""Weights in 8 bits, for files of a quarter of the size: a matrix W (O, ...) is stored as whole numbers and a scale for each output.

    scale[o] = max |W[o]| / 127,    stored[o] = round(W[o] / scale[o])

under its own name and under the name with ".scale" after it. Predictions in "int8" round weights in the same way (`kernels/cpu/int8.py`),
so the rounding is not done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod

import numpy as np

SCALE = ".scale"
SMALLEST = 32  # numbers of an output, below which it stays as it is
LEVELS = np.float32(127)


def rounded(state: Mapping[str, np.ndarray], exact: Callable[[str], bool]) -> dict[str, np.ndarray]:
    """The arrays to store: matrices of weights in 8 bits; all others, and those whose names are to stay `exact`, as they are."""
    found = {}
    for name, array in state.items():
        found[name] = array
        if name.endswith("weight") and array.dtype == np.float32 and not exact(name) and (parts := rounded_rows(array)):
            found[name], found[name + SCALE] = parts
    return found


def rounded_rows(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Weights (O, ...) in 8 bits, and their scales (O,); None for those that stay as they are, because rows are short or not finite."""
    if weight.ndim < 2 or prod(weight.shape[1:]) < SMALLEST:
        return None
    rows = weight.reshape(len(weight), -1)
    scale = np.abs(rows).max(1) / LEVELS  # (O,)
    numbers = np.rint(rows / np.where(scale > 0, scale, 1)[:, None])
    return (numbers.astype(np.int8).reshape(weight.shape), scale) if np.isfinite(numbers).all() else None


def restored(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of a file, those in 8 bits as float32. Raises ValueError if a scale does not fit."""
    found = {}
    for name, array in state.items():
        scale = state.get(name + SCALE)
        if array.dtype == np.int8 and scale is not None:
            if scale.shape != array.shape[:1] or scale.dtype != np.float32:
                raise ValueError(f"{name}{SCALE} has shape {scale.shape}, not {array.shape[:1]}")
            found[name] = array * scale.reshape(-1, *[1] * (array.ndim - 1))
        elif not (name.endswith(SCALE) and state.get(name.removesuffix(SCALE), array).dtype == np.int8):
            found[name] = array
    return found
