"""Classifier: a model with class names and preprocessing, which labels image files; and `load`, which reads one from a run."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any

import numpy as np

from ..data import Batches, Dataset, prepare
from ..data.decode import as_items, prepare_in_batches
from ..data.fit import check_fit
from ..data.image_file import MAX_PIXELS, Unreadable
from ..data.walk import with_folders_listed
from ..errors import UserError
from ..files import user_path
from ..io import hugging_face, model_file, run_folder
from ..models.base import Model
from ..nn.cost import ModelCost
from ..nn.module import Module, Parameter, dtype_of
from ..runtime.devices import check_device
from ..runtime.precision import OF_PREDICTIONS, precision_for
from ..schema import Checked, Limits, Size, record
from ..sides import ImageSize
from ..tensor import Tensor
from .predictor import LARGEST_BATCH, Prediction, Predictor


@dataclass(frozen=True)
class Preprocessing(Checked):
    """The conversion of images to a model's input. Raises UserError for values that are out of range or not one for each channel."""

    image_size: ImageSize  # pixels: (rows, columns), or one number for a square
    in_channels: Size  # 1 gray, 3 RGB
    mean: tuple[Annotated[float, Limits(-1000, 1000)], ...]  # subtracted from each channel, on the scale 0..1
    std: tuple[Annotated[float, Limits(1e-6, 1000)], ...]  # divisor of each channel
    fit: str = "crop"  # how an image of other proportions becomes one of this size (`data/fit.py`); not in earlier files

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fit(self.fit)
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_channels:
                raise UserError(f"{name} must hold a number for each of {self.in_channels} channels, not {len(values)}")

    @classmethod
    def of(cls, dataset: Dataset) -> Preprocessing:
        """The preprocessing for a dataset's images."""
        return cls(dataset.image_size, dataset.in_channels, dataset.mean, dataset.std, dataset.fit)

    @property
    def shape(self) -> dict[str, Any]:
        """The arguments of `data.prepare`."""
        return {"image_size": self.image_size, "in_channels": self.in_channels, "fit": self.fit}

    def pixels(self, images: Any, max_pixels: int = MAX_PIXELS) -> np.ndarray:
        """Anything that `data.prepare` takes as (n, H, W, C), uint8 or float32 in 0..1. Raises UserError."""
        return prepare(images, **self.shape, max_pixels=max_pixels)

    def batches(self, images: Any, batch_size: int = LARGEST_BATCH, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
        """Normalised float32 (B, C, H, W) batches of anything that `data.prepare` takes. Raises UserError."""
        pixels = self.pixels(images, max_pixels)  # (n, H, W, C)
        batches = Batches(
            pixels,
            np.zeros(len(pixels), np.int64),
            batch_size=min(batch_size, len(pixels)),
            num_classes=1,
            mean=self.mean,
            std=self.std,
            shuffle=False,
            drop_last=False,
        )
        return (inputs for inputs, _ in batches.epoch(0))


@dataclass(frozen=True)
class About(Checked):
    """What a model file says beside the model, for a Classifier."""

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    training_sketch: tuple[Annotated[int, Limits(0, 2**64 - 1)], ...] = ()


class Classifier(Module):
    """A model with its class names and preprocessing, as returned by training and `load`.

    Its parameters are those of the model, with the same names. precision, tta: of predictions, as for Predictor. training_sketch: for a
    cascade, hashes by which images of the training set are detected (`data/train_test_overlap.py`). Raises UserError for class names or a
    preprocessing that do not fit the model.
    """

    def __init__(
        self,
        model: Model,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        training_sketch: Sequence[int] = (),
        precision: str | None = None,
        tta: bool = False,
    ) -> None:
        self.model, self.class_names, self.preprocessing = model, tuple(class_names), preprocessing
        self.training_sketch = tuple(training_sketch)
        self.precision, self.tta = precision, tta
        self._predictor: Predictor | None = None
        config = model.config
        if len(self.class_names) != config.num_classes:
            raise UserError(f"class_names holds {len(self.class_names)} names for a model of {config.num_classes} classes")
        for name in ("image_size", "in_channels"):
            if getattr(preprocessing, name) != getattr(config, name):
                raise UserError(f"preprocessing: {name} is {getattr(preprocessing, name)}, that of the model {getattr(config, name)}")

    def forward(self, images: Any) -> Tensor:
        return self.model(images)

    def exits(self, images: Any) -> list[Tensor]:
        return self.model.exits(images)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        return self.model.named_parameters(prefix)

    def unwrapped(self) -> Model:
        return self.model

    def astype(self, dtype: np.dtype) -> Classifier:
        self.model.astype(dtype)
        return self

    @property
    def num_exits(self) -> int:
        return self.model.num_exits

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def cost(self) -> ModelCost:
        """The model's multiply-adds for one image."""
        return self.model.cost()

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or a copy holds: its Predictor is made anew."""
        return {**vars(self), "_predictor": None}

    @property
    def predictor(self) -> Predictor:
        """The Predictor of the model, created on first use."""
        if self._predictor is None:
            self._predictor = Predictor(self.model, self.precision, tta=self.tta)
        return self._predictor

    def predict(
        self, images: Any, budget: float | None = None, *, skip_bad_images: bool = False, max_pixels: int = MAX_PIXELS
    ) -> Prediction:
        """Labels and probabilities of images: uint8 (B, H, W, C) or floats in 0..1, PIL images, paths of files or of folders, bytes of
        image files, such files open for reading bytes, or a single one of these.

        A folder stands for all image files in it and its subfolders, in sorted order. budget: as for `Predictor.predict`.
        skip_bad_images: leave out images that cannot be read; `sources` and `skipped` of the result tell which.
        max_pixels: the most that an image file may have; decoding takes up to 15 bytes a pixel.
        Raises UserError for an image that cannot be read, and if none can.
        """
        skipped: list[Unreadable] = []
        bad = skipped if skip_bad_images else None
        parts = list(self.predict_in_batches(images, budget, bad, max_pixels=max_pixels))
        probabilities, exits, macs = (np.concatenate([getattr(p, name) for p in parts]) for name in ("probabilities", "exits", "macs"))
        sources = tuple(source for p in parts for source in p.sources)
        return Prediction(probabilities, exits, macs, self.class_names, sources, tuple(map(str, skipped)))

    def predict_in_batches(
        self,
        images: Any,
        budget: float | None = None,
        skipped: list[Unreadable] | None = None,
        batch_size: int = LARGEST_BATCH,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[Prediction]:
        """Like `predict`, for any number of files, also an iterator over them: yields the Prediction of each batch. Only the images of some
        batches are in memory.

        skipped: a list, to which an error is added for each image that cannot be read; None: the first one is raised.
        """
        given = as_items(images)
        batches: Iterable[tuple[np.ndarray, Sequence[str | int]]]
        if isinstance(given, (Sequence, Iterator)):
            items = with_folders_listed(given)
            batches = prepare_in_batches(items, batch_size, skipped, **self.preprocessing.shape, max_pixels=max_pixels)
        else:
            array = self.preprocessing.pixels(given, max_pixels)
            places = range(len(array))
            batches = ((array[start : start + batch_size], places[start : start + batch_size]) for start in places[::batch_size])
        is_empty = True
        for pixels, sources in batches:
            (inputs,) = self.preprocessing.batches(pixels, batch_size)
            prediction = self.predictor.predict(inputs, budget)
            is_empty = False
            yield replace(prediction, class_names=self.class_names, sources=tuple(sources))
        if is_empty:
            count = len(skipped or ())
            raise UserError(
                f"none of the {count} images can be read: {skipped[0]}" if skipped else "no images were given: pass at least one"
            )

    def save(self, path: str | os.PathLike[str], precision: str | None = None) -> None:
        """Write weights, configuration, thresholds, class names and preprocessing as one safetensors file for `load`.

        precision: "int8" makes a file of about a quarter of the size (`io/int8.py`). Raises UserError.
        """
        about = {"class_names": self.class_names, "preprocessing": asdict(self.preprocessing), "training_sketch": self.training_sketch}
        model_file.save_model(path, self.model, about, precision)


def load(path: str | os.PathLike[str], precision: str | None = None, device: str = "cpu", tta: bool = False) -> Classifier:
    """Load the model of a run folder, or of a .safetensors file written by minivit, in evaluation mode.

    path: the folder, its name in runs/, or the file; or a folder of Hugging Face's transformers with a ViT or DeiT
        (`io/hugging_face.py`), or its model.safetensors.
    precision, tta: of predictions, as for Predictor. device: "cpu" or "cuda".
    Raises UserError if it does not exist (with the nearest names), or is damaged.
    """
    check_device(device)
    file, metadata = user_path(path), dict[str, Any]()
    folder = file.parent if file.name == run_folder.MODEL else file
    if hugging_face.is_folder(folder):
        model, class_names, preprocessing = hugging_face.load_folder(folder)
        metadata = {"class_names": class_names, "preprocessing": preprocessing}
    else:
        file = run_folder.find_model(file)
        model, metadata = model_file.load_model(file)
    precision_for(precision or model.config.dtype, dtype_of(model), device, OF_PREDICTIONS)  # raises
    model.to(device)
    with model_file.reading(file, "create the model and load its weights with load_weights"):
        about = record(About, metadata)
        return Classifier(model, about.class_names, about.preprocessing, about.training_sketch, precision, tta)
