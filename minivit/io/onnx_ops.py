"""Each op of a forward as nodes of ONNX: one table, with an entry for each op that is not for training alone.

An entry takes the graph so far and the call, adds nodes, and returns the value of the op's result, or of several by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import pi, prod
from typing import Any

import numpy as np

from ..errors import UserError
from ..kernels.performer import EPSILON
from ..kernels.resample import matrices
from .onnx_graph import LAST, Call, Graph

Result = str | Mapping[str, str]
Translation = Callable[[Graph, Call, Call], Result | None]  # graph, the call in the first walk, and in the second; None: deferred


def translate(graph: Graph) -> None:
    """Add all calls of the graph's walks. Raises UserError for what has no ONNX form."""
    for call, other in zip(graph.first.calls, graph.second.calls):
        inputs = [a for a in call.inputs.values() if a is not None]
        outputs = {name: a for name, a in call.outputs.items() if a is not None}
        if all(map(graph.is_constant, inputs)) and all(graph.other_shape(a) == a.shape for a in outputs.values()):
            call.op.forward.reference(*call.outputs.values(), *call.inputs.values(), *call.constants.values())
            continue
        result = translation_of(call.op.name)(graph, call, other)
        if result is not None:
            for name, value in (result if isinstance(result, Mapping) else {next(iter(outputs)): result}).items():
                if outputs.get(name) is not None:
                    graph.define(outputs[name], value)


def translation_of(name: str) -> Translation:
    """The entry for an op; those of any number of parts share one. Raises UserError if there is none."""
    found = TRANSLATIONS.get(name) or TRANSLATIONS.get(name.rstrip("_0123456789"))
    if found is None:
        raise UserError(f"the op {name} has no ONNX form: it is for training, or minivit/io/onnx_ops.py lacks an entry for it")
    return found


# -------------------------------------------------------------------------------------------------------------------------- parts
def _numbers(graph: Graph, *numbers: int) -> str:
    return graph.constant(np.array(numbers, np.int64), "axes")


def _input(graph: Graph, call: Call, name: str) -> str:
    array = call.inputs[name]
    assert array is not None
    return graph.value(array)


def _added(graph: Graph, x: str, *terms: str | None) -> str:
    for term in terms:
        x = x if term is None else graph.add("Add", x, term)
    return x


def _optional(graph: Graph, call: Call, name: str, shape: tuple[int, ...] | None = None) -> str | None:
    array = call.inputs[name]
    if array is None:
        return None
    if shape is None:
        return graph.value(array)
    if graph.is_constant(array):
        return graph.constant(np.ascontiguousarray(array).reshape(shape), "bias")
    return graph.add("Reshape", graph.value(array), _numbers(graph, *shape))


def _activated(graph: Graph, x: str, activation: str) -> str:
    if activation in ("gelu", "gelu_tanh"):
        return _gelu_of(graph, x, "tanh" if activation == "gelu_tanh" else "none")
    return x if activation == "none" else ACTIVATIONS[activation](graph, x)


def _gelu_of(graph: Graph, x: str, approximate: str) -> str:
    if approximate == "tanh":
        cube = graph.add("Mul", graph.add("Mul", graph.add("Mul", x, x), x), graph.constant(0.044715))
        inner = graph.add("Tanh", graph.add("Mul", graph.add("Add", x, cube), graph.constant((2 / pi) ** 0.5)))
    else:
        inner = graph.add("Erf", graph.add("Div", x, graph.constant(2**0.5)))
    return graph.add("Mul", graph.add("Mul", x, graph.add("Add", inner, graph.constant(1.0))), graph.constant(0.5))


def _relu6_of(graph: Graph, x: str) -> str:
    return graph.add("Clip", x, graph.constant(0.0), graph.constant(6.0))


ACTIVATIONS: dict[str, Callable[[Graph, str], str]] = {
    "relu": lambda graph, x: graph.add("Relu", x),
    "relu6": _relu6_of,
    "hardswish": lambda graph, x: graph.add("HardSwish", x),
}


def _part(graph: Graph, packed: str, i: int, axis: int) -> str:
    return graph.add("Gather", packed, graph.constant(np.array(i, np.int64), "index"), axis=axis)


