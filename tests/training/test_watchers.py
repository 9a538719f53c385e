"""Functions and files that tell of a training."""

import csv
import sys

import numpy as np
import pytest
from stopped_runs import SMALL, VIT, stopped

from minivit import UserError, train
from minivit.io.run_folder import TABLE, RunFolder


def test_functions_are_told_of_steps_and_epochs(tmp_path, monkeypatch):
    steps, epochs = [], []
    tell = {"on_step": steps.append, "on_epoch": epochs.append}
    run = train(**SMALL | VIT, out=tmp_path / "whole", **tell)
    assert epochs == run.history
    assert [(step["step"], step["epoch"]) for step in steps] == [(k + 1, k // 3 + 1) for k in range(9)]
    for line in run.history:
        own = [step for step in steps if step["epoch"] == line["epoch"]]
        assert np.mean([step["loss"] for step in own]) == pytest.approx(line["train_loss"])
        assert own[-1]["learning_rate"] == line["learning_rate"]
    told, steps[:], epochs[:] = [*steps], [], []
    stopped(monkeypatch, tmp_path / "run", 4, **VIT, **tell)
    train(resume=tmp_path / "run", progress=False, **tell)
    assert steps == told  # each once, as no checkpoint was lost
    assert [line["epoch"] for line in epochs] == [1, 2, 3]


def test_an_error_of_a_function_ends_the_run(tmp_path):
    def fail(told):
        if told.get("step", 5) == 5:
            raise ZeroDivisionError("of the function")

    for name in ("on_step", "on_epoch"):
        with pytest.raises(ZeroDivisionError, match="of the function"):
            train(**SMALL | VIT, out=tmp_path / name, **{name: fail})
        assert len(RunFolder(tmp_path / name).read_metrics()) == 1
        train(resume=tmp_path / name, progress=False)
    with pytest.raises(UserError, match="on_step must be a Callable, not 3"):
        train(**SMALL, out=tmp_path / "other", on_step=3)


def test_a_table_of_the_history(tmp_path):
    run = train(**SMALL | {"model": "dvt_nano_8", "model_options": None, "epochs": 1, "validation_fraction": 0.25}, out=tmp_path / "run")
    with open(tmp_path / "run" / TABLE, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [float(line["train_loss"]) for line in lines] == [line["train_loss"] for line in run.history]
    assert lines[0]["test_accuracy"] == "" and float(lines[1]["test_accuracy"]) == run.test_accuracy
    exits = run.history[0]["exit_accuracies"]
    assert [float(lines[0][f"exit_accuracies_{k + 1}"]) for k in range(len(exits))] == exits


def events(folder):
    """{tag: [(step, value)]} that TensorBoard shows of its files in a folder: the start of a process hides later steps told before."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            if event.session_log.status == SessionLog.START:
                found = {tag: [(step, value) for step, value in told if step < event.step] for tag, told in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + size :]
    return found


def test_tensorboard(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    run = train(**SMALL | VIT, out=tmp_path / "run", tensorboard=True)
    found = events(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["step/loss"]] == [*range(1, 10)]
    assert [step for step, _ in found["epoch/test_loss"]] == [3, 6, 9]
    np.testing.assert_allclose([value for _, value in found["epoch/test_loss"]], [line["test_loss"] for line in run.history], rtol=1e-6)


def test_tensorboard_hides_a_run_that_was_replaced(tmp_path):
    pytest.importorskip("tensorboardX")
    train(**SMALL | VIT | {"epochs": 2}, out=tmp_path / "run", tensorboard=True)
    run = train(**SMALL | VIT | {"epochs": 1, "seed": 5}, out=tmp_path / "run", tensorboard=True, overwrite=True)
    found = events(tmp_path / "run" / "tensorboard")
    assert [step for step, _ in found["step/loss"]] == [1, 2, 3]
    assert found["epoch/test_loss"] == [(3, pytest.approx(run.history[0]["test_loss"]))]


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(UserError, match=r"tensorboard needs tensorboardX .*: pip install 'minivit\[tensorboard\]'"):
        train(**SMALL, out=tmp_path / "run", tensorboard=True)
    assert not (tmp_path / "run").exists()
