"""The user's cache folder: where it is, and which folders in it may be trusted."""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
from functools import cache
from pathlib import Path

from ...errors import reason
from ...progress import say_once

OTHERS_MAY_WRITE = 0o022


def cache_folder() -> Path:
    """The user's cache folder for minivit, following the platform's convention; it may not exist yet, or not be writable."""
    try:
        if sys.platform == "darwin":
            base = Path.home() / "Library" / "Caches"
        elif sys.platform == "win32":
            base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
        else:
            base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        base = temporary_folder()
    return base / "minivit"


@cache
def temporary_folder() -> Path:
    """A folder that only this user can read, which is deleted when the process ends."""
    folder = tempfile.mkdtemp(prefix="minivit-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def make_private(folder: Path) -> None:
    """Create a folder, and those above it that do not exist, for this user alone, whatever the umask. Raises OSError."""
    if not folder.is_dir():
        make_private(folder.parent)
        folder.mkdir(0o700, exist_ok=True)


def is_trusted(folder: Path) -> bool:
    """Whether what lies in this folder may be used: it belongs to this user or to root, and nobody else may write to it."""
    if not hasattr(os, "getuid"):
        return True
    try:
        status = folder.stat()
    except OSError:
        return True  # absent: there is nothing in it
    return status.st_uid in (0, os.getuid()) and not status.st_mode & OTHERS_MAY_WRITE


def is_used(folder: Path, *inner: Path, instead: str = "kernels are compiled for this process alone") -> bool:
    """Whether a folder, and folders inside it, serve as a cache: `is_trusted`; otherwise a line says so, and what is done `instead`."""
    trusted = all(map(is_trusted, (folder, *inner)))
    if not trusted:
        say_once(f"{folder} is not used, since others may write to it; {instead}")
    return trusted


def say_not_kept(
    folder: Path, error: OSError, what: str = "compiled kernels", instead: str = "they are compiled for this process alone"
) -> None:
    """Say once that a cache cannot be written to a folder, and what is done `instead`."""
    say_once(f"cannot keep {what} in {folder}: {reason(error)}; {instead}")
