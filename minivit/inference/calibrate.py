"""`calibrate`: optimise the thresholds of a cascade on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from time import perf_counter
from typing import Any, cast

import numpy as np

from ..data.dataset import Split
from ..data.labels import check_labels
from ..data.train_test_overlap import overlap
from ..errors import UserError
from ..models import Model
from ..models.cascade.calibration import (
    CONFIDENCES,
    METHODS,
    UNITS,
    Calibration,
    Confidence,
    Method,
    Unit,
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
FEWEST = 100  # minimum number of calibration images
MOST_KNOWN = 0.05  # maximum fraction of training images among them
BUDGETS = 8  # default number of budgets
ROUNDS = 9  # of time measurements


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
    """Optimise the thresholds of a cascade for each of several budgets. The result is also stored as `model.calibration`, which
    `predict(images, budget)` uses.

    model: a cascade of create_model("dvt", ...), its Predictor, or a Classifier (`load(...)`, `train(...).model`).
    images: at least 100 images that the model was not trained on: for a Classifier anything that its predict() takes except
        folders, otherwise normalised (n, C, H, W) arrays. labels: (n,) integers, for a Classifier also names of classes.
    budgets: maximum mean costs per image; None: 8, evenly spaced between the costs of the first and the last exit.
    unit: of the budgets: "macs", multiply-adds; "ms", milliseconds per image, measured on this machine in batches of `batch_size`;
        "share", the fraction of the multiply-adds up to the last exit.
    method: "exact", the highest accuracy over all thresholds, or "sweep", the authors' released rule (`models/cascade/thresholds.py`).
    confidence: "max", "entropy" or "margin" (`models/cascade/calibration.py`).
    Raises UserError for a model with one exit, fewer than 100 images, invalid labels, a budget that no thresholds can meet, and images of
    the training set, which a Classifier detects (`data/train_test_overlap.py`).
    """
    for option, value, choices in (("unit", unit, UNITS), ("method", method, METHODS), ("confidence", confidence, CONFIDENCES)):
        check_choice(option, value, choices)
    if batch_size < 1:
        raise UserError(f"batch_size must be 1 or more, got {batch_size}")
    checked_budgets = None if budgets is None else _checked_budgets(budgets, unit)
    predictor = _predictor_of(model)
    macs = _exit_macs(predictor.model)
    pixels = _prepare(model, images, batch_size)
    targets = check_labels(labels, len(pixels), class_names=model.class_names if isinstance(model, Classifier) else None)
    if len(pixels) < FEWEST:
        raise UserError(f"thresholds need at least {FEWEST} images, got {len(pixels)}: give more that the model was not trained on")
    if unit == "ms":
        costs = stage_milliseconds(
            predictor.model, next(_batches(model, pixels, batch_size)), batch_size, predictor.threads, predictor.precision.name
        )
    else:
        costs = tuple(float(m) for m in macs) if unit == "macs" else tuple(m / macs[-1] for m in macs)
    checked_budgets = tuple(np.linspace(costs[0], costs[-1], BUDGETS).tolist()) if checked_budgets is None else checked_budgets
    check_feasible(checked_budgets, costs, unit)
    confidences, correct = measured_exits(predictor, _batches(model, pixels, batch_size), targets, confidence)
    thresholds = SOLVERS[method](confidences, correct, costs, checked_budgets)
    outcomes = [outcome(candidate, confidences, correct, costs) for candidate in thresholds]
    accuracies, mean_costs, shares = zip(*outcomes)
    calibration = Calibration(
        cast(Unit, unit),
        cast(Method, method),
        cast(Confidence, confidence),
        checked_budgets,
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
    predictor.model.calibration = calibration  # type: ignore[attr-defined]
    return calibration


def _checked_budgets(budgets: Sequence[float], unit: str) -> tuple[float, ...]:
    """The budgets in ascending order without duplicates. Raises UserError."""
    items = list(budgets) if isinstance(budgets, Iterable) and not isinstance(budgets, str) else []
    if not items:
        raise UserError(f"budgets must be a list of one number or more, got {budgets!r}")
    return tuple(sorted({check_budget(budget, unit) for budget in items}))


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


def _prepare(model: Module | Predictor, images: Any, batch_size: int) -> np.ndarray:
    """All images: as pixels (n, H, W, C) for a Classifier, otherwise unchanged. Raises UserError for images of the training set."""
    if not isinstance(model, Classifier):
        return np.atleast_1d(images.data if isinstance(images, Tensor) else images)
    pixels = model.preprocessing.pixels(images)
    training_share = overlap(model.training_sketch, pixels)
    if training_share > MOST_KNOWN:
        raise UserError(
            f"about {100 * training_share:.0f} % of these images are of the training set, on which the model is surer than on others: "
            "calibrate on images that were held out"
        )
    return pixels


def _batches(model: Module | Predictor, pixels: np.ndarray, batch_size: int) -> Iterator[np.ndarray]:
    """Normalised batches (B, C, H, W)."""
    if isinstance(model, Classifier):
        return model.preprocessing.batches(pixels, batch_size)
    return (pixels[start : start + batch_size] for start in range(0, len(pixels), batch_size))


def measured_exits(predictor: Predictor, batches: Iterable[np.ndarray], labels: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """(confidence of each exit for each image (n, K), whether its prediction is correct (n, K)) for normalised batches (B, C, H, W).

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
    """Cumulative milliseconds per image up to each exit, if all images of a batch reach it: medians over several rounds.

    images: normalised (B, C, H, W), repeated or truncated to `batch_size`. threads, precision: as for Predictor.
    """
    predictor = Predictor(model, precision, batch_size=batch_size, threads=threads)  # plans for exactly this batch size
    batch = images[np.arange(batch_size) % len(images)]
    rounds = []
    for _ in range(1 + ROUNDS):  # the first round records the plans
        start = perf_counter()
        rounds.append([perf_counter() - start for _ in predictor.exits(batch)])
    return tuple((1e3 / batch_size * np.median(rounds[1:], axis=0)).tolist())


def halves(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A fixed split into ascending indices of one half of each class, for calibration, and of the other half, for testing."""
    return Split(0.5).divide(labels)
