"""How an image of any proportions becomes one of a given size.

crop      the largest centred part of the new proportions is resized: the shorter side fills the new image, and the ends of the longer
          one are lost
pad       the whole image is resized by its longer side, and centred; the rest has the image's mean colour, which adds no edge of
          high contrast and does not change the mean
stretch   the whole image is resized, without its proportions
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from PIL import Image

from ..errors import UserError, nearest

FITS = ("crop", "pad", "stretch")


class Frame(NamedTuple):
    """How an image becomes one of another size: a box of it is resized, and the result laid into the new image."""

    box: tuple[int, int, int, int]  # left, top, right, bottom in the image; whole pixels, so that an image of equal size is copied
    size: tuple[int, int]  # width and height of the resized box
    corner: tuple[int, int]  # left and top of the resized box in the new image


def frame(source: tuple[int, int], target: tuple[int, int], fit: str) -> Frame:
    """The frame for an image of size `source` in a new one of size `target`, both (width, height)."""
    width, height = source
    if fit == "crop":
        box_width = min(width, max(1, round(height * target[0] / target[1])))
        box_height = min(height, max(1, round(width * target[1] / target[0])))
        left, top = (width - box_width) // 2, (height - box_height) // 2
        return Frame((left, top, left + box_width, top + box_height), target, (0, 0))
    size = target
    if fit == "pad":
        scale = min(target[0] / width, target[1] / height)
        size = max(1, round(width * scale)), max(1, round(height * scale))
    return Frame((0, 0, width, height), size, ((target[0] - size[0]) // 2, (target[1] - size[1]) // 2))


def check_fit(fit: str) -> str:
    """`fit` itself. Raises UserError if it is not one of FITS."""
    if fit not in FITS:
        raise UserError(f"unknown fit {fit!r}{nearest(str(fit), FITS)}: choose {', '.join(FITS)}")
    return fit


def fitted(image: Image.Image, target: tuple[int, int], fit: str) -> Image.Image:
    """The image at the size `target` (width, height); its mode is L, RGB or F."""
    box, size, corner = frame(image.size, target, fit)
    if size != (box[2] - box[0], box[3] - box[1]):
        image = image.resize(size, Image.Resampling.BICUBIC, box)
    elif box != (0, 0, *image.size):
        image = image.crop(box)
    if size == target:
        return image
    mean = np.asarray(image).mean((0, 1), np.float64)  # () or (3,)
    colour = mean.item() if image.mode == "F" else tuple(np.rint(np.atleast_1d(mean)).astype(int).tolist())
    padded = Image.new(image.mode, target, colour)
    padded.paste(image, corner)
    return padded
