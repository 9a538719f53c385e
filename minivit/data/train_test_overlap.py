"""A sample of hashes of a set of images: enough to tell later, without the images, whether others are from the same set.

The `SIZE` smallest hashes of a set are a uniform sample of it that needs no random numbers (a bottom-k sketch: Cohen and Kaplan,
"Summarizing data using bottom-k sketches", 2007). Images that are looked up are a sample by the same rule: those whose hash is no larger.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

SIZE = 4096  # of 50,000 images, 100 are known again 997 times in 1000


def _hash(image: np.ndarray) -> int:
    """63 bits of the pixels of one image, uint8 or floating in 0..1, which are taken as the bytes they stand for."""
    pixels = image if image.dtype == np.uint8 else np.rint(255 * image).astype(np.uint8)
    return int.from_bytes(blake2b(np.ascontiguousarray(pixels).data, digest_size=8).digest(), "big") >> 1


def hash_sample(images: np.ndarray) -> tuple[int, ...]:
    """At most `SIZE` different hashes, ascending, of images (n, H, W, C), uint8 or floating in 0..1."""
    return tuple(sorted({_hash(image) for image in images})[:SIZE])


def overlap(known: Sequence[int], images: np.ndarray) -> float:
    """The estimated share, 0..1, of images (n, H, W, C) that are in the set that `known` is a sample of; exact for a set below `SIZE`.

    A single hit among those that the sample can tell does not count: it may be a picture that the data holds twice.
    """
    if not known:
        return 0.0
    members, all_known = set(known), len(known) < SIZE
    hashes = [h for h in map(_hash, images) if all_known or h <= known[-1]]
    hits = sum(h in members for h in hashes)
    return hits / len(hashes) if hits > 1 else 0.0
