"""The README's worked examples run as they stand."""

import importlib.util
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import minivit
from minivit.kernels.core import devices
from minivit.kernels.core.cases import Sample, make_inputs, shrunk
from minivit.kernels.cuda import kernel as cuda
from minivit.testing.checks import check_op
from minivit.testing.numerics import check_accuracy
from minivit.testing.result import CheckResult

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def example(marker: str) -> str:
    found = re.search(rf"<!-- {marker} -->\n```\w+\n(.*?)```", README, re.DOTALL)
    assert found, f"the README has no example marked {marker}"
    return found[1]


def load(code: str, name: str, folder: Path):
    """Import code as the module of that dotted name, from a file, as Numba's cache wants."""
    path = folder / f"{name.rpartition('.')[2]}.py"
    path.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_op(tmp_path, monkeypatch):
    name = "minivit.kernels.square"
    module = load(example("op"), name, tmp_path)
    monkeypatch.delitem(sys.modules, name)
    reports = check_op(module.square)
    assert reports and all(report.passed for report in reports)


def test_an_op_on_cuda(tmp_path, monkeypatch, cuda_runtime):
    name = "minivit.kernels.square"
    square = load(example("op"), name, tmp_path).square
    monkeypatch.delitem(sys.modules, name)
    shutil.copytree(cuda.FOLDER / "cuda", tmp_path / "cuda")
    (tmp_path / "square.cu").write_text(example("op-cuda"))
    monkeypatch.setattr(cuda, "FOLDER", tmp_path)
    with devices.using(cuda_runtime):
        for case in square.cases:
            for dtype in ("float32", "float64", "bfloat16"):
                rng, result = np.random.default_rng(0), CheckResult()
                check_accuracy(Sample(square, *make_inputs(square, shrunk(square, case), dtype, rng)), "cuda", rng, result)
                assert not result.failure


def test_a_model(tmp_path):
    from minivit.models import registry

    name = "minivit.models.patch_mlp"
    try:
        load(example("model"), name, tmp_path)
        model = minivit.create_model("patch_mlp_nano_8", seed=1)
        images = np.random.default_rng(0).standard_normal((32, 1, 8, 8), np.float32)
        labels = np.arange(32) % 10
        trainer = minivit.Trainer(model, lr=1e-2)
        losses = [trainer.step(images, labels) for _ in range(30)]
        assert losses[-1] < losses[0] / 2
    finally:
        sys.modules.pop(name, None)
        registry.FAMILIES.pop("patch_mlp", None)
        registry.PRESETS.pop("patch_mlp_nano_8", None)


def test_the_python_call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("python"), names)
    assert names["answer"].probabilities.shape == (3, 10)
    assert np.isfinite(names["loss"])
    assert "%" in capsys.readouterr().out


def test_the_cascade(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(example("cascade"), names)
    assert names["calibration"].budgets == (0.3, 0.5, 1.0) and names["answer"].exits.tolist() == [1] * 4
    assert minivit.load(names["run"].folder).model.calibration == names["calibration"]


@pytest.mark.parametrize("marker", ["first-line", "test-line"])
def test_the_lines_to_paste_are_one_line(marker):
    assert len(example(marker).splitlines()) == 1
