"""A folder of images: `train/<class>/*` and `test/<class>/*` (or `val`), or `<class>/*` alone.

The folders for training and testing are known by their names in any case, `Training` or `test_set` among them (`PARTS`). Files that are no
images by their endings are left out, and a message counts them; hidden files and folders of the system are passed over everywhere.
The classes are the folder names in sorted order; the images of a class are sorted by path and may be in subfolders. Images are decoded
once, in parallel, into one array file in the cache folder, which later runs memory-map as long as no name, size or modification time of a
file changes.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, nearest
from ..progress import say
from ..sides import Sides, both
from .cache import cache_key, data_folder, load_cached, store, with_progress
from .dataset import Dataset, Split, Whole, hash_of
from .decode import in_threads, read_image
from .image_file import SUFFIXES, Header, Unreadable, read_header
from .walk import File, files_in, is_folder, line_on, visible

DEFAULT_SIZE = 32  # for images of different sizes: the input size of the small models
PHOTO = 48  # pixels of a side from which on images are varied like photographs
LOOKED_AT = 200  # images of a folder that decide the size at which it is learnt
PARTS = {  # the names of folders that are a part of the data, in lower case and without "set" or "data"
    "train": ("train", "training", "trn"),
    "test": ("test", "testing", "tst", "eval", "evaluation", "holdout"),
    "validation": ("val", "valid", "validation", "dev", "development"),
}


class Item(NamedTuple):
    """An image of the dataset."""

    file: File
    label: int
    train: bool


class Listing(NamedTuple):
    """The content of a dataset's folder."""

    items: list[Item]  # training images first
    class_names: list[str]
    messages: list[str]  # which part is for testing, and what is not used
    split_hash: str  # `Dataset.split_hash`


def _class_folders(folder: Path) -> list[str]:
    return [entry.name for entry in visible(folder) if is_folder(entry)]


def _part(name: str) -> str | None:
    """Which of PARTS a folder with this name looks like, if any: "Training", "test_set" and "valid-data" do, "testing ground" does not."""
    name = re.sub(r"[\W_]*(set|data|images)?$", "", name.lower())
    return next((part for part, names in PARTS.items() if name in names), None)


def _files_by_class(root: Path, folder: str, left_out: Counter[str]) -> dict[str, list[File]]:
    """The image files of each class folder in `folder` of `root`. Raises UserError if a class has none."""
    parent = root / folder
    classes = {name: list(files_in(root, f"{folder}/{name}", left_out)) for name in _class_folders(parent)}
    if not any(classes.values()):
        direct_count = len(list(files_in(root, folder, Counter())))
        reason = f"{direct_count} images lie in it directly" if direct_count else f"no file ends in {', '.join(sorted(SUFFIXES))}"
        raise UserError(f"{parent} has no class folders with images: {reason}; put each class into a folder of its own")
    for name in classes:
        if not name.isprintable():
            raise UserError(f"class folder {name!r} of {root} has a name that cannot be shown or is not UTF-8: rename it")
    empty = [name for name, members in classes.items() if not members]
    if empty:
        raise UserError(f"class folder {parent / empty[0]} holds no images: remove it, or add some")
    if len(classes) < 2:
        raise UserError(f"{parent} holds one class, {next(iter(classes))!r}: training needs two or more")
    return classes


def _look_like_parts(root: Path, folders: list[str]) -> bool:
    """Whether the names of several folders, all with the same folders in them, contain that of a part: images_train, 2_test."""
    words = [set(re.split(r"[\W\d_]+", name.lower())) for name in folders]
    parts = [part for part, names in PARTS.items() if any(each & {*names} for each in words)]
    inside = {tuple(_class_folders(root / name)) for name in folders}
    return len(folders) > 1 and len(inside) == 1 and inside != {()} and len(parts) > 1


