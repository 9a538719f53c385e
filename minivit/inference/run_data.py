"""The data that a run was trained on, loaded again for testing, calibration and plots."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

from ..data import Dataset
from ..data.dataset import Split, Whole
from ..data.image_file import MAX_PIXELS
from ..data.load import load_parts
from ..errors import UserError, listed
from ..files import user_path
from ..io.model_file import reading
from ..io.run_folder import CONFIG, RunFolder, find_model
from ..schema import Checked, Limits, checked
from .classifier import Classifier


@dataclass(frozen=True)
class DataOptions(Checked):
    """The options of `train` that decide its data, as config.json records them."""

    data: str | None
    test_fraction: Annotated[float, Limits(above=0, below=1)] = Split().test_fraction
    split_seed: Annotated[int, Limits(0, 2**64 - 1)] = Split().seed
    limit: Annotated[int, Limits(least=1)] | None = None
    skip_bad_images: bool = False
    max_pixels: Annotated[int, Limits(least=1)] = MAX_PIXELS
    split_hash: str = ""  # not in earlier runs


def data_of_run(
    run: str | os.PathLike[str],
    classifier: Classifier,
    data: str | None = None,
    *,
    skip_bad_images: bool = False,
    max_pixels: int = MAX_PIXELS,
    progress: bool = True,
) -> Dataset:
    """The data that a run was trained on, with the same split and limit, at the model's image size.

    run: the folder, its name in runs/, or its .safetensors file. classifier: its model (`load`). data: other data (`load_data`) instead; if
    it has no split, all its images are test images. The run's own data keeps the run's split also if it is given as `data`, then
    without the limit.
    Classes are found by their names, so data may have some of the model's, in any order. Raises UserError if the run does not record its
    data, if the run's data has changed, so that its split would test images of the training, and for data with other classes than the
    model's.
    """
    folder = RunFolder(find_model(Path(run)).parent)
    known = (folder.path / CONFIG).is_file()
    recorded = _recorded(folder) if known else None
    own = recorded.data if recorded else None
    if data is None and not known:
        raise UserError(f"{run} does not tell which data it was trained on: give --data")
    if data is None and own is None:
        raise UserError(f"{run} was trained on arrays, which are not kept: give --data, an .npz file for one")
    split: Split | Whole = Whole()
    limit = None
    if recorded and own is not None and (data is None or _is_same(data, own)):
        split = Split(recorded.test_fraction, recorded.split_seed)
        limit = recorded.limit if data is None else None
        data = own
        skip_bad_images |= recorded.skip_bad_images
        max_pixels = max(max_pixels, recorded.max_pixels)
    preprocessing = classifier.preprocessing
    dataset = load_parts(
        data,
        split,
        image_size=preprocessing.image_size,
        in_channels=preprocessing.in_channels,
        fit=preprocessing.fit,
        skip_bad_images=skip_bad_images,
        max_pixels=max_pixels,
        progress=progress,
    )
    if isinstance(split, Split) and recorded and recorded.split_hash and dataset.split_hash not in ("", recorded.split_hash):
        raise UserError(
            f"{dataset.name} is no longer the data that {run} was trained on: its split by chance would test images of the training; "
            "give other images with --data, or train again"
        )
    is_named = dataset.class_names != tuple(map(str, range(dataset.num_classes)))  # numbers alone do not tell which classes they mean
    if is_named and set(dataset.class_names) <= set(classifier.class_names):
        dataset = dataset.with_classes(classifier.class_names)  # some of them, as in a small test set, or in another order
    if dataset.class_names != classifier.class_names:
        raise UserError(
            f"the classes of {dataset.name} ({listed(dataset.class_names)}) are not the model's "
            f"({listed(classifier.class_names)}): give data of those classes"
        )
    return dataset.limited(limit)


def _recorded(folder: RunFolder) -> DataOptions:
    config = folder.read_config()
    with reading(folder.path / CONFIG, "give the data, or train again"):
        options = checked("arguments", config.get("arguments"), DataOptions)
        return replace(options, split_hash=checked("split_hash", config.get("split_hash", ""), str))


def _is_same(data: str, own: str) -> bool:
    """Whether two names or paths mean the same data."""
    return str(data) == own or (user_path(own).exists() and user_path(data).resolve() == user_path(own).resolve())
