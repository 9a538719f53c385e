"""The progress of `train` on standard error."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import Any

from tqdm import tqdm

from ..progress import say, standard_error

MEASURED = 20  # steps from which the duration of all is known


def duration(seconds: float) -> str:
    """A time for a message, as in "50 s", "9 min" or "2.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


class Progress:
    """Progress on standard error: a bar on a terminal, otherwise one line per epoch.

    work: about how long each epoch takes, in any unit. steps: of an epoch. before: steps that were made earlier.
    """

    def __init__(self, shown: bool, work: Sequence[float], steps: int, before: int = 0) -> None:
        self.lines, self.work, self.epochs = shown and not standard_error.isatty(), work, len(work)
        self.start, self.done, self.steps = perf_counter(), 0, steps
        self.before, rest = divmod(before, steps)
        self.finished = sum(work[: self.before]) + (work[self.before] * rest / steps if rest else 0)
        disable = not shown or self.lines
        total = self.epochs * steps
        self.bar = tqdm(total=total, initial=before, unit="step", dynamic_ncols=True, disable=disable, file=standard_error)

    def step(self) -> None:
        """Report the end of a step; after some of many, a line tells how long all will take."""
        self.bar.update()
        self.done += 1
        if self.done == 1:  # which compiled and recorded the step
            self.start = perf_counter()
        elif self.lines and self.done == 1 + MEASURED and (self.epochs - self.before) * self.steps > 10 * MEASURED:
            an_epoch = (perf_counter() - self.start) / MEASURED * self.steps
            left = (sum(self.work) - self.finished) / self.work[self.before]
            say(f"{self.epochs - self.before} epochs: about {duration(an_epoch * left)}, and the tests")

    def epoch(self, line: Mapping[str, Any]) -> None:
        """Report the end of an epoch, with its line of metrics."""
        part = "validation" if "validation_loss" in line else "test"
        accuracy = f"{100 * line[f'{part}_accuracy']:.1f} %"
        if self.lines:
            epoch = line["epoch"]
            done, to_do = sum(self.work[:epoch]) - self.finished, sum(self.work[epoch:])
            left = f"  {duration((perf_counter() - self.start) * to_do / done)} left" if to_do and done else ""
            say(
                f"epoch {epoch}/{self.epochs}  train loss {line['train_loss']:.4f}  {part} loss {line[f'{part}_loss']:.4f}  "
                f"{part} accuracy {accuracy}  {line['images_per_second']:.0f} images/s{left}"
            )
        self.bar.set_postfix_str(f"epoch {line['epoch']}/{self.epochs}, train loss {line['train_loss']:.3f}, {part} accuracy {accuracy}")

    def close(self) -> None:
        """Remove the bar."""
        self.bar.close()