def _find_parts(root: Path) -> dict[str, str]:
    """The folders in `root` that are a part of the data, by part; empty if the folders are classes. Raises UserError if this is unclear."""
    folders = _class_folders(root)
    named: dict[str, list[str]] = {}
    for name in folders:
        if part := _part(name):
            named.setdefault(part, []).append(name)
    if not any(_class_folders(root / name) for name in named.get("train", ())):
        if (len(folders) > 1 and all(map(_part, folders))) or _look_like_parts(root, folders):
            raise UserError(
                f"the folders {', '.join(folders)} of {root} look like parts of the data, not like classes: give a folder train with a "
                "folder for each class in it, or rename them"
            )
        return {}
    for part, names in named.items():
        if len(names) > 1:
            raise UserError(f"{' and '.join(names)} of {root} both look like the folder for {part}: rename or remove one")
    return {part: names[0] for part, names in named.items()}


def list_images(root: Path, split: Split | Whole) -> Listing:
    """The images in `root`, in the order in which they are decoded. Raises UserError."""
    left_out: Counter[str] = Counter()
    parts = _find_parts(root)
    train = _files_by_class(root, parts.get("train", "."), left_out)
    test = parts.get("test") or parts.get("validation")
    split_hash = ""
    if test is None:
        items, messages = _divided(train, split)
        split_hash = hash_of((item.file.path, item.file.size, item.label) for item in items if not item.train)
    else:
        items = _with_test(root, train, parts["train"], test, left_out)
        messages = [f"{test} is the folder for testing"]
    if parts and (unused := [name for name in _class_folders(root) if name not in (parts["train"], test)]):
        messages.append(f"not used: {', '.join(unused)} of {root}")
    if left_out:
        messages.append(line_on(left_out))
    return Listing(items, list(train), messages, split_hash)


def _with_test(root: Path, train: dict[str, list[File]], train_folder: str, test: str, left_out: Counter[str]) -> list[Item]:
    """The images of the folder for training, then those of the folder `test`. Raises UserError."""
    label = {name: k for k, name in enumerate(train)}
    items = [Item(file, label[name], True) for name, members in train.items() for file in members]
    for name in _class_folders(root / test):
        members = list(files_in(root, f"{test}/{name}", left_out))
        if members and name not in label:
            reason = f"no class of {root / train_folder}{nearest(name, label)}"
            raise UserError(f"class {name!r} of {root / test} is {reason}: rename or remove it")
        items += [Item(file, label[name], False) for file in members]
    if items[-1].train:
        raise UserError(f"{root / test} has no class folders with images: add some, or remove it to have {train_folder} split")
    return items


def _divided(classes: dict[str, list[File]], split: Split | Whole) -> tuple[list[Item], list[str]]:
    files = [file for members in classes.values() for file in members]
    labels = np.repeat(np.arange(len(classes)), [len(members) for members in classes.values()])  # (n,)
    train, test = split.divide(labels)
    items = [Item(files[i], int(labels[i]), indices is train) for indices in (train, test) for i in indices]
    return items, [split.describe(len(train), len(test))]


def _choose_shape(
    root: Path, items: list[Item], image_size: Sides | None, in_channels: int | None, progress: bool
) -> tuple[Sides, int, str]:
    """(image size, channels, a message if the size is the default).

    The default image size is that of all images if it is the same square, otherwise 32; the default number of channels is 1 if all images
    are gray, otherwise 3.
    """
    if image_size and in_channels:
        return image_size, in_channels, ""

    def header(item: Item) -> Header | None:
        try:
            return read_header(root / item.file.path)
        except Unreadable:
            return None  # decoding reports it

    headers = set(with_progress(in_threads(header, items), len(items), "looking at images", progress)) - {None}
    in_channels = in_channels or (1 if all(h.gray for h in headers) else 3)
    sizes = {(h.width, h.height) for h in headers}
    if size := image_size or _common_side(sizes):
        return size, in_channels, ""
    return DEFAULT_SIZE, in_channels, f"images of {len(sizes)} shapes become {DEFAULT_SIZE}×{DEFAULT_SIZE}: image_size sets another size"


def _common_side(sizes: set[tuple[int, int]]) -> int | None:
    """The side of images that are all the same square."""
    return next(iter(sizes))[0] if len(sizes) == 1 and len(set(*sizes)) == 1 else None


