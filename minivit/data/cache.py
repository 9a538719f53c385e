"""Cache of decoded images in the user's cache folder: one memory-mapped array file with a small JSON file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_file
from ..progress import say, standard_error
from .dataset import Dataset, channel_statistics

VERSION = 1  # of the cached content; to be incremented when decoding changes


def data_folder(cache_dir: str | Path | None) -> Path:
    """The folder for archives and decoded images: `cache_dir`, or "data" in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    from ..kernels.core.cache import cache_folder

    return cache_folder() / "data"


def cache_key(*parts: Any) -> str:
    """A short key for content that depends only on these values, which JSON must be able to represent."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:24]


def with_progress(items: Iterable[Any], total: int, what: str, progress: bool) -> Iterator[Any]:
    """Yields `items`, with a progress bar on a terminal, and after a single line otherwise."""
    bar = progress and standard_error.isatty()
    say(f"{what}: {total}", progress and not bar)
    yield from tqdm(items, what, total, disable=not bar, leave=False, file=standard_error)


def load_cached(folder: Path, key: str) -> tuple[Dataset, dict[str, Any]] | None:
    """(dataset, notes) as written by `store`, or None. The images are memory-mapped copy-on-write: the file never changes."""
    try:
        metadata = json.loads((folder / f"{key}.json").read_text())
        images = np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):  # absent, or truncated by a crash: it will be created again
        return None
    labels = np.array(metadata["labels"], np.int64)  # (n,)
    if list(images.shape) != metadata["shape"]:
        return None
    train_count, images = metadata["train"], np.asarray(images)
    dataset = Dataset(
        metadata["name"],
        images[:train_count],
        labels[:train_count],
        images[train_count:],
        labels[train_count:],
        tuple(metadata["class_names"]),
        tuple(metadata["mean"]),
        tuple(metadata["std"]),
        metadata["augmentation"],
    )
    return dataset, metadata["notes"]


def store(
    folder: Path,
    key: str,
    rows: Iterable[tuple[np.ndarray, int, bool]],
    shape: Sequence[int],
    *,
    name: str,
    class_names: Sequence[str],
    augmentation: str,
    notes: dict[str, Any],
) -> Dataset:
    """Write the images of `rows` as they are produced, and return the dataset, memory-mapped.

    Each row is (image uint8 (H, W, C), label, whether it is for training), training images first. The array file is written before the JSON
    file, both atomically, so that a reader either finds both or creates them again. `rows` may add to `notes`.
    Raises UserError if the folder cannot be written to, including a full disk.
    """
    labels: list[int] = []
    train_count = 0
    try:
        with atomic_file(folder / f"{key}.npy") as file:
            _write_header(file, 0, shape)
            for image, label, train in rows:
                file.write(image.tobytes())
                labels.append(label)
                train_count += train
            file.seek(0)
            _write_header(file, len(labels), shape)
        images = np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False)
        mean, std = channel_statistics(images[:train_count])
        metadata = {
            "name": name,
            "shape": images.shape,
            "train": train_count,
            "labels": labels,
            "class_names": class_names,
            "mean": mean,
            "std": std,
            "augmentation": augmentation,
            "notes": notes,
        }
        with atomic_file(folder / f"{key}.json") as file:
            file.write(json.dumps(metadata).encode())
    except OSError as error:
        raise UserError(
            f"cannot keep decoded images in {folder}: {error.strerror or error}; make room, or give another folder as cache_dir"
        ) from error
    cached = load_cached(folder, key)
    assert cached is not None
    return cached[0]


def _write_header(file: BinaryIO, count: int, shape: Sequence[int]) -> None:
    """Write an .npy header for `count` images; its length is the same for every count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
