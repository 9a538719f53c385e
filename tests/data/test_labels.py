"""Labels as numbers, names, columns and one-hot rows, everywhere they come in."""

import numpy as np
import pytest

import minivit
from minivit import Dataset, UserError, load_data
from minivit.data import Batches
from minivit.data.labels import check_labels
from minivit.inference.classifier import Classifier, Preprocessing
from minivit.inference.run_data import data_of_run

NAMES = ["eel", "cat", "dog", "cat"] * 10
NUMBERS = [2, 0, 1, 0] * 10  # the places of the names in sorted order
IMAGES = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 1), np.uint8)
SMALL = dict(epochs=1, progress=False, model_options={"dim": 16, "depth": 1, "heads": 2})


@pytest.mark.parametrize(
    "labels",
    [
        NAMES,
        np.array(NAMES),
        np.array(NAMES, object),
        np.array(NAMES)[:, None],
        [[name] for name in NAMES],
        np.char.encode(np.array(NAMES), "utf-8"),
    ],
    ids=["list", "array", "objects", "column", "rows", "bytes"],
)
def test_names_become_classes_in_sorted_order(labels):
    data = load_data((IMAGES, labels, IMAGES, labels))
    assert data.class_names == ("cat", "dog", "eel")
    assert data.train_labels.tolist() == data.test_labels.tolist() == NUMBERS
    split = load_data((IMAGES, labels), progress=False)
    assert split.class_names == ("cat", "dog", "eel") and np.bincount(split.train_labels).tolist() == [16, 8, 8]


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float32, np.float64, bool])
def test_one_hot_rows_are_classes(dtype):
    rows = np.eye(4)[NUMBERS].astype(dtype)  # class 3 has no image
    data = load_data((IMAGES, rows, IMAGES[:4], rows[:4]))
    assert data.class_names == ("0", "1", "2", "3")
    assert data.train_labels.tolist() == NUMBERS
    assert load_data((IMAGES, rows, IMAGES, rows), class_names=["a", "b", "c", "d"]).class_names == ("a", "b", "c", "d")


def test_a_column_of_numbers_is_flat():
    assert load_data((IMAGES, np.array(NUMBERS)[:, None]), progress=False).num_classes == 3
    assert load_data((IMAGES, np.array(NUMBERS, float)[:, None]), progress=False).num_classes == 3


def test_given_class_names_are_the_order():
    data = load_data((IMAGES, NAMES, IMAGES[:2], NAMES[:2]), class_names=["dog", "eel", "cat", "fox"])
    assert data.class_names == ("dog", "eel", "cat", "fox") and data.test_labels.tolist() == [1, 2]


def test_a_dataset_takes_names():
    data = Dataset("mine", IMAGES, NAMES, IMAGES[:4], np.array(NAMES[:4])[:, None], ("cat", "dog", "eel"), (0.5,), (0.25,))
    assert data.train_labels.dtype == np.int64 and data.train_labels.tolist() == NUMBERS and data.test_labels.tolist() == NUMBERS[:4]
    with pytest.raises(UserError, match=r"^train_labels\[0\] is 'eel', no class of 2 known ones"):
        Dataset("mine", IMAGES, NAMES, IMAGES[:4], NAMES[:4], ("cat", "dog"), (0.5,), (0.25,))


def test_batches_and_checks_take_columns_and_one_hot_rows():
    options = dict(batch_size=40, num_classes=3, mean=(0.5,), std=(0.25,), shuffle=False)
    for labels in (np.array(NUMBERS)[:, None], np.eye(3)[NUMBERS]):
        (_, found), *_ = Batches(IMAGES, labels, **options).epoch(0)
        assert found.tolist() == NUMBERS


