"""IDX files, the format of MNIST and similar datasets (LeCun, Cortes and Burges), plain or gzipped."""

from __future__ import annotations

import os
import struct
from math import prod
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import reading_untrusted
from ..sides import Sides
from .dataset import Dataset, from_arrays
from .unpack import unpacked

PARTS = {"train": "train", "test": "t10k"}
KINDS = {"images": ("idx3", 3), "labels": ("idx1", 1)}  # (part of the file name, number of dimensions)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The file under any of its usual names: train-images-idx3-ubyte, train-images.idx3-ubyte, either with or without .gz."""
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{PARTS[part]}-{kind}{separator}{KINDS[kind][0]}-ubyte{suffix}"
            if os.path.isfile(path):  # also where the folder may not be searched
                return path
    return None


def holds_idx(folder: Path) -> bool:
    """Whether a folder contains any of the four IDX files."""
    return any(_find(folder, part, kind) for part in PARTS for kind in KINDS)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file. Raises UserError if it is not an IDX file of this kind, damaged or truncated."""
    with reading_untrusted(str(path), "it is damaged or not whole, so fetch it again"), unpacked(path) as stream:
        kind = stream.read(4)
        if kind != bytes((0, 0, 8, dimensions)):
            raise UserError(f"{path} is no IDX file of bytes in {dimensions} dimensions: it starts with {kind.hex(' ') or 'nothing'}")
        shape = struct.unpack(f">{dimensions}I", stream.read(4 * dimensions))
        size = prod(shape)
        promise = f"it promises {' × '.join(map(str, shape))} bytes"
        if size > stream.most:
            raise UserError(f"cannot read {path}: {promise}, too many for a file of its size; unpack it first, or fetch it again")
        content = stream.read(size + 1)  # one more, which must not be there
        if len(content) != size:
            raise ValueError(f"{promise}, but holds {'more' if len(content) > size else len(content)}")
        return np.frombuffer(content, np.uint8).reshape(shape)


def load_idx(folder: Path, image_size: Sides | None, fit: str = "crop") -> Dataset:
    """The dataset of the four IDX files in `folder`. Raises UserError."""
    arrays, missing = {}, []
    for part in PARTS:
        for kind, (ending, dimensions) in KINDS.items():
            if path := _find(folder, part, kind):
                arrays[part, kind] = read_idx(path, dimensions)
            else:
                missing.append(f"{PARTS[part]}-{kind}-{ending}-ubyte")
    if missing:
        raise UserError(f"{folder} lacks the IDX file {', '.join(missing)} (or the same with .gz)")
    highest = max(int(arrays[part, "labels"].max(initial=0)) for part in PARTS)
    names = [str(k) for k in range(highest + 1)]  # may include classes without images, as in EMNIST letters, whose labels start at 1
    train, test = ((arrays[part, "images"], arrays[part, "labels"]) for part in PARTS)
    return from_arrays(folder.resolve().name, train, test, names, "affine", image_size, fit)
