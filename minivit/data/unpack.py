"""Compressed files and tar archives, of which no more is unpacked than the reader asks for, up to a limit.

A compressed file of a megabyte can unpack to gigabytes (deflate: 1,032 to 1; bzip2: a million to 1). So every reader has a limit, and
nothing that a header claims is allocated before the bytes are there.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from ..files import open_regular

SMALL = 1 << 26  # bytes that any file may unpack to
RATIO = 200  # unpacked bytes per byte of a larger one; photographs have 1 to 3, digits 5, drawings in black and white about 100
PIECE = 1 << 20  # bytes read at once
BLOCK = 512  # bytes; the unit of tar archives
MOST_MEMBERS = 10_000  # of a tar archive; the official archives have at most 9
LONGEST_NAME = 1 << 16  # bytes of a member's extended header
OPENERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
WITHOUT_DATA = (tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE)


class TooLarge(ValueError):
    """A file unpacks to more than its reader's limit."""


def most_unpacked(size: int) -> int:
    """The most bytes that the arrays of a compressed file of `size` bytes may unpack to."""
    return max(SMALL, RATIO * size)


class Stream:
    """A stream of bytes that is read once from its beginning to its end, up to a limit."""

    def __init__(self, file: BinaryIO, most: int) -> None:
        self.file, self.most, self.position = file, most, 0

    def read(self, size: int) -> bytearray:
        """The next `size` bytes, fewer only at the end of the stream. Raises TooLarge beyond the limit."""
        content = bytearray()
        while len(content) < size and (piece := self._piece(size - len(content))):
            content += piece
        return content

    def skip(self, size: int) -> None:
        """Pass over `size` bytes. Raises TooLarge beyond the limit, and ValueError if the stream ends before."""
        while size:
            piece = self._piece(size)
            if not piece:
                raise ValueError("it ends in the middle of a member")
            size -= len(piece)

    def _piece(self, size: int) -> bytes:
        piece = self.file.read(min(size, PIECE))
        self.position += len(piece)
        if self.position > self.most:
            raise TooLarge(f"it unpacks to more than {self.most >> 20} MiB")
        return piece


@contextmanager
def unpacked(path: Path, most: int | None = None) -> Iterator[Stream]:
    """The content of a file, unpacked if it begins as gzip, bzip2 or xz do; up to `most` bytes, by default `most_unpacked` where it is.

    Raises OSError.
    """
    with open_regular(path) as packed:
        size = os.fstat(packed.fileno()).st_size
        start = packed.read(6)
        packed.seek(0)
        opener = next((opener for magic, opener in OPENERS.items() if start.startswith(magic)), None)
        file = opener(packed) if opener else packed
        yield Stream(file, most or (most_unpacked(size) if opener else size))


def tar_files(stream: Stream) -> Iterator[tuple[str, int]]:
    """The name, without its folders, and the size of each regular file in a tar archive; links, devices and folders are passed over.

    The file's content is what `stream` gives next; the rest of it is skipped. Raises ValueError and tarfile.TarError for a damaged
    archive, and TooLarge for one with more than MOST_MEMBERS members.
    """
    long_name = None
    for _ in range(MOST_MEMBERS):
        header = stream.read(BLOCK)
        if not header.strip(b"\0"):
            return
        member = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape")
        size = 0 if member.type in WITHOUT_DATA else member.size
        if size < 0:
            raise ValueError("a member has a negative size")
        end = stream.position + -(-size // BLOCK) * BLOCK
        if member.type in (tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
            if size > LONGEST_NAME:
                raise ValueError("a member has a name of more than 64 KiB")
            long_name = _long_name(bytes(stream.read(size)), member.type) or long_name
        else:
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE):
                yield (long_name or member.name).rpartition("/")[2], size
            long_name = None
        stream.skip(end - stream.position)
    raise TooLarge(f"it has more than {MOST_MEMBERS:,} members")


def _long_name(content: bytes, kind: bytes) -> str | None:
    """The name of the next member in an extended header of GNU tar or of POSIX ("pax"), which may say other things instead."""
    if kind == tarfile.XHDTYPE:
        path = re.search(rb"(?:^|\n)\d+ path=([^\n]*)\n", content)
        content = path[1] if path else b""
    return content.rstrip(b"\0").decode("utf-8", "surrogateescape") or None
