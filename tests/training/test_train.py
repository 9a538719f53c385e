"""`train` from end to end on a small part of the digits."""

import errno
import inspect
import json
import os
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest

import minivit
from minivit import UserError, create_model, train
from minivit.io.run_folder import CONFIG, CURVES, METRICS, MODEL, REPORT, TABLE
from minivit.models import PRESETS
from minivit.sides import both
from minivit.training import loop
from minivit.training import train as train_module
from minivit.training.loop import Interrupted
from minivit.training.options import OF_A_PROCESS
from minivit.training.recipes import ADAMW_LR, MIXED, OTHERS, RECIPES, RESIZED, models_for, recipe_for
from minivit.training.trainer import TrainingError

SMALL = {"epochs": 2, "batch_size": 32, "limit": 96, "model_options": {"dim": 16, "depth": 1, "heads": 2}, "progress": False}


JAX_INIT = {"dim": 32, "depth": 1, "heads": 2, "init": "jax"}  # wider weights: a small model learns at once


def small(tmp_path, name="run", **options):
    return train(out=tmp_path / name, **SMALL | options)


def lines_of(run):
    return [json.loads(line) for line in (run.folder / METRICS).read_text().splitlines()]


def without_time(history):
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_second")} for line in history]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return small(tmp_path_factory.mktemp("train"))


def test_a_run_folder_holds_the_run(run):
    assert sorted(p.name for p in run.folder.iterdir()) == sorted((CONFIG, METRICS, MODEL, CURVES, TABLE, REPORT))
    assert lines_of(run) == run.history
    assert [list(line) for line in run.history] == [
        ["epoch", "train_loss", "test_loss", "test_accuracy", "balanced_accuracy", "learning_rate", "seconds", "images_per_second"]
    ] * 2
    assert [line["epoch"] for line in run.history] == [1, 2]
    assert run.test_accuracy == run.history[-1]["test_accuracy"]


def test_without_a_run_folder_nothing_is_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    unsaved = train(**SMALL, save=False)
    assert unsaved.folder is None and not list(tmp_path.iterdir())
    assert without_time(unsaved.history) == without_time(run.history)
    for name, value in run.model.state_dict().items():
        np.testing.assert_array_equal(unsaved.model.state_dict()[name], value)
    with pytest.raises(UserError, match="save=False writes no run folder: leave out, overwrite, resume and tensorboard out"):
        small(tmp_path, save=False)


def test_the_saved_model_is_the_tested_one(run):
    loaded, dataset = minivit.load(run.folder), minivit.load_data("digits")
    for model in (loaded, run.model):
        assert not model.training
        prediction = model.predict(dataset.test_images)
        chosen = np.linspace(0, len(dataset.test_labels), 96, endpoint=False).astype(int)
        assert (prediction.labels == dataset.test_labels)[chosen].mean() == run.test_accuracy
    assert loaded.class_names == tuple("0123456789")


def test_the_config_repeats_the_run_bit_for_bit(run, tmp_path):
    config = json.loads((run.folder / CONFIG).read_text())
    assert {"minivit", "python", "numpy", "numba", "model_config", "dataset", "class_names", "parameters"} <= config.keys()
    again = train(**config["arguments"], out=tmp_path / "again", progress=False)
    assert without_time(again.history) == without_time(run.history)
    for name, value in run.model.state_dict().items():
        np.testing.assert_array_equal(again.model.state_dict()[name], value)
    other = train(**config["arguments"] | {"seed": 1}, out=tmp_path / "other", progress=False)
    assert other.history[0]["train_loss"] != run.history[0]["train_loss"]


def test_the_config_names_every_argument(run):
    config = json.loads((run.folder / CONFIG).read_text())
    apart = {"minutes", "out", "overwrite", *OF_A_PROCESS}
    assert config["arguments"].keys() == inspect.signature(train).parameters.keys() - apart
    unset = ("limit", "class_weights", "momentum", "weights", "freeze")
    assert None not in [value for name, value in config["arguments"].items() if name not in unset]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"ema": 0.8, "model": "vit_nano_patch2_8", "cutmix": 0.2, "accumulate": 2, "drop_path": 0.1, "layer_decay": 0.8},
        {"optimizer": "sgd", "model": "vit_nano_patch2_8", "schedule": "constant", "lr": 0.1, "clip_norm": 0},
        {"momentum": 0.8, "ema": 0.8},
        {"optimizer": "adamw", "schedule": "cosine"},
        {"precision": "float64", "weight_decay": 0.1},
        {"model": "mixer_nano_patch2_8", "model_options": {"dim": 32, "depth": 1}},
    ],
    ids=lambda options: next(iter(options)),
)
def test_all_sorts_of_training_learn(tmp_path, options):
    easy = {"epochs": 8, "limit": 320, "lr": 1e-2, "mixup": 0, "augmentation": "none", "model_options": JAX_INIT}
    run = small(tmp_path, **easy | options)
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]
    assert run.test_accuracy > 0.3  # chance is 0.1
    loaded = minivit.load(run.folder)
    for name, value in run.model.state_dict().items():
        np.testing.assert_array_equal(loaded.state_dict()[name], value)


