"""Which images are tested where data is given: all of other data, and of the run's own data the part that the run kept for testing."""

import json

import numpy as np
import pytest
from PIL import Image

import minivit
from minivit.errors import UserError
from minivit.inference.run_data import data_of_run


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Class folders without a split, 12 images in each."""
    root = tmp_path_factory.mktemp("data") / "photos"
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(12):
            Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(photos, tmp_path_factory):
    """A run that kept a third of them for testing, by a seed that is not the default."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    minivit.train("vit_nano_patch2_8", photos, test_fraction=1 / 3, split_seed=5, epochs=1, progress=False, out=folder)
    return folder


def data_of(run, data=None, **options):
    return data_of_run(run, minivit.load(run), data, progress=False, **options)


def test_the_own_data_keeps_the_split_of_the_run(run, photos, monkeypatch):
    own = minivit.load_data(photos, test_fraction=1 / 3, split_seed=5, progress=False)
    monkeypatch.chdir(photos.parent)
    (photos.parent / "link").symlink_to(photos)
    for data in (None, str(photos), "photos", photos.parent / "link", f"{photos}/../photos/"):
        dataset = data_of(run, data)
        np.testing.assert_array_equal(dataset.test_images, own.test_images)
        assert dataset.test_part() == "8 test images of photos"


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_data_that_has_changed_is_not_split_again(form, tmp_path):
    """With more images, chance would choose others, among them images of the training."""
    images = np.random.default_rng(2).integers(0, 256, (40, 8, 8, 3), np.uint8)
    labels = np.arange(40) % 2

    def write(count):
        if form == "npz":
            np.savez(tmp_path / "data.npz", images=images[:count], labels=labels[:count], class_names=["cat", "dog"])
            return tmp_path / "data.npz"
        for i in range(count):
            path = tmp_path / "data" / ("cat", "dog")[labels[i]] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[i]).save(path)
        return tmp_path / "data"

    path, run = write(30), tmp_path / "run"
    minivit.train("vit_nano_patch2_8", path, epochs=1, limit=20, progress=False, out=run)
    write(30)  # the same images once more
    for data in (None, str(path)):
        assert len(data_of(run, data).test_images) == 6
    write(40)
    for data in (None, str(path)):
        with pytest.raises(UserError, match=r"data is no longer the data that .* was trained on"):
            data_of(run, data)


@pytest.mark.parametrize("form", ["folder", "npz"])
def test_all_of_other_data_is_data_of(run, photos, tmp_path, form):
    path = tmp_path / "held_out"
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 8, 3), np.uint8)
    labels = np.array([0, 0, 0, 0, 1])  # one class has one image
    if form == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, images=images, labels=labels, class_names=["cat", "dog"])
    else:
        for i, (image, label) in enumerate(zip(images, labels)):
            (path / ("cat", "dog")[label]).mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(path / ("cat", "dog")[label] / f"{i}.png")
    for _ in range(2):  # the second time from the cache
        dataset = data_of(run, str(path))
        np.testing.assert_array_equal(dataset.test_images, images)
        np.testing.assert_array_equal(dataset.test_labels, labels)
        assert dataset.test_part() == "all 5 images of held_out"


def test_of_other_data_with_a_split_the_test_part_is_data_of(run, tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (9, 8, 8, 3), np.uint8)
    labels = np.arange(9) % 2
    np.savez(
        tmp_path / "other.npz",
        train_images=images[:5],
        train_labels=labels[:5],
        test_images=images[5:],
        test_labels=labels[5:],
        class_names=["cat", "dog"],
    )
    dataset = data_of(run, str(tmp_path / "other.npz"))
    np.testing.assert_array_equal(dataset.test_images, images[5:])
    assert dataset.test_part() == "4 test images of other"


def test_a_model_of_arrays_needs_data(tmp_path):
    images = np.random.default_rng(1).integers(0, 256, (16, 8, 8, 1), np.uint8)
    minivit.train("vit_nano_patch2_8", (images, np.arange(16) % 2), epochs=1, progress=False, out=tmp_path / "run")
    with pytest.raises(UserError, match="was trained on arrays, which are not kept: give --data"):
        data_of(tmp_path / "run")
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(16) % 2)
    assert len(data_of(tmp_path / "run", str(tmp_path / "a.npz")).test_images) == 16


@pytest.mark.parametrize(
    "config, reason",
    [
        ("[1]", r"its content must be a mapping of names to values, not \[1\]"),
        ("[" * 10_000, "its text is no JSON: its brackets are nested too deeply"),
        ("{}", "arguments must be a mapping of names to values, not None"),
        ('{"arguments": {"seed": 1}}', "arguments.data is missing"),
        ('{"arguments": {"data": 5}}', "arguments.data must be text, not 5"),
        ('{"arguments": {"data": "digits", "limit": "7"}}', "arguments.limit must be a whole number of at least 1, not '7'"),
        (
            '{"arguments": {"data": "digits", "test_fraction": 1e999}}',
            "arguments.test_fraction must be a number above 0 and below 1, not inf",
        ),
        ('{"arguments": {"data": "digits", "split_seed": -1}}', "arguments.split_seed must be a whole number of at least 0, not -1"),
        ('{"arguments": {"data": "digits", "skip_bad_images": null}}', "arguments.skip_bad_images must be true or false, not None"),
    ],
)
def test_a_damaged_configuration_is_told(run, tmp_path, config, reason):
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match=rf"config\.json is damaged: {reason}.*: give the data"):
        data_of(tmp_path)


@pytest.mark.parametrize("own", ["a" * 5000, "a\0b", "~nosuchuser/x"])
def test_other_data_than_a_path_that_cannot_be(run, tmp_path, own):
    (tmp_path / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"arguments": {"data": own}}))
    with pytest.raises(UserError, match="cannot be a path"):
        data_of(tmp_path, "digits")
