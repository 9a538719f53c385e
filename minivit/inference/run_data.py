"""The data that a run was trained on, loaded again for testing, calibration and plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..data import Dataset
from ..data.dataset import Split, Whole
from ..data.image_file import MAX_PIXELS
from ..data.load import load_parts
from ..errors import UserError
from ..files import user_path
from ..io.run_folder import CONFIG, RunFolder, find_model
from .classifier import Classifier

SPLIT_OPTIONS = (("test_fraction", "test_fraction"), ("seed", "split_seed"))  # fields of Split, and the options of `train`


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
    Raises UserError if the run does not record its data, and for data with other classes than the model's.
    """
    folder = RunFolder(find_model(Path(run)).parent)
    known = (folder.path / CONFIG).is_file()
    arguments = folder.read_config().get("arguments", {}) if known else {}
    own = arguments.get("data")
    if data is None and not known:
        raise UserError(f"{run} does not tell which data it was trained on: give --data")
    if data is None and own is None:
        raise UserError(f"{run} was trained on arrays, which are not kept: give --data, an .npz file for one")
    split: Split | Whole = Whole()
    limit = None
    if data is None or (own is not None and _is_same(data, own)):
        split = Split(**{name: arguments[option] for name, option in SPLIT_OPTIONS if option in arguments})
        limit = arguments.get("limit") if data is None else None
        data = own
        skip_bad_images |= bool(arguments.get("skip_bad_images"))
        max_pixels = max(max_pixels, arguments.get("max_pixels", 0))
    preprocessing = classifier.preprocessing
    dataset = load_parts(
        data,
        split,
        image_size=preprocessing.image_size,
        in_channels=preprocessing.in_channels,
        skip_bad_images=skip_bad_images,
        max_pixels=max_pixels,
        progress=progress,
    )
    if dataset.class_names != classifier.class_names:
        raise UserError(
            f"the classes of {dataset.name} ({_shortened(dataset.class_names)}) are not the model's "
            f"({_shortened(classifier.class_names)}): give data of those classes"
        )
    return dataset.limited(limit)


def _is_same(data: str, own: str) -> bool:
    """Whether two names or paths mean the same data."""
    return str(data) == own or (Path(own).exists() and user_path(data).resolve() == Path(own).resolve())


def _shortened(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], "..."] if len(names) > 5 else names)
