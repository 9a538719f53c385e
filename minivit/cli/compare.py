"""`minivit compare`: several runs side by side."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ..errors import printable
from ..reports.compare import Compared, compare
from .output import print_json, table

HEADINGS = (
    "run",
    "model",
    "data",
    "parameters",
    "M multiply-adds",
    "epochs",
    "minutes",
    "images/s",
    "test accuracy, %",
    "balanced, %",
    "test loss",
)
LONGEST = 40  # characters of a value


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", metavar="RUN", nargs="+", help="run folders, or their names below runs/; two or more")
    parser.add_argument("--out", metavar="FILE", help="also draw the learning curves of all, as PNG")


def run(options: argparse.Namespace) -> int:
    comparison = compare(*options.runs)
    picture = comparison.save(options.out) if options.out else None
    if options.json:
        content = {"runs": [asdict(item) for item in comparison.runs], "options": comparison.options}
        print_json(content | ({"picture": str(picture)} if picture else {}))
        return 0
    print(table(HEADINGS, list(map(_row, comparison.runs))))
    if comparison.options:
        rows = [[name, *map(_cell, values)] for name, values in comparison.options.items()]
        print("\n" + table(["differing option", *(printable(item.run) for item in comparison.runs)], rows))
    else:
        print("\nall options are the same")
    if picture:
        print(f"\n{picture}")
    return 0


def _row(item: Compared) -> Sequence[str]:
    return [
        printable(item.run),
        printable(item.model),
        printable(item.data or "–"),
        f"{item.parameters:,}",
        f"{item.macs / 1e6:.2f}",
        str(item.epochs),
        _fixed(item.minutes, 1),
        _fixed(item.images_per_second, 0),
        _fixed(item.test_accuracy, 1, 100),
        _fixed(item.balanced_accuracy, 1, 100),
        _fixed(item.test_loss, 4),
    ]


def _fixed(value: float | None, digits: int, factor: float = 1) -> str:
    return "–" if value is None else f"{factor * value:,.{digits}f}"


def _cell(value: Any) -> str:
    """A value as config.json has it, cut where it is long."""
    shown = "–" if value is None else printable(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 1]}…"
