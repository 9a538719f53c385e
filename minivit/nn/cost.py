"""What a model costs: the multiply-adds of one image, by layer and by exit, counted as papers do (2105.15075, Table 6).

    a multiply-add of a product (linear layer, convolution, attention's q kᵀ and its sum of v)     1; adding the bias 0
    layer normalisation                                                        5 an element that is normalised
    nearest-neighbour upsampling                                               1 an element that it makes
    adaptive average pooling                                                   1 an element that it reads
    softmax, GELU, additions, moves and all else                               0

Activations are the numbers that its ops make of one image, about what training keeps for a backward. Nothing is computed for it: the
model runs without its kernels (`tensor.trace`), and each op tells what it would cost.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

from ..grad_mode import trace
from ..kernels.core.arrays import empty
from ..kernels.core.op import Op
from ..tensor import Tensor
from .module import Module, evaluating


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of the forward for one image, in evaluation mode, and activations. As text, a table of the former."""

    layers: Mapping[str, int]  # by the dotted name of the module whose forward costs them, in order of execution
    exits: tuple[int, ...]  # of what runs up to each exit; one exit where the model has no others
    activations: int  # the elements of all that its ops make, what only a backward reads included

    @property
    def total(self) -> int:
        """Up to the last exit."""
        return self.exits[-1]

    def __str__(self) -> str:
        rows = [(name or "(the model itself)", macs) for name, macs in self.layers.items()]
        if len(self.exits) > 1:
            rows += [(f"up to exit {k}", macs) for k, macs in enumerate(self.exits, 1)]
        rows.append(("total", self.total))
        width = max(len("layer"), *(len(name) for name, _ in rows))
        lines = [f"{'layer':<{width}}  {'multiply-adds':>15}  {'share':>7}"]
        lines += [f"{name:<{width}}  {macs:>15,}  {100 * macs / max(self.total, 1):>5.1f} %" for name, macs in rows]
        return "\n".join(lines)


def count(model: Any) -> ModelCost:
    """The cost of a Model for one image.

    Of a cascade, what `stages.k` holds runs for exit k + 1 and later ones, all else for every exit. Leaves the model as it is, its mode
    and its random state; while it counts, the model is in evaluation mode.
    """
    config = model.config
    images = Tensor(empty((1, config.in_channels, config.image_size, config.image_size), config.dtype, model.parameters()[0].device))
    counter = _Counter(model)
    with evaluating(model), trace(counter):
        exits = model.exits(images)
    layers = {name: macs for name, macs in counter.layers.items() if macs}
    own = [0] * len(exits)  # of each exit beyond those before it
    for name, macs in layers.items():
        outer, _, rest = name.partition(".")
        own[int(rest.partition(".")[0]) if outer == "stages" else 0] += macs
    return ModelCost(layers, tuple(accumulate(own)), counter.activations)


class _Counter:
    """A Tracer that adds the cost of each op to the innermost module that runs, and counts what ops make."""

    def __init__(self, model: Module) -> None:
        self.names = {id(module): name for name, module in reversed([*model.named_modules()])}  # the first name of a shared one
        self.running: list[str] = []
        self.layers: dict[str, int] = {}
        self.activations = 0

    def op(self, op: Op, shapes: list[tuple[int, ...] | None], constants: Mapping[str, Any]) -> None:
        name = self.running[-1] if self.running else ""
        self.layers[name] = self.layers.get(name, 0) + op.cost(*shapes, *constants.values()).macs
        made = op.outputs(*shapes, *constants.values()).values()
        self.activations += sum(prod(getattr(a, "shape", a)) for a in made if a is not None)

    def enter(self, module: Module) -> None:
        outer = self.running[-1] if self.running else ""
        self.running.append(self.names.get(id(module), outer))  # one made on the way is part of the module that made it

    def leave(self) -> None:
        self.running.pop()
