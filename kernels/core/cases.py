"""Calling an op: random arguments for its cases, and running both directions on them. Used by checks, tests and benchmarks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from . import dtypes
from .arrays import empty, to_device, to_numpy
from .op import Array, Op, Shape

Arrays = dict[str, Any]  # by name; None if absent


def input_shapes(op: Op, case: Mapping[str, Any]) -> dict[str, Shape | None]:
    """The shape of each input of `op` for a case, None if it is absent; `op.py` describes what a case may contain.

    Raises ValueError if a length is below 1.
    """
    names = _names(op, case)
    shapes: dict[str, Shape | None] = {}
    for name, symbolic in op.shapes.items():
        symbolic = case.get(name, symbolic)
        if symbolic is None:
            shapes[name] = None
            continue
        shapes[name] = shape = tuple(eval(length, {"__builtins__": {}}, names) for length in symbolic.split())  # trusted: from the op
        if min(shape, default=1) < 1:
            raise ValueError(f"{op.name}: {name} ({symbolic}) would have shape {shape}")
    return shapes


def total_elements(op: Op, case: Mapping[str, Any]) -> int:
    """The number of elements of all inputs and outputs."""
    shapes = input_shapes(op, case).values()
    constants = [v for n, v in _names(op, case).items() if n in op.constants]
    outputs = [getattr(a, "shape", a) for a in op.outputs(*shapes, *constants).values()]
    return sum(prod(s) for s in (*shapes, *outputs) if s is not None)


def shrunk(op: Op, case: Mapping[str, Any], elements: int = 300_000, operations: int = 100_000_000) -> dict[str, Any]:
    """The case with its first letter, usually the batch, halved until it has at most `elements` and `operations`."""
    case = dict(case)
    first = next(iter(letters(op, case)), None)
    while first and case[first] > 1:
        shapes = input_shapes(op, case).values()
        constants = [v for n, v in _names(op, case).items() if n in op.constants]
        if total_elements(op, case) <= elements and op.cost(*shapes, *constants).forward <= operations:
            break
        case[first] //= 2
    return case


def make_inputs(
    op: Op, case: Mapping[str, Any], dtype: Any, rng: np.random.Generator, sizes: Mapping[str, int] | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """Random inputs of `op` for a case, by name, and all its constants.

    dtype: of the floating-point inputs. sizes: letters that override those of the case. Raises ValueError if a length is below 1.
    """
    case = {**case, **(sizes or {})}
    names = _names(op, case)
    inputs: Arrays = {}
    for name, shape in input_shapes(op, case).items():
        if shape is None:
            inputs[name] = None
            continue
        draw = op.values.get(name)
        value = np.asarray(draw(rng, shape, names) if draw else rng.standard_normal(shape))
        inputs[name] = np.array(value, _dtype_of(op, name, dtype) if value.dtype.kind == "f" else value.dtype, order="C")
    return inputs, {n: names[n] for n in op.constants}


def letters(op: Op, case: Mapping[str, Any]) -> dict[str, int]:
    """The size of each letter in a case."""
    return {n: v for n, v in case.items() if n not in op.shapes and n not in op.constants}


def _names(op: Op, case: Mapping[str, Any]) -> dict[str, Any]:
    """The names available to expressions: letters and constants."""
    sizes = letters(op, case)
    constants = {n: v(sizes) if callable(v) else v for n, v in case.items() if n in op.constants}
    return sizes | op.complete(constants)


@dataclass(frozen=True)
class Sample:
    """An op, with the arrays and constants to call it with."""

    op: Op
    inputs: Arrays
    constants: dict[str, Any]

    @property
    def dtype(self) -> np.dtype:
        return dtypes.result_dtype([a.dtype for a in self.inputs.values() if is_floating(a)])

    @property
    def differentiable(self) -> list[str]:
        return [n for n in self.op.differentiable if self.inputs[n] is not None] if self.op.backward else []

    def astype(self, dtype: Any) -> Sample:
        inputs = {n: a.astype(_dtype_of(self.op, n, dtype)) if is_floating(a) else a for n, a in self.inputs.items()}
        return Sample(self.op, inputs, self.constants)

    def describe(self) -> dict[str, Array | None]:
        """Shape and dtype of each output."""
        return self.op.describe(tuple(self.inputs.values()), self.constants)

    def outputs(self) -> Arrays:
        """Outputs to write into, filled with NaN so that unwritten elements are noticed."""
        return {n: _blank(a) for n, a in self.describe().items()}

    def weights(self, rng: np.random.Generator) -> Arrays:
        """A random gradient for each result of this call."""
        return {n: _normal(rng, a) for n, a in self.describe().items() if n in self.op.results}

    def running(self, rng: np.random.Generator) -> Arrays:
        """A random running gradient for each input that the op accumulates."""
        return {n: _normal(rng, self.inputs[n]) for n in self.op.accumulates}

    def forward(self, implementation: str, absent: Sequence[str] = ()) -> Arrays:
        """The outputs by name; those listed in `absent` are None."""
        outputs = self.outputs() | dict.fromkeys(absent)
        self._run("forward", implementation, (*outputs.values(), *self.inputs.values(), *self.constants.values()))
        return outputs

    def backward(
        self,
        implementation: str,
        outputs: Arrays,
        weights: Arrays,
        wanted: Sequence[str] | None = None,
        running: Arrays | None = None,
        in_place: bool = False,
    ) -> Arrays:
        """The gradients of Σ weights·results, by input.

        outputs: those of forward. wanted: the inputs whose gradient is computed, all by default; the other gradients are None.
        running: the running gradients of accumulated inputs. in_place: write the results over a copy of the running gradients.
        """
        op = self.op
        wanted = self.differentiable if wanted is None else wanted
        needed = {op.gradient_aliases.get(n, "d" + n)[1:] for n in wanted}
        written = [n for n in op.differentiable if n not in op.gradient_aliases]
        gradients = {n: _blank(self.inputs[n] if n in needed else None) for n in written}
        arrays = self.inputs | outputs
        if in_place:
            running = {n: None if a is None else a.copy() for n, a in (running or {}).items()}
            gradients |= {n: a for n, a in running.items() if n in wanted}
        sums = [(running or {}).get(n) if n in wanted else None for n in op.accumulates]
        self._run(
            "backward",
            implementation,
            (*gradients.values(), *(weights[n] for n in op.results), *sums, *(arrays[n] for n in op.saves), *self.constants.values()),
        )
        results = weights | gradients
        return {n: results[op.gradient_aliases.get(n, "d" + n)[1:]] for n in wanted}

    def _run(self, direction: str, implementation: str, arguments: Sequence) -> None:
        """Takes and writes CPU arrays. On a GPU the kernels run on copies; all are copied back, which reveals stray writes."""
        function = getattr(getattr(self.op, direction), implementation)
        if implementation != "cuda":
            function(*arguments)
            return
        copies = {id(a): to_device(a, "cuda") for a in arguments if isinstance(a, np.ndarray)}
        on_device = [copies.get(id(a), a) for a in arguments]
        function(*on_device)
        for array, copy in zip(arguments, on_device):
            if isinstance(array, np.ndarray):
                array[...] = to_numpy(copy)

    def run(self, implementation: str, weights: Arrays, running: Arrays | None = None) -> Arrays:
        """Forward, and backward if the op has one: the outputs by name, and the gradients as "d" + name."""
        outputs = self.forward(implementation)
        gradients = self.backward(implementation, outputs, weights, running=running) if self.op.backward else {}
        return outputs | {"d" + n: a for n, a in gradients.items()}


def is_floating(array: Any) -> bool:
    """Whether `array` is not None and has a floating-point dtype."""
    return array is not None and dtypes.is_floating(array.dtype)


def cast(arrays: Arrays, dtype: Any) -> Arrays:
    """The arrays, with the floating-point ones converted."""
    return {n: a.astype(dtype) if is_floating(a) else a for n, a in arrays.items()}


def _normal(rng: np.random.Generator, like: Any) -> np.ndarray | None:
    return None if like is None else np.array(rng.standard_normal(like.shape), like.dtype)


def _dtype_of(op: Op, name: str, dtype: Any) -> np.dtype:
    """The dtype of a floating-point input if activations have this dtype."""
    return dtypes.accumulator_dtype(np.dtype(dtype)) if name in op.parameters else np.dtype(dtype)


def _blank(like: Any) -> np.ndarray | None:
    if like is None:
        return None
    array = empty(like.shape, like.dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN as a float
    return array
