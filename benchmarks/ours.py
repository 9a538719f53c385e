"""minivit as a contender."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from math import prod
from types import SimpleNamespace
from typing import Any

import numpy as np

from minivit import Predictor, Tensor, Trainer, create_model
from minivit.functional import cross_entropy
from minivit.grad_mode import trace
from minivit.kernels import OPS
from minivit.kernels.begin_update import PARTS, SCALARS
from minivit.kernels.core.op import Op
from minivit.nn.layers import Linear
from minivit.nn.module import Module, evaluating
from minivit.training.profiling import memory_rate

from .sides import Side
from .worker import Problem

STORED = {"bfloat16": np.float16}  # by precision, a dtype of the size of what activations are kept in; else float32


class Product(Module):
    def __init__(self, config: Mapping[str, Any]) -> None:
        self.layers = [Linear(config["in_channels"], config["in_channels"], bias=False) for _ in range(config["depth"])]

    def forward(self, images: Tensor) -> Tensor:
        x = images.reshape(len(images), -1)  # (B, C)
        for layer in self.layers:
            x = layer(x)
        return x


class Contender:
    def __init__(self, problem: Problem, side: Side) -> None:
        self.problem, self.precision = problem, side.precision
        self.model: Any = Product(problem.config) if problem.family == "product" else create_model(problem.family, **problem.config)
        self.model.load_state_dict(problem.weights)

    @cached_property
    def trainer(self) -> Trainer:
        return Trainer(self.model, precision=self.precision, **self.problem.adamw)

    @cached_property
    def predictor(self) -> Predictor:
        whole = self.problem.batch if self.problem.family == "product" else None
        return Predictor(self.model, precision=self.precision, batch_size=whole)

    def train(self) -> float:
        return self.trainer.step(self.problem.images, self.problem.labels)

    def infer(self) -> np.ndarray:
        return self.predictor(self.problem.images)

    def weights(self) -> dict[str, np.ndarray]:
        return self.model.state_dict()

    def memory_rate(self, tiny: bool) -> float:
        return memory_rate(tiny)

    def work(self, workload: str, precision: str) -> tuple[int, int]:
        """(floating-point operations, least bytes in a precision) of a step, as the ops tell (`Op.cost`, `Op.least_bytes`).

        The optimizer counts among the bytes alone; for inference, what only a backward would read does not count.
        """
        counted = self._train_work(precision) if workload == "train" else self._infer_work(precision)
        flops, moved = (sum(column) for column in zip(*counted))
        return flops, moved

    def _train_work(self, precision: str) -> Iterator[tuple[int, int]]:
        loss = cross_entropy(self.model.train()(Tensor(self.problem.images)), self.problem.labels)
        seen, waiting = set(), [loss.node]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            waiting += [t.node for t in node.inputs if isinstance(t, Tensor)]
            if node.op:
                cost = node.op.cost(*(None if t is None else t.shape for t in node.inputs), *node.constants)
                arrays = [None if t is None else stored(precision, t.shape, t.dtype) for t in node.inputs]
                yield cost.forward + cost.backward, sum(node.op.least_bytes(arrays, dict(zip(node.op.constants, node.constants))))
        adamw, flat = OPS["adamw"], (sum(p.size for p in self.model.parameters()),)
        arrays = [stored("float32", flat)] * 4 + [None, stored("float64", (PARTS,)), stored("float64", (SCALARS,))]  # no average
        yield 0, adamw.least_bytes(arrays, adamw.constants)[0]

    def _infer_work(self, precision: str) -> list[tuple[int, int]]:
        counter = _Counter(precision)
        with evaluating(self.model), trace(counter):
            self.model(Tensor(self.problem.images))
        return counter.found


def stored(precision: str, shape: tuple[int, ...], dtype: Any = np.float32) -> Any:
    """What stands for an array where only its size matters."""
    dtype = np.dtype(dtype)
    return SimpleNamespace(shape=shape, dtype=np.dtype(STORED.get(precision, dtype)) if dtype.kind == "f" else dtype)


class _Counter:
    """A Tracer that lists the operations and least bytes of each forward."""

    whole = True

    def __init__(self, precision: str) -> None:
        self.precision = precision
        self.found: list[tuple[int, int]] = []

    def op(self, op: Op, inputs: Sequence[Any], outputs: Mapping[str, Any], constants: Mapping[str, Any]) -> None:
        shapes = [None if a is None else a.shape for a in inputs]
        arrays = [None if shape is None else stored(self.precision, shape) for shape in shapes]
        saved = (a for n, a in op.describe(arrays, constants).items() if a is not None and n not in op.results)
        least = op.least_bytes(arrays, constants)[0] - sum(prod(a.shape) * np.dtype(a.dtype).itemsize for a in saved)
        self.found.append((op.cost(*shapes, *constants.values()).forward, least))

    def enter(self, module: Any) -> None: ...

    def leave(self) -> None: ...
