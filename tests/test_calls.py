"""Calls that no kernel may be reached with: wrong ranks, lengths, dtypes and axes of every op and function are errors, as NumPy's are."""

import numpy as np
import pytest
from checked_process import run_checked

from minivit import Tensor
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
def test_an_op_takes_no_wrong_constant(name):
    """A kernel that raised would leave its output as it found it."""
    op = OPS[name]
    for constant, default in op.constants.items():
        if default is None:
            continue
        of_others = [value for value in ("tahn", (1, 2, 3, 4, 5), None, np.ones(3), 2**70j) if type(value) is not type(default)]
        if constant in op.choices:
            of_others += ["tahn", "", True, np.array("none")]
            assert default in op.choices[constant]
        elif isinstance(default, str):
            pytest.fail(f"{name}: which texts may {constant} be?")
        if isinstance(default, float):
            of_others += [float("nan"), float("inf")]
        for wrong in of_others:
            with pytest.raises((ValueError, TypeError)):
                op.complete({constant: wrong})
                pytest.fail(f"{name}: {constant}={wrong!r} is taken")


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
    "performer of a matrix": lambda: F.performer(t(2, 6), t(1, 2)),
    "performer, features of other channels": lambda: F.performer(t(1, 2, 6), t(1, 3)),
    "patch_projection, a matrix": lambda: F.patch_projection(t(4, 4), t(2, 1, 2, 2)),
    "patch_projection, other channels": lambda: F.patch_projection(t(1, 3, 4, 4), t(2, 1, 2, 2)),
    "patch_projection, a weight of two dimensions": lambda: F.patch_projection(t(1, 3, 4, 4), t(2, 12)),
    "unfold, stride 0": lambda: F.unfold(t(1, 1, 4, 4), 2, 0),
    "unfold, a negative stride": lambda: F.unfold(t(1, 1, 4, 4), 2, -1),
    "unfold, a negative padding": lambda: F.unfold(t(1, 1, 4, 4), 2, 1, -1),
    "unfold of tokens without a grid": lambda: F.unfold(t(1, 4, 4), 2, channels_last=True),
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
    "gelu, an approximation that is an array": lambda: F.gelu(t(2, 3), np.ones((2, 3), np.float32)),
    "gelu, an approximation that is true": lambda: F.gelu(t(2, 3), True),
    "layer_norm, an eps for each channel": lambda: F.layer_norm(t(2, 3), t(3), t(3), np.array([1e-6] * 3)),
    "linear, an unknown activation": lambda: F.linear(t(2, 3), t(4, 3), activation="relu"),
    "linear of a tuple": lambda: F.linear((2, 3), t(4, 3)),
    "sum over an axis that is true": lambda: t(2, 3).sum(axis=True),
    "transpose, no axes of two": lambda: t(2, 3).transpose(()),
    "transpose, an axis twice": lambda: t(2, 3).transpose(0, 0),
    "transpose, two axes of three": lambda: t(2, 3, 4).transpose(1, 2),
    "transpose, three axes of two": lambda: t(2, 3).transpose(1, 0, 2),
    "sum over an axis that is not there": lambda: t(2, 3).sum(axis=2),
    "sum over an axis twice": lambda: t(2, 3).sum(axis=(0, -2)),
    "mean over an axis of a number": lambda: t().mean(axis=1),
    "take, an axis that is not there": lambda: F.take(t(2, 3), [0], 2),
    "take, an index beyond the end": lambda: F.take(t(2, 3), [0, 2], 0),
    "take, indices that are no whole numbers": lambda: F.take(t(2, 3), [0.5], 0),
    "maximum of shapes that do not broadcast": lambda: F.maximum(t(2, 3), t(2)),
    "power of shapes that do not broadcast": lambda: t(2, 3) ** t(4, 3),
    "relu of no elements": lambda: F.relu(t(0, 3)),
    "an index of an array beyond the end": lambda: t(2, 3)[[0, 2]],
    "indices that do not broadcast": lambda: t(2, 3)[[0, 1], [0, 1, 2]],
    "a mask of another shape": lambda: t(2, 3)[np.ones((3, 2), bool)],
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
    run_checked("test_calls", "all_wrong_calls")


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
