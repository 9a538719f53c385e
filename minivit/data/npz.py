"""Arrays of .npz files: zip archives of .npy files (the formats of `numpy.savez` and `numpy.lib.format`), without pickled objects."""

from __future__ import annotations

import os
import warnings
import zipfile
from collections.abc import Collection
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from ..errors import UserError
from ..files import open_regular, reading_untrusted
from .unpack import PIECE, Stream, most_unpacked

COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
KINDS = "biufSU"  # of a dtype: truth values, numbers, text


class _InPieces:
    """A file of which at most PIECE bytes are read at once, so that zipfile does not read a list of a million members."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def read(self, size: int = -1) -> bytes:
        if size > PIECE:
            raise ValueError(f"its list of members has more than {PIECE >> 20} MiB")
        return self.file.read(size if size >= 0 else PIECE)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def read_npz(path: Path, keys: Collection[str] | None = None) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays under `keys`, as far as the file has them, or all arrays, and the names of all. Raises UserError."""
    advice = "it is no .npz file of plain arrays, or not whole"
    with reading_untrusted(str(path), advice), open_regular(path) as packed, zipfile.ZipFile(cast(BinaryIO, _InPieces(packed))) as archive:
        most = most_unpacked(os.fstat(packed.fileno()).st_size)
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        arrays = {}
        for key in members if keys is None else keys:
            if (member := members.get(key)) is None:
                continue
            if member.compress_type not in COMPRESSIONS:  # zipfile unpacks others without a limit
                raise ValueError(f"{key} is compressed in a way that NumPy does not use")
            if (most := most - member.file_size) < 0:
                raise UserError(f"{path} unpacks {key} to {member.file_size:,} bytes: load it with NumPy, and give the arrays")
            with archive.open(member) as file:
                arrays[key] = read_npy(Stream(cast(BinaryIO, file), member.file_size), key)
        return arrays, list(members)


def read_npy(stream: Stream, what: str) -> np.ndarray:
    """The array that is the whole of a stream. Raises ValueError if it is none, and what the parser of NumPy's headers raises."""
    file = cast(Any, stream)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    with warnings.catch_warnings():  # of Python about the text of a damaged header, of NumPy about an old one
        warnings.simplefilter("ignore")
        shape, fortran, dtype = read_header(file)
    if dtype.kind not in KINDS:
        raise ValueError(f"{what} has the type {str(dtype)[:40]}: it must hold numbers, and class names text")
    size = prod(shape) * dtype.itemsize
    if size != stream.most - stream.position:
        raise ValueError(f"{what} promises {size:,} bytes, but holds {stream.most - stream.position:,}")
    return np.frombuffer(stream.read(size), dtype).reshape(shape, order="F" if fortran else "C")
