"""The cost of a model: the multiply-adds for one image, by layer and by exit, counted as in papers (2105.15075, Table 6).

    a multiply-add of a product (linear layer, convolution, q kᵀ and the weighted sum of v in attention)     1; adding the bias 0
    layer normalisation                                                        5 per normalised element
    nearest-neighbour upsampling                                               1 per output element
    adaptive average pooling                                                   1 per input element
    softmax, GELU, additions, copies and everything else                       0

Activations are the elements that the ops produce for one image, roughly what training keeps for the backward pass. Nothing is computed: the
model runs without kernels (`grad_mode.trace`), and each op reports its cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """Multiply-adds and activations of the forward pass for one image, in evaluation mode. As text, a table of the multiply-adds."""

    layers: Mapping[str, int]  # multiply-adds by dotted module name, in order of execution
    exits: tuple[int, ...]  # cumulative multiply-adds up to each exit; one entry if the model is not a cascade
    activations: int  # elements of all results of its ops, including those that only the backward pass reads

    @property
    def total(self) -> int:
        """Multiply-adds up to the last exit."""
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

    In a cascade, the modules under `stages.k` run for exit k + 1 and later ones, all others for every exit. The model is in evaluation mode
    during the count; afterwards its mode and random state are as before.
    """
    config = model.config
    images = Tensor(empty((1, *config.image_shape), config.dtype, model.parameters()[0].device))
    counter = _Counter(model)
    with evaluating(model), trace(counter):
        exits = model.exits(images)
    layers = {name: macs for name, macs in counter.layers.items() if macs}
    exit_macs = [0] * len(exits)  # of each exit, in addition to the previous exits
    for name, macs in layers.items():
        outer, _, inner = name.partition(".")
        exit_macs[int(inner.partition(".")[0]) if outer == "stages" else 0] += macs
    return ModelCost(layers, tuple(accumulate(exit_macs)), counter.activations)


class _Counter:
    """A Tracer that adds the cost of each op to the innermost running module, and counts the elements of results."""

    whole = True

    def __init__(self, model: Module) -> None:
        self.names = {id(module): name for name, module in reversed([*model.named_modules()])}  # a shared module has its first name
        self.running: list[str] = []
        self.layers: dict[str, int] = {}
        self.activations = 0

    def op(self, op: Op, inputs: Sequence[Any], outputs: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        name, shapes = self.running[-1] if self.running else "", [None if a is None else a.shape for a in inputs]
        self.layers[name] = self.layers.get(name, 0) + op.cost(*shapes, *constants.values()).macs
        results = op.outputs(*shapes, *constants.values()).values()  # also those that only backward reads
        self.activations += sum(prod(getattr(a, "shape", a)) for a in results if a is not None)

    def enter(self, module: Module) -> None:
        outer = self.running[-1] if self.running else ""
        self.running.append(self.names.get(id(module), outer))  # a module created during forward counts as its creator

    def leave(self) -> None:
        self.running.pop()