# ----------------------------------------------------------------------------------------------------------------------- products
def _linear(graph: Graph, call: Call, other: Call) -> str:
    x, weight = call.inputs["x"], call.inputs["weight"]
    assert x is not None and weight is not None
    exact = call.constants["precise"]  # the head
    unfolded = graph.deferred.get(x.ctypes.data)
    if unfolded is not None and graph.is_constant(weight):
        y = _convolution(graph, unfolded, weight, call)
    else:
        y = graph.add("MatMul", graph.value(x), graph.weight(weight, transposed=True, exact=exact))
    y = _added(graph, y, _optional(graph, call, "bias"))
    return _added(graph, _activated(graph, y, call.constants["activation"]), _optional(graph, call, "residual"))


def _convolution(graph: Graph, unfold: Call, weight: np.ndarray, call: Call) -> str:
    """A product with patches as the convolution that it is: the patches are not stored."""
    constants, (rows, columns) = unfold.constants, unfold.constants["kernel"]
    images = _input(graph, unfold, "images")
    if constants["channels_last"]:
        images = graph.add("Transpose", images, perm=[0, 3, 1, 2])
    kernel = graph.weight(weight, shape=(len(weight), weight.shape[1] // (rows * columns), rows, columns))
    padding = [*constants["padding"]] * 2
    y = graph.add("Conv", images, kernel, kernel_shape=[rows, columns], strides=[*constants["stride"]], pads=padding)
    y = graph.add("Transpose", y, perm=[0, 2, 3, 1])  # (B, U, V, O)
    result = call.outputs["y"]
    assert result is not None
    return y if result.ndim == 4 else graph.add("Reshape", y, graph.sizes(result.shape, graph.other_shape(result)))


def _matmul(graph: Graph, call: Call, other: Call) -> str:
    return graph.add("MatMul", _input(graph, call, "a"), _input(graph, call, "b"))


def _channel_mixing(graph: Graph, call: Call, other: Call) -> str:
    w1, w2 = call.inputs["w1"], call.inputs["w2"]
    assert w1 is not None and w2 is not None
    hidden = _added(graph, graph.add("MatMul", _input(graph, call, "x"), graph.weight(w1, transposed=True)), _optional(graph, call, "b1"))
    y = graph.add("MatMul", _gelu_of(graph, hidden, call.constants["approximate"]), graph.weight(w2, transposed=True))
    return _added(graph, y, _optional(graph, call, "b2"), _optional(graph, call, "residual"))


def _token_mixing(graph: Graph, call: Call, other: Call) -> str:
    w1, w2 = call.inputs["w1"], call.inputs["w2"]
    assert w1 is not None and w2 is not None
    hidden = _added(graph, graph.add("MatMul", graph.weight(w1), _input(graph, call, "x")), _optional(graph, call, "b1", (len(w1), 1)))
    y = graph.add("MatMul", graph.weight(w2), _gelu_of(graph, hidden, call.constants["approximate"]))
    return _added(graph, y, _optional(graph, call, "b2", (len(w2), 1)), _optional(graph, call, "residual"))


# ---------------------------------------------------------------------------------------------------------------------- attention
def _attention(graph: Graph, call: Call, other: Call) -> dict[str, str]:
    qkv = graph.add("Transpose", _input(graph, call, "qkv"), perm=[2, 0, 3, 1, 4])  # (3, B, H, N, D)
    q, k, v = (_part(graph, qkv, i, 0) for i in range(3))
    q = graph.add("Mul", q, graph.constant(call.constants["scale"]))
    logits = graph.add("MatMul", q, graph.add("Transpose", k, perm=[0, 1, 3, 2]))
    logits = _added(graph, logits, _optional(graph, call, "bias"))  # (B, H, N, N)
    probabilities = graph.add("Softmax", logits, axis=-1)
    y = graph.add("Transpose", graph.add("MatMul", probabilities, v), perm=[0, 2, 1, 3])
    return {"y": y, "logits": logits, "probabilities": probabilities}


def _cross_attention(graph: Graph, call: Call, other: Call) -> str:
    q = graph.add("Unsqueeze", _input(graph, call, "q"), _numbers(graph, 2))  # (B, H, 1, D)
    k, v = (graph.add("Transpose", _input(graph, call, name), perm=[0, 2, *rest]) for name, rest in (("k", (3, 1)), ("v", (1, 3))))
    logits = graph.add("MatMul", graph.add("Mul", q, graph.constant(call.constants["scale"])), k)  # (B, H, 1, N)
    return graph.add("Squeeze", graph.add("MatMul", graph.add("Softmax", logits, axis=-1), v), _numbers(graph, 2))


def _head_mixing(graph: Graph, call: Call, other: Call) -> str:
    p = call.inputs["p"]
    assert p is not None
    H, N = p.shape[1:3]
    rows = graph.add("Reshape", graph.value(p), _numbers(graph, 0, H, N * N))
    mixed = _added(graph, graph.add("MatMul", _input(graph, call, "a"), rows), _optional(graph, call, "c", (H, 1)))
    v = graph.add("Transpose", _input(graph, call, "v"), perm=[0, 2, 1, 3])  # (B, H, N, D)
    y = graph.add("MatMul", graph.add("Reshape", mixed, _numbers(graph, 0, H, N, N)), v)
    return graph.add("Transpose", y, perm=[0, 2, 1, 3])


def _performer(graph: Graph, call: Call, other: Call) -> dict[str, str]:
    packed, w = _input(graph, call, "kqv"), call.inputs["w"]
    assert w is not None
    k, q, v = (_part(graph, packed, i, 2) for i in range(3))  # (B, T, E)
    columns = graph.add("Transpose", graph.value(w), perm=[1, 0])

    def features(x: str) -> str:
        half = graph.add("Mul", graph.add("ReduceSum", graph.add("Mul", x, x), _numbers(graph, -1)), graph.constant(0.5))
        powers = graph.add("Exp", graph.add("Sub", graph.add("MatMul", x, columns), half))
        return graph.add("Mul", powers, graph.constant(len(w) ** -0.5))  # (B, T, m)

    of_keys, of_queries = features(k), features(q)
    sums = graph.add("MatMul", graph.add("Transpose", of_keys, perm=[0, 2, 1]), v)  # (B, m, E)
    total = graph.add("ReduceSum", of_keys, _numbers(graph, 1))  # (B, 1, m)
    below = graph.add("ReduceSum", graph.add("Mul", of_queries, total), _numbers(graph, -1))
    y = graph.add("Div", graph.add("MatMul", of_queries, sums), graph.add("Add", below, graph.constant(EPSILON)))
    return {"y": y, "v": v}


# ----------------------------------------------------------------------------------------------------------------- normalisations
def _normalised(graph: Graph, call: Call, x: str) -> str:
    weight, bias = (_input(graph, call, name) for name in ("w", "b"))
    return graph.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=call.constants["eps"])


def _layernorm(graph: Graph, call: Call, other: Call) -> str:
    return _normalised(graph, call, _input(graph, call, "x"))


def _add_layernorm(graph: Graph, call: Call, other: Call) -> dict[str, str]:
    total = graph.add("Add", _input(graph, call, "x"), _input(graph, call, "branch"))
    return {"s": total, "y": _normalised(graph, call, total)}


def _token_layernorm(graph: Graph, call: Call, other: Call) -> str:
    x = graph.add("Transpose", _input(graph, call, "x"), perm=[0, 2, 1])
    return graph.add("Transpose", _normalised(graph, call, x), perm=[0, 2, 1])


def _factor(graph: Graph, call: Call, variance: str) -> str:
    """w / √(variance + eps)."""
    deviation = graph.add("Sqrt", graph.add("Add", variance, graph.constant(call.constants["eps"])))
    return graph.add("Div", _input(graph, call, "w"), deviation)


def _batchnorm(graph: Graph, call: Call, other: Call) -> dict[str, str]:
    x, array = _input(graph, call, "x"), call.inputs["x"]
    assert array is not None
    mean, variance = (_optional(graph, call, name) for name in ("running_mean", "running_var"))
    if mean is None or variance is None:
        rows = list(range(array.ndim - 1))
        mean = graph.add("ReduceMean", x, axes=rows, keepdims=0)
        centred = graph.add("Sub", x, mean)
        variance = graph.add("ReduceMean", graph.add("Mul", centred, centred), axes=rows, keepdims=0)
    scaled = graph.add("Mul", graph.add("Sub", x, mean), _factor(graph, call, variance))
    y = _activated(graph, graph.add("Add", scaled, _input(graph, call, "b")), call.constants["activation"])
    return {"y": y, "mean": mean, "variance": variance}


def _fold_batchnorm(graph: Graph, call: Call, other: Call) -> dict[str, str]:
    weight = call.inputs["weight"]
    assert weight is not None
    factor, bias = _factor(graph, call, _input(graph, call, "variance")), _optional(graph, call, "bias")
    rows = graph.add("Reshape", factor, _numbers(graph, -1, *[1] * (weight.ndim - 1)))
    mean = _input(graph, call, "mean")
    centred = graph.add("Neg", mean) if bias is None else graph.add("Sub", bias, mean)
    new_bias = graph.add("Add", graph.add("Mul", centred, factor), _input(graph, call, "b"))
    return {"new_weight": graph.add("Mul", graph.value(weight), rows), "new_bias": new_bias}


# ------------------------------------------------------------------------------------------------------------------------- images
def _unfold(graph: Graph, call: Call, other: Call) -> None:
    y, images = call.outputs["y"], call.inputs["images"]
    assert y is not None and images is not None
    kernel, stride, padding = (call.constants[name] for name in ("kernel", "stride", "padding"))

    def compute() -> str:
        x = graph.value(images)
        if call.constants["channels_last"]:
            x = graph.add("Transpose", x, perm=[0, 3, 1, 2])
        if any(padding):
            x = graph.add("Pad", x, _numbers(graph, 0, 0, *padding, 0, 0, *padding))
        # (B, C, H, W) -> (B, C, U, kh, V, kw): each axis is gathered by itself.
        for axis, (count, size, step) in zip((2, 4), zip(y.shape[1:3], kernel, stride)):
            places = np.add.outer(np.arange(count) * step, np.arange(size))
            x = graph.add("Gather", x, graph.constant(places.astype(np.int64), "places"), axis=axis)
        x = graph.add("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
        return graph.add("Reshape", x, graph.sizes(y.shape, graph.other_shape(y)))

    graph.defer(call, y, compute)


def _depthwise(graph: Graph, call: Call, other: Call) -> str:
    weight, constants = call.inputs["w"], call.constants
    assert weight is not None
    x = graph.add("Transpose", _input(graph, call, "x"), perm=[0, 3, 1, 2])
    kernel = graph.add("Unsqueeze", graph.value(weight), _numbers(graph, 1))
    bias = [name for name in [_optional(graph, call, "bias")] if name is not None]
    sizes: dict[str, Any] = dict(kernel_shape=[*weight.shape[1:]], strides=[constants["stride"]] * 2, pads=[*constants["padding"]] * 2)
    y = graph.add("Conv", x, kernel, *bias, group=len(weight), **sizes)
    return _activated(graph, graph.add("Transpose", y, perm=[0, 2, 3, 1]), constants["activation"])


def _resample(graph: Graph, call: Call, other: Call) -> str:
    x, old, new, kept = call.inputs["x"], call.constants["old"], call.constants["new"], call.constants["class_token"]
    assert x is not None
    value, channels = graph.value(x), x.shape[2]
    patches = value if kept == "none" else graph.add("Slice", value, _numbers(graph, 1), _numbers(graph, LAST), _numbers(graph, 1))
    rows, columns = (graph.constant(matrix, "resampling") for matrix in matrices(old, new, call.constants["method"]))
    y = graph.add("MatMul", rows, graph.add("Reshape", patches, _numbers(graph, 0, old[0], old[1] * channels)))
    y = graph.add("MatMul", columns, graph.add("Reshape", y, _numbers(graph, 0, new[0], old[1], channels)))
    y = graph.add("Reshape", y, _numbers(graph, 0, prod(new), channels))
    if kept == "zero":
        return graph.add("Pad", y, _numbers(graph, 0, 1, 0, 0, 0, 0))
    if kept == "keep":
        token = graph.add("Slice", value, _numbers(graph, 0), _numbers(graph, 1), _numbers(graph, 1))
        return graph.add("Concat", token, y, axis=1)
    return y


# ------------------------------------------------------------------------------------------------------------------------- shapes
def _reduce_sum(graph: Graph, call: Call, other: Call) -> str:
    x, constants = call.inputs["x"], call.constants
    assert x is not None
    axes = range(x.ndim) if constants["axes"] is None else constants["axes"]
    keepdims, y = int(constants["keepdims"]), graph.value(x)
    if axes and np.isclose(constants["scale"] * prod(x.shape[a] for a in axes), 1.0, rtol=1e-12):
        return graph.add("ReduceMean", y, axes=[*axes], keepdims=keepdims)
    if constants["scale"] != other.constants["scale"]:
        raise UserError("a sum that is scaled by the size of the batch has no ONNX form")
    y = graph.add("ReduceSum", y, _numbers(graph, *axes), keepdims=keepdims) if axes else y
    return y if constants["scale"] == 1.0 else graph.add("Mul", y, graph.constant(constants["scale"]))


def _broadcast(graph: Graph, call: Call, other: Call) -> str:
    return graph.add("Expand", _input(graph, call, "x"), graph.lengths(tuple(call.constants["shape"]), tuple(other.constants["shape"])))


def _permute(graph: Graph, call: Call, other: Call) -> str:
    order = call.constants["order"]
    return graph.add("Transpose", _input(graph, call, "x"), perm=[axis % len(order) for axis in order])


def _slice(graph: Graph, call: Call, other: Call) -> str:
    array, x = call.inputs["x"], _input(graph, call, "x")
    assert array is not None
    bounds = [(axis, *values) for axis, values in enumerate(zip(*(call.constants[name] for name in ("start", "stop", "step"))))]
    others = [*zip(*(other.constants[name] for name in ("start", "stop", "step")))]
    kept = []
    for axis, start, stop, step in bounds:
        if start != others[axis][0] or (stop != others[axis][1] and (stop, step) != (array.shape[axis], 1)):
            raise UserError("images are picked from a batch by their places, which depend on its size: this has no ONNX form")
        if (start, stop, step) != (0, array.shape[axis], 1):
            kept.append((axis, start, LAST if stop != others[axis][1] else -LAST if stop < 0 else stop, step))
    if not kept:
        return x
    axes, starts, stops, steps = zip(*kept)
    return graph.add("Slice", x, *(_numbers(graph, *each) for each in (starts, stops, axes, steps)))


def _take(graph: Graph, call: Call, other: Call) -> str:
    return graph.add("Gather", _input(graph, call, "x"), _input(graph, call, "index"), axis=1)


def _concatenate(graph: Graph, call: Call, other: Call) -> str:
    return graph.add("Concat", *(_input(graph, call, name) for name in call.inputs), axis=call.constants["axis"])


def _class_token(graph: Graph, call: Call, other: Call) -> str:
    shapes = [(x.shape[0], 1, x.shape[2]) for x in (each.inputs["x"] for each in (call, other)) if x is not None]
    token = graph.add("Expand", _input(graph, call, "token"), graph.lengths(*shapes))
    return graph.add("Add", graph.add("Concat", token, _input(graph, call, "x"), axis=1), _input(graph, call, "positions"))


def _split(graph: Graph, call: Call, other: Call) -> dict[str, str]:
    lengths = call.constants["lengths"]
    if lengths != other.constants["lengths"]:
        raise UserError("a batch that is split has no ONNX form")
    names = graph.add("Split", _input(graph, call, "x"), _numbers(graph, *lengths), outputs=len(lengths), axis=call.constants["axis"])
    return dict(zip(call.outputs, names))


def _gelu(graph: Graph, call: Call, other: Call) -> str:
    return _gelu_of(graph, _input(graph, call, "x"), call.constants["approximate"])


def _plain(kind: str, **attributes: Any) -> Translation:
    """An op that is one node with the same inputs."""
    return lambda graph, call, other: graph.add(kind, *(_input(graph, call, name) for name in call.inputs), **attributes)


TRANSLATIONS: dict[str, Translation] = {
    "matmul": _matmul,
    "linear": _linear,
    "attention": _attention,
    "cross_attention": _cross_attention,
    "head_mixing": _head_mixing,
    "performer": _performer,
    "channel_mixing": _channel_mixing,
    "token_mixing": _token_mixing,
    "layernorm": _layernorm,
    "add_layernorm": _add_layernorm,
    "token_layernorm": _token_layernorm,
    "batchnorm": _batchnorm,
    "fold_batchnorm": _fold_batchnorm,
    "unfold": _unfold,
    "depthwise": _depthwise,
    "resample": _resample,
    "add": _plain("Add"),
    "subtract": _plain("Sub"),
    "multiply": _plain("Mul"),
    "divide": _plain("Div"),
    "power": _plain("Pow"),
    "maximum": _plain("Max"),
    "minimum": _plain("Min"),
    "gelu": _gelu,
    "exp": _plain("Exp"),
    "log": _plain("Log"),
    "sqrt": _plain("Sqrt"),
    "absolute": _plain("Abs"),
    "tanh": _plain("Tanh"),
    "sigmoid": _plain("Sigmoid"),
    "relu": _plain("Relu"),
    "relu6": lambda graph, call, other: _relu6_of(graph, _input(graph, call, "x")),
    "hardsigmoid": _plain("HardSigmoid", alpha=1 / 6, beta=0.5),
    "hardswish": _plain("HardSwish"),
    "softmax": _plain("Softmax", axis=-1),
    "reduce_sum": _reduce_sum,
    "broadcast": _broadcast,
    "permute": _permute,
    "slice": _slice,
    "take": _take,
    "concatenate": _concatenate,
    "class_token": _class_token,
    "split": _split,
}
