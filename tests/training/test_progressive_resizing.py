"""Images that are smaller in the first epochs."""

import json

import numpy as np
import pytest

import minivit
from minivit import UserError, create_model, train
from minivit.io.run_folder import CONFIG
from minivit.training import progress_bar
from minivit.training.recipes import RESIZED, SIDES, recipe_for
from minivit.training.trainer import Trainer

OPTIONS = {
    "model": "localvit_micro_patch4_32",
    "model_options": {"dim": 16, "depth": 1, "heads": 2, "stem_width": 4},
    "epochs": 6,
    "batch_size": 16,
    "progressive_resizing": 0.65,
    "progress": False,
}


@pytest.fixture(scope="module")
def data():
    """Four classes of images, each with a colour of its own, (images, labels)."""
    rng = np.random.default_rng(0)
    labels = np.arange(80) % 4
    colours = rng.integers(40, 216, (4, 3))
    return np.clip(rng.normal(colours[labels][:, None, None], 30, (80, 32, 32, 3)), 0, 255).astype(np.uint8), labels


@pytest.fixture
def sizes(monkeypatch):
    """The sides of the images of each step, as they are trained."""
    seen = []
    submit = Trainer.submit

    def spy(self, images, labels):
        seen.append(images.shape[2])
        return submit(self, images, labels)

    monkeypatch.setattr(Trainer, "submit", spy)
    return seen


@pytest.mark.parametrize("test_every", [1, 4])
def test_images_grow(data, sizes, tmp_path, capsys, test_every):
    run = train(data=data, out=tmp_path / "run", **OPTIONS | {"progress": True, "test_every": test_every})
    assert sizes == [16] * 2 * 4 + [24] * 2 * 4 + [32] * 2 * 4  # of 64 images in batches of 16
    assert "epochs up to 2: images of 16×16 pixels" in capsys.readouterr().err
    assert run.model.config.image_size == 32 and run.test_accuracy > 0.5
    assert (run.model.predict(data[0]).labels == data[1]).mean() > 0.5


def test_each_phase_begins_with_the_weights_of_the_one_before(data, tmp_path, monkeypatch):
    taken = []
    take = minivit.models.base.Model.take_weights

    def spy(self, other):
        take(self, other)
        taken.append((self, other, self.state_dict(), other.state_dict()))

    monkeypatch.setattr(minivit.models.base.Model, "take_weights", spy)
    run = train(data=data, out=tmp_path / "run", **OPTIONS | {"test_every": 6})
    taken = taken[2:]  # the first two only tell whether it can be
    assert [(mine.config.image_size, theirs.config.image_size) for mine, theirs, *_ in taken] == [(24, 16), (32, 24)]
    for _, _, mine, theirs in taken:
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if mine[name].shape != theirs[name].shape] == ["pos_embed"]
        for name in mine.keys() - {"pos_embed"}:
            np.testing.assert_array_equal(mine[name], theirs[name])
        assert np.corrcoef(mine["pos_embed"].mean((0, 1)), theirs["pos_embed"].mean((0, 1)))[0, 1] > 0.9
    assert run.history[-1]["epoch"] == 6


def test_a_test_of_an_early_phase_is_of_the_whole_images(data, tmp_path):
    """What is saved after the first epochs does what the line says."""
    run = train(data=data, out=tmp_path / "run", **OPTIONS | {"epochs": 3, "ema": 0.5})
    assert [line["epoch"] for line in run.history] == [1, 2, 3]
    stopped = []
    save = minivit.io.run_folder.RunFolder.save

    def stop(self, save_model, line):
        save(self, save_model, line)
        stopped.append(line)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minivit.io.run_folder.RunFolder, "save", stop)
        train(data=data, out=tmp_path / "stopped", **OPTIONS | {"epochs": 3, "ema": 0.5})
    model = minivit.load(tmp_path / "stopped")
    assert model.config.image_size == 32 and stopped[0]["test_loss"] == run.history[0]["test_loss"]
    dataset = minivit.load_data(data)
    right = (model.predict(dataset.test_images).labels == dataset.test_labels).mean()
    assert right == stopped[0]["test_accuracy"]


