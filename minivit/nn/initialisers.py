"""Initialisation of weights: distributions, and their assignment to parameters.

A model defines its distributions in one table, {name pattern: Initialiser}. The first pattern that matches a parameter's name applies; a
parameter that matches none keeps the value set by its layer (zero, or one for the scale of a normalisation). Each parameter has a separate
generator, keyed by the seed and its name, so that its values do not depend on other parameters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from math import prod, sqrt

import numpy as np

from .module import Module, in_outline

Initialiser = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


def generator(seed: int, name: str) -> np.random.Generator:
    """The Philox generator (Salmon et al., 2011) for a seed and a name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def initialise(model: Module, table: Mapping[str, Initialiser | None], seed: int, only: str = "*") -> None:
    """Draw every parameter of `model` whose name matches `only` from the first entry of the table that matches its name, unless it is None.

    The parameters of an outline (`module.outlines`) have no memory to draw values into: they stay as they are.
    """
    if in_outline():
        return
    for name, parameter in model.named_parameters():
        draw = next((draw for pattern, draw in table.items() if fnmatchcase(name, pattern)), None)
        if draw is not None and fnmatchcase(name, only):
            parameter.data[...] = draw(generator(seed, name), parameter.shape)


def normal(std: float) -> Initialiser:
    """Normal with mean 0."""
    return lambda rng, shape: rng.normal(0.0, std, shape)


def uniform(limit: float) -> Initialiser:
    """Uniform in ±limit. PyTorch's default for a layer's weight and bias (Kaiming with a = √5) has limit 1/√fan_in."""
    return lambda rng, shape: rng.uniform(-limit, limit, shape)


def on_convolutions(draw: Initialiser) -> Initialiser:
    """The distribution of the weights of convolutions; what has one dimension, the scale of a normalisation, is one."""
    return lambda rng, shape: draw(rng, shape) if len(shape) > 1 else np.ones(shape)


@on_convolutions
def kaiming_uniform(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Uniform in ±1/√fan_in, PyTorch's default for a convolution."""
    return uniform(prod(shape[1:]) ** -0.5)(rng, shape)


def truncated_normal(std: float, limit: float = 2.0) -> Initialiser:
    """Normal truncated at ±limit (an absolute value, as in timm's trunc_normal_, not a multiple of std)."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        values = rng.normal(0.0, std, shape)
        while (outside := np.abs(values) > limit).any():
            values[outside] = rng.normal(0.0, std, int(outside.sum()))
        return values

    return draw


def lecun_normal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Normal truncated at two standard deviations and rescaled to variance 1 / fan_in, as in Flax and timm."""
    std = sqrt(1.0 / prod(shape[1:])) / 0.87962566103423978  # the standard deviation of a unit normal truncated at ±2
    return truncated_normal(std, 2 * std)(rng, shape)


def xavier_uniform(parts: int = 1) -> Initialiser:
    """Uniform with variance 2 / (fan_in + fan_out) (Glorot and Bengio, 2010) for a weight that stacks `parts` matrices of equal shape."""

    def draw(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        limit = sqrt(6.0 / (shape[1] + shape[0] // parts))
        return rng.uniform(-limit, limit, shape)

    return draw


def orthogonal(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """A uniformly random (m, E) matrix with m <= E orthogonal rows of length √m; with m > E, E orthogonal columns of this length."""
    rows, columns = max(shape), min(shape)
    q, r = np.linalg.qr(rng.normal(0.0, 1.0, (rows, columns)))
    q = q * np.sign(np.diag(r)) * sqrt(shape[0])  # the signs of LAPACK's factors are not random
    return q if shape == (rows, columns) else q.T
