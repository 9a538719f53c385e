"""User errors, and failures of a GPU: each message is one line that names the invalid value and the remedy."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

LONGEST = 300  # characters of a message
LISTED = 3  # names, where a message lists some of many

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = 60
_short.maxlevel = 3


def printable(text: str) -> str:
    """One line for any terminal: control characters, line ends and halves of surrogate pairs as escapes, such as "\\x1b"."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(value: Any) -> str:
    """A value for a message: its `repr`, cut where it is long or deep."""
    try:
        return _short.repr(value)
    except ValueError:  # Python refuses to print a whole number of thousands of digits
        return f"a number of more than {2**12} digits"


def listed(names: Iterable[str]) -> str:
    """The first few names, separated by commas, and how many more there are."""
    known = [*names]
    return ", ".join(known if len(known) <= LISTED + 1 else [*known[:LISTED], f"and {len(known) - LISTED} more"])


class UserError(ValueError):
    """A value passed in by the user is invalid. The command line prints the message, one line, without a traceback.

    A message of more than 300 characters loses its middle: what is wrong stands at its beginning, the way out at its end.
    status: the exit status of the command line.
    """

    status = 2

    def __init__(self, message: str) -> None:
        line = printable(message)
        super().__init__(line if len(line) <= LONGEST else f"{line[:200]} ... {line[205 - LONGEST :]}")


class MissingPackage(UserError, ImportError):
    """A package of one of minivit's extras is not installed; the message says which extra."""


class DeviceError(RuntimeError):
    """There is no GPU that minivit can use, or what it needs is not installed; the message says what to do."""


class OutOfMemoryError(DeviceError):
    """An array does not fit. asked, free: bytes."""

    def __init__(self, asked: int, free: int) -> None:
        super().__init__(f"the GPU has no room for {asked / 2**20:,.0f} MiB: {free / 2**20:,.0f} MiB are free")
        self.asked, self.free = asked, free


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (nearest: a, b)" with the names of `known` most similar to `name`, best first; "" if none is similar."""
    by_lowercase = {k.lower(): k for k in known}
    matches = get_close_matches(name.lower(), by_lowercase, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(by_lowercase[m] for m in matches)})" if matches else ""


def reason(error: BaseException) -> str:
    """What an error of a library says, in one line without the path of a file, for a message that names the file itself."""
    text = (isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__
    return " ".join(text.split())[:150]
