"""Augmentation of training images: geometric transforms, mixup and CutMix, drawn for an entire batch at once.

A policy is a sequence of (transform, parameters), in the order in which they are applied to an image. A transform draws a 3×3 matrix for
each image of a batch, which maps an output pixel (j, i, 1) to the position (u, v, 1) it is read from; pixel centres are at integers. A
policy is then a product of matrices, which `minivit.kernels.augment` applies in one pass. Letters: B batch, (H, W) image size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, nearest

Policy = Sequence[tuple[str, dict[str, float]]]


def _shifts(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    matrices = np.tile(np.eye(3), (len(u), 1, 1))  # (B, 3, 3)
    matrices[:, 0, 2], matrices[:, 1, 2] = u, v
    return matrices


def flip(random: np.random.Generator, count: int, size: tuple[int, int], probability: float) -> np.ndarray:
    """Flip horizontally with a given probability."""
    matrices = np.tile(np.eye(3), (count, 1, 1))  # (B, 3, 3)
    flipped = random.random(count) < probability
    matrices[flipped, 0, 0] = -1
    matrices[flipped, 0, 2] = size[1] - 1
    return matrices


def crop(random: np.random.Generator, count: int, size: tuple[int, int], padding: float) -> np.ndarray:
    """Pad with black by `padding` times each side, rounded down, and crop a window of the original size at a random position."""
    height, width = (int(padding * side) for side in size)
    return _shifts(*(random.integers(-largest, largest, count, endpoint=True) for largest in (width, height)))


def affine(random: np.random.Generator, count: int, size: tuple[int, int], rotation: float, scale: float, shift: float) -> np.ndarray:
    """Rotate about the centre by up to ±`rotation` degrees, scale by 1 ± `scale`, shift by up to ±`shift` of each side, uniformly."""
    height, width = size
    angle = np.deg2rad(rotation) * random.uniform(-1, 1, count)  # (B,)
    factor = 1 + scale * random.uniform(-1, 1, count)
    u, v = (shift * side * random.uniform(-1, 1, count) for side in (width, height))
    rotation_matrix = np.zeros((count, 3, 3))
    rotation_matrix[:, 0, 0] = rotation_matrix[:, 1, 1] = np.cos(angle) / factor
    rotation_matrix[:, 1, 0] = np.sin(angle) / factor
    rotation_matrix[:, 0, 1] = -rotation_matrix[:, 1, 0]
    rotation_matrix[:, 2, 2] = 1
    x, y = np.full(count, (width - 1) / 2), np.full(count, (height - 1) / 2)
    return _shifts(x + u, y + v) @ rotation_matrix @ _shifts(-x, -y)


TRANSFORMS: dict[str, Callable[..., np.ndarray]] = {"flip": flip, "crop": crop, "affine": affine}

POLICIES: dict[str, Policy] = {
    "none": (),
    "flip": (("flip", {"probability": 0.5}),),
    "crop-flip": (("crop", {"padding": 1 / 8}), ("flip", {"probability": 0.5})),
    "affine": (("affine", {"rotation": 15, "scale": 0.15, "shift": 0.08}),),
}


def find_policy(augmentation: str | Policy) -> Policy:
    """The policy with this name, or a custom policy after validation. Raises UserError."""
    if isinstance(augmentation, str):
        if augmentation not in POLICIES:
            raise UserError(f"unknown augmentation {augmentation!r}{nearest(augmentation, POLICIES)}: choose {', '.join(POLICIES)}")
        return POLICIES[augmentation]
    for name, parameters in augmentation:
        if name not in TRANSFORMS:
            raise UserError(f"unknown transform {name!r}{nearest(name, TRANSFORMS)}: choose {', '.join(TRANSFORMS)}")
        try:
            TRANSFORMS[name](np.random.default_rng(0), 1, (8, 8), **parameters)
        except TypeError as error:
            raise UserError(f"transform {name!r}: {error}") from error
    return augmentation


def draw_matrices(random: np.random.Generator, policy: Policy, count: int, size: tuple[int, int]) -> np.ndarray:
    """(B, 2, 3) float32: for each image, the map from output pixels to the positions they are read from."""
    matrices = np.tile(np.eye(3), (count, 1, 1))  # (B, 3, 3)
    for name, parameters in policy:
        matrices = matrices @ TRANSFORMS[name](random, count, size, **parameters)
    return matrices[:, :2].astype(np.float32)


# -------------------------------------------------------------------------------------------------------------------------- mixing
class Mixing(NamedTuple):
    """The parameters by which each image of a batch is mixed with its partner."""

    partner: np.ndarray  # (B,) int64: indices into the batch
    lam: np.ndarray  # (B,) float32: weight of the image outside the box
    boxes: np.ndarray  # (B, 4) int64: top, left, bottom, right of the region taken from the partner
    share: np.ndarray  # (B,) float32: weight of the image's label


def no_mixing(count: int) -> Mixing:
    """The parameters that leave each image unchanged."""
    ones = np.ones(count, np.float32)
    return Mixing(np.arange(count), ones, np.zeros((count, 4), np.int64), ones)


def draw_mixing(random: np.random.Generator, count: int, size: tuple[int, int], mixup: float, cutmix: float) -> Mixing:
    """Mixup (Zhang et al., 1710.09412) or CutMix (Yun et al., 1905.04899), chosen with equal probability per batch if both are enabled.

    Each image has a separate weight from Beta(alpha, alpha) with alpha = `mixup` or `cutmix`; 0 disables the method. A CutMix box of area
    1 - weight with a uniformly distributed centre is clipped to the image, and the label weight is corrected to the remaining area.
    """
    if not (mixup or cutmix):
        return no_mixing(count)
    cut = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    partner = random.permutation(count)
    lam = random.beta(*(cutmix if cut else mixup,) * 2, count)  # (B,)
    if not cut:
        lam = lam.astype(np.float32)
        return Mixing(partner, lam, np.zeros((count, 4), np.int64), lam)
    sides = np.array(size)[:, None]  # (2, 1)
    box = sides * np.sqrt(1 - lam)  # (2, B): rows and columns
    centre = np.stack([random.uniform(0, side, count) for side in size])
    first = np.rint(centre - box / 2).clip(0, sides).astype(np.int64)
    last = np.rint(centre + box / 2).clip(0, sides).astype(np.int64)
    share = 1 - (last - first).prod(0) / (size[0] * size[1])
    return Mixing(partner, np.ones(count, np.float32), np.concatenate([first, last]).T.copy(), share.astype(np.float32))


def check_mixing(**alphas: Any) -> None:
    """Raises UserError for an alpha that is negative or not finite."""
    for name, alpha in alphas.items():
        if not 0 <= alpha < float("inf"):
            raise UserError(f"{name} must be 0 (off) or the positive alpha of a Beta distribution, got {alpha}")
