"""Tensor and tape: the graph of computations, and the backward pass through it.

A node is one executed op: its inputs, its constants and the arrays that its backward reads. `backward` visits nodes in descending order of
creation, hence without recursion; ops write each gradient directly to its destination, gradients of the same tensor are accumulated, and
saved arrays are freed after use.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import count
from math import prod
from typing import Any

import numpy as np

from .errors import UserError
from .grad_mode import current_tracer, is_grad_enabled
from .indexing import picked
from .kernels import OPS, primitives
from .kernels.core.arrays import array_on, as_array, constant, empty, empty_like, to_device, to_numpy
from .kernels.core.devices import address_of, device_of, is_array, runtime
from .kernels.core.dlpack import from_capsule, to_capsule
from .kernels.core.dtypes import BFLOAT16, is_floating
from .kernels.core.op import Op
from .kernels.core.recording import View, current_recording

FLOAT32, FLOAT64 = np.dtype(np.float32), np.dtype(np.float64)
DTYPES = {FLOAT32}, {FLOAT64}, {BFLOAT16}, {BFLOAT16, FLOAT32}  # the allowed sets of dtypes of an op's floating-point inputs
_numbers = count()


class Node:
    """An executed op (or a reshape, if `op` is None)."""

    __slots__ = ("constants", "inputs", "number", "op", "results", "saved")

    def __init__(
        self, op: Op | None, inputs: tuple[Any, ...], constants: tuple[Any, ...] = (), saved: tuple[Any, ...] = (), results: int = 1
    ) -> None:
        self.op, self.inputs, self.constants, self.saved, self.results = op, inputs, constants, saved, results
        self.number = next(_numbers)


def _operators(name: str) -> tuple[Callable[[Tensor, Any], Tensor], Callable[[Tensor, Any], Tensor]]:
    """The operator of an op of two tensors, and the one for a tensor on the right."""
    return lambda self, other: elementwise(name, self, other), lambda self, other: elementwise(name, other, self)


def _comparison(function: Callable[[Any, Any], Any]) -> Callable[[Tensor, Any], Any]:
    """An operator whose result is NumPy's, an array of bools, which has no gradient and may be an index."""
    return lambda self, other: function(self.numpy(), _as_numpy(other))


