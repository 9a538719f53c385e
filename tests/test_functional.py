"""Functions of tensors: their values where those of kernels' random cases do not come, and what they take."""

import warnings

import numpy as np
import pytest

from minivit import Tensor
from minivit import functional as F

inf, nan = np.inf, np.nan
POINTS = {  # x, then each function's value and derivative there
    "x": (-inf, -9.0, -3.0, -1.0, 0.0, 1.0, 3.0, 6.0, 9.0, inf, nan),
    "exp": [(0, 0), None, None, None, (1, 1), (np.e, np.e), None, None, None, (inf, inf), (nan, nan)],
    "log": [(nan, None), (nan, None), (nan, None), (nan, None), (-inf, inf), (0, 1), None, None, None, (inf, 0), (nan, nan)],
    "sqrt": [(nan, nan), (nan, nan), (nan, nan), (nan, nan), (0, inf), (1, 0.5), None, None, (3, 1 / 6), (inf, 0), (nan, nan)],
    "absolute": [(inf, -1), (9, -1), (3, -1), (1, -1), (0, 0), (1, 1), (3, 1), (6, 1), (9, 1), (inf, 1), (nan, None)],
    "tanh": [(-1, 0), None, None, None, (0, 1), None, None, None, None, (1, 0), (nan, nan)],
    "sigmoid": [(0, 0), None, None, None, (0.5, 0.25), None, None, None, None, (1, 0), (nan, nan)],
    "relu": [(0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (1, 1), (3, 1), (6, 1), (9, 1), (inf, 1), (nan, None)],
    "relu6": [(0, 0), (0, 0), (0, 0), (0, 0), (0, 0), (1, 1), (3, 1), (6, 0), (6, 0), (6, 0), (nan, None)],
    "hardsigmoid": [(0, 0), (0, 0), (0, 0), (1 / 3, 1 / 6), (0.5, 1 / 6), (2 / 3, 1 / 6), (1, 0), (1, 0), (1, 0), (1, 0), (nan, None)],
    "hardswish": [None, (0, 0), (0, 0), (-1 / 3, 1 / 6), (0, 0.5), (2 / 3, 5 / 6), (3, 1), (6, 1), (9, 1), (inf, 1), (nan, nan)],
}


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
@pytest.mark.parametrize("name", [name for name in POINTS if name != "x"])
def test_values_and_derivatives_at_the_ends_of_the_domain(name, dtype):
    x = Tensor(Tensor(np.array(POINTS["x"])).numpy().astype(dtype), requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = getattr(F, name)(x)
        y.backward(np.ones(x.shape))
    assert y.dtype == dtype
    for at, expected, value, slope in zip(POINTS["x"], POINTS[name], y.numpy(), x.grad.numpy()):
        if expected is not None:
            tolerance = {"float32": 1e-6, "float64": 1e-14, "bfloat16": 2.0**-8}[dtype]
            np.testing.assert_allclose(float(value), expected[0], rtol=tolerance, err_msg=f"{name}({at})")
            if expected[1] is not None:
                np.testing.assert_allclose(float(slope), expected[1], rtol=tolerance, err_msg=f"{name}'({at})")


@pytest.mark.parametrize("given", [np.ones((2, 3), np.float32), [[1.0, 2.0]], 3.0])
def test_what_is_no_tensor_is_made_one(given):
    np.testing.assert_array_equal(F.relu(given).numpy(), np.asarray(given))
