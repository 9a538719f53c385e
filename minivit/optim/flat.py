"""All parameters in one buffer and their gradients in another, so that an optimizer updates them with few kernels, in any order."""

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

Groups = Callable[[Module, list[Parameter]], list[list[Parameter]]]  # (model, trainable parameters) -> groups of these


def by_decay(model: Module, trainable: list[Parameter]) -> list[list[Parameter]]:
    """Two groups: the parameters with weight decay, and those without."""
    decayed_ids = set(map(id, model.decayed_parameters()))
    return [[p for p in trainable if (id(p) in decayed_ids) is decayed] for decayed in (True, False)]


class FlatParameters:
    """All trainable parameters of a model in one buffer, and their gradients in another, ordered by group; both on one device.

    Each parameter's `data` and `grad_home` become views of the buffers, aligned to cache lines; padding is zero in both. The entire model
    is moved to the device. Running statistics (`Module.statistics`) lie behind the groups, with a gradient of zero, by which an optimizer
    leaves them alone, but for their average: averaged weights need the statistics of activations that such weights make.

    groups: the grouping of parameters, by default those with weight decay, then the others; the last group is that without weight decay.
    ends: the end of each group in the buffers. starts: the start of each parameter in the buffers, by its id.
    size: the number of trainable elements. products: the dtype in which the model computes with its parameters, by default theirs.
    data, gradient: the buffers, (size with padding,), of `dtype` (by default the model's).
    Raises UserError if there is nothing to train.
    """

    def __init__(
        self, model: Module, dtype: Any = None, device: str = "cpu", groups: Groups = by_decay, products: np.dtype | None = None
    ) -> None:
        trainable = _trainable(model)
        if not trainable:
            raise UserError("the model has no parameters to train")
        dtype = np.dtype(trainable[0].dtype if dtype is None else dtype)
        model.to("cpu").astype(dtype)
        grouped = groups(model, trainable)
        line_size = arrays.ALIGNMENT // dtype.itemsize
        statistics = [p for p in model.statistic_parameters() if not p.requires_grad]
        self.parameters = [parameter for group in (*grouped, statistics) for parameter in group]
        padded_sizes = [-(-p.size // line_size) * line_size for p in self.parameters]
        self.size = sum(p.size for p in trainable)
        self.ends = [sum(padded_sizes[: sum(map(len, grouped[: i + 1]))]) for i in range(len(grouped))]
        self.model, self.device, self.products = model, device, products or dtype
        values = np.zeros(sum(padded_sizes), dtype)
        self.gradient = arrays.array_on(device, np.zeros_like(values))
        starts = np.cumsum([0, *padded_sizes]).tolist()
        self.starts = {id(parameter): start for parameter, start in zip(self.parameters, starts)}
        for parameter, start in zip(self.parameters, starts):
            values[start : start + parameter.size] = parameter.data.reshape(-1)
        model.to(device)
        self.data = arrays.array_on(device, values)
        for parameter, start in zip(self.parameters, starts):
            view = slice(start, start + parameter.size)
            parameter.data = self.data[view].reshape(parameter.shape)
            if parameter.requires_grad:
                parameter.grad_home = self.gradient[view].reshape(parameter.shape)
        self._views = [p.data for p in self.parameters]
        self._slots = [slot[1:] for module in model.modules() for slot in module.child_slots()]

    def check(self) -> None:
        """Raises UserError if the model's parameters were replaced or moved."""
        moved = any(p.data is not view for p, view in zip(self.parameters, self._views))
        if moved or any(holder[key] is not child for holder, key, child in self._slots):
            raise UserError("the model's parameters have changed or moved, as by another Trainer or a new head: make a new Trainer")

    @property
    def decayed(self) -> int:
        """The end of the parameters with weight decay."""
        return self.ends[-2]

    @contextmanager
    def with_bf16_copy(self) -> Iterator[None]:
        """Inside, matrix products read parameters from a common bfloat16 copy, instead of rounding them in each product."""
        copy = arrays.empty(self.data.shape, BFLOAT16, self.device)
        primitives(self.device).convert(copy, self.data)
        for parameter in self.parameters:
            start = self.starts[id(parameter)]
            parameter.bf16_copy = copy[start : start + parameter.size].reshape(parameter.shape)
        try:
            yield
        finally:
            for parameter in self.parameters:
                parameter.bf16_copy = None

    def forget_gradients(self) -> None:
        """To be called before a backward, which then overwrites gradients instead of accumulating."""
        for parameter in self.parameters:
            parameter.grad = None

    def clear_unused_gradients(self) -> None:
        """To be called after a backward: sets the gradients of parameters that it did not reach to zero."""
        for parameter in self.parameters:
            if parameter.grad is None and parameter.grad_home is not None:
                primitives(self.device).fill(parameter.grad_home, 0.0)


def _trainable(model: Module) -> list[Parameter]:
    """The parameters that require a gradient, without duplicates, in the order of their first names."""
    return list({id(parameter): parameter for parameter in model.parameters() if parameter.requires_grad}.values())
