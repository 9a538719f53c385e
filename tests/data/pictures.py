"""Random pictures."""

import numpy as np
from PIL import Image


def picture(seed, size=(8, 8), mode="RGB"):
    """A PIL image of random pixels; `size` is (width, height)."""
    shape = (size[1], size[0]) if mode == "L" else (size[1], size[0], len(mode))
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8))
