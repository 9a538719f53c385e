"""All parameters in one buffer and their gradients in another, so that an optimizer updates them with few kernels, in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..kernels import primitives
from ..kernels.core import arrays
from ..kernels.core.dtypes import BFLOAT16
from ..nn.module import Module, Parameter

Chosen = Callable[[Module, list[Parameter]], list[Parameter]]  # (model, trainable parameters) -> some of them, in an order


class Segment(NamedTuple):
    """A stretch of the flat buffers: start ... stop, of which start ... decayed has weight decay; and the factor of its learning rate."""

    start: int
    decayed: int
    stop: int
    scale: float


class FlatParameters:
    """All trainable parameters of a model in one buffer, and their gradients in another; both on one device.

    Each parameter's `data` and `grad_home` become views of the buffers, aligned to cache lines; padding is zero in both. The entire model
    is moved to the device. Running statistics (`Module.statistics`) end the last segment, with a gradient of zero, by which an optimizer
    leaves them alone, but for their average: averaged weights need the statistics of activations that such weights make.

    first: those that come first in the buffers, in front of all segments, because the optimizer treats them in another way.
    layer_decay: the factor of the learning rate from each layer to the layer before it (`Module.layer_numbers`; 2003.10555, appendix B).
    segments: where the other parameters are, by the scale of the learning rate: one segment if layer_decay is 1.
    starts: the start of each parameter in the buffers, by its id. scales: the scale of each trainable parameter's learning rate, by its id.
    size: the number of trainable elements. products: the dtype in which the model computes with its parameters, by default theirs.
    data, gradient: the buffers, (size with padding,), of `dtype` (by default the model's).
    Raises UserError if there is nothing to train, and for a layer_decay out of range or for a model without blocks.
    """

    def __init__(
        self,
        model: Module,
        dtype: Any = None,
        device: str = "cpu",
        first: Chosen = lambda model, trainable: [],
        products: np.dtype | None = None,
        layer_decay: float = 1.0,
    ) -> None:
        trainable = [parameter for parameter in model.distinct_parameters() if parameter.requires_grad]
        if not trainable:
            raise UserError("the model has no parameters to train")
        if not 0 < layer_decay <= 1:
            raise UserError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
        if layer_decay != 1 and not model.layer_numbers():
            raise UserError(f"layer_decay={layer_decay} is for models with blocks: leave it out")
        dtype = np.dtype(trainable[0].dtype if dtype is None else dtype)
        model.to("cpu").astype(dtype)
        line_size = arrays.ALIGNMENT // dtype.itemsize
        layers, decayed = model.layer_numbers(), set(map(id, model.decayed_parameters()))
        self.scales = {id(p): layer_decay ** layers.get(id(p), (0, 0))[1] for p in trainable}
        ahead = first(model, trainable)
        placed = set(map(id, ahead))
        rest = sorted((p for p in trainable if id(p) not in placed), key=lambda p: (self.scales[id(p)], id(p) not in decayed))
        statistics = [p for p in model.statistic_parameters() if not p.requires_grad]
        self.parameters = [*ahead, *rest, *statistics]
        padded_sizes = [-(-p.size // line_size) * line_size for p in self.parameters]
        self.size = sum(p.size for p in trainable)
        self.model, self.device, self.products = model, device, products or dtype
        values = np.zeros(sum(padded_sizes), dtype)
        self.gradient = arrays.array_on(device, np.zeros_like(values))
        starts = np.cumsum([0, *padded_sizes]).tolist()
        self.segments = list[Segment]()
        place = len(ahead)
        for scale, group in groupby(rest, key=lambda p: self.scales[id(p)]):
            members = list(group)
            bare, end = place + sum(id(p) in decayed for p in members), place + len(members)
            self.segments.append(Segment(starts[place], starts[bare], starts[end], scale))
            place = end
        if self.segments:
            self.segments[-1] = self.segments[-1]._replace(stop=len(values))
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
