"""Mistakes that a user can mend: each is one line that names the value and the way out."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A value from outside is wrong. The command line prints its message, without a traceback, and ends with status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """ " (nearest: a, b)" with the known names that look most like `name`, best first; "" where none does."""
    by_lower = {k.lower(): k for k in known}
    close = get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(by_lower[c] for c in close)})" if close else ""
