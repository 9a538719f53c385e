"""Random calls of Tensor's methods and of functions: each has NumPy's result, or an error of the class of NumPy's."""

import operator
import warnings

import numpy as np
import pytest
from checked_process import run_checked
from hypothesis import given, settings
from hypothesis import strategies as st

from minivit import Tensor
from minivit import functional as F

ERRORS = IndexError, ValueError, TypeError
AXES = st.integers(-5, 5)
LENGTHS = st.integers(1, 4)
SHAPES = st.lists(LENGTHS, max_size=4).map(tuple)
ANY_SHAPES = st.one_of(SHAPES, SHAPES, SHAPES, st.lists(st.integers(0, 3), max_size=4).map(tuple))  # of no elements, too
SPECIAL = np.array([0.0, -0.0, 1.0, -1.0, 2.0, 0.5, 3.0, 6.0, -3.0, 100.0, -100.0, np.inf, -np.inf, np.nan])


@st.composite
def arrays(draw, shapes=ANY_SHAPES, special: bool = False):
    """Normal numbers in a shape, in float64 or float32, some of them whole or special."""
    shape, seed = draw(shapes), draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    values = np.asarray(rng.standard_normal(shape))
    if special and draw(st.booleans()):
        values = np.where(rng.random(shape) < 0.5, rng.choice(SPECIAL, shape), values)
    return values.astype(draw(st.sampled_from(("float64", "float64", "float32"))))


def others(array):
    """What may stand beside an array: a number, or an array of its dtype."""
    numbers = st.one_of(st.floats(-4, 4), st.integers(-3, 3), st.booleans())
    return st.one_of(numbers, arrays(special=True).map(lambda other: other.astype(array.dtype)))


@st.composite
def keys(draw, shape):
    """Something to index an array of this shape with, that mostly fits."""
    entries = []
    for length in shape[: draw(st.integers(0, len(shape)))]:
        beyond = draw(st.integers(0, 9)) == 0
        near = st.integers(-length - beyond, max(0, length - 1 + beyond))
        numbers = st.recursive(near, lambda inner: st.lists(inner, min_size=0, max_size=3), max_leaves=6)
        masks = st.lists(st.booleans(), min_size=length, max_size=length).map(np.array)
        pairs = st.lists(near, min_size=2, max_size=2)  # so that two of them broadcast
        entries.append(draw(st.one_of(near, st.slices(length), near.map(np.int64), pairs, numbers, masks, st.just(slice(None)))))
    for extra in draw(st.lists(st.sampled_from((None, ...)), max_size=2)):
        entries.insert(draw(st.integers(0, len(entries))), extra)
    whole = st.integers(0, 2**16).map(lambda seed: np.random.default_rng(seed).random(shape) < 0.5)
    if shape and draw(st.integers(0, 9)) == 0:
        return draw(whole)
    return entries[0] if len(entries) == 1 and draw(st.booleans()) else tuple(entries)


# --------------------------------------------------------------------------------------------------------------- the calls
def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def normed(x, weight, bias, axis=-1):
    y = (x - x.mean(axis, keepdims=True)) / np.sqrt(x.var(axis, keepdims=True) + 1e-6)
    along = (-1, 1) if axis == -2 else (-1,)
    return y * weight.reshape(along) + bias.reshape(along)


def relu6(x):
    return np.clip(x, 0, 6)


