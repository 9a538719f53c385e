"""Decoded images kept in the user's cache folder: one array file that is memory-mapped, and a small JSON file that belongs to it."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_file
from .dataset import Dataset, channel_statistics

VERSION = 1  # of the cached content: raise it when decoding changes


def data_folder(cache_dir: str | Path | None) -> Path:
    """Where archives and decoded images are kept: `cache_dir`, or "data" in the user's cache folder."""
    if cache_dir is not None:
        return Path(cache_dir)
    from ..kernels.core.cache import cache_folder

    return cache_folder() / "data"


def cache_key(*parts: Any) -> str:
    """A short name for content that depends on these JSON-able values alone."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:24]


def say(line: str, progress: bool = True) -> None:
    """A line for the person who waits, on standard error: standard output is for results."""
    if progress:
        print(line, file=sys.stderr, flush=True)


def with_progress(items: Iterable, total: int, what: str, progress: bool) -> Iterator:
    """`items` under a progress bar on a terminal, after a plain line elsewhere."""
    if progress and not sys.stderr.isatty():
        say(f"{what}: {total}")
    yield from tqdm(items, what, total, disable=not (progress and sys.stderr.isatty()), leave=False)


def load_cached(folder: Path, key: str) -> tuple[Dataset, dict[str, Any]] | None:
    """The dataset that `store` put there and what it noted, or None. The images are mapped copy-on-write: the file never changes."""
    try:
        about = json.loads((folder / f"{key}.json").read_text())
        images = np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError):  # absent, or cut by a crash: made anew
        return None
    labels = np.array(about["labels"], np.int64)  # (n,)
    if list(images.shape) != about["shape"]:
        return None
    split, images = about["train"], np.asarray(images)
    dataset = Dataset(
        about["name"],
        images[:split],
        labels[:split],
        images[split:],
        labels[split:],
        tuple(about["class_names"]),
        tuple(about["mean"]),
        tuple(about["std"]),
        about["augmentation"],
    )
    return dataset, about["notes"]


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
    """Write the images of `rows` as they come and give the dataset back, memory-mapped.

    Each row is (image uint8 (H, W, C), label, is it for training), the training images first. The array file comes first and the JSON
    file last, each under its name only when whole, so that a reader finds both or makes them anew. `notes` may grow while rows are made.
    Raises UserError where the folder cannot be written to, a full disk included.
    """
    labels: list[int] = []
    split = 0
    try:
        with atomic_file(folder / f"{key}.npy") as file:
            _write_header(file, 0, shape)
            for image, label, train in rows:
                file.write(image.tobytes())
                labels.append(label)
                split += train
            file.seek(0)
            _write_header(file, len(labels), shape)
        images = np.load(folder / f"{key}.npy", mmap_mode="c", allow_pickle=False)
        mean, std = channel_statistics(images[:split])
        about = {
            "name": name,
            "shape": images.shape,
            "train": split,
            "labels": labels,
            "class_names": class_names,
            "mean": mean,
            "std": std,
            "augmentation": augmentation,
            "notes": notes,
        }
        with atomic_file(folder / f"{key}.json") as file:
            file.write(json.dumps(about).encode())
    except OSError as error:
        raise UserError(
            f"cannot keep decoded images in {folder}: {error.strerror or error}; make room, or give another folder as cache_dir"
        ) from error
    cached = load_cached(folder, key)
    assert cached is not None
    return cached[0]


def _write_header(file: BinaryIO, count: int, shape: Sequence[int]) -> None:
    """An .npy header for `count` images; its length is the same for every count."""
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)}
    np.lib.format.write_array_header_1_0(file, header)
