"""A validation part: which weights are kept, and when the test images are looked at."""

import json

import numpy as np
import pytest

import minivit
from minivit import UserError, train
from minivit.cli import main
from minivit.data import load_data
from minivit.io.run_folder import CONFIG, METRICS, RunFolder
from minivit.training import loop

OPTIONS = {
    "model": "vit_nano_patch2_8",
    "epochs": 6,
    "batch_size": 32,
    "limit": 160,
    "seed": 2,
    "lr": 0.05,  # so much that accuracy goes up and down
    "schedule": "constant",
    "model_options": {"dim": 16, "depth": 1, "heads": 2},
    "validation_fraction": 0.25,
    "progress": False,
}


def accuracy(model, images, labels):
    return float((model.predict(images).labels == labels).mean())


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(out=tmp_path_factory.mktemp("validation") / "run", **OPTIONS)


def test_the_weights_that_did_best_are_kept(run):
    *lines, last = run.history
    best = max(line["validation_accuracy"] for line in lines)
    assert last["validation_accuracy"] == best > lines[-1]["validation_accuracy"]  # so others are kept than the last ones
    assert last["epoch"] == [line["epoch"] for line in lines if line["validation_accuracy"] == best][-1]
    data = load_data("digits").limited(OPTIONS["limit"]).validating(0.25, 0)
    loaded = minivit.load(run.folder)
    for model in (run.model, loaded):
        assert accuracy(model, data.test_images, data.test_labels) == best
        for name, value in run.model.state_dict().items():
            np.testing.assert_array_equal(model.state_dict()[name], value)


def test_the_test_images_are_looked_at_once(run, tmp_path, monkeypatch):
    data = load_data("digits").limited(OPTIONS["limit"])
    *lines, last = run.history
    assert not any("test_accuracy" in line for line in lines)
    assert run.test_accuracy == last["test_accuracy"] == accuracy(run.model, data.test_images, data.test_labels)
    tested = []
    monkeypatch.setattr(loop, "evaluate", lambda *given, original=loop.evaluate: tested.append(given[1]) or original(*given))
    train(out=tmp_path / "run", **OPTIONS | {"epochs": 2})
    np.testing.assert_array_equal(tested[-1], data.test_images)
    assert [len(images) for images in tested] == [41, 41, 160]


def test_the_parts_are_disjoint_and_whole():
    data = load_data("digits")
    parts = data.validating(0.1, 3)
    together = np.concatenate([parts.train_images, parts.test_images]).reshape(len(data.train_images), -1)
    assert sorted(map(bytes, together)) == sorted(map(bytes, data.train_images.reshape(len(data.train_images), -1)))
    assert np.bincount(parts.test_labels).min() >= 10 and parts.train_labels.shape == parts.train_images.shape[:1]


def test_its_folder_is_read_and_repeated(run, tmp_path, capsys):
    config = json.loads((run.folder / CONFIG).read_text())
    assert config["arguments"]["validation_fraction"] == 0.25 and "160 training" in config["dataset"]
    assert RunFolder(run.folder).read_metrics() == run.history
    again = train(**config["arguments"], out=tmp_path / "again", progress=False)
    assert [line["validation_loss"] for line in again.history] == [line["validation_loss"] for line in run.history]
    assert main(["plot", str(run.folder), "--out", str(tmp_path / "pictures")]) == 0
    capsys.readouterr()
    assert main(["eval", str(run.folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["test_accuracy"] == run.test_accuracy


def test_a_stopped_run_holds_the_best_so_far(run, tmp_path, monkeypatch):
    tests = []

    def stop(*given, original=loop.evaluate):
        tests.append(given)
        if len(tests) == 5:
            raise KeyboardInterrupt
        return original(*given)

    monkeypatch.setattr(loop, "evaluate", stop)
    with pytest.raises(loop.Interrupted, match="holds the model after 4 of 6 epochs"):
        train(out=tmp_path / "run", **OPTIONS)
    lines = RunFolder(tmp_path / "run").read_metrics()
    assert [line["validation_loss"] for line in lines] == [line["validation_loss"] for line in run.history[:4]]
    data = load_data("digits").limited(OPTIONS["limit"]).validating(0.25, 0)
    best = max(line["validation_accuracy"] for line in lines)
    assert accuracy(minivit.load(tmp_path / "run"), data.test_images, data.test_labels) == best


def test_averaged_weights_are_kept(tmp_path):
    run = train(out=tmp_path / "run", **OPTIONS | {"ema": 0.9, "epochs": 3})
    data = load_data("digits").limited(OPTIONS["limit"]).validating(0.25, 0)
    assert accuracy(run.model, data.test_images, data.test_labels) == run.history[-1]["validation_accuracy"]


def test_progress_names_the_part(tmp_path, capsys):
    train(out=tmp_path / "run", **OPTIONS | {"epochs": 1, "progress": True})
    shown = capsys.readouterr().err
    assert "41 of the training images decide which weights are kept" in shown and "validation accuracy" in shown
    assert "test accuracy" not in shown


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation_fraction": 1.0}, "validation_fraction must be 0"),
        ({"validation_fraction": -0.1}, "validation_fraction must be 0"),
        ({"limit": 2}, "none of the 2 images can be held out: each class needs two or more"),
    ],
)
def test_fractions_that_cannot_be(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        train(out=tmp_path / "run", **OPTIONS | options)
    assert not (tmp_path / "run").exists()


def test_classes_of_unequal_size_are_told(tmp_path, capsys):
    data = load_data("digits")
    few = np.concatenate([np.flatnonzero(data.train_labels == k)[: 30 if k else 9] for k in range(10)])
    arrays = {"train_images": data.train_images[few], "train_labels": data.train_labels[few]}
    np.savez(tmp_path / "few.npz", **arrays, test_images=data.test_images[:50], test_labels=data.test_labels[:50])
    options = {key: value for key, value in OPTIONS.items() if key not in ("limit", "validation_fraction")} | {
        "epochs": 1,
        "progress": True,
    }
    for name, weights in (("told", None), ("weighted", "balanced")):
        train(data=tmp_path / "few.npz", out=tmp_path / name, class_weights=weights, **options)
        assert ("1 has 30 training images, 0 9; with class_weights='balanced'" in capsys.readouterr().err) == (weights is None)
    assert len((tmp_path / "told" / METRICS).read_text().splitlines()) == 1
