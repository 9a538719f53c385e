"""`calibrate`: thresholds for a cascade, found on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any

import numpy as np

from ..data import prepare
from ..data.dataset import Split, check_labels
from ..data.train_test_overlap import overlap
from ..errors import UserError
from ..models import Model
from ..models.cascade.calibration import (
    CONFIDENCES,
    METHODS,
    UNITS,
    Calibration,
    check_budget,
    check_choice,
    check_feasible,
    confidence,
    fingerprint,
)
from ..models.cascade.thresholds import exact, outcome, sweep
from ..nn.module import Module
from ..runtime.machine import cpu_name
from ..tensor import Tensor
from .classifier import Classifier
from .predictor import Predictor

SOLVERS = {"exact": exact, "sweep": sweep}
FEWEST = 100  # images to calibrate on
MOST_KNOWN = 0.05  # share of them that may be training images
BUDGETS = 8  # where none are given
ROUNDS = 9  # of measuring milliseconds


def calibrate(
    model: Module | Predictor,
    images: Any,
    labels: Any,
    budgets: Sequence[float] | None = None,
    unit: str = "macs",
    method: str = "exact",
    confidence: str = "max",
    batch_size: int = 64,
) -> Calibration:
    """Thresholds of a cascade for each of several budgets; from then on `model.calibration`, used by `predict(images, budget)`.

    model: a cascade of create_model("dvt", ...), its Predictor, or a Classifier (`load(...)`, `train(...).model`).
    images: at least 100 that the model was not trained on: for a Classifier anything that its predict() takes, else normalised
        (n, C, S, S) arrays. labels: (n,) integers.
    budgets: largest mean costs of an image; None: 8, evenly spaced from all images at the first exit to all at the last.
    unit: of the budgets: "macs", multiply-adds; "ms", milliseconds an image, as measured on this machine in batches of `batch_size`;
        "share", of the multiply-adds of all exits together.
    method: "exact", the highest accuracy over all thresholds, or "sweep", the rule that the authors released (`minivit.thresholds`).
    confidence: "max", "entropy" or "margin" (`minivit.calibration.confidence`).
    Raises UserError for a model with one exit, fewer than 100 images, labels that do not fit, a budget that no thresholds can meet, and
    images of the training set, which a Classifier knows (`data/train_test_overlap.py`).
    """
    for what, value, known in (("unit", unit, UNITS), ("method", method, METHODS), ("confidence", confidence, CONFIDENCES)):
        check_choice(what, value, known)
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    wanted = None if budgets is None else _checked_budgets(budgets, unit)
    predictor = _predictor_of(model)
    macs = _exit_macs(predictor.model)
    pixels = _prepared(model, images, batch_size)
    answers = check_labels(labels, len(pixels))
    if len(pixels) < FEWEST:
        raise UserError(f"thresholds need at least {FEWEST} images, got {len(pixels)}: give more that the model was not trained on")
    if unit == "ms":
        costs = stage_milliseconds(
            predictor.model, next(_batches(model, pixels, batch_size)), batch_size, predictor.threads, predictor.precision.name
        )
    else:
        costs = tuple(float(m) for m in macs) if unit == "macs" else tuple(m / macs[-1] for m in macs)
    wanted = tuple(np.linspace(costs[0], costs[-1], BUDGETS).tolist()) if wanted is None else wanted
    check_feasible(wanted, costs, unit)
    sure, correct = measured_exits(predictor, _batches(model, pixels, batch_size), answers, confidence)
    thresholds = SOLVERS[method](sure, correct, costs, wanted)
    outcomes = [outcome(each, sure, correct, costs) for each in thresholds]
    accuracies, mean_costs, shares = zip(*outcomes)
    found = Calibration(
        unit,
        method,
        confidence,
        wanted,
        tuple(thresholds),
        accuracies,
        mean_costs,
        shares,
        costs,
        tuple(map(float, macs)),
        tuple(correct.mean(0).tolist()),
        len(pixels),
        fingerprint(predictor.model),
        f"{cpu_name()}, batch {batch_size}" if unit == "ms" else "",
    )
    predictor.model.calibration = found  # type: ignore[attr-defined]
    return found


def _checked_budgets(budgets: Sequence[float], unit: str) -> tuple[float, ...]:
    """Ascending, each once."""
    given = list(budgets) if isinstance(budgets, Iterable) and not isinstance(budgets, str) else []
    if not given:
        raise UserError(f"budgets must be a list of one number or more, got {budgets!r}")
    return tuple(sorted({check_budget(budget, unit) for budget in given}))


def _predictor_of(model: Module | Predictor) -> Predictor:
    if not isinstance(model, (Module, Predictor)):
        raise UserError(f"calibrate() takes a cascade, its Predictor or a Classifier, not {type(model).__name__}: minivit.load reads a run")
    if isinstance(model, Predictor):
        return model
    return model.predictor if isinstance(model, Classifier) else Predictor(model)


def _exit_macs(model: Module) -> tuple[int, ...]:
    if not isinstance(model, Model):
        raise UserError(f"calibrate() takes a cascade of create_model, not {type(model).__name__}")
    macs = model.cost().exits
    if len(macs) < 2:
        raise UserError(f"{model.name} has one exit: thresholds are for cascades, as create_model('dvt', ...)")
    return macs


def _prepared(model: Module | Predictor, images: Any, batch_size: int) -> np.ndarray:
    """All images, for a Classifier as pixels (n, S, S, C), else as they are. Raises UserError for images of the training set."""
    if not isinstance(model, Classifier):
        return np.atleast_1d(images.data if isinstance(images, Tensor) else images)
    pixels = prepare(images, image_size=model.preprocessing.image_size, in_channels=model.preprocessing.in_channels)
    known = overlap(model.training_sketch, pixels)
    if known > MOST_KNOWN:
        raise UserError(
            f"about {100 * known:.0f} % of these images are of the training set, on which the model is surer than on others: "
            "calibrate on images that were held out"
        )
    return pixels


def _batches(model: Module | Predictor, pixels: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Normalised (B, C, S, S)."""
    if isinstance(model, Classifier):
        return model.preprocessing.batches(pixels, batch_size)
    return (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))


