"""Tensor's operators, comparisons, and NumPy's functions of tensors."""

import operator
import warnings

import numpy as np
import pytest

from minivit import Tensor, UserError, gradcheck
from minivit import functional as F
from minivit.runtime.plan import Plan


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize(
    "call",
    [
        lambda a, x: np.sin(x),
        lambda a, x: a.dot(x),
        lambda a, x: np.concatenate([x, x]),
        lambda a, x: a.__setitem__(slice(None), x),
        lambda a, x: np.add(a, x, out=a),
        lambda a, x: np.add.reduce(x),
        lambda a, x: np.hypot(a, x),
        lambda a, x: np.array([x, x]),
        lambda a, x: np.asarray(x),
        lambda a, x: np.stack((a, x)),
        lambda a, x: np.where(a > 0, x, a),
    ],
)
def test_a_function_of_numpy_does_not_lose_a_gradient(call):
    a, x = np.ones(2), Tensor(np.array([1.0, 2.0]), requires_grad=True)
    with pytest.raises(TypeError, match=r"detach\(\)"):
        call(a, x)
    call(a, x.detach())


@pytest.mark.parametrize("call", [np.exp, np.log, np.sqrt, np.tanh, np.abs, np.negative, np.positive, np.square])
def test_numpys_functions_of_one_tensor_are_on_the_tape(call):
    x = Tensor(np.array([1.0, 2.0]), requires_grad=True)
    y = call(x)
    assert isinstance(y, Tensor) and y.requires_grad
    np.testing.assert_allclose(y.numpy(), call(np.array([1.0, 2.0])), rtol=1e-14)


@pytest.mark.parametrize("call", [np.add, np.subtract, np.multiply, np.divide, np.power, np.maximum, np.minimum])
def test_numpys_arithmetic_of_tensors_is_on_the_tape(call):
    a, x = np.array([3.0, 4.0]), Tensor(np.array([1.0, 2.0]), requires_grad=True)
    for one, other in ((a, x), (x, a), (x, x), (np.float64(2), x)):
        y = call(one, other)
        assert isinstance(y, Tensor) and y.requires_grad
        np.testing.assert_array_equal(y.numpy(), call(*(v.numpy() if isinstance(v, Tensor) else v for v in (one, other))))
    assert isinstance(np.negative(x), Tensor) and isinstance(np.matmul(a, x), Tensor)


COMPARISONS = [operator.lt, operator.le, operator.gt, operator.ge, operator.eq, operator.ne]


@pytest.mark.parametrize("compare", [*COMPARISONS, np.less, np.greater_equal, np.equal, np.not_equal])
def test_comparisons_are_numpys(compare):
    a, b = draw(3, 4).round(1), draw(4, seed=1).round(1)
    x, y = Tensor(a, requires_grad=True), Tensor(b, requires_grad=True)
    for one, other in ((x, y), (x, b), (a, y), (x, 0.5), (0.5, y), (x, x)):
        result = compare(one, other)
        assert isinstance(result, np.ndarray) and result.dtype == bool
        np.testing.assert_array_equal(result, compare(*(v.numpy() if isinstance(v, Tensor) else v for v in (one, other))))
    assert (x > 0).sum() == (a > 0).sum() and np.isfinite(x).all() and not np.isnan(x).any()


def test_what_is_no_number_equals_nothing():
    x = Tensor(draw(3))
    assert not (x == None).any() and (x != "x").all()  # noqa: E711
    with pytest.raises(TypeError):
        x < "x"  # noqa: B015


def test_a_mask_multiplies_and_picks():
    a = draw(3, 4)
    assert gradcheck(lambda x: x * (x > 0) + (x <= 0) * 0.5, a) and gradcheck(lambda x: x[x > 0] * x[x.detach() > 0], a)


def test_a_tensor_is_itself_alone_in_sets_and_dicts():
    x, y = Tensor(np.ones(2)), Tensor(np.ones(2))
    assert len({x, y, x}) == 2 and {x: 1, y: 2}[y] == 2 and hash(x) == hash(x)


def test_the_truth_of_a_tensor():
    assert Tensor(2.0) and Tensor([[1.0]]) and not Tensor([0.0])
    with pytest.raises(ValueError, match="ambiguous"):
        bool(Tensor([1.0, 2.0]))


def test_a_number_is_no_sequence():
    assert [v.shape for v in Tensor(np.ones((2, 3)))] == [(3,), (3,)]
    with pytest.raises(TypeError):
        list(Tensor(1.0))


def test_the_mean_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="no elements"):
        Tensor(np.ones((2, 0))).mean()


def test_equal_elements_share_the_gradient():
    a, b = (Tensor(np.array(v), requires_grad=True) for v in ([1.0, 2.0, 3.0], [2.0, 2.0, 2.0]))
    F.maximum(a, b).backward(np.ones(3))
    np.testing.assert_array_equal([a.grad.numpy(), b.grad.numpy()], [[0, 0.5, 1], [1, 0.5, 0]])
    a.grad = b.grad = None
    F.minimum(a, b).backward(np.ones(3))
    np.testing.assert_array_equal([a.grad.numpy(), b.grad.numpy()], [[1, 0.5, 0], [0, 0.5, 1]])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_where_formulas_have_no_limit(dtype):
    a = Tensor(np.array([0, 0, 0, -2, -2, 2, 0], dtype), requires_grad=True)
    b = Tensor(np.array([0, 1, 2, 3, 0.5, 0, -1], dtype), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = a**b
        y.backward(np.ones(7))
    np.testing.assert_array_equal(y.numpy(), [1, 0, 0, -8, np.nan, 1, np.inf])
    np.testing.assert_array_equal(a.grad.numpy(), [0, 1, 0, 12, np.nan, 0, -np.inf])
    np.testing.assert_allclose(b.grad.numpy(), [0, 0, 0, np.nan, np.nan, np.log(2), -np.inf], rtol=1e-6)
    x = draw(100).astype(dtype)
    np.testing.assert_array_equal((Tensor(x) ** 2).numpy(), x * x)


@pytest.mark.parametrize("read", [lambda x: x.numpy(), lambda x: x > 0, lambda x: float(x.sum()), lambda x: x[x == 0], np.sin])
def test_values_that_a_recording_does_not_know_are_not_read(read):
    x = Tensor(draw(3))

    def step():
        read(x)  # what was there before
        read(x * 2.0)
        return x.data

    with pytest.raises(UserError, match="not known while a step is recorded"):
        Plan(step)


def test_vectors_multiply_as_numpys():
    rng = np.random.default_rng(0)
    for one, other in (((3,), (3,)), ((2, 3), (3,)), ((2,), (2, 3)), ((4, 2, 3), (3,))):
        a, b = rng.standard_normal(one), rng.standard_normal(other)
        np.testing.assert_allclose((Tensor(a) @ Tensor(b)).numpy(), a @ b, rtol=1e-12)
        assert gradcheck(lambda x, y: x @ y, (a, b))
