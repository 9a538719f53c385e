"""The declaration of an operation.

An `Op` is the complete description of one operation: the symbolic shapes of its inputs, its constants, the shapes of its outputs, the
implementations of forward and backward, what backward needs, the sizes to test and benchmark it with, and its cost. The tape, the
recorded plan, the tests and the kernel benchmark read nothing else.

    shapes = {"x": "B N C", "w": "C"}     one entry per input, in the order of the kernels' arguments; a length is a letter, or an
                                          expression of letters and constants ("3*C")
    cases = [{"B": 2, "N": 5, "C": 8}, {"B": 2, "N": 5, "C": 8, "w": None, "eps": 1e-3}, {"B": 2, "N": 5, "C": 8, "w": "1"}]
                                          a case assigns a size to each letter. It may override the default of a constant, by a value or a
                                          function of the letters (lambda s: (4, s["N"])), and the shape of an input: None if it is absent.
                                          Expressions may use constants ("(G-1)*stride+P", "kernel[0]") and contain no spaces; "" is the
                                          shape of a scalar

    accepts = {"x": "... C"}              where an input may have other shapes than that of `shapes`, which tests draw: "..." stands for any
                                          axes, the same ones for every input, "1|B" for either length, and "*" for any shape at all, which
                                          `outputs` checks then

    forward(*outputs, *inputs, *constants)
    backward(*d<gradients>, *d<results>, *<accumulates>_sum, *saves, *constants)

Gradients that are equal to another gradient (`gradient_aliases`) are not passed to backward. A gradient that is not needed is None, as
input and as output; so is an optional input or output that is absent. <x>_sum is the running gradient of x, which backward adds to; it may
be the same array as d<x>. A kernel writes every element of its outputs, allocates memory only through `arrays.empty`, never synchronises,
and receives C-contiguous arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import isfinite, prod
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from ...errors import shown
from .devices import device_of, is_array
from .dtypes import accumulator_dtype, is_floating, result_dtype
from .recording import current_recording

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Array:
    """An output whose dtype is not the result dtype of the op's floating-point inputs (`dtypes.result_dtype`)."""

    shape: Shape
    dtype: Any


@dataclass(frozen=True)
class Float32Output:
    """An output that is float32 if the inputs are bfloat16: statistics, losses, logits."""

    shape: Shape


@dataclass(frozen=True)
class Implementation:
    """One direction of an op: the NumPy specification, and the kernels that are tested against it."""

    reference: Callable
    cpu: Callable
    cuda: Callable | None = None

    @classmethod
    def composed(cls, reference: Callable, function: Callable, cpu: Any, cuda: Any) -> Implementation:
        """An implementation by one function for both devices that calls other kernels: its first argument is the device's `primitives`."""
        return cls(reference, partial(function, cpu), partial(function, cuda))

    def on(self, device: str) -> Callable:
        """The function for a device, "cpu" or "cuda", or the "reference". Raises NotImplementedError if there is none."""
        function = getattr(self, device)
        if function is None:
            raise NotImplementedError(f"not available on {device}")
        return function


@dataclass(frozen=True)
class Cost:
    """Floating-point operations of an op (a multiply-add counts as two); the minimal memory traffic follows from its arrays.

    macs: of forward, as papers count the cost of a model: the multiply-adds of products, 5 per normalised element, mostly 0 otherwise.
    """

    forward: int
    backward: int = 0
    macs: int = 0

    @classmethod
    def of_products(cls, macs: int) -> Cost:
        """The cost of matrix products alone; backward has two products for each one."""
        return cls(forward=2 * macs, backward=4 * macs, macs=macs)


