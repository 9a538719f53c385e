"""An op on arguments: random ones made for its cases, its two directions run on them. What checks, tests and benchmarks stand on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from . import dtypes
from .arrays import empty, to_device, to_numpy
from .op import Array, Op, Shape

Arrays = dict[str, Any]  # by name; None where absent


def input_shapes(op: Op, case: Mapping[str, Any]) -> dict[str, Shape | None]:
    """The shape of each input of `op` for a case, None where it is absent; `Op` says what a case may hold.

    Raises ValueError where a length comes out below 1.
    """
    names = _names(op, case)
    shapes: dict[str, Shape | None] = {}
    for name, symbolic in op.shapes.items():
        symbolic = case.get(name, symbolic)
        if symbolic is None:
            shapes[name] = None
            continue
        shapes[name] = shape = tuple(eval(length, {"__builtins__": {}}, names) for length in symbolic.split())  # the op's own text
        if min(shape, default=1) < 1:
            raise ValueError(f"{op.name}: {name} ({symbolic}) would have shape {shape}")
    return shapes


def shrunk(op: Op, case: Mapping[str, Any], elements: int = 300_000, operations: int = 100_000_000) -> dict[str, Any]:
    """The case with its first letter, as a rule the batch, halved until inputs, outputs and arithmetic are at most this much."""
    case = dict(case)
    first = next(iter(letters(op, case)), None)
    while first and case[first] > 1:
        shapes = input_shapes(op, case).values()
        constants = [v for n, v in _names(op, case).items() if n in op.constants]
        outputs = [getattr(a, "shape", a) for a in op.outputs(*shapes, *constants).values()]
        if sum(prod(s) for s in (*shapes, *outputs) if s is not None) <= elements and op.cost(*shapes, *constants).forward <= operations:
            break
        case[first] //= 2
    return case


def make_inputs(
    op: Op, case: Mapping[str, Any], dtype: Any, rng: np.random.Generator, sizes: Mapping[str, int] | None = None
) -> tuple[Arrays, dict[str, Any]]:
    """Random inputs of `op` for a case, by name, and all its constants.

    dtype: of the floating inputs. sizes: letters to use instead of the case's. Raises ValueError where a length comes out below 1.
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
    """The sizes that a case gives."""
    return {n: v for n, v in case.items() if n not in op.shapes and n not in op.constants}


def _names(op: Op, case: Mapping[str, Any]) -> dict[str, Any]:
    """What expressions may name: the letters and all constants."""
    sizes = letters(op, case)
    given = {n: v(sizes) if callable(v) else v for n, v in case.items() if n in op.constants}
    return sizes | op.complete(given)


@dataclass(frozen=True)
class Sample:
    """An op, with arrays and constants to call it on."""

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
        """Outputs to write into, full of NaN, so that an element no kernel writes shows."""
        return {n: _blank(a) for n, a in self.describe().items()}

    def weights(self, rng: np.random.Generator) -> Arrays:
        """A random gradient for each result that this call has."""
        return {n: _normal(rng, a) for n, a in self.describe().items() if n in self.op.results}

    def running(self, rng: np.random.Generator) -> Arrays:
        """A random gradient that runs already to each input the op can add to."""
        return {n: _normal(rng, self.inputs[n]) for n in self.op.accumulates}

    def forward(self, implementation: str, absent: Sequence[str] = ()) -> Arrays:
        """The outputs by name, but for those that are `absent`: None."""
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
        """The gradients of Σ weights·results by input.

        outputs: what forward gave. wanted: the inputs whose gradient is computed, by default all; the others' are None.
        running: for inputs that the op accumulates, the gradient to add to; in_place: a copy of which the result is written over.
        """
        op = self.op
        wanted = self.differentiable if wanted is None else wanted
        needed = {op.gradient_aliases.get(n, "d" + n)[1:] for n in wanted}
        written = [n for n in op.differentiable if n not in op.gradient_aliases]
        gradients = {n: _blank(self.inputs[n] if n in needed else None) for n in written}
        known = self.inputs | outputs
        if in_place:
            running = {n: None if a is None else a.copy() for n, a in (running or {}).items()}
            gradients |= {n: a for n, a in running.items() if n in wanted}
        sums = [(running or {}).get(n) if n in wanted else None for n in op.accumulates]
        self._run(
            "backward",
            implementation,
            (*gradients.values(), *(weights[n] for n in op.results), *sums, *(known[n] for n in op.saves), *self.constants.values()),
        )
        given = weights | gradients
        return {n: given[op.gradient_aliases.get(n, "d" + n)[1:]] for n in wanted}

    def _run(self, direction: str, implementation: str, arguments: Sequence) -> None:
        """Arrays on the CPU in and out. On a GPU the kernels run on copies, and all come back: what was not to be written shows."""
        function = getattr(getattr(self.op, direction), implementation)
        if implementation != "cuda":
            function(*arguments)
            return
        moved = {id(a): to_device(a, "cuda") for a in arguments if isinstance(a, np.ndarray)}
        there = [moved.get(id(a), a) for a in arguments]
        function(*there)
        for array, copy in zip(arguments, there):
            if isinstance(array, np.ndarray):
                array[...] = to_numpy(copy)

    def run(self, implementation: str, weights: Arrays, running: Arrays | None = None) -> Arrays:
        """Forward, and backward where there is one: the outputs by name, and the gradients as "d" + name."""
        outputs = self.forward(implementation)
        gradients = self.backward(implementation, outputs, weights, running=running) if self.op.backward else {}
        return outputs | {"d" + n: a for n, a in gradients.items()}


def is_floating(array: Any) -> bool:
    """Whether there is an array, and it is of floats."""
    return array is not None and dtypes.is_floating(array.dtype)


def cast(arrays: Arrays, dtype: Any) -> Arrays:
    """The arrays with those of floats converted."""
    return {n: a.astype(dtype) if is_floating(a) else a for n, a in arrays.items()}


def _normal(rng: np.random.Generator, like: Any) -> np.ndarray | None:
    return None if like is None else np.array(rng.standard_normal(like.shape), like.dtype)


def _dtype_of(op: Op, name: str, dtype: Any) -> np.dtype:
    """Of a floating input, where activations have this dtype."""
    return dtypes.accumulator_dtype(np.dtype(dtype)) if name in op.parameters else np.dtype(dtype)


def _blank(like: Any) -> np.ndarray | None:
    if like is None:
        return None
    array = empty(like.shape, like.dtype)
    array.reshape(-1).view(np.uint8)[...] = 0xFF  # NaN as a float
    return array
