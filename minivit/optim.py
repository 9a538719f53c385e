"""Optimizers over one flat buffer of parameters, learning-rate schedules and the running average of weights.

Which parameters weight decay leaves alone is `decays`. What changes from step to step, learning rate and step number, lies in arrays,
so that a recorded step can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from math import cos, inf, pi
from typing import Any

import numpy as np

from .errors import UserError
from .kernels import OPS, primitives
from .kernels.begin_update import (
    BETA1,
    BETA2,
    CLIP_NORM,
    EMA_DECAY,
    EPS,
    LR,
    MOMENTUM,
    PARTS,
    SCALARS,
    STEP,
    WEIGHT_DECAY,
)
from .kernels.core import arrays
from .kernels.core.devices import device_of
from .kernels.core.dtypes import BFLOAT16
from .models import Model
from .module import Module, Parameter

NO_DECAY = ("bias", "cls_token", "pos_embed", "cls_pos_embed")  # the last part of such a parameter's name


def decays(name: str, parameter: Parameter) -> bool:
    """Whether weight decay acts on a parameter: not if it has one dimension (biases, scales of normalisations, LayerScale), and not on
    biases, class tokens and position embeddings of any shape, as timm and DeiT do."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


class FlatParameters:
    """All trainable parameters of a model in one buffer, and their gradients in another, the decayed ones first; both on one device.

    Each parameter's `data` and `grad_home` become views of them, on a cache line of their own; padding is zero in both.

    data, gradient: (size with padding,), of `dtype` (the model's, by default). decayed: where those without decay begin. The whole model
    moves to the device.
    Raises UserError where nothing is to be trained.
    """

    def __init__(self, model: Module, dtype: Any = None, device: str = "cpu") -> None:
        named = _trainable(model)
        if not named:
            raise UserError("the model has no parameters to train")
        dtype = np.dtype(named[0][1].dtype if dtype is None else dtype)
        _convert(model.to("cpu"), dtype)
        decayed, others = ([p for name, p in named if decays(name, p) is wanted] for wanted in (True, False))
        line = arrays.ALIGNMENT // dtype.itemsize
        padded = [-(-p.size // line) * line for p in decayed + others]
        self.parameters = decayed + others
        self.size = sum(p.size for p in self.parameters)
        self.decayed = sum(padded[: len(decayed)])
        self.device = device
        values = np.zeros(sum(padded), dtype)
        self.gradient = arrays.array_on(device, np.zeros_like(values))
        starts = self._starts = np.cumsum([0, *padded]).tolist()
        for parameter, start in zip(self.parameters, starts):
            values[start : start + parameter.size] = parameter.data.reshape(-1)
        model.to(device)
        self.data = arrays.array_on(device, values)
        for parameter, start in zip(self.parameters, starts):
            part = slice(start, start + parameter.size)
            parameter.data = self.data[part].reshape(parameter.shape)
            parameter.grad_home = self.gradient[part].reshape(parameter.shape)
        self._views = [p.data for p in self.parameters]
        self._places = [place[1:] for module in model.modules() for place in module.places()]

    def check(self) -> None:
        """Raises UserError where the model's parameters are no longer these, or lie elsewhere."""
        moved = any(p.data is not view for p, view in zip(self.parameters, self._views))
        if moved or any(holder[key] is not child for holder, key, child in self._places):
            raise UserError("the model's parameters have changed or moved, as by another Trainer or a new head: make a new Trainer")

    @contextmanager
    def with_bf16_copy(self) -> Iterator[None]:
        """Inside, products read all parameters from a copy in bfloat16, made at once, rather than each of them rounding its own."""
        copy = arrays.empty(self.data.shape, BFLOAT16, self.device)
        primitives(self.device).convert(copy, self.data)
        for parameter, start in zip(self.parameters, self._starts):
            parameter.bf16_copy = copy[start : start + parameter.size].reshape(parameter.shape)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.bf16_copy = None

    def forget_gradients(self) -> None:
        """Before a backward: it writes each gradient anew."""
        for parameter in self.parameters:
            parameter.grad = None

    def clear_unused_gradients(self) -> None:
        """After a backward: a parameter that it did not reach has gradient zero."""
        for parameter in self.parameters:
            if parameter.grad is None and parameter.grad_home is not None:
                primitives(self.device).fill(parameter.grad_home, 0.0)


def _trainable(model: Module) -> list[tuple[str, Parameter]]:
    """Each parameter that requires a gradient once, under its first name."""
    found: dict[int, tuple[str, Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found.setdefault(id(parameter), (name, parameter))
    return list(found.values())


def _convert(model: Module, dtype: np.dtype) -> None:
    """Give all parameters a dtype, and the configuration its name."""
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype, copy=False)
    if isinstance(model, Model):
        changed: dict[str, Any] = {"dtype": dtype.name}
        model.config = replace(model.config, **changed)


# ------------------------------------------------------------------------------------------------------------------ optimizers
def _run(op: str, outputs: tuple, inputs: tuple, *constants: Any) -> None:
    OPS[op].run("forward", (*outputs, *inputs, *constants), inputs, constants, "update")


class StepScalars:
    """The numbers of an optimizer's step, in memory where its kernels read them: `kernels.begin_update` says which lies where.

    array: (SCALARS,) float64, on the device. Kernels count the step there; the other numbers are known here too.
    """

    def __init__(self, device: str) -> None:
        self.array = arrays.array_on(device, np.zeros(SCALARS))
        self._known = np.zeros(SCALARS)

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
    """

    def __init__(self, flat: FlatParameters, lr: float, weight_decay: float, clip_norm: float | None, ema: float | None) -> None:
        _check_between(0, inf, clip_norm=clip_norm or 0)
        _check_between(0, 1, ema=ema or 0)
        self.flat = flat
        self.scalars = StepScalars(flat.device)
        self._squares = arrays.array_on(flat.device, np.zeros(PARTS))
        self.lr, self.weight_decay = lr, weight_decay
        self.scalars.set(CLIP_NORM, clip_norm or 0)
        self.scalars.set(EMA_DECAY, ema or 0)
        self.average = arrays.array_on(flat.device, arrays.to_numpy(flat.data)) if ema else None

    @property
    def lr(self) -> float:
        return self.scalars.value(LR)

    @lr.setter
    def lr(self, value: float) -> None:
        _check_between(0, inf, lr=value)
        self.scalars.set(LR, value)

    @property
    def weight_decay(self) -> float:
        return self.scalars.value(WEIGHT_DECAY)

    @weight_decay.setter
    def weight_decay(self, value: float) -> None:
        _check_between(0, inf, weight_decay=value)
        self.scalars.set(WEIGHT_DECAY, value)

    @property
    def steps(self) -> int:
        return int(arrays.to_numpy(self.scalars.array)[STEP])

    @property
    def gradient_norm(self) -> float:
        return float(np.sqrt(arrays.to_numpy(self._squares).sum()))

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


class AdamW(Optimizer):
    """Adam with decoupled weight decay (1711.05101), in PyTorch's form. Raises UserError for values out of range."""

    def __init__(
        self,
        flat: FlatParameters,
        lr: float = 1e-3,
        weight_decay: float = 0.05,
        clip_norm: float | None = None,
        ema: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(flat, lr, weight_decay, clip_norm, ema)
        _check_between(0, 1, **{"betas[0]": betas[0], "betas[1]": betas[1]})
        if not 0 < eps < inf:
            raise UserError(f"eps must be above 0 and finite, got {eps}")
        for which, value in zip((BETA1, BETA2, EPS), (*betas, eps)):
            self.scalars.set(which, value)
        self.m, self.v = _zeros_like(flat.data), _zeros_like(flat.data)

    def _update(self) -> None:
        self._move("adamw", (self.m, self.v), self.flat.decayed)


class SGD(Optimizer):
    """Stochastic gradient descent with momentum, in PyTorch's form: weight decay is a part of the gradient."""

    def __init__(
        self,
        flat: FlatParameters,
        lr: float = 0.1,
        weight_decay: float = 0.0,
        clip_norm: float | None = None,
        ema: float | None = None,
        momentum: float = 0.9,
        nesterov: bool = False,
    ) -> None:
        super().__init__(flat, lr, weight_decay, clip_norm, ema)
        _check_between(0, 1, momentum=momentum)
        self.scalars.set(MOMENTUM, momentum)
        self.nesterov, self.velocity = nesterov, _zeros_like(flat.data)

    def _update(self) -> None:
        self._move("sgd", (self.velocity,), self.flat.decayed, self.nesterov)


def _zeros_like(array: Any) -> Any:
    return arrays.array_on(device_of(array), np.zeros(array.shape, array.dtype))


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD}


# ------------------------------------------------------------------------------------------------------------------- schedules
def cosine(step: int, steps: int, lr: float, warmup: int, min_lr: float) -> float:
    """The learning rate of step 0 ... steps - 1: a linear rise that reaches `lr` at step warmup - 1, then half a cosine down to `min_lr`
    (SGDR, 1608.03983, without restarts)."""
    if step < warmup:
        return lr * (step + 1) / warmup
    return min_lr + (lr - min_lr) / 2 * (1 + cos(pi * (step - warmup) / (steps - warmup)))


def constant(step: int, steps: int, lr: float, warmup: int, min_lr: float) -> float:
    """The same rise, then `lr`."""
    return lr * (step + 1) / warmup if step < warmup else lr


SCHEDULES: dict[str, Callable[[int, int, float, int, float], float]] = {"cosine": cosine, "constant": constant}


def _check_between(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value < high:
            raise UserError(f"{name} must be at least {low:g} and {'finite' if high == inf else f'below {high:g}'}, got {value}")
