"""CIFAR-10 and CIFAR-100 from the official archives (Krizhevsky, Learning Multiple Layers of Features from Tiny Images, 2009).

Both published forms are supported, the "python version" (pickles) and the "binary version" (records of label bytes and 3072 pixels), as the
.tar.gz archive or as an unpacked folder. Archive members are read in memory, without extracting them to disk. Pickles are loaded by an
unpickler that accepts only five names, each replaced by a stub, so that a file cannot execute any code, not even NumPy's.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import pickle
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, nearest
from ..progress import say
from .cache import cache_key, data_folder, load_cached, store, with_progress
from .dataset import Dataset

HOST = "https://www.cs.toronto.edu/~kriz/"
LARGEST_MEMBER = 1 << 28  # bytes; the largest official member has 155 MB
PIXELS = (3, 32, 32)  # shape of a stored image
BROKEN = (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError)


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


# ------------------------------------------------------------------------------------------------------------------------- pickles
class _Array:
    """Stub for a pickled numpy.ndarray: its unchecked state."""

    state: tuple[Any, ...] = ()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.state = state

    def bytes_of(self, rows: int) -> np.ndarray:
        """The (rows, 3072) uint8 array in the state. Raises ValueError if it has another shape or dtype."""
        _, shape, dtype, fortran, raw = self.state
        if not isinstance(dtype, _DType) or dtype.code not in ("u1", b"u1") or fortran or not isinstance(raw, bytes):
            raise ValueError("its pixels are not an array of bytes in C order")
        if tuple(shape) != (rows, prod(PIXELS)) or len(raw) != rows * prod(PIXELS):
            raise ValueError(f"it holds {rows} labels, but pixels of shape {tuple(shape)} in {len(raw)} bytes")
        return np.frombuffer(raw, np.uint8).reshape(shape)


class _DType:
    """Stub for a pickled numpy.dtype."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Ignores byte order and the like, which do not apply to bytes."""


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """Stub for _codecs.encode, with which Python 3 pickles bytes in protocol 2."""
    return text.encode("latin1")


ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(),
    ("numpy", "ndarray"): None,
    ("numpy", "dtype"): _DType,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no CIFAR batch needs")
        return ADMITTED[module, name]


def _unpickle(content: bytes, *keys: str) -> list[Any]:
    """The values for these keys in the dictionary of a batch file."""
    batch = _Unpickler(io.BytesIO(content), encoding="bytes").load()
    if not isinstance(batch, dict):
        raise TypeError(f"it holds a {type(batch).__name__}, not a dictionary")
    batch = {_text(key): value for key, value in batch.items()}
    missing = [key for key in keys if key not in batch]
    if missing:
        raise ValueError(f"it has no {missing[0]!r}{nearest(missing[0], batch)}")
    return [batch[key] for key in keys]


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


# -------------------------------------------------------------------------------------------------------------------------- reading
def _images_and_labels(form: Form, content: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 32, 32, 3) uint8 and labels (n,) int64 of one file. Raises ValueError and the errors of unpickling."""
    if isinstance(form.labels, str):
        label_list, data = _unpickle(content, form.labels, "data")
        labels = np.array(label_list, np.int64)  # (n,)
        if labels.ndim != 1 or not isinstance(data, _Array):
            raise ValueError("it does not hold a list of labels and an array of pixels")
        pixels = data.bytes_of(len(labels))
    else:
        length = form.labels + prod(PIXELS)
        if not content or len(content) % length:
            raise ValueError(f"its {len(content)} bytes are not a whole number of records of {length}")
        records = np.frombuffer(content, np.uint8).reshape(-1, length)
        labels, pixels = records[:, form.labels - 1].astype(np.int64), records[:, form.labels :]
    return pixels.reshape(-1, *PIXELS).transpose(0, 2, 3, 1), labels


def _class_names(form: Form, content: bytes) -> tuple[str, ...]:
    if isinstance(form.labels, str):
        return tuple(map(_text, *_unpickle(content, form.names_key)))
    return tuple(content.decode().split())


def _members(path: Path, form: Form, progress: bool) -> dict[str, bytes]:
    """The contents of the form's files by name, from an archive or a folder."""
    if path.is_dir():
        return {name: (path / name).read_bytes() for name in form.files if (path / name).is_file()}
    contents = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in with_progress(archive, len(form.files), f"reading {path.name}", progress):
                name = Path(member.name).name
                file = archive.extractfile(member) if name in form.files and member.isfile() else None  # regular files only, no links
                if file and member.size <= LARGEST_MEMBER:
                    contents[name] = file.read()
    except BROKEN as error:
        raise _broken(path, error) from error
    return contents


def _broken(path: Path, error: BaseException) -> UserError:
    reason = str(error).splitlines()[0].rstrip(":") if str(error) else type(error).__name__  # tarfile lists what it tried
    return UserError(f"cannot read archive {path}: {reason}; it is damaged or not whole: fetch it again")


def _read(path: Path, form: Form, progress: bool) -> tuple[list[tuple[np.ndarray, np.ndarray]], tuple[str, ...]]:
    """(images, labels) of each file, training files first, and the class names."""
    members = _members(path, form, progress)
    missing = [name for name in form.files if name not in members]
    if missing:
        raise UserError(f"{path} is not a whole {form.archive}: {', '.join(missing)} is missing")

    def parse(name: str, function: Callable[[Form, bytes], Any]) -> Any:
        try:
            return function(form, members[name])
        except (
            pickle.UnpicklingError,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            EOFError,
            ImportError,
            ArithmeticError,
            MemoryError,
        ) as error:
            raise UserError(f"cannot read {name} in {path}: {error or type(error).__name__}") from error

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
        return cached[0]
    if official and path.is_file():
        _check_md5(path, form.md5)
    parts, names = _read(path, form, progress)

    def rows() -> Iterator[tuple[np.ndarray, int, bool]]:
        for file_index, (images, labels) in enumerate(parts):
            for image, label in zip(images, labels):
                yield image, int(label), file_index < len(form.train)

    return store(folder, key, rows(), (32, 32, 3), name=form.dataset, class_names=names, augmentation="crop-flip", notes={})


# -------------------------------------------------------------------------------------------------------------------- location
def recognise(path: Path) -> tuple[Path, Form] | None:
    """The archive or unpacked folder at a path or in that folder, and its form; None if it is not CIFAR."""
    if path.is_dir():
        for form in FORMS:
            for folder in (path, path / form.folder):
                if (folder / form.train[0]).is_file() and (folder / form.names).is_file():
                    return folder, form
        return None
    for form in FORMS:
        if form.archive == path.name:
            return path, form
    try:
        with tarfile.open(path) as archive:  # an archive with another name
            names = {Path(name).name for name in archive.getnames()}
    except BROKEN as error:
        raise _broken(path, error) from error
    return next(((path, form) for form in FORMS if names.issuperset(form.files)), None)


def find_or_download(dataset: str, cache_dir: str | Path | None, progress: bool) -> tuple[Path, Form]:
    """The archive or unpacked folder of "cifar10" or "cifar100" in the data folder, downloaded if necessary. Raises UserError."""
    folder = data_folder(cache_dir)
    forms = [form for form in FORMS if form.dataset == dataset]
    for form in forms:
        if (folder / form.folder).is_dir():
            return folder / form.folder, form
        if (folder / form.archive).is_file():
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
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot download {HOST}{form.archive}: {reason}; or put the file into {folder} yourself") from error