def measured_exits(predictor: Predictor, batches: Iterable[np.ndarray], labels: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(confidence of each exit in each image (n, K), whether it is right (n, K)) of normalised (B, C, S, S) batches.

    Raises UserError for a label out of range, and for logits that are not finite.
    """
    logits = np.concatenate([predictor.logits(images) for images in batches], axis=1)  # (K, n, classes)
    if labels.max() >= logits.shape[-1]:
        first = int(np.argmax(labels >= logits.shape[-1]))
        raise UserError(f"labels[{first}] is {labels[first]}, out of range for {logits.shape[-1]} classes")
    if not np.isfinite(logits).all():
        raise UserError("the model's logits are not finite: it cannot be calibrated; train it again with a smaller lr")
    return confidence(logits, kind).T, (logits.argmax(-1) == labels).T


def stage_milliseconds(
    model: Module, images: np.ndarray, batch_size: int = 64, threads: int | None = None, precision: str | None = None
) -> tuple[float, ...]:
    """Milliseconds an image until each exit has answered for all of a batch, its own and all before it: medians of several rounds.

    images: normalised (B, C, S, S), repeated or cut to `batch_size`. threads, precision: as the Predictor's.
    """
    predictor = Predictor(model, precision, batch_size=batch_size, threads=threads)  # whose plans are of this very size
    batch = images[np.arange(batch_size) % len(images)]
    rounds = []
    for _ in range(1 + ROUNDS):  # the first records the plans
        start = perf_counter()
        rounds.append([perf_counter() - start for _ in predictor.exits(batch)])
    return tuple((1e3 / batch_size * np.median(rounds[1:], axis=0)).tolist())


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices, ascending, of half the images of each class, to calibrate on, and of the other half, to test on; always the same."""
    return Split(0.5).divide(labels)
