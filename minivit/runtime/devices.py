"""What goes wrong with a device, in words for users."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import DeviceError, OutOfMemoryError, UserError
from ..kernels.core.devices import DEVICES, runtime


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
