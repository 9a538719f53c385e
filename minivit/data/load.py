"""`load_data`: a Dataset from a name, path, archive or arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, nearest, reason
from ..files import user_path
from ..progress import say
from ..schema import Size, checked
from ..sides import ImageSize, Sides
from .cifar import find_or_download, load_cifar, recognise
from .dataset import Dataset, Split, Whole, from_arrays, hash_of
from .decode import check_pixels
from .fit import check_fit
from .folder import load_folder
from .idx import holds_idx, load_idx
from .image_file import MAX_PIXELS, SUFFIXES, check_max_pixels
from .labels import check_class_names, check_labels, implied_names
from .npz import read_npz

KNOWN = ("digits", "cifar10", "cifar100")
WHOLE = ("images", "labels")
PARTED = ("train_images", "train_labels", "test_images", "test_labels")
MOST_CLASSES = 100_000
ARCHIVES = (".tar", ".tgz", ".gz", ".xz", ".bz2")


def load_data(
    data: Any,
    *,
    image_size: Sides | None = None,
    in_channels: int | None = None,
    fit: str | None = None,
    test_fraction: float = 0.2,
    split_seed: int = 0,
    skip_bad_images: bool = False,
    max_pixels: int = MAX_PIXELS,
    class_names: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """Load images and labels for training and testing.

    `data` is one of

    - "digits": 1797 handwritten digits, 8×8×1, with a fixed split;
    - "cifar10", "cifar100": from the official archive, downloaded into `cache_dir` (default: the user's cache folder) if necessary;
    - a path: such an archive or its unpacked folder; a folder with MNIST's four IDX files; a folder of images, `train/<class>/*` and
      `test/<class>/*` (or `val`), or `<class>/*` alone; an .npz file with the arrays `images` and `labels`, or `train_images`,
      `train_labels`, `test_images`, `test_labels`, and optionally `class_names`;
    - arrays (images, labels) or (train_images, train_labels, test_images, test_labels): images (n, H, W, C) or (n, H, W), uint8 or
      floating-point in 0..1; labels (n,) or (n, 1), integers from 0 or names, whose sorted names are
      the classes, or one-hot rows (n, classes);
    - a Dataset.

    If the data has no split, `test_fraction` of each class, selected by `split_seed`, is used for testing, and a message says so. Images
    are fitted into `image_size`, pixels of a square or (rows, columns), and converted to gray or RGB by `in_channels` (1 or 3). None keeps
    size and channels; a folder of images without a common square size uses 32, and 3 channels unless all are gray. `fit` is "crop", the
    central part (the default, except that a Dataset keeps its own); "pad", the whole image with borders of its mean colour; or "stretch",
    the whole image without its proportions. `skip_bad_images` omits unreadable images, with a message. An image file of more than
    `max_pixels` counts as unreadable: decoding takes up to 15 bytes a pixel. `class_names` are the class names of arrays. `progress`
    enables progress bars and messages on standard error.

    Raises UserError, one line that names the value and the remedy, for any problem with the data.
    """
    return load_parts(
        data,
        Split(test_fraction, split_seed),
        image_size=image_size,
        in_channels=in_channels,
        fit=fit,
        skip_bad_images=skip_bad_images,
        max_pixels=max_pixels,
        class_names=class_names,
        cache_dir=cache_dir,
        progress=progress,
    )


def load_parts(
    data: Any,
    split: Split | Whole,
    *,
    image_size: Sides | None = None,
    in_channels: int | None = None,
    fit: str | None = None,
    skip_bad_images: bool = False,
    max_pixels: int = MAX_PIXELS,
    class_names: Sequence[str] | None = None,
    cache_dir: str | Path | None = None,
    progress: bool = True,
) -> Dataset:
    """`load_data` with any way to divide data that has no split."""
    image_size = None if image_size is None else checked("image_size", image_size, ImageSize)
    in_channels = None if in_channels is None else checked("in_channels", in_channels, Size)
    check_max_pixels(max_pixels)
    fit = check_fit(fit or (data.fit if isinstance(data, Dataset) else "crop"))
    if isinstance(data, Dataset):
        dataset = data
    elif isinstance(data, (tuple, list)):
        dataset = _from_tuple(data, class_names, image_size, fit, split, progress)
    elif not isinstance(data, (str, Path)):
        raise UserError(f"data must be a name, a path, arrays or a Dataset, got {type(data).__name__}")
    elif data == "digits":
        dataset = load_digits()
    elif data in ("cifar10", "cifar100"):
        path, form = find_or_download(str(data), cache_dir, progress)
        dataset = load_cifar(path, form, cache_dir, progress, official=True)
    else:
        path = _existing(data)
        if path.suffix == ".npz":
            dataset = _from_npz(path, class_names, image_size, fit, split, progress)
        elif cifar := recognise(path) if path.is_dir() or path.suffix in ARCHIVES else None:
            dataset = load_cifar(*cifar, cache_dir, progress)
        elif path.is_dir() and holds_idx(path):
            dataset = load_idx(path, image_size, fit)
        elif path.is_dir():
            dataset = load_folder(
                path,
                split,
                image_size=image_size,
                in_channels=in_channels,
                fit=fit,
                skip_bad_images=skip_bad_images,
                max_pixels=max_pixels,
                cache_dir=cache_dir,
                progress=progress,
            )
        else:
            raise UserError(_not_a_dataset(path))
    return dataset.resized(image_size, in_channels, fit)


def _existing(data: str | Path) -> Path:
    """The path, if it exists. Raises UserError."""
    path = user_path(data)
    try:
        os.stat(path)
        return path
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:  # a folder above it may not be searched, for one
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if isinstance(data, Path) or len(path.parts) > 1 or path.suffix:
        raise UserError(f"{data} does not exist: give a folder of images, an .npz file, or one of {', '.join(KNOWN)}")
    hint = "; MNIST is read from a folder with its IDX files" if "mnist" in data.lower() else ""
    raise UserError(f"unknown dataset {data!r}{nearest(data, KNOWN)}, and no folder of that name{hint}: give {', '.join(KNOWN)} or a path")


def _not_a_dataset(path: Path) -> str:
    """The error message for a file that is not a dataset."""
    if path.suffix.lower() in SUFFIXES:
        return f"{path} is one image: give the folder that holds the class folders"
    if path.suffix in ARCHIVES:
        return f"{path} is not a CIFAR archive: unpack it, and give the folder"
    return f"{path} is not a dataset: give a folder, an .npz file or a CIFAR archive"


def load_digits() -> Dataset:
    """The digits included in the package (see DIGITS.md), with a fixed split: a fifth of each class is for testing."""
    with (files(__package__) / "digits.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]  # (1797, 8, 8), (1797,)
    train, test = Split(0.2, seed=0).divide(labels)
    return from_arrays("digits", (images[train], labels[train]), (images[test], labels[test]), augmentation="affine")


def _from_tuple(
    arrays: Sequence[Any],
    class_names: Sequence[str] | None,
    image_size: Sides | None,
    fit: str,
    split: Split | Whole,
    progress: bool,
    name: str = "arrays",
) -> Dataset:
    if len(arrays) == 4:
        return from_arrays(name, (arrays[0], arrays[1]), (arrays[2], arrays[3]), class_names, image_size=image_size, fit=fit)
    if len(arrays) != 2:
        raise UserError(f"arrays must be ({', '.join(WHOLE)}) or ({', '.join(PARTED)}), got {len(arrays)} of them")
    images = check_pixels(arrays[0])
    if images.ndim < 3 or not len(images):
        raise UserError(f"images must have the shape (n, H, W, C) or (n, H, W) and hold an image, got {images.shape}")
    class_names = implied_names(arrays[1]) if class_names is None else class_names
    labels = check_labels(arrays[1], len(images), class_names=class_names)
    names = check_class_names(class_names, labels)
    train, test = split.divide(labels)
    say(split.describe(len(train), len(test)), progress)
    if isinstance(split, Whole):
        dataset = from_arrays(name, (images, labels), (images[:1], labels[:1]), names, image_size=image_size, fit=fit)
        return dataset.whole()
    for_testing = images[test], labels[test]
    dataset = from_arrays(name, (images[train], labels[train]), for_testing, names, image_size=image_size, fit=fit)
    return replace(dataset, split_hash=hash_of(for_testing))


def _from_npz(
    path: Path, class_names: Sequence[str] | None, image_size: Sides | None, fit: str, split: Split | Whole, progress: bool
) -> Dataset:
    arrays, names = read_npz(path, (*WHOLE, *PARTED, "class_names"))
    keys = WHOLE if any(key in names for key in WHOLE) and "train_images" not in names else PARTED
    for key in keys:
        if key not in arrays:
            expected = f"{', '.join(WHOLE)} or {', '.join(PARTED)}"
            raise UserError(f"{path} has no array {key!r}{nearest(key, names[:50])}: it must hold {expected}")
    if class_names is None and "class_names" in arrays:
        if arrays["class_names"].ndim != 1 or arrays["class_names"].size > MOST_CLASSES:
            raise UserError(f"class_names of {path} must be a list of at most {MOST_CLASSES:,}, got {arrays['class_names'].shape}")
        class_names = arrays["class_names"].tolist()
    return _from_tuple([arrays[key] for key in keys], class_names, image_size, fit, split, progress, name=path.stem)
