"""CIFAR-10 and CIFAR-100 from the official archives (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).

Both published forms are supported, the "python version" (pickles) and the "binary version" (records of label bytes and 3072 pixels), as the
.tar.gz archive or as an unpacked folder. Archive members are read in memory, without extracting them to disk. Pickles are read without an
unpickler (`pickles.py`), so that a file cannot execute any code, not even NumPy's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, nearest, reason
from ..files import open_regular, reading_untrusted
from ..progress import say
from .cache import cache_key, data_folder, load_cached, store, with_progress
from .dataset import Dataset
from .labels import check_printable
from .pickles import Array, load_plain
from .unpack import Stream, TooLarge, tar_files, unpacked

HOST = "https://www.cs.toronto.edu/~kriz/"
LARGEST_ARCHIVE = 1 << 28  # bytes when unpacked; the official ones have 186 MB
LARGEST_FILES = 190_000_000  # bytes of all files of an archive
LARGEST_NAMES = 1 << 16  # bytes of the file of class names
PIXELS = (3, 32, 32)  # shape of a stored image
AUGMENTATION = "crop-flip"  # the default policy


@dataclass(frozen=True)
class Form:
    """One published archive: its files and their format."""

    dataset: str  # "cifar10" or "cifar100"
    archive: str  # file name
    md5: str  # checksum of the archive
    folder: str  # the folder in the archive
    train: tuple[str, ...]  # file names of the training images
    test: tuple[str, ...]  # file names of the test images
    names: str  # file name of the class names
    labels: str | int  # python version: the key of the labels; binary version: label bytes per record, of which the last is used
    names_key: str = ""  # python version: the key of the class names

    @property
    def files(self) -> tuple[str, ...]:
        return *self.train, *self.test, self.names


FORMS = (
    Form(
        "cifar10",
        "cifar-10-python.tar.gz",
        "c58f30108f718f92721af3b95e74349a",
        "cifar-10-batches-py",
        tuple(f"data_batch_{i}" for i in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        "labels",
        "label_names",
    ),
    Form(
        "cifar10",
        "cifar-10-binary.tar.gz",
        "c32a1d4ab5d03f1284b67883e8d87530",
        "cifar-10-batches-bin",
        tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        1,
    ),
    Form(
        "cifar100",
        "cifar-100-python.tar.gz",
        "eb9058c3a382ffc7106e4002c42a8d85",
        "cifar-100-python",
        ("train",),
        ("test",),
        "meta",
        "fine_labels",
        "fine_label_names",
    ),
    Form(
        "cifar100",
        "cifar-100-binary.tar.gz",
        "03b5dce01913d631647c71ecec9e9cb8",
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        2,
    ),
)


# -------------------------------------------------------------------------------------------------------------------------- reading
def _unpickle(content: bytes | bytearray, *keys: str) -> list[Any]:
    """The values for these keys in the dictionary of a batch file."""
    batch = load_plain(content)
    if not isinstance(batch, dict):
        raise TypeError(f"it holds a {type(batch).__name__}, not a dictionary")
    batch = {_text(key): value for key, value in batch.items()}
    missing = [key for key in keys if key not in batch]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}{nearest(missing[0], [key for key in batch if len(key) < 50][:50])}")
    return [batch[key] for key in keys]


def _text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if not isinstance(value, str):
        raise ValueError(f"it names something by a {type(value).__name__}")
    return value


def _images_and_labels(form: Form, content: bytes | bytearray) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int64 of one file. Raises ValueError, and the errors of `load_plain`."""
    if isinstance(form.labels, str):
        labels, data = _unpickle(content, form.labels, "data")
        if not isinstance(labels, list) or not isinstance(data, Array) or not all(type(label) is int for label in labels):
            raise ValueError("it does not hold a list of labels and an array of pixels")
        labels, pixels = np.array(labels, np.int64), data.rows(len(labels))
    else:
        length = form.labels + prod(PIXELS)
        if not content or len(content) % length:
            raise ValueError(f"its {len(content)} bytes are not a whole number of records of {length}")
        records = np.frombuffer(content, np.uint8).reshape(-1, length)
        labels, pixels = records[:, form.labels - 1].astype(np.int64), records[:, form.labels :]
    return pixels.reshape(-1, *PIXELS).transpose(0, 2, 3, 1), labels


def _class_names(form: Form, content: bytes | bytearray) -> tuple[str, ...]:
    if len(content) > LARGEST_NAMES:
        raise ValueError(f"it has more than {LARGEST_NAMES >> 10} KiB")
    names = _unpickle(content, form.names_key)[0] if isinstance(form.labels, str) else content.decode().split()
    if not isinstance(names, list):
        raise ValueError("it does not hold a list of names")
    return check_printable(tuple(map(_text, names)))


def _files(path: Path, form: Form) -> Iterator[tuple[str, int, Stream]]:
    """The name and size of each of the form's files in an archive or a folder, and the stream that gives its content next."""
    if path.is_dir():
        for name in form.files:
            if (path / name).is_file():
                with open_regular(path / name) as file:
                    size = os.fstat(file.fileno()).st_size
                    yield name, size, Stream(file, size)
    else:
        with unpacked(path, LARGEST_ARCHIVE) as stream:
            yield from ((name, size, stream) for name, size in tar_files(stream) if name in form.files)


