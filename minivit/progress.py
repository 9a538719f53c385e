"""Lines and bars on standard error, without which work goes on: where it is closed, full or read by nobody, they are dropped."""

from __future__ import annotations

import sys
from contextlib import suppress
from functools import cache
from typing import Any

from .errors import printable

UNUSABLE = (AttributeError, OSError, ValueError)  # what use of a stream raises that is None, broken, or closed


class _StandardError:
    """The stream that `sys.stderr` is at the moment; what cannot be written there is dropped."""

    def write(self, text: str) -> int:
        with suppress(*UNUSABLE):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(*UNUSABLE):
            sys.stderr.flush()

    def isatty(self) -> bool:
        try:
            return sys.stderr.isatty()
        except UNUSABLE:
            return False

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


standard_error = _StandardError()


def say(line: str, shown: bool = True) -> None:
    """Print one line on standard error, if it is to be shown, with escapes for what is not printable; standard output is for results."""
    if shown:
        print(printable(line), file=standard_error, flush=True)


@cache
def say_once(line: str) -> None:
    """Print a line on standard error, once in a process."""
    say(line)