def test_the_time_left_counts_what_larger_images_take(monkeypatch, capsys):
    times = iter(range(100))
    monkeypatch.setattr(progress_bar, "perf_counter", lambda: float(next(times)))
    monkeypatch.setattr(progress_bar, "MEASURED", 2)
    progress = progress_bar.Progress(True, [1, 1, 2, 2], 20)
    for _ in range(3):
        progress.step()
    assert "4 epochs: about 60 s, and" in capsys.readouterr().err  # two steps a second, 20 in an epoch, six times the first epoch
    line = {"epoch": 2, "train_loss": 1.0, "test_loss": 1.0, "test_accuracy": 0.5, "images_per_second": 1.0}
    progress.epoch(line)
    assert "4 s left" in capsys.readouterr().err


def test_a_run_is_repeated_by_its_config(data, tmp_path):
    first = train(data=data, out=tmp_path / "first", **OPTIONS)
    arguments = json.loads((first.folder / CONFIG).read_text())["arguments"]
    again = train(**arguments | {"data": data}, out=tmp_path / "again", progress=False)
    assert [line["test_loss"] for line in again.history] == [line["test_loss"] for line in first.history]


@pytest.mark.parametrize("epochs, expected", [(1, [32]), (2, [16, 32]), (3, [16, 24, 32]), (4, [16, 24, 24, 32])])
def test_few_epochs_end_with_whole_images(data, sizes, tmp_path, epochs, expected):
    train(data=data, out=tmp_path / "run", **OPTIONS | {"epochs": epochs})
    assert sizes[::4] == expected


def test_the_default_is_for_the_default_models_and_square_images_that_are_not_small():
    assert SIDES == (0.5, 0.75)
    for name, size, model, share in (
        ("photos", 64, None, RESIZED),
        ("photos", 64, "localvit_mini_patch8_64", RESIZED),
        ("photos", 64, "vit_tiny_patch4_32", 0),
        ("photos", (64, 96), None, 0),
        ("photos", 16, None, 0),
        ("digits", 32, None, 0),
    ):
        assert recipe_for(name, 1000, size, model=model).progressive_resizing == share


def test_weights_are_taken_by_other_families_too():
    for name in ("vit_tiny_patch4_32", "t2t_vit_tiny_32", "crossvit_tiny_32"):
        small, large = (create_model(name, image_size=size, seed=size) for size in (24, 32))
        large.take_weights(small)
        assert all(np.isfinite(value).all() for value in large.state_dict().values())
        trained = {key for key, parameter in large.named_parameters() if parameter.requires_grad}
        same = {key for key in trained if large.state_dict()[key].shape == small.state_dict()[key].shape}
        for key in same:
            np.testing.assert_array_equal(large.state_dict()[key], small.state_dict()[key])


def test_what_cannot_be_is_named(data, tmp_path):
    images, labels = data
    model = create_model("localvit_micro_patch4_32", num_classes=4)
    for given, changes in (((images, labels), {"model": model, "model_options": None}), ((images[:, :24], labels), {})):
        with pytest.raises(UserError, match="progressive_resizing is for a model given by name, and square images"):
            train(data=given, out=tmp_path / "run", **OPTIONS | changes)
    for name in ("mixer_nano_patch2_8", "ff_only_nano_patch2_8"):
        with pytest.raises(UserError, match=f"progressive_resizing is not for {name}, whose weights depend on the size"):
            train(data=data, out=tmp_path / "run", **OPTIONS | {"model": name, "model_options": {"dim": 16, "depth": 1}})
    with pytest.raises(UserError, match="progressive_resizing must be a number"):
        train(data=data, out=tmp_path / "run", **OPTIONS | {"progressive_resizing": 1.0})
    assert not (tmp_path / "run").exists()
