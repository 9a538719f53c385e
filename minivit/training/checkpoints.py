"""Checkpoints of a training: when they are written, and what they say beside the state of the Trainer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter
from typing import Annotated, Any

from ..data import Dataset
from ..data.dataset import hash_of
from ..schema import Checked, Limits, Size

EPOCH_SECONDS = 5.0  # at the end of an epoch a checkpoint is written if the last one is as old as this
SHARE = 0.02  # of the time that checkpoints may take
HASHED = 2**28  # bytes of images, beyond which a part of them stands for all


class Pace:
    """When a checkpoint is due.

    minutes: the time from one checkpoint to the next inside an epoch; 0: none is due at all. at_once: one is due before the first step,
    or as soon as it may be written: that of weights which nobody could make again. After a checkpoint that took t seconds, none is due for
    t / SHARE.
    """

    def __init__(self, minutes: float, at_once: bool = False) -> None:
        self.seconds, self.at_once = 60 * minutes, at_once
        self._last, self._cost = perf_counter(), 0.0

    def is_due(self, at_epoch_end: bool) -> bool:
        if self.at_once:
            return True
        wait = min(self.seconds, EPOCH_SECONDS) if at_epoch_end else self.seconds
        return self.seconds > 0 and perf_counter() - self._last >= max(wait, self._cost / SHARE)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Inside, a checkpoint is written."""
        start = perf_counter()
        try:
            yield
        finally:
            self._last = perf_counter()
            self._cost, self.at_once = self._last - start, False


@dataclass(frozen=True)
class Progressed(Checked):
    """What a checkpoint says of the run, beside arrays."""

    config: Mapping[str, Any]  # that of the run folder
    history: tuple[Mapping[str, Any], ...]  # the lines of metrics.jsonl
    phases_left: Size  # sizes of images, the current one among them
    seconds: Annotated[float, Limits(least=0)]  # since the last test
    told: Annotated[int, Limits(least=0)]  # the steps that watchers have been told of
    frozen: tuple[str, ...]  # the parameters and modules that the model does not train by itself (`frozen_names`)
    data_hash: str  # of the images and labels
    best: Mapping[str, Any] | None = None  # the line of the weights that did best on the validation part


def hash_of_data(dataset: Dataset) -> str:
    """A hash by which images and labels are known again; of many images, that of some at even intervals."""
    parts: list[Any] = [dataset.class_names, dataset.mean, dataset.std]
    for images, labels in ((dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)):
        parts += [images.shape, images.dtype.str, labels, images[:: 1 + images.nbytes // HASHED]]
    return hash_of(parts)
