"""Cache of decoded images in the user's cache folder: one memory-mapped array file, and a file with a digest and JSON.

An entry counts only if it is exactly what was written: the digest of the JSON, and in it the size and time of the array file, which is not
read for this. Any other entry is made again. Where the folder cannot be written, or others may write to it, the images stay in memory.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_file, open_regular, user_path
from ..kernels.core.cache import cache_folder, is_used, make_private, say_not_kept
from ..progress import say, standard_error
from .dataset import Dataset, channel_statistics

VERSION = 3  # of the cached content; to be incremented when decoding changes
INSTEAD = "decoded images stay in memory; give another folder as cache_dir to keep them"
Row = tuple[np.ndarray, int, bool]  # image uint8 (H, W, C), label, whether it is for training


def data_folder(cache_dir: str | Path | None) -> Path:
    """The folder for archives and decoded images: `cache_dir`, or "data" in the user's cache folder."""
    return cache_folder() / "data" if cache_dir is None else user_path(cache_dir)


def cache_key(*parts: Any) -> str:
    """A short key for content that depends only on these values, which JSON must be able to represent."""
    return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:24]


def with_progress(items: Iterable[Any], total: int, what: str, progress: bool) -> Iterator[Any]:
    """Yields `items`, with a progress bar on a terminal, and after a single line otherwise."""
    bar = progress and standard_error.isatty()
    say(f"{what}: {total}", progress and not bar)
    yield from tqdm(items, what, total, disable=not bar, leave=False, file=standard_error)


def _is_used(folder: Path) -> bool:
    return is_used(folder, instead=INSTEAD)


def load_cached(folder: Path, key: str) -> tuple[Dataset, dict[str, Any]] | None:
    """(dataset, notes) as written by `store`, or None. The images are memory-mapped copy-on-write: the file never changes."""
    if not _is_used(folder):
        return None
    try:
        with open_regular(folder / f"{key}.json") as file:
            digest, _, content = file.read().partition(b"\n")
        if digest.decode("ascii", "replace") != _digest(key, content):
            return None
        metadata = json.loads(content)
        images = _mapped(folder / f"{key}.npy", metadata["shape"], metadata["written"])
    except OSError:  # absent
        return None
    return None if images is None else (_dataset(images, metadata), metadata["notes"])


def _digest(key: str, content: bytes) -> str:
    return hashlib.sha256(key.encode() + content).hexdigest()


def _mapped(path: Path, shape: Sequence[int], written: int) -> np.ndarray | None:
    """The images in an array file of this shape and time; None if it is another file."""
    header = _header(shape[0], shape[1:])
    with open_regular(path) as file:
        status = os.fstat(file.fileno())
        if (status.st_size, status.st_mtime_ns) != (len(header) + prod(shape), written) or file.read(len(header)) != header:
            return None
        return np.asarray(np.memmap(file, np.uint8, "c", len(header), tuple(shape)))


def _dataset(images: np.ndarray, metadata: dict[str, Any]) -> Dataset:
    labels, train_count = np.array(metadata["labels"], np.int64), metadata["train"]  # (n,)
    return Dataset(
        metadata["name"],
        images[:train_count],
        labels[:train_count],
        images[train_count:],
        labels[train_count:],
        tuple(metadata["class_names"]),
        tuple(metadata["mean"]),
        tuple(metadata["std"]),
    )


def store(
    folder: Path, key: str, rows: Callable[[], Iterable[Row]], shape: Sequence[int], *, notes: dict[str, Any], **described: Any
) -> Dataset:
    """Write the images of `rows()` as they are produced, and return the dataset, memory-mapped.

    rows: gives the images, those for training first; it may add to `notes`. It is called again where the folder turns out to be full.
    shape: (H, W, C) of an image. described: the name and class names of the dataset.
    Where the folder cannot be written to, or others may write to it, the images stay in memory, and a line says so. Raises UserError if
    there is not enough memory for that.
    """
    if _is_used(folder):
        try:
            return _store(folder, key, rows(), shape, notes, described)
        except OSError as error:
            with suppress(OSError):  # the array file without the other one
                (folder / f"{key}.npy").unlink(missing_ok=True)
            say_not_kept(folder, error, "decoded images", INSTEAD)
    buffer = io.BytesIO()
    try:
        written = _write(buffer, rows(), shape)
        images = np.frombuffer(buffer.getbuffer(), np.uint8, offset=len(_header(0, shape))).reshape(written["shape"])
        return _dataset(images, {**described, **written, **_statistics(images, written)})
    except MemoryError as error:
        raise UserError(f"the decoded images have no room in memory, nor in {folder}: give another folder as cache_dir") from error


def _store(folder: Path, key: str, rows: Iterable[Row], shape: Sequence[int], notes: dict[str, Any], described: dict[str, Any]) -> Dataset:
    """`store` in a folder. The array file is written first, both atomically: a reader finds both or creates them again. Raises OSError."""
    make_private(folder)
    path = folder / f"{key}.npy"
    with atomic_file(path) as file:
        metadata: dict[str, Any] = _write(file, rows, shape)
    written = path.stat().st_mtime_ns
    images = _mapped(path, metadata["shape"], written)
    if images is None:
        raise OSError("another process writes there too")
    metadata |= {**described, "notes": notes, "written": written, **_statistics(images, metadata)}
    content = json.dumps(metadata).encode()
    with atomic_file(folder / f"{key}.json") as file:
        file.write(_digest(key, content).encode() + b"\n" + content)
    return _dataset(images, metadata)


def _write(file: BinaryIO, rows: Iterable[Row], shape: Sequence[int]) -> dict[str, Any]:
    """Write an .npy file; returns the shape of its array, the labels, and the number of training images."""
    labels: list[int] = []
    train_count = 0
    file.write(_header(0, shape))
    for image, label, train in rows:
        file.write(image.tobytes())
        labels.append(label)
        train_count += train
    file.seek(0)
    file.write(_header(len(labels), shape))
    return {"shape": [len(labels), *shape], "labels": labels, "train": train_count}


def _statistics(images: np.ndarray, written: dict[str, Any]) -> dict[str, Any]:
    mean, std = channel_statistics(images[: written["train"]])
    return {"mean": mean, "std": std}


def _header(count: int, shape: Sequence[int]) -> bytes:
    """The .npy header for `count` images; its length is the same for every count."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (count, *shape)})
    return header.getvalue()