def test_the_model_fits_the_data(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (40, 12, 12, 3), np.uint8), np.arange(40) % 5
    run = train(
        "vit_nano_patch2_8", (images, labels), epochs=1, out=tmp_path / "run", progress=False, model_options={"dim": 16, "depth": 1}
    )
    config = run.model.config
    assert (config.image_size, config.in_channels, config.num_classes) == (12, 3, 5)
    assert run.model.class_names == tuple("01234")
    assert json.loads((run.folder / CONFIG).read_text())["arguments"]["batch_size"] == 30  # no more than there are images


def test_a_given_model_is_trained_further(tmp_path, run):
    given = minivit.load(run.folder)  # not the model of the other tests, which may run after this one
    before = given.state_dict()
    again = small(tmp_path, model=given, epochs=1, lr=1e-9, model_options=None, mixup=0)
    for name, value in again.model.state_dict().items():
        if "running_" in name:  # statistics follow the batches at any learning rate
            continue
        np.testing.assert_allclose(value, before[name], atol=1e-6)
    other = create_model("vit_nano_patch2_8", num_classes=3, dim=16, depth=1, heads=2)
    assert small(tmp_path, "other", model=other, epochs=1, model_options=None).model.config.num_classes == 10


@pytest.mark.parametrize(
    "options, message",
    [
        ({"model": "vit_nono_patch2_8"}, r"unknown model 'vit_nono_patch2_8' \(nearest: vit_nano_patch2_8"),
        ({"data": "digit"}, r"unknown dataset 'digit' \(nearest: digits"),
        ({"epochs": 0}, "epochs must be a whole number of at least 1, not 0"),
        ({"epochs": "2"}, "epochs must be a whole number, not '2'"),
        ({"seed": None}, "seed must be a whole number, not None"),
        ({"lr": "1e-3"}, "lr must be a number, not '1e-3'"),
        ({"overwrite": 2}, "overwrite must be true or false, not 2"),
        ({"data": "~nosuchuser/photos"}, "~nosuchuser/photos cannot be a path: "),
        ({"data": "a" * 300}, "a{100} cannot be a path: File name too long"),
        ({"lr": 0.0}, "lr must be above 0"),
        ({"lr": float("nan")}, "lr must be a number"),
        ({"warmup": 2.0}, "warmup must end before the last epoch"),
        ({"batch_size": 97}, "batch_size 97 is larger than the 96 images"),
        ({"accumulate": 0}, "accumulate must be 1 or more, got 0"),
        ({"schedule": "cosin"}, r"unknown schedule 'cosin' \(nearest: cosine\)"),
        ({"optimizer": "lion"}, "unknown optimizer 'lion'"),
        ({"augmentation": "flips"}, r"unknown augmentation 'flips' \(nearest: flip"),
        ({"precision": "bfloat61"}, "precision='bfloat61' is not available"),
        ({"device": "tpu"}, "device='tpu' is not available"),
        ({"seed": -1}, "seed must be"),
        ({"limit": 0}, "limit must be 1 or more"),
        ({"model": "vit_nano_patch2_8", "image_size": 9}, "patch_size must divide image_size: 9 is not a multiple of 2"),
        ({"model_options": {"dept": 3}}, r"has no option 'dept' \(nearest: depth"),
        ({"model": minivit.Module()}, "train other modules with a Trainer"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(tmp_path, options, message):
    with pytest.raises(UserError, match=message) as told:
        small(tmp_path, **options)
    assert "\n" not in str(told.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_exists_stays(run):
    before = {p.name: p.read_bytes() for p in run.folder.iterdir()}
    with pytest.raises(UserError, match="exists already"):
        train(out=run.folder, **SMALL)
    assert {p.name: p.read_bytes() for p in run.folder.iterdir()} == before


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupt_leaves_the_last_finished_epoch(tmp_path, monkeypatch, finished):
    whole = small(tmp_path, "whole", epochs=3)

    class Interrupting(loop.Progress):
        count = 0

        def step(self):
            self.count += 1
            if self.count == 3 * finished + 2:  # three steps an epoch
                raise KeyboardInterrupt

    monkeypatch.setattr(loop, "Progress", Interrupting)
    with pytest.raises(Interrupted, match=f"holds the model after {finished} of 3 epochs"):
        small(tmp_path, epochs=3)
    assert (tmp_path / "run" / METRICS).exists() == (tmp_path / "run" / CURVES).exists() == bool(finished)
    loaded = minivit.load(tmp_path / "run")
    assert len(loaded.predict(np.zeros((2, 8, 8, 1), np.uint8))) == 2
    if finished:
        assert without_time(map(json.loads, (tmp_path / "run" / METRICS).read_text().splitlines())) == without_time(whole.history[:1])


@pytest.mark.parametrize("good, holds", [(0, "no model"), (2, "the model after 0 of 2 epochs"), (7, "the model after 1 of 2 epochs")])
def test_a_disk_that_fills_leaves_the_last_finished_epoch(tmp_path, monkeypatch, good, holds):
    calls = []

    def fsync(descriptor, real=os.fsync):
        calls.append(descriptor)
        if len(calls) > good:  # config and model; config, metrics and model of the first epoch; then of the second
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match=rf"cannot write .*: No space left on device.*; .*/run holds {holds}$"):
        small(tmp_path)
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == [[], [CONFIG, MODEL], [CONFIG, METRICS, MODEL]][(good > 0) + (good > 2)]
    if good:
        assert len(minivit.load(tmp_path / "run").predict(np.zeros((2, 8, 8, 1), np.uint8))) == 2


def test_a_run_folder_that_vanishes_is_made_again_whole(tmp_path, monkeypatch):
    class Deleting(loop.Progress):
        def epoch(self, line):
            if line["epoch"] == 1:
                shutil.rmtree(tmp_path / "run")

    monkeypatch.setattr(loop, "Progress", Deleting)
    run = small(tmp_path)
    assert sorted(p.name for p in run.folder.iterdir()) == sorted((CONFIG, METRICS, MODEL, CURVES, TABLE, REPORT))
    assert lines_of(run) == run.history and len(run.history) == 2


def test_a_run_folder_that_vanishes_at_the_end_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Progress, "epoch", lambda self, line: shutil.rmtree(tmp_path / "run"))
    with pytest.raises(UserError, match=r"run was deleted or moved while the model was trained"):
        small(tmp_path)
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_leaves_the_run_usable(tmp_path):
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step .*/run holds the model after \d of 3 epochs"):
        small(tmp_path, optimizer="sgd", lr=1e30, clip_norm=0, epochs=3, warmup=0)
    for value in minivit.load(tmp_path / "run").state_dict().values():
        assert np.isfinite(value).all()


def test_weights_that_the_last_step_breaks_replace_no_good_ones(tmp_path):
    broken = r"(is not finite|the test loss is (nan|inf)) at the end of an epoch.*run holds the model after 0 of 1 epochs"
    with pytest.raises(TrainingError, match=broken):
        small(tmp_path, optimizer="sgd", lr=1e30, clip_norm=0, epochs=1, warmup=0, batch_size=96, mixup=0, augmentation="none")
    for value in minivit.load(tmp_path / "run").state_dict().values():
        assert np.isfinite(value).all()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_lines_where_there_is_no_terminal(tmp_path, capsys):
    small(tmp_path, progress=True)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert [line for line in lines if line.startswith("epoch 2/2  train loss ")]
    assert any(line.startswith("digits: 96 training and 96 test images") for line in lines)
    small(tmp_path, "quiet", progress=False)
    assert capsys.readouterr() == ("", "")


def test_a_bar_on_a_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    small(tmp_path, progress=True)
    err = capsys.readouterr().err
    assert "6/6" in err and "epoch 2/2, train loss" in err
    assert "images/s" not in err


def test_a_line_tells_that_kernels_are_compiled(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_module, "has_compiled_kernels", lambda: False)
    small(tmp_path, progress=True)
    assert "compiling kernels for this machine" in capsys.readouterr().err


def test_recipes():
    assert recipe_for("digits", 1438, 8) == replace(RECIPES["digits"], model="localvit_micro_patch2_8")
    photos = replace(OTHERS, progressive_resizing=RESIZED)
    assert recipe_for("photos", 10_000, 32) == replace(photos, epochs=60, **MIXED)
    assert recipe_for("photos", 10_000, 32, epochs=29) == replace(photos, epochs=29)
    assert recipe_for("photos", 10_000, 32, epochs=30) == replace(photos, epochs=30, **MIXED)
    assert recipe_for("photos", 10_000, 32, cutmix=0.0).cutmix == 0
    few = recipe_for("photos", 10, 32, epochs=1)
    assert (few.batch_size, few.warmup) == (10, 0.2)
    assert recipe_for("digits", 1438, 8, mixup=0.5, lr=None).mixup == 0.5
    assert (
        recipe_for("photos", 100, 32, optimizer="sgd").lr == ADAMW_LR and recipe_for("photos", 100, 32, optimizer="sgd", lr=0.1).lr == 0.1
    )
    assert [recipe_for("x", images, 32).epochs for images in (10**7, 50_000, 20_000, 10)] == [10, 12, 30, 100]


@pytest.mark.parametrize("size", (8, 15, 16, 28, 32, 47, 48, (32, 64), 96, 128, 224))
def test_default_models_suit_the_size_of_the_images(size):
    for name in models_for(size):
        patch, image = PRESETS[name].presets[name]["patch_size"], PRESETS[name].presets[name]["image_size"]
        assert 0.4 <= max(both(size)) / image <= 2.1 and image // patch in (4, 8, 12)