ONE = {  # functions of an array: ours, NumPy's
    "exp": (F.exp, np.exp),
    "log": (F.log, np.log),
    "sqrt": (F.sqrt, np.sqrt),
    "tanh": (F.tanh, np.tanh),
    "sigmoid": (F.sigmoid, lambda x: 1 / (1 + np.exp(-x))),
    "relu": (F.relu, lambda x: np.maximum(x, 0)),
    "relu6": (F.relu6, relu6),
    "hardsigmoid": (F.hardsigmoid, lambda x: relu6(x + 3) / 6),
    "hardswish": (F.hardswish, lambda x: x * relu6(x + 3) / 6),
    "abs": (abs, abs),
    "neg": (operator.neg, operator.neg),
    "T": (lambda x: x.T, lambda x: x.T),
    "square": (np.square, np.square),
    "len": (len, len),
    "item": (lambda x: x.item(), lambda x: x.item()),
    "bool": (bool, bool),
    "array": (np.asarray, np.asarray),
    "list": (lambda x: np.array([float(v.sum()) for v in x]), lambda x: np.array([float(v.sum()) for v in x])),
}
TWO = {name: getattr(operator, name) for name in ("add", "sub", "mul", "truediv", "pow", "lt", "le", "gt", "ge", "eq", "ne")} | {
    name: getattr(np, name) for name in ("add", "subtract", "multiply", "divide", "power", "maximum", "minimum", "less", "equal")
}
FUNCTIONS_OF_TWO = {"power": (F.power, np.power), "maximum": (F.maximum, np.maximum), "minimum": (F.minimum, np.minimum)}
METHODS = {  # ours with an array and arguments, and NumPy's; and the arguments
    "sum": (
        lambda x, axis, keep: x.sum(axis, keepdims=keep),
        st.tuples(st.one_of(st.none(), AXES, st.lists(AXES, max_size=3).map(tuple)), st.booleans()),
    ),
    "transpose": (lambda x, order: x.transpose(*order), st.tuples(st.lists(AXES, max_size=5).map(tuple))),
    "permutation": (lambda x, order: x.transpose(order[: x.ndim]), st.tuples(st.permutations(range(3)))),
    "reshape": (lambda x, shape: x.reshape(shape), st.tuples(st.lists(st.integers(-1, 6), max_size=4).map(tuple))),
}
METHODS["mean"] = (lambda x, axis, keep: x.mean(axis, keepdims=keep), METHODS["sum"][1])


def functions(sizes):
    """Calls with several arrays: ours, NumPy's, and their shapes, of lengths that a wrong one may stand among."""
    a, b, c, d = sizes
    return {
        "softmax": (F.softmax, softmax, [(a, b, c)]),
        "linear": (F.linear, lambda x, w, bias: x @ w.T + bias, [(a, b, c), (d, c), (d,)]),
        "residual": (lambda x, w, r: F.linear(x, w, residual=r), lambda x, w, r: x @ w.T + r, [(a, c), (d, c), (a, d)]),
        "layer_norm": (F.layer_norm, normed, [(a, b, c), (c,), (c,)]),
        "add_layer_norm": (
            lambda *given: F.concatenate(*F.add_layer_norm(*given), axis=0),
            lambda x, branch, w, s: np.concatenate([x + branch, normed(x + branch, w, s)]),
            [(a, b), (a, b), (b,), (b,)],
        ),
        "token_layer_norm": (F.token_layer_norm, lambda x, w, s: normed(x, w, s, -2), [(a, b, c), (b,), (b,)]),
        "matmul": (operator.matmul, operator.matmul, [(a, b), (b, c)]),
        "batches": (operator.matmul, operator.matmul, [(a, b, c), (a, c, d)]),
        "vector": (operator.matmul, operator.matmul, [(a, b), (b,)]),
        "sum_of": (lambda *given: F.sum_of(given), lambda x, y, z: x + y + z, [(a, b), (a, b), (a, b)]),
        "channel_mixing": (
            lambda x, w1, b1, w2, b2: F.channel_mixing_mlp(x, w1, b1, w2, b2),
            lambda x, w1, b1, w2, b2: np.asarray(F.gelu(x @ w1.T + b1)) @ w2.T + b2,
            [(a, b, c), (d, c), (d,), (c, d), (c,)],
        ),
        "attention": (
            lambda x: F.attention(x, 1),
            lambda x: softmax(x[..., :c] @ x[..., c : 2 * c].swapaxes(1, 2) / np.sqrt(c)) @ x[..., 2 * c :],
            [(a, b, 3 * c)],
        ),
    }


def outcome(call):
    """The result as an array, or the error."""
    try:
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of the mean of nothing
            result = call()
        return np.asarray(result.numpy() if isinstance(result, Tensor) else result)
    except ERRORS as error:
        return error


