"""Where a model's parameters lie, of which dtype they are, and what goes wrong with a GPU, in words for users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from .errors import UserError
from .kernels.core.devices import DEVICES, runtime
from .kernels.core.errors import DeviceError, OutOfMemoryError
from .module import Module


def check_device(name: str) -> None:
    """Raises UserError for what is no device, or one that this machine has not."""
    if name not in DEVICES:
        raise UserError(f"device={name!r} is not available: choose {' or '.join(map(repr, DEVICES))}")
    if name == "cuda":
        try:
            runtime()
        except DeviceError as error:
            raise UserError(str(error)) from error


@contextmanager
def explain_out_of_memory(images: int) -> Iterator[None]:
    """Inside, that a GPU is full becomes a UserError: which batch would fit, of a step with so many images."""
    try:
        yield
    except OutOfMemoryError as error:
        fits = images * error.free // max(error.asked, 1)  # most of a step's memory grows with the batch
        advice = f"a batch of {fits} would fit" if fits else "the model is too large for it"
        raise UserError(f"a batch of {images} images: {error}; {advice}") from error


def dtype_of(model: Module) -> np.dtype:
    """The dtype of a model's parameters; raises UserError where it has none."""
    first = next((p for _, p in model.named_parameters()), None)
    if first is None:
        raise UserError("the model has no parameters")
    return first.dtype


def device_of(model: Module) -> str:
    """The device that a model's parameters lie on."""
    return next((p.device for _, p in model.named_parameters()), "cpu")
