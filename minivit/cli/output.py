"""Output of results: as JSON, or in aligned columns."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any


def print_json(value: Any) -> None:
    """Print a value as indented JSON."""
    print(_json(value))


def print_json_line(value: Any) -> None:
    """Print a value as JSON on one line."""
    print(_json(value, indent=None))


def _json(value: Any, indent: int | None = 2) -> str:
    """Indented JSON, in ASCII where standard output has another encoding than UTF-8."""
    is_utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    return json.dumps(value, indent=indent, ensure_ascii=not is_utf8, allow_nan=False)


def print_json_list(values: Iterable[Any]) -> None:
    """Print what `print_json` prints of a list, each value as soon as it is there."""
    first = True
    for value in values:
        print("[" if first else ",", textwrap.indent(_json(value), "  "), sep="\n", end="")
        first = False
    print("[]" if first else "\n]")


def by_exit(accuracies: Sequence[float]) -> str:
    """The accuracies of all exits in parentheses, in percent; "" for a single exit."""
    return f" ({', '.join(f'{100 * accuracy:.1f}' for accuracy in accuracies)} by exit)" if len(accuracies) > 1 else ""


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with right-aligned columns, separated by two spaces."""
    lines = [headings, *rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
