"""From images to logits, labels and probabilities, by a recorded plan; preprocessing travels with the model."""
from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import checkpoint
from .calibration import Calibration, check, confidence
from .cost import ModelCost
from .data import Batches, Dataset, prepare
from .errors import UserError
from .kernels import device
from .models import DVT, Model
from .module import Module, Parameter
from .plan import Plan
from .tensor import Tensor, no_grad

FIRST_PLANS, LATER_PLANS = 4, 11                        # batch sizes whose plans a Predictor keeps: of the first stage, of each other
LARGEST_BATCH = 256
Passed = tuple[np.ndarray | None, ...]                  # what a stage of a cascade hands to the next; () before the first
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
    """predictor(images) -> logits, in evaluation mode, by plans of the model's forward that are recorded once for each batch size.

    model: is called on (B, C, H, W) and returns (B, classes); its weights may change between calls. precision: None, the model's own, is
    the only choice so far. device: "cpu". batch_size: of the largest plan; larger batches are split; None fits it to the images.
    A cascade has plans of each stage by itself: with a budget, images that exit leave the batch, and the others go on without them
    (2105.15075, section 3.1). A few plans are kept; a batch a little smaller than one of them is padded for it.
    """

    def __init__(self, model: Module, precision: str | None = None, device: str = "cpu", batch_size: int | None = None) -> None:
        own = dtype_of(model).name
        check_available(precision=precision or own, device=device)
        if precision not in (None, own):
            raise UserError(f"precision={precision!r} does not fit a model of dtype {own}: create it with dtype={precision!r}")
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be 1 or more, got {batch_size}")
        self.model, self.batch_size = model, batch_size
        self.stages = len(model.stages) if isinstance(model, DVT) else 1
        self._plans: list[dict[tuple[int, ...], _StagePlan]] = []   # of each stage, by input shape; last used last
        self._recorded: list[np.ndarray] = []           # the parameters' arrays that the plans read
        self._costs = np.array(model.cost().exits if isinstance(model, Model) else [np.nan], np.float64)        # multiply-adds by exit
        self._checked: Calibration | None = None        # what was found to fit the weights

    def __call__(self, images: Any) -> np.ndarray:
        """Logits (B, classes) float32 of images (B, C, H, W), normalised as in training; of a cascade the last exit's."""
        return self.logits(images)[-1]

    def logits(self, images: Any) -> np.ndarray:
        """The logits of every exit: (exits, B, classes) float32."""
        return np.concatenate([np.stack([*self._levels([part])]) for part in self._parts(images)], axis=1)

    def exits(self, images: Any) -> Iterator[Prediction]:
        """The model's answers for all images, an exit at a time, each computed when it is asked for."""
        for k, logits in enumerate(self._levels(self._parts(images))):
            yield self._prediction(logits, np.full(len(logits), k))

    def predict(self, images: Any, budget: float | None = None) -> Prediction:
        """What the model makes of images (B, C, H, W): of a cascade each at the first exit that is sure enough for the budget.

        budget: mean cost of an image, in the unit of the model's calibration (`minivit.calibrate`); None: all go to the last exit.
        Raises UserError where the model has no thresholds for it, or those of other weights.
        """
        thresholds = None if budget is None else self._thresholds(budget)
        parts = [self._stopping(part, thresholds) for part in self._parts(images)]
        logits, exits = (np.concatenate(arrays) for arrays in zip(*parts))
        return self._prediction(logits, exits)

    def _parts(self, images: Any) -> list[np.ndarray]:
        """The images in batches that plans take; plans of parameters that lie elsewhere by now are dropped."""
        images = images.data if isinstance(images, Tensor) else np.asarray(images)
        if images.ndim != 4 or 0 in images.shape:
            raise UserError(f"images must have the shape (B, C, H, W) and hold an image, got {images.shape}")
        arrays = [p.data for p in self.model.parameters()]
        if len(arrays) != len(self._recorded) or any(a is not b for a, b in zip(arrays, self._recorded)):
            self._plans, self._recorded = [{} for _ in range(self.stages)], arrays              # for one, a Trainer has moved them
        largest = self.batch_size or min(LARGEST_BATCH, max(1, ELEMENTS // images[0].size))
        return [images[start:start + largest] for start in range(0, len(images), largest)]

    def _levels(self, parts: list[np.ndarray]) -> Iterator[np.ndarray]:
        """The logits of all parts together, an exit at a time."""
        passed: list[Passed] = [()] * len(parts)
        for k in range(self.stages):
            answers = [self._run(k, part, state, len(part)) for part, state in zip(parts, passed)]
            passed = [state for _, state in answers]
            yield np.concatenate([logits for logits, _ in answers])

    def _stopping(self, images: np.ndarray, thresholds: tuple[str, Sequence[float]] | None) -> tuple[np.ndarray, np.ndarray]:
        """(logits (B, classes), exits (B,)): each image stops at the first exit that is sure of it, and the others go on without it."""
        exits = np.zeros(len(images), np.int64)
        answers, passed = self._run(0, images, (), len(images))
        going, logits = np.arange(len(images)), answers
        for k in range(1, self.stages):
            stays = np.ones(len(going), bool)
            if thresholds:
                stays = confidence(logits, thresholds[0]) < thresholds[1][k - 1]
            going = going[stays]
            if not len(going):
                break
            logits, passed = self._run(k, images[going], tuple(None if a is None else a[stays] for a in passed), len(images))
            answers[going], exits[going] = logits, k
        return answers, exits

    def _thresholds(self, budget: float) -> tuple[str, Sequence[float]]:
        """The kind of confidence, and the least of it that stops an image at each exit but the last."""
        found: Calibration | None = getattr(self.model, "calibration", None)
        if self.stages == 1:
            raise UserError(f"budget={budget!r}: the model has one exit; a budget is for cascades, as create_model('dvt', ...)")
        if found is None:
            raise UserError(f"budget={budget!r}: the model has no thresholds yet: calibrate it (minivit.calibrate, minivit calibrate)")
        if found is not self._checked:
            check(found, self.model)
            self._checked = found
        return found.confidence, found.for_budget(budget)

    def _prediction(self, logits: np.ndarray, exits: np.ndarray) -> Prediction:
        powers = np.exp(logits - logits.max(1, keepdims=True))
        return Prediction(powers / powers.sum(1, keepdims=True), exits=exits, macs=self._costs[exits])

    def _run(self, k: int, images: np.ndarray, passed: Passed, whole: int) -> tuple[np.ndarray, Passed]:
        """(logits, what the next stage reuses) of stage k. passed: what stage k - 1 gave. whole: images of the batch that set out."""
        plans, number = self._plans[k], len(images)
        least = number if number == whole else _roomy(number, whole)
        fitting = [s for s in plans if s[1:] == images.shape[1:] and least <= s[0] < 2 * number] if number == whole else []
        key = min(fitting, default=(least, *images.shape[1:]))
        plan = plans.pop(key, None) or _StagePlan(self.model, k, key, passed)
        plans[key] = plan
        if len(plans) > (FIRST_PLANS if k == 0 else LATER_PLANS):
            del plans[next(iter(plans))]                # the one that has not been used for longest
        return plan(images, passed)


def _roomy(number: int, whole: int) -> int:
    """The size of the plan for what is left of a whole batch: one of at most eleven, and hardly more than `number`."""
    step = max(1, whole // 8)
    return min(whole, -(-number // step) * step) if number >= step else min(step, 1 << (number - 1).bit_length())


class _StagePlan:
    """The plan of one stage, or of a model without stages, for batches of one shape."""

    def __init__(self, model: Module, k: int, shape: tuple[int, ...], passed: Passed) -> None:
        self.images = device.empty(shape, dtype_of(model))          # (B, C, H, W)
        self.passed = tuple(None if a is None else device.empty((shape[0], *a.shape[1:]), a.dtype) for a in passed)
        for array in (self.images, *self.passed):
            if array is not None:
                array[...] = 0
        self.given: list[bool] = []                     # which of the things that the next stage may reuse there are
        training = model.training
        model.eval()
        try:
            with no_grad():
                self.plan = Plan(lambda: self._compute(model, k))
        finally:
            model.train(training)

    def _compute(self, model: Module, k: int) -> tuple[np.ndarray, ...]:
        if not isinstance(model, DVT):
            return (model(Tensor(self.images)).data,)
        assert isinstance(model, DVT)
        tokens, relation = (None if a is None else Tensor(a) for a in self.passed or (None, None))
        logits, handed = model.stage(k, Tensor(self.images), (tokens, relation))
        self.given = [tensor is not None for tensor in handed]
        return (logits.data, *(tensor.data for tensor in handed if tensor is not None))

    def __call__(self, images: np.ndarray, passed: Passed) -> tuple[np.ndarray, Passed]:
        number = len(images)
        np.copyto(self.images[:number], images)
        for own, array in zip(self.passed, passed):
            if own is not None and array is not None:
                np.copyto(own[:number], array)
        self.plan.replay()
        logits, *handed = self.plan.results
        left = iter(handed)
        return logits[:number].astype(np.float32), tuple(next(left)[:number].copy() if there else None for there in self.given)


def evaluate(predictor: Predictor, images: np.ndarray, labels: np.ndarray, mean: Sequence[float], std: Sequence[float], num_classes: int,
             batch_size: int = LARGEST_BATCH) -> tuple[float, list[float]]:
    """(mean cross-entropy of the last exit, accuracy in 0..1 of every exit).

    images: (n, H, W, C), uint8 or float32 in 0..1. labels: (n,).
    """
    batches = Batches(images, labels, batch_size=min(batch_size, len(images)), num_classes=num_classes, mean=mean, std=std, shuffle=False,
                      drop_last=False)
    loss, correct = 0.0, np.zeros(predictor.stages)
    for inputs, targets in batches.epoch(0):
        every = predictor.logits(inputs).astype(np.float64)         # (exits, B, K)
        correct += (every.argmax(2) == targets).sum(1)
        last = every[-1] - every[-1].max(1, keepdims=True)
        loss += float((np.log(np.exp(last).sum(1)) - last[np.arange(len(targets)), targets]).sum())
    return loss / len(images), (correct / len(images)).tolist()


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
    exits: np.ndarray                                   # (B,) int64: which exit answered, from 0; 0 of a model without others
    macs: np.ndarray                                    # (B,) float64: the multiply-adds up to there; NaN of a model that tells none
    class_names: tuple[str, ...] = ()                   # K of them, where the model knows them

    @property
    def labels(self) -> np.ndarray:
        """(B,) int64: the likeliest class of each image."""
        return self.probabilities.argmax(1)

    @property
    def names(self) -> list[str]:
        """The likeliest class of each image, by name, or by number where there are no names."""
        return [self.class_names[k] if self.class_names else str(k) for k in self.labels]

    @property
    def confidence(self) -> np.ndarray:
        """(B,) float32: the probability of the likeliest class."""
        return self.probabilities.max(1)

    def __len__(self) -> int:
        return len(self.probabilities)


class Classifier(Module):
    """A model with its class names and preprocessing: what training gives and `load` reads.

    Its parameters are the model's, by the same names. training_sketch: by which images of the training set are known again
    (`data/sketch.py`).
    """

    def __init__(self, model: Model, class_names: Sequence[str], preprocessing: Preprocessing, training_sketch: Sequence[int] = ()) -> None:
        self.model, self.class_names, self.preprocessing = model, tuple(class_names), preprocessing
        self.training_sketch = tuple(training_sketch)
        self._predictor: Predictor | None = None

    def forward(self, images: Any) -> Tensor:
        return self.model(images)

    def exits(self, images: Any) -> list[Tensor]:
        return self.model.exits(images)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        return self.model.named_parameters(prefix)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.model.config

    def cost(self) -> ModelCost:
        """The model's multiply-adds for one image."""
        return self.model.cost()

    @property
    def predictor(self) -> Predictor:
        if self._predictor is None:
            self._predictor = Predictor(self.model)
        return self._predictor

    def predict(self, images: Any, budget: float | None = None) -> Prediction:
        """Labels and probabilities of images: uint8 (B, H, W, C) or floats in 0..1, PIL images, paths, or one of these.

        budget: as `Predictor.predict` takes it. Raises UserError for an image that cannot be read.
        """
        parts = [self.predictor.predict(inputs, budget) for inputs in self.preprocessing.batches(images)]
        probabilities, exits, macs = (np.concatenate([getattr(p, name) for p in parts]) for name in ("probabilities", "exits", "macs"))
        return Prediction(probabilities, exits, macs, self.class_names)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write weights, configuration, thresholds, class names and preprocessing as one safetensors file, which `load` reads.

        Raises UserError.
        """
        checkpoint.save_model(path, self.model, {"class_names": self.class_names, "preprocessing": asdict(self.preprocessing),
                                                 "training_sketch": self.training_sketch})


def load(path: str | os.PathLike[str]) -> Classifier:
    """The model of a run folder, or of a .safetensors file that minivit wrote, in evaluation mode.

    path: the folder, its name below runs/, or the file. Raises UserError where there is none (with the nearest names), or it is damaged.
    """
    file = checkpoint.find_model(Path(path))
    model, about = checkpoint.load_model(file)
    try:
        kept = about["preprocessing"]
        preprocessing = Preprocessing(int(kept["image_size"]), int(kept["in_channels"]), tuple(kept["mean"]), tuple(kept["std"]))
        names, sketch = tuple(map(str, about["class_names"])), tuple(map(int, about.get("training_sketch", ())))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} does not say how its images are prepared ({error}): load its weights with load_weights") from error
    return Classifier(model, names, preprocessing, sketch)
