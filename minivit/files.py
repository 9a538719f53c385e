"""Writing files so that a reader sees either the old content or the new, never a part."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A binary file to write and seek in, which takes the name `path` only when the block ends without an exception.

    Until then it has a temporary name in the same folder, which is made if need be; an exception (a full disk, an interrupt) removes it and
    leaves what was at `path`. Raises OSError where the folder cannot be written to.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    with open(temporary, "xb+") as file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            file.close()
            temporary.unlink()
            raise
    try:
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink()
        raise
