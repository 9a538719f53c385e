"""Paths given by users, files whose content nobody vouches for, and atomic file writes: a reader sees the old content or the new."""

from __future__ import annotations

import errno
import glob
import io
import os
import secrets
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from .errors import UserError, reason

if sys.platform != "win32":
    import fcntl


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path given by a user, with "~" expanded. Raises UserError for one that no file can have: too long, a loop of links, no such
    user."""
    try:
        expanded = Path(path).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
            os.stat(expanded)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{str(path)[:100]} cannot be a path: {reason(error)}") from error
    return expanded


class _Bounded(io.BufferedReader):
    """A file for reading that reserves no memory for bytes that a reader asks for and the file does not have."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > io.DEFAULT_BUFFER_SIZE:
            size = min(size, max(0, os.fstat(self.fileno()).st_size - self.tell()))
        return super().read(size)


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a file for reading in binary. Raises OSError for what is no regular file: a pipe, which would wait for a writer; a device."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        raise OSError(number, os.strerror(number) if stat.S_ISDIR(mode) else "not a regular file", os.fspath(path))
    return _Bounded(io.FileIO(descriptor))


@contextmanager
def reading_untrusted(what: str, advice: str = "", kind: type[UserError] = UserError) -> Iterator[None]:
    """Inside the block a file is decoded that may be damaged or meant to harm: whatever is raised there becomes a UserError of this kind.

    The libraries that decode files list nowhere what they raise. what: the file in words; advice: the way out.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise kind(f"cannot read {what}: {reason(error)}{advice and '; '}{advice}") from error


def lock(descriptor: int) -> None:
    """Lock an open file or folder until it is closed or the process ends, however it ends. On Windows this does nothing.

    Raises BlockingIOError if another process or thread has locked it, and another OSError where the file system has no locks.
    """
    if sys.platform != "win32":
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Convert an OSError in the block, in which files are replaced whole, into a UserError that names the file."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {reason(error)}; what was there before is kept") from error


@contextmanager
def atomic_file(path: str | os.PathLike[str], durable: bool = False) -> Iterator[BinaryIO]:
    """Open a binary file for writing and seeking; it is renamed to `path` only if the block ends without an exception.

    Until then it has a temporary name in the same folder, which is created if necessary. An exception (full disk, interrupt) deletes the
    temporary file and leaves `path` unchanged. What a killed process left is deleted by the next one that writes to `path`.
    durable: the new name survives a loss of power from the end of the block on. The content always does once it has the name.
    Raises OSError if the folder is not writable.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_abandoned(path.parent, path.name)
    file, temporary = _temporary(path)
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if sys.platform == "win32":  # an open file cannot be renamed there
                file.close()
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):  # what is still buffered cannot be written to a full disk either
                file.close()
            temporary.unlink(missing_ok=True)
            raise
    if durable:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, so that they survive a loss of power. Windows does so by itself. Raises OSError."""
    if sys.platform != "win32":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_abandoned(folder: Path, name: str = "") -> None:
    """Delete the temporary files for the file `name` of a folder, or for any, that no process is writing any more."""
    for part in folder.glob(f".{glob.escape(name) or '*'}.*.part"):
        with suppress(OSError), open(part, "rb") as file:  # Windows deletes no file that a process has open
            lock(file.fileno())
            if sys.platform == "win32":
                file.close()
            part.unlink()


def _temporary(path: Path) -> tuple[BinaryIO, Path]:
    """A new file for `path` and its name, locked, so that `remove_abandoned` leaves it alone."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        file = open(temporary, "xb+")  # noqa: SIM115, the caller closes it
        try:
            lock(file.fileno())
            taken = not temporary.exists()
        except OSError as error:
            taken = isinstance(error, BlockingIOError)
        if not taken:
            return file, temporary
        file.close()  # another process took it for abandoned before it was locked, and deletes it
