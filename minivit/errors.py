"""User errors: each message is one line that names the invalid value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """A value passed in by the user is invalid. The command line prints the message without a traceback and exits with status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns " (nearest: a, b)" with the names of `known` most similar to `name`, best first; "" if none is similar."""
    by_lowercase = {k.lower(): k for k in known}
    matches = get_close_matches(name.lower(), by_lowercase, n=3, cutoff=0.5)
    return f" (nearest: {', '.join(by_lowercase[m] for m in matches)})" if matches else ""
