import numpy as np
import pytest

from minivit.data import load_data


def test_shapes_types_and_levels():
    digits = load_data("digits")
    assert digits.train_images.shape[1:] == digits.test_images.shape[1:] == (8, 8, 1)
    assert len(digits.train_images) + len(digits.test_images) == 1797
    assert digits.train_images.dtype == np.uint8 and digits.train_labels.dtype == np.int64
    assert digits.train_images.flags.c_contiguous
    assert set(np.unique(digits.train_images)) == {round(level * 255 / 16) for level in range(17)}
    assert (digits.num_classes, digits.image_size, digits.in_channels) == (10, 8, 1)
    assert digits.class_names == tuple("0123456789")


def test_the_pixels_and_labels_are_those_of_scikit_learn():
    datasets = pytest.importorskip("sklearn.datasets")
    original = datasets.load_digits()
    digits = load_data("digits")
    known = {(image.tobytes(), label) for image, label in zip(np.rint(original.images * 255 / 16).astype(np.uint8), original.target)}
    for images, labels in ((digits.train_images, digits.train_labels), (digits.test_images, digits.test_labels)):
        assert all((image.tobytes(), label) in known for image, label in zip(images, labels))


def test_the_split_is_stratified_and_does_not_depend_on_the_seed():
    digits, other = load_data("digits"), load_data("digits", split_seed=5, test_fraction=0.5)
    np.testing.assert_array_equal(digits.test_images, other.test_images)
    train, test = np.bincount(digits.train_labels), np.bincount(digits.test_labels)
    np.testing.assert_allclose(test / (train + test), 0.2, atol=0.004)
    # Pinned: results on the digits are comparable only while this stays.
    assert digits.test_labels[:12].tolist() == [0, 2, 9, 1, 0, 1, 8, 7, 2, 3, 6, 9]
    assert len(digits.test_labels) == 359


def test_statistics_are_those_of_the_training_images():
    digits = load_data("digits")
    np.testing.assert_allclose(digits.mean, (digits.train_images / 255).mean(), rtol=1e-12)
    np.testing.assert_allclose(digits.std, (digits.train_images / 255).std(), rtol=1e-12)


def test_another_size_and_number_of_channels():
    digits = load_data("digits", image_size=16, in_channels=3)
    assert digits.train_images.shape[1:] == digits.test_images.shape[1:] == (16, 16, 3)
    assert len(digits.mean) == 3
    assert (digits.train_images[..., 0] == digits.train_images[..., 2]).all()
    assert digits.train_images.flags.c_contiguous


def test_a_dataset_is_data_too():
    digits = load_data("digits")
    assert load_data(digits) is digits
    assert load_data(digits, image_size=4).image_size == 4