class Tensor:
    """An array that records how it was computed.

    data: a C-contiguous array of float32, float64 or bfloat16: a NumPy array on the CPU (any array-like is accepted; integers are converted
        to float32), a CuPy array on a GPU, of which a contiguous one must be ready (its kernels have run) and others are copied.
    requires_grad: whether `backward` stores a gradient in `.grad`, a Tensor of the same shape (None before).
    Comparisons are NumPy's and return arrays of bools. NumPy's arithmetic functions of tensors are the operators; other NumPy functions
    accept tensors that require no gradient, and return arrays. Raises TypeError for data that are not real numbers, and if a NumPy function
    would lose a gradient.
    """

    __slots__ = ("__weakref__", "bf16_copy", "data", "grad", "grad_home", "node", "requires_grad", "result")

    def __init__(self, data: Any, requires_grad: bool = False) -> None:
        array = data.data if isinstance(data, Tensor) else as_array(data)
        if device_of(array) == "cpu":
            array = np.asarray(array, _dtype_of_data(array.dtype), order="C")
        elif not runtime().accepts(array):
            array = primitives("cuda").contiguous(array)
        self.data: Any = array
        self.requires_grad = requires_grad
        self.grad: Tensor | None = None
        self.grad_home: np.ndarray | None = None  # the array that a leaf's gradient must be written to (a view of a flat buffer)
        self.bf16_copy: Any = None  # a parameter's data in bfloat16, while its optimizer keeps such a copy up to date
        self.node: Node | None = None  # None for a leaf
        self.result = 0  # the index of this tensor among the node's results

    def __getstate__(self) -> tuple[np.ndarray, bool, Any]:
        """What a pickle or a copy holds: the values and the gradient, on the CPU; not the tape."""
        return np.array(self.numpy()), self.requires_grad, None if self.grad is None else np.array(self.grad.numpy())

    def __setstate__(self, state: tuple[np.ndarray, bool, Any]) -> None:
        values, requires_grad, gradient = state
        Tensor.__init__(self, values, requires_grad)
        self.grad = None if gradient is None else Tensor(gradient)

    # ------------------------------------------------------------------------------------------------------------- as an array
    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def device(self) -> str:
        """The device of the data: "cpu" or "cuda"."""
        return device_of(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))  # of a number: NumPy's TypeError

    def numpy(self) -> np.ndarray:
        """The data as a NumPy array: shared with the tensor on the CPU, a copy from a GPU.

        Raises UserError while a step is recorded, if it is the step that computes them.
        """
        self._check_known()
        return to_numpy(self.data)

    def _check_known(self) -> None:
        recording = current_recording()
        if recording is not None and isinstance(recording.describe(self.data), View):
            raise UserError(
                "the values of a tensor are not known while a step is recorded: compute with minivit's functions, or use "
                "Trainer(model, plan=False)"
            )

    def to(self, device: str) -> Tensor:
        """The same data on "cpu" or "cuda", detached from the tape."""
        return Tensor(to_device(self.data, device))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.requires_grad:
            raise TypeError("an array of a Tensor that requires a gradient would lose the gradient: take x.detach().numpy()")
        return np.array(self.numpy(), dtype=dtype, copy=copy)

    def __array_ufunc__(self, function: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        op = UFUNCS.get(function)
        if op is not None and method == "__call__" and not options:
            return op(*inputs)
        gives_bools = any(kind in ("d->?", "dd->?") for kind in function.types)  # a comparison, or isnan: bools have no gradient
        values = _as_numpy if gives_bools else partial(_value_for, function)
        return getattr(function, method)(*map(values, inputs), **options)

    def __array_function__(self, function: Any, types: Any, arguments: tuple, options: dict) -> Any:
        values = partial(_value_for, function)
        return function(*_mapped(values, arguments), **_mapped(values, options))

    def __dlpack__(self, **options: Any) -> Any:
        if self.requires_grad:
            raise BufferError("an array of another library would lose the gradient: take x.detach()")
        self._check_known()
        return to_capsule(self.data, **options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.data.__dlpack_device__()

    def item(self) -> float:
        """The value of a tensor with one element as a Python float."""
        return float(self.numpy().item())

    def __float__(self) -> float:
        return self.item()

    def detach(self) -> Tensor:
        """The same data, detached from the tape."""
        return Tensor(self.data)

    def __repr__(self) -> str:
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"Tensor({np.array2string(self.numpy(), separator=', ', prefix='Tensor(')}, dtype={self.dtype}{grad})"

    # -------------------------------------------------------------------------------------------------------------- arithmetic
    def _as_tensor(self, value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else Tensor(constant(np.asarray(value, self.dtype), self.device))

    __add__, __radd__ = _operators("add")
    __sub__, __rsub__ = _operators("subtract")
    __mul__, __rmul__ = _operators("multiply")
    __truediv__, __rtruediv__ = _operators("divide")
    __pow__, __rpow__ = _operators("power")
    __lt__, __le__, __gt__, __ge__ = map(_comparison, (operator.lt, operator.le, operator.gt, operator.ge))
    __eq__, __ne__ = map(_comparison, (operator.eq, operator.ne))  # type: ignore[assignment]
    __hash__ = object.__hash__  # a tensor is itself alone, in sets and dicts

    def __bool__(self) -> bool:
        """Of a tensor with one element; raises NumPy's ValueError for another."""
        return bool(self.numpy())

    def __neg__(self) -> Tensor:
        return self * -1.0

    def __abs__(self) -> Tensor:
        return elementwise("absolute", self)

    def __matmul__(self, other: Any) -> Tensor:
        a, b = self, self._as_tensor(other)
        if not (a.ndim and b.ndim):
            raise ValueError(f"matmul: shapes {a.shape} and {b.shape}: a number is no matrix, multiply by *")
        if a.ndim > 1 and b.ndim > 1:
            return apply(OPS["matmul"], a, b)
        if a.ndim == 1 and b.ndim > 2:
            raise ValueError(f"matmul: shapes {a.shape} and {b.shape}: a vector takes a matrix, not a batch of them")
        shape = a.shape[:-1] + (b.shape[-1:] if b.ndim > 1 else ())  # NumPy's: a vector is a row on the left, a column on the right
        rows, columns = a.reshape(1, -1) if a.ndim == 1 else a, b.reshape(-1, 1) if b.ndim == 1 else b
        return apply(OPS["matmul"], rows, columns).reshape(shape)

    def __rmatmul__(self, other: Any) -> Tensor:
        return self._as_tensor(other) @ self

    # ------------------------------------------------------------------------------------------------------------------- shape
    def reshape(self, *shape: Any) -> Tensor:
        """The same elements with a new shape; one dimension may be -1."""
        new_shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], (int, np.integer)) else shape
        out = Tensor(self.data.reshape(new_shape))
        if self.bf16_copy is not None:
            out.bf16_copy = self.bf16_copy.reshape(new_shape)
        if is_grad_enabled() and self.requires_grad:
            out.requires_grad, out.node = True, Node(None, (self,))
        return out

    def transpose(self, *order: Any) -> Tensor:
        """A copy with permuted axes; without arguments, their order is reversed. Raises ValueError if the order is not a permutation."""
        axes = order[0] if len(order) == 1 and isinstance(order[0], Sequence) else order
        axes = tuple(axis_in(a, self.ndim) for a in axes) if order else tuple(range(self.ndim))[::-1]
        if sorted(axes) != list(range(self.ndim)):
            raise ValueError(f"transpose: {order} is no permutation of the {self.ndim} axes of shape {self.shape}")
        return apply(OPS["permute"], self, order=axes)

    @property
    def T(self) -> Tensor:
        return self.transpose()

    def _axes(self, axis: int | Sequence[int] | None) -> tuple[int, ...]:
        axes = range(self.ndim) if axis is None else axis if isinstance(axis, Sequence) else (axis,)
        ndim = self.ndim if isinstance(axis, Sequence) else max(self.ndim, 1)  # NumPy takes axis 0 of a number, too
        wanted = [axis_in(a, ndim) for a in axes]
        if len(set(wanted)) < len(wanted):
            raise ValueError(f"duplicate value in 'axis': {axis}")
        return tuple(sorted(wanted)) if self.ndim else ()

    def sum(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        return apply(OPS["reduce_sum"], self, axes=self._axes(axis), keepdims=keepdims)

    def mean(self, axis: int | Sequence[int] | None = None, keepdims: bool = False) -> Tensor:
        axes = self._axes(axis)
        elements = max(1, prod(self.shape[a] for a in axes))  # of no elements nothing is computed
        return apply(OPS["reduce_sum"], self, axes=axes, keepdims=keepdims, scale=1.0 / elements)

    def __getitem__(self, key: Any) -> Tensor:
        """As NumPy's, by integers, slices, `...`, None, and arrays of integers or of bools; returns a copy.

        The gradients of an element that is picked several times are summed.
        """
        shape, bounds, order, sizes, rows = picked(key, self.shape)
        if rows is not None and 0 in shape:
            return self.reshape(-1)[:0].reshape(shape)
        x = self
        if bounds is not None and self.ndim:
            x = apply(OPS["slice"], x, **dict(zip(("start", "stop", "step"), bounds)))
        if rows is not None:
            x = x if order is None else x.transpose(order)
            x = apply(OPS["take"], x.reshape(sizes), constant(rows, self.device))
        return x.reshape(shape)

    # ---------------------------------------------------------------------------------------------------------------- backward
    def backward(self, gradient: Any = None) -> None:
        """Accumulate the gradient of this tensor (weighted by `gradient`, of its shape) into `.grad` of every leaf that requires one.

        `gradient` may be omitted for a tensor with one element. Raises RuntimeError if nothing requires a gradient, or for a second
        backward pass through the same nodes.
        """
        if not self.requires_grad:
            raise RuntimeError("backward: this tensor depends on nothing that requires a gradient")
        if gradient is None:
            if self.size != 1:
                raise RuntimeError(f"backward: a tensor of shape {self.shape} needs a gradient of that shape")
            gradient = np.ones(self.shape, self.dtype)
        seed = gradient if isinstance(gradient, Tensor) else Tensor(constant(np.asarray(gradient, self.dtype), self.device))
        if seed.shape != self.shape:
            raise RuntimeError(f"backward: the gradient has shape {seed.shape}, the tensor {self.shape}")
        _backpropagate(self, seed.data)


def from_dlpack(x: Any, /, *, copy: bool | None = None) -> Tensor:
    """A tensor that shares the memory of an array of NumPy, CuPy, PyTorch, JAX or any other library with `__dlpack__`, on a CPU or GPU.

    Shared are C-contiguous arrays of float32, float64 and bfloat16, also read-only ones: minivit's functions write to none. Others are
    converted, and the tensor has a copy. copy: True for a copy in any case, False for a BufferError where one is needed. In the other
    direction `numpy.from_dlpack(tensor)`, `torch.from_dlpack(tensor)` and the like share the memory of the tensor; JAX copies what does
    not begin at a multiple of 64 bytes; results of minivit's functions begin at one.

    Raises TypeError for what has no `__dlpack__` and for numbers that are not real; BufferError for another device, and for an array that
    requires a gradient.
    """
    array = from_capsule(x)
    dtype = _dtype_of_data(array.dtype)
    if device_of(array) == "cpu":
        data = np.array(array, dtype, order="C") if copy else np.asarray(array, dtype, order="C")
    else:
        data = array_on("cuda", to_numpy(array).astype(dtype)) if copy or array.dtype != dtype else array
    if copy is False and not (array.dtype == dtype and address_of(data) == address_of(array)):
        raise BufferError(f"an array of {array.dtype} in this order cannot be shared: leave copy=False out, and it is copied")
    return Tensor(data)


def elementwise(name: str, *values: Any) -> Tensor:
    """An op of tensors, arrays and numbers: what is no Tensor is made one with the dtype and on the device of the first tensor or array."""
    tensors = [value for value in values if isinstance(value, Tensor)]
    like = tensors[0] if tensors else Tensor(next((value for value in values if hasattr(value, "dtype")), values[0]))
    return apply(OPS[name], *map(like._as_tensor, values))


WITHOUT_GRADIENT = "take x.detach().numpy(), or the operators and functions of minivit"
SAME = "add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "exp", "log", "sqrt", "absolute", "tanh"  # as NumPy's
UFUNCS: dict[np.ufunc, Callable[..., Tensor]] = {getattr(np, name): partial(elementwise, name) for name in SAME} | {
    np.negative: lambda a: -a,
    np.positive: lambda a: a,
    np.square: lambda a: a * a,
    np.matmul: lambda a, b: a @ b if isinstance(a, Tensor) else b.__rmatmul__(a),
}


def _dtype_of_data(dtype: np.dtype) -> np.dtype:
    """The dtype that a Tensor keeps an array of numbers in."""
    if dtype in (FLOAT32, FLOAT64, BFLOAT16):
        return dtype
    if dtype.kind not in "biuf":
        raise TypeError(f"a Tensor holds real numbers, not {dtype}")
    return FLOAT64 if dtype.kind == "f" and dtype.itemsize >= 8 else FLOAT32


def axis_in(axis: Any, ndim: int) -> int:
    """The axis, counted from 0, of an array with so many. Raises NumPy's AxisError (an IndexError and ValueError) where there is none."""
    if isinstance(axis, bool):
        raise TypeError("an axis must be a whole number, not a bool")
    number = operator.index(axis)
    if not -ndim <= number < ndim:
        raise np.exceptions.AxisError(number, ndim)
    return number % ndim


def _as_numpy(value: Any) -> Any:
    return value.numpy() if isinstance(value, Tensor) else value


def _value_for(function: Any, value: Any) -> Any:
    """An argument of a function of NumPy's that knows no tensors. Raises TypeError if the function would lose a gradient."""
    if _requires_grad(value):
        raise TypeError(f"numpy.{function.__name__} of a Tensor that requires a gradient would lose it: {WITHOUT_GRADIENT}")
    return _as_numpy(value)


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """The same arguments, in lists, tuples and dicts of any depth, with every leaf changed."""
    if isinstance(value, (list, tuple)):
        return type(value)(_mapped(change, each) for each in value)
    return {name: _mapped(change, each) for name, each in value.items()} if isinstance(value, dict) else change(value)


def apply(op: Op, *inputs: Tensor | np.ndarray | None, **constants: Any) -> Any:
    """Run an op. Returns its result as a Tensor, or a tuple of Tensors (None if absent) if the op has several results, or detached ones."""
    arrays = [t.data if isinstance(t, Tensor) else t for t in inputs]
    for i, (name, t) in enumerate(zip(op.inputs, inputs)):
        if name in op.bf16_parameters and isinstance(t, Tensor) and t.bf16_copy is not None:
            arrays[i] = t.bf16_copy
    for name, a in zip(op.inputs, arrays):
        if a is not None and not is_array(a):
            raise TypeError(f"{op.name}: {name} must be a Tensor or an array, not {type(a).__name__}")
    dtypes = {a.dtype for a in arrays if a is not None and is_floating(a.dtype)}
    devices = {device_of(a) for a in arrays if a is not None}
    if len(devices) > 1:
        raise TypeError(f"{op.name}: the inputs lie on cpu and cuda: move them with .to()")
    if dtypes not in DTYPES:
        raise TypeError(
            f"{op.name}: the inputs must all be float32, all float64 or all bfloat16, not {', '.join(map(str, dtypes)) or 'integers'}"
        )
    constants = op.complete(constants)
    device = devices.pop()
    recorded = op.backward and is_grad_enabled() and any(_requires_grad(t) for n, t in zip(op.inputs, inputs) if n in op.differentiable)
    absent = () if recorded else op.backward_only
    outputs = {n: None if a is None or n in absent else empty(a.shape, a.dtype, device) for n, a in op.describe(arrays, constants).items()}
    tracer = current_tracer()
    if tracer is None:
        op.run("forward", (*outputs.values(), *arrays, *constants.values()), arrays, constants.values())
    else:
        tracer.op(op, arrays, outputs, constants)
    results = [None if outputs[n] is None else Tensor(outputs[n]) for n in (*op.results, *op.detached)]
    if recorded:
        array_by_name = outputs | dict(zip(op.inputs, arrays))
        node = Node(op, inputs, tuple(constants.values()), tuple(array_by_name[n] for n in op.saves), len(op.results))
        for i, result in enumerate(results[: len(op.results)]):
            if result is not None:
                result.requires_grad, result.node, result.result = True, node, i
    return results[0] if len(results) == 1 else tuple(results)


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Gradients:
    """The gradients accumulated so far in one backward pass, by node; a heap returns the newest node first."""

    def __init__(self) -> None:
        self.by_node: dict[Node, list[np.ndarray | None]] = {}
        self.heap: list[tuple[int, Node]] = []

    def accumulated(self, tensor: Tensor) -> np.ndarray | None:
        """The gradient accumulated so far for a tensor; for a leaf, including earlier backward passes."""
        if tensor.node is None:
            return None if tensor.grad is None else tensor.grad.data
        return self.by_node[tensor.node][tensor.result] if tensor.node in self.by_node else None

    def set(self, tensor: Tensor, gradient: np.ndarray) -> None:
        node = tensor.node
        if node is None:
            tensor.grad = Tensor(gradient)
            return
        if node not in self.by_node:
            self.by_node[node] = [None] * node.results
            heapq.heappush(self.heap, (-node.number, node))
        self.by_node[node][tensor.result] = gradient

    def add(self, tensor: Tensor, gradient: np.ndarray, exclusive: bool = False) -> None:
        """exclusive: no other reference to the array exists."""
        if tensor.node is None:
            _add_to_leaf(tensor, gradient, exclusive)
        else:
            previous = self.accumulated(tensor)
            self.set(tensor, gradient if previous is None else _sum(previous, gradient))

    def pop(self) -> tuple[Node, list[np.ndarray | None]]:
        node = heapq.heappop(self.heap)[1]
        return node, self.by_node.pop(node)


def _sum(a: np.ndarray, b: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    out = empty_like(a) if out is None else out
    OPS["add"].run("forward", (out, a, b), (a, b), (), "backward")
    return out


def _add_to_leaf(leaf: Tensor, gradient: np.ndarray, exclusive: bool) -> None:
    home = leaf.grad_home
    if leaf.grad is not None:
        leaf.grad = Tensor(_sum(leaf.grad.data, gradient, home))
    elif gradient is home or (home is None and exclusive):
        leaf.grad = Tensor(gradient)
    else:
        copy = empty_like(gradient) if home is None else home
        OPS["broadcast"].run("forward", (copy, gradient, gradient.shape), (gradient,), (gradient.shape,), "backward")
        leaf.grad = Tensor(copy)


def _backpropagate(root: Tensor, seed: np.ndarray) -> None:
    gradients = _Gradients()
    gradients.add(root, seed)
    while gradients.heap:
        node, output_gradients = gradients.pop()
        if not node.inputs:
            raise RuntimeError("backward a second time through the same nodes: what they saved is freed")
        if node.op is None:
            source, gradient = node.inputs[0], output_gradients[0]
            assert gradient is not None
            gradients.add(source, gradient.reshape(source.shape))
        else:
            _run_backward(node, output_gradients, gradients)
        node.inputs = node.saved = ()


def _run_backward(node: Node, output_gradients: list[np.ndarray | None], gradients: _Gradients) -> None:
    op, saved = node.op, node.saved
    assert op is not None and op.backward is not None
    sources = dict(zip(op.inputs, node.inputs))
    required = [n for n in op.differentiable if _requires_grad(sources[n])]
    computed: dict[str, np.ndarray | None] = {n: None for n in op.differentiable if n not in op.gradient_aliases}
    shared = {op.gradient_aliases[n][1:] for n in required if n in op.gradient_aliases}
    used_once = {n for n in required if sum(t is sources[n] for t in node.inputs) == 1}
    sums = {n: gradients.accumulated(sources[n]) if n in used_once else None for n in op.accumulates}
    for n in computed:
        if n in required or n in shared:
            tensor = sources[n]
            fresh = n not in shared and tensor.grad is None
            in_place = tensor.node is None and tensor.grad_home is not None and n in used_once and (fresh or sums.get(n) is not None)
            computed[n] = tensor.grad_home if in_place else empty_like(tensor.data)
    op.run("backward", (*computed.values(), *output_gradients, *sums.values(), *saved, *node.constants), node.inputs, node.constants)
    gradient_by_name = {"d" + n: a for n, a in (computed | dict(zip(op.results, output_gradients))).items()}
    for n in required:
        gradient = gradient_by_name[op.gradient_aliases.get(n, "d" + n)]
        if gradient is None:
            continue
        if sums.get(n) is None:
            gradients.add(sources[n], gradient, exclusive=n not in op.gradient_aliases and n not in shared)
        else:
            gradients.set(sources[n], gradient)
