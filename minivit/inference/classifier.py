"""Classifier: a model with class names and preprocessing, which labels image files; and `load`, which reads one from a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data import Batches, Dataset, prepare
from ..data.image_file import MAX_PIXELS
from ..errors import UserError
from ..io import run_folder
from ..models.base import Model
from ..nn.cost import ModelCost
from ..nn.module import Module, Parameter, dtype_of
from ..runtime.devices import check_device
from ..runtime.precision import precision_for
from ..tensor import Tensor
from .predictor import LARGEST_BATCH, Prediction, Predictor


@dataclass(frozen=True)
class Preprocessing:
    """The conversion of images to a model's input."""

    image_size: int  # pixels; the central square is resized to it
    in_channels: int  # 1 gray, 3 RGB
    mean: tuple[float, ...]  # subtracted from each channel, on the scale 0..1
    std: tuple[float, ...]  # divisor of each channel

    @classmethod
    def of(cls, dataset: Dataset) -> Preprocessing:
        """The preprocessing for a dataset's images."""
        return cls(dataset.image_size, dataset.in_channels, dataset.mean, dataset.std)

    def batches(self, images: Any, batch_size: int = LARGEST_BATCH, max_pixels: int = MAX_PIXELS) -> Iterator[np.ndarray]:
        """Normalised float32 (B, C, S, S) batches of anything that `data.prepare` takes. Raises UserError."""
        pixels = prepare(images, image_size=self.image_size, in_channels=self.in_channels, max_pixels=max_pixels)  # (n, S, S, C)
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


class Classifier(Module):
    """A model with its class names and preprocessing, as returned by training and `load`.

    Its parameters are those of the model, with the same names. precision: of predictions, as for Predictor. training_sketch: for a cascade,
    hashes by which images of the training set are detected (`data/train_test_overlap.py`).
    """

    def __init__(
        self,
        model: Model,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        training_sketch: Sequence[int] = (),
        precision: str | None = None,
    ) -> None:
        self.model, self.class_names, self.preprocessing = model, tuple(class_names), preprocessing
        self.training_sketch = tuple(training_sketch)
        self.precision = precision
        self._predictor: Predictor | None = None

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
            self._predictor = Predictor(self.model, self.precision)
        return self._predictor

    def predict(self, images: Any, budget: float | None = None, *, max_pixels: int = MAX_PIXELS) -> Prediction:
        """Labels and probabilities of images: uint8 (B, H, W, C) or floats in 0..1, PIL images, paths, or a single one of these.

        budget: as for `Predictor.predict`. max_pixels: the most that an image file may have; decoding takes up to 15 bytes a pixel.
        Raises UserError for an image that cannot be read.
        """
        parts = [self.predictor.predict(inputs, budget) for inputs in self.preprocessing.batches(images, max_pixels=max_pixels)]
        probabilities, exits, macs = (np.concatenate([getattr(p, name) for p in parts]) for name in ("probabilities", "exits", "macs"))
        return Prediction(probabilities, exits, macs, self.class_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration, thresholds, class names and preprocessing as one safetensors file for `load`.

        Raises UserError.
        """
        run_folder.save_model(
            path,
            self.model,
            {"class_names": self.class_names, "preprocessing": asdict(self.preprocessing), "training_sketch": self.training_sketch},
        )


def load(path: str | os.PathLike[str], precision: str | None = None, device: str = "cpu") -> Classifier:
    """Load the model of a run folder, or of a .safetensors file written by minivit, in evaluation mode.

    path: the folder, its name in runs/, or the file. precision: of predictions, as for Predictor. device: "cpu" or "cuda".
    Raises UserError if it does not exist (with the nearest names), or is damaged.
    """
    check_device(device)
    file = run_folder.find_model(Path(path))
    model, metadata = run_folder.load_model(file)
    try:
        fields = metadata["preprocessing"]
        preprocessing = Preprocessing(int(fields["image_size"]), int(fields["in_channels"]), tuple(fields["mean"]), tuple(fields["std"]))
        names, training_hashes = tuple(map(str, metadata["class_names"])), tuple(map(int, metadata.get("training_sketch", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not say how its images are prepared ({error}): load its weights with load_weights") from error
    precision_for(precision or model.config.dtype, dtype_of(model), device)  # raises
    model.to(device)
    return Classifier(model, names, preprocessing, training_hashes, precision)
