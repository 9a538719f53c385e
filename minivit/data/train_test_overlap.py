"""Detection of overlap between sets of images by a sample of hashes, without storing the images.

The `SIZE` smallest hashes of a set are a uniform sample of it that needs no random numbers (a bottom-k sketch: Cohen and Kaplan,
"Summarizing data using bottom-k sketches", 2007). Of the images to compare, those with a hash in the same range are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

SIZE = 4096  # detects 100 images out of a set of 50,000 with probability 0.997


def _hash(image: np.ndarray) -> int:
    """A 63-bit hash of the pixels of one image, uint8, or floating-point in 0..1, which is converted to uint8."""
    pixels = image if image.dtype == np.uint8 else np.rint(255 * image).astype(np.uint8)
    return int.from_bytes(blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest(), "big") >> 1


def hash_sample(images: np.ndarray) -> tuple[int, ...]:
    """The at most `SIZE` smallest distinct hashes, ascending, of images (n, H, W, C), uint8 or floating-point in 0..1."""
    return tuple(sorted({_hash(image) for image in images})[:SIZE])


def overlap(known: Sequence[int], images: np.ndarray) -> float:
    """The estimated fraction, 0..1, of images (n, H, W, C) that belong to the set with hash sample `known`; exact for a set below `SIZE`.

    A single match is ignored: it may be an image that occurs twice in the data.
    """
    if not known:
        return 0.0
    known_hashes, is_complete = set(known), len(known) < SIZE
    hashes = [h for h in map(_hash, images) if is_complete or h <= known[-1]]
    matches = sum(h in known_hashes for h in hashes)
    return matches / len(hashes) if matches > 1 else 0.0
