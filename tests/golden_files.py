"""Reference results in tests/golden, computed by other people's code in float64."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

GOLDEN = Path(__file__).parent / "golden"


def golden_path(name):
    """The file's path; skips the test where it is absent."""
    path = GOLDEN / name
    if not path.is_file():
        pytest.skip(f"tests/golden/{name} is absent")
    return path


def read_golden(name):
    """(arrays by name, configuration) of a golden .safetensors, or an .npz with its .json."""
    path = golden_path(name)
    if path.suffix == ".npz":
        with np.load(path) as file:
            return dict(file), json.loads(golden_path(path.with_suffix(".json").name).read_text())
    with safe_open(path, "np") as file:
        return file.get_tensors(), json.loads(file.metadata()["config"])


def part(arrays, prefix):
    """The arrays below a prefix, without it."""
    return {name[len(prefix) :]: array for name, array in arrays.items() if name.startswith(prefix)}


def assert_matches(given, expected, name, tolerance=1e-9):
    """Equal to a relative 1e-9 element by element; what is zero but for rounding, to that of the array's or the loss's size."""
    assert given.shape == expected.shape, name
    size = max(np.abs(expected).max(), 1e-2)
    np.testing.assert_allclose(given, expected, rtol=tolerance, atol=1e-3 * tolerance * size, err_msg=name)
