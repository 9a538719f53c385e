"""The data that a run was trained on, loaded again for testing, calibration and plots."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data import Dataset, load_data
from ..errors import UserError
from ..io.run_folder import CONFIG, RunFolder, find_model
from .classifier import Classifier


def data_of_run(
    run: str | os.PathLike[str], classifier: Classifier, data: str | None = None, *, skip_bad_images: bool = False, progress: bool = True
) -> Dataset:
    """The data that a run was trained on, with the same split and limit, at the model's image size.

    run: the folder, its name in runs/, or its .safetensors file. classifier: its model (`load`). data: other data (`load_data`) instead.
    Raises UserError if the run does not record its data, and for data with other classes than the model's.
    """
    limit = None
    split: dict[str, Any] = {"skip_bad_images": skip_bad_images}
    if data is None:
        folder = RunFolder(find_model(Path(run)).parent)
        if not (folder.path / CONFIG).is_file():
            raise UserError(f"{run} does not tell which data it was trained on: give --data")
        arguments = folder.read_config().get("arguments", {})
        data, limit = arguments.get("data"), arguments.get("limit")
        if data is None:
            raise UserError(f"{run} was trained on arrays, which are not kept: give --data, an .npz file for one")
        split |= {name: arguments[name] for name in ("test_fraction", "split_seed") if name in arguments}
        split["skip_bad_images"] |= bool(arguments.get("skip_bad_images"))
    preprocessing = classifier.preprocessing
    dataset = load_data(data, image_size=preprocessing.image_size, in_channels=preprocessing.in_channels, progress=progress, **split)
    if dataset.class_names != classifier.class_names:
        raise UserError(
            f"the classes of {dataset.name} ({_shortened(dataset.class_names)}) are not the model's "
            f"({_shortened(classifier.class_names)}): give data of those classes"
        )
    return dataset.limited(limit)


def _shortened(names: Sequence[str]) -> str:
    return ", ".join([*names[:5], "..."] if len(names) > 5 else names)
