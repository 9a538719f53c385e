"""Tensor and tape: gradients of expressions, and where they lie."""

import numpy as np
import pytest

import minivit
from minivit import Parameter, Tensor, gradcheck, no_grad
from minivit import functional as F


def draw(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


EXPRESSIONS = {
    "arithmetic": (lambda a, b: (a + b) * a - b / (a * a + 2.0), [(3, 4), (4,)]),
    "numbers on the left": (lambda a: 1.0 - 2.0 / (3.0 + a * a), [(5,)]),
    "negation": (lambda a: -a + np.arange(3.0), [(2, 3)]),
    "matrix products": (lambda a, b, c: a @ b @ c, [(2, 3, 4), (2, 4, 5), (5, 2)]),
    "sum, mean": (lambda a: a.sum(0, keepdims=True) * a.mean((0, 2), keepdims=True) + a.mean(), [(2, 3, 4)]),
    "shape": (lambda a: a.reshape(6, -1).T * a.transpose(2, 0, 1).reshape(4, 6), [(2, 3, 4)]),
    "slices": (lambda a: a[:, ::-2] + a[..., 1:, 0][:, None, :2], [(3, 2, 3)]),
    "functions": (lambda a: F.tanh(a) * F.exp(a) + F.log(F.sigmoid(a)) - F.sqrt(abs(a) + 1.0), [(2, 3)]),
    "powers": (lambda a, b: (a * a + 1.0) ** b + 2.0**a - a**2 + a**3.0 - (a * a + 0.5) ** -0.5, [(2, 3), (3,)]),
    "the larger and the smaller": (lambda a, b: F.maximum(a, b) * F.minimum(a, 0.25) + np.maximum(a, 0.0), [(2, 3), (3,)]),
    "used twice": (lambda a: a * a + F.softmax(a) @ a, [(3, 3)]),
    "softmax, gelu": (lambda a: F.softmax(F.gelu(a)) + F.gelu(a, approximate="tanh"), [(2, 5)]),
    "join, repeat": (lambda a, b: F.concatenate(F.broadcast(a, (3, 2)), b, axis=0), [(1, 2), (2, 2)]),
    "normed sum": (lambda a, b, w: sum(F.add_layer_norm(a, b, w, w * 2.0)), [(4, 6), (4, 6), (6,)]),
    "only the sum": (lambda a, b, w: F.add_layer_norm(a, b, w, w)[0] * a, [(4, 6), (4, 6), (6,)]),
    "patches": (lambda a, w, b: F.patch_projection(a, w, b, stride=2, padding=1), [(2, 2, 5, 4), (3, 2, 3, 2), (3,)]),
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_gradients(name):
    function, shapes = EXPRESSIONS[name]
    assert gradcheck(function, [draw(*shape, seed=i) for i, shape in enumerate(shapes)])


@pytest.mark.parametrize("shape", [(2, 3, 4, 4), (1, 3, 4, 4), (3, 4, 4), (2, 1, 1, 4), (4, 4), (1, 1, 4, 4)])
def test_attention_takes_a_bias_that_broadcasts(shape):
    qkv, bias = draw(2, 4, 3 * 6), draw(*shape, seed=1)
    assert gradcheck(lambda qkv, bias: F.attention(qkv, 3, bias=bias), [qkv, bias])
    whole = np.broadcast_to(bias, (2, 3, 4, 4)).copy()
    given, expected = (F.attention(Tensor(qkv), 3, bias=Tensor(b)).numpy() for b in (bias, whole))
    np.testing.assert_allclose(given, expected, rtol=1e-13)


def test_gradients_add_up_until_they_are_forgotten():
    x = Tensor(draw(3), requires_grad=True)
    (x * 2.0).sum().backward()
    (x * 3.0).sum().backward()
    np.testing.assert_array_equal(x.grad.numpy(), 5.0)


def test_a_gradient_does_not_share_memory_with_another():
    x, y = Tensor(draw(2, 3), requires_grad=True), Tensor(draw(2, 3), requires_grad=True)
    weight, given = Tensor(draw(3, 3)), draw(2, 3)
    F.linear(x, weight, residual=y).backward(given)
    z = Tensor(draw(6), requires_grad=True)
    z.reshape(2, 3).backward(given)
    arrays = [x.grad.numpy(), y.grad.numpy(), z.grad.numpy(), given]
    assert not any(np.shares_memory(a, b) for i, a in enumerate(arrays) for b in arrays[:i])


@pytest.mark.parametrize("home", [False, True])
def test_a_leaf_whose_gradient_another_shares(home):
    """add_layer_norm hands the gradient of x on to the branch; x gets more from an older node before the branch is reached."""
    x, v, w = Parameter(draw(4, 6)), Parameter(draw(4, 6, seed=1)), Tensor(np.ones(6))
    if home:
        x.grad_home = np.full((4, 6), np.nan)

    def loss(x, v):
        branch = v * 3.0
        older = x * 2.0
        s, y = F.add_layer_norm(x, branch, w, w)
        return (s * s + y * older).sum()

    loss(x, v).backward()
    assert gradcheck(loss, [x.data, v.data])
    expected = [Tensor(x.data, requires_grad=True), Tensor(v.data, requires_grad=True)]
    loss(*expected).backward()
    np.testing.assert_array_equal(x.grad.numpy(), expected[0].grad.numpy())
    np.testing.assert_array_equal(v.grad.numpy(), expected[1].grad.numpy())
    assert not home or x.grad.numpy() is x.grad_home or np.shares_memory(x.grad.numpy(), x.grad_home)


def test_a_second_walk_is_refused():
    x = Tensor(draw(3), requires_grad=True)
    for result in ((x * x).sum(), x.reshape(3, 1).sum()):
        result.backward()
        with pytest.raises(RuntimeError, match="second time"):
            result.backward()


def test_what_a_walk_has_used_is_freed():
    import weakref

    x = Tensor(draw(1000), requires_grad=True)
    middle = x * 2.0
    watch = weakref.ref(middle)
    result = (middle * middle).sum()
    del middle
    result.backward()
    assert watch() is None


def test_no_grad_and_detach_leave_the_tape():
    x = Tensor(draw(3), requires_grad=True)
    with no_grad():
        assert not (x * x).requires_grad
    assert not (x.detach() * 2.0).requires_grad
    with pytest.raises(RuntimeError, match="requires a gradient"):
        x.detach().sum().backward()


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(Tensor(draw(2, 3)), Tensor(draw(4, 3).astype(np.float32))),
        lambda: minivit.Tensor(draw(2, 3)) @ minivit.Tensor(draw(3, 3).astype(np.float32)),
        lambda: F.softmax(np.arange(3)),
    ],
)
def test_mixed_dtypes_are_refused(call):
    with pytest.raises(TypeError, match="all be float32, all float64 or all bfloat16"):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: F.linear(Tensor(draw(2, 3)), Tensor(draw(4, 3)), Tensor(draw(3))),
        lambda: F.linear(Tensor(draw(2, 3)), Tensor(draw(4, 3)), residual=Tensor(draw(1, 4))),
        lambda: F.layer_norm(Tensor(draw(2, 3)), Tensor(draw(2)), Tensor(draw(3))),
        lambda: F.channel_mixing_mlp(*map(Tensor, (draw(2, 3, 4), draw(5, 4), draw(4), draw(4, 5), draw(4)))),
        lambda: F.attention(Tensor(draw(2, 4, 18)), 3, bias=Tensor(draw(2, 2, 4, 4))),
        lambda: F.cross_entropy(Tensor(draw(2, 3)), draw(2, 2)),
        lambda: Tensor(draw(2, 3)) @ Tensor(draw(2, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(call):
    with pytest.raises(ValueError, match=r"shape|matmul"):
        call()


def test_numpy_scalars_are_numbers():
    x, w = Tensor(draw(2, 6)), Tensor(np.ones(6))
    np.testing.assert_array_equal(F.layer_norm(x, w, w, np.float64(0.5)).numpy(), F.layer_norm(x, w, w, 0.5).numpy())


def test_scalars():
    x = Tensor(np.float64(3.0))
    assert x[...].shape == x[()].shape == () and float(x) == x.item() == 3.0
    with pytest.raises(TypeError):
        x[True]


@pytest.mark.parametrize(
    "shape, function",
    [
        ((1, 4, 4), lambda p, w: F.token_layer_norm(p, w[0], w[1]) + p),
        ((1, 4, 4), lambda p, w: F.layer_norm(p, w[0], w[1]) + p),
        ((4, 4), lambda p, w: F.linear(F.linear(w, p), p)),
        ((4, 4), lambda p, w: F.linear(p, p)),
    ],
)
def test_a_gradient_that_has_a_home_is_added_to_there(shape, function):
    gradients = []
    for home in (None, np.full(shape, np.nan)):
        p, w = Parameter(draw(*shape)), Tensor(draw(4, 4, seed=1))
        p.grad_home = home
        for _ in range(2):
            function(p, w).backward(draw(*shape, seed=2))
        assert home is None or np.shares_memory(p.grad.data, home)
        gradients.append(p.grad.numpy())
    np.testing.assert_allclose(*gradients, rtol=1e-12)


# --------------------------------------------------------------------------------------------------- what is given
@pytest.mark.parametrize(
    "dtype, expected", [(">f8", "float64"), ("longdouble", "float64"), (">f4", "float32"), ("float16", "float32"), ("int64", "float32")]
)
def test_the_dtype_of_what_is_given(dtype, expected):
    x = Tensor(np.array([1, 2, 3], np.dtype(dtype)))
    assert x.dtype == expected and x.numpy().tolist() == [1, 2, 3]


@pytest.mark.parametrize("data", [["a"], [1j], np.array(["2020-01-01"], "M8[D]"), np.array([None])])
def test_no_numbers_no_tensor(data):
    with pytest.raises(TypeError, match="real numbers"):
        Tensor(data)


class OtherLibrarys:
    """An array of a library that minivit does not know: NumPy can see it."""

    dtype, shape, ndim = "float32", (3,), 1

    def reshape(self, *shape):
        raise NotImplementedError

    def __array__(self, dtype=None, copy=None):
        return np.array([1, 2, 3], dtype or np.float32)


def test_what_numpy_can_see_is_an_array_of_the_cpu():
    x = Tensor(OtherLibrarys())
    assert (x.device, x.shape, repr(x)) == ("cpu", (3,), "Tensor([1., 2., 3.], dtype=float32)")
    np.testing.assert_array_equal((Tensor(np.ones(3, np.float32)) + OtherLibrarys()).numpy(), [2, 3, 4])


class ArrayOfAnotherLibrary:
    """As PyTorch's tensors on the CPU and JAX's arrays: NumPy can read it, and it has the attributes of an array."""

    def __init__(self, values):
        self.values = np.asarray(values)
        self.dtype, self.shape, self.ndim = f"other.{self.values.dtype}", self.values.shape, self.values.ndim

    def __len__(self):
        return len(self.values)

    def __array__(self, dtype=None, copy=None):
        return np.array(self.values, dtype)

    def reshape(self, *shape):
        return ArrayOfAnotherLibrary(self.values.reshape(*shape))


def test_arrays_that_numpy_can_read_lie_on_the_cpu():
    images, labels = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32), np.arange(4)
    tensor = Tensor(ArrayOfAnotherLibrary(images))
    assert tensor.device == "cpu"
    np.testing.assert_array_equal((tensor * 2).numpy(), images * 2)
    losses = []
    for wrap in (np.asarray, ArrayOfAnotherLibrary):
        trainer = minivit.Trainer(minivit.create_model("vit_nano_patch2_8"))
        losses.append([trainer.step(wrap(images), wrap(labels)) for _ in range(2)])
    assert losses[0] == losses[1]
    predictor = minivit.Predictor(minivit.create_model("vit_nano_patch2_8"))
    np.testing.assert_array_equal(predictor(ArrayOfAnotherLibrary(images)), predictor(images))
