"""The benchmark of a GPU, emulated."""

import json
import sys

import pytest

from benchmarks import gpu
from minivit.kernels.core import devices


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
