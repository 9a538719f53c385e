"""IDX files, the format of MNIST and similar datasets (LeCun, Cortes and Burges), plain or gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from math import prod
from pathlib import Path

import numpy as np

from ..errors import UserError
from .dataset import Dataset, from_arrays

PARTS = {"train": "train", "test": "t10k"}
KINDS = {"images": ("idx3", 3), "labels": ("idx1", 1)}  # (part of the file name, number of dimensions)


def _find(folder: Path, part: str, kind: str) -> Path | None:
    """The file under any of its usual names: train-images-idx3-ubyte, train-images.idx3-ubyte, either with or without .gz."""
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{PARTS[part]}-{kind}{separator}{KINDS[kind][0]}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def holds_idx(folder: Path) -> bool:
    """Whether a folder contains any of the four IDX files."""
    return any(_find(folder, part, kind) for part in PARTS for kind in KINDS)


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """The uint8 array of an IDX file. Raises UserError if it is not an IDX file of this kind, or truncated."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}; it is damaged or not whole, so fetch it again") from error
    start = 4 + 4 * dimensions
    if len(content) < start or content[:4] != bytes((0, 0, 8, dimensions)):
        raise UserError(f"{path} is no IDX file of bytes in {dimensions} dimensions: it starts with {content[:4].hex(' ') or 'nothing'}")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    if len(content) - start != prod(shape):
        raise UserError(f"{path} promises {' × '.join(map(str, shape))} bytes, but holds {len(content) - start}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy()


def load_idx(folder: Path, image_size: int | None, fit: str = "crop") -> Dataset:
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
