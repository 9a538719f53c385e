"""All parameters in one buffer, and their gradients in another: an optimizer moves them by few kernels, in whatever order they lie."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels import primitives
from ..kernels.core import arrays
from ..kernels.core.dtypes import BFLOAT16
from ..nn.module import Module, Parameter

Groups = Callable[[Module, list[Parameter]], list[list[Parameter]]]  # (model, its trainable parameters) -> these in groups


def by_decay(model: Module, trainable: list[Parameter]) -> list[list[Parameter]]:
    """The parameters that weight decay acts on, and the others."""
    decaying = set(map(id, model.decayed_parameters()))
    return [[p for p in trainable if (id(p) in decaying) is wanted] for wanted in (True, False)]


class FlatParameters:
    """All trainable parameters of a model in one buffer, and their gradients in another, group after group; both on one device.

    Each parameter's `data` and `grad_home` become views of them, on a cache line of their own; padding is zero in both.

    groups: which parameters lie together, by default those that weight decay acts on, then the others. ends: where each group ends.
    data, gradient: (size with padding,), of `dtype` (the model's, by default). The whole model moves to the device.
    Raises UserError where nothing is to be trained.
    """

    def __init__(self, model: Module, dtype: Any = None, device: str = "cpu", groups: Groups = by_decay) -> None:
        trainable = _trainable(model)
        if not trainable:
            raise UserError("the model has no parameters to train")
        dtype = np.dtype(trainable[0].dtype if dtype is None else dtype)
        model.to("cpu").astype(dtype)
        grouped = groups(model, trainable)
        line = arrays.ALIGNMENT // dtype.itemsize
        self.parameters = [parameter for group in grouped for parameter in group]
        padded = [-(-p.size // line) * line for p in self.parameters]
        self.size = sum(p.size for p in self.parameters)
        self.ends = [sum(padded[: sum(map(len, grouped[: i + 1]))]) for i in range(len(grouped))]
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
        self._slots = [slot[1:] for module in model.modules() for slot in module.child_slots()]

    def check(self) -> None:
        """Raises UserError where the model's parameters are no longer these, or lie elsewhere."""
        moved = any(p.data is not view for p, view in zip(self.parameters, self._views))
        if moved or any(holder[key] is not child for holder, key, child in self._slots):
            raise UserError("the model's parameters have changed or moved, as by another Trainer or a new head: make a new Trainer")

    @property
    def decayed(self) -> int:
        """Where the first group ends: by default, the parameters that weight decay acts on."""
        return self.ends[0]

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


def _trainable(model: Module) -> list[Parameter]:
    """Each parameter that requires a gradient once, in the order of their first names."""
    return list({id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}.values())
