"""The activations that batch normalisation and convolutions apply: the reference, and what their kernels call.

relu = max(z, 0),     relu6 = min(max(z, 0), 6),     hardswish = z·relu6(z + 3)/6        (1905.02244, section 5.2)
"""

from __future__ import annotations

from math import inf

import numpy as np
from numba import njit

from .math import OPTIONS, clip

LIMITS = {"none": (-inf, inf), "relu": (0.0, inf), "relu6": (0.0, 6.0), "hardswish": (0.0, 0.0)}  # activation -> bounds of its result


def activate(z: np.ndarray, activation: str) -> np.ndarray:
    """f(z), the reference."""
    return z * np.clip(z + 3, 0, 6) / 6 if activation == "hardswish" else np.clip(z, *LIMITS[activation])


def slope(z: np.ndarray, activation: str) -> np.ndarray:
    """f'(z), the reference; it is 0 where relu and relu6 have two."""
    if activation == "hardswish":
        return np.where(z <= -3, 0, np.where(z >= 3, 1, (2 * z + 3) / 6)).astype(z.dtype)
    low, high = LIMITS[activation]
    return ((low < z) & (z < high)).astype(z.dtype)


def activation_arguments(activation: str) -> tuple[float, float, bool]:
    """The last arguments of the functions and kernels below: bounds, and whether it is hardswish instead."""
    return *LIMITS[activation], activation == "hardswish"


@njit(**OPTIONS)
def activated(z, low, high, curved):
    """f(z) inside kernels."""
    number = type(z)
    swish = z * clip(z + number(3), number(0), number(6)) * number(1 / 6)
    clipped = clip(z, low, high)
    return swish if curved else clipped


@njit(**OPTIONS)
def slope_of(z, low, high, curved):
    """f'(z) inside kernels."""
    number = type(z)
    middle = z * number(1 / 3) + number(0.5)
    swish = number(0) if z <= number(-3) else number(1) if z >= number(3) else middle
    clipped = number(1) if low < z and z < high else number(0)
    return swish if curved else clipped
