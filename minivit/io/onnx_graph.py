"""From the ops that a function of tensors runs to a graph of ONNX nodes.

The function is walked through twice (`grad_mode.trace`), for batches of two different sizes. Lengths that differ between the two belong to
the batch, and all others are constants of the graph. An op whose inputs are all constants, as the folding of a batch normalisation into
weights, is computed at once by its reference. Every other op becomes nodes by its entry in `onnx_ops.TRANSLATIONS`.

An array is known by where it lies in memory: a reshape is a view, so two shapes at one place are one value and a node Reshape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ..errors import UserError
from ..grad_mode import trace
from ..kernels.core.devices import address_of
from ..kernels.core.op import Op
from ..tensor import Tensor
from .int8 import rounded_rows

OPSET = 17  # the first with LayerNormalization
Shape = tuple[int, ...]
LAST = np.iinfo(np.int64).max  # the end of an axis, whatever its length


@dataclass(frozen=True)
class Call:
    """An op as it ran for one batch. inputs, outputs: arrays or None by name."""

    op: Op
    inputs: Mapping[str, np.ndarray | None]
    outputs: Mapping[str, np.ndarray | None]
    constants: Mapping[str, Any]


class Recorder:
    """A Tracer that keeps each call with its arrays, so that no two of them get the same place in memory."""

    whole = False

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def op(
        self, op: Op, inputs: Sequence[np.ndarray | None], outputs: Mapping[str, np.ndarray | None], constants: Mapping[str, Any]
    ) -> None:
        self.calls.append(Call(op, dict(zip(op.inputs, inputs)), dict(outputs), dict(constants)))

    def enter(self, module: Any) -> None:
        pass

    def leave(self) -> None:
        pass


@dataclass(frozen=True)
class Walk:
    """One walk through the function: its inputs and results by name, and its calls."""

    inputs: dict[str, np.ndarray]
    results: dict[str, np.ndarray]
    calls: list[Call]


def walk(function: Callable[..., dict[str, Tensor]], inputs: dict[str, np.ndarray]) -> Walk:
    """The calls of `function(**inputs)`, whose arguments are tensors, without running them."""
    recorder = Recorder()
    with trace(recorder):
        results = function(**{name: Tensor(array) for name, array in inputs.items()})
    return Walk(inputs, {name: tensor.data for name, tensor in results.items()}, recorder.calls)


class Graph:
    """The nodes and constants so far. The methods take and return names of values.

    first, second: walks through the same function for batches of two sizes. names: of the parameters, by their address. in_8_bits: weights
    of products are stored in 8 bits (`io/int8.py`).
    """

    def __init__(self, first: Walk, second: Walk, names: Mapping[int, str] | None = None, in_8_bits: bool = False) -> None:
        if [call.op.name for call in first.calls] != [call.op.name for call in second.calls]:
            raise UserError("the model computes batches of different sizes by different ops, which has no ONNX form")
        self.first, self.second, self.in_8_bits = first, second, in_8_bits
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self._parameter_names = names or {}
        self._used_names: set[str] = set()
        self._stored: dict[Any, str] = {}  # key of a constant -> its name
        self._values: dict[tuple[int, Shape], str] = {}  # (address, shape) -> name
        self._origins: dict[int, tuple[str, Shape]] = {}  # address -> name and shape of what was computed there
        self._pending: dict[int, Callable[[], str]] = {}  # address -> how to compute what nobody may need (`defer`)
        self.deferred: dict[int, Call] = {}  # address -> its call
        self._other_shapes: dict[tuple[int, Shape], Shape] = {}  # (address, shape) of an array in the first walk -> shape in the second
        self._batches = [(*next(iter(each.inputs.values())).shape, 1)[0] for each in (first, second)]
        self._pair(first.inputs, second.inputs)
        self._pair(first.results, second.results)
        self._used_names |= {*first.inputs, *first.results}
        self._inputs = [self._described(name, array, second.inputs[name]) for name, array in first.inputs.items()]
        for name, array in first.inputs.items():
            self.define(array, name)
        for ours, theirs in zip(first.calls, second.calls):
            self._pair(ours.inputs, theirs.inputs)
            self._pair(ours.outputs, theirs.outputs)

    def _pair(self, ours: Mapping[str, np.ndarray | None], theirs: Mapping[str, np.ndarray | None]) -> None:
        for name, array in ours.items():
            other = theirs[name]
            if array is not None and other is not None:
                self._other_shapes[address_of(array), array.shape] = other.shape

    # ------------------------------------------------------------------------------------------------------------------- values
    def is_constant(self, array: np.ndarray) -> bool:
        """Whether nothing of the inputs is in it."""
        return address_of(array) not in self._origins and address_of(array) not in self._pending

    def define(self, array: np.ndarray, name: str) -> None:
        """From now on this value stands for the array, and for its views of other shapes."""
        address = address_of(array)
        self._pending.pop(address, None)
        self._origins[address] = name, array.shape
        self._values[address, array.shape] = name

    def defer(self, call: Call, array: np.ndarray, compute: Callable[[], str]) -> None:
        """The array is computed only if a later call asks for its value; one that does without finds the call in `deferred`."""
        self._pending[address_of(array)] = compute
        self.deferred[address_of(array)] = call

    def value(self, array: np.ndarray) -> str:
        """The value that stands for an array."""
        address = address_of(array)
        if address in self._pending:
            call, compute = self.deferred[address], self._pending.pop(address)
            (y,) = call.outputs.values()
            assert y is not None
            self.define(y, compute())
        if address not in self._origins:
            return self.constant(array, self._parameter_names.get(address, "constant"))
        if (address, array.shape) not in self._values:
            name, _ = self._origins[address]
            self._values[address, array.shape] = self.add("Reshape", name, self.sizes(array.shape, self.other_shape(array)))
        return self._values[address, array.shape]

    def other_shape(self, array: np.ndarray) -> Shape:
        """The shape of an array in the second walk."""
        return self._other_shapes[address_of(array), array.shape]

    def sizes(self, shape: Shape, other: Shape) -> str:
        """A shape as an argument of Reshape, in which the length that belongs to the batch is left open."""
        if sum(a != b for a, b in zip(shape, other)) > 1:
            return self.lengths(shape, other)
        return self.constant(np.array([a if a == b else -1 for a, b in zip(shape, other)], np.int64), "shape")

    def lengths(self, shape: Shape, other: Shape) -> str:
        """A shape as a vector of numbers, with multiples of the batch where it differs in the second walk."""
        if shape == other:
            return self.constant(np.array(shape, np.int64), "shape")
        first = next(iter(self.first.inputs))
        batch = self.add("Slice", self.add("Shape", first), *(self.constant(np.array([n], np.int64), "axis") for n in (0, 1)))
        parts = []
        for a, b in zip(shape, other):
            times = a // self._batches[0]
            if a == b:
                parts.append(self.constant(np.array([a], np.int64), "length"))
            elif (times * self._batches[0], times * self._batches[1]) != (a, b):
                raise UserError(f"the model makes {a} rows of {self._batches[0]} images and {b} of {self._batches[1]}: no ONNX form")
            else:
                parts.append(batch if times == 1 else self.add("Mul", batch, self.constant(np.array([times], np.int64), "times")))
        return self.add("Concat", *parts, axis=0)

    def unique(self, name: str) -> str:
        """The name, with a number after it if it is in use."""
        found, number = name, 1
        while found in self._used_names:
            found, number = f"{name}_{number}", number + 1
        self._used_names.add(found)
        return found

    # ---------------------------------------------------------------------------------------------------------- constants, nodes
    def constant(self, array: Any, name: str = "constant") -> str:
        """A constant; floating-point numbers are stored as float32."""
        array = _in_float32(np.asarray(array))
        key = blake2b(array.tobytes()).digest(), array.shape, array.dtype.str
        if key not in self._stored:
            self._stored[key] = self._store(array, name)
        return self._stored[key]

    def weight(self, array: np.ndarray, transposed: bool = False, exact: bool = False, shape: Shape | None = None) -> str:
        """The weights (O, ...) of a product, as a matrix (O, K), as (K, O) if transposed, or in another shape (O, ...).

        In 8 bits unless `exact`, where they are constant: with one scale for each output.
        """
        matrix = array.reshape(shape or (len(array), -1))
        if not self.is_constant(array):
            name = self.value(array)
            name = self.add("Reshape", name, self.constant(np.array(matrix.shape, np.int64), "shape"))
            return self.add("Transpose", name, perm=[1, 0]) if transposed else name
        key = address_of(array), matrix.shape, transposed, exact
        if key not in self._stored:
            name = self._parameter_names.get(address_of(array), "weight")
            rows = rounded_rows(_in_float32(matrix)) if self.in_8_bits and not exact else None
            values, scale = rows or (matrix, None)
            stored = self._store(_in_float32(values.T if transposed else values), name)
            if scale is not None:  # not DequantizeLinear, which ONNX Runtime joins with a product that rounds activations too
                factors = scale if transposed else scale.reshape(-1, *[1] * (matrix.ndim - 1))
                stored = self.add("Mul", self.add("Cast", stored, to=TensorProto.FLOAT), self._store(factors, f"{name}.scale"))
            self._stored[key] = stored
        return self._stored[key]

    def _store(self, array: np.ndarray, name: str) -> str:
        name = self.unique(name)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def add(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """Add a node; returns the name of its result, or a list of names."""
        names = [self.unique(kind.lower()) for _ in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    # ------------------------------------------------------------------------------------------------------------ inputs, results
    def take_pixels(self, name: str, mean: Sequence[float], std: Sequence[float]) -> None:
        """Let an input be pixels, uint8 (B, H, W, C), which the graph makes the normalised images (B, C, H, W) that it was."""
        images = self.first.inputs[name]
        _, C, H, W = images.shape
        position = [*self.first.inputs].index(name)
        self._inputs[position] = helper.make_tensor_value_info(name, TensorProto.UINT8, ["batch", H, W, C])
        factor = 1 / (255 * np.array(std, np.float64))
        x = self.add("Mul", self.add("Cast", name, to=TensorProto.FLOAT), self.constant(factor, "1/(255·std)"))
        x = self.add("Sub", x, self.constant(np.array(mean) / np.array(std), "mean/std"))
        self.define(images, self.add("Transpose", x, perm=[0, 3, 1, 2]))

    def _described(self, name: str, array: np.ndarray, other: np.ndarray) -> onnx.ValueInfoProto:
        """What the file says of an input or a result: its type, and its lengths, with a name for those that the batch decides."""
        times = [a // self._batches[0] for a in array.shape]
        lengths = [a if a == b else "batch" if k == 1 else f"{k}*batch" for a, b, k in zip(array.shape, other.shape, times)]
        kind = TensorProto.FLOAT if array.dtype.kind == "f" else helper.np_dtype_to_tensor_dtype(array.dtype)
        return helper.make_tensor_value_info(name, kind, lengths)

    def model(self, metadata: Mapping[str, str], documentation: str = "") -> onnx.ModelProto:
        """The complete model."""
        for name, array in self.first.results.items():
            self.nodes.append(helper.make_node("Identity", [self.value(array)], [name]))
        results = [self._described(name, array, self.second.results[name]) for name, array in self.first.results.items()]
        graph = helper.make_graph(self.nodes, "minivit", self._inputs, results, self.initializers, doc_string=documentation)
        # Readers refuse a file of a newer version than they know, so it is the one that came with the opset.
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=helper.find_min_ir_version_for(opsets), producer_name="minivit")
        helper.set_model_props(model, dict(metadata))
        return model


def _in_float32(array: np.ndarray) -> np.ndarray:
    """The array as it is stored: floating-point numbers as float32."""
    return np.asarray(array, array.dtype if array.dtype.kind in "iub" else np.float32, order="C")