def training_size(root: Path) -> int:
    """Pixels of a side at which a model learns the images of a folder well in little time: their own, if they are equal squares of at most
    64 pixels; otherwise 64, or 32 if most are smaller than 48. Raises UserError like `load_folder`."""
    items = list_images(root, Whole()).items
    headers = []
    for item in items[:: -(-len(items) // LOOKED_AT)]:
        with suppress(Unreadable):  # decoding reports it
            headers.append(read_header(root / item.file.path))
    if side := _common_side({(h.width, h.height) for h in headers}):
        return min(64, side)
    return 64 if headers and median(min(h.width, h.height) for h in headers) >= PHOTO else DEFAULT_SIZE


def _decode(
    read: Callable[[str], np.ndarray], items: list[Item], classes: int, skip: bool, notes: dict[str, Any], progress: bool
) -> Iterator[tuple[np.ndarray, int, bool]]:
    """Yields (image, label, train) of each item; notes["skipped"] tells why each unreadable one is so, by its path. Raises UserError."""

    def decode(item: Item) -> np.ndarray | Unreadable:
        try:
            return read(item.file.path)
        except Unreadable as error:
            return error

    skipped: dict[str, str] = {}
    notes["skipped"] = skipped
    remaining = Counter((item.label, item.train) for item in items)
    for item, image in zip(items, with_progress(in_threads(decode, items), len(items), "decoding images", progress)):
        if isinstance(image, np.ndarray):
            yield image, item.label, item.train
        elif not skip:
            raise UserError(f"{image}; repair or remove it, or leave such images out with skip_bad_images=True (--skip-bad-images)")
        else:
            skipped[item.file.path] = str(image)
            remaining[item.label, item.train] -= 1
    if not all(remaining[k, True] for k in range(classes)) or not (items[-1].train or any(remaining[k, False] for k in range(classes))):
        raise UserError(f"too few images can be read: {len(skipped)} of {len(items)} were skipped; {next(iter(skipped.values()))}")


def load_folder(
    root: Path,
    split: Split | Whole,
    *,
    image_size: Sides | None,
    in_channels: int | None,
    fit: str,
    skip_bad_images: bool,
    max_pixels: int,
    cache_dir: str | Path | None,
    progress: bool,
) -> Dataset:
    """The dataset in a folder of images. Raises UserError."""
    listing = list_images(root, split)
    for message in listing.messages:
        say(message, progress)
    key = cache_key("folder", root.resolve().name, listing.items, image_size, in_channels, fit, skip_bad_images, max_pixels)
    folder = data_folder(cache_dir)
    if cached := load_cached(folder, key):
        dataset, notes = cached
    else:
        size, channels, line = _choose_shape(root, listing.items, image_size, in_channels, progress)
        notes = {"size": line, "skipped": {}}

        def read(path: str) -> np.ndarray:
            return read_image(root / path, size, channels, fit, max_pixels)

        dataset = store(
            folder,
            key,
            lambda: _decode(read, listing.items, len(listing.class_names), skip_bad_images, notes, progress),
            (*both(size), channels),
            name=root.resolve().name,
            class_names=listing.class_names,
            notes=notes,
        )
    can_be_read = [item for item in listing.items if item.file.path not in notes["skipped"]]
    dataset = replace(
        dataset,
        augmentation="photo" if min(both(dataset.image_size)) >= PHOTO else "crop-flip",
        train_files=tuple(item.file.path.removeprefix("./") for item in can_be_read if item.train),
        test_files=tuple(item.file.path.removeprefix("./") for item in can_be_read if not item.train),
    )
    if notes["size"]:
        say(notes["size"], progress)
    if notes["skipped"]:
        for line in (f"skipped {len(notes['skipped'])} unreadable images:", *(f"  {line}" for line in notes["skipped"].values())):
            say(line, progress)
    if listing.items[-1].train:  # without test images, as `split` is Whole
        return dataset.whole()
    return replace(dataset, split_hash=listing.split_hash)
