"""Differences across kinks, and gradients that are wrong beside one."""

import numpy as np
import pytest

from minivit.testing.differences import STEP, TOLERANCE, compare
from minivit.testing.result import CheckResult


@pytest.mark.parametrize("slope, passes", [(1.0, True), (1.0 + 10 * TOLERANCE, False), (0.5, False)])
def test_a_kink_within_a_step_is_no_wrong_gradient(slope, passes):
    x = np.array([0.3 * STEP, 1.0, -2.0])
    result = CheckResult()
    gradient = np.array([slope, 1.0, 0.0])
    compare(result, "relu", lambda: [np.maximum(x, 0)], [np.ones(3)], {"x": x}, {"x": gradient}, np.random.default_rng(0), 3, 3)
    assert result.directions == result.elements == 3
    assert bool(result.failure) is not passes
