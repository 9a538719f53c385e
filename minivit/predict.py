"""From images to logits, labels and probabilities, by a recorded plan; preprocessing travels with the model."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint
from .data import Batches, Dataset, prepare
from .errors import UserError
from .kernels import device
from .models import Model
from .module import Module, Parameter
from .plan import Plan
from .tensor import Tensor, no_grad

PLANS = 4                                               # batch sizes whose plans a Predictor keeps
LARGEST_BATCH = 256
ELEMENTS = 2 ** 21                                      # of all images of a batch together, at most: activations stay near the caches
AVAILABLE = {"precision": ("float32", "float64"), "device": ("cpu",)}


def check_available(**chosen: str) -> None:
    """Raises UserError for a precision or device that this version cannot compute with."""
    for name, value in chosen.items():
        if value not in AVAILABLE[name]:
            raise UserError(f"{name}={value!r} is not available: choose {' or '.join(map(repr, AVAILABLE[name]))}")


def dtype_of(model: Module) -> np.dtype:
    """The dtype of a model's parameters; raises UserError where it has none."""
    first = next((p for _, p in model.named_parameters()), None)
    if first is None:
        raise UserError("the model has no parameters")
    return first.dtype


class Predictor:
    """predictor(images) -> logits, in evaluation mode, by a plan of the model's forward that is recorded once for each batch size.

    model: is called on (B, C, H, W) and returns (B, classes); its weights may change between calls. precision: None, the model's own, is
    the only choice so far. device: "cpu". batch_size: of the largest plan; larger batches are split; None fits it to the images.
    At most `PLANS` plans are kept; a batch smaller than a plan that is there, but more than half as large, is padded for it.
    """

    def __init__(self, model: Module, precision: str | None = None, device: str = "cpu", batch_size: int | None = None) -> None:
        own = dtype_of(model).name
        check_available(precision=precision or own, device=device)
        if precision not in (None, own):
            raise UserError(f"precision={precision!r} does not fit a model of dtype {own}: create it with dtype={precision!r}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self._plans: dict[tuple[int, ...], tuple[Plan, np.ndarray]] = {}            # input shape -> plan, its input; last used last
        self._recorded: list[np.ndarray] = []           # the parameters' arrays that the plans read

    def __call__(self, images: Any) -> np.ndarray:
        """Logits (B, classes) float32 of images (B, C, H, W), normalised as in training."""
        images = images.data if isinstance(images, Tensor) else np.asarray(images)
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(f"images must have the shape (B, C, H, W) and hold an image, got {images.shape}")
        largest = self.batch_size or min(LARGEST_BATCH, max(1, ELEMENTS // images[0].size))
        parts = [self._run(images[start:start + largest]) for start in range(0, len(images), largest)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _run(self, images: np.ndarray) -> np.ndarray:
        plan, source = self._plan_for(images.shape)
        np.copyto(source[:len(images)], images)
        plan.replay()
        return plan.results[0][:len(images)].astype(np.float32)

    def _plan_for(self, shape: tuple[int, ...]) -> tuple[Plan, np.ndarray]:
        arrays = [p.data for p in self.model.parameters()]
        if len(arrays) != len(self._recorded) or any(a is not b for a, b in zip(arrays, self._recorded)):
            self._plans, self._recorded = {}, arrays    # for one, a Trainer has moved them
        fitting = [s for s in self._plans if s[1:] == shape[1:] and shape[0] <= s[0] < 2 * shape[0]]
        key = min(fitting, default=shape)
        found = self._plans.pop(key, None) or self._record(shape)
        self._plans[key] = found
        if len(self._plans) > PLANS:
            del self._plans[next(iter(self._plans))]    # the one that has not been used for longest
        return found

    def _record(self, shape: tuple[int, ...]) -> tuple[Plan, np.ndarray]:
        source = device.empty(shape, dtype_of(self.model))          # (B, C, H, W)
        source[...] = 0
        training = self.model.training
        self.model.eval()
        try:
            with no_grad():
                return Plan(lambda: self.model(Tensor(source)).data), source
        finally:
            self.model.train(training)


def evaluate(predictor: Predictor, images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float], num_classes: int,
             batch_size: int = LARGEST_BATCH) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in 0..1) over images (n, H, W, C), uint8 or float32 in 0..1, and labels (n,)."""
    batches = Batches(images, labels, batch_size=min(batch_size, len(images)), num_classes=num_classes, mean=mean, std=std, shuffle=False,
                      drop_last=False)
    loss = correct = 0.0
    for inputs, targets in batches.epoch(0):
        logits = predictor(inputs).astype(np.float64)   # (B, K)
        logits -= logits.max(1, keepdims=True)
        loss += float((np.log(np.exp(logits).sum(1)) - logits[np.arange(len(targets)), targets]).sum())
        correct += int((logits.argmax(1) == targets).sum())
    return loss / len(images), correct / len(images)


@dataclass(frozen=True)
class Preprocessing:
    """How images become a model's input."""

    image_size: int                                     # pixels: the central square is resized to it
    in_channels: int                                    # 1 gray, 3 RGB
    mean: tuple[float, ...]                             # of each channel, on the scale 0..1: subtracted
    std: tuple[float, ...]                              # of each channel: divided by

    @classmethod
    def of(cls, dataset: Dataset) -> Preprocessing:
        return cls(dataset.image_size, dataset.in_channels, dataset.mean, dataset.std)

    def batches(self, images: Any, batch_size: int = LARGEST_BATCH) -> Iterator[np.ndarray]:
        """Normalised float32 (B, C, S, S) batches of anything that `data.prepare` takes. Raises UserError."""
        pixels = prepare(images, image_size=self.image_size, in_channels=self.in_channels)          # (n, S, S, C)
        batches = Batches(pixels, np.zeros(len(pixels), np.int64), batch_size=min(batch_size, len(pixels)), num_classes=1, mean=self.mean,
                          std=self.std, shuffle=False, drop_last=False)
        return (inputs for inputs, _ in batches.epoch(0))


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model makes of B images."""

    probabilities: np.ndarray                           # (B, K) float32; each row sums to 1
    class_names: tuple[str, ...]                        # K of them

    @property
    def labels(self) -> np.ndarray:
        """(B,) int64: the likeliest class of each image."""
        return self.probabilities.argmax(1)

    @property
    def names(self) -> list[str]:
        """The likeliest class of each image, by name."""
        return [self.class_names[k] for k in self.labels]

    @property
    def confidence(self) -> np.ndarray:
        """(B,) float32: the probability of the likeliest class."""
        return self.probabilities.max(1)

    def __len__(self) -> int:
        return len(self.probabilities)


class Classifier(Module):
    """A model with its class names and preprocessing: what training gives and `load` reads.

    Its parameters are the model's, by the same names.
    """

    def __init__(self, model: Model, class_names: Sequence[str], preprocessing: Preprocessing) -> None:
        self.model, self.class_names, self.preprocessing = model, tuple(class_names), preprocessing
        self._predictor: Predictor | None = None

    def forward(self, images: Any) -> Tensor:
        return self.model(images)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        return self.model.named_parameters(prefix)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    @property
    def predictor(self) -> Predictor:
        if self._predictor is None:
            self._predictor = Predictor(self.model)
        return self._predictor

    def predict(self, images: Any) -> Prediction:
        """Labels and probabilities of images: uint8 (B, H, W, C) or floats in 0..1, PIL images, paths, or one of these.

        Raises UserError for an image that cannot be read.
        """
        logits = np.concatenate([self.predictor(inputs) for inputs in self.preprocessing.batches(images)])      # (B, K)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return Prediction(powers / powers.sum(1, keepdims=True), self.class_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration, class names and preprocessing as one safetensors file, which `load` reads. Raises UserError."""
        checkpoint.save_model(path, self.model, {"class_names": self.class_names, "preprocessing": asdict(self.preprocessing)})


def load(path: str | os.PathLike[str]) -> Classifier:
    """The model of a run folder, or of a .safetensors file that minivit wrote, in evaluation mode.

    path: the folder, its name below runs/, or the file. Raises UserError where there is none (with the nearest names), or it is damaged.
    """
    file = checkpoint.find_model(Path(path))
    model, about = checkpoint.load_model(file)
    try:
        kept = about["preprocessing"]
        preprocessing = Preprocessing(int(kept["image_size"]), int(kept["in_channels"]), tuple(kept["mean"]), tuple(kept["std"]))
        names = tuple(map(str, about["class_names"]))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not say how its images are prepared ({error}): load its weights with load_weights") from error
    return Classifier(model, names, preprocessing)
