"""Augmentation policies: which transforms change the training images, and with which parameters.

A policy is a sequence of (transform, parameters), in the order in which they are applied to an image; the transforms are those of
`transforms.py`. All that a policy draws for an image is one map of places, one map of colours and one hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserError, nearest
from .transforms import TRANSFORMS, Changes

Policy = Sequence[tuple[str, dict[str, float]]]

POLICIES: dict[str, Policy] = {
    "none": (),
    "flip": (("flip", {"probability": 0.5}),),
    "crop-flip": (("crop", {"padding": 1 / 8}), ("flip", {"probability": 0.5})),
    "affine": (("affine", {"rotation": 15, "scale": 0.15, "shift": 0.08}),),
    "photo": (
        ("resized_crop", {"area": 0.35, "ratio": 1.5}),
        ("flip", {"probability": 0.5}),
        ("jitter", {"brightness": 0.3, "contrast": 0.3, "saturation": 0.3, "hue": 0.03}),
    ),
    "trivial": (("crop", {"padding": 1 / 8}), ("flip", {"probability": 0.5}), ("trivial", {"strength": 1})),
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
            TRANSFORMS[name](Changes(1, (8, 8), 1), np.random.default_rng(0), **parameters)
        except TypeError as error:
            raise UserError(f"transform {name!r}: {error}") from error
    return augmentation


class Drawn(NamedTuple):
    """What a policy does with each image of a batch, as `minivit.kernels.augment` takes it."""

    matrices: np.ndarray  # (B, 2, 3) float32: maps of output pixels to the positions they are read from
    colours: np.ndarray  # (B, C, C+1) float32: maps of colours
    holes: np.ndarray  # (B, 4) int64: top, left, bottom, right of the part that is blanked


def draw(random: np.random.Generator, policy: Policy, count: int, size: tuple[int, int], channels: int) -> Drawn:
    """Draw the changes of a batch of `count` images of a size (rows, columns)."""
    changes = Changes(count, size, channels)
    for name, parameters in policy:
        TRANSFORMS[name](changes, random, **parameters)
    return Drawn(changes.places[:, :2].astype(np.float32), changes.colours[:, :-1].astype(np.float32), changes.holes)
