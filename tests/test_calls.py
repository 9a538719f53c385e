"""Calls that no kernel may be reached with: wrong ranks, lengths, dtypes and axes of every op and function are errors, as NumPy's are."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minivit import Tensor, UserError
from minivit import functional as F
from minivit.kernels import OPS
from minivit.kernels.core.cases import input_shapes, make_inputs, shrunk
from minivit.tensor import apply

NUMBERS = np.random.default_rng(0)


# ------------------------------------------------------------------------------------------------------------------ every op
def spoilt(op, inputs: dict) -> list[tuple[str, dict]]:
    """The inputs with one of them made wrong, in every way that is wrong for it."""
    found = []
    for name, array in inputs.items():
        if array is None:
            continue
        accepted = op.accepts.get(name, op.shapes[name])
        if name not in op.optional:
            found.append((f"{name} is missing", inputs | {name: None}))
        found.append((f"{name} of the wrong dtype", inputs | {name: array.astype(np.int16)}))
        found.append(
            (f"{name} without elements", inputs | {name: array.reshape(array.shape)[:0] if array.ndim else np.zeros(0, array.dtype)})
        )
        if accepted == "*":
            continue
        if "..." not in accepted:
            found.append((f"{name} with an axis more", inputs | {name: array[None]}))
            found.append((f"{name} with an axis fewer", inputs | {name: np.array(array[0] if array.ndim else 1.0)}))
        for axis, token in enumerate(accepted.split()):
            shared = [n for n, a in inputs.items() if a is not None and n != name and token in op.accepts.get(n, op.shapes[n]).split()]
            if "..." not in accepted and (token.isdigit() or shared):
                longer = np.concatenate([array, array.take([0], axis)], axis)
                found.append((f"{name} too long along {token}", inputs | {name: longer}))
    return found


@pytest.mark.parametrize("name", OPS)
def test_an_op_takes_no_wrong_input(name):
    op = OPS[name]
    for case in op.cases:
        inputs, constants = make_inputs(op, shrunk(op, case, elements=2_000), "float32", np.random.default_rng(0))
        op.describe(list(inputs.values()), constants)
        for what, wrong in spoilt(op, inputs):
            with pytest.raises((ValueError, TypeError)):
                op.describe(list(wrong.values()), constants)
                pytest.fail(f"{name}: {what} is taken")


@pytest.mark.parametrize("name", OPS)
def test_every_case_is_accepted(name):
    op = OPS[name]
    for case in op.cases:
        shapes = input_shapes(op, case)
        assert {n for n, shape in shapes.items() if shape is None} <= op.optional


# ------------------------------------------------------------------------------------------------------------- every function
def t(*shape: int) -> Tensor:
    return Tensor(NUMBERS.standard_normal(shape))


STATE = np.zeros(2, np.uint64)
WRONG = {
    "linear, a weight of three dimensions": lambda: F.linear(t(2, 3), t(4, 3, 1)),
    "linear, a bias of another length": lambda: F.linear(t(2, 3), t(4, 3), t(5)),
    "linear, a bias of two dimensions": lambda: F.linear(t(2, 3), t(4, 3), t(4, 1)),
    "linear, a residual of another shape": lambda: F.linear(t(2, 3), t(4, 3), residual=t(3, 4)),
    "linear of a number": lambda: F.linear(t(), t(4, 3)),
    "layer_norm, a scale of two dimensions": lambda: F.layer_norm(t(2, 3), t(3, 1), t(3)),
    "layer_norm, a shift too short": lambda: F.layer_norm(t(2, 3), t(3), t(2)),
    "add_layer_norm, a branch of another shape": lambda: F.add_layer_norm(t(2, 3), t(3, 3), t(3), t(3)),
    "token_layer_norm of a matrix": lambda: F.token_layer_norm(t(2, 3), t(2), t(2)),
    "attention of a matrix": lambda: F.attention(t(2, 6), 1),
    "attention, no heads": lambda: F.attention(t(1, 2, 6), 0),
    "attention, a bias of another size": lambda: F.attention(t(1, 2, 6), 1, bias=t(1, 1, 3, 3)),
    "attention, a bias for other heads": lambda: F.attention(t(1, 2, 12), 2, bias=t(1, 3, 2, 2)),
    "patch_projection, a matrix": lambda: F.patch_projection(t(4, 4), t(2, 1, 2, 2)),
    "patch_projection, other channels": lambda: F.patch_projection(t(1, 3, 4, 4), t(2, 1, 2, 2)),
    "patch_projection, a weight of two dimensions": lambda: F.patch_projection(t(1, 3, 4, 4), t(2, 12)),
    "unfold, stride 0": lambda: F.unfold(t(1, 1, 4, 4), 2, 0),
    "unfold, a negative stride": lambda: F.unfold(t(1, 1, 4, 4), 2, -1),
    "unfold, a negative padding": lambda: F.unfold(t(1, 1, 4, 4), 2, 1, -1),
    "unfold, kernel 0": lambda: F.unfold(t(1, 1, 4, 4), 0),
    "resample, another grid": lambda: F.resample(t(1, 5, 2), 2, 3, "bilinear"),
    "resample, no new grid": lambda: F.resample(t(1, 4, 2), 2, 0, "bilinear"),
    "resample, an unknown method": lambda: F.resample(t(1, 4, 2), 2, 3, "nearest"),
    "channel_mixing_mlp, other channels": lambda: F.channel_mixing_mlp(t(1, 2, 3), t(4, 2), t(4), t(3, 4), t(3)),
    "token_mixing_mlp, other tokens": lambda: F.token_mixing_mlp(t(1, 2, 3), t(4, 3), t(4), t(2, 4), t(2)),
    "softmax of a number": lambda: F.softmax(t()),
    "broadcast to fewer axes": lambda: F.broadcast(t(2, 3), (3,)),
    "broadcast to a shape that does not fit": lambda: F.broadcast(t(2, 3), (2, 4)),
    "concatenate nothing": lambda: F.concatenate(axis=0),
    "concatenate other shapes": lambda: F.concatenate(t(2, 3), t(2, 4), axis=0),
    "concatenate other ranks": lambda: F.concatenate(t(2, 3), t(2), axis=0),
    "concatenate along an axis that is not there": lambda: F.concatenate(t(2, 3), t(2, 3), axis=2),
    "split into no parts": lambda: F.split(t(2, 3), 0, 1),
    "split into lengths that do not add up": lambda: F.split(t(2, 3), (1, 1), 1),
    "split along an axis that is not there": lambda: F.split(t(2, 3), 1, 5),
    "cross_entropy of a vector": lambda: F.cross_entropy(t(3), np.array([0, 1, 2])),
    "cross_entropy, classes that are no whole numbers": lambda: F.cross_entropy(t(2, 3), np.array([1.9, 0.2])),
    "cross_entropy, a class too high": lambda: F.cross_entropy(t(2, 3), np.array([1, 3])),
    "cross_entropy, negative smoothing": lambda: F.cross_entropy(t(2, 3), np.array([1, 0]), -1.0),
    "cross_entropy, targets of another width": lambda: F.cross_entropy(t(2, 3), np.ones((2, 4))),
    "cross_entropy, targets of three dimensions": lambda: F.cross_entropy(t(2, 3), np.ones((2, 3, 1))),
    "dropout, an empty state": lambda: F.dropout(t(2, 3), 0.5, np.zeros(0, np.uint64)),
    "dropout, a short state": lambda: F.dropout(t(2, 3), 0.5, np.zeros(1, np.uint64)),
    "dropout, a state of floats": lambda: F.dropout(t(2, 3), 0.5, np.zeros(2)),
    "dropout, a rate above 1": lambda: F.dropout(t(2, 3), 1.5, STATE),
    "drop_path of a number": lambda: F.drop_path(t(), 0.5, STATE),
    "matmul, other lengths": lambda: t(2, 3) @ t(2, 3),
    "matmul by a number": lambda: t(2, 3) @ 2.0,
    "transpose, an axis twice": lambda: t(2, 3).transpose(0, 0),
    "transpose, two axes of three": lambda: t(2, 3, 4).transpose(1, 2),
    "transpose, three axes of two": lambda: t(2, 3).transpose(1, 0, 2),
    "sum over an axis that is not there": lambda: t(2, 3).sum(axis=2),
    "sum over an axis twice": lambda: t(2, 3).sum(axis=(0, -2)),
    "mean over an axis of a number": lambda: t().mean(axis=1),
    "an index beyond the end": lambda: t(2, 3)[2],
    "too many indices": lambda: t(2, 3)[0, 0, 0],
    "a reshape of other elements": lambda: t(2, 3).reshape(4, 2),
    "shapes that do not broadcast": lambda: t(2, 3) + t(2),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_call_is_an_error(what):
    with pytest.raises((ValueError, TypeError, IndexError)):
        WRONG[what]()


def test_no_wrong_call_harms_the_process():
    """In a process whose allocator checks itself: none of them reaches a kernel."""
    code = "import sys; sys.path[:0] = sys.argv[1:]; import test_calls; test_calls.all_wrong_calls(); print('survived')"
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    environment = os.environ | {"MALLOC_CHECK_": "3", "MALLOC_PERTURB_": "165"}
    done = subprocess.run([sys.executable, "-c", code, *folders], env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr[-2000:]


def all_wrong_calls() -> None:
    for call in WRONG.values():
        try:
            call()
        except (ValueError, TypeError, IndexError):
            continue
        raise AssertionError
    for op in OPS.values():
        inputs, constants = make_inputs(op, shrunk(op, op.cases[0], elements=500), "float32", np.random.default_rng(0))
        for _, wrong in spoilt(op, inputs):
            arguments = [Tensor(a) if a is not None and a.dtype == np.float32 else a for a in wrong.values()]
            try:
                apply(op, *arguments, **constants)
            except (ValueError, TypeError):
                continue
            raise AssertionError


# -------------------------------------------------------------------------------------------------------------- against NumPy
SHAPES = st.lists(st.integers(1, 4), min_size=0, max_size=4).map(tuple)
AXES = st.integers(-5, 5)


def outcome(call):
    """The result as an array, or the kind of error: an index that is not there, or arguments that do not go together."""
    try:
        result = call()
        return np.asarray(result.numpy() if isinstance(result, Tensor) else result)
    except (ValueError, TypeError, IndexError, UserError) as error:
        return "index" if isinstance(error, IndexError) else "value"


def same(one, other) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return isinstance(one, str) and isinstance(other, str)
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-12, atol=1e-12, equal_nan=True)


@settings(max_examples=400)
@given(data=st.data(), shape=SHAPES)
def test_methods_as_numpy(data, shape):
    array = np.asarray(np.random.default_rng(0).standard_normal(shape))
    axis = data.draw(st.one_of(st.none(), AXES, st.lists(AXES, max_size=3).map(tuple)))
    order = data.draw(st.lists(AXES, max_size=5).map(tuple))
    new = data.draw(st.lists(st.integers(-1, 6), max_size=4).map(tuple))
    keep = data.draw(st.booleans())
    key = data.draw(st.lists(st.one_of(AXES, st.slices(4), st.none(), st.just(...)), max_size=4).map(tuple))
    other = np.asarray(np.random.default_rng(1).standard_normal(data.draw(SHAPES)))
    pairs = {
        "sum": (lambda x: x.sum(axis, keepdims=keep), lambda x: x.sum(axis, keepdims=keep)),
        "mean": (lambda x: x.mean(axis, keepdims=keep), lambda x: x.mean(axis, keepdims=keep)),
        "transpose": (lambda x: x.transpose(*order), lambda x: x.transpose(*order)),
        "reshape": (lambda x: x.reshape(new), lambda x: x.reshape(new)),
        "add": (lambda x: x + other, lambda x: x + other),
        "subtract from": (lambda x: other - x, lambda x: other - x),
        "multiply": (lambda x: x * other, lambda x: x * other),
        "divide": (lambda x: x / other, lambda x: x / other),
        "broadcast": (lambda x: F.broadcast(x, new), lambda x: np.broadcast_to(x, new)),
    }
    for name, (ours, numpys) in pairs.items():
        if name == "mean" and not shape:  # NumPy takes axis 0 of a number in sum, not in mean
            continue
        assert same(outcome(lambda ours=ours: ours(Tensor(array))), outcome(lambda numpys=numpys: numpys(array))), (
            name,
            shape,
            axis,
            order,
        )
    expected = outcome(lambda: array[key])
    if isinstance(expected, str) or expected.size:
        assert same(outcome(lambda: Tensor(array)[key]), expected), (shape, key)
    if other.ndim <= 2 and array.ndim <= 2:
        assert same(outcome(lambda: Tensor(array) @ other), outcome(lambda: array @ other)), (shape, other.shape)
