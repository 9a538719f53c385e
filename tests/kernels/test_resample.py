"""Tokens on another grid: against the definitions, token by token."""

from math import ceil, floor

import numpy as np
import pytest

from minivit import Tensor
from minivit import functional as F
from minivit.kernels import OPS
from minivit.kernels.resample import axis_matrix
from minivit.sides import both


def upsampled(grid, new):
    """An array, each element repeated twice along both axes, then the means of bins that may overlap."""
    double = grid.repeat(2, 0).repeat(2, 1)
    bins = [[slice(floor(2 * o * i / n), ceil(2 * o * (i + 1) / n)) for i in range(n)] for o, n in zip(grid.shape, new)]
    return np.array([[double[rows, columns].mean() for columns in bins[1]] for rows in bins[0]])


def bilinear(grid, new):
    """An array between whose elements one looks up linearly; beyond the outermost it goes on as they are."""
    down, across = (((np.arange(n) + 0.5) * o / n - 0.5).clip(0, o - 1) for o, n in zip(grid.shape, new))
    rows = np.array([np.interp(across, range(grid.shape[1]), row) for row in grid])
    return np.array([np.interp(down, range(grid.shape[0]), column) for column in rows.T]).T


DEFINITIONS = {"upsample": upsampled, "bilinear": bilinear}
GRIDS = pytest.mark.parametrize(
    "old, new", [(7, 10), (10, 14), (7, 14), (2, 3), (3, 2), (1, 4), (5, 1), (4, 4), ((6, 3), (7, 5)), ((2, 7), 4)]
)
METHODS = pytest.mark.parametrize("method", DEFINITIONS)


@METHODS
@GRIDS
@pytest.mark.parametrize("channels", [1, 5])
def test_the_definition(old, new, method, channels):
    (rows, columns), grid = both(old), both(new)
    x = np.random.default_rng(0).standard_normal((3, rows * columns, channels))
    y = F.resample(Tensor(x), old, new, method).numpy()
    expected = np.stack(
        [[DEFINITIONS[method](x[a, :, c].reshape(rows, columns), grid).reshape(-1) for c in range(channels)] for a in range(3)]
    )
    np.testing.assert_allclose(y, expected.transpose(0, 2, 1), rtol=1e-13, atol=1e-13)


@METHODS
@pytest.mark.parametrize("channels", [1, 5])
def test_the_class_token(method, channels):
    x = np.random.default_rng(0).standard_normal((3, 1 + 49, channels))
    patches = F.resample(Tensor(x[:, 1:].copy()), 7, 10, method).numpy()
    kept = F.resample(Tensor(x), 7, 10, method, "keep").numpy()
    assert np.array_equal(kept[:, 1:], patches) and np.array_equal(kept[:, 0], x[:, 0])
    zero = F.resample(Tensor(x), 7, 10, method, "zero").numpy()
    assert np.array_equal(zero[:, 1:], patches) and not zero[:, 0].any()


def test_the_same_grid_changes_nothing():
    x = np.random.default_rng(0).standard_normal((2, 36, 4))
    for method in DEFINITIONS:
        assert np.array_equal(F.resample(Tensor(x), 6, 6, method).numpy(), x)


def test_a_constant_stays():
    for method in ("upsample", "bilinear", "bicubic", "bicubic_antialias"):
        np.testing.assert_allclose(F.resample(Tensor(np.ones((1, 49, 2))), 7, 10, method).numpy(), 1, rtol=1e-14)


def test_macs_as_the_paper_counts():
    cost = OPS["resample"].cost
    old, new = (7, 7), (10, 10)
    assert (
        cost((4, 50, 48), old, new, "upsample", "zero").macs == cost((4, 50, 48), old, new, "upsample", "keep").macs == 2 * 4 * 14**2 * 48
    )
    assert cost((4, 36, 48), (5, 7), new, "upsample", "keep").macs == 2 * 4 * 10 * 14 * 48
    assert cost((4, 49, 48), old, new, "bilinear", "none").macs == 0


def test_bad_arguments_are_named():
    x = Tensor(np.zeros((2, 49, 3)))
    with pytest.raises(ValueError, match=r"resample: x has shape \(2, 49, 3\), not \(2, 50, 3\)"):
        F.resample(x, 7, 10, "upsample", "keep")
    with pytest.raises(ValueError, match="resample: class_token must be one of none, zero, keep, not 'drop'"):
        F.resample(x, 7, 10, "upsample", "drop")
    with pytest.raises(ValueError, match=r"method must be one of .*, not 'nearest'"):
        axis_matrix(7, 10, "nearest")
