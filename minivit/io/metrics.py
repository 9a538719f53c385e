"""The history of a run: what its lines say, and all of it as a table for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from ..schema import Checked, Fraction, Limits, Size

Loss = Annotated[float, Limits(0, 1e30)]


@dataclass(frozen=True)
class Tested(Checked):
    """What every line of metrics.jsonl says; a line may say more."""

    epoch: Size
    train_loss: Loss
    test_loss: Loss
    test_accuracy: Fraction


@dataclass(frozen=True)
class Validated(Checked):
    """The same of a run with a validation part, whose last line alone tells of the test images."""

    epoch: Size
    train_loss: Loss
    validation_loss: Loss
    validation_accuracy: Fraction
    test_loss: Loss | None = None
    test_accuracy: Fraction | None = None


def table_of(history: Iterable[Mapping[str, Any]]) -> str:
    """The lines of a history as comma-separated values below the names of all their columns; what a line does not say is empty."""
    lines = [dict(_columns(line)) for line in history]
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for line in lines for name in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _columns(line: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(name, value) of each column: one for each exit, where a value has a number for each."""
    for name, value in line.items():
        if isinstance(value, Sequence) and not isinstance(value, str):
            yield from ((f"{name}_{number}", each) for number, each in enumerate(value, 1))
        else:
            yield name, value
