"""Datasets: arrays of images and labels, class names, and the parameters of normalisation and augmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError
from ..sides import Sides, simplest, times
from .decode import check_pixels, fit_arrays
from .labels import check_class_names, check_labels, implied_names

SMALLEST_STD = 1 / 255  # of a channel, to avoid division by zero for constant channels


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images for training and testing, all of the same size, with labels and metadata.

    Labels may be given in any form that `labels.check_labels` takes, names of classes among them. Raises UserError for others.
    """

    name: str
    train_images: np.ndarray = field(repr=False)  # (n, H, W, C) uint8, or float32 in 0..1; C-contiguous, possibly memory-mapped
    train_labels: np.ndarray = field(repr=False)  # (n,) int64 in 0..num_classes - 1
    test_images: np.ndarray = field(repr=False)  # (m, H, W, C), as train_images
    test_labels: np.ndarray = field(repr=False)  # (m,) int64
    class_names: tuple[str, ...]
    mean: tuple[float, ...]  # of each channel over the training images, on the scale 0..1
    std: tuple[float, ...]  # of each channel, at least 1/255
    augmentation: str = "none"  # the default policy for these images
    fit: str = "crop"  # how images of other proportions became those of this size: crop, pad or stretch (`fit.py`)
    split_hash: str = ""  # of what chance chose for testing (`hash_of`); "" if the data came divided
    is_whole: bool = False  # whether training and test images are the same: all images of data without a split
    train_files: tuple[str, ...] = field(default=(), repr=False)  # the path of each training image in the folder of the data; () if none
    test_files: tuple[str, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        for part in ("train", "test"):
            count, labels = len(getattr(self, f"{part}_images")), getattr(self, f"{part}_labels")
            object.__setattr__(self, f"{part}_labels", check_labels(labels, count, f"{part}_labels", self.class_names))

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_size(self) -> int | tuple[int, int]:
        """Pixels: one number for squares, otherwise (rows, columns)."""
        return simplest(self.train_images.shape[1:3])

    @property
    def in_channels(self) -> int:
        return self.train_images.shape[3]

    def summary(self) -> str:
        """One line: "digits: 1438 training and 359 test images, 8×8×1, 10 classes"."""
        size = times(self.train_images.shape[1:])
        return f"{self.name}: {len(self.train_images)} training and {len(self.test_images)} test images, {size}, {self.num_classes} classes"

    def test_part(self) -> str:
        """What the test images are: "359 test images of digits", or "all 359 images of held_out"."""
        count = len(self.test_images)
        return f"all {count} images of {self.name}" if self.is_whole else f"{count} test images of {self.name}"

    def whole(self) -> Dataset:
        """The dataset with its training images as test images."""
        return replace(self, test_images=self.train_images, test_labels=self.train_labels, test_files=self.train_files, is_whole=True)

    def resized(self, image_size: Sides | None = None, in_channels: int | None = None, fit: str | None = None) -> Dataset:
        """The dataset with another image size, number of channels (1 or 3) or `fit`, and new statistics; None keeps the current value."""
        size, channels = simplest(image_size or self.image_size), in_channels or self.in_channels
        if fit is not None and fit != self.fit:  # the images have these proportions already
            return replace(self, fit=fit).resized(size, channels)
        if (size, channels) == (self.image_size, self.in_channels):
            return self
        train_images = fit_arrays(self.train_images, size, channels)
        test_images = train_images if self.is_whole else fit_arrays(self.test_images, size, channels)
        mean, std = channel_statistics(train_images)
        return replace(self, train_images=train_images, test_images=test_images, mean=mean, std=std)

    def with_classes(self, class_names: Sequence[str]) -> Dataset:
        """The dataset with the classes of `class_names`, which have all of its own among them, found by name. Raises ValueError if not."""
        number = np.array([class_names.index(name) for name in self.class_names])  # (own classes,)
        labels = {"train_labels": number[self.train_labels], "test_labels": number[self.test_labels]}
        return replace(self, class_names=tuple(class_names), **labels)

    def validating(self, fraction: float, seed: int) -> Dataset:
        """The dataset with `fraction` of each class of its training images in the place of its test images, drawn as by `Split`."""
        train, validation = Split(fraction, seed).divide(self.train_labels)
        return replace(self.whole(), is_whole=False)._picked(train, validation)

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
        return self._picked(train, test)

    def _picked(self, train: np.ndarray, test: np.ndarray) -> Dataset:
        """The dataset with the training and the test images at these indices."""
        return replace(
            self,
            train_images=self.train_images[train],
            train_labels=self.train_labels[train],
            test_images=self.test_images[test],
            test_labels=self.test_labels[test],
            train_files=tuple(self.train_files[i] for i in train) if self.train_files else (),
            test_files=tuple(self.test_files[i] for i in test) if self.test_files else (),
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


def hash_of(parts: Iterable[Any]) -> str:
    """A hash of arrays, or of values by what they look like, by which the same data is known again."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part).data if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:32]


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
            raise UserError(f"none of the {len(labels)} images can be held out: each class needs two or more")
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


def from_arrays(
    name: str,
    train: tuple[Any, Any],
    test: tuple[Any, Any],
    class_names: Sequence[str] | None = None,
    augmentation: str = "none",
    image_size: Sides | None = None,
    fit: str = "crop",
) -> Dataset:
    """A validated Dataset from (images, labels) pairs.

    Images are (n, H, W, C) or (n, H, W); they are fitted into `image_size`, or keep their size if it is None. Labels are as for
    `check_labels`; where they are names, the classes are those of the training labels in sorted order. Raises UserError.
    """
    checked = []
    if class_names is None:
        class_names = implied_names(train[1], "train_labels")
        if (class_names is None) != (implied_names(test[1], "test_labels") is None):
            raise UserError("train_labels and test_labels must both be whole numbers, names or one-hot rows: one is, the other is not")
    for part, (images, labels) in (("train", train), ("test", test)):
        images = check_pixels(images, f"{part}_images")
        images = images[..., None] if images.ndim == 3 else images
        check_shape(images, f"{part}_images")
        images = fit_arrays(images, image_size, images.shape[3], fit) if image_size else images
        checked += [images, check_labels(labels, len(images), f"{part}_labels", class_names)]
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
    return Dataset(name, train_images, train_labels, test_images, test_labels, names, mean, std, augmentation, fit)


def check_shape(images: np.ndarray, what: str) -> None:
    """Raises UserError if images are not (n, H, W, C)."""
    if images.ndim != 4 or 0 in images.shape:
        raise UserError(f"{what} must have the shape (n, H, W, C) or (n, H, W) and hold an image, got {images.shape}")
    _, height, _, channels = images.shape
    if channels > 4 and height in (1, 3):
        raise UserError(f"{what} of shape {images.shape} have their channels first: pass images.transpose(0, 2, 3, 1)")
