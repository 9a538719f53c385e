"""Image files in folders and their subfolders, in sorted order. Hidden files and those of operating systems are passed over."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, reason
from ..progress import say
from .image_file import SUFFIXES

SYSTEM = frozenset(  # folders and files of operating systems and archivers
    ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found", "Thumbs.db", "desktop.ini")
)
MAX_DEPTH = 32  # of folders inside a class folder


class File(NamedTuple):
    """An image file, with the data by which a modification is detected."""

    path: str  # relative to the dataset's folder
    size: int  # bytes
    time: int  # modification time in ns


def visible(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted((e for e in entries if not e.name.startswith(".") and e.name not in SYSTEM), key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"cannot list folder {folder}: {reason(error)}") from error


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; a link that goes in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def files_in(root: Path, folder: str, left_out: Counter[str], depth: int = 0) -> Iterator[File]:
    """Yields all image files in `folder` of `root` and its subfolders, sorted by path; counts the endings of other files in `left_out`."""
    if depth > MAX_DEPTH:
        raise UserError(f"{str(root / folder)[:100]}... is more than {MAX_DEPTH} folders deep: is there a link to a folder above it?")
    for entry in visible(root / folder):
        path = f"{folder}/{entry.name}"
        ending = os.path.splitext(entry.name)[1].lower()
        if is_folder(entry):
            yield from files_in(root, path, left_out, depth + 1)
        elif ending not in SUFFIXES:
            left_out[ending] += 1
        else:
            try:
                status = entry.stat()
                file = File(path, status.st_size, status.st_mtime_ns)
            except OSError:  # a link that leads nowhere or in a circle: decoding reports it
                file = File(path, 0, 0)
            yield file


def line_on(left_out: Counter[str]) -> str:
    kinds = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in left_out.most_common())
    return kinds and f"left out, since the ending is none of an image that minivit reads: {kinds}"


def with_folders_listed(images: Iterable[Any]) -> Iterator[Any]:
    """Yields the images, with those of a folder and its subfolders, in sorted order, in place of its path; a line says what is left out.

    Raises UserError for a folder without images.
    """
    for item in images:
        if not _is_path_of_folder(item):
            yield item
            continue
        folder, left_out, has_images = Path(item), Counter[str](), False
        for file in files_in(folder, ".", left_out):
            has_images = True
            yield str(folder / file.path)
        if not has_images:
            raise UserError(f"{folder} holds no images: no file in it ends in {', '.join(sorted(SUFFIXES))}")
        if line := line_on(left_out):
            say(f"{folder}: {line}")


def count_images(images: Iterable[Any]) -> int:
    """How many images `with_folders_listed` yields."""
    return sum(sum(1 for _ in files_in(Path(item), ".", Counter())) if _is_path_of_folder(item) else 1 for item in images)


def _is_path_of_folder(item: Any) -> bool:
    return isinstance(item, (str, os.PathLike)) and os.path.isdir(item)
