"""Who is told of each step and each test of a training: functions of users, and TensorBoard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, reason

EVENTS = "tensorboard"  # the folder of events in a run folder


class Watcher:
    """Told of a training. What it raises ends the training."""

    def step(self, step: Mapping[str, Any]) -> None:
        """After an optimizer step: its number, from 1 ("step"), its epoch, from 1, its "loss" and "learning_rate"."""

    def epoch(self, line: Mapping[str, Any]) -> None:
        """After a test, when the run folder has its line of metrics: that line."""

    def close(self) -> None:
        """At the end of the training, also where an error or an interrupt ends it."""


class Functions(Watcher):
    """Functions of the user, each of which gets a dict of its own."""

    def __init__(self, on_step: Callable[[dict[str, Any]], Any] | None, on_epoch: Callable[[dict[str, Any]], Any] | None) -> None:
        self.on_step, self.on_epoch = on_step, on_epoch

    def step(self, step: Mapping[str, Any]) -> None:
        if self.on_step:
            self.on_step(dict(step))

    def epoch(self, line: Mapping[str, Any]) -> None:
        if self.on_epoch:
            self.on_epoch(dict(line))


class TensorBoard(Watcher):
    """Scalars in files that TensorBoard shows: each step's loss and learning rate, and the numbers of each line of metrics.

    folder: of the run. steps: optimizer steps so far; TensorBoard then hides what an earlier process, or an earlier run that is
    replaced, has told of later ones.
    Raises UserError if the folder cannot be written to.
    """

    def __init__(self, folder: Path, steps: int) -> None:
        self._path = folder / EVENTS
        self._steps = steps
        try:
            self._writer = _summary_writer()(logdir=str(self._path), purge_step=steps + 1 if steps else 0)
        except OSError as error:
            raise UserError(f"cannot write {self._path}: {reason(error)}") from error

    def step(self, step: Mapping[str, Any]) -> None:
        self._steps = step["step"]
        for name in ("loss", "learning_rate"):
            self._writer.add_scalar(f"step/{name}", step[name], self._steps)

    def epoch(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if isinstance(value, (int, float)):
                self._writer.add_scalar(f"epoch/{name}", value, self._steps)

    def close(self) -> None:
        self._writer.close()


def check_tensorboard() -> None:
    """Raises UserError if what writes the files of TensorBoard is not installed."""
    _summary_writer()


def _summary_writer() -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(f"tensorboard needs tensorboardX ({reason(error)}): pip install 'minivit[tensorboard]'") from error
    return SummaryWriter
