"""What optimizers share: the numbers of a step in memory, where a recorded step finds them, and the running average of the weights.

An optimizer is a class below `Optimizer` in a file of its own, with `@register` and its name; what its constructor takes by keyword besides
the arguments of `Optimizer` are its own options, which `Trainer` and `train` hand on.
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
from .flat import FlatParameters, Groups, by_decay


def _run(op: str, outputs: tuple, inputs: tuple, *constants: Any) -> None:
    OPS[op].run("forward", (*outputs, *inputs, *constants), inputs, constants, "update")


class StepScalars:
    """The numbers of an optimizer's step, in memory where its kernels read them: `kernels.begin_update` says which lies where.

    array: (SCALARS,) float64, on the device. Kernels count the step there; the other numbers are known here too.
    """

    def __init__(self, device: str) -> None:
        self.array = arrays.array_on(device, np.zeros(SCALARS))
        self._known = np.zeros(SCALARS)

    def values(self) -> np.ndarray:
        """A copy of all of them."""
        return np.array(arrays.to_numpy(self.array))

    def load(self, values: np.ndarray) -> None:
        self._known[:] = values
        arrays.copy_from_numpy(self.array, values)

    def value(self, which: int) -> float:
        return float(self._known[which])

    def set(self, which: int, value: float) -> None:
        if value != self._known[which]:
            self._known[which] = value
            arrays.copy_from_numpy(self.array[which : which + 1], self._known[which : which + 1])


class Optimizer:
    """What AdamW and SGD share: the numbers of a step, which may be set between steps, the norm of the gradient, and the running average
    of the weights, if `ema`, its decay, is given: `kernels.begin_update` has the formulas.

    lr, weight_decay, steps; gradient_norm: of the whole gradient at the last step, before clipping.
    name: by which it is found. groups: how it wants the parameters to lie in the flat buffer.
    """

    name: ClassVar[str]
    buffers: ClassVar[tuple[str, ...]] = ()  # the attributes that hold its state, arrays of the flat buffer's size
    groups: ClassVar[Groups] = staticmethod(by_decay)

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
        """Its own options, which not every optimizer has, and their defaults."""
        shared = inspect.signature(Optimizer.__init__).parameters
        own = inspect.signature(cls.__init__).parameters
        return {name: parameter.default for name, parameter in own.items() if name not in shared}

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
        """Move the parameters by the gradients that lie in the flat buffer, and their average after them."""
        gradient, scalars = self.flat.gradient, self.scalars.array
        _run("begin_update", (self._squares, scalars), (gradient, scalars))
        self._update()

    def swap_average(self) -> None:
        """Exchange the model's weights with their average, if there is one."""
        if self.average is not None:
            own, average = (np.array(arrays.to_numpy(a)) for a in (self.flat.data, self.average))
            arrays.copy_from_numpy(self.flat.data, average)
            arrays.copy_from_numpy(self.average, own)

    def _update(self) -> None:
        raise NotImplementedError

    def _move(self, op: str, state: tuple[Any, ...], *constants: Any) -> None:
        """Run an op that updates the parameters, its `state` of their size, and their average."""
        p, average = self.flat.data, self.average
        _run(op, (p, *state, average), (p, self.flat.gradient, *state, average, self._squares, self.scalars.array), *constants)


def zeros_like(array: Any) -> Any:
    return arrays.array_on(device_of(array), np.zeros(array.shape, array.dtype))


def check_between(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value < high:
            raise UserError(f"{name} must be at least {low:g} and {'finite' if high == inf else f'below {high:g}'}, got {value}")


OPTIMIZERS: dict[str, type[Optimizer]] = {}

Kind = TypeVar("Kind", bound=type[Optimizer])


def register(name: str) -> Callable[[Kind], Kind]:
    """Class decorator: the optimizer is found by this name from now on."""

    def add(optimizer: Kind) -> Kind:
        optimizer.name = name
        OPTIMIZERS[name] = optimizer
        return optimizer

    return add