def _members(path: Path, form: Form, progress: bool) -> dict[str, bytearray]:
    """The contents of the form's files by name, from an archive or a folder. Raises UserError."""
    contents: dict[str, bytearray] = {}
    room = LARGEST_FILES
    with reading_untrusted(str(path) if path.is_dir() else f"archive {path}", "it is damaged or not whole: fetch it again"):
        for name, size, stream in with_progress(_files(path, form), len(form.files), f"reading {path.name}", progress):
            room += len(contents.pop(name, b"")) - size
            if room < 0:
                raise TooLarge(f"its files have more than {LARGEST_FILES // 10**6} MB")
            contents[name] = stream.read(size)
    return contents


def _read(path: Path, form: Form, progress: bool) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """(images, labels) of each file, training files first, and the class names."""
    members = _members(path, form, progress)
    missing = [name for name in form.files if name not in members]
    if missing:
        raise UserError(f"{path} is not a whole {form.archive}: {', '.join(missing)} is missing")

    def parse(name: str, function: Callable[[Form, bytearray], Any]) -> Any:
        with reading_untrusted(f"{name} in {path}", f"fetch {form.archive} again"):
            return function(form, members.pop(name))

    names = parse(form.names, _class_names)
    parts = [parse(name, _images_and_labels) for name in (*form.train, *form.test)]
    for name, (_, labels) in zip((*form.train, *form.test), parts):
        if not (len(labels) and labels.min() >= 0 and labels.max() < len(names)):
            span = f"labels from {labels.min()} to {labels.max()}" if len(labels) else "no labels"
            raise UserError(f"{name} in {path} holds {span}, but there are {len(names)} classes: fetch {form.archive} again")
    return parts, names


def load_cifar(path: Path, form: Form, cache_dir: str | Path | None, progress: bool, official: bool = False) -> Dataset:
    """The dataset in an archive or an unpacked folder; decoded once, then memory-mapped.

    If `official`, an archive must have the published checksum. Raises UserError.
    """
    files = [path / name for name in form.files if (path / name).exists()] if path.is_dir() else [path]
    key = cache_key("cifar", form.archive, official, [(str(f.absolute()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    folder = data_folder(cache_dir)
    if cached := load_cached(folder, key):
        return replace(cached[0], augmentation=AUGMENTATION)
    if official and path.is_file():
        _check_md5(path, form.md5)
    parts, names = _read(path, form, progress)

    def rows() -> Iterator[tuple[np.ndarray, int, bool]]:
        for file_index, (images, labels) in enumerate(parts):
            for image, label in zip(images, labels):
                yield image, int(label), file_index < len(form.train)

    dataset = store(folder, key, rows, (32, 32, 3), name=form.dataset, class_names=names, notes={})
    return replace(dataset, augmentation=AUGMENTATION)


# -------------------------------------------------------------------------------------------------------------------- location
def recognise(path: Path) -> tuple[Path, Form] | None:
    """The archive or unpacked folder at a path or in that folder, and its form; None if it is not CIFAR."""
    if path.is_dir():
        for form in FORMS:
            for folder in (path, path / form.folder):
                if os.path.isfile(folder / form.train[0]) and os.path.isfile(folder / form.names):  # also where it may not be searched
                    return folder, form
        return None
    for form in FORMS:
        if form.archive == path.name:
            return path, form
    with reading_untrusted(f"archive {path}", "it is damaged or not whole: fetch it again"), unpacked(path, LARGEST_ARCHIVE) as stream:
        try:
            names = {name for name, _ in tar_files(stream)}  # of an archive with another name
        except TooLarge:
            return None
    return next(((path, form) for form in FORMS if names.issuperset(form.files)), None)


def find_or_download(dataset: str, cache_dir: str | Path | None, progress: bool) -> tuple[Path, Form]:
    """The archive or unpacked folder of "cifar10" or "cifar100" in the data folder, downloaded if necessary. Raises UserError."""
    folder = data_folder(cache_dir)
    forms = [form for form in FORMS if form.dataset == dataset]
    for form in forms:
        if os.path.isdir(folder / form.folder):
            return folder / form.folder, form
        if os.path.isfile(folder / form.archive):
            return folder / form.archive, form
    _download(forms[0], folder, progress)
    return folder / forms[0].archive, forms[0]


def _check_md5(path: Path, expected: str) -> None:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    if digest.hexdigest() != expected:
        raise UserError(f"{path} has the MD5 checksum {digest.hexdigest()}, the published one is {expected}: delete it to fetch it again")


def _download(form: Form, folder: Path, progress: bool) -> None:
    import pooch  # imported here, because it takes 50 ms and only downloads need it

    say(f"downloading {HOST}{form.archive} to {folder}", progress)
    pooch.get_logger().setLevel("WARNING")
    downloader = pooch.HTTPDownloader(progressbar=progress)
    try:
        pooch.retrieve(HOST + form.archive, f"md5:{form.md5}", form.archive, folder, downloader=downloader)
    except (OSError, ValueError) as error:  # network or disk errors; a wrong checksum
        raise UserError(f"cannot download {HOST}{form.archive}: {reason(error)[:100]}; or put the file into {folder} yourself") from error
