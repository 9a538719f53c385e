"""Trainings that tests stop."""

import pytest

from minivit import train
from minivit.io.checkpoints import CHECKPOINTS
from minivit.training import loop
from minivit.training.loop import Interrupted

SMALL = {
    "epochs": 3,
    "batch_size": 32,
    "limit": 96,
    "model_options": {"dim": 16, "depth": 1, "heads": 2},
    "keep_checkpoint": True,
    "progress": False,
}
VIT = {"model": "vit_nano_patch2_8"}


def stop_at(monkeypatch, step):
    """Interrupt the training after this step of this process."""
    count = []

    def interrupt(self):
        count.append(self)
        if len(count) == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop.Progress, "step", interrupt)


def stopped(monkeypatch, out, step, **options):
    """Train until an interrupt after a step."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=rf"; minivit train --resume {out} goes on$"):
        stop_at(patch, step)
        train(**SMALL | {"out": out} | options)


def files_of(out):
    return sorted(path.name for path in (out / CHECKPOINTS).iterdir())
