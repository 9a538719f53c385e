"""Optimizers over one flat buffer of parameters, learning-rate schedules and the running average of weights.

Which parameters weight decay leaves alone is `decays`. What changes from step to step, learning rate and step number, lies in arrays,
so that a recorded step can be replayed.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import is_dataclass, replace
from math import cos, inf, pi
from typing import Any

import numpy as np

from .errors import UserError
from .kernels import OPS, device
from .module import Module, Parameter

NO_DECAY = ("bias", "cls_token", "pos_embed")           # the last part of such a parameter's name


def decays(name: str, parameter: Parameter) -> bool:
    """Whether weight decay acts on a parameter: not if it has one dimension (biases, scales of normalisations, LayerScale), and not on
    biases, class tokens and position embeddings of any shape, as timm and DeiT do."""
    return parameter.ndim > 1 and name.rpartition(".")[2] not in NO_DECAY


class FlatParameters:
    """All trainable parameters of a model in one buffer, and their gradients in another, the decayed ones first.

    Each parameter's `data` and `grad_home` become views of them, on a cache line of their own; padding is zero in both.

    data, gradient: (size with padding,), of `dtype` (the model's, by default). decayed: where those without decay begin.
    Raises UserError where nothing is to be trained.
    """

    def __init__(self, model: Module, dtype: Any = None) -> None:
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UserError("the model has no parameters to train")
        dtype = np.dtype(named[0][1].dtype if dtype is None else dtype)
        _convert(model, dtype)
        decayed, others = ([p for name, p in named if decays(name, p) is wanted] for wanted in (True, False))
        line = device.ALIGNMENT // dtype.itemsize
        padded = [-(-p.size // line) * line for p in decayed + others]
        self.parameters = decayed + others
        self.size = sum(p.size for p in self.parameters)
        self.decayed = sum(padded[:len(decayed)])
        self.data, self.gradient = device.empty((sum(padded),), dtype), device.empty((sum(padded),), dtype)
        self.data[...] = 0
        self.gradient[...] = 0
        start = 0
        for parameter, length in zip(self.parameters, padded):
            part = slice(start, start + parameter.size)
            view = self.data[part].reshape(parameter.shape)
            view[...] = parameter.data
            parameter.data, parameter.grad_home = view, self.gradient[part].reshape(parameter.shape)
            start += length
        self._views = [p.data for p in self.parameters]

    def check(self) -> None:
        """Raises UserError where the model's parameters are no longer these."""
        if any(p.data is not view for p, view in zip(self.parameters, self._views)):
            raise UserError("the model's parameters have moved, as another Trainer of the same model does: make a new Trainer")

    def forget_gradients(self) -> None:
        """Before a backward: it writes each gradient anew."""
        for parameter in self.parameters:
            parameter.grad = None

    def clear_unused_gradients(self) -> None:
        """After a backward: a parameter that it did not reach has gradient zero. Which these are must not change under a plan."""
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad_home[...] = 0


def _convert(model: Module, dtype: np.dtype) -> None:
    """Give all parameters a dtype, and the configuration its name."""
    for parameter in model.parameters():
        parameter.data = parameter.data.astype(dtype, copy=False)
    config = getattr(model, "config", None)
    if is_dataclass(config) and getattr(config, "dtype", dtype.name) != dtype.name:
        model.config = replace(config, dtype=dtype.name)


def _check_between(low: float, high: float, **values: float) -> None:
    for name, value in values.items():
        if not low <= value < high:
            raise UserError(f"{name} must be at least {low:g} and {'finite' if high == inf else f'below {high:g}'}, got {value}")
