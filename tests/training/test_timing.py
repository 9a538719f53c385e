"""`minutes`: as many epochs as there is time for."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minivit import Trainer, UserError, create_model, train
from minivit.data import Batches
from minivit.io.run_folder import CONFIG
from minivit.training import progress_bar, setup, timing
from minivit.training.progress_bar import duration
from minivit.training.timing import INFERENCE, MARGIN, fitting, step_seconds

SMALL = {
    "model": "vit_nano_patch2_8",
    "batch_size": 32,
    "limit": 96,
    "model_options": {"dim": 16, "depth": 1, "heads": 2},
    "progress": False,
}


def batches(images=64, batch_size=16):
    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (images, 8, 8, 1), np.uint8), rng.integers(0, 10, images)
    return Batches(pixels, labels, batch_size=batch_size, num_classes=10, mean=(0.5,), std=(0.5,))


@given(seconds=st.floats(1, 1e5), a_step=st.floats(1e-4, 1), tests=st.integers(1, 3000))
def test_what_fits_is_within_the_time_and_uses_it(seconds, a_step, tests):
    epoch, test = 4 * a_step, a_step * INFERENCE * tests / 16
    if MARGIN * seconds < epoch + test:
        with pytest.raises(UserError, match="minutes is too short"):
            fitting(seconds, epoch, test)
        return
    epochs, test_every = fitting(seconds, epoch, test)
    number = -(-epochs // test_every)  # of tests
    assert epochs >= 1 and 1 <= test_every <= epochs
    assert epochs * epoch + number * test <= MARGIN * seconds * (1 + 1e-9)
    assert number == 1 or number * test <= timing.TEST_SHARE * seconds or epochs == number
    assert (epochs + 1) * epoch + (number + 1) * test > 0.9 * MARGIN * seconds - 2 * (epoch + test)


def test_a_measured_trainer_is_as_it_was():
    trainer = Trainer(create_model("vit_nano_patch2_8", dim=16, depth=1, heads=2, seed=0), optimizer="muon", lr=0.01)
    before = trainer.flat.data.copy()
    assert 0 < step_seconds(trainer, batches()) < 1
    assert trainer.steps == 0 and not trainer.plans
    np.testing.assert_array_equal(trainer.flat.data, before)


def test_a_run_of_minutes_is_repeated_by_its_config(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "step_seconds", lambda *given: 0.6)
    first = train(minutes=0.5, out=tmp_path / "first", **SMALL | {"progress": True})
    assert "images/s here, so" in capsys.readouterr().err
    arguments = json.loads((first.folder / CONFIG).read_text())["arguments"]
    assert arguments["epochs"] >= 4 and arguments["test_every"] > 1
    assert [line["epoch"] for line in first.history][-1] == arguments["epochs"]
    assert len(first.history) == -(-arguments["epochs"] // arguments["test_every"])
    again = train(**arguments, out=tmp_path / "again", progress=False)
    for name, parameter in first.model.named_parameters():
        np.testing.assert_array_equal(parameter.numpy(), dict(again.model.named_parameters())[name].numpy())
    assert [line["test_loss"] for line in again.history] == [line["test_loss"] for line in first.history]


def test_a_line_stands_for_the_epochs_since_the_test_before(tmp_path):
    every = train(epochs=5, out=tmp_path / "every", **SMALL)
    some = train(epochs=5, test_every=2, out=tmp_path / "some", **SMALL)
    assert [line["epoch"] for line in some.history] == [2, 4, 5]
    for line, epochs in zip(some.history, ((0, 1), (2, 3), (4,))):
        assert line["train_loss"] == pytest.approx(np.mean([every.history[k]["train_loss"] for k in epochs]))
        assert line["test_loss"] == every.history[epochs[-1]]["test_loss"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"minutes": 0}, "minutes must be above 0"),
        ({"minutes": float("nan")}, "minutes"),
        ({"minutes": 1.0, "epochs": 2}, "minutes or epochs, not both"),
        ({"minutes": 1e-6}, "minutes is too short: an epoch and a test take"),
        ({"epochs": 2, "test_every": 0}, "test_every must be 1 or more"),
        ({"epochs": 2, "schedule": "cosin"}, "unknown schedule 'cosin' \\(nearest: cosine\\)"),
        ({"epochs": 2, "optimizer": "moun"}, "unknown optimizer 'moun' \\(nearest: muon\\)"),
    ],
)
def test_what_cannot_be_is_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(out=tmp_path / "run", **SMALL | options)
    assert not (tmp_path / "run").exists()


def test_durations():
    assert [duration(seconds) for seconds in (0.4, 99, 100, 5999, 9000)] == ["0 s", "99 s", "2 min", "100 min", "2.5 h"]


def test_a_line_tells_how_long_all_will_take(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(progress_bar, "MEASURED", 2)
    for epochs, told in ((5, False), (9, True)):
        train(epochs=epochs, out=tmp_path / str(epochs), **SMALL | {"progress": True})
        lines = capsys.readouterr().err.splitlines()
        assert any(line.startswith(f"{epochs} epochs: about ") for line in lines) == told
        assert [" left" in line for line in lines if line.startswith("epoch ")] == [True] * (epochs - 1) + [False]


def test_a_larger_model_is_trained_where_there_is_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setup, "step_seconds", lambda *given: 0.6)
    options = {"limit": 64, "batch_size": 32, "minutes": 0.2, "model_options": {"dim": 16, "depth": 1, "heads": 2}}
    for enough, name in ((1, "localvit_midi_patch2_8"), (100, "localvit_micro_patch2_8")):
        monkeypatch.setattr(setup, "ENOUGH", enough)
        assert train(out=tmp_path / name, **options).model.unwrapped().name == name
        assert f"{name}: 53 images/s here, so" in capsys.readouterr().err
