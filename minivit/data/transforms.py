"""Transforms of training images, which change where the pixels of an image are read, their colours, or blank a part of them.

A transform draws for all images of a batch at once, and adds what it drew to their `Changes`, which `minivit.kernels.augment` applies in
one pass. Letters: B batch, (H, W) image size, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ..errors import UserError

Random = np.random.Generator
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in the brightness of a pixel (ITU-R BT.601)
YIQ = np.array([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])  # its last two axes span the hues


class Changes:
    """What the transforms do with each image of a batch; at first nothing.

    places: (B, 3, 3), maps of an output pixel (j, i, 1) to the position (u, v, 1) it is read from; pixel centres are at integers.
    colours: (B, C+1, C+1), maps of the colour (c, 1) of a pixel, in 0..1. holes: (B, 4), top, left, bottom and right of a part without
    content, where bottom and right are exclusive. Colours that leave 0..1 are not clipped.
    """

    def __init__(self, count: int, size: tuple[int, int], channels: int) -> None:
        self.count, self.size, self.channels = count, size, channels
        self.places = np.tile(np.eye(3), (count, 1, 1))
        self.colours = np.tile(np.eye(channels + 1), (count, 1, 1))
        self.holes = np.zeros((count, 4), np.int64)

    def move(self, matrices: np.ndarray) -> None:
        """Change the images further: the new image at a place is the changed image where (B, 3, 3) maps the place to."""
        self.places = self.places @ matrices

    def shift(self, u: np.ndarray, v: np.ndarray) -> None:
        """Read each pixel further right and down, by u and v (B,)."""
        self.places[:, :, 2] += self.places[:, :, 0] * u[:, None] + self.places[:, :, 1] * v[:, None]

    def about_centre(self, matrices: np.ndarray) -> None:
        """`move` by matrices (B, 2, 2), with the centre of the image as the origin."""
        centre = (np.array(self.size[::-1]) - 1) / 2  # (2,)
        whole = np.tile(np.eye(3), (self.count, 1, 1))
        whole[:, :2, :2] = matrices
        whole[:, :2, 2] = centre - matrices @ centre
        self.move(whole)

    def recolour(self, matrices: np.ndarray) -> None:
        """Change the colours further, by (B, C+1, C+1)."""
        self.colours = matrices @ self.colours

    def blend(self, factor: np.ndarray, other: np.ndarray) -> None:
        """Change the colours to factor (B,) of themselves and 1 - factor of what (C+1, C+1) makes of them."""
        own = factor[:, None, None]
        self.recolour(own * np.eye(self.channels + 1) + (1 - own) * other)

    @property
    def black(self) -> np.ndarray:
        """The colour map (C+1, C+1) to black."""
        return np.diag(np.eye(self.channels + 1)[-1])

    @property
    def grey(self) -> np.ndarray:
        """The colour map (C+1, C+1) to the grey of equal brightness."""
        matrix = self.black
        matrix[:-1, :-1] = LUMA if self.channels == len(LUMA) else 1 / self.channels
        return matrix

    @property
    def middle(self) -> np.ndarray:
        """The colour map (C+1, C+1) to the grey between black and white."""
        matrix = self.black
        matrix[:-1, -1] = 0.5
        return matrix


# ------------------------------------------------------------------------------------------------------------------------ place
def flip(changes: Changes, random: Random, probability: float) -> None:
    """Flip horizontally with a given probability."""
    flipped = random.random(changes.count) < probability
    matrices = np.tile(np.eye(3), (changes.count, 1, 1))
    matrices[flipped, 0, 0] = -1
    matrices[flipped, 0, 2] = changes.size[1] - 1
    changes.move(matrices)


def crop(changes: Changes, random: Random, padding: float) -> None:
    """Pad with black by `padding` times each side, rounded down, and crop a window of the original size at a random position."""
    height, width = (int(padding * side) for side in changes.size)
    changes.shift(*(random.integers(-largest, largest, changes.count, endpoint=True) for largest in (width, height)))


def resized_crop(changes: Changes, random: Random, area: float, ratio: float) -> None:
    """Enlarge a box of the image to its whole size: `area` … 1 of its pixels, its proportions changed by up to `ratio` either way
    (1409.4842, section 6)."""
    check(0 < area <= 1 <= ratio < np.inf, "resized_crop: area must lie in 0 ... 1 and not be 0, and ratio must be at least 1")
    share = random.uniform(area, 1, changes.count)
    stretch = np.exp(np.log(ratio) / 2 * random.uniform(-1, 1, changes.count))
    matrices = np.tile(np.eye(3), (changes.count, 1, 1))
    for axis, factor in enumerate((stretch, 1 / stretch)):
        side = changes.size[1 - axis]
        part = np.minimum(np.sqrt(share) * factor, 1)
        start = random.uniform(0, 1, changes.count) * (1 - part) * side
        matrices[:, axis, axis], matrices[:, axis, 2] = part, start + (part - 1) / 2
    changes.move(matrices)


def affine(changes: Changes, random: Random, rotation: float, scale: float, shift: float) -> None:
    """Rotate about the centre by up to ±`rotation` degrees, scale by 1 ± `scale`, shift by up to ±`shift` of each side, uniformly."""
    angle = np.deg2rad(rotation) * random.uniform(-1, 1, changes.count)
    factor = 1 + scale * random.uniform(-1, 1, changes.count)
    height, width = changes.size
    changes.shift(*(shift * side * random.uniform(-1, 1, changes.count) for side in (width, height)))
    changes.about_centre(_rotations(angle) / factor[:, None, None])


def _rotations(angle: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle), np.sin(angle)
    return np.stack([cos, -sin, sin, cos], -1).reshape(-1, 2, 2)


# ----------------------------------------------------------------------------------------------------------------------- colour
def jitter(changes: Changes, random: Random, brightness: float = 0, contrast: float = 0, saturation: float = 0, hue: float = 0) -> None:
    """Multiply brightness, contrast (about the middle grey) and saturation by 1 ± their limits, and turn the hue by up to ±`hue` turns.

    Of images that are not RGB, saturation is the distance from the mean of the channels, and hue is left alone.
    """
    for limit, other in ((brightness, changes.black), (contrast, changes.middle), (saturation, changes.grey)):
        check(0 <= limit <= 1, "jitter: brightness, contrast and saturation must lie in 0 ... 1")
        changes.blend(1 + limit * random.uniform(-1, 1, changes.count), other)
    check(0 <= hue <= 0.5, "jitter: hue must lie in 0 ... 0.5")
    turn = _rotations(2 * np.pi * hue * random.uniform(-1, 1, changes.count))
    if hue and changes.channels == len(LUMA):
        matrices = np.tile(np.eye(4), (changes.count, 1, 1))
        matrices[:, 1:3, 1:3] = turn
        matrices[:, :3, :3] = np.linalg.inv(YIQ) @ matrices[:, :3, :3] @ YIQ
        changes.recolour(matrices)


def grey(changes: Changes, random: Random, probability: float) -> None:
    """Make an image grey with a given probability."""
    changes.blend(1.0 - (random.random(changes.count) < probability), changes.grey)


# ------------------------------------------------------------------------------------------------------------------------- both
def trivial(changes: Changes, random: Random, strength: float) -> None:
    """One change an image, of which and how much are uniformly distributed (TrivialAugment, 2103.10158).

    Of the paper's operations those that are linear: none, shear and shift along either axis, rotation, brightness, contrast, saturation.
    The largest are, in units of `strength`: shears of 0.3, shifts by 0.3 of a side, 30 degrees, and factors of 0.1 or 1.9.
    """
    check(0 <= strength <= 1, "trivial: strength must lie in 0 ... 1")
    kind = random.integers(0, 9, changes.count)
    amount = strength * random.uniform(-1, 1, changes.count)
    of_kind = [np.where(kind == k, amount, 0) for k in range(9)]
    shear = np.tile(np.eye(2), (changes.count, 1, 1))
    shear[:, 0, 1], shear[:, 1, 0] = 0.3 * of_kind[1], 0.3 * of_kind[2]
    changes.about_centre(shear)
    changes.shift(0.3 * changes.size[1] * of_kind[3], 0.3 * changes.size[0] * of_kind[4])
    changes.about_centre(_rotations(np.deg2rad(30) * of_kind[5]))
    for k, other in zip((6, 7, 8), (changes.black, changes.middle, changes.grey)):
        changes.blend(1 + 0.9 * of_kind[k], other)


# ------------------------------------------------------------------------------------------------------------------------ holes
def erase(changes: Changes, random: Random, probability: float, area: float) -> None:
    """With a given probability, blank a box of up to `area` of the image with the mean colour (random erasing, 1708.04896)."""
    check(0 <= area <= 1, "erase: area must lie in 0 ... 1")
    erased = random.random(changes.count) < probability
    share = area * random.uniform(0, 1, changes.count)
    stretch = np.exp(np.log(3) / 2 * random.uniform(-1, 1, changes.count))
    first, last = [], []
    for side, factor in zip(changes.size, (stretch, 1 / stretch)):
        length = np.minimum(np.rint(np.sqrt(share) * factor * side), side) * erased
        start = np.floor(random.uniform(0, 1, changes.count) * (side - length + 1))
        first.append(start)
        last.append(start + length)
    changes.holes = np.stack(first + last, 1).astype(np.int64)


def check(holds: Any, message: str) -> None:
    """Raises UserError unless a condition holds."""
    if not holds:
        raise UserError(message)


TRANSFORMS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (flip, crop, resized_crop, affine, jitter, grey, trivial, erase)
}
