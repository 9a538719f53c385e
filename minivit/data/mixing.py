"""Mixup and CutMix: which images of a batch are mixed, and how, drawn for an entire batch at once. Letters: B batch, (H, W) image size."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError


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
