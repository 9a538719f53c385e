"""Datasets: arrays of images and labels, class names, and the parameters of normalisation and augmentation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from .decode import check_pixels, fit

SMALLEST_STD = 1 / 255  # of a channel, to avoid division by zero for constant channels


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images for training and testing, all of the same square size, with labels and metadata."""

    name: str
    train_images: np.ndarray = field(repr=False)  # (n, H, W, C) uint8, or float32 in 0..1; C-contiguous, possibly memory-mapped
    train_labels: np.ndarray = field(repr=False)  # (n,) int64 in 0..num_classes - 1
    test_images: np.ndarray = field(repr=False)  # (m, H, W, C), as train_images
    test_labels: np.ndarray = field(repr=False)  # (m,) int64
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # of each channel over the training images, on the scale 0..1
    std: tuple[float, ...]  # of each channel, at least 1/255
    augmentation: str = "none"  # the default policy for these images
    is_whole: bool = False  # whether training and test images are the same: all images of data without a split

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int:
        return self.train_images.shape[1]

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[3]

    def summary(self) -> str:
        """One line: "digits: 1438 training and 359 test images, 8×8×1, 10 classes"."""
        size = f"{self.image_size}×{self.image_size}×{self.in_channels}"
        return f"{self.name}: {len(self.train_images)} training and {len(self.test_images)} test images, {size}, {self.num_classes} classes"

    def test_part(self) -> str:
        """What the test images are: "359 test images of digits", or "all 359 images of held_out"."""
        count = len(self.test_images)
        return f"all {count} images of {self.name}" if self.is_whole else f"{count} test images of {self.name}"

    def whole(self) -> Dataset:
        """The dataset with its training images as test images."""
        return replace(self, test_images=self.train_images, test_labels=self.train_labels, is_whole=True)

    def resized(self, image_size: int | None = None, in_channels: int | None = None) -> Dataset:
        """The dataset with another image size or number of channels (1 or 3), and new statistics; None keeps the current value."""
        size, channels = image_size or self.image_size, in_channels or self.in_channels
        if (size, channels) == (self.image_size, self.in_channels):
            return self
        train_images = fit(self.train_images, size, channels)
        test_images = train_images if self.is_whole else fit(self.test_images, size, channels)
        mean, std = channel_statistics(train_images)
        return replace(self, train_images=train_images, test_images=test_images, mean=mean, std=std)

    def limited(self, limit: int | None) -> Dataset:
        """At most `limit` training and `limit` test images, evenly spaced; all if `limit` is None. Raises UserError if it is below 1."""
        if limit is None:
            return self
        if limit < 1:
            raise UserError(f"limit must be 1 or more, got {limit}")
        train, test = (
            np.linspace(0, len(labels), min(limit, len(labels)), endpoint=False).astype(np.int64)
            for labels in (self.train_labels, self.test_labels)
        )
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
        )