@dataclass(frozen=True)
class Op:
    name: str
    shapes: Mapping[str, str]  # the inputs, in order, with their symbolic shapes
    outputs: Callable  # (*input shapes, *constants) -> {name: shape | Float32Output | Array | None}
    forward: Implementation
    cases: Sequence[Mapping[str, Any]]  # see the module docstring
    cost: Callable  # (*input shapes, *constants) -> Cost
    backward: Implementation | None = None
    constants: Mapping[str, Any] = field(default_factory=dict)  # names to defaults, in order; a value has the default's type
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)  # what constants that are text may be
    results: tuple[str, ...] = ("y",)  # the outputs that carry a gradient; they come first
    gradients: tuple[str, ...] | None = None  # the differentiable inputs; None: all
    detached: tuple[str, ...] = ()  # further outputs that the tape returns after the results, without a gradient
    saves: tuple[str, ...] = ()  # inputs and outputs that backward reads
    backward_only: tuple[str, ...] = ()  # outputs that only backward reads: None if there will be no backward
    parameters: tuple[str, ...] = ()  # inputs that remain float32 if the others are bfloat16
    bf16_parameters: tuple[str, ...] = ()  # those of them that products round to bfloat16: they may also be passed as bfloat16
    gradient_aliases: Mapping[str, str] = field(default_factory=dict)  # {"residual": "dy"}: dresidual = dy, without computation
    accumulates: tuple[str, ...] = ()  # inputs whose running gradient backward can add to at no cost
    accepts: Mapping[str, str] = field(default_factory=dict)  # the shapes that inputs may have, where `shapes` names one of several
    dtypes: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # of the inputs that are neither activations nor parameters
    # input -> (rng, shape, sizes) -> array, if standard normal values are not suitable; `sizes` contains letters and constants
    values: Mapping[str, Callable] = field(default_factory=dict)

    @property
    def inputs(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    @property
    def differentiable(self) -> tuple[str, ...]:
        return self.inputs if self.gradients is None else self.gradients

    @cached_property
    def optional(self) -> frozenset[str]:
        """The inputs that may be absent: those that are None in a case."""
        return frozenset(name for case in self.cases for name, value in case.items() if name in self.shapes and value is None)

    @cached_property
    def kinds(self) -> dict[str, Any]:
        """The types that each constant may have, by that of its default."""
        return {name: next((types for of, types in KINDS if isinstance(default, of)), object) for name, default in self.constants.items()}

    def check(self, inputs: Sequence, constants: Mapping[str, Any]) -> None:
        """Raises TypeError for an input of another dtype, ValueError for one of another rank or length, or none: kernels do not look."""
        sizes: dict[str, Any] = {}
        for (name, symbolic), array in zip(self.shapes.items(), inputs):
            if array is None:
                if name not in self.optional:
                    raise TypeError(f"{self.name}: {name} is missing")
                continue
            allowed = self.dtypes.get(name)
            if array.dtype not in allowed if allowed else not is_floating(array.dtype):
                wanted = " or ".join(str(np.dtype(each)) for each in allowed or (np.float32,))
                raise TypeError(f"{self.name}: {name} is {array.dtype}, not {wanted}")
            if 0 in array.shape:
                raise ValueError(f"{self.name}: {name} has shape {tuple(array.shape)}, and nothing is computed of no elements")
            symbolic = self.accepts.get(name, symbolic)
            if symbolic != "*" and not _fits(array.shape, symbolic.split(), sizes, constants):
                where = ", ".join(f"{letter} = {size}" for letter, size in sizes.items() if letter in symbolic)
                raise ValueError(f"{self.name}: {name} has shape {tuple(array.shape)}, not ({symbolic}){where and ' with '}{where}")

    def describe(self, inputs: Sequence, constants: Mapping[str, Any]) -> dict[str, Array | None]:
        """Shape and dtype of each output for these input arrays (or None) and constants, without running the op. Raises as `check` does."""
        self.check(inputs, constants)
        dtype = result_dtype([a.dtype for a in inputs if a is not None and is_floating(a.dtype)])
        shapes = [None if a is None else a.shape for a in inputs]
        described = self.outputs(*shapes, *constants.values())
        return {
            name: Array(tuple(s), dtype)
            if isinstance(s, tuple)
            else Array(tuple(s.shape), accumulator_dtype(dtype))
            if isinstance(s, Float32Output)
            else s
            for name, s in described.items()
        }

    def complete(self, constants: Mapping[str, Any]) -> dict[str, Any]:
        """All constants in order, with defaults filled in. Raises TypeError for one of another type, ValueError out of its range."""
        unknown = constants.keys() - self.constants.keys()
        if unknown:
            raise TypeError(f"{self.name} has no constant {', '.join(sorted(unknown))}")
        for name, value in constants.items():
            kind = self.kinds[name]
            if not isinstance(value, kind):
                raise TypeError(f"{self.name}: {name} is {shown(value)}, not of the type of {self.constants[name]!r}")
            if kind is Real and not isfinite(value):
                raise ValueError(f"{self.name}: {name} is {value}, which is not finite")
            if name in self.choices and value not in self.choices[name]:
                raise ValueError(f"{self.name}: {name} must be one of {', '.join(self.choices[name])}, not {value!r}")
        return {name: constants.get(name, default) for name, default in self.constants.items()}

    def least_bytes(self, inputs: Sequence, constants: Mapping[str, Any]) -> tuple[int, int]:
        """(forward, backward) bytes if every array is read or written exactly once."""
        size = {n: prod(a.shape) * np.dtype(a.dtype).itemsize for n, a in zip(self.inputs, inputs) if a is not None}
        size |= {n: prod(a.shape) * np.dtype(a.dtype).itemsize for n, a in self.describe(inputs, constants).items() if a is not None}
        read = [n for n in self.results + self.saves if n in size]
        written = [n for n in self.differentiable if n in size and n not in self.gradient_aliases]
        return sum(size.values()), sum(size[n] for n in read + written)

    def run(self, direction: str, arguments: Sequence, inputs: Iterable, constants: Iterable, phase: str | None = None) -> None:
        """Run a direction, "forward" or "backward", on its arguments in the order given in the module docstring.

        inputs, constants: those of the op, as arrays or Tensors; a recording stores them with the launches. phase: the phase of the step
        that the launches belong to, "forward", "backward" or "update"; None: same as the direction.
        """
        recording = current_recording()
        if recording is not None:
            described = tuple(None if a is None else Array(a.shape, a.dtype) for a in inputs)
            recording.op_call = OpCall(self, direction, phase or direction, described, tuple(constants))
        device = next(device_of(a) for a in arguments if is_array(a))
        getattr(self, direction).on(device)(*arguments)
        if recording is not None:
            recording.op_call = None


# What a constant may be, by the type of its default; the first that fits.
KINDS = ((bool, (bool, np.bool_, Integral)), (int, Integral), (float, Real), (str, str), (tuple, tuple))


class OpCall(NamedTuple):
    """One call of an op, to which recorded launches belong. It holds no references to the op's arrays."""

    op: Op
    direction: str  # forward, backward
    phase: str  # of the step: forward, backward, update
    inputs: tuple[Array | None, ...]
    constants: tuple[Any, ...]

    def least(self) -> tuple[int, int]:
        """The minimal (floating-point operations, bytes) of the call, if every input needs its gradient."""
        cost = self.op.cost(*(None if a is None else a.shape for a in self.inputs), *self.constants)
        forward, backward = self.op.least_bytes(self.inputs, dict(zip(self.op.constants, self.constants)))
        return (cost.forward, forward) if self.direction == "forward" else (cost.backward, backward)


def _fits(shape: Shape, tokens: list[str], sizes: dict[str, Any], constants: Mapping[str, Any]) -> bool:
    """Whether a shape is as its tokens say; the lengths of letters that are met for the first time are added to `sizes`."""
    if "..." in tokens:
        at = tokens.index("...")
        after = len(tokens) - 1 - at
        if len(shape) < at + after:
            return False
        axes = tuple(shape[at : len(shape) - after])
        if sizes.setdefault("...", axes) != axes:
            return False
        tokens, shape = tokens[:at] + tokens[at + 1 :], (*shape[:at], *shape[len(shape) - after :])
    return len(shape) == len(tokens) and all(_is_length(n, token, sizes, constants) for n, token in zip(shape, tokens))


def _is_length(length: int, token: str, sizes: dict[str, Any], constants: Mapping[str, Any]) -> bool:
    if "|" in token:
        return any(_is_length(length, each, sizes, constants) for each in token.split("|"))
    if token.isdigit():
        return length == int(token)
    if not token.isidentifier():
        try:
            return length == eval(token, {}, {**constants, **sizes})
        except NameError:  # a letter of which no axis alone has the length: the whole expression is like a letter then
            pass
    return sizes.setdefault(token, length) == length


def require(op: str, **shapes: tuple[Shape | None, Shape]) -> None:
    """Raises ValueError for the first (shape or None, expected shape) that differ; kernels themselves do not check shapes."""
    for name, (shape, expected) in shapes.items():
        if shape is not None and tuple(shape) != tuple(expected):
            raise ValueError(f"{op}: {name} has shape {tuple(shape)}, not {tuple(expected)}")
