"""A Classifier's class names and preprocessing belong to its model, also where a file says otherwise."""

import numpy as np
import pytest

import minivit
from minivit import UserError
from minivit.data import Batches
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.io.model_file import save_model

PREPROCESSING = dict(image_size=8, in_channels=3, mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3])
NAN = float("nan")


@pytest.fixture(scope="module")
def model():
    return minivit.create_model("mixer", image_size=8, patch_size=4, num_classes=3, dim=8, depth=1)


def read(model, path, **about):
    save_model(path, model, {"class_names": [*"abc"], "preprocessing": PREPROCESSING} | about)
    return minivit.load(path)


@pytest.mark.parametrize(
    "change, reason",
    [
        ({"mean": [0.5]}, "mean must hold a number for each of 3 channels, not 1"),
        ({"std": []}, "std must hold a number for each of 3 channels, not 0"),
        ({"mean": ["0.4", 0.5, 0.6]}, r"preprocessing\.mean\[0\] must be a number of at least -1000, not '0.4'"),
        ({"std": [0.2, 0.0, 0.3]}, r"preprocessing\.std\[1\] must be a number of at least 1e-06, not 0.0"),
        ({"std": 0.2}, r"preprocessing\.std must be a list, not 0.2"),
        ({"image_size": 16}, "preprocessing: image_size is 16, that of the model 8"),
        ({"in_channels": 1, "mean": [0.5], "std": [0.5]}, "preprocessing: in_channels is 1, that of the model 3"),
    ],
)
def test_preprocessing_of_files(model, tmp_path, change, reason):
    path = tmp_path / "m.safetensors"
    assert read(model, path).preprocessing == Preprocessing(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    with pytest.raises(UserError, match=f"is damaged: {reason}.*: create the model and load its weights with load_weights"):
        read(model, path, preprocessing=PREPROCESSING | change)


@pytest.mark.parametrize(
    "about, reason",
    [
        ({"class_names": ["a", "b"]}, "class_names holds 2 names for a model of 3 classes"),
        ({"class_names": ["a", "b", 3]}, r"class_names\[2\] must be text, not 3"),
        ({"training_sketch": [1, -1]}, r"training_sketch\[1\] must be a whole number of at least 0, not -1"),
        ({"preprocessing": None}, "preprocessing must be a mapping of names to values, not None"),
    ],
)
def test_what_else_files_say(model, tmp_path, about, reason):
    with pytest.raises(UserError, match=f"is damaged: {reason}"):
        read(model, tmp_path / "m.safetensors", **about)


def test_a_preprocessing_that_cannot_be():
    for change in ({"mean": (NAN, 0, 0)}, {"std": (1, 1, float("inf"))}, {"mean": (0.5,)}, {"image_size": 0}):
        with pytest.raises(UserError, match=rf"^{next(iter(change))}(\[\d\])? must"):
            Preprocessing(**PREPROCESSING | change)


def test_a_classifier_of_other_names(model):
    with pytest.raises(UserError, match="class_names holds 4 names for a model of 3 classes"):
        Classifier(model, "abcd", Preprocessing(**PREPROCESSING))


def test_batches_of_too_few_means_are_refused():
    images, labels = np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4, np.int64)
    for name in ("mean", "std"):
        with pytest.raises(UserError, match=rf"{name} must hold a number for each of the 3 channels, got \(1,\)"):
            Batches(images, labels, batch_size=2, num_classes=1, **{"mean": [0.5] * 3, "std": [0.5] * 3} | {name: [0.5]})


def test_a_saved_classifier_comes_back(model, tmp_path):
    path = tmp_path / "m.safetensors"
    Classifier(model, "abc", Preprocessing(**PREPROCESSING), [5, 7]).save(path)
    found = minivit.load(path)
    assert found.class_names == ("a", "b", "c") and found.training_sketch == (5, 7)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    expected = Classifier(model, "abc", Preprocessing(**PREPROCESSING)).predict(pixels)
    np.testing.assert_array_equal(found.predict(pixels).probabilities, expected.probabilities)
