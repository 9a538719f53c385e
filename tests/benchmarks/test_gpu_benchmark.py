"""The benchmark of a GPU, emulated."""

import json
import sys

import numpy as np
import pytest

from benchmarks import gpu
from minivit.kernels import OPS
from minivit.kernels.core import devices
from minivit.kernels.core.cases import letters, total_elements


@pytest.mark.slow
def test_gpu(cuda_runtime, tmp_path, capsys):
    with devices.using(cuda_runtime):
        assert gpu.main(["--tiny", "--json", str(tmp_path / "gpu.json")]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert result["machine"]["gpu"] == cuda_runtime.name and not result["failures"] and 0 <= result["curve_distance"] < 1e-3
    assert {(e["op"], e["direction"]) for e in result["kernels"]} >= {
        ("attention", "forward"),
        ("attention", "backward"),
        ("adamw", "forward"),
    }
    for entry in result["kernels"]:
        assert entry["seconds"] > 0 and entry["bytes"] > 0 and entry["launches"] > 0
    (step,) = result["steps"]
    assert step["minivit"]["host"] > 0 and step["minivit"]["seconds"] > 0 and step["minivit"]["memory"] > 0
    assert (tmp_path / "gpu.png").exists() and "vit_nano_patch2_8" in capsys.readouterr().out


def test_without_a_gpu_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(devices, "_runtime", None)
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert gpu.main([]) == 0 and capsys.readouterr().out.startswith("nothing measured: device='cuda' needs CuPy")


def test_large_random_arrays_repeat_one_block():
    numbers = gpu.Repeated().standard_normal((3, gpu.Repeated.BLOCK))
    assert numbers.dtype == np.float32 and abs(numbers.std() - 1) < 0.01
    np.testing.assert_array_equal(numbers[0], numbers[2])
    assert gpu.Repeated().integers(0, 10, 5).shape == (5,)


@pytest.mark.parametrize("name", OPS)
def test_cases_grow_until_they_are_large_enough(name):
    """Also where the first letter does not make any array larger, as in a broadcast, whose input has a length of 1 there."""
    op, size = OPS[name], 1 << 24
    for case in op.cases:
        large = gpu.grown(op, case, size)
        stuck = [total_elements(op, large | {letter: 2 * n}) <= total_elements(op, large) for letter, n in letters(op, large).items()]
        assert 2 * total_elements(op, large) >= size or all(stuck)
        assert large == dict(case) or total_elements(op, large) < 9 * size
