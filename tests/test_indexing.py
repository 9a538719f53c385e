"""x[key] by arrays: values and errors are NumPy's, and what is picked several times gets the sum of the gradients."""

import numpy as np
import pytest

from minivit import Tensor, UserError, gradcheck
from minivit import functional as F
from minivit.kernels.core import devices

A = np.random.default_rng(0).standard_normal((3, 4, 5, 2))
N, E = None, Ellipsis
every = slice(None)
KEYS = [
    [0, 2],
    np.array(1),
    np.uint8(1),
    (every, [0, -1]),
    ([0, 2], [1, 1], [0, 4], [1, 0]),
    ([0, 2], every, [1, 1]),  # arrays apart: their axis comes first
    ([0, -1], E, [1, 1]),
    (0, every, [1, 1]),
    (every, [1, 1], 0),
    (every, 0, every, [1, 1]),
    (N, [0, 1]),
    ([0, 1], N, [1, 0]),
    ([0, 1], [1, 0], E, [0, 1], [0, 1]),  # an ellipsis of no axis parts them, too
    (slice(1), [[0, 1], [2, 3]], [[1], [0]], N, -1),
    (slice(None, None, -1), [3, 0, 0]),
    (slice(1, None, 2), E, [1, 0, 1]),
    A > 0,
    A > 9,
    (A[..., 0] > 0, 1),
    (A[:, 0, 0, 0] > -9, every, [1, 2, 3]),
    (every, A[0] > 0),
    (every, A[0, ..., 0] > 0, [1]),
    [],
    (every, []),
    np.array([], np.int64),
]


@pytest.mark.parametrize("key", KEYS, ids=range(len(KEYS)))
def test_values_and_gradients(key):
    expected, y = A[key], Tensor(A)[key]
    np.testing.assert_array_equal(y.numpy(), expected)
    assert not expected.size or gradcheck(lambda x: x[key], A)


@pytest.mark.parametrize(
    "key",
    [
        [3],
        (0, [-5]),
        [0.5],
        ["a"],
        [[0, 1], [2]],
        ([0, 1], [0, 1, 2]),
        A[:2] > 0,
        (A > 0, 0),
        [0] * 5 + [9],
        (0, 0, 0, 0, [0]),
        object(),
        (E, E, [[], 1]),
    ],
)
def test_what_numpy_refuses(key):
    for x in (A, Tensor(A)):
        with pytest.raises((IndexError, ValueError)):
            x[key]


@pytest.mark.parametrize("key", [True, np.True_, np.array(False), (0, True)])
def test_a_bool_alone_is_no_index(key):
    with pytest.raises(TypeError, match="array of bools"):
        Tensor(A)[key]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_what_is_picked_often_are_summed_in_float32(dtype):
    x = Tensor(np.zeros((4, 3)).astype(dtype), requires_grad=True)
    picked = np.random.default_rng(0).integers(0, 4, 3000)
    x[picked].backward(np.ones((3000, 3)).astype(dtype))
    expected = np.bincount(picked)[:, None].repeat(3, 1).astype(dtype)
    np.testing.assert_array_equal(x.grad.numpy(), expected)


def test_the_same_on_a_gpu(cuda_runtime):
    with devices.using(cuda_runtime):
        for key in KEYS[::3]:
            x = Tensor(A).to("cuda")
            x.requires_grad = True
            y = x[key]
            np.testing.assert_array_equal(y.numpy(), A[key])
            if y.size:
                y.backward(np.ones(y.shape))
                expected = np.zeros(A.shape)
                np.add.at(expected, key, 1)
                np.testing.assert_array_equal(x.grad.numpy(), expected)


def test_take():
    for axis in (0, 2, -1):
        np.testing.assert_array_equal(F.take(Tensor(A), [[0, 1], [-1, 0]], axis).numpy(), np.take(A, [[0, 1], [-1, 0]], axis))
    assert gradcheck(lambda x: F.take(x, [1, 1, 0], 1), A[:2, :2, :2, 0])
    with pytest.raises(UserError, match="take: indices must be whole numbers, not float64"):
        F.take(Tensor(A), [0.5], 0)
    with pytest.raises(IndexError):
        F.take(Tensor(A), [4], 1)
    with pytest.raises(IndexError):
        F.take(Tensor(A), [0], 4)