def channel_statistics(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images (n, H, W, C), on the scale 0..1; exact sums for uint8."""
    channels, count = images.shape[3], images[..., 0].size
    if images.dtype == np.uint8:
        levels = np.arange(256) / 255
        histogram = np.zeros((channels, 256), np.int64)
        for start in range(0, len(images), 1024):  # avoids copying the entire memory map
            for c in range(channels):
                histogram[c] += np.bincount(images[start : start + 1024, ..., c].ravel(), minlength=256)
        mean = histogram @ levels / count
        variance = np.array([h @ (levels - m) ** 2 for h, m in zip(histogram, mean)]) / count
    else:
        parts = [images[start : start + 1024] for start in range(0, len(images), 1024)]
        mean = sum(part.sum((0, 1, 2), np.float64) for part in parts) / count
        variance = sum(((part - mean) ** 2).sum((0, 1, 2)) for part in parts) / count
    std = np.maximum(np.sqrt(variance), SMALLEST_STD)
    return tuple(mean.tolist()), tuple(std.tolist())


class Split(NamedTuple):
    """A random split into training and test images, for data without a split."""

    test_fraction: float = 0.2
    seed: int = 0

    def divide(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ascending indices (train, test), with `test_fraction` of each class in test: rounded, at least one, but never the entire class.

        The selection sorts raw Philox words keyed by the seed, which are the same in all versions of NumPy.
        """
        check_seed(self.seed)
        if not 0 < self.test_fraction < 1:
            raise UserError(f"test_fraction must lie between 0 and 1, got {self.test_fraction}: 0.2 keeps a fifth for testing")
        rank = np.random.Philox(key=self.seed).random_raw(len(labels))  # (n,) uint64
        is_test = np.zeros(len(labels), bool)
        for k in np.unique(labels):
            members = np.flatnonzero(labels == k)
            test_count = min(max(1, round(self.test_fraction * len(members))), len(members) - 1)
            is_test[members[np.argsort(rank[members], kind="stable")][:test_count]] = True
        if not is_test.any():
            raise UserError(f"none of the {len(labels)} images can be kept for testing: each class needs two or more")
        return np.flatnonzero(~is_test), np.flatnonzero(is_test)

    def describe(self, train: int, test: int) -> str:
        """One line that describes the split, for the numbers of training and test images."""
        return (
            f"split by chance within each class: {train} for training, {test} for testing (test_fraction {self.test_fraction:g}, "
            f"seed {self.seed})"
        )


class Whole:
    """In the place of a Split: all images are in both parts, for tests of a model that was trained on other data."""

    def divide(self, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Indices (all, none): `Dataset.is_whole` tells that the training images are the test images too."""
        return np.arange(len(labels)), np.arange(0)

    def describe(self, train: int, test: int) -> str:
        return f"no split: all {train} images are used"


def check_seed(seed: int) -> None:
    """Raises UserError for a seed outside 0 ... 2**64 - 1."""
    if not 0 <= seed < 2**64:
        raise UserError(f"a seed must be an integer from 0 to 2**64 - 1, got {seed}")


def check_labels(labels: Any, count: int, what: str = "labels") -> np.ndarray:
    """`labels` as int64 (count,). Raises UserError for another shape, non-integers or negative values."""
    labels = np.asarray(labels)
    if labels.shape != (count,):
        raise UserError(f"{what} must have the shape ({count},), one for each image, got {labels.shape}")
    if labels.dtype.kind == "f":
        whole = np.isfinite(labels) & (labels == np.rint(labels))
        if not whole.all():
            raise UserError(f"{what}[{np.argmin(whole)}] is {labels[np.argmin(whole)]}: labels must be whole numbers")
        labels = labels.astype(np.int64)
    if labels.dtype.kind not in "iu":
        raise UserError(f"{what} must be integers, got {labels.dtype}: number the classes 0, 1, 2, ...")
    if count and labels.min() < 0:
        first = int(np.argmax(labels < 0))
        raise UserError(f"{what}[{first}] is {labels[first]}: labels must be 0 or more")
    return labels.astype(np.int64)


def check_class_names(class_names: Sequence[str] | None, labels: np.ndarray) -> tuple[str, ...]:
    """The class names; by default "0", "1", ..., each of which must occur in the training labels. Raises UserError."""
    largest = int(labels.max())
    if class_names is None:
        counts = np.bincount(labels) if largest < 10 * len(labels) + 1000 else np.zeros(1, np.int64)
        missing = int(np.argmin(counts > 0)) if not counts.all() else None
        if missing is not None:
            raise UserError(
                f"labels run to {largest}, but no training image has label {missing}: number the classes 0, 1, 2, ... "
                "(numpy.unique with return_inverse=True does), or give class_names"
            )
        class_names = [str(k) for k in range(largest + 1)]
    names = check_printable(tuple(name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in class_names))
    if len(names) < 2:
        raise UserError(f"training needs two classes or more, got {len(names)}")
    if largest >= len(names):
        raise UserError(f"a training label is {largest}, out of range for {len(names)} classes: labels must be 0..{len(names) - 1}")
    return names


def check_printable(names: tuple[str, ...]) -> tuple[str, ...]:
    """The class names themselves. Raises UserError if one has control characters, which a terminal would obey."""
    for name in names:
        if not name.isprintable():
            raise UserError(f"the class name {name[:40]!r} has characters that cannot be shown: rename the class")
    return names


def from_arrays(
    name: str,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    class_names: Sequence[str] | None = None,
    augmentation: str = "none",
    image_size: int | None = None,
) -> Dataset:
    """A validated Dataset from (images, labels) pairs.

    Images are (n, H, W, C) or (n, H, W); they are cropped and resized to `image_size`, or must be square if it is None. Raises UserError.
    """
    checked = []
    for part, (images, labels) in (("train", train), ("test", test)):
        images = check_pixels(images, f"{part}_images")
        images = images[..., None] if images.ndim == 3 else images
        check_shape(images, f"{part}_images", square=image_size is None)
        images = fit(images, image_size, images.shape[3]) if image_size else images
        checked += [images, check_labels(labels, len(images), f"{part}_labels")]
    train_images, train_labels, test_images, test_labels = checked
    if train_images.shape[1:] != test_images.shape[1:] or train_images.dtype != test_images.dtype:
        raise UserError(
            f"train_images are {train_images.dtype} {train_images.shape[1:]}, but test_images {test_images.dtype} "
            f"{test_images.shape[1:]}: they must agree"
        )
    names = check_class_names(class_names, train_labels)
    if test_labels.max() >= len(names):
        first = int(np.argmax(test_labels >= len(names)))
        raise UserError(
            f"test_labels[{first}] is {test_labels[first]}, out of range: the training labels make {len(names)} classes, "
            f"0..{len(names) - 1}"
        )
    mean, std = channel_statistics(train_images)
    return Dataset(name, train_images, train_labels, test_images, test_labels, names, mean, std, augmentation)


def check_shape(images: np.ndarray, what: str, square: bool) -> None:
    """Raises UserError if images are not (n, H, W, C), or not square if `square`."""
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"{what} must have the shape (n, H, W, C) or (n, H, W) and hold an image, got {images.shape}")
    _, height, width, channels = images.shape
    if channels > 4 and height in (1, 3):
        raise UserError(f"{what} of shape {images.shape} have their channels first: pass images.transpose(0, 2, 3, 1)")
    if square and height != width:
        raise UserError(f"{what} must be square, got {height}×{width}: give image_size=N to crop and resize them")
