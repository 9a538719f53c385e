"""Paths given by users, and atomic file writes: a reader sees either the old content or the new content, never a part of it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path given by a user, with "~" expanded. Raises UserError for one that no file can have: too long, a loop of links, no such
    user."""
    try:
        expanded = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(expanded)
    except (OSError, RuntimeError, ValueError) as error:
        reason = (isinstance(error, OSError) and error.strerror) or error
        raise UserError(f"{str(path)[:100]} cannot be a path: {reason}") from error
    return expanded


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a binary file for writing and seeking; it is renamed to `path` only if the block ends without an exception.

    Until then it has a temporary name in the same folder, which is created if necessary. An exception (full disk, interrupt) deletes the
    temporary file and leaves `path` unchanged. Raises OSError if the folder is not writable.
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