def check(what: str, ours, numpys, given: list) -> None:
    """ours(tensors) against numpys(arrays); arguments that are no arrays are passed to both."""
    expected = outcome(lambda: numpys(*given))
    got = outcome(lambda: ours(*(Tensor(a) if isinstance(a, np.ndarray) and a.dtype.kind == "f" else a for a in given)))
    text = f"{what} of {given}: {got!r}, NumPy {expected!r}"
    if isinstance(expected, Exception) or isinstance(got, Exception):
        nothing = isinstance(got, ERRORS) and any(isinstance(a, np.ndarray) and not a.size for a in given)  # no op takes no elements
        assert nothing or any(isinstance(got, kind) and isinstance(expected, kind) for kind in ERRORS), text
        return
    assert got.shape == expected.shape, text
    tolerance = 1e-10 if all(a.dtype != np.float32 for a in given if isinstance(a, np.ndarray)) else 1e-4
    np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance, err_msg=text)


def call(data) -> None:
    """Draw one call and check it."""
    kind = data.draw(st.sampled_from(("one", "two", "reflected", "of two", "method", "index", "axis", "functions")))
    if kind == "functions":
        sizes = data.draw(st.tuples(LENGTHS, LENGTHS, LENGTHS, LENGTHS))
        what = data.draw(st.sampled_from(list(functions(sizes))))
        ours, numpys, shapes = functions(sizes)[what]
        check(what, ours, numpys, [data.draw(arrays(st.just(shape))).astype("float64") for shape in shapes])
        return
    x = data.draw(arrays(special=kind in ("one", "two", "reflected", "of two")))
    if kind == "one":
        what = data.draw(st.sampled_from(list(ONE)))
        check(what, *ONE[what], [x])
    elif kind in ("two", "reflected"):
        what, other = data.draw(st.sampled_from(list(TWO))), data.draw(others(x))
        check(what, TWO[what], TWO[what], [x, other] if kind == "two" else [other, x])
    elif kind == "of two":
        what = data.draw(st.sampled_from(list(FUNCTIONS_OF_TWO)))
        check(what, *FUNCTIONS_OF_TWO[what], [x, data.draw(others(x))])
    elif kind == "method":
        what = data.draw(st.sampled_from(list(METHODS)))
        method, arguments = METHODS[what]
        drawn = data.draw(arguments)
        if x.ndim or what != "mean":  # a number has no axis for NumPy's mean, but axis 0 for its sum
            check(what, method, method, [x, *drawn])
    elif kind == "index":
        key = data.draw(keys(x.shape))
        check(f"x[{key!r}]", lambda x: x[key], lambda x: x[key], [x])
    else:
        x = x if x.ndim else x[None]  # NumPy takes axis 0 of a number in some functions
        axis, shape = data.draw(AXES), data.draw(st.lists(st.integers(0, 4), max_size=4).map(tuple))
        numbers = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=1, max_size=4)))
        y = data.draw(arrays()).astype(x.dtype)
        what, ours, numpys, given = data.draw(
            st.sampled_from(
                (
                    ("take", lambda x: F.take(x, numbers, axis), lambda x: np.take(x, numbers, axis), [x]),
                    ("broadcast", lambda x: F.broadcast(x, shape), lambda x: np.broadcast_to(x, shape), [x]),
                    ("concatenate", lambda *a: F.concatenate(*a, axis=axis), lambda *a: np.concatenate(a, axis), [x, y]),
                    ("join", lambda *a: F.concatenate(*a, axis=axis), lambda *a: np.concatenate(a, axis), [x, x, x]),
                    ("split", lambda x: F.split(x, 2, axis)[1], lambda x: np.split(x, 2, axis)[1], [x]),
                )
            )
        )
        check(f"{what}, axis {axis}, {shape}, {numbers}", ours, numpys, given)


@settings(max_examples=300)
@given(data=st.data())
def test_a_call_is_as_numpys(data):
    call(data)


@settings(max_examples=10_100, database=None)
@given(data=st.data())
def ten_thousand_calls(data):
    call(data)


@pytest.mark.slow
def test_ten_thousand_calls_are_as_numpys():
    run_checked("test_against_numpy", "ten_thousand_calls")
