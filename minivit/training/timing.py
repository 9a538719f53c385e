"""Training for a given time: how many epochs fit into it on this machine, and how often the model can be tested."""

from __future__ import annotations

from copy import deepcopy
from itertools import chain, count
from math import floor
from statistics import median
from time import perf_counter
from typing import NamedTuple

from ..data import Batches
from ..errors import UserError
from .trainer import Trainer

STEPS, SECONDS, SHARE = 5, 1.5, 0.01  # the measurement of a step: at least so many steps, so long, and this share of the time that is left
TEST_SHARE = 0.05  # of the time that testing may take, unless one test takes more
INFERENCE = 0.4  # of the time of a training step that inference takes, for as many images; measured: 0.25 to 0.4
MARGIN = 0.94  # of the time that is planned: the speed of a shared machine varies


class Fitting(NamedTuple):
    """What fits into a time."""

    epochs: int
    test_every: int  # epochs


def step_seconds(trainer: Trainer, batches: Batches, left: float = 0.0) -> float:
    """The time of a training step with its batch, measured on a copy of the trainer; the first step, which compiles, is not counted.

    left: seconds of the time that training may take.
    """
    copy, seconds = deepcopy(trainer), list[float]()
    start = before = perf_counter()
    for images, labels in chain.from_iterable(batches.epoch(0) for _ in count()):
        copy.step(images, labels)
        now = perf_counter()
        seconds.append(now - before)
        before = now
        if len(seconds) == 1:
            start = now
        elif len(seconds) > STEPS and now - start > max(SECONDS, SHARE * left):
            break
    return median(seconds[1:])


def test_seconds(a_step: float, batches: Batches) -> float:
    """The time that the test of an image takes if a step takes `a_step` seconds."""
    return a_step * INFERENCE / batches.batch_size


def fitting(seconds: float, epoch: float, test: float) -> Fitting:
    """The epochs that fit into `seconds` if an epoch takes `epoch` seconds and a test `test`.

    Raises UserError if there is no time for one of each.
    """
    available = MARGIN * seconds
    least = epoch + test
    if available < least:
        raise UserError(
            f"minutes is too short: an epoch and a test take {least / 60:.2g} minutes here, and {max(0.0, seconds) / 60:.2g} are left "
            "after loading, compiling and measuring: give more minutes, fewer images (limit) or a smaller model"
        )
    most_tests = max(1, floor(TEST_SHARE * available / test)) if test else 1
    epochs = max(1, floor((available - most_tests * test) / epoch))
    if epochs < most_tests:  # one test an epoch at most
        epochs = floor(available / least)
        most_tests = epochs
    return Fitting(epochs, -(-epochs // most_tests))
