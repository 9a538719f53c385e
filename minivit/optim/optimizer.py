"""Base class of optimizers: hyperparameters in an array that a recorded step reads, and the running average of the weights.

An optimizer is a subclass of `Optimizer` in a separate file, decorated with `@register(name)`. Keyword arguments of its constructor in
addition to those of `Optimizer` are its options, which `Trainer` and `train` pass on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from math import inf
from typing import Any, ClassVar, TypeVar

import numpy as np

from ..errors import UserError
from ..kernels import OPS
from ..kernels.begin_update import CLIP_NORM, EMA_DECAY, LR, PARTS, SCALARS, STEP, WEIGHT_DECAY
from ..kernels.core import arrays
from ..kernels.core.devices import device_of
from .flat import Chosen, FlatParameters, Segment


def run_op(op: str, outputs: tuple[Any, ...], inputs: tuple[Any, ...], *constants: Any) -> None:
    """Run the forward of an op as a part of the update."""
    OPS[op].run("forward", (*outputs, *inputs, *constants), inputs, constants, "update")


class StepScalars:
    """The scalars of an optimizer's step in an array that kernels read; `kernels.begin_update` defines its layout.

    array: (SCALARS,) float64, on the device. Kernels increment the step number there; the other values are mirrored on the host.
    """

    def __init__(self, device: str) -> None:
        self.array = arrays.array_on(device, np.zeros(SCALARS))
        self._host_values = np.zeros(SCALARS)

    def values(self) -> np.ndarray:
        """A copy of all scalars."""
        return np.array(arrays.to_numpy(self.array))

    def load(self, values: np.ndarray) -> None:
        """Set all scalars."""
        self._host_values[:] = values
        arrays.copy_from_numpy(self.array, values)

    def value(self, index: int) -> float:
        """The value at `index` of the array, from the host."""
        return float(self._host_values[index])

    def set(self, index: int, value: float) -> None:
        """Set the value at `index` of the array, if it differs."""
        if value != self._host_values[index]:
            self._host_values[index] = value
            arrays.copy_from_numpy(self.array[index : index + 1], self._host_values[index : index + 1])


class Optimizer:
    """Base class of optimizers: hyperparameters that may be changed between steps, the gradient norm with clipping, and the running
    average of the weights if `ema`, its decay, is set. `kernels.begin_update` contains the formulas.

    steps: the number of steps so far. gradient_norm: the global norm at the last step, before clipping. name: the registered name.
    first: the parameters at the beginning of the flat buffers, which the optimizer treats in another way than the segments.
    """

    name: ClassVar[str]
    buffers: ClassVar[tuple[str, ...]] = ()  # the attributes that hold its state, arrays
    first: ClassVar[Chosen] = staticmethod(lambda model, trainable: [])

    def __init__(self, flat: FlatParameters, lr: float, weight_decay: float, clip_norm: float | None, ema: float | None) -> None:
        check_between(0, inf, clip_norm=clip_norm or 0)
        check_between(0, 1, ema=ema or 0)
        self.flat = flat
        self.scalars = StepScalars(flat.device)
        self._squares = arrays.array_on(flat.device, np.zeros(PARTS))
        self.lr, self.weight_decay = lr, weight_decay
        self.scalars.set(CLIP_NORM, clip_norm or 0)
        self.scalars.set(EMA_DECAY, ema or 0)
        self.average = arrays.array_on(flat.device, arrays.to_numpy(flat.data)) if ema else None

    @classmethod
    def options(cls) -> dict[str, Any]:
        """The options specific to this optimizer, with their defaults."""
        shared = inspect.signature(Optimizer.__init__).parameters
        parameters = inspect.signature(cls.__init__).parameters
        return {name: parameter.default for name, parameter in parameters.items() if name not in shared}

    @property
    def lr(self) -> float:
        return self.scalars.value(LR)

    @lr.setter
    def lr(self, value: float) -> None:
        check_between(0, inf, lr=value)
        self.scalars.set(LR, value)

    @property
    def weight_decay(self) -> float:
        return self.scalars.value(WEIGHT_DECAY)

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        check_between(0, inf, weight_decay=value)
        self.scalars.set(WEIGHT_DECAY, value)

    @property
    def steps(self) -> int:
        return int(arrays.to_numpy(self.scalars.array)[STEP])

    @property
    def gradient_norm(self) -> float:
        return float(np.sqrt(arrays.to_numpy(self._squares).sum()))

    def state_dict(self) -> dict[str, np.ndarray]:
        """A copy of all that a step depends on besides the parameters: the buffers, the average if there is one, and the scalars."""
        present = [name for name in (*self.buffers, "average") if getattr(self, name) is not None]
        return {name: np.array(arrays.to_numpy(getattr(self, name))) for name in present} | {"scalars": self.scalars.values()}

    def load_state_dict(self, state: Mapping[str, np.ndarray]) -> None:
        """Take what `state_dict` gave of an optimizer of the same class and options, for the same parameters."""
        self.scalars.load(state["scalars"])
        for name in (*self.buffers, "average"):
            if name in state:
                arrays.copy_from_numpy(getattr(self, name), state[name])

    def step(self) -> None:
        """Update the parameters with the gradients in the flat buffer, and then their running average."""
        gradient, scalars = self.flat.gradient, self.scalars.array
        run_op("begin_update", (self._squares, scalars), (gradient, scalars))
        self._update()

    def swap_average(self) -> None:
        """Swap the model's weights with their running average, if enabled."""
        if self.average is not None:
            weights, average = (np.array(arrays.to_numpy(a)) for a in (self.flat.data, self.average))
            arrays.copy_from_numpy(self.flat.data, average)
            arrays.copy_from_numpy(self.average, weights)

    def _update(self) -> None:
        raise NotImplementedError

    def _run_op(self, op: str, segment: Segment, state: tuple[Any, ...], *constants: Any) -> None:
        """Run an op that updates the parameters of a segment, their `state`, as many elements, and the running average."""
        start, decayed, stop, scale = segment
        p, gradient, average = (None if a is None else a[start:stop] for a in (self.flat.data, self.flat.gradient, self.average))
        inputs = p, gradient, *state, average, self._squares, self.scalars.array
        run_op(op, (p, *state, average), inputs, decayed - start, *constants, scale)


def zeros_like(array: Any) -> Any:
    """Zeros of the same shape and dtype on the same device."""
    return arrays.array_on(device_of(array), np.zeros(array.shape, array.dtype))


def check_between(low: float, high: float, **values: float) -> None:
    """Raises UserError, naming the keyword, for a value outside low ... below high."""
    for name, value in values.items():
        if not low <= value < high:
            raise UserError(f"{name} must be at least {low:g} and {'finite' if high == inf else f'below {high:g}'}, got {value}")


OPTIMIZERS: dict[str, type[Optimizer]] = {}

Kind = TypeVar("Kind", bound=type[Optimizer])


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator that registers an optimizer under a name."""

    def add(optimizer: Kind) -> Kind:
        optimizer.name = name
        OPTIMIZERS[name] = optimizer
        return optimizer

    return add