@pytest.mark.parametrize(
    "labels, message",
    [
        (np.full((40, 3), 1 / 3), r"labels\[0\] is no row of one 1 and zeros, which stands for a class: .*Trainer\.step\)"),
        (np.eye(3)[NUMBERS] * 0.9 + 0.1 / 3, r"labels\[0\] is no row of one 1"),
        (np.array([[1, 1, 0]] * 40), r"labels\[0\] is no row of one 1"),
        ([*NAMES[:-1], float("nan")], r"labels\[39\] is 'nan', no name: labels must be all names, or all whole numbers"),
        ([*NAMES[:-1], 3], r"labels\[39\] is '3', no name"),
        ([[1], [2, 3]] * 20, "labels must be one array, one label for each image"),
        (NAMES[:-1], r"labels must have the shape \(40,\), one for each image, got \(39,\)"),
        (["cat"] * 40, "training needs two classes or more, got 1"),
        (np.array([["cat", "dog"]] * 40), r"labels must have the shape \(40,\), one for each image, got \(40, 2\)"),
    ],
)
def test_labels_that_are_none_are_one_line(labels, message):
    with pytest.raises(UserError, match=f"^{message}") as error:
        load_data((IMAGES, labels))
    assert "\n" not in str(error.value) and len(str(error.value)) <= 300


@pytest.mark.parametrize(
    "train, test, message",
    [
        (NAMES, ["cat", "fox"], r"test_labels\[1\] is 'fox', no class of 3 known ones"),
        (NAMES, ["cat", "egl"], r"test_labels\[1\] is 'egl', no class \(nearest: eel\) of 3"),
        (NAMES, [0, 1], "train_labels and test_labels must both be"),
        (NUMBERS, ["cat", "dog"], "train_labels and test_labels must both be"),
    ],
)
def test_parts_must_agree(train, test, message):
    with pytest.raises(UserError, match=f"^{message}"):
        load_data((IMAGES, train, IMAGES[:2], test))


def test_names_where_none_are_known():
    with pytest.raises(UserError, match=r"^labels are names, as 'eel', but no class names are known here: number the classes"):
        check_labels(NAMES, 40)


def test_a_model_is_trained_and_tested_by_names(tmp_path):
    np.savez(tmp_path / "train.npz", images=IMAGES, labels=NAMES)
    run = minivit.train("vit_nano_patch2_8", tmp_path / "train.npz", out=tmp_path / "run", **SMALL)
    loaded = minivit.load(run.folder)
    assert loaded.class_names == ("cat", "dog", "eel")
    assert loaded.predict(IMAGES[:1]).names[0] in loaded.class_names
    few = [i for i, name in enumerate(NAMES) if name != "cat"]  # a test set without one of the classes
    np.savez(tmp_path / "test.npz", images=IMAGES[few], labels=[NAMES[i] for i in few])
    data = data_of_run(run.folder, loaded, str(tmp_path / "test.npz"))
    assert data.class_names == loaded.class_names and data.test_labels.tolist() == [NUMBERS[i] for i in few]
    np.savez(tmp_path / "other.npz", images=IMAGES[:2], labels=["cat", "fox"])
    with pytest.raises(UserError, match=r"the classes of other \(cat, fox\) are not the model's \(cat, dog, eel\)"):
        data_of_run(run.folder, loaded, str(tmp_path / "other.npz"))
    arrays = minivit.train("vit_nano_patch2_8", (IMAGES, NAMES), out=tmp_path / "arrays", **SMALL)
    assert arrays.history[0]["train_loss"] == run.history[0]["train_loss"]


def test_a_classifier_is_calibrated_by_names():
    model = minivit.create_model("dvt_nano_8", num_classes=3, depth=1)
    classifier = Classifier(model, ("cat", "dog", "eel"), Preprocessing(8, 1, (0.5,), (0.25,)))
    images, names, numbers = np.concatenate([IMAGES] * 3), NAMES * 3, NUMBERS * 3
    assert minivit.calibrate(classifier, images, names) == minivit.calibrate(classifier, images, numbers)
    with pytest.raises(UserError, match=r"^labels\[0\] is 'fox', no class of 3 known ones"):
        minivit.calibrate(classifier, images, ["fox", *names[1:]])
