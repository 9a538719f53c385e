"""Mistakes that a user can mend, and failures of a GPU: each is one line that names the value and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A value from outside is wrong. The command line prints its message, without a traceback, and ends with status 2."""


class DeviceError(RuntimeError):
    """There is no GPU that minivit can use, or what it needs is not installed; the message says what to do."""


class OutOfMemoryError(DeviceError):
    """An array does not fit. asked, free: bytes."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(f"the GPU has no room for {asked / 2**20:,.0f} MiB: {free / 2**20:,.0f} MiB are free")
        self.asked, self.free = asked, free


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (nearest: a, b)" with the known names that look most like `name`, best first; "" where none does."""
    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(by_lower[c] for c in close)})" if close else ""
